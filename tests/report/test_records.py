from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from made_up_runs import write_json, write_run

from sppctl.errors import UserError
from sppctl.report.records import read
from sppctl.report.write import collect


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "one")


def change(path: Path, **entries: Any) -> None:
    write_json(path, json.loads(path.read_text()) | entries)


# --- of the weights that are there ------------------------------------------------------------------------------------


def test_a_run_that_belongs_together_is_read_as_it_is(run: Path) -> None:
    stages, results, notes = read(run)
    assert list(stages) == ["prune", "train", "merge"]
    assert list(results) == ["base", "pruned", "merged"]
    assert notes == []


def test_another_pruning_does_not_get_the_numbers_of_the_one_before(run: Path) -> None:
    """What ``sppctl prune --force`` leaves behind: a new stage.json beside measures of the old weights."""
    change(run / "pruned/stage.json", output="others")
    found = collect(run)
    assert list(found["checkpoints"]) == ["base"]
    assert list(found["stages"]) == ["prune"]
    assert [row["checkpoint"] for row in found["table"]] == ["base"]
    assert found["notes"] == [
        f"{run}/adapter was made from other weights than pruned/ holds; sppctl train --force",
        f"{run}/merged was made from other weights than pruned/ holds; sppctl merge --force",
        f"{run}/eval/pruned.json measures other weights than pruned/ holds; sppctl eval --model pruned",
        f"{run}/eval/merged.json measures weights that are left out with their stage",
    ]


@pytest.mark.parametrize(
    ("record", "entries", "left"),
    [
        ("eval/pruned.json", {"fingerprint": "old"}, ["base", "merged"]),
        ("eval/merged.json", {"fingerprint": "old"}, ["base", "pruned"]),
        ("eval/base.json", {"fingerprint": "old"}, ["pruned", "merged"]),
        ("merged/stage.json", {"inputs": {"pruned": "old"}}, ["base", "pruned"]),
        ("adapter/stage.json", {"inputs": {"pruned": "old"}}, ["base", "pruned", "merged"]),
    ],
)
def test_only_what_is_outdated_is_left_out(record: str, entries: dict[str, Any], left: list[str], run: Path) -> None:
    change(run / record, **entries)
    assert list(collect(run)["checkpoints"]) == left


def test_an_adapter_that_was_trained_again_is_not_in_the_merged_weights(run: Path) -> None:
    change(run / "adapter/stage.json", output="another")
    stages, results, notes = read(run)
    assert "merge" not in stages
    assert "merged" not in results
    assert notes[0] == f"{run}/merged was merged with another adapter than adapter/ holds; sppctl merge --force"


def test_what_was_made_with_another_dense_model_is_left_out(run: Path) -> None:
    change(run / "pruned/stage.json", inputs={"base": "b" * 16})
    change(run / "adapter/stage.json", inputs={"base": "another"})
    content = json.loads((run / "eval/merged.json").read_text())
    content["results"][0]["settings"]["reference"] = "another"
    change(run / "eval/merged.json", results=content["results"])
    assert read(run)[2] == [
        f"{run}/adapter was made with another dense model than pruned/; sppctl train --force",
        f"{run}/eval/merged.json compares with another dense model than was pruned; sppctl eval --model merged",
    ]


def test_records_that_do_not_say_what_they_belong_to_stay(run: Path) -> None:
    for path in [*run.glob("*/stage.json"), *run.glob("eval/*.json")]:
        record = json.loads(path.read_text())
        write_json(path, {key: record[key] for key in record if key not in ("inputs", "output", "fingerprint")})
    assert len(read(run)[1]) == 3


# --- whole ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "content", "said"),
    [
        ("eval/notes.json", '{"a": 1}', "(it has no results); delete it and run sppctl eval again"),
        ("eval/notes.json", "[1]", "(it is not a JSON object); delete it"),
        ("eval/notes.json", '{"results": []}', "(it has no sparsity.sparsity); delete it"),
        ("merged/stage.json", "{}", "(it has no wall_time_s); sppctl merge --force redoes it"),
        ("merged/stage.json", '{"wall_time_s": 1, "metrics": {}}', "(it has no metrics.matrices); sppctl merge"),
        ("adapter/stage.json", "{", "sppctl train --force redoes it"),
    ],
)
def test_a_record_that_is_no_record_is_named(record: str, content: str, said: str, run: Path) -> None:
    (run / record).write_text(content)
    with pytest.raises(UserError) as caught:
        collect(run)
    assert str(caught.value).startswith(f"{run / record} is damaged")
    assert said in str(caught.value)


def test_a_result_that_is_none_is_named_by_its_place(run: Path) -> None:
    content = json.loads((run / "eval/base.json").read_text())
    change(run / "eval/base.json", results=[*content["results"], {"settings": {"kind": "perplexity"}}])
    with pytest.raises(UserError, match=r"it has no settings.text\); .*entry 2 of its results"):
        collect(run)
