"""Measures, their results, and the results file of a checkpoint.

A measure is a text or a benchmark task with every setting that changes its numbers. Only this module reads and writes
the JSON of results; :mod:`sppctl.evaluate.values` derives numbers from results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from sppctl import console
from sppctl.errors import UserError
from sppctl.files import sealed, strict_json

T = TypeVar("T")
Json = dict[str, Any]
# the groups of a task, the largest first; for each the metrics that lm-eval averages, weighted by samples (True) or
# over tasks. No metric: the plain mean of the accuracies
Rules = dict[str, dict[str, bool]]


def remedy(path: Path) -> str:
    """The fix, for an error, of a damaged file of results."""
    return f"delete it and run {console.command('eval', f'--model={path.stem}', run=path.parents[1])} again"


# --- measures ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextMeasure:
    """Perplexity on a text, and the distance to another model on the same windows."""

    text: str  # name or path
    seq_len: int  # tokens in a window
    stride: int | None = None  # tokens from one window to the next; None: no overlap
    max_tokens: int | None = None
    reference: str | None = None  # fingerprint of the model it is compared with
    content: str | None = None  # hash of the text

    @property
    def windows(self) -> TextMeasure:
        """Without the fields that do not change the perplexity on one version of the text."""
        return replace(self, reference=None, content=None)

    def supersedes(self, other: Measure) -> bool:
        """Whether its result replaces that of another: of a text the latest version and comparison are kept."""
        return isinstance(other, TextMeasure) and self.windows == other.windows


@dataclass(frozen=True)
class TaskMeasure:
    """A benchmark task, or a group of tasks that lm-eval runs as one."""

    task: str  # its name in lm-eval
    num_fewshot: int | None = None  # None: as the task defines it
    limit: int | None = None  # number of documents, from the first
    seed: int | None = 0  # of few-shot sampling and of generation
    group: str | None = None  # for which it is measured
    chat_template: bool = False
    system_prompt: str | None = None
    batch_size: int | None = None  # if configured: it changes the last bits of likelihoods

    @property
    def family(self) -> TaskMeasure:
        """What the tasks of a group that are measured one by one have in common; any other task is its own family."""
        return self if self.group is None else replace(self, task="")

    def supersedes(self, other: Measure) -> bool:
        """Whether its result replaces that of another: the latest batch size is kept."""
        return isinstance(other, TaskMeasure) and replace(self, batch_size=None) == replace(other, batch_size=None)


Measure = TextMeasure | TaskMeasure


# --- results ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextNumbers:
    """The numbers of a text: its perplexity, and the distance to a reference model if there was one."""

    value: float  # exp of the mean negative log-likelihood per predicted token
    nll: float  # that mean, in nats
    stderr: float | None  # standard error of nll over windows; None for a single one
    tokens: int  # predicted
    windows: int
    seq_len: int  # tokens in a window
    stride: int  # tokens from one window to the next
    kl: float | None = None  # mean KL(reference || model) per predicted token, in nats
    kl_stderr: float | None = None  # over windows
    top1_agreement: float | None = None  # share of tokens for which both models predict the same one
    documents_hash: str | None = None  # of the text
    tokens_hash: str | None = None  # of the windows; None: by an earlier version
    window_nll: list[float | None] = field(default_factory=list)  # summed loss of every window in nats, if finite
    compared_with: str | None = None  # the reference model, if it is not the run's dense model


@dataclass(frozen=True)
class TaskScores:
    """The scores of one task."""

    scores: dict[str, float]  # by metric; standard errors as METRIC_stderr
    metric: str | None = None  # the one that tables show
    higher_is_better: bool | None = None  # of that metric, if lm-eval defines it
    version: float | str | None = None
    num_fewshot: int | None = None  # examples that the prompts had
    samples: int | None = None  # documents


@dataclass(frozen=True)
class TaskNumbers:
    """The scores of a task, or of a group that lm-eval ran as one."""

    tasks: dict[str, TaskScores]
    mean: dict[str, float] = field(default_factory=dict)  # lm-eval's of a group that it defines, else the plain mean
    truncated_prompts: int = 0
    sources: Json | None = None  # files and data of the tasks, see :meth:`sppctl.files.sources.Recorded.summary`
    groups: Rules = field(default_factory=dict)  # in which it is averaged
    members: int = 1  # number of tasks of the configured group
    samples_hash: dict[str, str] = field(default_factory=dict)  # of each task's file of samples


@dataclass(frozen=True)
class Result:
    """The result of one measure on one checkpoint, and its provenance."""

    measure: Measure
    numbers: TextNumbers | TaskNumbers
    seconds: float = 0.0
    dtype: str | None = None
    device: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    batch_size: int | str = "auto"  # as configured
    tokenizer: str | None = None
    generation: str | None = None  # hash of how the model generates by default; None: by an earlier version
    command: str | None = None
    weights: str = "dense"  # how they were kept in memory: dense or packed


@dataclass(frozen=True)
class TextResult(Result):
    """The result of a text."""

    measure: TextMeasure
    numbers: TextNumbers


@dataclass(frozen=True)
class TaskResult(Result):
    """The result of a task."""

    measure: TaskMeasure
    numbers: TaskNumbers


AnyResult = TextResult | TaskResult


def missing(
    measures: list[Measure], results: list[AnyResult], has_current_groups: Callable[[TaskResult], bool] = lambda _: True
) -> list[Measure]:
    """The measures without a result; one of a task counts only if ``has_current_groups``."""

    def answers(result: AnyResult, measure: Measure) -> bool:
        if isinstance(result, TaskResult):
            return result.measure == measure and has_current_groups(result)
        # where no comparison is configured, a result with one counts too
        is_plain = isinstance(measure, TextMeasure) and measure.reference is None
        return measure == (replace(result.measure, reference=None) if is_plain else result.measure)

    return [measure for measure in measures if not any(answers(result, measure) for result in results)]


@dataclass
class Results:
    """The results of one checkpoint: the content of ``eval/LABEL.json``."""

    label: str
    checkpoint: str  # its path
    fingerprint: str | None  # of its weights
    sparsity: Json  # summary of its zeros
    results: list[AnyResult] = field(default_factory=list)

    @property
    def texts(self) -> list[TextResult]:
        """The results of texts."""
        return [result for result in self.results if isinstance(result, TextResult)]

    @property
    def tasks(self) -> list[TaskResult]:
        """The results of tasks."""
        return [result for result in self.results if isinstance(result, TaskResult)]

    def add(self, result: AnyResult) -> None:
        """Adds a result in place of those that it supersedes."""
        self.results = [old for old in self.results if not result.measure.supersedes(old.measure)]
        self.results.append(result)

    @classmethod
    def load(cls, path: Path) -> Results | None:
        """The results in a file; None if there is none.

        Raises:
            UserError: it is damaged, or holds the results of another checkpoint.
        """
        if not path.is_file():
            return None
        fix = remedy(path)
        content = sealed.read(path, fix)
        if content.get("label", path.stem) != path.stem:
            raise UserError(f"{path} holds the results of another checkpoint ({content['label']}); {fix}")
        try:
            return cls.from_json(content)
        except KeyError as error:
            raise UserError(f"{path} is damaged (it has no {error.args[0]}); {fix}") from error

    def save(self, path: Path) -> None:
        """Writes the file, sealed."""
        sealed.write(path, self.to_json())

    @classmethod
    def from_json(cls, content: Json) -> Results:
        """The inverse of ``to_json``; KeyError if a key is missing."""
        results = []
        for number, entry in enumerate(content["results"]):
            try:
                results.append(_result(entry))
            except KeyError as error:
                raise KeyError(f"results[{number}]: {error.args[0]}") from error
        return _record(cls, content | {"results": results})

    def to_json(self) -> Json:
        """The content of the file."""
        content: Json = strict_json.finite(asdict(self))
        return content | {"results": [_entry(**result) for result in content["results"]]}


# --- JSON -------------------------------------------------------------------------------------------------------------


def _entry(measure: Json, numbers: Json, **provenance: Any) -> Json:
    """A result as it is written to the file."""
    if "text" in measure:
        return {"settings": {"kind": "perplexity"} | measure, "metrics": numbers} | provenance
    tasks = {task: values.pop("scores") | values for task, values in numbers["tasks"].items()}
    optional = ("group", "chat_template", "system_prompt", "batch_size")  # left out where they are not set
    content = {key: value for key, value in measure.items() if key not in optional or value not in (None, False)}
    settings = {"kind": "tasks", "tasks": content.pop("task")} | content
    return {"settings": settings, "metrics": numbers | {"tasks": tasks}} | provenance


def _result(entry: Json) -> AnyResult:
    settings, metrics = entry["settings"], entry["metrics"]
    if settings["kind"] == "perplexity":
        infinite = {key: math.inf for key in ("value", "nll") if metrics[key] is None}  # null in JSON
        numbers = _record(TextNumbers, metrics | infinite)
        return _record(TextResult, entry | {"measure": _record(TextMeasure, settings), "numbers": numbers})
    field_names = {item.name for item in fields(TaskScores)}
    tasks = {}
    for task, values in metrics["tasks"].items():
        scores = {name: value for name, value in values.items() if name not in field_names}
        tasks[task] = _record(TaskScores, values | {"scores": scores})
    measure, numbers = settings | {"task": settings["tasks"]}, metrics | {"tasks": tasks}
    parts = {"measure": _record(TaskMeasure, measure), "numbers": _record(TaskNumbers, numbers)}
    return _record(TaskResult, entry | parts)


def _record(kind: type[T], content: Mapping[str, Any]) -> T:
    """A dataclass from a mapping that may hold more keys; KeyError if a field without a default is missing."""
    arguments = {}
    for item in fields(kind):  # type: ignore[arg-type]
        if item.name in content:
            arguments[item.name] = content[item.name]
        elif item.default is MISSING and item.default_factory is MISSING:
            raise KeyError(item.name)
    return kind(**arguments)
