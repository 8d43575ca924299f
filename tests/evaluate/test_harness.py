from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM

from sppctl.errors import StageError, UserError
from sppctl.evaluate import harness
from sppctl.evaluate.harness import ZEROSHOT, Member, TaskGroup, _summary, check_tasks, group_of, members
from sppctl.evaluate.scorer import Scorer
from sppctl.model.checkpoint import load_model, load_tokenizer

# --- names ------------------------------------------------------------------------------------------------------------


def test_the_groups_of_the_literature_and_any_other_name_which_is_one_task() -> None:
    tasks = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
    assert group_of("zeroshot") == TaskGroup(tasks, 0)
    assert group_of("mmlu") == TaskGroup(("mmlu",), 5)
    assert group_of("piqa") == TaskGroup(("piqa",), None)


def test_our_own_groups_need_no_look_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_task_manager", lambda *_, **__: pytest.fail("lm-eval was asked"))
    check_tasks([])
    check_tasks(["zeroshot", "mmlu"])


@pytest.fixture(scope="module")
def task_manager() -> Any:
    """The library's own, which takes seconds to make."""
    return harness._task_manager(None, whole=True)


@pytest.mark.usefixtures("task_manager")
def test_tasks_and_groups_of_the_library_are_known() -> None:
    check_tasks(["zeroshot", "piqa", "mmlu_stem", "ai2_arc", *ZEROSHOT])


@pytest.mark.usefixtures("task_manager")
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["piqa", "arc_eazy"], "arc_eazy is neither .* did you mean .*arc_easy"),
        (["zeroshots"], "zeroshots .* did you mean zeroshot"),
        (["§§§§"], "§§§§ is neither .*; `lm-eval ls tasks` lists them"),
        (["boolq", "arc_q*"], r"arc_q\* matches no lm-eval task; `lm-eval ls tasks` lists them"),
        (["humaneval*"], r"humaneval\w* executes model-generated code"),
        (["boolq", "mbpp_plus"], "mbpp_plus executes model-generated code"),  # includes another file
    ],
)
def test_tasks_that_are_unknown_or_run_code_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(UserError, match=rf"eval\.tasks: {message}"):
        check_tasks(names)


@pytest.mark.slow
def test_patterns_mean_all_tasks_and_groups_that_fit(own_tasks: Path) -> None:
    names = ["wikitext", "arc_?asy", "a[r]c_easy", "all"]
    assert harness.expanded(names) == ["wikitext", "arc_easy", "zeroshot", "mmlu"]
    assert harness.expanded(["*_sums", "su?s"], str(own_tasks)) == ["large_sums", "small_sums", "sums"]


def test_examples_in_prompts_are_known_beforehand(own_tasks: Path) -> None:
    assert [harness.shots("small_sums", asked, str(own_tasks)) for asked in (None, 0, 3)] == [0, 0, 3]
    assert [harness.shots("truthfulqa_mc1", asked) for asked in (None, 3)] == [0, 0]  # its YAML insists on none
    assert [harness.shots("bbh", asked) for asked in (None, 2)] == [None, 2]  # a group


def test_what_a_seed_can_change(own_tasks: Path) -> None:
    drawn = [harness.is_drawn(task, 0, str(own_tasks)) for task in ("small_sums", "read", "said", "drawn", "sums")]
    assert drawn == [False, False, True, True, True]
    assert harness.is_drawn("small_sums", 1, str(own_tasks))


def test_the_small_index_agrees_with_the_whole(task_manager: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    small = harness._task_manager(None, whole=False)
    assert {*ZEROSHOT, "wikitext", "mmlu_anatomy"} <= set(small.all_subtasks)
    for name in small.all_subtasks:
        assert small.task_index[name].yaml_path == task_manager.task_index[name].yaml_path
    found = members("mmlu")
    monkeypatch.setattr(harness, "_manager_for", lambda *_: task_manager)
    assert members("mmlu") == found


def test_the_subjects_of_mmlu() -> None:
    found = members("mmlu")
    assert len(found) == 57
    assert found[0] == Member("mmlu_abstract_algebra", {"mmlu": {"acc": True}, "mmlu_stem": {"acc": True}})
    assert len({list(member.groups)[1] for member in found}) == 4


def test_members_of_other_groups(task_manager: Any, own_tasks: Path) -> None:
    assert [member.task for member in members("zeroshot")] == list(ZEROSHOT)
    assert members("wikitext") == [Member("wikitext")]
    assert members("ai2_arc") == [Member("arc_challenge", {"ai2_arc": {}}), Member("arc_easy", {"ai2_arc": {}})]
    assert members("bbh") == [Member("bbh")]  # averages what one filter lets through: left to lm-eval
    assert len({member.task for member in members("arab_culture")}) > 1  # averages one metric, not a list of them
    twice = [member.task for member in members("mela")]  # names one of its tasks twice
    assert len(set(twice)) == len(twice) == 9
    rules = {"sums": {"acc": True, "acc_norm": False}}
    assert members("sums", str(own_tasks)) == [Member("small_sums", rules), Member("large_sums", rules)]


def test_own_tasks_are_known(own_tasks: Path, tmp_path: Path) -> None:
    check_tasks(["sums", "read", "mmlu"], str(own_tasks))
    with pytest.raises(UserError, match=r"eval\.include_path: .*nowhere is not a folder"):
        check_tasks(["mmlu"], str(tmp_path / "nowhere"))


# --- what is taken from lm-eval's results -----------------------------------------------------------------------------


def found(results: dict[str, dict[str, Any]], groups: dict[str, list[str]] | None = None) -> dict[str, Any]:
    """Results as lm-eval gives them: 10 of 100 examples of each task."""
    groups = groups or {}
    return {
        "results": {name: {"alias": name, "name": name, "sample_len": 10} | found for name, found in results.items()},
        "groups": {name: results[name] for name in groups},
        "group_subtasks": groups,
        "versions": dict.fromkeys(results, 1.0),
        "n-shot": {name: 0 for name in results if name not in groups},
        "n-samples": {name: {"original": 100, "effective": 10} for name in results if name not in groups},
    }


def test_one_task() -> None:
    results = found({"piqa": {"acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.75}})
    results["higher_is_better"] = {"piqa": {"acc": True, "acc_norm": True}}
    assert _summary(results) == {
        "tasks": {
            "piqa": {
                "acc": 0.5,
                "acc_stderr": 0.1,
                "acc_norm": 0.75,
                "metric": "acc",
                "higher_is_better": True,
                "version": 1.0,
                "num_fewshot": 0,
                "samples": 10,  # with a limit, of those that were measured
            }
        },
        "mean": {"acc": 0.5, "acc_norm": 0.75},
    }


def test_the_mean_is_plain_over_tasks() -> None:
    results = found(
        {
            "boolq": {"acc,none": 0.6, "acc_stderr,none": 0.1},
            "rte": {"acc,none": 0.5, "acc_stderr,none": 0.2},
            "arc_easy": {"acc,none": 0.1, "acc_stderr,none": 0.3, "acc_norm,none": 0.9},
        }
    )
    results["n-samples"]["boolq"]["effective"] = 1000  # however many examples each has
    summary = _summary(results)
    assert list(summary["tasks"]) == ["boolq", "rte", "arc_easy"]
    assert summary["mean"] == {"acc": pytest.approx(0.4)}  # acc_norm is not known of all


def test_a_group_of_the_library_has_its_own_mean() -> None:
    groups = {"mmlu": ["mmlu_stem", "mmlu_other"], "mmlu_stem": ["mmlu_a", "mmlu_b"], "mmlu_other": ["mmlu_c"]}
    results = found(
        {
            "mmlu_a": {"acc,none": 0.2, "acc_stderr,none": "N/A"},
            "mmlu_b": {"acc,none": 0.4, "acc_stderr,none": "N/A"},
            "mmlu_c": {"acc,none": 0.9, "acc_stderr,none": "N/A"},
            "mmlu_stem": {"acc,none": 0.3, "acc_stderr,none": "N/A", "sample_count": {"acc,none": 2}},
            "mmlu_other": {"acc,none": 0.9, "acc_stderr,none": "N/A", "sample_count": {"acc,none": 1}},
            "mmlu": {"acc,none": 0.45, "acc_stderr,none": 0.03, "sample_count": {"acc,none": 3}},  # weighted
        },
        groups,
    )
    summary = _summary(results)
    assert list(summary["tasks"]) == ["mmlu_a", "mmlu_b", "mmlu_c"]  # no group is counted as a task
    assert summary["tasks"]["mmlu_a"] == {"acc": 0.2, "metric": "acc", "version": 1.0, "num_fewshot": 0, "samples": 10}
    assert summary["mean"] == {"acc": 0.45, "acc_stderr": 0.03}


def test_a_task_without_accuracy_has_no_mean() -> None:
    summary = _summary(found({"lambada": {"perplexity,none": 12.5}}))
    assert summary["tasks"]["lambada"]["perplexity"] == 12.5
    assert summary["mean"] == {}


def test_two_filters_of_one_metric_are_kept_apart() -> None:
    metrics = {"exact_match,strict-match": 0.25, "exact_match,flexible-extract": 0.5}
    values = _summary(found({"gsm8k": metrics}))["tasks"]["gsm8k"].values()
    assert {0.25, 0.5} <= set(values)


# --- running ----------------------------------------------------------------------------------------------------------


def run(llama: Path, own_tasks: Path, name: str = "small_sums", **options: Any) -> tuple[dict[str, Any], Any]:
    model, tokenizer = load_model(llama, torch.device("cpu"), "float32"), load_tokenizer(llama)
    given = {"num_fewshot": None, "batch_size": 2, "limit": None, "seed": 0} | options
    return harness.evaluate(model, tokenizer, name, include_path=str(own_tasks), **given)


def test_settings_are_passed_on(llama: Path, own_tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval

    asked: dict[str, Any] = {}
    evaluate = lm_eval.evaluate

    def spy(**options: Any) -> Any:
        asked.update(options)
        return evaluate(**options)

    monkeypatch.setattr(lm_eval, "evaluate", spy)
    metrics, samples = run(llama, own_tasks, num_fewshot=2, limit=3, seed=5, system_prompt="Add.")
    assert (asked["limit"], asked["system_instruction"], asked["apply_chat_template"]) == (3, "Add.", False)
    (task,) = asked["task_dict"]["tasks"].values()
    assert task.fewshot_rnd is not None
    assert all(request.args[0].startswith("Add.") for request in task.instances)
    assert metrics["tasks"]["small_sums"]["num_fewshot"] == 2
    assert (metrics["tasks"]["small_sums"]["samples"], len(samples["small_sums"])) == (3, 3)


def test_a_chat_template_shapes_the_prompt(llama: Path, own_tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(Scorer, "loglikelihood", _recording(seen))
    model, tokenizer = load_model(llama, torch.device("cpu"), "float32"), load_tokenizer(llama)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    options: dict[str, Any] = {"num_fewshot": 1, "batch_size": 2, "limit": 2, "seed": 0, "system_prompt": "Add."}
    harness.evaluate(model, tokenizer, "small_sums", chat_template=True, include_path=str(own_tasks), **options)
    assert all(prompt.startswith("[system]Add.[user]") and "[assistant]" in prompt for prompt in seen)
    assert seen


def test_padding_that_the_model_does_not_embed_changes_nothing(llama: Path, own_tasks: Path) -> None:
    model, options = load_model(llama, torch.device("cpu"), "float32"), {"num_fewshot": 0, "limit": 5, "seed": 0}
    answers = []
    for token in ("<pad>", "[PAD]"):
        tokenizer = load_tokenizer(llama)
        tokenizer.add_tokens(["<more>"])  # 259, the last that is embedded
        tokenizer.add_special_tokens({"pad_token": token})
        found = harness.evaluate(model, tokenizer, "said", batch_size=2, include_path=str(own_tasks), **options)
        answers.append(found)
    assert tokenizer.convert_tokens_to_ids("[PAD]") == 260
    assert answers[0] == answers[1]


def test_a_question_with_a_token_that_the_model_does_not_embed(llama: Path, own_tasks: Path) -> None:
    model, options = load_model(llama, torch.device("cpu"), "float32"), {"num_fewshot": 0, "limit": 5, "seed": 0}
    tokenizer = load_tokenizer(llama)
    tokenizer.add_tokens(["<more>", " plus"])
    for task in ("small_sums", "said"):
        with pytest.raises(UserError, match=r"^eval\.tasks: token id 260 \(' plus'\) .* 260 embeddings"):
            harness.evaluate(model, tokenizer, task, batch_size=2, include_path=str(own_tasks), **options)


@pytest.mark.parametrize(
    ("task", "starts", "refused"),
    [("said", True, True), ("read", True, False), ("read", False, True), ("sums", False, False)],
)
def test_a_task_that_needs_an_end_of_text(task: str, starts: bool, refused: bool, own_tasks: Path) -> None:
    tokenizer = SimpleNamespace(eos_token_id=None, bos_token_id=1 if starts else None)
    if not refused:
        harness.check_tasks([task], str(own_tasks), tokenizer)
        return
    with pytest.raises(
        UserError, match=rf"^eval\.tasks: {task} .* needs an end-of-text token, and the tokenizer has none"
    ):
        harness.check_tasks([task], str(own_tasks), tokenizer)
    harness.check_tasks([task], str(own_tasks), SimpleNamespace(eos_token_id=2))


def _recording(seen: list[str]) -> Any:
    original = Scorer.loglikelihood

    def loglikelihood(self: Any, requests: list[Any], **options: Any) -> Any:
        seen.extend(request.args[0] for request in requests)
        return original(self, requests, **options)

    return loglikelihood


def test_truncated_prompts_are_counted(llama: Path, own_tasks: Path) -> None:
    assert run(llama, own_tasks)[0]["truncated_prompts"] == 0
    # two examples before each question: more than the 128 tokens of this model; three answers share a prompt
    assert run(llama, own_tasks, num_fewshot=2, limit=4)[0]["truncated_prompts"] == 4


@pytest.mark.parametrize("task", ["small_sums", "read", "said"])
def test_batches_are_those_of_the_library(llama: Path, own_tasks: Path, task: str) -> None:
    """The very numbers, to the last bit, of lm-eval's own model with as many requests at a time."""
    import lm_eval

    model, tokenizer = load_model(llama, torch.device("cpu"), "float32"), load_tokenizer(llama)
    logged = []
    for lm in (HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4), Scorer(model, tokenizer, 4)):
        tasks = harness._task_manager(str(own_tasks), whole=False).load([task])
        found = lm_eval.evaluate(lm=lm, task_dict=tasks, bootstrap_iters=0)
        logged.append([sample["resps"] for sample in found["samples"][task]])
    if task == "read":  # windows of several texts share a batch in other order
        assert logged[0] == [[[pytest.approx(score, rel=1e-6)]] for [[score]] in logged[1]]
    else:
        assert logged[0] == logged[1]


@pytest.mark.parametrize(
    ("task", "method", "size", "largest"),
    [("small_sums", "_loglikelihood_tokens", 16, 3), ("said", "generate_until", 4, 1)],
)
def test_a_batch_that_does_not_fit_is_halved(
    task: str, method: str, size: int, largest: int, llama: Path, own_tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(llama, own_tasks, task, batch_size=size)
    original, refused = getattr(HFLM, method), []

    def small_device(self: Any, requests: list[Any], **options: Any) -> Any:
        if len(requests) > largest:
            refused.append(len(requests))
            raise torch.OutOfMemoryError
        return original(self, requests, **options)

    monkeypatch.setattr(HFLM, method, small_device)
    assert run(llama, own_tasks, task, batch_size=size) == expected
    assert refused[0] > largest
    assert task != "said" or refused == [4, 2, 2]


def test_batches_grow_as_requests_become_shorter(llama: Path) -> None:
    scorer = Scorer(load_model(llama, torch.device("cpu"), "float32"), load_tokenizer(llama), None)
    assert scorer._batch_size_for(1024) == 2
    assert scorer._batch_size_for(128) == 16
    assert scorer._batch_size_for(10) == 32
    scorer._room = 128 * (3 * 260 + 20 * 32) * 4 * 5.5
    assert scorer._batch_size_for(128) == 5
    scorer._room = 0
    assert scorer._batch_size_for(128) == 1


def test_batches_of_generation_are_sized_by_their_prompts(
    llama: Path, own_tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(llama, own_tasks, "said")
    sizes: list[int] = []
    original = HFLM.generate_until

    def counted(self: Any, requests: list[Any], **options: Any) -> Any:
        sizes.append(len(requests))
        return original(self, requests, **options)

    monkeypatch.setattr(HFLM, "generate_until", counted)
    monkeypatch.setattr(Scorer, "max_length", 8192)
    assert run(llama, own_tasks, "said", batch_size=None) == expected
    assert sizes == [4]  # all of them, though one of 8,192 tokens would fill a batch


def test_what_is_drawn_depends_on_the_seed_alone(llama: Path, own_tasks: Path) -> None:
    one, again, other = (texts_of(llama, own_tasks, seed) for seed in (1, 1, 2))
    assert one == again != other


def texts_of(llama: Path, own_tasks: Path, seed: int) -> list[Any]:
    import lm_eval

    model, tokenizer = load_model(llama, torch.device("cpu"), "float32"), load_tokenizer(llama)
    torch.manual_seed(torch.seed())  # whatever was drawn before
    found = lm_eval.evaluate(
        lm=Scorer(model, tokenizer, 2, seed=seed),
        task_dict=harness._task_manager(str(own_tasks), whole=False).load(["drawn"]),
        bootstrap_iters=0,
    )
    return [sample["resps"] for sample in found["samples"]["drawn"]]


def test_a_model_that_gives_no_numbers_fails(llama: Path, own_tasks: Path) -> None:
    model = load_model(llama, torch.device("cpu"), "float32")
    model.get_output_embeddings().weight.data *= float("nan")
    options: dict[str, Any] = {"num_fewshot": None, "batch_size": 2, "limit": 2, "seed": 0}
    with pytest.raises(StageError, match=r"small_sums: logits are not finite \(dtype float32\)"):
        harness.evaluate(model, load_tokenizer(llama), "small_sums", include_path=str(own_tasks), **options)


def test_the_library_writes_nothing_where_nobody_watches(capfd: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(RuntimeError), harness._silently():
        print("to stdout")
        os.write(2, b"to stderr")
        raise RuntimeError
    print("results")
    os.write(2, b"an error")
    assert capfd.readouterr() == ("results\n", "an error")


def test_a_failure_of_the_library_is_a_failed_stage(
    llama: Path, own_tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval

    def fail(**_: Any) -> None:
        raise KeyError("no such column")

    monkeypatch.setattr(lm_eval, "evaluate", fail)
    with pytest.raises(StageError, match=r"lm-eval could not run small_sums: .*no such column"):
        run(llama, own_tasks)


def by_the_command_line(checkpoint: Path, out: Path, task: str, *options: str) -> tuple[dict[str, Any], list[Any]]:
    """Results and samples of ``lm_eval --model hf``."""
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={checkpoint}"]
    command += ["--tasks", task, "--device", "cpu", "--log_samples", "--output_path", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(next(out.rglob("results_*.json")).read_text())
    samples = [json.loads(line) for line in next(out.rglob("samples_*.jsonl")).read_text().splitlines()]
    return results["results"][task], samples


@pytest.mark.slow
def test_samples_are_those_of_the_command_line(llama: Path, own_tasks: Path, tmp_path: Path) -> None:
    options = ["--include_path", str(own_tasks), "--num_fewshot", "1", "--seed", "3", "--batch_size", "2"]
    theirs, logged = by_the_command_line(llama, tmp_path, "small_sums", *options)
    metrics, samples = run(llama, own_tasks, num_fewshot=1, seed=3)
    for metric in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr"):
        assert metrics["tasks"]["small_sums"][metric] == theirs[f"{metric},none"]
    assert_same_samples(samples["small_sums"], logged)


def assert_same_samples(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    assert len(ours) == len(theirs)
    for own, sample in zip(ours, sorted(theirs, key=lambda sample: sample["doc_id"]), strict=True):
        assert (own["doc"], own["hash"]) == (sample["doc_id"], sample["doc_hash"])
        assert (own["acc"], own["acc_norm"]) == (sample["acc"], sample["acc_norm"])
        likelihoods = [float(likelihood) for likelihood, _ in sample["filtered_resps"]]
        assert own["chosen"] == likelihoods.index(max(likelihoods))
        assert (own["chosen"] == own["target"]) == bool(own["acc"])


COMPARE = """
import json, sys
import lm_eval, torch
from lm_eval.models.huggingface import HFLM
from sppctl.model import checkpoint
from sppctl.evaluate import harness
from pathlib import Path

directory = Path(sys.argv[1])
model = checkpoint.load_model(directory, torch.device("cpu"), "float32")
tokenizer = checkpoint.load_tokenizer(directory)
ours = harness.evaluate(model, tokenizer, "arc_easy", num_fewshot=0, batch_size=2, limit=20, seed=0)
opened = HFLM(pretrained=str(directory), device="cpu", batch_size=1)
theirs = lm_eval.simple_evaluate(model=opened, tasks=["arc_easy"], limit=20)
samples = [{key: value for key, value in sample.items() if key != "doc"} for sample in theirs["samples"]["arc_easy"]]
print(json.dumps([ours, theirs["results"]["arc_easy"], samples], default=str))
"""


@pytest.mark.shared
@pytest.mark.slow
def test_values_are_those_of_the_library(shared_data: Path, llama: Path, tmp_path: Path) -> None:
    setup = shared_data / "hf-env.sh"
    if not setup.is_file():
        pytest.skip("no data mirror beside the checkout")
    # at 128 tokens some of these questions lose their first words; that is lm-eval's own doing on both sides
    done = subprocess.run(
        ["bash", "-c", f'source "{setup}" && exec "$0" -c "$1" "$2"', sys.executable, COMPARE, str(llama)],
        env=os.environ | {"SPPCTL_HF_SCRATCH": str(tmp_path / "hf")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (ours, samples), theirs, logged = json.loads(done.stdout.splitlines()[-1])
    assert_same_samples(samples["arc_easy"], logged)
    task = ours["tasks"]["arc_easy"]
    assert (task["acc"], task["acc_norm"]) == (theirs["acc,none"], theirs["acc_norm,none"])
    assert (task["acc_stderr"], task["acc_norm_stderr"]) == (theirs["acc_stderr,none"], theirs["acc_norm_stderr,none"])
    assert (task["samples"], task["num_fewshot"]) == (20, 0)
    assert ours["mean"] == {"acc": task["acc"], "acc_norm": task["acc_norm"]}
