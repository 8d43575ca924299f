"""Whether one checkpoint is better than another on the very same samples, beyond what drawing samples explains.

The paired bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993; for language processing Koehn,
EMNLP 2004) resamples the differences of single samples, so that what makes a sample hard for both cancels. The share
of flipped answers is given too, which a small difference of accuracies can hide.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sppctl.evaluate.results import TaskMeasure, TaskResult, TextMeasure, TextNumbers, TextResult
from sppctl.evaluate.values import SHOWN, draws_examples

RESAMPLES = 10_000
SEED = 0
DRAWN = 1 << 22  # counts that are drawn at a time: 32 MB
ROUNDING = 1e-12  # two means of the same numbers may differ by this

Floats = NDArray[np.float64]
Sample = dict[str, Any]  # one line of eval/LABEL.samples/TASK.jsonl
Measured = tuple[TaskMeasure, str | None]  # what must be equal to compare samples: task, settings and dtype


@dataclass(frozen=True)
class Paired:
    """The mean of paired differences."""

    difference: float  # mean of second - first
    low: float  # 2.5 % quantile of the resampled means
    high: float  # 97.5 % quantile
    p: float  # two-sided: how often a resampled mean, moved to centre on zero, is at least as far from zero


@dataclass(frozen=True)
class Flips:
    """Samples whose answer is another one, and what became of them: wrong, right, or wrong in another way."""

    answers: int
    flipped: int
    correct_to_wrong: int
    wrong_to_correct: int
    wrong_to_wrong: int

    @property
    def share(self) -> float | None:
        """Of the answers."""
        return self.flipped / self.answers if self.answers else None


@dataclass(frozen=True)
class Entry:
    """One text, task or group on two checkpoints."""

    name: str  # with what limits it
    measure: str  # acc, or nll in nats
    samples: int  # that both have
    first: float | None = None  # mean over them; None without any
    second: float | None = None
    paired: Paired | None = None
    flips: Flips | None = None  # of tasks
    note: str | None = None  # what was left out
    is_mean: bool = False  # of a group


@dataclass(frozen=True)
class Comparison:
    """Two checkpoints, or those of two runs, on the same samples."""

    first: str
    second: str
    entries: list[Entry]


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
    """What came of the samples of one task on one checkpoint."""

    name: str  # with what limits it
    groups: dict[str, bool]  # that it is averaged in, and whether by samples (else by tasks)
    alone: bool  # whether it has a row of its own; not in a group of many tasks
    samples: list[Sample]  # in the order of lm-eval
    # tasks of each of these groups; 0 where that is not known: a part of a group that is measured in part
    sizes: dict[str, int] = field(default_factory=dict)


def read_samples(folder: Path, results: list[TaskResult]) -> tuple[dict[Measured, TaskSamples], list[str]]:
    """The samples that the results of one checkpoint rest on, from ``eval/LABEL.samples``.

    Results carry the hash of their file of samples. A file that another evaluation has written is not theirs.

    Args:
        folder: of ``TASK.jsonl`` and the like; may be missing.
        results: of the tasks measured on the checkpoint.

    Returns:
        Samples in the order of the results, and a note for each file left out.
    """
    files = {}
    for path in sorted(folder.glob("*.jsonl")):
        content = path.read_text()
        files[hashlib.sha256(content.encode()).hexdigest()[:16]] = path, content
    found: dict[Measured, TaskSamples] = {}
    used = set()
    for result in results:
        sizes = _sizes(result, results)
        for task, identity in result.numbers.samples_hash.items():
            if identity not in files:
                continue
            used.add(identity)
            key = _comparable(result, task)
            samples = [json.loads(line) for line in files[identity][1].splitlines()]
            found[key] = _task(task, result, samples, sizes, found.get(key))
    left = [path for identity, (path, _) in files.items() if identity not in used]
    return found, [f"{path} belongs to another evaluation and is left out" for path in left]


def _comparable(result: TaskResult, task: str) -> Measured:
    """The measure without its group, with the examples that prompts had, and with a seed only if any were drawn."""
    measure = result.measure
    count = result.numbers.tasks[task].num_fewshot if task in result.numbers.tasks else None
    seed = measure.seed if draws_examples(result) else None
    shots = measure.num_fewshot if count is None else count
    return replace(measure, task=task, group=None, num_fewshot=shots, seed=seed), result.dtype


def _task(
    task: str, result: TaskResult, samples: list[Sample], sizes: dict[str, int], known: TaskSamples | None
) -> TaskSamples:
    """A task, in the groups of ``result`` and in those it is known to be in."""
    limit = f", limit {result.measure.limit}" if result.measure.limit is not None else ""
    groups = {f"{group}{limit} mean": by_samples for group, by_samples in _groups(result).items()}
    sizes = {f"{group}{limit} mean": size for group, size in sizes.items()}
    alone = _members(result) <= SHOWN
    found = TaskSamples(f"{task}{limit}", groups, alone, samples, sizes)
    if known is None:
        return found
    return replace(found, groups=known.groups | groups, alone=known.alone or alone, sizes=known.sizes | sizes)


def _members(result: TaskResult) -> int:
    """Tasks of the group that was asked for; lm-eval ran the others as one."""
    return result.numbers.members if result.numbers.groups else len(result.numbers.tasks)


def _groups(result: TaskResult) -> dict[str, bool]:
    """The groups of a result's tasks, the one that was asked for first, and whether their means are by samples."""
    if result.numbers.groups:
        return {group: bool(rules.get("acc")) for group, rules in result.numbers.groups.items()}
    return {result.measure.task: False} if len(result.numbers.tasks) > 1 else {}


def _sizes(result: TaskResult, results: list[TaskResult]) -> dict[str, int]:
    """How many tasks the groups of a result have."""
    groups = _groups(result)
    if not groups:
        return {}
    asked, *parts = groups
    whole = _members(result)
    family = [one.numbers.groups for one in results if one.measure.family == result.measure.family] if parts else []
    complete = len(family) == whole
    return {asked: whole} | {part: sum(part in one for one in family) * complete for part in parts}


def match(first: list[Sample], second: list[Sample]) -> tuple[list[tuple[Sample, Sample]], int]:
    """Pairs of samples of the same document by its hash, and the number of samples without a partner."""
    ours, theirs = _by_document(first), _by_document(second)
    pairs = [(ours[key], theirs[key]) for key in ours if key in theirs]
    return pairs, len(ours) + len(theirs) - 2 * len(pairs)


def _by_document(samples: list[Sample]) -> dict[tuple[str, int], Sample]:
    """By the hash of the document, and how many samples of the same hash come before."""
    seen: Counter[str] = Counter()
    found = {}
    for sample in samples:
        found[sample["hash"], seen[sample["hash"]]] = sample
        seen[sample["hash"]] += 1
    return found


def flips(pairs: Sequence[tuple[Sample, Sample]]) -> Flips:
    """How many samples of two checkpoints are answered differently."""
    chosen = [(one, other) for one, other in pairs if None not in (one.get("chosen"), other.get("chosen"))]
    changed = [(one, other) for one, other in chosen if one["chosen"] != other["chosen"]]
    verdicts = Counter((bool(one["acc"]), bool(other["acc"])) for one, other in changed)
    kinds = ((True, False), (False, True), (False, False))
    return Flips(len(chosen), len(changed), *(verdicts[kind] for kind in kinds))


def compare_tasks(first: Mapping[Any, TaskSamples], second: Mapping[Any, TaskSamples]) -> list[Entry]:
    """Accuracy of two checkpoints on the samples of every task that both were measured on.

    Args:
        first: of the checkpoint that is the measure, by what must be equal.
        second: of the other one.

    Returns:
        One entry per group, then per task. Each task is resampled by itself; the mean of a group is over tasks or
        samples as lm-eval has it.
    """
    entries: dict[Any, Entry] = {}
    draws: dict[Any, Floats] = {}
    for key in (key for key in first if key in second):
        pairs, alone = match(first[key].samples, second[key].samples)
        pairs = [pair for pair in pairs if all(sample.get("acc") is not None for sample in pair)]
        note = f"{alone} samples stand in one of the two files only and are left out" if alone else None
        entries[key] = Entry(first[key].name, "acc", len(pairs), note=note)
        if pairs:
            before, after = np.array([[one["acc"], other["acc"]] for one, other in pairs], dtype=np.float64).T
            draws[key] = resampled_means(after - before, seed=SEED + len(draws))
            means = float(before.mean()), float(after.mean())
            entries[key] = _compared(entries[key], *means, draws[key], flips(pairs))
    groups = {group: by_samples for task in first.values() for group, by_samples in task.groups.items()}
    found = []
    for group, by_samples in groups.items():
        keys = [key for key, task in first.items() if group in task.groups]
        size = first[keys[0]].sizes.get(group, len(keys))
        if len(keys) > 1 and size and all(key in draws for key in keys):
            name = group if len(keys) == size else f"{group} of {len(keys)} of {size} tasks"
            found.append(_group(name, [entries[key] for key in keys], [draws[key] for key in keys], by_samples))
    return found + [one for key, one in entries.items() if first[key].alone or second[key].alone or one.note]


def _compared(entry: Entry, first: float, second: float, draws: Floats, flipped: Flips | None = None) -> Entry:
    difference = paired(second - first, draws)
    return replace(entry, first=first, second=second, paired=difference, flips=flipped)


def _group(name: str, entries: list[Entry], draws: list[Floats], by_samples: bool) -> Entry:
    weights = [float(entry.samples) if by_samples else 1.0 for entry in entries]
    first, second = (
        float(np.average([getattr(entry, side) for entry in entries], weights=weights)) for side in ("first", "second")
    )
    flipped = [entry.flips for entry in entries if entry.flips is not None]
    together = Flips(*(sum(counts) for counts in zip(*(asdict(one).values() for one in flipped), strict=True)))
    whole = Entry(name, "acc", sum(entry.samples for entry in entries), is_mean=True)
    return _compared(whole, first, second, np.average(draws, axis=0, weights=weights), together)


# --- windows of texts -------------------------------------------------------------------------------------------------


def compare_texts(first: list[TextResult], second: list[TextResult]) -> list[Entry]:
    """Loss per token of two checkpoints on the windows of every text that both were measured on.

    Windows of one text are not quite independent of each other.

    Args:
        first: of the checkpoint that is the measure.
        second: of the other one.
    """
    others = {_text(result): result.numbers for result in second}
    entries = []
    for result in first:
        numbers, other = result.numbers, others.get(_text(result))
        if other is None or not numbers.window_nll or len(numbers.window_nll) != len(other.window_nll):
            continue
        tokens = np.array(_scored(numbers), dtype=np.float64)
        sums = np.array([numbers.window_nll, other.window_nll], dtype=np.float64)  # None becomes NaN
        finite = np.isfinite(sums).all(axis=0)
        tokens, sums = tokens[finite], sums[:, finite]
        count = int((~finite).sum())
        note = f"{count} windows have no finite loss and are left out" if count else None
        entry = Entry(result.measure.text, "nll", len(tokens), note=note)
        if len(tokens):
            before, after = (float(losses.sum() / tokens.sum()) for losses in sums)
            entry = _compared(entry, before, after, resampled_means(sums[1] - sums[0], tokens))
        entries.append(entry)
    return entries


def _text(result: TextResult) -> tuple[TextMeasure, str | None, str | None]:
    """What must be the same for windows to be the same, and computed alike."""
    return result.measure.windows, result.numbers.documents_hash, result.dtype


def _scored(numbers: TextNumbers) -> list[int]:
    """Predicted tokens that count in each window, as :func:`sppctl.evaluate.perplexity.scored_tokens` has them."""
    first = numbers.seq_len - 1
    return [first] + [min(numbers.stride, first)] * (len(numbers.window_nll) - 1)
