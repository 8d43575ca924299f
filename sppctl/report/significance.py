"""Whether one checkpoint is better than another on the very same samples, beyond what drawing samples explains.

The paired bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993; for language processing Koehn,
EMNLP 2004) resamples the differences of single samples, so that what makes a sample hard for both cancels. Beside it
stands the share of flipped answers, which a small difference of accuracies can hide.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sppctl.evaluate.tasks import SHOWN, of_family

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


@dataclass(frozen=True)
class TaskSamples:
    """What came of the samples of one task on one checkpoint.

    Attributes:
        name: of the task, with what limits it.
        groups: the groups it is averaged in, with whether by samples (else by tasks).
        alone: whether it has a row of its own; not in a group of many tasks.
        samples: in the order of lm-eval.
        sizes: tasks of each of these groups; 0 where that is not known, which is a part of a group that is measured in
            part.
    """

    name: str
    groups: dict[str, bool]
    alone: bool
    samples: list[Sample]
    sizes: dict[str, int] = field(default_factory=dict)


def read_samples(folder: Path, results: list[dict[str, Any]]) -> tuple[dict[str, TaskSamples], list[str]]:
    """The samples that the results of one checkpoint rest on, from ``eval/LABEL.samples``.

    Results carry the hash of their file of samples. A file that another evaluation has written is not theirs.

    Args:
        folder: of ``TASK.jsonl`` and the like; may be missing.
        results: ``results`` of the checkpoint.

    Returns:
        Samples by what must be equal to compare them (task and settings), in the order of the results, and a note for
        each file left out.
    """
    files = {}
    for path in sorted(folder.glob("*.jsonl")):
        content = path.read_text()
        files[hashlib.sha256(content.encode()).hexdigest()[:16]] = path, content
    found: dict[str, TaskSamples] = {}
    owned = set()
    for result in results:
        for task, own in result["metrics"].get("samples_hash", {}).items():
            if own in files:
                owned.add(own)
                idle = {"group"} if draws_examples(result) else {"group", "seed"}
                settings = {key: value for key, value in result["settings"].items() if key not in idle}
                count = result["metrics"]["tasks"].get(task, {}).get("num_fewshot", settings["num_fewshot"])
                computed = {"num_fewshot": count, "dtype": result.get("dtype")}
                key = json.dumps(settings | {"tasks": task} | computed, sort_keys=True)
                samples = [json.loads(line) for line in files[own][1].splitlines()]
                sizes = _sizes(result, results)
                found[key] = _task(task, result, samples, sizes, found.get(key))
    left = [path for own, (path, _) in files.items() if own not in owned]
    return found, [f"{path} belongs to another evaluation and is left out" for path in left]


def draws_examples(result: dict[str, Any]) -> bool:
    """Whether the tasks of a result have few-shot examples; without any, its seed changes nothing."""
    few = [result["settings"]["num_fewshot"]]
    return any(few + [values.get("num_fewshot") for values in result["metrics"]["tasks"].values()])


def _task(
    task: str, result: dict[str, Any], samples: list[Sample], sizes: dict[str, int], known: TaskSamples | None
) -> TaskSamples:
    """A task, in the groups of ``result`` and in those it is known to be in."""
    settings, metrics = result["settings"], result["metrics"]
    limit = f", limit {settings['limit']}" if settings["limit"] is not None else ""
    groups = {f"{group}{limit} mean": bool(rules.get("acc")) for group, rules in _groups(result).items()}
    sizes = {f"{group}{limit} mean": size for group, size in sizes.items()}
    alone = metrics.get("members", len(metrics["tasks"])) <= SHOWN
    found = TaskSamples(f"{task}{limit}", groups, alone, samples, sizes)
    if known is None:
        return found
    return replace(found, groups=known.groups | groups, alone=known.alone or alone, sizes=known.sizes | sizes)


def _groups(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The groups of a result's tasks, the one that was asked for first, and their rules."""
    settings, metrics = result["settings"], result["metrics"]
    return metrics.get("groups") or ({settings["tasks"]: {}} if len(metrics["tasks"]) > 1 else {})


def _sizes(result: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, int]:
    """How many tasks the groups of a result have."""
    metrics = result["metrics"]
    asked, *parts = _groups(result) or [""]
    whole = metrics.get("members", len(metrics["tasks"]))
    if not parts:
        return {asked: whole} if asked else {}
    family = [one["metrics"] for one in results if of_family(one["settings"]) == of_family(result["settings"])]
    complete = len(family) == whole
    return {asked: whole} | {part: sum(part in one["groups"] for one in family) * complete for part in parts}


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


def compare_tasks(first: dict[str, TaskSamples], second: dict[str, TaskSamples]) -> list[dict[str, Any]]:
    """Accuracy of two checkpoints on the samples of every task that both were measured on.

    Args:
        first: of the checkpoint that is the measure, by task and settings.
        second: of the other one.

    Returns:
        One entry per group, then per task: name, samples, accuracies, :class:`Paired`, flips, and a note where samples
        do not match. Each task is resampled by itself; the mean of a group is over tasks or samples as lm-eval has it.
    """
    entries: dict[str, dict[str, Any]] = {}
    draws: dict[str, Floats] = {}
    for key in (key for key in first if key in second):
        pairs, alone = match(first[key].samples, second[key].samples)
        pairs = [pair for pair in pairs if all(sample.get("acc") is not None for sample in pair)]
        entry: dict[str, Any] = {"name": first[key].name, "measure": "acc", "samples": len(pairs)}
        if alone:
            entry["note"] = f"{alone} samples stand in one of the two files only and are left out"
        if pairs:
            before, after = np.array([[one["acc"], other["acc"]] for one, other in pairs], dtype=np.float64).T
            draws[key] = resampled_means(after - before, seed=SEED + len(draws))
            entry |= {"first": float(before.mean()), "second": float(after.mean())}
            entry |= asdict(paired(entry["second"] - entry["first"], draws[key])) | {"flips": flips(pairs)}
        entries[key] = entry
    groups = {group: by_samples for task in first.values() for group, by_samples in task.groups.items()}
    means = []
    for group, by_samples in groups.items():
        keys = [key for key, task in first.items() if group in task.groups]
        size = first[keys[0]].sizes.get(group, len(keys))
        if len(keys) > 1 and size and all(key in draws for key in keys):
            name = group if len(keys) == size else f"{group} of {len(keys)} of {size} tasks"
            means.append(_group(name, [entries[key] for key in keys], [draws[key] for key in keys], by_samples))
    return means + [entry for key, entry in entries.items() if first[key].alone or second[key].alone or "note" in entry]


def _group(name: str, entries: list[dict[str, Any]], draws: list[Floats], by_samples: bool) -> dict[str, Any]:
    weights = [float(entry["samples"]) if by_samples else 1.0 for entry in entries]
    first, second = (
        float(np.average([entry[key] for entry in entries], weights=weights)) for key in ("first", "second")
    )
    together = Counter[str]()
    for entry in entries:
        together.update({key: count for key, count in entry["flips"].items() if key != "share"})
    share = together["flipped"] / together["answers"] if together["answers"] else None
    return {
        "name": name,
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
        One entry per text: name, windows as samples, mean losses in nats, :class:`Paired`, and a note where losses are
        not finite; without what was measured when windows were not yet recorded. Windows of one text are not quite
        independent of each other.
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
        sums = np.array([metrics["window_nll"], other["window_nll"]], dtype=np.float64)  # None becomes NaN
        finite = np.isfinite(sums).all(axis=0)
        tokens, sums = tokens[finite], sums[:, finite]
        entry = {"name": result["settings"]["text"], "measure": "nll", "samples": len(tokens)}
        if not finite.all():
            entry["note"] = f"{int((~finite).sum())} windows have no finite loss and are left out"
        if len(tokens):
            before, after = (float(losses.sum() / tokens.sum()) for losses in sums)
            means = resampled_means(sums[1] - sums[0], tokens)
            entry |= {"first": before, "second": after} | asdict(paired(after - before, means))
        entries.append(entry)
    return entries


def _text(result: dict[str, Any]) -> str:
    """What must be the same for windows to be the same, and computed alike."""
    settings = {key: value for key, value in result["settings"].items() if key not in ("reference", "content")}
    return json.dumps([settings, result["metrics"].get("documents_hash"), result.get("dtype")], sort_keys=True)


def _scored(metrics: dict[str, Any]) -> list[int]:
    """Predicted tokens that count in each window, as :func:`sppctl.evaluate.perplexity.scored_tokens` has them."""
    first = metrics["seq_len"] - 1
    count = len(metrics["window_nll"])
    return [first] + [min(metrics["stride"], first)] * (count - 1)
