from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_runs import sample, write_samples

from sppctl.errors import UserError
from sppctl.stages.significance import (
    RESAMPLES,
    compare_tasks,
    compare_texts,
    flips,
    match,
    paired,
    read_samples,
    resampled_means,
)


def every_mean(differences: list[float], weights: list[float] | None = None) -> np.ndarray:
    """The means of all n^n resamples, each of which is equally likely."""
    weights = weights or [1.0] * len(differences)
    means = []
    for drawn in itertools.product(range(len(differences)), repeat=len(differences)):
        means.append(sum(differences[at] for at in drawn) / sum(weights[at] for at in drawn))
    return np.array(means)


# --- the bootstrap ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("differences", "weights"),
    [
        ([1.0, 0.0, 0.0, 1.0, -1.0], None),
        ([0.5, 0.25, -0.125, 2.0, 1.0], None),
        ([3.0, -1.0, 0.5, 2.0], [4.0, 1.0, 2.0, 2.0]),  # sums over tokens
    ],
)
def test_it_draws_what_all_resamples_are(differences: list[float], weights: list[float] | None) -> None:
    exact = every_mean(differences, weights)
    drawn = resampled_means(np.array(differences), np.array(weights) if weights else None)
    assert drawn.shape == (RESAMPLES,)
    values = np.unique(exact.round(9))
    assert set(np.unique(drawn.round(9))) <= set(values)
    for value in values:
        share = np.mean(np.isclose(exact, value))
        error = np.sqrt(share * (1 - share) / RESAMPLES)
        assert abs(np.mean(np.isclose(drawn, value)) - share) < 5 * error


def test_p_is_that_of_all_resamples() -> None:
    differences = [1.0, 1.0, 0.0, 1.0, -1.0]
    exact, mean = every_mean(differences), 0.4
    share = np.mean(np.abs(exact - mean) >= mean - 1e-9)
    found = paired(mean, resampled_means(np.array(differences)))
    assert found.p == pytest.approx(share, abs=0.02)
    assert (found.low, found.high) == (np.quantile(exact, 0.025), np.quantile(exact, 0.975)) == (-0.4, 1.0)


def test_no_difference_at_all() -> None:
    found = paired(0.0, resampled_means(np.zeros(100)))
    assert (found.difference, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_differences_that_cancel_mean_nothing() -> None:
    found = paired(0.0, resampled_means(np.array([1.0, -1.0] * 50)))
    assert found.p == 1
    assert found.low < 0 < found.high


def test_a_clear_difference_has_the_smallest_p() -> None:
    found = paired(0.5, resampled_means(np.array([0.0, 1.0] * 200)))
    assert found.p == 1 / (RESAMPLES + 1)
    assert 0.4 < found.low < 0.5 < found.high < 0.6
    # the normal approximation: 1.96 * sqrt(0.25 / 400)
    assert (found.high - found.low) / 2 == pytest.approx(0.049, abs=0.003)


def test_the_same_seed_the_same_numbers_in_pieces_or_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    differences = np.linspace(-1, 2, 50)
    whole = resampled_means(differences)
    np.testing.assert_array_equal(whole, resampled_means(differences))
    assert not np.array_equal(whole, resampled_means(differences, seed=1))
    monkeypatch.setattr("sppctl.stages.significance.DRAWN", 700)
    np.testing.assert_allclose(whole, resampled_means(differences), rtol=0, atol=1e-14)


# --- samples ----------------------------------------------------------------------------------------------------------


def test_samples_are_matched_by_their_hash_whatever_their_order() -> None:
    first = [sample("a", 1), sample("b", 0), sample("c", 1)]
    second = [sample("c", 0), sample("a", 1), sample("d", 1)]
    pairs, alone = match(first, second)
    assert [(one["hash"], other["hash"], other["acc"]) for one, other in pairs] == [("a", "a", 1), ("c", "c", 0)]
    assert alone == 2


def test_equal_documents_are_matched_one_by_one() -> None:
    pairs, alone = match([sample("a", 1), sample("a", 0)], [sample("a", 0), sample("a", 1), sample("a", 1)])
    assert [(one["acc"], other["acc"]) for one, other in pairs] == [(1, 0), (0, 1)]
    assert alone == 1


def test_flipped_answers_and_what_became_of_them() -> None:
    pairs = [
        (sample("a", 1, 1), sample("a", 0, 2)),
        (sample("b", 1, 1), sample("b", 0, 3)),
        (sample("c", 0, 2), sample("c", 1, 1)),
        (sample("d", 0, 2), sample("d", 0, 3)),
        (sample("e", 0, 2), sample("e", 0, 2)),
        (sample("f", 1, 1) | {"chosen": None}, sample("f", 0, 2)),  # no multiple choice
    ]
    assert flips(pairs) == {
        "answers": 5,
        "flipped": 4,
        "share": 0.8,
        "correct_to_wrong": 2,
        "wrong_to_correct": 1,
        "wrong_to_wrong": 1,
    }


def test_a_task_without_choices_has_no_share() -> None:
    assert flips([(sample("a", 1) | {"chosen": None}, sample("a", 1))])["share"] is None


def test_accuracies_of_a_task_and_their_difference() -> None:
    first = {"boolq": [sample(str(number), number % 2) for number in range(100)], "rte": [sample("a", 1)]}
    second = {"boolq": [sample(str(number), int(number % 4 > 0)) for number in range(100)]}
    (entry,) = compare_tasks(first, second, {"zeroshot": ["boolq", "rte"]})
    assert (entry["name"], entry["samples"], entry["first"], entry["second"]) == ("boolq", 100, 0.5, 0.75)
    assert entry["difference"] == 0.25
    assert entry["p"] < 0.001
    assert (entry["flips"]["wrong_to_correct"], entry["flips"]["correct_to_wrong"]) == (25, 0)
    assert "note" not in entry


def test_a_checkpoint_compared_with_itself() -> None:
    own = {"boolq": [sample(str(number), number % 2) for number in range(10)]}
    (entry,) = compare_tasks(own, own, {})
    assert (entry["difference"], entry["low"], entry["high"], entry["p"], entry["flips"]["flipped"]) == (0, 0, 0, 1, 0)


def test_samples_that_do_not_match_are_left_out_and_said() -> None:
    first, second = [sample("a", 1), sample("b", 1)], [sample("b", 0), sample("c", 0)]
    (entry,) = compare_tasks({"boolq": first}, {"boolq": second}, {})
    assert (entry["samples"], entry["difference"]) == (1, -1)
    assert entry["note"].startswith("2 samples stand in one of the two files only")
    (entry,) = compare_tasks({"boolq": first}, {"boolq": [sample("c", 0)]}, {})
    assert entry["samples"] == 0
    assert "p" not in entry


def test_a_small_group_is_the_mean_over_its_tasks() -> None:
    first = {"a": [sample(str(n), 0) for n in range(10)], "b": [sample(str(n), 0) for n in range(90)]}
    second = {"a": [sample(str(n), 1) for n in range(10)], "b": first["b"]}
    *_, group = compare_tasks(first, second, {"both": ["a", "b"]})
    assert (group["name"], group["samples"]) == ("both mean", 100)
    assert (group["first"], group["second"], group["difference"]) == (0, 0.5, 0.5)
    assert group["flips"]["share"] == 0.1


def test_a_large_group_is_the_mean_over_its_samples_in_one_row() -> None:
    tasks = [f"mmlu_{number}" for number in range(11)]
    first = {task: [sample(str(n), 0) for n in range(5)] for task in tasks}
    second = first | {tasks[0]: [sample(str(n), 1) for n in range(5)]}
    first[tasks[0]] = first[tasks[0]] * 9  # 45 of 95 samples
    second[tasks[0]] = second[tasks[0]] * 9
    (group,) = compare_tasks(first, second, {"mmlu": tasks})
    assert group["difference"] == pytest.approx(45 / 95)


def test_samples_are_read_and_damage_is_said(tmp_path: Path) -> None:
    write_samples(tmp_path / "rte.jsonl", [sample("a", 1)])
    write_samples(tmp_path / "boolq.jsonl", [sample("a", 1), sample("b", 0)])
    assert {task: len(found) for task, found in read_samples(tmp_path).items()} == {"boolq": 2, "rte": 1}
    assert read_samples(tmp_path / "nowhere") == {}
    (tmp_path / "rte.jsonl").write_text(json.dumps(sample("a", 1)) + "\n{")
    with pytest.raises(UserError, match=r"rte\.jsonl is damaged.*sppctl eval"):
        read_samples(tmp_path)


# --- windows ----------------------------------------------------------------------------------------------------------


def measured(losses: list[float], *, seq_len: int = 5, stride: int = 5, **metrics: Any) -> list[dict[str, Any]]:
    settings = {"kind": "perplexity", "text": "prose", "seq_len": seq_len, "stride": None, "reference": object.__name__}
    own = {"seq_len": seq_len, "stride": stride, "window_nll": losses, "documents_hash": "x"}
    return [{"settings": settings, "metrics": own | metrics}]


def test_windows_are_compared_per_predicted_token() -> None:
    first = measured([8.0, 4.0, 6.0])
    second = measured([12.0, 8.0, 10.0])
    second[0]["settings"]["reference"] = "another"  # a reference does not change the loss
    (entry,) = compare_texts(first, second)
    assert (entry["name"], entry["samples"]) == ("prose", 3)
    assert (entry["first"], entry["second"]) == (1.5, 2.5)
    assert (entry["difference"], entry["low"], entry["high"]) == (1, 1, 1)


def test_overlapping_windows_count_what_they_add() -> None:
    (entry,) = compare_texts(measured([4.0, 2.0], stride=2), measured([8.0, 4.0], stride=2))
    assert (entry["first"], entry["second"]) == (1, 2)  # 4 + 2 tokens


def test_other_texts_and_older_results_are_not_compared() -> None:
    assert compare_texts(measured([1.0]), measured([1.0], documents_hash="y")) == []
    assert compare_texts(measured([1.0, 2.0]), measured([1.0])) == []
    old = measured([1.0])
    del old[0]["metrics"]["window_nll"]
    assert compare_texts(old, measured([1.0])) == compare_texts(measured([1.0]), old) == []
