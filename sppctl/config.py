"""The configuration: frozen dataclasses are the schema; files are YAML 1.2; ``key=value`` overrides win over files.

Precedence: command line over YAML over the defaults below. Every problem is reported in one message.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from sppctl.errors import UserError
from sppctl.pattern import Pattern
from sppctl.yaml12 import dump_yaml, parse_yaml

AllLinear = Literal["all-linear"]
Auto = Literal["auto"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _key(
    default: Any,
    meaning: str,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
    affects_result: bool = True,
) -> Any:
    """A configuration key: default, meaning, bounds, and whether another value gives another result."""
    bounds = {"low": low, "above": above, "high": high, "below": below}
    metadata = {"meaning": meaning, "bounds": bounds, "affects_result": affects_result}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives."""

    dir: str = _key("runs/default", "directory of the run: pruned/, adapter/, merged/, eval/", affects_result=False)
    seed: int = _key(0, "seed of calibration windows, adapter initialisation, dropout and data order", low=0)


@dataclass(frozen=True)
class LaunchConfig:
    """How many processes share the work; under torchrun, accelerate or srun theirs are used instead."""

    num_processes: int = _key(1, "processes that sppctl prune starts on this machine", low=1, affects_result=False)


@dataclass(frozen=True)
class ModelConfig:
    """The dense model to start from."""

    path: str | None = _key(None, "hub id, local directory, or package:NAME (directory of an installed package)")
    gguf_file: str | None = _key(None, "name of a GGUF file at model.path; converted to safetensors once")
    revision: str | None = _key(None, "branch, tag or commit of a hub id")
    dtype: DType = _key("auto", "dtype of the pruned checkpoint; auto: as stored")
    device: str = _key("auto", "cpu, cuda, cuda:1, mps; auto: the GPU if there is one", affects_result=False)
    trust_remote_code: bool = _key(False, "run Python code that comes with the model")


@dataclass(frozen=True)
class CalibrationConfig:
    """Text that shows the pruner which inputs matter."""

    dataset: str = _key(
        "instructions",
        "instructions (built in), c4, wikitext2, alpaca, prose, a hub id (OWNER/NAME, OWNER/NAME:CONFIG), "
        "or a local .txt, .jsonl, .json or .parquet file",
    )
    column: str | None = _key(None, "column that holds the text; null or auto: text, or instruction and output")
    samples: int = _key(128, "number of windows", low=1)
    seq_len: int = _key(2048, "tokens in a window", low=2)
    windows: Literal["auto", "random-document", "concatenate"] = _key(
        "auto",
        "random-document: a random piece of each of `samples` long documents (as published); concatenate: pieces of "
        "all documents joined; auto: the first, or the second where there are too few long documents",
    )


@dataclass(frozen=True)
class PruneConfig:
    """How weights are chosen for removal."""

    method: Literal["magnitude", "wanda", "sparsegpt", "dsnot"] = _key("wanda", "pruning method")
    pattern: Pattern = _key(Pattern(keep=2, group=4), "N:M (N weights KEPT in every M) or a ratio of zeros (0.5)")
    targets: list[str] | AllLinear = _key(list(PROJECTIONS), "names of linear layers, or all-linear")
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    skip: list[str] = _key([], "names or patterns to leave dense, such as '*.layers.0.*' or down_proj")
    overrides: dict[str, Pattern] = _key(
        {}, "another pattern for names or patterns: {down_proj: 0.4}; the last one wins"
    )
    allocation: Literal["uniform", "owl"] | list[float] = _key(
        "uniform", "how a ratio is shared out: the same for all blocks, by outliers (OWL), or a ratio per block"
    )
    owl_lambda: float = _key(0.08, "OWL: a block's ratio lies within the wanted one +- this", above=0, below=1)
    mask_from: str | None = _key(None, "checkpoint whose zeros are the mask: sparsegpt repairs, dsnot starts from it")
    order: Literal["block", "module"] = _key(
        "block", "block: as published, two passes per block; module: one pass, layers pruned as their inputs arrive"
    )
    reconstruct_epochs: int = _key(0, "passes of tuning each pruned block on the dense block's output; 0: none", low=0)
    reconstruct_lr: float = _key(1e-4, "learning rate of that tuning (Adam)", above=0)
    batch_size: int | Auto = _key("auto", "calibration windows run through a block at a time", low=1)
    memory: Literal["auto", "device", "ram", "disk"] = _key(
        "auto", "where hidden states wait between blocks; auto: the first of these that fits", affects_result=False
    )
    damp: float = _key(0.01, "SparseGPT: damping as a share of the mean Hessian diagonal", above=0)
    block_size: int = _key(128, "SparseGPT: columns solved before the rest of the matrix is updated", low=1)


@dataclass(frozen=True)
class TrainDataConfig:
    """Instruction data: rows with instruction, input and output."""

    dataset: str = _key("instructions", "instructions (built in), alpaca, a hub id, or a local json / jsonl file")
    split: str = _key("train", "split expression of a hub dataset, such as train[:1000]")
    seq_len: int = _key(512, "longest example in tokens; longer ones are cut, counted and reported", low=8)
    val_size: int = _key(0, "rows held out for the validation loss (instructions: its own 64 are used)", low=0)
    max_rows: int | None = _key(None, "use only the first rows, after shuffling", low=1)
    train_on_inputs: bool = _key(True, "loss on the prompt too (as published), or on the response alone")


@dataclass(frozen=True)
class TrainConfig:
    """Sparsity-preserving fine-tuning."""

    method: Literal["spp"] = _key("spp", "adapter method")
    rank: int = _key(16, "r: rows of alpha", low=1)
    scale: float = _key(2.0, "s: weight of the adapter branch", above=0)
    dropout: float = _key(0.05, "dropout on the input of the adapter branch", low=0, below=1)
    targets: list[str] | Literal["pruned"] = _key("pruned", "names of linear layers; pruned: those that were pruned")
    data: TrainDataConfig = field(default_factory=TrainDataConfig)
    epochs: float = _key(3.0, "passes over the data", above=0)
    max_steps: int | None = _key(None, "stop after this many optimizer steps, whatever epochs says", low=1)
    batch_size: int = _key(128, "examples in an optimizer step, over all devices; accumulation is derived", low=1)
    micro_batch_size: int = _key(8, "examples on a device at a time", low=1, affects_result=False)
    lr: float = _key(4e-3, "peak learning rate (AdamW)", above=0)
    warmup_ratio: float = _key(0.03, "share of the steps in which the learning rate rises", low=0, below=1)
    weight_decay: float = _key(0.001, "AdamW's decoupled weight decay", low=0)
    max_grad_norm: float = _key(1.0, "gradients are scaled down to this norm; 0: never", low=0)
    gradient_checkpointing: bool = _key(False, "recompute activations in the backward pass", affects_result=False)
    bf16: bool | Auto = _key("auto", "autocast a float32 model to bfloat16; auto: where the hardware has it")
    save_steps: int = _key(200, "optimizer steps between checkpoints", low=1, affects_result=False)
    keep_checkpoints: int = _key(2, "newest checkpoints kept while training", low=1, affects_result=False)
    eval_steps: int | None = _key(None, "steps between validation losses; null: at the end only", low=1)
    log_steps: int = _key(10, "steps between two lines of progress", low=1, affects_result=False)


@dataclass(frozen=True)
class MergeConfig:
    """How adapter and pruned weights become one checkpoint."""

    dtype: DType = _key("auto", "dtype of the adapted matrices; auto: as in the pruned checkpoint")


@dataclass(frozen=True)
class EvalConfig:
    """What is measured on base, pruned and merged."""

    perplexity: list[str] = _key(["wikitext2"], "texts: wikitext2, instructions, prose, alpaca, or a local text file")
    seq_len: int | None = _key(None, "window of the perplexity in tokens; null: min(2048, limit of the model)", low=2)
    max_tokens: int | None = _key(None, "use only the first tokens of each text; shown with the result", low=2)
    tasks: list[str] = _key([], "zeroshot (the seven tasks), mmlu (5-shot), or any lm-eval task or group")
    batch_size: int | Auto = _key("auto", "requests at a time", low=1, affects_result=False)
    limit: int | None = _key(None, "first N examples of each task; shown with the result", low=1)


@dataclass(frozen=True)
class Config:
    """Everything a run needs."""

    run: RunConfig = field(default_factory=RunConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    merge: MergeConfig = field(default_factory=MergeConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


# --- reading ----------------------------------------------------------------------------------------------------------


def shipped_configs() -> dict[str, Path]:
    """The configurations that come with sppctl, by name."""
    package = Path(__file__).resolve().parent
    folder = next((path for path in (package / "configs", package.parent / "configs") if path.is_dir()), None)
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))} if folder else {}


def find_config(name: str | None) -> Path:
    """The file a CONFIG argument means: a path, the name of a shipped configuration, or quickstart if None.

    Raises:
        UserError: there is no such file.
    """
    shipped = shipped_configs()
    if name is None:
        return shipped["quickstart"]
    if Path(name).is_file():
        return Path(name)
    if Path(name).is_dir():
        raise UserError(f"config {name} is a directory; name the YAML file in it")
    stem = name.removeprefix("configs/").removesuffix(".yaml")
    if stem in shipped:
        return shipped[stem]
    raise UserError(f"config {name} does not exist; give a YAML file, or one of: {', '.join(shipped)}")


def load_config(name: str | None, overrides: Sequence[str] = ()) -> Config:
    """Reads a configuration file and applies ``key=value`` overrides.

    Raises:
        UserError: one message with every unknown key, wrong type, bad value and impossible combination.
    """
    path = find_config(name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config {path} cannot be read: {error}") from error
    tree = parse_yaml(text, str(path))
    problems: list[str] = []
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected sections such as 'model:' and 'prune:', found {_shown(tree)}")
    sources: dict[str, str] = {}
    _apply_overrides(tree, overrides, sources, problems)
    config: Config = _build(Config, tree, "", _Context(str(path), sources, problems))
    if not problems:
        problems = list(_impossible(config))
    if problems:
        raise UserError("\n".join(problems))
    return config


def quoted(value: Any) -> str:
    """A value as YAML that cannot be taken for anything else (``--output 2024`` is a name); JSON is such YAML."""
    return json.dumps(value, ensure_ascii=False)


def _apply_overrides(tree: dict[Any, Any], overrides: Sequence[str], sources: dict[str, str], out: list[str]) -> None:
    keys = [override.partition("=")[0].strip() for override in overrides]
    if "model.path" in keys and isinstance(tree.get("model"), dict):
        # a file name and a revision belong to the path they were written for
        for key in ("gguf_file", "revision"):
            tree["model"].pop(key, None)
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not key:
            out.append(f"command line: {override!r} is not KEY=VALUE")
            continue
        try:
            value = parse_yaml(text, f"command line: {key}")
        except UserError as error:
            out.append(str(error))
            continue
        node = tree
        *parents, leaf = key.split(".")
        for parent in parents:
            child = node.get(parent)
            if not isinstance(child, dict):
                child = node[parent] = {}
            node = child
        node[leaf] = value
        sources[key] = "command line"


@dataclass(frozen=True)
class _Context:
    file: str
    sources: dict[str, str]
    problems: list[str]

    def report(self, key: str, problem: str) -> None:
        near = (given for given in self.sources if f"{key}.".startswith(f"{given}.") or given.startswith(f"{key}."))
        self.problems.append(f"{self.sources.get(next(near, key), self.file)}: {key}: {problem}")


def _build(cls: type, tree: Any, prefix: str, context: _Context) -> Any:
    """Makes a dataclass from a mapping; problems go to the context and the default stands in."""
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        context.report(prefix.rstrip("."), f"expected a section with keys, found {_shown(tree)}")
        return cls()
    known = {f.name: f for f in fields(cls)}
    hints = typing.get_type_hints(cls)
    values = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if name not in known:
            context.report(key, f"unknown key{_nearest(key)}")
        elif _is_section(hints[name]):
            values[name] = _build(typing.cast(type, hints[name]), value, f"{key}.", context)
        else:
            try:
                values[name] = _convert(value, hints[name])
                _check_bounds(values[name], known[name].metadata["bounds"])
            except ValueError as error:
                values.pop(name, None)
                context.report(key, str(error))
    return cls(**values)


def _is_section(hint: Any) -> bool:
    return is_dataclass(hint) and hint is not Pattern


def _nearest(key: str) -> str:
    every = list(config_keys())
    section, _, leaf = key.rpartition(".")
    inside = [name for name in every if section and name.startswith(f"{section}.")]
    leaves = {name.rpartition(".")[2]: name for name in reversed(inside or every)}
    close = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.6)
    if not close:
        return f"; the keys of {section} are {', '.join(inside)}" if inside else "; see `sppctl config --schema`"
    return f"; did you mean {leaves[close[0]]}?"


def _convert(value: Any, hint: Any) -> Any:
    """The value as the type hint wants it, or ValueError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        # choices first: `pruned` is one of them, not a list of one name
        for option in sorted(arguments, key=lambda option: getattr(option, "__origin__", None) is not Literal):
            try:
                return _convert(value, option)
            except ValueError:
                continue
        # a list written where a list is allowed: say what is wrong inside it
        for option in arguments:
            if typing.get_origin(option) is list and isinstance(value, list):
                _convert(value, option)
        raise ValueError(f"expected {_type_name(hint)}, found {_shown(value)}")
    if origin is Literal:
        if value in arguments and not isinstance(value, bool):
            return value
        names = ", ".join(map(str, arguments))
        close = difflib.get_close_matches(str(value), [str(a) for a in arguments], n=1)
        raise ValueError(f"{_shown(value)} is not one of {names}" + (f"; did you mean {close[0]}?" if close else ""))
    if origin is list:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list) or (isinstance(value, str) and value == "all-linear"):
            raise ValueError(f"expected {_type_name(hint)}, found {_shown(value)}")
        return [_convert(item.strip() if isinstance(item, str) else item, arguments[0]) for item in items]
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"expected {_type_name(hint)}, found {_shown(value)}")
        return {str(name): _convert(item, arguments[1]) for name, item in value.items()}
    if hint is Pattern:
        return Pattern.parse(value)
    if hint is types.NoneType:
        matches = value is None
    elif hint is float:
        matches = isinstance(value, int | float) and not isinstance(value, bool)
        value = float(value) if matches else value
    elif hint is int:
        matches = isinstance(value, int) and not isinstance(value, bool)
    else:
        matches = isinstance(value, hint) and value != ""
    if not matches:
        raise ValueError(f"expected {_type_name(hint)}, found {_shown(value)}")
    return value


def _check_bounds(value: Any, bounds: Mapping[str, float | None]) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if math.isinf(value):
        raise ValueError(f"{value} is not a finite number")
    tests = {
        "low": (value >= (bounds["low"] or 0), "at least"),
        "above": (value > (bounds["above"] or 0), "more than"),
        "high": (bounds["high"] is None or value <= bounds["high"], "at most"),
        "below": (bounds["below"] is None or value < bounds["below"], "less than"),
    }
    wrong = [
        f"{words} {bounds[name]:g}"
        for name, (ok, words) in tests.items()
        if bounds[name] is not None and not (ok and value == value)
    ]
    if wrong:
        raise ValueError(f"{value} must be {' and '.join(wrong)}")


def _impossible(config: Config) -> Iterator[str]:
    """Combinations that each key alone does not show."""
    if config.model.path is None:
        yield "model.path: not set; name a hub id, a local directory or package:NAME (--model)"
    if config.train.batch_size % config.train.micro_batch_size:
        yield (
            f"train.micro_batch_size: {config.train.micro_batch_size} does not divide "
            f"train.batch_size {config.train.batch_size}"
        )
    if config.prune.order == "module" and config.prune.reconstruct_epochs:
        yield "prune.reconstruct_epochs: needs the dense block's output, which prune.order module never computes"
    for key, names in (("prune.targets", config.prune.targets), ("train.targets", config.train.targets)):
        if names == []:
            yield f"{key}: an empty list; name at least one layer"


# --- describing -------------------------------------------------------------------------------------------------------


def config_keys(cls: type = Config, prefix: str = "") -> Iterator[str]:
    """Every key with dots, in order."""
    for name, _, _ in _leaves(cls, prefix):
        yield name


def _leaves(cls: type, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    hints = typing.get_type_hints(cls)
    for f in fields(cls):
        if _is_section(hints[f.name]):
            yield from _leaves(typing.cast(type, hints[f.name]), f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", f, hints[f.name]


def schema() -> list[dict[str, Any]]:
    """One entry per key: key, type, default, meaning."""
    entries = []
    for key, f, hint in _leaves(Config):
        default: Any = Config()
        for part in key.split("."):
            default = getattr(default, part)
        entries.append(
            {"key": key, "type": _type_name(hint), "default": _plain(default), "meaning": f.metadata["meaning"]}
        )
    return entries


def to_dict(config: Any) -> dict[str, Any]:
    """Plain data: what YAML and JSON can hold."""
    result: dict[str, Any] = {}
    for f in fields(config):
        value = getattr(config, f.name)
        if _is_section(type(value)):
            result[f.name] = to_dict(value)
        else:
            result[f.name] = _plain(value)
    return result


def _plain(value: Any) -> Any:
    if isinstance(value, Pattern):
        return str(value) if value.is_structured else value.ratio
    return {name: _plain(item) for name, item in value.items()} if isinstance(value, dict) else value


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML that both 1.1 and 1.2 readers take alike."""
    return dump_yaml(to_dict(config))


def result_keys(config: Any) -> dict[str, Any]:
    """Like to_dict, without the keys that cannot change a result (devices, batch sizes, logging)."""
    plain = to_dict(config)
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if _is_section(type(value)):
            plain[f.name] = result_keys(value)
            if not plain[f.name]:
                del plain[f.name]
        elif not f.metadata.get("affects_result", True):
            del plain[f.name]
    return plain


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections to dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _type_name(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(option) for option in arguments)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin is list:
        return "a list of names" if arguments == (str,) else "a list of numbers"
    if origin is dict:
        return "a section of names with a pattern each"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", types.NoneType: "null"}
    return names.get(hint, "N:M or a ratio" if hint is Pattern else str(hint))


def _shown(value: Any) -> str:
    kind = {str: "the text ", bool: "", int: "", float: "", list: "the list ", dict: "the section "}
    return f"{kind.get(type(value), '')}{value!r}" if value is not None else "null"
