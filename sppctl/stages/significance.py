"""Whether one checkpoint is better than another on the very same samples, beyond what drawing samples explains.

The paired bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993; for language processing Koehn,
EMNLP 2004) resamples the differences of single samples, so that what makes a sample hard for both cancels. Beside it
stands the share of flipped answers, which a small difference of accuracies can hide.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sppctl.errors import UserError

RESAMPLES = 10_000
SEED = 0
DRAWN = 1 << 22  # counts that are drawn at a time: 32 MB
ROUNDING = 1e-12  # two means of the same numbers may differ by this

Floats = NDArray[np.float64]
Sample = dict[str, Any]  # one line of eval/LABEL.samples/TASK.jsonl
Key = tuple[str, int]  # hash of a document, and how many of the same hash stand before it


@dataclass(frozen=True)
class Paired:
    """The mean of paired differences.

    Attributes:
        difference: mean of second - first.
        low: 2.5 % quantile of the resampled means.
        high: 97.5 % quantile.
        p: two-sided: how often a resampled mean, moved to centre on zero, is at least as far from zero.
    """

    difference: float
    low: float
    high: float
    p: float


def resampled_means(
    differences: Floats, weights: Floats | None = None, resamples: int = RESAMPLES, seed: int = SEED
) -> Floats:
    """Means of as many differences, drawn with replacement.

    Samples with the same difference and weight are alike, so how often each kind is drawn is all that matters: a
    multinomial distribution, three kinds for accuracies whatever the number of samples.

    Args:
        differences: (samples,) one per sample, or its sum over ``weights`` tokens.
        weights: (samples,) what a sample counts; None: all the same.
        resamples: means to make.
        seed: of the generator; the same seed gives the same means.

    Returns:
        (resamples,) sum of differences by sum of weights.
    """
    weights = np.ones(len(differences)) if weights is None else weights
    kinds, counts = np.unique(np.column_stack([differences, weights]), axis=0, return_counts=True)
    generator = np.random.default_rng(seed)
    sums = []
    step = max(1, DRAWN // len(kinds))
    for first in range(0, resamples, step):
        size = min(step, resamples - first)
        sums.append(generator.multinomial(len(differences), counts / len(differences), size=size) @ kinds)
    drawn = np.concatenate(sums)
    means: Floats = drawn[:, 0] / drawn[:, 1]
    return means


def paired(difference: float, means: Floats) -> Paired:
    """Interval and p value of a difference from its resampled means."""
    low, high = np.quantile(means, [0.025, 0.975])
    extreme = int(np.sum(np.abs(means - difference) >= abs(difference) - ROUNDING))
    return Paired(difference, float(low), float(high), (1 + extreme) / (1 + len(means)))


# --- samples of tasks -------------------------------------------------------------------------------------------------


def read_samples(directory: Path) -> dict[str, list[Sample]]:
    """The samples of every task of one checkpoint, from ``eval/LABEL.samples``; empty if none were kept.

    Raises:
        UserError: a line is no JSON.
    """
    found = {}
    for path in sorted(directory.glob("*.jsonl")):
        try:
            found[path.stem] = [json.loads(line) for line in path.read_text().splitlines() if line]
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}); delete it and run sppctl eval again") from error
    return found


def match(first: list[Sample], second: list[Sample]) -> tuple[list[tuple[Sample, Sample]], int]:
    """Pairs of samples of the same document by its hash, and the number of samples without a partner."""
    ours, theirs = _keyed(first), _keyed(second)
    pairs = [(ours[key], theirs[key]) for key in ours if key in theirs]
    return pairs, len(ours) + len(theirs) - 2 * len(pairs)


def _keyed(samples: list[Sample]) -> dict[Key, Sample]:
    seen: Counter[str] = Counter()
    keyed = {}
    for sample in samples:
        keyed[sample["hash"], seen[sample["hash"]]] = sample
        seen[sample["hash"]] += 1
    return keyed


def flips(pairs: Sequence[tuple[Sample, Sample]]) -> dict[str, Any]:
    """How many samples are answered otherwise, and what became of those: wrong, right, or wrong in another way."""
    chosen = [(one, other) for one, other in pairs if None not in (one.get("chosen"), other.get("chosen"))]
    changed = [(one, other) for one, other in chosen if one["chosen"] != other["chosen"]]
    verdicts = Counter((bool(one["acc"]), bool(other["acc"])) for one, other in changed)
    return {
        "answers": len(chosen),
        "flipped": len(changed),
        "share": len(changed) / len(chosen) if chosen else None,
        "correct_to_wrong": verdicts[True, False],
        "wrong_to_correct": verdicts[False, True],
        "wrong_to_wrong": verdicts[False, False],
    }


def compare_tasks(
    first: dict[str, list[Sample]], second: dict[str, list[Sample]], groups: dict[str, list[str]]
) -> list[dict[str, Any]]:
    """Accuracy of two checkpoints on the samples of every task that both were measured on.

    Args:
        first: samples by task of the checkpoint that is the measure.
        second: of the other one.
        groups: tasks of each evaluated group; one of several tasks gets a row of its own.

    Returns:
        One entry per task, then per group: name, samples, accuracies, :class:`Paired`, flips, and a note where samples
        do not match. A group of up to ten tasks is the mean over them, a larger one (MMLU, whose subjects differ in
        size) the mean over its samples, as lm-eval has it; each task is resampled by itself.
    """
    entries: list[dict[str, Any]] = []
    draws: dict[str, Floats] = {}
    ordered = list(dict.fromkeys([*(task for tasks in groups.values() for task in tasks), *first]))
    for task in (task for task in ordered if task in first and task in second):
        pairs, alone = match(first[task], second[task])
        pairs = [pair for pair in pairs if all(sample.get("acc") is not None for sample in pair)]
        entry: dict[str, Any] = {"name": task, "measure": "acc", "samples": len(pairs)}
        if alone:
            entry["note"] = f"{alone} samples stand in one of the two files only and are left out"
        if pairs:
            before, after = np.array([[one["acc"], other["acc"]] for one, other in pairs], dtype=np.float64).T
            draws[task] = resampled_means(after - before, seed=SEED + len(draws))
            entry |= {"first": float(before.mean()), "second": float(after.mean())}
            entry |= asdict(paired(entry["second"] - entry["first"], draws[task])) | {"flips": flips(pairs)}
        entries.append(entry)
    measured = {entry["name"]: entry for entry in entries if entry["name"] in draws}
    hidden: set[str] = set()
    for group, tasks in groups.items():
        if len(tasks) > 1 and all(task in measured for task in tasks):
            entries.append(_group(group, [measured[task] for task in tasks], [draws[task] for task in tasks]))
            hidden |= set(tasks) if len(tasks) > 10 else set()
    return [entry for entry in entries if entry["name"] not in hidden]


def _group(name: str, entries: list[dict[str, Any]], draws: list[Floats]) -> dict[str, Any]:
    sizes = [float(entry["samples"]) for entry in entries]
    weights = sizes if len(entries) > 10 else [1.0] * len(entries)
    first, second = (
        float(np.average([entry[key] for entry in entries], weights=weights)) for key in ("first", "second")
    )
    together = Counter[str]()
    for entry in entries:
        together.update({key: count for key, count in entry["flips"].items() if key != "share"})
    share = together["flipped"] / together["answers"] if together["answers"] else None
    return {
        "name": f"{name} mean",
        "measure": "acc",
        "samples": sum(entry["samples"] for entry in entries),
        "first": first,
        "second": second,
        **asdict(paired(second - first, np.average(draws, axis=0, weights=weights))),
        "flips": {**together, "share": share},
    }


# --- windows of texts -------------------------------------------------------------------------------------------------


def compare_texts(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Loss per token of two checkpoints on the windows of every text that both were measured on.

    Args:
        first: ``results`` of the checkpoint that is the measure; those of perplexity are used.
        second: of the other one.

    Returns:
        One entry per text: name, windows as samples, mean losses in nats, :class:`Paired`; without what was measured
        when windows were not yet recorded. Windows of one text are not quite independent of each other.
    """
    theirs = {_text(result): result["metrics"] for result in second if result["settings"]["kind"] == "perplexity"}
    entries = []
    for result in first:
        metrics, other = result["metrics"], theirs.get(_text(result))
        if (
            other is None
            or "window_nll" not in metrics
            or len(metrics["window_nll"]) != len(other.get("window_nll", []))
        ):
            continue
        tokens = np.array(_scored(metrics), dtype=np.float64)
        sums = np.array([metrics["window_nll"], other["window_nll"]])
        before, after = (float(losses.sum() / tokens.sum()) for losses in sums)
        means = resampled_means(sums[1] - sums[0], tokens)
        entry = {"name": result["settings"]["text"], "measure": "nll", "samples": len(tokens)}
        entries.append(entry | {"first": before, "second": after} | asdict(paired(after - before, means)))
    return entries


def _text(result: dict[str, Any]) -> str:
    """What must be the same for windows to be the same."""
    settings = {key: value for key, value in result["settings"].items() if key != "reference"}
    return json.dumps([settings, result["metrics"].get("documents_hash")], sort_keys=True)


def _scored(metrics: dict[str, Any]) -> list[int]:
    """Predicted tokens that count in each window, as :func:`sppctl.lm.perplexity.scored_tokens` has them."""
    first = metrics["seq_len"] - 1
    count = len(metrics["window_nll"])
    return [first] + [min(metrics["stride"], first)] * (count - 1)
