"""Whether one checkpoint is better than another on the very same samples, beyond what drawing samples explains.

The paired bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993; for language processing Koehn,
EMNLP 2004) resamples the differences of single samples, so that what makes a sample hard for both cancels. The share
of flipped answers is given too, which a small difference of accuracies can hide.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sppctl.evaluate.results import TaskMeasure, TaskResult, TextMeasure, TextResult
from sppctl.evaluate.values import SHOWN, draws_examples, title_of

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

    def compared(self, first: float, second: float, means: Floats, flips: Flips | None = None) -> Entry:
        """With the means of both, and the interval and p value of their difference from its resampled means."""
        difference = second - first
        low, high = np.quantile(means, [0.025, 0.975])
        extreme = int(np.sum(np.abs(means - difference) >= abs(difference) - ROUNDING))
        paired = Paired(difference, float(low), float(high), (1 + extreme) / (1 + len(means)))
        return replace(self, first=first, second=second, paired=paired, flips=flips)


@dataclass(frozen=True)
class Comparison:
    """Two checkpoints, or those of two runs, on the same samples."""

    first: str
    second: str
    entries: list[Entry]


def resampled_means(differences: Floats, weights: Floats | None = None, seed: int = SEED) -> Floats:
    """(RESAMPLES,) means of as many differences, drawn with replacement.

    Samples with the same difference and weight are alike, so how often each kind is drawn is all that matters: a
    multinomial distribution, three kinds for accuracies whatever the number of samples.

    Args:
        differences: (samples,) one per sample, or its sum over ``weights`` tokens.
        weights: (samples,) what a sample counts; None: all the same. A mean is a sum of differences by one of weights.
        seed: of the generator.
    """
    weights = np.ones(len(differences)) if weights is None else weights
    kinds, counts = np.unique(np.column_stack([differences, weights]), axis=0, return_counts=True)
    generator = np.random.default_rng(seed)
    sums = []
    step = max(1, DRAWN // len(kinds))
    for first in range(0, RESAMPLES, step):
        size = min(step, RESAMPLES - first)
        sums.append(generator.multinomial(len(differences), counts / len(differences), size=size) @ kinds)
    drawn = np.concatenate(sums)
    means: Floats = drawn[:, 0] / drawn[:, 1]
    return means


# --- samples of tasks -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """How a task is averaged with others."""

    by_samples: bool  # else by tasks
    size: int  # its tasks; 0 where that is not known: a part of a group that is measured in part


@dataclass(frozen=True)
class TaskSamples:
    """What came of the samples of one task on one checkpoint."""

    name: str  # with what limits it
    groups: dict[TaskMeasure, Group]  # that it is averaged in, by their name and settings
    alone: bool  # whether it has a row of its own; not in a group of many tasks
    samples: dict[tuple[str, int], Sample]  # by the document's hash, and how many of the same hash come before


def read_samples(folder: Path, results: list[TaskResult]) -> tuple[dict[Measured, TaskSamples], list[str]]:
    """The samples in ``eval/LABEL.samples`` that the results of one checkpoint rest on, and a note for each other file.

    Results carry the hash of their file of samples. A file that another evaluation has written is not theirs.
    """
    contents = {path: path.read_text() for path in sorted(folder.glob("*.jsonl"))}
    files = {hashlib.sha256(text.encode()).hexdigest()[:16]: path for path, text in contents.items()}
    by_task: dict[Measured, TaskSamples] = {}
    for result in results:
        whole = replace(result.measure, task="", batch_size=None)  # one group with other settings is another mean
        groups = {replace(whole, group=name): group for name, group in _groups(result, results).items()}
        members = result.numbers.members if result.numbers.groups else len(result.numbers.tasks)
        for task, identity in result.numbers.samples_hash.items():
            if identity in files:
                key = _comparable(result, task)
                before = by_task.get(key, TaskSamples("", {}, False, {}))  # alone, or in another group
                samples = by_document(json.loads(line) for line in contents[files[identity]].splitlines())
                alone = before.alone or members <= SHOWN
                by_task[key] = TaskSamples(title_of(key[0]), before.groups | groups, alone, samples)
    used = {identity for result in results for identity in result.numbers.samples_hash.values()}
    left = [path for identity, path in files.items() if identity not in used]
    return by_task, [f"{path} belongs to another evaluation and is left out" for path in left]


def _comparable(result: TaskResult, task: str) -> Measured:
    """The measure without its group, with the examples that prompts had, and with a seed only if any were drawn."""
    measure = result.measure
    count = result.numbers.tasks[task].num_fewshot if task in result.numbers.tasks else None
    seed = measure.seed if draws_examples(result) else None
    shots = measure.num_fewshot if count is None else count
    return replace(measure, task=task, group=None, num_fewshot=shots, seed=seed), result.dtype


def _groups(result: TaskResult, results: list[TaskResult]) -> dict[str, Group]:
    """The groups of a result's tasks, the one that was asked for first."""
    numbers = result.numbers
    if not numbers.groups:  # lm-eval ran its tasks, if there are several, as one
        return {result.measure.task: Group(False, len(numbers.tasks))} if len(numbers.tasks) > 1 else {}
    family = [one.numbers.groups for one in results if one.measure.family == result.measure.family]
    is_whole = len(family) == numbers.members
    sizes = {part: sum(part in groups for groups in family) if is_whole else 0 for part in numbers.groups}
    sizes[next(iter(numbers.groups))] = numbers.members
    return {name: Group(bool(rules.get("acc")), sizes[name]) for name, rules in numbers.groups.items()}


def by_document(samples: Iterable[Sample]) -> dict[tuple[str, int], Sample]:
    """Samples as :class:`TaskSamples` has them."""
    seen: Counter[str] = Counter()
    numbered = {}
    for sample in samples:
        numbered[sample["hash"], seen[sample["hash"]]] = sample
        seen[sample["hash"]] += 1
    return numbered


def flips(pairs: Sequence[tuple[Sample, Sample]]) -> Flips:
    """How many samples of two checkpoints are answered differently."""
    chosen = [pair for pair in pairs if all(sample.get("chosen") is not None for sample in pair)]
    changed = [pair for pair in chosen if pair[0]["chosen"] != pair[1]["chosen"]]
    verdicts = Counter((bool(one["acc"]), bool(other["acc"])) for one, other in changed)
    return Flips(len(chosen), len(changed), verdicts[True, False], verdicts[False, True], verdicts[False, False])


def compare_tasks(first: Mapping[Any, TaskSamples], second: Mapping[Any, TaskSamples]) -> list[Entry]:
    """Accuracy of a checkpoint and a second one on the samples of every task that both were measured on.

    One entry per group, then per task; tasks are known by what must be equal. Each task is resampled by itself; the
    mean of a group is over tasks or samples as lm-eval has it.
    """
    entries: dict[Any, Entry] = {}
    draws: dict[Any, Floats] = {}
    for key in (key for key in first if key in second):
        left, right = first[key].samples, second[key].samples
        pairs = [(left[document], right[document]) for document in left if document in right]
        alone = len(left) + len(right) - 2 * len(pairs)
        pairs = [pair for pair in pairs if all(sample.get("acc") is not None for sample in pair)]
        note = f"{alone} samples stand in one of the two files only and are left out" if alone else None
        entries[key] = Entry(first[key].name, "acc", len(pairs), note=note)
        if pairs:
            before, after = np.array([[one["acc"], other["acc"]] for one, other in pairs], dtype=np.float64).T
            draws[key] = resampled_means(after - before, seed=SEED + len(draws))
            means = float(before.mean()), float(after.mean())
            entries[key] = entries[key].compared(*means, draws[key], flips(pairs))
    means_of_groups = []
    for measure, group in {whole: group for task in first.values() for whole, group in task.groups.items()}.items():
        keys = [key for key, task in first.items() if measure in task.groups]
        if len(keys) > 1 and group.size and all(key in draws for key in keys):
            part = "" if len(keys) == group.size else f" of {len(keys)} of {group.size} tasks"
            whole = f"{title_of(measure)} mean{part}"
            parts = [(entries[key], draws[key]) for key in keys]
            means_of_groups.append(_mean(whole, parts, group.by_samples))
    return means_of_groups + [e for key, e in entries.items() if first[key].alone or second[key].alone or e.note]


def _mean(name: str, parts: list[tuple[Entry, Floats]], by_samples: bool) -> Entry:
    """Of a group, from the entries and resampled means of its tasks."""
    entries, draws = zip(*parts, strict=True)
    weights = [float(entry.samples) if by_samples else 1.0 for entry in entries]
    sides = [[entry.first for entry in entries], [entry.second for entry in entries]]
    first, second = (float(np.average(side, weights=weights)) for side in sides)
    counts = zip(*(astuple(entry.flips) for entry in entries if entry.flips is not None), strict=True)
    whole = Entry(name, "acc", sum(entry.samples for entry in entries), is_mean=True)
    return whole.compared(first, second, np.average(draws, axis=0, weights=weights), Flips(*map(sum, counts)))


# --- windows of texts -------------------------------------------------------------------------------------------------


def compare_texts(first: list[TextResult], second: list[TextResult]) -> list[Entry]:
    """Loss per token of a checkpoint and a second one on the windows of every text that both were measured on.

    Windows of one text are not quite independent of each other.
    """
    others = {_text(result): result.numbers for result in second}
    entries = []
    for result in first:
        numbers, other = result.numbers, others.get(_text(result))
        if other is None or not numbers.window_nll or len(numbers.window_nll) != len(other.window_nll):
            continue
        # predicted tokens that count in each window, as sppctl.evaluate.perplexity.scored_tokens has them
        whole = numbers.seq_len - 1
        tokens = np.full(len(numbers.window_nll), min(numbers.stride, whole), dtype=np.float64)
        tokens[0] = whole
        sums = np.array([numbers.window_nll, other.window_nll], dtype=np.float64)  # None becomes NaN
        finite = np.isfinite(sums).all(axis=0)
        tokens, sums = tokens[finite], sums[:, finite]
        count = int((~finite).sum())
        note = f"{count} windows have no finite loss and are left out" if count else None
        entry = Entry(result.measure.text, "nll", len(tokens), note=note)
        if len(tokens):
            before, after = (float(losses.sum() / tokens.sum()) for losses in sums)
            entry = entry.compared(before, after, resampled_means(sums[1] - sums[0], tokens))
        entries.append(entry)
    return entries


def _text(result: TextResult) -> tuple[TextMeasure, str | None, str | None]:
    """What must be the same for windows to be the same, and computed alike."""
    return result.measure.windows, result.numbers.documents_hash, result.dtype
