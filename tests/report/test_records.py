from __future__ import annotations

from pathlib import Path

import pytest
from made_up_runs import change_record, change_results, load, results_of, save, with_measure, write_record, write_run

from sppctl.errors import UserError
from sppctl.files import sealed
from sppctl.records import Completion, Sample, SamplesRecord, to_json
from sppctl.report.records import read
from sppctl.report.study import RunStudy


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "one")


# --- of the weights that are there ------------------------------------------------------------------------------------


def test_a_run_that_belongs_together_is_read_as_it_is(run: Path) -> None:
    save(run, results_of("another", []))
    stages, results, notes = read(run)
    assert list(stages) == ["prune", "train", "merge"]
    assert list(results) == ["base", "pruned", "merged", "another"]
    assert notes == []


def test_another_pruning_does_not_get_the_numbers_of_the_one_before(run: Path) -> None:
    """What ``sppctl prune --force`` leaves behind: a new stage.json beside measures of the old weights."""
    change_record(run, "prune", output="others")
    stages, results, notes = read(run)
    assert (list(stages), list(results)) == (["prune"], ["base"])
    assert notes == [
        f"{run}/adapter was made from weights that differ from those in pruned/; sppctl train {run} --force",
        f"{run}/merged was made from weights that differ from those in pruned/; sppctl merge {run} --force",
        f"{run}/eval/pruned.json measures weights that differ from those in pruned/; sppctl eval {run} --model=pruned",
        f"{run}/eval/merged.json measures weights that are left out with their stage",
    ]


@pytest.mark.parametrize(
    ("outdated", "left"),
    [
        ("pruned", ["base", "merged"]),
        ("merged", ["base", "pruned"]),
        ("base", ["pruned", "merged"]),
        ("merge", ["base", "pruned"]),
        ("train", ["base", "pruned", "merged"]),
    ],
)
def test_only_what_is_outdated_is_left_out(outdated: str, left: list[str], run: Path) -> None:
    if outdated in ("train", "merge"):
        change_record(run, outdated, inputs={"pruned": "old"})
    else:
        change_results(run, outdated, lambda content: setattr(content, "fingerprint", "old"))
    assert list(read(run)[1]) == left


def test_an_adapter_that_was_trained_again_is_not_in_the_merged_weights(run: Path) -> None:
    change_record(run, "train", output="another")
    stages, results, notes = read(run)
    assert (list(stages), list(results)) == (["prune", "train"], ["base", "pruned"])
    assert notes[0] == f"{run}/merged was merged with an adapter that differs from adapter/; sppctl merge {run} --force"


def test_what_was_made_with_another_dense_model_is_left_out(run: Path) -> None:
    change_record(run, "train", inputs={"base": "another"})
    compared = with_measure(load(run, "merged").texts[0], reference="another")
    change_results(run, "merged", lambda content: content.add(compared))
    assert read(run)[2] == [
        f"{run}/adapter was made with a different dense model than pruned/; sppctl train {run} --force",
        f"{run}/eval/merged.json compares with a different dense model than pruned/; sppctl eval {run} --model=merged",
    ]


# --- whole ------------------------------------------------------------------------------------------------------------


def test_records_that_are_not_whole_are_named(run: Path) -> None:
    sealed.write(run / "eval/notes.json", results_of("notes", [], {}).to_json())
    with pytest.raises(UserError, match=r"notes.json is damaged \(it has no sparsity.sparsity\); delete it"):
        read(run)
    write_record(run, "merge", {"stage": "merge"})
    with pytest.raises(
        UserError, match=rf"damaged \(it has no fingerprint\); sppctl merge {run} --force redoes the stage"
    ):
        read(run)
    (run / "adapter/stage.json").write_text("{")
    with pytest.raises(
        UserError, match=rf"adapter/stage.json is damaged .*; sppctl train {run} --force redoes the stage"
    ):
        read(run)


# --- samples ----------------------------------------------------------------------------------------------------------


def test_a_report_shows_what_the_weights_wrote_that_the_run_holds(run: Path) -> None:
    weights = {"base": "b" * 16, "pruned": "pone", "merged": "mone"}
    sample = Sample("Why?", False, [Completion(label, f"{label} says", 2, True) for label in weights])

    def shown(**changed: str) -> tuple[list[str], list[str]]:
        sealed.write(run / "samples.json", to_json(SamplesRecord({}, weights | changed, "sppctl run", [sample])))
        found = RunStudy.of(run)
        return [one.text for each in found.samples for one in each.completions], found.notes

    assert shown() == (["base says", "pruned says", "merged says"], [])
    note = f"{run}/samples.json: what merged wrote is of weights that the run does not hold any more; sppctl eval {run}"
    assert shown(merged="old") == (["base says", "pruned says"], [note])
    assert shown(base="x", pruned="y", merged="z")[0] == []
    sealed.write(run / "samples.json", {"settings": {}})
    with pytest.raises(UserError, match=r"samples\.json is damaged \(it has no weights\); delete it"):
        RunStudy.of(run)
