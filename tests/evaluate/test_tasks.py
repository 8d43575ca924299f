from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import sppctl, sppctl_in_ranks

from sppctl.config.load import load_config
from sppctl.data import chat
from sppctl.errors import StageError, UserError
from sppctl.evaluate import harness, tasks
from sppctl.evaluate import stage as evaluate
from sppctl.evaluate.results import Results, TaskMeasure
from sppctl.evaluate.values import group_mean, values_of
from sppctl.files import sealed
from sppctl.model.checkpoint import load_model, load_tokenizer
from sppctl.run import pipeline
from sppctl.run.directory import Run

Measure = Callable[..., dict[str, Any]]


def names(content: dict[str, Any]) -> list[str]:
    """Of the rows that tables have."""
    return [value.quantity.label for value in values_of(Results.from_json(content).results)]


@pytest.fixture
def measure(config_file: Path, llama: Path, own_tasks: Path) -> Measure:
    """measure("eval.limit=3", ...) -> the results of the base model on the tasks of one's own."""

    def run(*overrides: str, names: str = "sums") -> dict[str, Any]:
        own = [f"eval.include_path={own_tasks}", f"eval.tasks=[{names}]", "eval.perplexity=[]"]
        return pipeline.evaluate_some(Run(load_config(str(config_file), [*own, *overrides])), ["base"])["base"]

    return run


class Asked(list[str]):
    """The tasks that lm-eval has been asked for; at the number ``fails_at`` the power is cut."""

    fails_at: int | None = None


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    run, asked = harness.evaluate, Asked()

    def recorded(model: Any, tokenizer: Any, name: str, **options: Any) -> Any:
        asked.append(name)
        if len(asked) == asked.fails_at:
            raise StageError("power cut")
        return run(model, tokenizer, name, **options)

    monkeypatch.setattr(harness, "evaluate", recorded)
    return asked


# --- what is asked for ------------------------------------------------------------------------------------------------


def wanted(*overrides: str) -> list[TaskMeasure]:
    return tasks.wanted(load_config(None, ["run.seed=4", *overrides]))


def test_what_is_asked_for(own_tasks: Path) -> None:
    assert wanted("eval.tasks=[wikitext]") == [TaskMeasure("wikitext", seed=4)]
    options = ["eval.num_fewshot=2", "eval.chat_template=true", "eval.system_prompt=Add.", "eval.limit=7"]
    options += ["eval.tasks=[read]", f"eval.include_path={own_tasks}", "eval.batch_size=3"]
    assert wanted(*options) == [TaskMeasure("read", 2, 7, 4, None, True, "Add.", 3)]


def test_all_is_every_group_task_by_task() -> None:
    measures = wanted("eval.tasks=[all, zeroshot]")
    assert [measure.group for measure in measures] == ["zeroshot"] * 7 + ["mmlu"] * 57 + [None]
    assert [measure.num_fewshot for measure in measures] == [0] * 7 + [5] * 57 + [None]


# --- measuring --------------------------------------------------------------------------------------------------------


def test_every_task_is_written_with_all_that_one_must_know(measure: Measure, tmp_path: Path) -> None:
    content = measure("eval.limit=3")
    small, large = content["results"]
    assert [entry["settings"]["tasks"] for entry in (small, large)] == ["small_sums", "large_sums"]
    values = small["metrics"]["tasks"]["small_sums"]
    assert (values["version"], values["metric"], values["num_fewshot"], values["samples"]) == (1.5, "acc", 0, 3)
    assert values["acc_stderr"] >= 0
    assert (small["metrics"]["truncated_prompts"], small["metrics"]["members"]) == (0, 2)
    assert len(small["tokenizer"]) == 16
    assert small["versions"]["lm_eval"]
    lines = (tmp_path / "run/eval/base.samples/small_sums.jsonl").read_text().splitlines()
    assert len(lines) == 3
    first = json.loads(lines[0])
    assert set(first) == {"doc", "hash", "chosen", "target", "acc", "acc_norm"}
    assert values["acc"] == pytest.approx(sum(json.loads(line)["acc"] for line in lines) / 3)


def test_an_interrupted_group_continues_with_the_next_task(measure: Measure, asked: Asked, tmp_path: Path) -> None:
    asked.fails_at = 2
    with pytest.raises(StageError):
        measure()
    half = json.loads((tmp_path / "run/eval/base.json").read_text())
    assert names(half) == ["sums mean of 1 of 2 tasks", "small_sums (sums)"]
    content = measure()
    assert measure() == content
    assert asked == ["small_sums", "large_sums", "large_sums"]
    assert names(content) == ["sums mean", "small_sums (sums)", "large_sums (sums)"]


def test_a_task_is_measured_once_for_all_groups_that_have_it(measure: Measure, asked: Asked) -> None:
    measure(names="large_sums")
    content = measure(names="sums, small_sums")
    assert asked == ["large_sums", "small_sums"]
    large, small_of_group, large_of_group, small = content["results"]
    for alone, of_group in ((large, large_of_group), (small, small_of_group)):
        assert (alone["settings"].get("group"), of_group["settings"]["group"]) == (None, "sums")
        assert alone["metrics"]["tasks"] == of_group["metrics"]["tasks"]
        assert (alone["metrics"]["members"], of_group["metrics"]["members"]) == (1, 2)
    assert names(content) == ["large_sums", "sums mean", "small_sums (sums)", "large_sums (sums)", "small_sums"]


def test_what_was_measured_with_the_tasks_own_count_is_found_by_that_count(measure: Measure, asked: Asked) -> None:
    measure(names="small_sums")  # no examples of its own
    content = measure("eval.num_fewshot=0", names="small_sums")
    assert [entry["settings"]["num_fewshot"] for entry in content["results"]] == [None, 0]
    assert content["results"][1]["seconds"] == 0
    assert len(asked) == 1
    measure("eval.num_fewshot=1", names="small_sums")
    measure("eval.limit=2", names="small_sums")
    assert len(asked) == 3


def test_a_seed_that_changes_nothing_measures_nothing(measure: Measure, asked: Asked) -> None:
    measure("run.seed=1", names="small_sums")
    content = measure("run.seed=2", names="small_sums")
    assert [entry["settings"]["seed"] for entry in content["results"]] == [1, 2]
    assert len(asked) == 1
    drawn = [measure(f"run.seed={seed}", "eval.num_fewshot=1", names="small_sums") for seed in (1, 2)]
    assert [len(content["results"]) for content in drawn] == [3, 4]
    assert len(asked) == 3


def test_groups_with_other_numbers_of_examples_do_not_take_turns(measure: Measure, tmp_path: Path) -> None:
    measure("eval.num_fewshot=1", names="small_sums")
    both = measure(names="small_sums")
    assert measure("eval.num_fewshot=1", names="small_sums") == both
    samples = tmp_path / "run/eval/base.samples"
    assert sorted(path.name for path in samples.iterdir()) == ["small_sums.1-shot.jsonl", "small_sums.jsonl"]
    first, second = Results.from_json(both).tasks
    assert tasks.has_samples(first, samples)
    (samples / "small_sums.1-shot.jsonl").write_text("other\n")
    assert not tasks.has_samples(first, samples)
    assert tasks.has_samples(second, samples)


def test_tasks_whose_files_changed_are_measured_again_and_in_no_mean(
    own_tasks: Path, config_file: Path, tmp_path: Path, asked: Asked
) -> None:
    """Also if the evaluation is interrupted after the first; a task whose files are as they were is left alone."""
    folder = shutil.copytree(own_tasks, tmp_path / "own")
    for path in folder.glob("*.yaml"):
        path.write_text(path.read_text().replace(str(own_tasks), str(folder)))
    overrides = [f"eval.include_path={folder}", "eval.tasks=[sums,read]", "eval.perplexity=[]", "eval.limit=3"]
    run = Run(load_config(str(config_file), overrides))
    before = {one["settings"]["tasks"]: one for one in pipeline.evaluate_some(run, ["base"])["base"]["results"]}
    assert list(pipeline.evaluate_some(run, ["base"])["base"]["results"]) == list(before.values())
    for name, old, new in (("small_sums.jsonl", '"a": 1,', '"a": 2,'), ("large_sums.yaml", "% 2", "% 3")):
        stamp = (folder / name).stat()
        (folder / name).write_text((folder / name).read_text().replace(old, new))
        os.utime(folder / name, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))

    asked.fails_at = len(asked) + 2
    with pytest.raises(StageError):
        pipeline.evaluate_some(run, ["base"])
    half = json.loads((tmp_path / "run/eval/base.json").read_text())["results"]
    assert [one["settings"]["tasks"] for one in half] == ["read", "small_sums"]
    assert half[0] == before["read"]
    assert half[1]["metrics"]["sources"]["digest"] != before["small_sums"]["metrics"]["sources"]["digest"]
    assert "sums, limit 3 mean of 1 of 2 tasks" in names(sealed.parse((tmp_path / "run/eval/base.json").read_text()))
    after = pipeline.evaluate_some(run, ["base"])["base"]["results"]
    assert [one["settings"]["tasks"] for one in after] == ["read", "small_sums", "large_sums"]
    hashes = [
        [one["metrics"]["samples_hash"] for one in some]
        for some in (after, [before[n] for n in ("read", "small_sums", "large_sums")])
    ]
    assert [new == old for new, old in zip(*hashes, strict=True)] == [True, False, False]


def test_another_rule_of_a_group_needs_no_measuring(
    own_tasks: Path, config_file: Path, tmp_path: Path, asked: Asked
) -> None:
    folder = shutil.copytree(own_tasks, tmp_path / "own")
    overrides = [f"eval.include_path={folder}", "eval.tasks=[sums]", "eval.perplexity=[]", "eval.limit=3"]
    run = Run(load_config(str(config_file), overrides))
    pipeline.evaluate_some(run, ["base"])
    (folder / "sums.yaml").write_text((folder / "sums.yaml").read_text().replace("metric: acc,", "metric: acc_norm,"))
    harness._task_manager.cache_clear()  # another command
    after = pipeline.evaluate_some(run, ["base"])["base"]["results"]
    assert [list(one["metrics"]["groups"]["sums"]) for one in after] == [["acc_norm"]] * 2
    assert len(asked) == 2


def test_another_tokenizer_makes_results_stale(measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    before = measure()
    monkeypatch.setattr(evaluate.checkpoint, "tokenizer_fingerprint", lambda directory: "another")
    after = measure()
    assert {entry["tokenizer"] for entry in after["results"]} == {"another"} != before["results"][0]["tokenizer"]


def test_a_template_that_is_not_there(measure: Measure) -> None:
    with pytest.raises(UserError, match=r"eval\.chat_template: this model's tokenizer has no chat template"):
        measure("eval.chat_template=true")


def test_the_mean_of_a_group_is_that_of_the_library(measure: Measure, llama: Path, own_tasks: Path) -> None:
    content = measure()
    model, tokenizer = load_model(llama, torch.device("cpu"), "float32"), load_tokenizer(llama)
    options: dict[str, Any] = {"num_fewshot": None, "batch_size": 4, "limit": None, "seed": 1}
    whole, _ = harness.evaluate(model, tokenizer, "sums", include_path=str(own_tasks), **options)
    assert set(whole["mean"]) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
    assert group_mean(Results.from_json(content).tasks, "sums") == pytest.approx(whole["mean"], rel=1e-12)
    sizes = [whole["tasks"][task]["samples"] for task in ("small_sums", "large_sums")]
    assert sizes == [9, 4]  # so that the two kinds of mean differ


def test_a_full_result_is_measured_again_once_a_limit_took_its_samples(measure: Measure, tmp_path: Path) -> None:
    samples = tmp_path / "run/eval/base.samples/small_sums.jsonl"
    full = measure(names="small_sums")
    assert measure(names="small_sums") == full
    before = samples.read_text()
    measure("eval.limit=2", names="small_sums")
    assert len(samples.read_text().splitlines()) == 2
    again = measure(names="small_sums")
    assert samples.read_text() == before
    assert [entry["settings"]["limit"] for entry in again["results"]] == [2, None]


def test_another_batch_size_is_measured_and_recorded(measure: Measure) -> None:
    def sizes(content: dict[str, Any]) -> list[tuple[Any, Any]]:
        return [(entry["batch_size"], entry["settings"].get("batch_size")) for entry in content["results"]]

    assert sizes(measure(names="small_sums")) == [("auto", None)]
    assert sizes(measure("eval.batch_size=2", names="small_sums")) == [(2, 2)]  # in its place: the name is the same


def test_the_number_of_examples_is_that_of_the_prompts(
    measure: Measure, own_tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert names(measure("eval.num_fewshot=1", "eval.limit=2", names="small_sums")) == ["small_sums 1-shot, limit 2"]
    monkeypatch.setattr(harness, "_shots", lambda *_: 0)  # a task that insists on its own
    content = measure("eval.num_fewshot=3", "eval.limit=4", names="small_sums")
    assert names(content)[1:] == ["small_sums, limit 4"]


def test_a_long_task_tells_of_its_progress(measure: Measure, capfd: Any) -> None:
    measure(names="small_sums")
    lines = capfd.readouterr().err.splitlines()
    assert any(line.startswith("base: small_sums, batches of requests: ") for line in lines)
    assert not [line for line in lines if "it/s" in line]


def test_a_system_prompt_that_a_template_refuses(llama: Path, own_tasks: Path) -> None:
    tokenizer = load_tokenizer(llama)
    options = [f"eval.include_path={own_tasks}", "eval.tasks=[read]", "eval.chat_template=true"]
    config = load_config(None, [*options, "eval.system_prompt=Add."])
    for template in (
        "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}",
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
    ):
        tokenizer.chat_template = template
        with pytest.raises(UserError, match=r"eval\.system_prompt: this model's chat template takes no system message"):
            evaluate._check_chat(config, tokenizer, 260)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    evaluate._check_chat(config, tokenizer, 260)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "takes longer than 1 s"),
        ("{{ raise_exception('Not now.') }}", "fails on a question: Not now"),
        ("{{ messages[0].content }}<|im_end|>", r"token id 260 \('<|im_end|>'\) .* beyond the model's 260 embeddings"),
    ],
    ids=["endless", "failing", "with a token that the model lacks"],
)
def test_a_template_that_no_question_can_be_put_into(
    template: str, problem: str, llama: Path, own_tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "SECONDS", 1)
    tokenizer = load_tokenizer(llama)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = template
    config = load_config(None, [f"eval.include_path={own_tasks}", "eval.tasks=[read]", "eval.chat_template=true"])
    with pytest.raises(UserError, match=rf"^eval\.chat_template: .*{problem}"):
        evaluate._check_chat(config, tokenizer, 260)


def test_data_that_is_not_there_is_missed_before_a_run_starts(
    config_file: Path, own_tasks: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    task = (own_tasks / "small_sums.yaml").read_text().replace(str(own_tasks), str(tmp_path / "nowhere"))
    (folder / "small_sums.yaml").write_text(task)
    run = Run(load_config(str(config_file), [f"eval.include_path={folder}", "eval.tasks=[small_sums]"]))
    with pytest.raises(StageError, match=r"lm-eval could not run small_sums: .*nowhere"):
        pipeline.run_all(run)
    assert not run.directory.exists()


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(
    config_file: Path, own_tasks: Path, text_file: Path, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text(text_file.read_text()[:70])  # one window for two processes
    arguments = ["eval", str(config_file), f"eval.include_path={own_tasks}", "eval.tasks=[sums, read, said, drawn]"]
    arguments += ["eval.batch_size=2"]
    other = make_checkpoint("llama", torch.bfloat16)
    arguments += [f"eval.perplexity=[{text_file}, {short}]", f"eval.divergence={other}"]
    found = []
    for name, more in {"one": [], "ranks": [], "own": ["launch.num_processes=2"]}.items():
        place = tmp_path / name
        own = [*arguments, f"run.dir={place}", *more]
        whole = [*own, "--model=base", "--json"]
        done = sppctl_in_ranks(whole, 2) if name == "ranks" else sppctl(whole)
        assert done.returncode == 0, done.stderr
        content = json.loads(done.stdout)
        assert content == sealed.parse((place / "eval/base.json").read_text())
        assert not list(place.glob(".reference*"))
        told = shlex.split(content["results"][0]["command"])
        # processes that were started for it are told all but how to print
        assert told == ["sppctl", *own, "--model=base", *["--json"] * (name != "own")]
        files = {path.name: path.read_text() for path in sorted((place / "eval/base.samples").iterdir())}
        found.append(([(entry["settings"], entry["metrics"]) for entry in content["results"]], files))
    assert found[0] == found[1] == found[2]
    texts = [metrics for settings, metrics in found[0][0] if settings["kind"] == "perplexity"]
    assert [(metrics["windows"], metrics["kl"] != 0) for metrics in texts] == [(8, True), (1, True)]
    assert list(found[0][1]) == ["drawn.jsonl", "large_sums.jsonl", "read.jsonl", "said.jsonl", "small_sums.jsonl"]
