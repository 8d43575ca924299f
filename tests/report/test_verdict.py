from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_up_runs import layer, stage_of, study_of, task, text, write_run

from sppctl.files.names import FOREIGN
from sppctl.records import MatrixRecord
from sppctl.report import verdict
from sppctl.report.study import RunStudy, Study

ALL = ("base", "pruned", "merged")


def matrix(filled: int = 0) -> MatrixRecord:
    return MatrixRecord("w", 8, 8, 4, filled, 0, 0.1)


def test_a_run_in_a_few_words(tmp_path: Path) -> None:
    run = RunStudy.of(write_run(tmp_path / "one"))
    pattern, perplexity, accuracy, cost = verdict.of_run(run).findings
    assert str(pattern) == "Pattern: 2:4 kept exactly in 48 of 48 matrices (checked in the merged weights)"
    assert perplexity.title == "Perplexity wikitext2 @512"
    assert perplexity.value == " -> ".join(f"{value:.2f}" for value in (9.57, 55.97, 15.64))
    assert perplexity.detail == "base -> pruned -> merged; 72.2% of the gap recovered"
    assert (accuracy.title, accuracy.value) == ("Accuracy zeroshot, limit 200 mean", "61.43% -> 49.86% -> 56.57%")
    assert cost.value == "22 min 13 s, 1.1 GB"
    assert cost.detail == "prune 17 s, train 2 min 46 s, merge 2.1 s, eval 19 min 7 s; most memory: train"
    assert [one.is_good for one in (pattern, perplexity, cost)] == [True, True, None]
    assert not verdict.of_run(run).warnings


def test_a_pattern_that_was_not_kept_is_counted_and_warned_of() -> None:
    pruned = stage_of("prune", {"matrices": 3, "pattern": "2:4", "layers": [layer("0.q")]})
    merged = {"matrices": 3, "records": [matrix(), matrix(5), matrix()], "filled_zeros": 5, "pattern_unchanged": False}
    run = study_of(stages={"prune": pruned, "merge": stage_of("merge", merged)})
    found = verdict.of_run(run)
    assert str(found.findings[0]) == "Pattern: 2:4 kept exactly in 2 of 3 matrices (5 zeros were filled)"
    assert found.findings[0].is_good is False
    assert "merging changed the pattern" in found.warnings[0]
    only_pruned = verdict.of_run(study_of(stages={"prune": pruned}))
    assert str(only_pruned.findings[0]) == "Pattern: 2:4 in 3 matrices (pruned, not merged yet)"


UNMOVED = (
    ({"moved_weights": 0, "dtype": "bfloat16"}, "none of the kept weights moved: merged equals pruned"),
    ({"moved_weights": 0, "dtype": "bfloat16", "lost_weights": 9}, "only 0.00% of the kept weights moved"),
    ({"moved_weights": 4, "dtype": "bfloat16", "moved_share": 0.004}, "only 0.40% of the kept weights moved"),
)


@pytest.mark.parametrize(("metrics", "text"), UNMOVED)
def test_a_training_that_moved_hardly_a_weight_is_warned_of(metrics: dict[str, Any], text: str) -> None:
    merge = stage_of("merge", {"kept_weights": 1000} | metrics)
    train = stage_of("train", {"steps": 6}, settings={"train": {"lr": 0.004}})
    fixes = "use a higher train.lr or more steps or merge.dtype=float32"
    (warning,) = verdict.of_run(study_of(stages={"train": train, "merge": merge})).warnings
    assert warning == f"{text} (train.lr=0.004, steps: 6, dtype: bfloat16); {fixes}"
    foreign = replace(merge, inputs={FOREIGN: "a"})
    (warning,) = verdict.of_run(study_of(stages={"train": train, "merge": foreign})).warnings
    assert warning == f"{text} (dtype: bfloat16); {fixes}"
    enough = replace(merge, metrics=replace(merge.metrics, moved_weights=10, moved_share=0.01))
    assert not verdict.of_run(study_of(stages={"train": train, "merge": enough})).warnings


def test_what_makes_the_numbers_doubtful() -> None:
    few = {label: [text(value, windows=8, stderr=0.12)] for label, value in zip(ALL, (5.0, 7.0, 8.0), strict=True)}
    few["merged"] += [task(0.5, samples=20, limit=20), text(float("inf"), 128, windows=40)]
    assert list(verdict.of_run(study_of(**few)).warnings) == [
        "few windows (8): prose @64; one standard error is up to 12% of a perplexity",
        "few samples (20): rte, limit 20",
        "merged: ppl prose @128: not a finite number",
        "merged is worse than pruned on ppl prose @64",
    ]
    found = verdict.of_run(study_of(**few)).findings[0]
    assert found.detail == "base -> pruned -> merged; nothing of the gap recovered"
    assert found.is_good is False


def test_a_checkpoint_is_worse_than_pruned_whether_or_not_there_is_a_gap() -> None:
    """By its accuracy, which pruning raised, and by its perplexity, of which there is no dense one."""
    run = study_of(
        base=[task(0.38, samples=200)],
        pruned=[task(0.40, samples=200), text(7.0, windows=40)],
        merged=[task(0.20, samples=200), text(7.5, windows=40)],
        other=[task(0.10, samples=200)],  # not trained in this run
    )
    assert verdict.of_run(run).warnings == ["merged is worse than pruned on ppl prose @64 and rte"]
    better = study_of(pruned=[task(0.4, samples=200), text(7.0, windows=40)], merged=[text(6.5, windows=40)])
    assert verdict.of_run(better).warnings == []


def test_the_time_of_a_resumed_training_is_that_of_all_attempts() -> None:
    """9 h and 1 h."""
    train = stage_of("train", {"seconds": 36000.0}, wall_time_s=3600.0)
    (cost,) = verdict.of_run(study_of(stages={"train": train})).findings
    assert str(cost) == "Time and memory: 10 h 0 min"


def test_a_number_by_which_the_adapter_was_chosen_is_marked() -> None:
    settings = {"train": {"keep_best": "perplexity"}, "eval": {"perplexity": ["prose"]}}
    (warning,) = verdict.of_run(study_of(stages={"train": stage_of("train", settings=settings)})).warnings
    assert warning.startswith("the adapter was chosen by its perplexity on prose (train.keep_best)")
    settings["train"]["keep_best"] = "eval_loss"
    assert not verdict.of_run(study_of(stages={"train": stage_of("train", settings=settings)})).warnings


def test_a_difference_within_chance_is_no_success(tmp_path: Path) -> None:
    run = RunStudy.of(write_run(tmp_path / "one"))
    unclear = [
        replace(
            pair, entries=[replace(e, paired=e.paired and replace(e.paired, low=-1.0, high=1.0)) for e in pair.entries]
        )
        for pair in run.comparisons
    ]
    (warning,) = verdict.of_run(replace(run, comparisons=unclear)).warnings
    assert (
        warning
        == "pruned and merged may differ by chance (95 % interval) on wikitext2 @512 and zeroshot, limit 200 mean"
    )


def test_several_runs_name_the_best_and_share_warnings(tmp_path: Path) -> None:
    study = Study.of([write_run(tmp_path / "one"), write_run(tmp_path / "two", pattern="4:8", seed=1)])
    pattern, perplexity, _, cost = verdict.of_study(study).findings
    assert pattern.value == "2:4 and 4:8 kept exactly in 96 of 96 matrices"
    assert perplexity.value == "14.78 (two)"
    assert perplexity.detail == "best of 2 merged, the worst 15.64; 75.4% of the gap recovered"
    assert cost.value == "44 min 26 s, 1.1 GB"
    left_out = Study([study.runs[0], replace(study.runs[1], left_out=["a note"])])
    assert verdict.of_study(left_out).warnings == [
        "two: read the notes below on records that are left out or come from elsewhere (1)"
    ]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.04, "0.0 s"), (9.96, "10 s"), (59.7, "1 min 0 s"), (3599.9, "1 h 0 min"), (90061, "25 h 1 min")],
)
def test_times_are_short(seconds: float, shown: str) -> None:
    assert verdict.duration(seconds) == shown
