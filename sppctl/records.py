"""The records of the stages (stage.json, lines of the journal) as types, and their conversion to and from JSON."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from sppctl import console
from sppctl.errors import UserError
from sppctl.files import sealed
from sppctl.files.names import DIRECTORIES, RECORD
from sppctl.pattern import Pattern

Settings = dict[str, Any]  # sections of a configuration as plain data: compared and printed, never interpreted
M = TypeVar("M")
R = TypeVar("R")


# --- stages -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attempt:
    """The settings and inputs of a stage, finished or not."""

    settings: Settings  # the part of the configuration that its result depends on
    inputs: dict[str, str]  # fingerprints of everything it reads, by name
    # time of earlier, interrupted attempts whose work is kept; not compared, because no result depends on it
    seconds: float = dataclasses.field(default=0.0, compare=False)

    @property
    def fingerprint(self) -> str:
        """A short hash of settings and inputs."""
        text = json.dumps({"settings": self.settings, "inputs": self.inputs}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def as_in(self, before: Attempt) -> Attempt:
        """This attempt with the compute dtype of an earlier one, if the settings leave it open (auto)."""
        model, recorded = self.settings.get("model", {}), before.settings.get("model", {})
        if model.get("compute_dtype") != "auto" or "compute_dtype" not in recorded:
            return self
        return self.computing_in(recorded["compute_dtype"])

    def computing_in(self, dtype: str) -> Attempt:
        """This attempt with a dtype in place of auto."""
        return Attempt(self.settings | {"model": self.settings["model"] | {"compute_dtype": dtype}}, self.inputs)


@dataclass(frozen=True)
class StageRecord(Generic[M]):
    """The record of a finished stage."""

    stage: str  # prune, train or merge
    fingerprint: str  # of settings and inputs
    settings: Settings  # as of :class:`Attempt`
    inputs: dict[str, str]  # as of :class:`Attempt`
    compute_dtype: str | None  # name of the dtype; None: the stage loads no model
    seed: int  # ``run.seed``
    created: str  # time in ISO 8601
    wall_time_s: float  # of all attempts; of an interrupted one until its last work that was kept
    peak_memory_mb: dict[str, float]  # of the process, and on the GPU
    hardware: str  # GPU or CPU
    versions: dict[str, str]  # of sppctl, Python and libraries
    command: str  # command line of sppctl
    metrics: M  # the stage's own record
    output: str  # fingerprint of the weights
    files: dict[str, str]  # hash of each file

    @property
    def attempt(self) -> Attempt:
        """The stage's settings and inputs."""
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
    """The pruning of one matrix."""

    name: str  # name of the layer
    shape: tuple[int, int]  # (out_features, in_features)
    pattern: Pattern  # the target
    sparsity: float  # share of zeros
    # ||X (W - W_pruned)^T|| / ||X W^T|| on the first calibration inputs; None without inputs
    relative_output_error: float | None
    relative_weight_error: float  # ||W - W_pruned|| / ||W||
    damp: float | None  # damping that the Hessian needed; None without one
    seconds: float  # for scores, mask and update; split over layers that were solved together
    fallback: str | None = None  # method used for an expert that received too few tokens; None: the configured one
    mask: str = ""  # digest of the positions of the zeros
    zeros_before: int = 0  # number of zeros that it had before, all of them kept (``prune.keep_zeros``)

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class BlockErrors:
    """Relative output error of a pruned block before and after its kept weights were tuned, as its loss counts it."""

    before: float
    after: float


@dataclass(frozen=True)
class Permuted:
    """Channels that were reordered, and the share of Wanda's scores, squared, that N:M pruning loses of them."""

    name: str  # name of the layer whose inputs they are, or ``hidden states``
    before: float  # in the order that the dense model has
    after: float


@dataclass(frozen=True)
class BlockRecord:
    """A finished block: a line of the journal."""

    block: int  # its index
    layers: list[LayerRecord]  # its pruned layers
    reconstruction: BlockErrors | None  # None: it was not tuned
    weights: dict[str, str]  # digest of each matrix by the layer's name


@dataclass(frozen=True)
class Calibration:
    """The calibration text and windows; ``versions``: of the hub data that was read."""

    dataset: str
    windows: str
    documents_hash: str
    samples: int
    seq_len: int
    windows_hash: str
    versions: dict[str, str]


@dataclass(frozen=True)
class BaseModel:
    """The dense model as a model card names it."""

    name: str  # hub id, else the last part of its path, or the name of its GGUF file
    is_on_hub: bool
    revision: str | None = None  # commit of the hub
    license: dict[str, str] = dataclasses.field(default_factory=dict)  # as in its own card or configuration


@dataclass(frozen=True)
class PruneRecord:
    """The results of pruning."""

    method: str  # pruning method
    pattern: str  # of most matrices, and exceptions: ``2:4, 4:8 in 12 matrices``
    order: str | None  # block or module; None: no inputs were needed
    activations: str | None  # where hidden states were kept; None: there were none
    processes: int  # number of processes
    matrices: int  # number of pruned matrices
    fallbacks: int  # number of matrices of experts that received too few tokens
    pruned_weights: int  # number of weights of all pruned matrices
    sparsity: float  # share of zeros among these weights
    mean_relative_output_error: float | None  # over the matrices that have one
    reconstruction: dict[int, BlockErrors] | None  # of each tuned block
    layers: list[LayerRecord]  # one entry for each matrix
    calibration: Calibration | None = None  # None: no text was needed
    base: BaseModel | None = None  # the dense model, where it is known
    zeros_before: int = 0  # number of zeros that the matrices had before, all of them kept (``prune.keep_zeros``)
    permuted: list[Permuted] = dataclasses.field(default_factory=list)  # with ``prune.permute_channels``

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
    """The teacher, the KL divergence from it, and its share of the time.

    The divergence is per distilled token: over the last reporting interval that had any, and over the whole training.
    """

    teacher: str
    weight: float
    temperature: float
    kl_last: float | None
    kl_mean: float | None
    seconds_share: float


@dataclass(frozen=True)
class RefreshRecord:
    """The results of refreshing the mask."""

    refreshes: list[dict[str, Any]]  # the trainer's log of each refresh
    changed_matrices: int  # number of matrices whose mask differs from the pruned one
    masks: dict[str, str]  # digest of these masks by the layer's name
    regrown_share: float  # share of the kept weights that pruning had set to zero
    base_weights: str  # the weights that the adapter belongs to


@dataclass(frozen=True)
class TrainRecord:
    """The results of training."""

    method: str  # training method
    modules: list[str]  # names of the trained layers
    trainable_parameters: int  # number of them
    trainable_share: float  # of all parameters
    steps: int  # optimizer steps
    epochs: float  # passes over the examples
    train_loss: float | None  # mean over all steps
    validation_loss: float | None  # of the held-out examples; None without any
    examples: int  # number of training examples
    validation_examples: int  # number of held-out examples
    datasets: dict[str, int]  # number of examples by data set
    duplicates_of_held_out: int  # number of rows left out because they repeat a held-out row
    versions: dict[str, str]  # of the hub data that was read
    data_hash: str  # of the rows
    examples_without_labels: int  # number left out
    validation_examples_without_labels: int  # number left out
    truncated_examples: int  # number longer than ``train.data.seq_len``
    padding_share: float  # share of the positions of padded batches
    tokens: int  # number of tokens processed
    seconds: float  # of training, all attempts together
    tokens_per_second: float  # over that time
    dtype: str  # name of the compute dtype
    distillation: DistillationRecord | None  # None without a teacher
    refresh: RefreshRecord | None  # None without a refresh of the mask
    history: list[dict[str, Any]]  # the trainer's log
    best_step: int | None = None  # whose adapter was published (``train.keep_best``); None: the last one
    weights: str = "dense"  # how the pruned weights were kept in memory: dense or packed


# --- merging ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MatrixRecord:
    """The merge of one matrix."""

    name: str  # name of the tensor in the checkpoint
    zeros: int  # zeros after merging
    kept: int  # nonzero weights after merging
    moved: int  # kept weights whose stored value changed
    filled: int  # zeros of the pruned matrix that are no longer zero
    lost: int  # weights that became zero
    relative_change: float  # ||merged - pruned|| / ||pruned||


@dataclass(frozen=True)
class MergeRecord:
    """The results of merging: mask rule, totals over the matrices, whether exactly the pruned weights are zero."""

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
    # names of further tensors that the adapter stores in full (modules_to_save, biases)
    replaced_tensors: list[str] = dataclasses.field(default_factory=list)
    dtype: str = ""  # name of the dtype in which the matrices are stored; of several, all


# --- samples ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Completion:
    """What a checkpoint writes after a prompt."""

    checkpoint: str  # its label
    text: str
    tokens: int
    is_finished: bool  # by a token that ends the text; else it was cut

    @property
    def shown(self) -> str:
        """The text, with a mark where it was cut."""
        return (self.text.strip() or "(nothing)") + " ..." * (not self.is_finished)


@dataclass(frozen=True)
class Sample:
    """What several checkpoints write after the same prompt."""

    prompt: str
    chat_template: bool  # the prompt was a message of a user in the tokenizer's chat template
    completions: list[Completion]


@dataclass(frozen=True)
class SamplesRecord:
    """The samples of a run, for its report."""

    settings: Settings  # how texts were generated
    weights: dict[str, str]  # fingerprint of each checkpoint by its label
    command: str  # command line of sppctl
    samples: list[Sample]


# by the name of a stage's input: the problem if that input has since been replaced
OUTDATED = {
    "pruned": "was made from weights that differ from those in pruned/",
    "base": "was made with a different dense model than pruned/",
    "adapter": "was merged with an adapter that differs from adapter/",
}
METRICS: dict[str, type] = {"prune": PruneRecord, "train": TrainRecord, "merge": MergeRecord}


# --- JSON -------------------------------------------------------------------------------------------------------------


def to_json(record: Any) -> Any:
    """A record as plain data for JSON."""
    if dataclasses.is_dataclass(record) and not isinstance(record, Pattern | type):
        return {field.name: to_json(getattr(record, field.name)) for field in dataclasses.fields(record)}
    if isinstance(record, dict):
        return {str(key): to_json(value) for key, value in record.items()}
    if isinstance(record, list | tuple):
        return [to_json(value) for value in record]
    return str(record) if isinstance(record, Pattern) else record


def remedy(stage: str, directory: Path) -> str:
    """The fix, for an error, of a stage whose record or files, in its ``directory`` of the run, are damaged."""
    return f"{console.command(stage, '--force', run=directory.parent)} redoes the stage"


def read(path: Path, stage: str) -> StageRecord[Any]:
    """The stage.json of a stage (prune, train or merge).

    Raises:
        UserError: the record cannot be read, is damaged, or belongs to another stage.
    """
    fix = remedy(stage, path.parent)
    content = read_content(path, stage, fix)
    try:
        return from_json(StageRecord, content, METRICS[stage])
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); {fix}") from error


def fingerprints(stages: Mapping[str, StageRecord[Any]]) -> dict[str, str | None]:
    """Fingerprints of the dense model that was pruned and of the output of each stage; None if a stage is missing."""
    found = {folder: stages[stage].output if stage in stages else None for stage, folder in DIRECTORIES.items()}
    return found | {"base": stages["prune"].inputs.get("base") if "prune" in stages else None}


def differ(used: str | None, current: str | None) -> bool:
    """Whether two fingerprints are known and differ."""
    return None not in (used, current) and used != current


def outdated(stages: Mapping[str, StageRecord[Any]], stage: str) -> str | None:
    """The problem of a stage that was made from other weights than its run holds now; None without one."""
    used, current = stages[stage].inputs if stage in stages else {}, fingerprints(stages)
    return next((text for name, text in OUTDATED.items() if differ(used.get(name), current[name])), None)


def refuse_outdated(run_dir: Path) -> None:
    """Raises UserError if the merged checkpoint of a run was made from other weights than the run holds now."""
    paths = {stage: run_dir / folder / RECORD for stage, folder in DIRECTORIES.items()}
    stages = {stage: read(path, stage) for stage, path in paths.items() if path.is_file()}
    if problem := outdated(stages, "merge"):
        merged, again = run_dir / DIRECTORIES["merge"], console.command("merge", "--force", run=run_dir)
        raise UserError(f"{merged} {problem}; {again}, or name {merged} itself")


def read_content(path: Path, stage: str, remedy: str) -> dict[str, Any]:
    """The same as plain data; only its seal and its stage are checked."""
    if stage == "train" and not os.path.lexists(path):
        _check_not_foreign(path)
    content = sealed.read(path, remedy)
    if content.get("stage") != stage:
        raise UserError(f"{path} is the record of another stage ({content.get('stage')}); {remedy}")
    return content


def _check_not_foreign(path: Path) -> None:
    """Raises UserError if there is an adapter in the place of a trained one, but not its record at ``path``."""
    from sppctl.files.safe_files import is_adapter

    adapter = path.parent
    if adapter.is_dir() and is_adapter(adapter):
        merge = console.command("merge", f"--adapter={adapter}", run=adapter.parent)
        train = console.command("train", "--force", run=adapter.parent)
        problem = f"{path} does not exist, so the adapter was trained elsewhere, or its record is lost"
        raise UserError(f"{problem}; {merge} merges it as it is, {train} replaces it by a new one")


def from_json(kind: type[R], content: Any, metrics: type | None = None) -> R:
    """A record (a dataclass) from its parsed JSON; ``metrics``: the type of the metrics of a :class:`StageRecord`.

    Raises:
        ValueError: a value, named in the message, is missing, unknown or of another type.
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
    if origin in (types.UnionType, typing.Union):  # always a type or None
        return None if value is None else _parse(inner[0], value, key, metrics)
    is_record = dataclasses.is_dataclass(hint)
    expected: Any = dict if is_record else {float: (int, float), tuple: list}.get(origin or hint, origin or hint)
    if not isinstance(value, expected) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"its {key or 'content'} has the wrong type")
    if is_record:
        return _parse_fields(hint, value, key, metrics)
    if origin is dict:
        return {inner[0](name): _parse(inner[1], item, f"{key}.{name}", metrics) for name, item in value.items()}
    if origin in (list, tuple):
        return origin(_parse(inner[0], item, f"{key}[{index}]", metrics) for index, item in enumerate(value))
    return value


_hints = functools.cache(typing.get_type_hints)  # slow: it evaluates the text of every annotation


def _parse_fields(kind: Any, content: dict[str, Any], key: str, metrics: type | None) -> Any:
    hints, values = _hints(kind), {}
    if unknown := content.keys() - hints.keys():
        raise ValueError(f"its {key or 'content'} has an unknown field {min(unknown)}")
    for field in dataclasses.fields(kind):
        path = f"{key}.{field.name}".lstrip(".")
        if field.name in content:
            values[field.name] = _parse(hints[field.name], content[field.name], path, metrics)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"it has no {path}")
    return kind(**values)
