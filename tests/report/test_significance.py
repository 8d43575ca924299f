from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_runs import sample, task, text, with_measure, write_samples

from sppctl.evaluate.results import TaskMeasure, TaskResult, TaskScores, TextResult
from sppctl.report import significance
from sppctl.report.significance import RESAMPLES, Entry, Flips, Group, Measured, Paired, TaskSamples

compare_tasks, compare_texts = significance.compare_tasks, significance.compare_texts
OVER_TASKS, OVER_SAMPLES = frozenset({False}), frozenset({True})


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
    drawn = significance.resampled_means(np.array(differences), np.array(weights) if weights else None)
    assert drawn.shape == (RESAMPLES,)
    values = np.unique(exact.round(9))
    assert set(np.unique(drawn.round(9))) <= set(values)
    for value in values:
        share = np.mean(np.isclose(exact, value))
        error = np.sqrt(share * (1 - share) / RESAMPLES)
        assert abs(np.mean(np.isclose(drawn, value)) - share) < 5 * error


def paired(differences: list[float]) -> Paired:
    """The mean of differences and what its resampled means say of it."""
    means = significance.resampled_means(np.array(differences))
    compared = Entry("", "", len(differences)).compared(0.0, float(np.mean(differences)), means).paired
    assert compared is not None
    return compared


def test_p_is_that_of_all_resamples() -> None:
    differences = [1.0, 1.0, 0.0, 1.0, -1.0]
    exact, mean = every_mean(differences), 0.4
    share = np.mean(np.abs(exact - mean) >= mean - 1e-9)
    result = paired(differences)
    assert result.p == pytest.approx(share, abs=0.02)
    assert (result.low, result.high) == (np.quantile(exact, 0.025), np.quantile(exact, 0.975)) == (-0.4, 1.0)


def test_differences_that_are_none_that_cancel_and_that_are_clear() -> None:
    assert paired([0.0] * 100) == Paired(0, 0, 0, 1)
    cancelling, clear = paired([1.0, -1.0] * 50), paired([0.0, 1.0] * 200)
    assert cancelling.p == 1
    assert cancelling.low < 0 < cancelling.high
    assert clear.p == 1 / (RESAMPLES + 1)
    # the normal approximation: 1.96 * sqrt(0.25 / 400)
    assert (clear.low, clear.high) == (pytest.approx(0.451, abs=0.003), pytest.approx(0.549, abs=0.003))


def test_the_same_seed_the_same_numbers_in_pieces_or_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    differences = np.linspace(-1, 2, 50)
    whole = significance.resampled_means(differences)
    np.testing.assert_array_equal(whole, significance.resampled_means(differences))
    assert not np.array_equal(whole, significance.resampled_means(differences, seed=1))
    monkeypatch.setattr(significance, "DRAWN", 700)
    np.testing.assert_allclose(whole, significance.resampled_means(differences), rtol=0, atol=1e-14)


# --- samples ----------------------------------------------------------------------------------------------------------


def samples_of(*samples: dict[str, Any], alone: bool = True, **groups: Group) -> dict[str, TaskSamples]:
    whole = {TaskMeasure("", group=name): group for name, group in groups.items()}
    return {"boolq": TaskSamples("a task", whole, alone, significance.by_document(samples))}


def compared(first: dict[str, TaskSamples], second: dict[str, TaskSamples]) -> tuple[Entry, Paired, Flips]:
    """The only entry, with the parts that it has."""
    (entry,) = compare_tasks(first, second)
    assert entry.paired is not None
    assert entry.flips is not None
    return entry, entry.paired, entry.flips


def test_accuracies_of_a_task_and_their_difference() -> None:
    first, second = ([sample(str(n), int(n % step > 0)) for n in range(100)] for step in (2, 4))
    group = Group(OVER_TASKS, size=1)
    unmatched = {"rte": TaskSamples("another", {TaskMeasure("", group="mean"): group}, True, {})}
    entry, difference, flips = compared(samples_of(*first, mean=group) | unmatched, samples_of(*reversed(second)))
    assert (entry.name, entry.samples, entry.first, entry.second, entry.note) == ("a task", 100, 0.5, 0.75, None)
    assert difference.difference == 0.25
    assert difference.p < 0.001
    assert (flips.wrong_to_correct, flips.correct_to_wrong) == (25, 0)
    assert compared(samples_of(*first), samples_of(*first))[1:] == (Paired(0, 0, 0, 1), Flips(100, 0, 0, 0, 0))


def test_flipped_answers_and_what_became_of_them() -> None:
    answers = {"a": (1, 2), "b": (1, 3), "c": (2, 1), "d": (2, 3), "e": (2, 2), "f": (None, 2)}  # f: no multiple choice
    first, second = ([sample(name, int(own[at] == 1), own[at]) for name, own in answers.items()] for at in (0, 1))
    first[-1]["chosen"] = None
    assert compared(samples_of(*first), samples_of(*second))[2] == Flips(
        answers=5, flipped=4, correct_to_wrong=2, wrong_to_correct=1, wrong_to_wrong=1
    )


def test_samples_are_matched_by_their_hash_and_noted_where_they_have_no_partner() -> None:
    first = samples_of(sample("a", 1), sample("b", 1))
    entry, _, _ = compared(first, samples_of(sample("b", 0), sample("c", 0)))
    assert (entry.samples, entry.first, entry.second) == (1, 1, 0)
    assert entry.note == "2 samples are in only one of the two files and are left out"
    (entry,) = compare_tasks(first, samples_of(sample("c", 0)))
    assert (entry.samples, entry.paired) == (0, None)
    # equal documents one by one
    twice = samples_of(sample("a", 1), sample("a", 0)), samples_of(sample("a", 0), sample("a", 1), sample("a", 1))
    entry, _, flips = compared(*twice)
    assert (entry.samples, entry.note and entry.note[0], flips.flipped) == (2, "1", 2)


@pytest.mark.parametrize(("by_samples", "mean"), [(False, 0.5), (True, 0.1)])
def test_a_group_is_the_mean_over_its_tasks_or_their_samples(by_samples: bool, mean: float) -> None:
    group = {TaskMeasure("", group="both"): Group(frozenset({by_samples}), size=2)}
    tasks: list[dict[str, TaskSamples]] = [{}, {}]
    for name, count, accs in (("a", 10, (0, 1)), ("b", 90, (0, 0))):
        for own, acc in zip(tasks, accs, strict=True):
            own[name] = TaskSamples(
                name, group, True, significance.by_document(sample(str(n), acc) for n in range(count))
            )
    whole, *parts = compare_tasks(*tasks)
    assert (whole.name, whole.samples, whole.is_mean, len(parts)) == ("both mean", 100, True, 2)
    assert (whole.first, whole.second) == (0, mean)
    assert whole.paired is not None
    # within each task all differences are equal
    assert (whole.paired.difference, whole.paired.low, whole.paired.high) == (mean, mean, mean)
    assert whole.flips == Flips(100, 10, 0, 10, 0)


def test_the_tasks_of_a_large_group_have_no_rows_unless_something_is_missing() -> None:
    group = Group(OVER_SAMPLES, size=3)
    (task,) = samples_of(sample("x", 0), sample("y", 1), alone=False, mmlu=group).values()
    first = dict.fromkeys("012", task)
    assert [entry.name for entry in compare_tasks(first, first)] == ["mmlu mean"]
    second = first | {"1": samples_of(sample("x", 0), alone=False)["boolq"]}
    assert [entry.name for entry in compare_tasks(first, second)] == ["mmlu mean", "a task"]


def result(folder: Path, name: str, samples: list[dict[str, Any]] | None = None, **options: Any) -> TaskResult:
    """A task of the group "all" with its file of samples, which has the name of its task."""
    identity = write_samples(folder / f"{name}.jsonl", samples or [sample(name, 1)])
    options = {"group": "all", "groups": {"all": {"acc": True}}, "limit": 5, "samples_hash": {name: identity}} | options
    return task(0.5, name, options.pop("shots", 0), **options)


def names_of(folder: Path, results: list[TaskResult]) -> list[str]:
    own, _ = significance.read_samples(folder, results)
    return [entry.name for entry in compare_tasks(own, own)]


def test_samples_belong_to_the_results_that_know_their_hash(tmp_path: Path) -> None:
    rules = {"all": {"acc": True}, "part": {}}
    results = [
        result(tmp_path, "rte", groups=rules, members=57),
        result(tmp_path, "own-task", [sample("a", 1), sample("b", 0)], groups={}, group=None),
        result(tmp_path, "boolq", samples_hash={"boolq": "of before"}),
    ]
    samples, notes = significance.read_samples(tmp_path, results)
    assert notes == [f"{tmp_path / 'boolq.jsonl'} belongs to another evaluation and is left out"]
    grouped, alone = samples.values()
    assert (grouped.name, grouped.has_row, len(grouped.samples)) == ("rte, limit 5", False, 1)
    assert {(whole.group, whole.limit): group for whole, group in grouped.groups.items()} == {
        ("all", 5): Group(OVER_SAMPLES, 57),
        ("part", 5): Group(OVER_TASKS, 0),
    }
    assert (alone.name, alone.has_row, len(alone.samples), alone.groups) == ("own-task, limit 5", True, 2, {})
    assert significance.read_samples(tmp_path / "nowhere", results) == ({}, [])


def test_the_mean_of_a_part_of_a_group_says_so(tmp_path: Path) -> None:
    rules = {"all": {"acc": True}, "part": {"acc": True}}
    results = [result(tmp_path, name, groups=rules, members=3) for name in ("a", "b")]
    assert names_of(tmp_path, results) == ["all, limit 5 mean of 2 of 3 tasks", "a, limit 5", "b, limit 5"]
    results.append(result(tmp_path, "c", members=3))
    assert names_of(tmp_path, results)[:2] == ["all, limit 5 mean", "part, limit 5 mean"]
    (tmp_path / "a.jsonl").unlink()
    assert names_of(tmp_path, results)[0] == "all, limit 5 mean of 2 of 3 tasks"


def test_the_tasks_of_a_group_that_lm_eval_ran_as_one_are_all_there(tmp_path: Path) -> None:
    hashes = {name: write_samples(tmp_path / f"{name}.jsonl", [sample(name, 1)]) for name in ("one", "two")}
    scores = {name: TaskScores({"acc": 0.5}, "acc", samples=1) for name in hashes}
    whole = task(None, "odd", tasks=scores, mean={"acc": 0.5}, samples_hash=hashes)
    assert names_of(tmp_path, [whole]) == ["odd mean", "one", "two"]


def run_as_one(folder: Path, mean: dict[str, float], **correct: tuple[int, int]) -> dict[Measured, TaskSamples]:
    """The samples of a group that lm-eval ran as one; of each task, how many of how many answers are correct."""
    hashes, scores = {}, {}
    for name, (right, count) in correct.items():
        rows = [sample(f"{name}{at}", int(at < right)) for at in range(count)]
        hashes[name] = write_samples(folder / f"{name}.jsonl", rows)
        scores[name] = TaskScores({"acc": right / count}, "acc", samples=count)
    whole = task(None, "odd", tasks=scores, mean=mean, samples_hash=hashes)
    return significance.read_samples(folder, [whole])[0]


@pytest.mark.parametrize(
    ("recorded", "means"),
    [
        ((0.3, 0.4), (0.3, 0.4)),  # over samples: 3 and 4 of 10
        ((0.375, 0.25), (0.375, 0.25)),  # over tasks: (2/8 + 1/2) / 2, (4/8 + 0/2) / 2
        ((0.3, 0.25), None),  # not averaged alike
        ((0.31, 0.41), None),  # of subgroups, or of another filter
        ((None, None), None),  # of another metric
    ],
)
def test_the_mean_of_a_group_that_ran_as_one_is_that_of_the_table(
    recorded: tuple[float | None, ...], means: tuple[float, float] | None, tmp_path: Path
) -> None:
    first_mean, second_mean = ({"exact_match": 0.5} if mean is None else {"acc": mean} for mean in recorded)
    first = run_as_one(tmp_path / "pruned", first_mean, large=(2, 8), small=(1, 2))
    second = run_as_one(tmp_path / "merged", second_mean, large=(4, 8), small=(0, 2))
    entries = {entry.name: entry for entry in compare_tasks(first, second)}
    assert entries.keys() - {"odd mean"} == {"large", "small"}
    whole = entries.get("odd mean")
    assert (whole and (whole.first, whole.second)) == (means and pytest.approx(means))


@pytest.mark.parametrize("mean", [0.3, 0.5])  # (6/10 + 0/2) / 2, and 6 of 12
def test_a_mean_of_equal_accuracies_is_made_as_that_of_the_other_checkpoint(mean: float, tmp_path: Path) -> None:
    first = run_as_one(tmp_path / "pruned", {"acc": 0.5}, large=(5, 10), small=(1, 2))
    second = run_as_one(tmp_path / "merged", {"acc": mean}, large=(6, 10), small=(0, 2))
    assert [(entry.first, entry.second) for entry in compare_tasks(first, second) if entry.is_mean] == [(0.5, mean)]


def test_a_task_alone_and_in_a_group_is_one_task(tmp_path: Path) -> None:
    in_group = result(tmp_path, "rte", members=57)
    alone = with_measure(result(tmp_path, "rte", group=None, groups={}), num_fewshot=None)  # its own, which is 0
    for results in ([in_group, alone], [alone, in_group]):
        (samples,) = significance.read_samples(tmp_path, results)[0].values()
        assert (samples.has_row, list(samples.groups)) == (True, [TaskMeasure("", 0, 5, group="all")])


def test_a_group_with_other_examples_or_prompts_is_another_mean(tmp_path: Path) -> None:
    ways: list[dict[str, Any]] = [{"shots": 0}, {"shots": 5}, {"chat_template": True}]
    results = []
    for number, way in enumerate(ways):
        for name in ("a", "b"):
            identity = write_samples(tmp_path / f"{name}.{number}.jsonl", [sample(f"{name}{number}", number == 1)])
            results.append(result(tmp_path, name, members=2, samples_hash={name: identity}, **way))
    means = [name for name in names_of(tmp_path, results) if "mean" in name]
    assert means == ["all, limit 5 mean", "all 5-shot, limit 5 mean", "all chat, limit 5 mean"]


def test_only_what_was_measured_in_the_same_way_is_compared(tmp_path: Path) -> None:
    options = ({"shots": 0}, {"shots": 5}, {"group": None}, {"dtype": "float32"}, {"sources": {"digest": "d"}})
    zero, five, alone, wide, files = (
        significance.read_samples(tmp_path, [result(tmp_path, "rte", **own)])[0] for own in options
    )
    assert compare_tasks(zero, five) == compare_tasks(zero, wide) == compare_tasks(zero, files) == []
    assert len(compare_tasks(zero, alone)) == 1


# --- windows ----------------------------------------------------------------------------------------------------------


def losses(*own: float | None, stride: int = 5, **options: Any) -> list[TextResult]:
    return [text(9.0, 5, **{"window_nll": list(own), "stride": stride} | options)]


def test_windows_are_compared_per_predicted_token() -> None:
    # a reference does not change the loss
    (entry,) = compare_texts(losses(8.0, 4.0, 6.0, reference="a"), losses(12.0, 8.0, 10.0, reference="b"))
    assert (entry.name, entry.samples, entry.first, entry.second) == ("prose @5 stride 5", 3, 1.5, 2.5)
    assert entry.paired is not None
    assert (entry.paired.difference, entry.paired.low, entry.paired.high) == (1, 1, 1)
    (entry,) = compare_texts(losses(4.0, 2.0, stride=2), losses(8.0, 4.0, stride=2))
    assert (entry.first, entry.second) == (1, 2)  # overlapping windows count what they add: 4 + 2 tokens


def test_windows_of_one_text_that_differ_have_the_names_of_tables() -> None:
    every = [
        *losses(4.0, 4.0),
        *(text(9.0, 5, stride=2, window_nll=[4.0, 4.0]), text(9.0, 9, window_nll=[4.0, 4.0])),
        text(9.0, 5, max_tokens=12, windows=2, window_nll=[4.0, 4.0]),
    ]
    names = [entry.name for entry in compare_texts(every, every)]
    assert names == ["prose @5 stride 5", "prose @5 stride 2", "prose @9", "prose @5, first 10 tokens"]


def test_other_texts_are_not_compared() -> None:
    different = ({"documents_hash": "y"}, {"tokens_hash": "z"}, {"dtype": "float32"})
    for other in (*(losses(1.0, **own) for own in different), losses(1.0, 2.0), losses()):
        assert compare_texts(losses(1.0), other) == compare_texts(other, losses(1.0)) == []


@pytest.mark.parametrize("broken", [float("inf"), float("nan"), None])
def test_windows_without_a_finite_loss_are_left_out_and_noted(broken: float | None) -> None:
    (entry,) = compare_texts(losses(4.0, 4.0, 4.0), losses(broken, 8.0, 4.0))
    assert (entry.samples, entry.first, entry.second) == (2, 1.0, 1.5)
    assert entry.note == "1 windows have no finite loss and are left out"
    (entry,) = compare_texts(losses(4.0, 4.0, 4.0), losses(broken, broken, broken))
    assert entry.paired is None
