"""Whether one checkpoint is better than another on the same samples, beyond the uncertainty of sampling.

The paired bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993; for language processing Koehn,
EMNLP 2004) resamples the differences of single samples, so that the difficulty of a sample, which is the same for both,
cancels. The share of flipped answers is given too, since a small difference in accuracy can hide many.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sppctl.evaluate.results import TaskMeasure, TaskNumbers, TaskResult, TextMeasure, TextResult
from sppctl.evaluate.values import SHOWN, draws_examples, text_quantity, title_of

RESAMPLES = 10_000
SEED = 0
DRAWN = 1 << 22  # counts to draw at a time: 32 MB
ROUNDING = 1e-12  # two means of the same numbers may differ by this

Floats = NDArray[np.float64]
Sample = dict[str, Any]  # one line of eval/LABEL.samples/TASK.jsonl
# must be equal for samples to be compared: the task with its settings, the dtype, and the content of the task's files
Measured = tuple[TaskMeasure, str | None, str | None]


@dataclass(frozen=True)
class Paired:
    """The mean of paired differences."""

    difference: float  # mean of second - first
    low: float  # 2.5 % quantile of the resampled means
    high: float  # 97.5 % quantile
    p: float  # two-sided: how often a resampled mean, moved to centre on zero, is at least as far from zero


@dataclass(frozen=True)
class Flips:
    """How many samples two checkpoints answer differently, by whether the answers are correct."""

    answers: int
    flipped: int
    correct_to_wrong: int
    wrong_to_correct: int
    wrong_to_wrong: int


@dataclass(frozen=True)
class Entry:
    """One text, task or group on two checkpoints."""

    name: str  # with its limits
    measure: str  # acc, or nll in nats
    samples: int  # that both have
    first: float | None = None  # mean over these samples; None without any
    second: float | None = None
    paired: Paired | None = None
    flips: Flips | None = None  # of tasks
    note: str | None = None  # samples or windows that were left out
    is_mean: bool = False  # of a group

    def compared(self, first: float, second: float, means: Floats, flips: Flips | None = None) -> Entry:
        """This entry with both means, and the interval and p value of their difference, from its resampled means."""
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
    """(RESAMPLES,) means of ``samples`` differences that are drawn with replacement.

    Samples with the same difference and weight are interchangeable, so only how often each kind is drawn matters: a
    multinomial distribution, of three kinds for accuracies, whatever the number of samples.

    Args:
        differences: (samples,) one per sample, or its sum over ``weights`` tokens.
        weights: (samples,) None: all are equal. A mean is the sum of differences over the sum of weights.
        seed: of the random generator.
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

    by_samples: frozenset[bool]  # whether its mean is over samples, or over tasks; several if both give the same mean
    size: int  # its number of tasks; 0 if unknown: a subgroup of a group of which not all tasks are measured


@dataclass(frozen=True)
class TaskSamples:
    """The samples of one task on one checkpoint."""

    name: str  # with its limits
    groups: dict[TaskMeasure, Group]  # in which it is averaged, by their name and settings
    has_row: bool  # whether the task has its own row, unlike the tasks of a large group
    samples: dict[tuple[str, int], Sample]  # by the document's hash, and the number of earlier samples with that hash


def read_samples(folder: Path, results: list[TaskResult]) -> tuple[dict[Measured, TaskSamples], list[str]]:
    """The samples in ``eval/LABEL.samples`` of the results of one checkpoint, and a note for each other file.

    Results record the hashes of their files of samples. Files of other evaluations are left out.
    """
    contents = {path: path.read_text() for path in sorted(folder.glob("*.jsonl"))}
    files = {hashlib.sha256(text.encode()).hexdigest()[:16]: path for path, text in contents.items()}
    by_task: dict[Measured, TaskSamples] = {}
    for result in results:
        # means of one group with different settings are different measures
        settings = replace(result.measure, task="", batch_size=None)
        groups = {replace(settings, group=name): group for name, group in _groups(result, results).items()}
        members = result.numbers.members if result.numbers.groups else len(result.numbers.tasks)
        for task, digest in result.numbers.samples_hash.items():
            if digest in files:
                key = _comparable(result, task)
                previous = by_task.get(key, TaskSamples("", {}, False, {}))  # as a single task, or in another group
                samples = by_document(json.loads(line) for line in contents[files[digest]].splitlines())
                has_row = previous.has_row or members <= SHOWN
                by_task[key] = TaskSamples(title_of(key[0]), previous.groups | groups, has_row, samples)
    used = {digest for result in results for digest in result.numbers.samples_hash.values()}
    unused = [path for digest, path in files.items() if digest not in used]
    return by_task, [f"{path} belongs to another evaluation and is left out" for path in unused]


def _comparable(result: TaskResult, task: str) -> Measured:
    """The measure without its group, with the actual number of examples, and with a seed only if any were drawn."""
    measure = result.measure
    count = result.numbers.tasks[task].num_fewshot if task in result.numbers.tasks else None
    seed = measure.seed if draws_examples(result) else None
    shots = measure.num_fewshot if count is None else count
    files = (result.numbers.sources or {}).get("digest")
    return replace(measure, task=task, group=None, num_fewshot=shots, seed=seed), result.dtype, files


def _groups(result: TaskResult, results: list[TaskResult]) -> dict[str, Group]:
    """The groups of a result's tasks, the configured one first."""
    numbers = result.numbers
    if not numbers.groups:  # a single task, or a group that lm-eval ran as one
        size = len(numbers.tasks)
        return {result.measure.task: Group(_weightings(numbers), size)} if size > 1 else {}
    family = [member.numbers.groups for member in results if member.measure.family == result.measure.family]
    is_complete = len(family) == numbers.members
    sizes = {part: sum(part in groups for groups in family) if is_complete else 0 for part in numbers.groups}
    sizes[next(iter(numbers.groups))] = numbers.members
    return {name: Group(frozenset({bool(rules.get("acc"))}), sizes[name]) for name, rules in numbers.groups.items()}


def _weightings(numbers: TaskNumbers) -> frozenset[bool]:
    """The ways to average the tasks, over samples (True) or over tasks, that give the recorded mean accuracy.

    lm-eval's definition of a group that it ran as one is not recorded. It may also weight subgroups, or average the
    answers of another filter than those of the samples; then there is none.
    """
    recorded, tasks = numbers.mean.get("acc"), numbers.tasks.values()
    accuracies = [scores.scores["acc"] for scores in tasks if "acc" in scores.scores]
    if recorded is None or len(accuracies) < len(tasks):
        return frozenset()
    weights = {False: [1] * len(tasks), True: [scores.samples or 0 for scores in tasks]}
    return frozenset(
        by_samples
        for by_samples, own in weights.items()
        if sum(own) and math.isclose(np.average(accuracies, weights=own), recorded, abs_tol=ROUNDING)
    )


def by_document(samples: Iterable[Sample]) -> dict[tuple[str, int], Sample]:
    """Samples by the keys of :class:`TaskSamples`."""
    seen: Counter[str] = Counter()
    numbered = {}
    for sample in samples:
        numbered[sample["hash"], seen[sample["hash"]]] = sample
        seen[sample["hash"]] += 1
    return numbered


def flips(pairs: Sequence[tuple[Sample, Sample]]) -> Flips:
    """Counts the samples that two checkpoints answer differently."""
    answered = [pair for pair in pairs if all(sample.get("chosen") is not None for sample in pair)]
    changed = [pair for pair in answered if pair[0]["chosen"] != pair[1]["chosen"]]
    verdicts = Counter((bool(first["acc"]), bool(second["acc"])) for first, second in changed)
    return Flips(len(answered), len(changed), verdicts[True, False], verdicts[False, True], verdicts[False, False])


def compare_tasks(first: Mapping[Any, TaskSamples], second: Mapping[Any, TaskSamples]) -> list[Entry]:
    """Accuracies of two checkpoints on the samples of every task that both were measured on, by comparable measure.

    One entry per group, then per task. Each task is resampled separately; the mean of a group is over tasks or samples
    as in lm-eval. A group whose mean is neither has no entry.
    """
    entries: dict[Any, Entry] = {}
    draws: dict[Any, Floats] = {}
    for key in (key for key in first if key in second):
        first_samples, second_samples = first[key].samples, second[key].samples
        common = [document for document in first_samples if document in second_samples]
        pairs = [(first_samples[document], second_samples[document]) for document in common]
        unpaired = len(first_samples) + len(second_samples) - 2 * len(pairs)
        pairs = [pair for pair in pairs if all(sample.get("acc") is not None for sample in pair)]
        note = f"{unpaired} samples are in only one of the two files and are left out" if unpaired else None
        entries[key] = Entry(first[key].name, "acc", len(pairs), note=note)
        if pairs:
            accuracies = np.array([[sample["acc"] for sample in pair] for pair in pairs], dtype=np.float64).T
            draws[key] = resampled_means(accuracies[1] - accuracies[0], seed=SEED + len(draws))
            means = float(accuracies[0].mean()), float(accuracies[1].mean())
            entries[key] = entries[key].compared(*means, draws[key], flips(pairs))
    means_of_groups = []
    for measure, group in {key: group for task in first.values() for key, group in task.groups.items()}.items():
        keys = [key for key, task in first.items() if measure in task.groups]
        same = [task.groups[measure] for task in (*first.values(), *second.values()) if measure in task.groups]
        weightings = frozenset.intersection(*(group.by_samples for group in same))
        if len(keys) > 1 and group.size and weightings and all(key in draws for key in keys):
            extent = "" if len(keys) == group.size else f" of {len(keys)} of {group.size} tasks"
            name = f"{title_of(measure)} mean{extent}"
            tasks = [(entries[key], draws[key]) for key in keys]
            means_of_groups.append(_mean(name, tasks, by_samples=True in weightings))
    return means_of_groups + [e for key, e in entries.items() if first[key].has_row or second[key].has_row or e.note]


def _mean(name: str, tasks: list[tuple[Entry, Floats]], by_samples: bool) -> Entry:
    """The mean of a group, from the entries and resampled means of its tasks."""
    entries, draws = zip(*tasks, strict=True)
    weights = [float(entry.samples) if by_samples else 1.0 for entry in entries]
    sides = [[entry.first for entry in entries], [entry.second for entry in entries]]
    first, second = (float(np.average(side, weights=weights)) for side in sides)
    counts = zip(*(astuple(entry.flips) for entry in entries if entry.flips is not None), strict=True)
    mean = Entry(name, "acc", sum(entry.samples for entry in entries), is_mean=True)
    return mean.compared(first, second, np.average(draws, axis=0, weights=weights), Flips(*map(sum, counts)))


# --- windows of texts -------------------------------------------------------------------------------------------------


def compare_texts(first: list[TextResult], second: list[TextResult]) -> list[Entry]:
    """Losses per token of two checkpoints on the windows of every text that both were measured on.

    The windows of one text are not fully independent.
    """
    second_numbers = {_comparable_text(result): result.numbers for result in second}
    entries = []
    for result in first:
        numbers, partner = result.numbers, second_numbers.get(_comparable_text(result))
        if partner is None or not numbers.window_nll or len(numbers.window_nll) != len(partner.window_nll):
            continue
        # scored tokens of each window, as in sppctl.evaluate.perplexity.scored_tokens, which would import torch
        predicted = numbers.seq_len - 1
        tokens = np.full(len(numbers.window_nll), min(numbers.stride, predicted), dtype=np.float64)
        tokens[0] = predicted
        sums = np.array([numbers.window_nll, partner.window_nll], dtype=np.float64)  # None becomes NaN
        finite = np.isfinite(sums).all(axis=0)
        tokens, sums = tokens[finite], sums[:, finite]
        count = int((~finite).sum())
        note = f"{count} windows have no finite loss and are left out" if count else None
        entry = Entry(text_quantity(result).scope, "nll", len(tokens), note=note)
        if len(tokens):
            means = [float(losses.sum() / tokens.sum()) for losses in sums]
            entry = entry.compared(means[0], means[1], resampled_means(sums[1] - sums[0], tokens))
        entries.append(entry)
    return entries


def _comparable_text(result: TextResult) -> tuple[TextMeasure, *tuple[str | None, ...]]:
    """What must be equal for windows to be compared: text, settings, tokens and dtype."""
    return result.measure.windows, result.numbers.documents_hash, result.numbers.tokens_hash, result.dtype
