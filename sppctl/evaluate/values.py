"""Results -> numbers, each with its quantity; only renderers make names of quantities.

Two quantities are equal if their numbers may be compared: perplexities on the same windows, accuracies on the same task
with the same number of examples. Settings that change a number but are rarely of interest (the seed of few-shot
examples, the version of a text, the tokens that a tokenizer makes of it, the dense model of a divergence, the system
prompt, the dtype) are kept apart as circumstances. They become a part of the quantity only where results of one run
differ in them (:func:`distinguish`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from sppctl.evaluate.results import AnyResult, Json, TaskMeasure, TaskResult, TextResult

SHOWN = 10  # largest group whose tasks tables list; of larger groups they list the parts, if any
# circumstances, and the text that is added to names where they differ
CIRCUMSTANCES = {
    "text": "text {:.8}",
    "tokens": "tokens {:.8}",
    "reference": "dense model {:.8}",
    "seed": "seed {}",
    "tasks": "task files {:.8}",
    "prompt": "system prompt {:.8}",
    "batch": "batch size {}",
    "dtype": "computed in {}",
}
OF_CONTENT = ("text", "tokens", "tasks", "prompt")  # what is measured: numbers of different contents are never compared
SHARES = {"exact match", "quasi exact match", "prefix exact match", "quasi prefix exact match", "em", "f1"}


# --- quantities -------------------------------------------------------------------------------------------------------


class Kind(StrEnum):
    """The kind of a number, which determines how it is written, drawn and compared."""

    PERPLEXITY = "perplexity"
    DIVERGENCE = "kl"
    AGREEMENT = "agreement"
    ACCURACY = "accuracy"
    OTHER = "other"


@dataclass(frozen=True)
class Metric:
    """What is measured, such as perplexity or acc."""

    name: str  # of its column; for a task lm-eval's name of the metric
    title: str  # in full; empty for acc, the usual one
    kind: Kind
    unit: str = ""
    higher_is_better: bool | None = field(default=None, compare=False)  # None where lm-eval does not define it

    @property
    def is_share(self) -> bool:
        """Whether it is a share of 1, written in percent."""
        return self.kind in (Kind.ACCURACY, Kind.AGREEMENT)

    @property
    def is_of_task(self) -> bool:
        """Whether it is a metric of lm-eval."""
        return self.kind in (Kind.ACCURACY, Kind.OTHER)

    @classmethod
    def of_task(cls, name: str, higher_is_better: bool | None = None) -> Metric:
        """A metric of lm-eval: accuracies, exact matches, F1 and pass rates are shares of the samples."""
        text = name.replace("_", " ")
        is_share = bool({"acc", "accuracy"} & set(text.split())) or text in SHARES or text.startswith("pass@")
        title = "" if name == "acc" else text + (" (lm-eval)" if name.endswith("perplexity") else "")
        return cls(name, title, Kind.ACCURACY if is_share else Kind.OTHER, "", higher_is_better)


PERPLEXITY = Metric("ppl", "ppl", Kind.PERPLEXITY, "perplexity", higher_is_better=False)
DIVERGENCE = Metric("KL", "KL(dense || model)", Kind.DIVERGENCE, "nats per token", higher_is_better=False)
AGREEMENT = Metric("top-1", "top-1 agreement", Kind.AGREEMENT, higher_is_better=True)
ACC = Metric.of_task("acc", higher_is_better=True)


@dataclass(frozen=True)
class Quantity:
    """A metric on a text, a task, a group of tasks or a part of a group."""

    metric: Metric
    title: str  # the text, the group, or a task by itself, with every setting that limits it
    part: str | None = None  # of the group: a task, or a part of a large group
    mean: str | None = None  # of the group: the tasks that are averaged, as text
    details: tuple[str, ...] = ()  # circumstances in which numbers of the same name differ

    @property
    def scope(self) -> str:
        """The text or group with its limits, which columns share; empty for a single task."""
        if not self.metric.is_of_task:
            return ", ".join([self.title, *self.details])
        return self.title if self.part or self.mean else ""

    @property
    def name(self) -> str:
        """The name of a column below the scope."""
        return self._of_task(self.part or self.mean or self.title) if self.metric.is_of_task else self.metric.name

    @property
    def label(self) -> str:
        """The full name."""
        if not self.metric.is_of_task:
            return f"{self.metric.title} {self.scope}"
        return self._of_task(f"{self.part} ({self.title})" if self.part else f"{self.title} {self.mean or ''}".rstrip())

    def _of_task(self, name: str) -> str:
        return ", ".join([f"{name} {self.metric.title}".rstrip(), *self.details])


@dataclass(frozen=True)
class Value:
    """One number of one checkpoint."""

    quantity: Quantity
    number: float | None  # None if lm-eval returned none, or if it is not finite
    stderr: float | None = None  # for a perplexity that of the mean loss, in nats
    norm: float | None = None  # acc_norm, where the number is an accuracy
    circumstances: Mapping[str, str] = field(default_factory=dict)  # by the keys of CIRCUMSTANCES
    limit: int | None = None  # examples of each task, where they are not all

    @property
    def dtype(self) -> str | None:
        """The dtype of the computation, several for some means; None if it is not recorded."""
        return self.circumstances.get("dtype")

    def to_json(self) -> Json:
        """The content of reports."""
        named = {"name": self.quantity.label, "kind": self.quantity.metric.kind, "value": self.number}
        return named | {"norm": self.norm, "stderr": self.stderr, "dtype": self.dtype}


# --- results -> values ------------------------------------------------------------------------------------------------


def values_of(results: Iterable[AnyResult]) -> Iterator[Value]:
    """The numbers of a checkpoint that tables show: of texts, then of tasks with the means of their groups."""
    tasks = []
    for result in results:
        if isinstance(result, TextResult):
            yield from _of_text(result)
        else:
            tasks.append(result)
    for family in families(tasks):
        yield from _of_family(family)


def families(results: list[TaskResult]) -> list[list[TaskResult]]:
    """Results by family: the tasks of a group that were measured one by one are one, any other result is its own."""
    by_family: dict[TaskMeasure, list[TaskResult]] = {}
    for result in results:
        by_family.setdefault(result.measure.family, []).append(result)
    return list(by_family.values())


def text_quantity(result: TextResult) -> Quantity:
    """The perplexity on a text; with ``max_tokens``, its name says how many tokens the windows cover."""
    measure, numbers = result.measure, result.numbers
    stride = f" stride {measure.stride}" if measure.stride else ""
    covered = (numbers.windows - 1) * numbers.stride + numbers.seq_len
    cut = "" if measure.max_tokens is None else f", first {covered} tokens"
    return Quantity(PERPLEXITY, f"{measure.text} @{measure.seq_len}{stride}{cut}")


def _of_text(result: TextResult) -> Iterator[Value]:
    numbers, quantity = result.numbers, text_quantity(result)
    circumstances = {"text": numbers.documents_hash, "tokens": numbers.tokens_hash, "dtype": result.dtype}
    finite = numbers.value if math.isfinite(numbers.value) else None
    yield Value(quantity, finite, numbers.stderr, circumstances=_without_none(circumstances))
    if numbers.kl is not None:
        # the reference changes no perplexity
        compared = _without_none(circumstances | {"reference": result.measure.reference})
        dense = "" if numbers.compared_with is None else f" (dense: {numbers.compared_with})"
        title = quantity.title + dense
        yield Value(Quantity(DIVERGENCE, title), numbers.kl, numbers.kl_stderr, circumstances=compared)
        yield Value(Quantity(AGREEMENT, title), numbers.top1_agreement, circumstances=compared)


def _without_none(values: Mapping[str, str | None]) -> dict[str, str]:
    return {key: value for key, value in values.items() if value is not None}


def title_of(measure: TaskMeasure) -> str:
    """The group, or the single task, with the settings that its name shows."""
    parts = [measure.group or measure.task]
    parts += [f"{measure.num_fewshot}-shot"] if measure.num_fewshot else []
    parts += ["chat"] if measure.chat_template else []
    parts += ["system prompt"] if measure.system_prompt else []
    return " ".join(parts) + (f", limit {measure.limit}" if measure.limit is not None else "")


def family_title(family: list[TaskResult]) -> str:
    """The title of results with the settings that took effect.

    A task may fix its number of examples, and a limit above the size of every task cuts nothing.
    """
    measure = family[0].measure
    tasks = [scores for result in family for scores in result.numbers.tasks.values()]
    shots = {scores.num_fewshot for scores in tasks}
    num_fewshot = shots.pop() if len(shots) == 1 and None not in shots else measure.num_fewshot
    return title_of(replace(measure, num_fewshot=num_fewshot, limit=_limit(family)))


def _limit(results: list[TaskResult]) -> int | None:
    """The limit of results, None if it cuts no task."""
    limit = results[0].measure.limit
    samples = [scores.samples for result in results for scores in result.numbers.tasks.values()]
    return None if limit is None or all((number or limit) < limit for number in samples) else limit


def _of_family(family: list[TaskResult]) -> Iterator[Value]:
    """A single task; or the mean of a group, then its tasks, or the parts of a large group."""
    measure, numbers = family[0].measure, family[0].numbers
    title, tasks = family_title(family), [(task, result) for result in family for task in result.numbers.tasks]
    if measure.group is None and list(numbers.tasks) == [measure.task]:
        yield _of_task(title, None, measure.task, family[0])
        return
    if measure.group is None:  # lm-eval ran it as one
        members, mean, mean_name = len(tasks), numbers.mean, "mean"
    else:
        members, mean = numbers.members, group_mean(family, measure.group)
        mean_name = "mean" if len(family) == members else f"mean of {len(family)} of {members} tasks"
    if mean:  # the tasks have a metric in common
        yield _mean(Quantity(ACC, title, mean=mean_name), mean, family)
    if members <= SHOWN:
        for task, result in tasks:
            yield _of_task(title, task, task, result)
        return
    if measure.group is not None and len(family) < members:  # nothing says how many tasks a part should have
        return
    for part in dict.fromkeys(part for result in family for part in list(result.numbers.groups)[1:]):
        members_of_part = [result for result in family if part in result.numbers.groups]
        yield _mean(Quantity(ACC, title, part), group_mean(family, part), members_of_part)


def _of_task(title: str, part: str | None, task: str, result: TaskResult) -> Value:
    numbers = result.numbers.tasks[task]
    name, scores = numbers.metric or headline(numbers.scores) or "acc", numbers.scores
    quantity = Quantity(Metric.of_task(name, numbers.higher_is_better), title, part)
    error, norm = scores.get(f"{name}_stderr"), scores.get("acc_norm")
    return Value(quantity, scores.get(name), error, norm, _circumstances([result]), _limit([result]))


def _mean(quantity: Quantity, mean: Mapping[str, float], results: list[TaskResult]) -> Value:
    """The mean of these results, with lm-eval's standard error or else that of a mean of independent means."""
    name = headline(mean) or "acc"
    error = mean.get(f"{name}_stderr")
    if error is None:
        tasks = [scores.scores for result in results for scores in result.numbers.tasks.values()]
        errors = [scores[f"{name}_stderr"] for scores in tasks if f"{name}_stderr" in scores]
        error = math.hypot(*errors) / len(errors) if errors and len(errors) == len(tasks) else None
    quantity = replace(quantity, metric=Metric.of_task(name))
    return Value(quantity, mean.get(name), error, mean.get("acc_norm"), _circumstances(results), _limit(results))


def _circumstances(results: list[TaskResult]) -> dict[str, str]:
    """The circumstances of a number that is computed from these results."""
    measure = results[0].measure
    files = [result.numbers.sources["digest"] for result in results if result.numbers.sources is not None]
    if len(files) > 1:
        files = [hashlib.sha256("".join(sorted(files)).encode()).hexdigest()]
    prompt, dtypes = measure.system_prompt, {result.dtype for result in results if result.dtype is not None}
    return _without_none(
        {
            "seed": str(measure.seed) if any(draws_examples(result) for result in results) else None,
            "prompt": None if prompt is None else hashlib.sha256(prompt.encode()).hexdigest(),
            "tasks": files[0] if files else None,
            "batch": None if measure.batch_size is None else str(measure.batch_size),
            "dtype": " and ".join(sorted(dtypes)) or None,
        }
    )


def draws_examples(result: TaskResult) -> bool:
    """Whether the tasks of a result have few-shot examples; without them its seed has no effect."""
    return any([result.measure.num_fewshot, *(scores.num_fewshot for scores in result.numbers.tasks.values())])


def headline(scores: Mapping[str, float]) -> str | None:
    """The metric that tables show: acc, or the first."""
    return "acc" if "acc" in scores else next(iter(scores), None)


# --- means ------------------------------------------------------------------------------------------------------------


def plain_mean(tasks: list[dict[str, Any]]) -> dict[str, float]:
    """The mean over tasks of each accuracy that all of them have."""
    metrics = {metric for scores in tasks for metric in scores if metric.startswith("acc")}
    return {
        metric: sum(scores[metric] for scores in tasks) / len(tasks)
        for metric in sorted(metrics)
        if all(metric in scores for scores in tasks) and not metric.endswith("stderr")
    }


def group_mean(family: list[TaskResult], group: str) -> dict[str, float]:
    """The mean of a group over its measured tasks; with the standard error where lm-eval defines one."""
    members = [result.numbers for result in family if group in result.numbers.groups]
    tasks = [scores for numbers in members for scores in numbers.tasks.values()]
    rules = members[0].groups[group]
    if not rules:
        return plain_mean([scores.scores for scores in tasks])
    mean = {}
    for metric, by_samples in rules.items():
        scored = [task for task in tasks if metric in task.scores]
        if not scored:
            continue
        sizes = [task.samples or 0 for task in scored]
        weights = sizes if by_samples else [1] * len(scored)
        pairs = zip(weights, scored, strict=True)
        mean[metric] = sum(weight * task.scores[metric] for weight, task in pairs) / sum(weights)
        errors = [task.scores[f"{metric}_stderr"] for task in scored if f"{metric}_stderr" in task.scores]
        if len(errors) == len(scored):
            # as in lm-eval: of a mean of independent means, or from the pooled variance over all samples
            mean[f"{metric}_stderr"] = math.sqrt(sum(error**2 for error in errors)) / len(errors)
            if by_samples:
                pooled = sum((size - 1) * size * error**2 for error, size in zip(errors, sizes, strict=True))
                mean[f"{metric}_stderr"] = math.sqrt(pooled / (sum(sizes) - len(sizes)) / sum(sizes))
    return mean


# --- distinct measures get distinct names -----------------------------------------------------------------------------


def distinguish(
    values: Mapping[str, Iterable[Value]], seed: int | None, keys: Collection[str] = CIRCUMSTANCES.keys()
) -> tuple[dict[str, dict[Quantity, Value]], list[str]]:
    """The values of checkpoints by quantity, so that equal quantities may be compared.

    Circumstances that differ become details of the quantity, except for the seed of the run; only those of ``keys``.

    Returns:
        The values by checkpoint and quantity; and a note for each quantity whose circumstances differ.
    """
    listed = [(checkpoint, value) for checkpoint, checkpoint_values in values.items() for value in checkpoint_values]
    by_quantity: dict[Quantity, list[Mapping[str, str]]] = {}
    for _, value in listed:
        by_quantity.setdefault(value.quantity, []).append(value.circumstances)
    differing = {
        quantity: [key for key in keys if len({entry.get(key) for entry in circumstances}) > 1]
        for quantity, circumstances in by_quantity.items()
    }
    named: dict[str, dict[Quantity, Value]] = {checkpoint: {} for checkpoint in values}
    differences: dict[Quantity, list[str]] = {}
    for checkpoint, value in listed:
        circumstances, apart = value.circumstances, differing[value.quantity]
        details = {key: CIRCUMSTANCES[key].format(circumstances.get(key, "unknown")) for key in apart}
        if details:
            differences.setdefault(value.quantity, []).append(f"{checkpoint} {' '.join(details.values())}")
        unusual = [key for key in apart if key in circumstances and (key, circumstances[key]) != ("seed", str(seed))]
        quantity = replace(value.quantity, details=(*value.quantity.details, *(details[key] for key in unusual)))
        named[checkpoint][quantity] = replace(value, quantity=quantity)
    notes = [
        f"{quantity.label}: measured differently; only equal ones are compared ({', '.join(texts)})"
        for quantity, texts in differences.items()
    ]
    return named, notes
