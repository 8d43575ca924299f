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
from sppctl.model import blocks
from sppctl.model.checkpoint import load_config as model_config
from sppctl.model.checkpoint import load_model, load_tokenizer
from sppctl.run import pipeline
from sppctl.run.directory import Run

Measure = Callable[..., Results]


def names(content: Results) -> list[str]:
    """Of the rows that tables have."""
    return [value.quantity.label for value in values_of(content.results)]


@pytest.fixture
def measure(config_file: Path, own_tasks: Path) -> Measure:
    """measure("eval.limit=3", ...) -> the results of the base model on the tasks of one's own."""

    def run(*overrides: str, names: str = "small_sums", folder: Path = own_tasks) -> Results:
        own = [f"eval.include_path={folder}", f"eval.tasks=[{names}]", "eval.perplexity=[]"]
        harness._task_manager.cache_clear()  # as another command would find the tasks
        found = pipeline.evaluate_some(Run(load_config(str(config_file), [*own, *overrides])), ["base"])
        return Results.from_json(found["base"])

    return run


@pytest.fixture
def recorded(tmp_path: Path) -> Callable[[], Results]:
    """What is in the results file now."""

    def load() -> Results:
        content = Results.load(tmp_path / "run/eval/base.json")
        assert content is not None
        return content

    return load


class Asked(list[str]):
    """The tasks that lm-eval has been asked for; at the number ``fails_at`` the power is cut."""

    fails_at: int | None = None


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    run, asked = harness.evaluate, Asked()

    def recorded(model: Any, tokenizer: Any, measure: TaskMeasure, *options: Any) -> Any:
        asked.append(measure.task)
        if len(asked) == asked.fails_at:
            raise StageError("power cut")
        return run(model, tokenizer, measure, *options)

    monkeypatch.setattr(harness, "evaluate", recorded)
    return asked


# --- what is asked for ------------------------------------------------------------------------------------------------


def configured(*overrides: str) -> list[TaskMeasure]:
    return tasks.configured(load_config("quickstart", ["run.seed=4", *overrides]))


def test_what_is_asked_for(own_tasks: Path) -> None:
    assert configured("eval.tasks=[wikitext]") == [TaskMeasure("wikitext", seed=4)]
    options = ["eval.num_fewshot=2", "eval.chat_template=true", "eval.system_prompt=Add.", "eval.limit=7"]
    options += ["eval.tasks=[read]", f"eval.include_path={own_tasks}", "eval.batch_size=3"]
    assert configured(*options) == [TaskMeasure("read", 2, 7, 4, None, True, "Add.", 3)]
    everything = [(measure.group, measure.num_fewshot) for measure in configured("eval.tasks=[all, zeroshot]")]
    assert everything == [("zeroshot", 0)] * 7 + [("mmlu", 5)] * 57 + [(None, None)]


# --- measuring --------------------------------------------------------------------------------------------------------


def test_every_task_is_written_with_all_that_one_must_know(measure: Measure, tmp_path: Path, capfd: Any) -> None:
    small, large = measure("eval.limit=3", names="sums").tasks
    assert [small.measure.task, large.measure.task] == ["small_sums", "large_sums"]
    scores = small.numbers.tasks["small_sums"]
    assert (scores.version, scores.metric, scores.num_fewshot, scores.samples) == (1.5, "acc", 0, 3)
    assert scores.scores["acc_stderr"] >= 0
    assert (small.numbers.truncated_prompts, small.numbers.members, len(small.tokenizer or "")) == (0, 2, 16)
    assert small.versions["lm_eval"]
    rows = [
        json.loads(line)
        for line in (tmp_path / "run/eval/base.samples/small_sums.limit-3.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 3
    assert set(rows[0]) == {"doc", "hash", "chosen", "target", "acc", "acc_norm"}
    assert scores.scores["acc"] == pytest.approx(sum(row["acc"] for row in rows) / 3)
    lines = capfd.readouterr().err.splitlines()
    assert any(line.startswith("base: small_sums, batches of requests: ") for line in lines)
    assert not [line for line in lines if "it/s" in line]


def test_an_interrupted_group_continues_with_the_next_task(
    measure: Measure, recorded: Callable[[], Results], asked: Asked
) -> None:
    asked.fails_at = 2
    with pytest.raises(StageError):
        measure(names="sums")
    assert names(recorded()) == ["sums mean of 1 of 2 tasks", "small_sums (sums)"]
    content = measure(names="sums")
    assert measure(names="sums") == content
    assert asked == ["small_sums", "large_sums", "large_sums"]
    assert names(content) == ["sums mean", "small_sums (sums)", "large_sums (sums)"]


def test_a_task_is_measured_once_for_all_groups_that_have_it(measure: Measure, asked: Asked) -> None:
    measure(names="large_sums")
    content = measure(names="sums, small_sums")
    assert asked == ["large_sums", "small_sums"]
    large, small_of_group, large_of_group, small = content.tasks
    for alone, of_group in ((large, large_of_group), (small, small_of_group)):
        assert [(one.measure.group, one.numbers.members) for one in (alone, of_group)] == [(None, 1), ("sums", 2)]
        assert alone.numbers.tasks == of_group.numbers.tasks
    assert names(content) == ["large_sums", "sums mean", "small_sums (sums)", "large_sums (sums)", "small_sums"]


@pytest.mark.parametrize(
    ("first", "second", "asked_twice"),
    [
        ([], ["eval.num_fewshot=0"], False),  # none are the task's own
        ([], ["eval.num_fewshot=1"], True),
        ([], ["eval.limit=2"], True),
        (["run.seed=1"], ["run.seed=2"], False),
        (["run.seed=1", "eval.num_fewshot=1"], ["run.seed=2", "eval.num_fewshot=1"], True),
    ],
)
def test_what_cannot_change_the_numbers_measures_nothing(
    first: list[str], second: list[str], asked_twice: bool, measure: Measure, asked: Asked
) -> None:
    before, after = measure(*first).tasks, measure(*second).tasks
    assert after[:-1] == before
    assert after[-1].measure != before[0].measure
    assert len(asked) == 1 + asked_twice
    assert asked_twice or after[-1].seconds == 0


def test_another_batch_size_is_measured_in_its_place(measure: Measure) -> None:
    for override, size in (("eval.batch_size=auto", "auto"), ("eval.batch_size=2", 2)):
        (result,) = measure(override).tasks  # the name is the same
        assert (result.batch_size, result.measure.batch_size or "auto") == (size, size)


def test_samples_of_other_numbers_of_examples_do_not_take_turns(measure: Measure, tmp_path: Path) -> None:
    measure("eval.num_fewshot=1")
    both = measure()
    assert measure("eval.num_fewshot=1") == both
    samples = tmp_path / "run/eval/base.samples"
    assert sorted(path.name for path in samples.iterdir()) == ["small_sums.1-shot.jsonl", "small_sums.jsonl"]
    (samples / "small_sums.1-shot.jsonl").write_text("other\n")
    assert [tasks.has_samples(result, samples) for result in both.tasks] == [False, True]


def test_a_full_result_keeps_its_samples_through_trials(measure: Measure, asked: Asked, tmp_path: Path) -> None:
    full, samples = measure(), tmp_path / "run/eval/base.samples"
    before = (samples / "small_sums.jsonl").read_text()
    assert names(measure("eval.limit=2"))[-1] == "small_sums, limit 2"
    assert len((samples / "small_sums.limit-2.jsonl").read_text().splitlines()) == 2
    measure("eval.system_prompt=Add.")
    (of_prompt,) = samples.glob("small_sums.prompt-*.jsonl")
    assert len(asked) == 3
    assert measure().tasks[0] == full.tasks[0]
    assert len(asked) == 3
    assert (samples / "small_sums.jsonl").read_text() == before
    of_prompt.unlink()
    measure("eval.system_prompt=Add.")
    assert len(asked) == 4


@pytest.fixture
def folder(own_tasks: Path, tmp_path: Path) -> Path:
    """A copy of the tasks of one's own, to be changed."""
    folder = shutil.copytree(own_tasks, tmp_path / "own")
    for path in folder.glob("*.yaml"):
        path.write_text(path.read_text().replace(str(own_tasks), str(folder)))
    return folder


def test_tasks_whose_files_changed_are_measured_again_and_in_no_mean(
    measure: Measure, recorded: Callable[[], Results], folder: Path, asked: Asked
) -> None:
    """Also if the evaluation is interrupted after the first; a task whose files are as they were is left alone."""
    again = lambda: measure("eval.limit=3", names="sums,read", folder=folder)  # noqa: E731
    before = {result.measure.task: result for result in again().tasks}
    assert again().tasks == list(before.values())
    for name, old, new in (("small_sums.jsonl", '"a": 1,', '"a": 2,'), ("large_sums.yaml", "% 2", "% 3")):
        stamp = (folder / name).stat()
        (folder / name).write_text((folder / name).read_text().replace(old, new))
        os.utime(folder / name, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))

    asked.fails_at = len(asked) + 2
    with pytest.raises(StageError):
        again()
    read, small = recorded().tasks
    assert read == before["read"]
    assert (small.numbers.sources or {})["digest"] != (before["small_sums"].numbers.sources or {})["digest"]
    assert "sums, limit 3 mean of 1 of 2 tasks" in names(recorded())
    after = {result.measure.task: result.numbers.samples_hash for result in again().tasks}
    assert list(after) == ["read", "small_sums", "large_sums"]
    assert [after[task] == before[task].numbers.samples_hash for task in after] == [True, False, False]


def test_another_rule_of_a_group_needs_no_measuring(measure: Measure, folder: Path, asked: Asked) -> None:
    measure("eval.limit=3", names="sums", folder=folder)
    (folder / "sums.yaml").write_text((folder / "sums.yaml").read_text().replace("metric: acc,", "metric: acc_norm,"))
    after = measure("eval.limit=3", names="sums", folder=folder).tasks
    assert [list(result.numbers.groups["sums"]) for result in after] == [["acc_norm"]] * 2
    assert len(asked) == 2


def test_a_task_that_leaves_its_group_leaves_its_mean(measure: Measure, folder: Path, asked: Asked) -> None:
    measure("eval.limit=3", names="sums", folder=folder)
    (folder / "sums.yaml").write_text((folder / "sums.yaml").read_text().replace("large_sums", "read"))
    after = measure("eval.limit=3", names="sums", folder=folder)
    assert asked == ["small_sums", "large_sums", "read"]
    assert [result.measure.task for result in after.tasks] == ["small_sums", "read"]


def test_an_interrupted_measuring_with_another_tokenizer_mixes_nothing(
    measure: Measure, recorded: Callable[[], Results], asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure(names="sums")
    monkeypatch.setattr(evaluate.checkpoint, "tokenizer_fingerprint", lambda directory: "another")
    asked.fails_at = len(asked) + 2
    with pytest.raises(StageError):
        measure(names="sums")
    assert names(recorded()) == ["sums mean of 1 of 2 tasks", "small_sums (sums)"]


def test_another_tokenizer_makes_results_stale(measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    (before,) = measure().tasks
    monkeypatch.setattr(evaluate.checkpoint, "tokenizer_fingerprint", lambda directory: "another")
    (after,) = measure().tasks
    assert after.tokenizer == "another" != before.tokenizer


def test_another_way_of_generating_makes_results_stale(measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    (before,) = measure().tasks
    monkeypatch.setattr(evaluate.checkpoint, "generation_fingerprint", lambda directory: "another")
    (after,) = measure().tasks
    assert after.generation == "another" != before.generation


def test_the_mean_of_a_group_is_that_of_the_library(measure: Measure, llama: Path, own_tasks: Path) -> None:
    family = measure(names="sums").tasks
    model, tokenizer = load_model(llama, torch.device("cpu"), "float32"), load_tokenizer(llama)
    whole, _ = harness.evaluate(model, tokenizer, TaskMeasure("sums", seed=1, batch_size=4), str(own_tasks))
    assert set(whole.mean) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
    assert group_mean(family, "sums") == pytest.approx(whole.mean, rel=1e-12)
    assert [scores.samples for scores in whole.tasks.values()] == [9, 4]  # so that the two kinds of mean differ


# --- before a run -----------------------------------------------------------------------------------------------------


NO_SYSTEM = r"eval\.system_prompt: this model's chat template accepts no system message"


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (None, r"eval\.chat_template: this model's tokenizer has no chat template"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
        ("{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}", NO_SYSTEM),
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", NO_SYSTEM),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            r"eval\.chat_template: .*takes longer than 1 s",
        ),
        ("{{ raise_exception('Not now.') }}", r"eval\.chat_template: .*fails on a user message: Not now"),
        (
            "{{ messages[0].content }}<|im_end|>",
            r"eval\.chat_template: token id 260 \('<\|im_end\|>'\) .* beyond the model's 260 embeddings",
        ),
    ],
)
def test_a_chat_template_is_tried_on_a_question(
    template: str | None, problem: str | None, llama: Path, own_tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "SECONDS", 1)
    tokenizer, skeleton = load_tokenizer(llama), blocks.Skeleton(model_config(llama))
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = template
    options = [f"eval.include_path={own_tasks}", "eval.tasks=[read]", "eval.perplexity=[]", "eval.seq_len=64"]
    config = load_config("quickstart", [*options, "eval.chat_template=true", "eval.system_prompt=Add."])
    if problem is None:
        evaluate.preflight(config, skeleton, tokenizer)
        return
    with pytest.raises(UserError, match=f"^{problem}"):
        evaluate.preflight(config, skeleton, tokenizer)


def test_data_that_is_not_there_is_missed_before_a_run_starts(
    config_file: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "small_sums.jsonl").unlink()
    run = Run(load_config(str(config_file), [f"eval.include_path={folder}", "eval.tasks=[small_sums]"]))
    with pytest.raises(
        UserError, match=r"^eval.tasks: lm-eval could not run small_sums: .*own/small_sums.jsonl.*; che"
    ):
        pipeline.run_all(run)
    assert "prune" not in capsys.readouterr().err, "the estimate of a run that cannot start"
    assert not run.directory.exists()


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(
    config_file: Path, own_tasks: Path, text_file: Path, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text(text_file.read_text()[:70])  # one window for two processes
    arguments = ["eval", str(config_file), f"eval.include_path={own_tasks}", "eval.tasks=[sums, read, said, drawn]"]
    arguments += ["eval.batch_size=2", f"eval.perplexity=[{text_file}, {short}]"]
    arguments.append(f"eval.divergence={make_checkpoint('llama', torch.bfloat16)}")
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
        # processes that were started for it are given everything but how to print
        command = ["sppctl", *own, "--model=base", *["--json"] * (name != "own")]
        assert shlex.split(content["results"][0]["command"]) == command
        files = {path.name: path.read_text() for path in sorted((place / "eval/base.samples").iterdir())}
        found.append(([(entry["settings"], entry["metrics"]) for entry in content["results"]], files))
    assert found[0] == found[1] == found[2]
    texts = [metrics for settings, metrics in found[0][0] if settings["kind"] == "perplexity"]
    assert [(metrics["windows"], metrics["kl"] != 0) for metrics in texts] == [(8, True), (1, True)]
    assert list(found[0][1]) == ["drawn.jsonl", "large_sums.jsonl", "read.jsonl", "said.jsonl", "small_sums.jsonl"]
