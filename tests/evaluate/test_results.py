"""The results file: what is found again, what is replaced, and what it looks like."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from made_up_runs import MADE, results_of, task, text, with_numbers

from sppctl.errors import UserError
from sppctl.evaluate.results import Results, TaskMeasure, TextMeasure, missing
from sppctl.files import sealed

TEXT = TextMeasure("prose", 64, None, 512, "base", "v1")
TASK = TaskMeasure("rte", 5, None, 0, "zeroshot")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    content = results_of("base", [text(5.0, kl=0.5, compared_with="x", **MADE), task(0.5, shots=2, **MADE)])
    content.add(task(0.25, "b", group="g", groups={"g": {"acc": True}}, members=3, system_prompt="Add.", batch_size=2))
    content.save(tmp_path / "base.json")
    assert Results.load(tmp_path / "base.json") == content
    assert Results.load(tmp_path / "pruned.json") is None


def test_options_of_tasks_are_written_when_they_are_set() -> None:
    plain, special = results_of(
        "base", [task(0.5, "a", seed=4), task(0.5, "b", 2, limit=7, chat_template=True, system_prompt="Add.")]
    ).to_json()["results"]
    first = {"kind": "tasks", "tasks": "a", "num_fewshot": 0, "limit": None, "seed": 4}
    assert plain["settings"] == first
    options = {"chat_template": True, "system_prompt": "Add."}
    assert special["settings"] == first | {"tasks": "b", "num_fewshot": 2, "limit": 7, "seed": 0} | options
    scores = {"acc": 0.5, "acc_stderr": 0.03, "metric": "acc", "higher_is_better": None}
    assert plain["metrics"]["tasks"]["a"] == scores | {"version": None, "num_fewshot": 0, "samples": 10}


def test_numbers_that_are_not_finite_are_null() -> None:
    content = results_of("base", [text(float("inf"), nll=float("inf"))])
    (entry,) = content.to_json()["results"]
    assert (entry["metrics"]["value"], entry["metrics"]["nll"], entry["metrics"]["stderr"]) == (None, None, 0.1)
    assert Results.from_json(content.to_json()) == content


@pytest.mark.parametrize(
    ("old", "changes", "is_replaced"),
    [
        (TEXT, {"reference": "other"}, True),
        (TEXT, {"content": "v2"}, True),
        (TEXT, {"seq_len": 128}, False),
        (TEXT, {"stride": 32}, False),
        (TASK, {"batch_size": 4}, True),
        (TASK, {"group": None}, False),
        (TASK, {"seed": 1}, False),
        (TASK, {"limit": 1}, False),
    ],
)
def test_only_the_last_version_comparison_and_batch_size_stay(
    old: Any, changes: dict[str, Any], is_replaced: bool
) -> None:
    new = dataclasses.replace(old, **changes)
    before = dataclasses.replace(text(1.0) if isinstance(old, TextMeasure) else task(0.5), measure=old)
    content = results_of("base", [before])
    content.add(dataclasses.replace(before, measure=new))
    assert [result.measure for result in content.results] == ([new] if is_replaced else [old, new])
    assert not TEXT.supersedes(TASK)
    assert not TASK.supersedes(TEXT)


def test_what_was_compared_serves_where_no_comparison_is_asked_for() -> None:
    plain, other = dataclasses.replace(TEXT, reference=None), dataclasses.replace(TEXT, reference="other")
    compared, alone = (dataclasses.replace(text(1.0), measure=measure) for measure in (TEXT, plain))
    assert missing([TEXT, plain, other], [compared]) == [other]
    assert missing([TEXT, plain], [alone]) == [TEXT]


def test_a_task_is_measured_again_for_another_group_or_where_its_groups_changed() -> None:
    known = dataclasses.replace(task(0.5), measure=TASK)
    alone = dataclasses.replace(TASK, group=None)
    assert missing([TASK, alone, TEXT], [known]) == [alone, TEXT]
    assert missing([TASK], [known], lambda result: result.numbers.members == 7) == [TASK]
    assert missing([TASK], [with_numbers(known, members=7)], lambda result: result.numbers.members == 7) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"label": "other"}, r"base.json holds the results of another checkpoint \(other\); delete it"),
        (
            {"results": None},
            r"base.json is damaged \(it has no results\); delete it and run sppctl eval .* --model=base again",
        ),
        ({"results": [{"settings": {}}]}, r"it has no results\[0\]: metrics\)"),
        ({"results": [{"settings": {}, "metrics": {}}]}, r"it has no results\[0\]: kind\)"),
        ({"results": [{"settings": {"kind": "perplexity", "text": "x"}, "metrics": {}}]}, "it has no .*: value"),
        ({"results": [{"settings": {"kind": "tasks", "tasks": "x"}, "metrics": {}}]}, "it has no .*: tasks"),
    ],
)
def test_a_file_that_holds_no_results_is_named(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    content = results_of("base", []).to_json() | change
    sealed.write(tmp_path / "base.json", {key: value for key, value in content.items() if value is not None})
    with pytest.raises(UserError, match=words):
        Results.load(tmp_path / "base.json")


@pytest.mark.parametrize("content", ['{"results": []}', "[1]", "{"])
def test_a_file_that_sppctl_did_not_write_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "base.json").write_text(content)
    with pytest.raises(
        UserError, match=r"base.json is damaged .*; delete it and run sppctl eval .* --model=base again"
    ):
        Results.load(tmp_path / "base.json")
