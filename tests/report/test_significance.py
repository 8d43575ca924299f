from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_runs import sample, task, text, with_measure, write_samples

from sppctl.evaluate.results import TaskResult, TaskScores, TextResult
from sppctl.report.significance import (
    RESAMPLES,
    Flips,
    Paired,
    TaskSamples,
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
    monkeypatch.setattr("sppctl.report.significance.DRAWN", 700)
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
    found = flips(pairs)
    assert found == Flips(answers=5, flipped=4, correct_to_wrong=2, wrong_to_correct=1, wrong_to_wrong=1)
    assert found.share == 0.8
    assert flips(pairs[5:]).share is None


def samples_of(samples: list[dict[str, Any]], *, alone: bool = True, **groups: bool) -> TaskSamples:
    return TaskSamples("a task", groups, alone, samples)


def test_accuracies_of_a_task_and_their_difference() -> None:
    first = {"boolq": samples_of([sample(str(n), n % 2) for n in range(100)], mean=False)}
    second = {"boolq": samples_of([sample(str(n), int(n % 4 > 0)) for n in range(100)])}
    (entry,) = compare_tasks(first | {"rte": samples_of([], mean=False)}, second)
    assert (entry.name, entry.samples, entry.first, entry.second, entry.note) == ("a task", 100, 0.5, 0.75, None)
    assert entry.paired is not None
    assert entry.flips is not None
    assert entry.paired.difference == 0.25
    assert entry.paired.p < 0.001
    assert (entry.flips.wrong_to_correct, entry.flips.correct_to_wrong) == (25, 0)


def test_a_checkpoint_compared_with_itself() -> None:
    own = {"boolq": samples_of([sample(str(number), number % 2) for number in range(10)])}
    (entry,) = compare_tasks(own, own)
    assert entry.paired == Paired(difference=0, low=0, high=0, p=1)
    assert entry.flips is not None
    assert entry.flips.flipped == 0


def test_samples_that_do_not_match_are_left_out_and_noted() -> None:
    first, second = samples_of([sample("a", 1), sample("b", 1)]), samples_of([sample("b", 0), sample("c", 0)])
    (entry,) = compare_tasks({"boolq": first}, {"boolq": second})
    assert (entry.samples, entry.first, entry.second) == (1, 1, 0)
    assert entry.note == "2 samples stand in one of the two files only and are left out"
    (entry,) = compare_tasks({"boolq": first}, {"boolq": samples_of([sample("c", 0)])})
    assert (entry.samples, entry.paired) == (0, None)


@pytest.mark.parametrize(("by_samples", "mean"), [(False, 0.5), (True, 0.1)])
def test_a_group_is_the_mean_over_its_tasks_or_their_samples(by_samples: bool, mean: float) -> None:
    right, wrong = ([sample(str(number), acc) for number in range(10)] for acc in (1, 0))
    many = [sample(str(number), 0) for number in range(90)]
    first = {"a": samples_of(wrong, both=by_samples), "b": samples_of(many, both=by_samples)}
    group, *tasks = compare_tasks(first, {"a": samples_of(right), "b": samples_of(many)})
    assert (group.name, group.samples, group.is_mean, len(tasks)) == ("both", 100, True, 2)
    assert (group.first, group.second) == (0, mean)
    # within each task all differences are equal
    assert group.paired is not None
    assert (group.paired.difference, group.paired.low, group.paired.high) == (mean, mean, mean)
    assert group.flips is not None
    assert group.flips.share == 0.1


def test_the_tasks_of_a_large_group_have_no_rows_unless_something_is_missing() -> None:
    first = {str(n): samples_of([sample("x", 0), sample("y", 1)], alone=False, mmlu=True) for n in range(3)}
    assert [entry.name for entry in compare_tasks(first, first)] == ["mmlu"]
    second = first | {"1": samples_of([sample("x", 0)], alone=False)}
    assert [entry.name for entry in compare_tasks(first, second)] == ["mmlu", "a task"]


def result(folder: Path, name: str, samples: list[dict[str, Any]], **options: Any) -> TaskResult:
    """A task of the group "all" with its file of samples, which has the name of its task."""
    identity = write_samples(folder / f"{name}.jsonl", samples)
    options = {"group": "all", "groups": {"all": {"acc": True}}, "limit": 5, "samples_hash": {name: identity}} | options
    return task(0.5, name, options.pop("shots", 0), **options)


def names_of(folder: Path, results: list[TaskResult]) -> list[str]:
    found, _ = read_samples(folder, results)
    return [entry.name for entry in compare_tasks(found, found)]


def test_samples_belong_to_the_results_that_know_their_hash(tmp_path: Path) -> None:
    rules = {"all": {"acc": True}, "part": {}}
    results = [
        result(tmp_path, "rte", [sample("a", 1)], groups=rules, members=57),
        result(tmp_path, "own-task", [sample("a", 1), sample("b", 0)], groups={}, group=None),
        result(tmp_path, "boolq", [sample("c", 1)], samples_hash={"boolq": "of before"}),
    ]
    found, notes = read_samples(tmp_path, results)
    assert notes == [f"{tmp_path / 'boolq.jsonl'} belongs to another evaluation and is left out"]
    grouped, alone = found.values()
    assert (grouped.name, grouped.alone, len(grouped.samples)) == ("rte, limit 5", False, 1)
    assert grouped.groups == {"all, limit 5 mean": True, "part, limit 5 mean": False}
    assert (alone.name, alone.alone, len(alone.samples), alone.groups) == ("own-task, limit 5", True, 2, {})
    assert read_samples(tmp_path / "nowhere", results) == ({}, [])


def test_the_mean_of_a_part_of_a_group_says_so(tmp_path: Path) -> None:
    rules = {"all": {"acc": True}, "part": {"acc": True}}
    results = [result(tmp_path, name, [sample(name, 1)], groups=rules, members=3) for name in ("a", "b")]
    assert names_of(tmp_path, results)[:1] == ["all, limit 5 mean of 2 of 3 tasks"]
    assert not any("part" in name for name in names_of(tmp_path, results))
    results.append(result(tmp_path, "c", [sample("c", 1)], members=3))
    assert names_of(tmp_path, results)[:2] == ["all, limit 5 mean", "part, limit 5 mean"]
    (tmp_path / "a.jsonl").unlink()
    assert names_of(tmp_path, results)[0] == "all, limit 5 mean of 2 of 3 tasks"


def test_the_tasks_of_a_group_that_lm_eval_ran_as_one_are_all_there(tmp_path: Path) -> None:
    hashes = {name: write_samples(tmp_path / f"{name}.jsonl", [sample(name, 1)]) for name in ("one", "two")}
    scores = {name: TaskScores({"acc": 0.5}, "acc", samples=1) for name in hashes}
    whole = task(None, "odd", tasks=scores, mean={"acc": 0.5}, samples_hash=hashes)
    assert names_of(tmp_path, [whole]) == ["odd mean", "one", "two"]


def test_a_task_alone_and_in_a_group_is_one_task(tmp_path: Path) -> None:
    in_group = result(tmp_path, "rte", [sample("a", 1)], members=57)
    asked = {"group": None, "groups": {}, "members": 1}
    alone = with_measure(result(tmp_path, "rte", [sample("a", 1)], **asked), num_fewshot=None)  # its own, which is 0
    for results in ([in_group, alone], [alone, in_group]):
        (found,) = read_samples(tmp_path, results)[0].values()
        assert (found.alone, found.groups) == (True, {"all, limit 5 mean": True})
    both = [read_samples(tmp_path, [one])[0] for one in (in_group, alone)]
    assert len(compare_tasks(*both)) == 1


def test_only_what_was_measured_in_the_same_way_is_compared(tmp_path: Path) -> None:
    zero, five = (result(tmp_path, "rte", [sample("a", 1)], shots=shots) for shots in (0, 5))
    alone = result(tmp_path, "rte", [sample("a", 1)], group=None)
    wide = result(tmp_path, "rte", [sample("a", 1)], dtype="float32")
    found = [read_samples(tmp_path, [one])[0] for one in (zero, five, alone, wide)]
    assert compare_tasks(found[0], found[1]) == compare_tasks(found[0], found[3]) == []
    assert len(compare_tasks(found[0], found[2])) == 1


# --- windows ----------------------------------------------------------------------------------------------------------


def losses(*own: float | None, stride: int = 5, **options: Any) -> list[TextResult]:
    return [text(9.0, 5, **{"window_nll": list(own), "stride": stride} | options)]


def test_windows_are_compared_per_predicted_token() -> None:
    # a reference does not change the loss
    (entry,) = compare_texts(losses(8.0, 4.0, 6.0, reference="a"), losses(12.0, 8.0, 10.0, reference="b"))
    assert (entry.name, entry.samples, entry.first, entry.second) == ("prose", 3, 1.5, 2.5)
    assert entry.paired is not None
    assert (entry.paired.difference, entry.paired.low, entry.paired.high) == (1, 1, 1)


def test_overlapping_windows_count_what_they_add() -> None:
    (entry,) = compare_texts(losses(4.0, 2.0, stride=2), losses(8.0, 4.0, stride=2))
    assert (entry.first, entry.second) == (1, 2)  # 4 + 2 tokens


def test_other_texts_are_not_compared() -> None:
    for other in (losses(1.0, documents_hash="y"), losses(1.0, 2.0), losses(1.0, dtype="float32"), losses()):
        assert compare_texts(losses(1.0), other) == compare_texts(other, losses(1.0)) == []


@pytest.mark.parametrize("broken", [float("inf"), float("nan"), None])
def test_windows_without_a_finite_loss_are_left_out_and_noted(broken: float | None) -> None:
    (entry,) = compare_texts(losses(4.0, 4.0, 4.0), losses(broken, 8.0, 4.0))
    assert (entry.samples, entry.first, entry.second) == (2, 1.0, 1.5)
    assert entry.note == "1 windows have no finite loss and are left out"
    (entry,) = compare_texts(losses(4.0, 4.0, 4.0), losses(broken, broken, broken))
    assert entry.paired is None
