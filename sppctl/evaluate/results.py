"""What is measured on a checkpoint, what came of it, and the results file in which it is found again.

A measure is a text or a benchmark task with every setting that changes its numbers. The JSON of results is read and
written here alone; :mod:`sppctl.evaluate.values` makes numbers of results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from sppctl.errors import UserError
from sppctl.files import sealed, strict_json

T = TypeVar("T")
Json = dict[str, Any]
# groups of a task, the widest first; for each the metrics that lm-eval averages, and whether by samples (True) or by
# tasks. No metric: the plain mean of the accuracies
Rules = dict[str, dict[str, bool]]
REMEDY = "delete it and run sppctl eval again"


# --- measures ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextMeasure:
    """Perplexity on a text, and the distance to another model on the same windows."""

    text: str  # name or path
    seq_len: int  # tokens in a window
    stride: int | None = None  # tokens from one window to the next; None: no overlap
    max_tokens: int | None = None
    reference: str | None = None  # fingerprint of the model that is compared with
    content: str | None = None  # identifies what the text contains

    @property
    def windows(self) -> TextMeasure:
        """Without what changes no perplexity of one version of the text."""
        return replace(self, reference=None, content=None)

    def supersedes(self, other: Measure) -> bool:
        """Whether its result replaces another one: of a text, the last version and the last comparison are kept."""
        return isinstance(other, TextMeasure) and self.windows == other.windows


@dataclass(frozen=True)
class TaskMeasure:
    """A benchmark task, or a group of tasks that lm-eval runs as one."""

    task: str  # its name in lm-eval
    num_fewshot: int | None = None  # None: as the task has it
    limit: int | None = None  # first documents
    seed: int | None = 0  # of few-shot sampling and of generation
    group: str | None = None  # that it is measured for
    chat_template: bool = False
    system_prompt: str | None = None
    batch_size: int | None = None  # if it is fixed: another one changes the last bits of likelihoods

    @property
    def family(self) -> TaskMeasure:
        """What the tasks of a group have in common that are measured one by one; of any other task the task itself."""
        return self if self.group is None else replace(self, task="")

    def supersedes(self, other: Measure) -> bool:
        """Whether its result replaces another one: the last batch size is kept."""
        return isinstance(other, TaskMeasure) and replace(self, batch_size=None) == replace(other, batch_size=None)


Measure = TextMeasure | TaskMeasure


# --- results ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextNumbers:
    """What came of a text: its perplexity, and the distance to a reference model if there was one."""

    value: float  # exp of the mean negative log-likelihood per predicted token
    nll: float  # that mean, in nats
    stderr: float | None  # standard error of nll over windows; None for a single one
    tokens: int  # predicted ones
    windows: int
    seq_len: int  # tokens in a window
    stride: int  # tokens from one window to the next
    kl: float | None = None  # mean KL(reference || model) per predicted token, in nats
    kl_stderr: float | None = None  # over windows
    top1_agreement: float | None = None  # share of predicted tokens for which both models find the same one likeliest
    documents_hash: str | None = None  # of the text
    window_nll: list[float | None] = field(default_factory=list)  # summed loss of every window in nats, if it is finite
    compared_with: str | None = None  # if it is not the run's dense model


@dataclass(frozen=True)
class TaskScores:
    """What came of one task."""

    scores: dict[str, float]  # by metric; standard errors as METRIC_stderr
    metric: str | None = None  # that tables show
    higher_is_better: bool | None = None  # of that metric, if lm-eval has it
    version: float | str | None = None
    num_fewshot: int | None = None  # that the prompts had
    samples: int | None = None  # documents


@dataclass(frozen=True)
class TaskNumbers:
    """What came of a task, or of a group that lm-eval ran as one."""

    tasks: dict[str, TaskScores]
    mean: dict[str, float] = field(default_factory=dict)  # lm-eval's own of a group that it defines, else the plain one
    truncated_prompts: int = 0
    sources: Json | None = None  # what it was made from, see :meth:`sppctl.files.sources.Recorded.summary`
    groups: Rules = field(default_factory=dict)  # that it is averaged in
    members: int = 1  # tasks of the group that was asked for
    samples_hash: dict[str, str] = field(default_factory=dict)  # of each task's file of samples


@dataclass(frozen=True)
class Result:
    """One measure on one checkpoint, and how it was made."""

    measure: Measure
    numbers: TextNumbers | TaskNumbers
    seconds: float = 0.0
    dtype: str | None = None
    device: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    batch_size: int | str = "auto"  # as configured
    tokenizer: str | None = None
    command: str | None = None


@dataclass(frozen=True)
class TextResult(Result):
    """Of a text."""

    measure: TextMeasure
    numbers: TextNumbers


@dataclass(frozen=True)
class TaskResult(Result):
    """Of a task."""

    measure: TaskMeasure
    numbers: TaskNumbers


AnyResult = TextResult | TaskResult


def unanswered(
    wanted: list[Measure], known: list[AnyResult], is_placed: Callable[[TaskResult], bool] = lambda _: True
) -> list[Measure]:
    """The measures that no known result answers; ``is_placed``: whether the task is in the groups of its result now."""

    def answers(result: AnyResult, measure: Measure) -> bool:
        if isinstance(result, TaskResult):
            return result.measure == measure and is_placed(result)
        # one that was compared serves where no comparison is asked for
        is_alone = isinstance(measure, TextMeasure) and measure.reference is None
        return measure == (replace(result.measure, reference=None) if is_alone else result.measure)

    return [measure for measure in wanted if not any(answers(result, measure) for result in known)]


@dataclass
class Results:
    """The results of one checkpoint: the content of ``eval/LABEL.json``."""

    label: str
    checkpoint: str  # where it is
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
        content = sealed.read(path, REMEDY)
        if content.get("label", path.stem) != path.stem:
            raise UserError(f"{path} holds the results of another checkpoint ({content['label']}); {REMEDY}")
        try:
            return cls.from_json(content)
        except KeyError as error:
            raise UserError(f"{path} is damaged (it has no {error.args[0]}); {REMEDY}") from error

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
        """As in the file."""
        content: Json = strict_json.finite(asdict(self))
        return content | {"results": [_entry(**result) for result in content["results"]]}


# --- JSON -------------------------------------------------------------------------------------------------------------


def _entry(measure: Json, numbers: Json, **made: Any) -> Json:
    """A result as in the file."""
    if "text" in measure:
        return {"settings": {"kind": "perplexity"} | measure, "metrics": numbers} | made
    tasks = {task: values.pop("scores") | values for task, values in numbers["tasks"].items()}
    optional = ("group", "chat_template", "system_prompt", "batch_size")  # are left out where they are not set
    chosen = {key: value for key, value in measure.items() if key not in optional or value not in (None, False)}
    settings = {"kind": "tasks", "tasks": chosen.pop("task")} | chosen
    return {"settings": settings, "metrics": numbers | {"tasks": tasks}} | made


def _result(entry: Json) -> AnyResult:
    settings, metrics = entry["settings"], entry["metrics"]
    if settings["kind"] == "perplexity":
        infinite = {key: math.inf for key in ("value", "nll") if metrics[key] is None}  # which JSON does not have
        numbers = _record(TextNumbers, metrics | infinite)
        return _record(TextResult, entry | {"measure": _record(TextMeasure, settings), "numbers": numbers})
    names = {one.name for one in fields(TaskScores)}
    tasks = {}
    for task, values in metrics["tasks"].items():
        scores = {name: value for name, value in values.items() if name not in names}
        tasks[task] = _record(TaskScores, values | {"scores": scores})
    measure, numbers = settings | {"task": settings["tasks"]}, metrics | {"tasks": tasks}
    made = entry | {"measure": _record(TaskMeasure, measure), "numbers": _record(TaskNumbers, numbers)}
    return _record(TaskResult, made)


def _record(kind: type[T], content: Mapping[str, Any]) -> T:
    """A dataclass from a mapping that may hold more; KeyError if a field without a default is missing."""
    chosen = {}
    for one in fields(kind):  # type: ignore[arg-type]
        if one.name in content:
            chosen[one.name] = content[one.name]
        elif one.default is MISSING and one.default_factory is MISSING:
            raise KeyError(one.name)
    return kind(**chosen)
