"""The records of the stages (stage.json, lines of the journal) as types, and the one way from and to their JSON."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from sppctl.errors import UserError
from sppctl.files import sealed
from sppctl.pattern import Pattern

Settings = dict[str, Any]  # sections of a configuration as plain data: compared and printed, never interpreted
M = TypeVar("M")
R = TypeVar("R")


# --- stages -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attempt:
    """What a stage is made from, finished or not."""

    settings: Settings  # the part of the configuration that its result depends on
    inputs: dict[str, str]  # fingerprint of everything it reads, by what it is

    @property
    def fingerprint(self) -> str:
        """A short hash of both."""
        text = json.dumps({"settings": self.settings, "inputs": self.inputs}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def as_in(self, before: Attempt) -> Attempt:
        """With the choices of an earlier one where these settings leave them open: auto computes in its dtype."""
        model, recorded = self.settings.get("model", {}), before.settings.get("model", {})
        if model.get("compute_dtype") != "auto" or "compute_dtype" not in recorded:
            return self
        return self.computing_in(recorded["compute_dtype"])

    def computing_in(self, dtype: str) -> Attempt:
        """With the dtype that is computed in instead of auto."""
        return Attempt(self.settings | {"model": self.settings["model"] | {"compute_dtype": dtype}}, self.inputs)


@dataclass(frozen=True)
class StageRecord(Generic[M]):
    """The record of a finished stage."""

    stage: str  # prune, train or merge
    fingerprint: str  # of settings and inputs
    settings: Settings  # as of :class:`Attempt`
    inputs: dict[str, str]  # as of :class:`Attempt`
    compute_dtype: str | None  # name of the dtype computed in; None: the stage loads no model
    seed: int  # ``run.seed``
    created: str  # time in ISO 8601
    wall_time_s: float  # seconds of the attempt that finished it
    peak_memory_mb: dict[str, float]  # of the process, and on the GPU
    hardware: str  # that it ran on
    versions: dict[str, str]  # of sppctl, Python and libraries
    command: str  # that made it
    metrics: M  # what the stage itself reports
    output: str  # fingerprint of the weights
    files: dict[str, str]  # hash of each file

    @property
    def attempt(self) -> Attempt:
        """What it was made from."""
        return Attempt(self.settings, self.inputs)


@dataclass(frozen=True)
class UnpackedRecord:
    """The record of a GGUF file that was unpacked: ``inputs`` are its hash and the dtype."""

    stage: str
    inputs: Settings
    wall_time_s: float
    output: str
    files: dict[str, str]


# --- pruning ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerRecord:
    """What pruning did to one matrix."""

    name: str  # of the layer
    shape: tuple[int, int]  # (out_features, in_features)
    pattern: Pattern  # that was asked for
    sparsity: float  # share of zeros now
    # ||X (W - W_pruned)^T|| / ||X W^T|| on the first calibration inputs; None without inputs
    relative_output_error: float | None
    relative_weight_error: float  # ||W - W_pruned|| / ||W||
    damp: float | None  # damping that the Hessian needed; None without one
    seconds: float  # for scores, mask and update, shared by layers that were solved together
    fallback: str | None = None  # what an expert that saw too few tokens was pruned by; None: as all others
    mask: str = ""  # digest of where the zeros are

    @property
    def size(self) -> int:
        """Weights of the matrix."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class BlockErrors:
    """Relative output error of a pruned block before and after its kept weights were tuned."""

    before: float
    after: float


@dataclass(frozen=True)
class BlockRecord:
    """A finished block, a line of the journal."""

    block: int  # its index
    layers: list[LayerRecord]  # that were pruned in it
    reconstruction: BlockErrors | None  # None: it was not tuned
    weights: dict[str, str]  # digest of each matrix by the layer's name


@dataclass(frozen=True)
class Calibration:
    """Which windows of which text: ``versions`` are those of the hub's data that was read."""

    dataset: str
    windows: str
    documents_hash: str
    samples: int
    seq_len: int
    windows_hash: str
    versions: dict[str, str]


@dataclass(frozen=True)
class PruneRecord:
    """What pruning reports."""

    method: str  # of pruning
    pattern: str  # of most matrices, and of the others: ``2:4, 4:8 in 12 matrices``
    order: str | None  # block or module; None: no inputs were needed
    activations: str | None  # where the hidden states were; None: there were none
    processes: int  # that shared the work
    matrices: int  # number of them
    fallbacks: int  # matrices of experts that saw too few tokens
    pruned_weights: int  # weights of all these matrices
    sparsity: float  # share of zeros among them
    mean_relative_output_error: float | None  # over the matrices that have one
    reconstruction: dict[int, BlockErrors] | None  # of each tuned block
    layers: list[LayerRecord]  # one entry for each matrix
    calibration: Calibration | None = None  # None: no text was needed

    @property
    def patterns(self) -> dict[str, Pattern]:
        """The pattern of each pruned layer by its name."""
        return {layer.name: layer.pattern for layer in self.layers}

    @property
    def masks(self) -> dict[str, str]:
        """The digest of each pruned layer's mask by its name."""
        return {layer.name: layer.mask for layer in self.layers}


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DistillationRecord:
    """The teacher, the divergence from it (of the last and the mean logged step), and its share of the time."""

    teacher: str
    weight: float
    temperature: float
    kl_last: float | None
    kl_mean: float | None
    seconds_share: float


@dataclass(frozen=True)
class RefreshRecord:
    """What refreshing the mask did."""

    refreshes: list[dict[str, Any]]  # the trainer's log of each
    changed_matrices: int  # number of matrices with another mask than pruning gave them
    masks: dict[str, str]  # digest of their masks by the layer's name
    regrown_share: float  # kept weights that pruning had made zero, as a share of all kept ones
    base_weights: str  # which weights the adapter belongs to


@dataclass(frozen=True)
class TrainRecord:
    """What training reports."""

    method: str  # of training
    modules: list[str]  # names of the layers that were trained
    trainable_parameters: int  # number of them
    trainable_share: float  # of all parameters
    steps: int  # optimizer steps
    epochs: float  # passes over the examples
    train_loss: float | None  # mean over all steps
    validation_loss: float | None  # of the held-out examples; None without any
    examples: int  # that were trained on
    validation_examples: int  # that were held out
    datasets: dict[str, int]  # examples by data set
    duplicates_of_held_out: int  # rows left out because they repeat a held-out one
    versions: dict[str, str]  # of the hub's data that was read
    data_hash: str  # of the rows
    examples_without_labels: int  # left out
    validation_examples_without_labels: int  # left out
    truncated_examples: int  # longer than ``train.data.seq_len``
    padding_share: float  # of the positions of padded batches
    tokens: int  # seen
    seconds: float  # of training, all attempts together
    tokens_per_second: float  # over that time
    dtype: str  # name of the dtype computed in
    distillation: DistillationRecord | None  # None without a teacher
    refresh: RefreshRecord | None  # None without a refresh of the mask
    history: list[dict[str, Any]]  # the trainer's log


# --- merging ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MatrixRecord:
    """What merging did to one matrix."""

    name: str  # of the tensor in the checkpoint
    zeros: int  # weights that are zero after merging
    kept: int  # weights that are not
    moved: int  # of those, how many have another stored value than before
    filled: int  # zeros of the pruned weight that are zero no more
    lost: int  # weights that have become zero
    relative_change: float  # ||merged - pruned|| / ||pruned||


@dataclass(frozen=True)
class MergeRecord:
    """What merging reports: the mask rule, totals over the matrices, whether exactly the pruned weights are zero."""

    method: str
    mask: str
    matrices: int
    zeros: int
    kept_weights: int
    moved_weights: int
    moved_share: float
    sparsity: float
    filled_zeros: int
    lost_weights: int
    pattern_unchanged: bool
    refreshed_matrices: int
    records: list[MatrixRecord]


METRICS: dict[str, type] = {"prune": PruneRecord, "train": TrainRecord, "merge": MergeRecord}


# --- JSON -------------------------------------------------------------------------------------------------------------


def to_json(record: Any) -> Any:
    """Plain data of a record: what JSON can hold."""
    if dataclasses.is_dataclass(record) and not isinstance(record, Pattern | type):
        return {field.name: to_json(getattr(record, field.name)) for field in dataclasses.fields(record)}
    if isinstance(record, dict):
        return {str(key): to_json(value) for key, value in record.items()}
    if isinstance(record, list | tuple):
        return [to_json(value) for value in record]
    return str(record) if isinstance(record, Pattern) else record


def remedy(stage: str) -> str:
    """What to do about a stage whose record or files are damaged, for an error."""
    return f"sppctl {stage} --force redoes the stage"


def read(path: Path, stage: str) -> StageRecord[Any]:
    """The stage.json of a stage (prune, train or merge).

    Raises:
        UserError: it cannot be read, is damaged, or is that of another stage.
    """
    content = read_content(path, stage, remedy(stage))
    try:
        return from_json(StageRecord, content, METRICS[stage])
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); {remedy(stage)}") from error


def read_content(path: Path, stage: str, remedy: str) -> dict[str, Any]:
    """The same as plain data, of which only the seal and the stage have been checked."""
    content = sealed.read(path, remedy)
    if content.get("stage") != stage:
        raise UserError(f"{path} is the record of another stage ({content.get('stage')}); {remedy}")
    return content


def from_json(kind: type[R], content: Any, metrics: type | None = None) -> R:
    """The record of a type (a dataclass) in its parsed JSON; ``metrics``: their type in a :class:`StageRecord`.

    Raises:
        ValueError: a value is missing, unknown or of another type; the message names it.
    """
    record: R = _parse(kind, content, "", metrics)
    return record


def _parse(hint: Any, value: Any, key: str, metrics: type | None) -> Any:
    hint = metrics if hint is M else hint
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if hint is Pattern:
        return Pattern.parse(value)
    if origin in (types.UnionType, typing.Union):  # of a type and None
        return None if value is None else _parse(inner[0], value, key, metrics)
    is_record = dataclasses.is_dataclass(hint)
    expected: Any = dict if is_record else {float: (int, float), tuple: list}.get(origin or hint, origin or hint)
    if not isinstance(value, expected) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"its {key or 'content'} is not what belongs there")
    if is_record:
        return _parse_fields(hint, value, key, metrics)
    if origin is dict:
        return {inner[0](name): _parse(inner[1], item, f"{key}.{name}", metrics) for name, item in value.items()}
    if origin in (list, tuple):
        return origin(_parse(inner[0], item, f"{key}[{place}]", metrics) for place, item in enumerate(value))
    return value


_hints = functools.cache(typing.get_type_hints)  # which evaluates the text of every annotation


def _parse_fields(kind: Any, content: dict[str, Any], key: str, metrics: type | None) -> Any:
    hints, values = _hints(kind), {}
    if unknown := content.keys() - hints.keys():
        raise ValueError(f"its {key or 'content'} has {min(unknown)}, which does not belong there")
    for field in dataclasses.fields(kind):
        where = f"{key}.{field.name}".lstrip(".")
        if field.name in content:
            values[field.name] = _parse(hints[field.name], content[field.name], where, metrics)
        elif field.default is dataclasses.MISSING:
            raise ValueError(f"it has no {where}")
    return kind(**values)
