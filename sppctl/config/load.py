"""Reads and describes the configuration: YAML 1.2 files and ``key=value`` overrides.

Precedence: command line over YAML over the defaults of :mod:`sppctl.config.settings`. All problems are reported in one
message.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import math
import os
import re
import textwrap
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from sppctl import plugins
from sppctl.config import recorded
from sppctl.config.hints import HINTS
from sppctl.config.recorded import Tree
from sppctl.config.settings import BOUNDS, Config
from sppctl.config.yaml12 import DEEPEST, dump_yaml, parse_yaml, read_yaml
from sppctl.errors import Problems, UserError, did_you_mean
from sppctl.files.paths import expand, file_stem
from sppctl.pattern import Pattern

LARGEST = 2**63
SHOWN = 200  # characters of a value in an error
TYPE_NAMES: dict[Any, str] = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
TYPE_NAMES |= {types.NoneType: "null", Pattern: "N:M or a ratio"}
HUB_ID = r"[\w-][\w.-]*/[\w.-]+(?<!\.yaml)(?<!\.yml)"
SEE_SCHEMA = "; see `sppctl config --schema`"
QUICKSTART = "quickstart"
CALIBRATION = "prune.calibration.dataset"
DEFAULTS = "the defaults"  # source of a configuration without a file, in errors

# --- files ------------------------------------------------------------------------------------------------------------


def shipped_configs(*, sweeps: bool = False) -> dict[str, Path]:
    """The run configurations, or the sweeps, shipped with sppctl, by name; those in recipes/ come last."""
    package = Path(__file__).resolve().parents[1]
    folder = next((path for path in (package / "configs", package.parent / "configs") if path.is_dir()), package)
    paths = [*sorted(folder.glob("*.yaml")), *sorted(folder.glob("recipes/*.yaml"))]
    texts = {path: path.read_text(encoding="utf-8") for path in paths}
    return {path.stem: path for path, text in texts.items() if bool(re.search(r"^grid:", text, re.MULTILINE)) == sweeps}


def find_file(name: str, *, sweep: bool = False) -> Path:
    """The file of a CONFIG or SWEEP argument: a path, or the name of a shipped file.

    Raises:
        UserError: there is no such file.
    """
    kind, shipped = "sweep" if sweep else "config", shipped_configs(sweeps=sweep)
    path = Path(name)
    if path.is_dir():
        problem = "is a directory without a run; name a run directory or a YAML file; --model is for models"
        if sweep:
            problem = "is a directory; name the YAML file in it"
        elif recorded.is_run(path.parent):
            problem = f"is a part of a run; name the run, {path.parent}"
        raise UserError(f"{kind} {name} {problem}")
    if path.exists():
        return path
    stem = name.removeprefix("configs/").removeprefix("recipes/").removesuffix(".yaml")
    if stem in shipped:
        return shipped[stem]
    if stem in shipped_configs(sweeps=not sweep):
        is_a, verb = ("the configuration of a single run", "run") if sweep else ("a sweep", "sweep")
        raise UserError(f"{stem} is {is_a}; sppctl {verb} {stem} runs it")
    present = [str(file) for suffix in ("yaml", "yml") for file in sorted(path.parent.glob(f"*.{suffix}"))]
    hint = did_you_mean(str(path), present) or did_you_mean(stem, shipped.keys())
    if not hint:
        others = "" if sweep else ", a run directory"
        hint = f"; give a YAML file{others}, or one of: {', '.join(shipped)}"
        hint += f"; or, for a model, --model {name}" if re.fullmatch(HUB_ID, name) and not sweep else ""
    raise UserError(f"{kind} {name} does not exist{hint}")


def load_config(name: str | None, overrides: Sequence[str] = ()) -> Config:
    """Reads a configuration and applies ``key=value`` overrides.

    Args:
        name: a file, the name of a shipped one, or a run directory, whose records have the settings. None: the
            defaults if the overrides name a model, the quickstart otherwise.
        overrides: of the command line.

    Raises:
        UserError: a message with every unknown key, wrong type, bad value and impossible combination.
    """
    source, tree = _source_and_tree(name, overrides)
    return config_of(tree, source, overrides)


def config_of(tree: dict[Any, Any], source: str, overrides: Sequence[str] = ()) -> Config:
    """The configuration of plain data, with ``key=value`` overrides; ``source`` is named in errors.

    Raises:
        UserError: as of :func:`load_config`.
    """
    reader = _Reader(source)
    reader.override(tree, overrides)
    config: Config = reader.build(Config, tree, "")
    if not reader.problems.lines:
        _check_combinations(config, reader.problems)
    reader.problems.raise_all()
    if config.run.dir == "auto":
        return dataclasses.replace(config, run=dataclasses.replace(config.run, dir=default_directory(config)))
    return config


def uses_quickstart(name: str | None, overrides: Iterable[str]) -> bool:
    """Whether a command line names neither a configuration nor a model."""
    return name is None and "model.path" not in {override.partition("=")[0].strip() for override in overrides}


def _source_and_tree(name: str | None, overrides: Sequence[str]) -> tuple[str, dict[Any, Any]]:
    """The content of a configuration, and what to call it in errors."""
    if name is None and not uses_quickstart(name, overrides):
        # a file that leaves out the data means the built-in rows, with which it needs no network
        rows = "instructions" if _stays_offline(overrides) else "alpaca"
        return DEFAULTS, {"prune": {"calibration": {"dataset": "c4"}}, "train": {"data": {"dataset": rows}}}
    if name is not None and recorded.is_run(Path(name)):
        return name, recorded.tree_of(Path(name))
    path = find_file(QUICKSTART if name is None else name)
    tree = read_yaml(path)
    if not isinstance(tree, dict | None):
        raise UserError(str(path), f"expected sections such as 'model:' and 'prune:', found {shown(tree)}")
    if tree and "grid" in tree:
        raise UserError(f"{path} is a sweep, not the configuration of one run: sppctl sweep {path}")
    return str(path), tree or {}


def _stays_offline(overrides: Iterable[str]) -> bool:
    """Whether a run has to do without Alpaca: the hub is switched off, and the calibration text is a local file."""
    calibration = [value for key, _, value in (o.partition("=") for o in overrides) if key.strip() == CALIBRATION]
    if not calibration or not os.path.exists(expand(calibration[-1].strip())):
        return False
    if os.environ.get("HF_HUB_OFFLINE", "").upper() not in ("1", "ON", "YES", "TRUE"):
        return False
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    prepared, downloaded = os.environ.get("HF_DATASETS_CACHE"), os.environ.get("HF_HUB_CACHE")
    cached = (
        Path(prepared or home / "datasets") / "tatsu-lab___alpaca",
        Path(downloaded or home / "hub") / "datasets--tatsu-lab--alpaca",
    )
    return not any(path.expanduser().exists() for path in cached)


def default_directory(config: Config) -> str:
    """The run directory where none is configured: runs/MODEL-METHOD-PATTERN."""
    model, pattern = config.model, str(_plain(config.prune.pattern)).replace(":", "of")
    assert model.path is not None
    return f"runs/{short_name(model.path, model.gguf_file)}-{config.prune.method}-{pattern}"


def short_name(model: str, gguf_file: str | None = None) -> str:
    """The last part of a model's path or hub id, or of its GGUF file, as the name of a directory."""
    path = Path(gguf_file or model.removeprefix("package:"))
    name = path.stem if gguf_file else path.name.strip(".") or path.resolve().name
    return file_stem(re.sub(r"[^\w.-]+", "-", name))


def quoted(value: Any) -> str:
    """A value as YAML that is read as this value: text as it is, or as JSON where it would be another type (2024)."""
    if isinstance(value, str):
        with contextlib.suppress(UserError):
            if parse_yaml(value, "") == value:
                return value
    return json.dumps(value, ensure_ascii=False)


class _Reader:
    """Builds the configuration of one file, and collects problems, each with its source: file or command line."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.overridden: list[str] = []  # keys given on the command line
        self.problems = Problems()

    def override(self, tree: dict[Any, Any], overrides: Sequence[str]) -> None:
        """Writes the values of ``key=value`` into the tree of a file."""
        assignments = [override.partition("=") for override in overrides]
        if "model.path" in [key.strip() for key, _, _ in assignments] and isinstance(tree.get("model"), dict):
            # the file's gguf_file and revision belong to the file's path
            for key in ("gguf_file", "revision"):
                tree["model"].pop(key, None)
        for override, (key, equals, text) in zip(overrides, assignments, strict=True):
            *parents, leaf = key.strip().split(".")
            if not (equals and key.strip()):
                self.problems.add("command line", f"{override!r} is not KEY=VALUE")
            elif len(parents) > DEEPEST:
                self.problems.add("command line", f"{key.strip():.60}...: unknown key{SEE_SCHEMA}")
            else:
                with self.problems:
                    value, node = override_value(key.strip(), text), tree
                    for parent in parents:
                        if not isinstance(node.get(parent), dict):
                            node[parent] = {}
                        node = node[parent]
                    node[leaf] = value
                    self.overridden.append(key.strip())

    def build(self, cls: type, tree: Any, prefix: str) -> Any:
        """Builds a dataclass from a mapping; a value with a problem is replaced by the default."""
        if not isinstance(tree, dict | None):
            self._report(prefix.rstrip("."), f"expected a section with keys, found {shown(tree)}")
            return cls()
        fields, hints = {f.name: f for f in dataclasses.fields(cls)}, typing.get_type_hints(cls)
        values = {}
        for name, value in (tree or {}).items():
            key = f"{prefix}{name}"
            if name not in fields:
                self._report(key, f"unknown key{_suggestion(key)}")
            elif not fields[name].metadata:  # a section
                values[name] = self.build(hints[name], value, f"{key}.")
            else:
                try:
                    if fields[name].metadata["sentences"] and isinstance(value, str):
                        value = [value]
                    converted = _known_or_converted(value, hints[name], fields[name].metadata["plugins"])
                    if fields[name].metadata["path"]:
                        converted = _expanded(converted)
                    _check_bounds(converted, fields[name].metadata["bounds"])
                    values[name] = converted
                except ValueError as error:
                    self._report(key, str(error))
        return cls(**values)

    def _report(self, key: str, problem: str) -> None:
        """Adds a problem; its source is the command line if it set this key, a part of it, or its section."""
        related = [name for name in self.overridden if f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.")]
        self.problems.add("command line" if related else self.file, f"{key}: {problem}")


def override_value(key: str, text: str) -> Any:
    """The value of ``key=text``; UserError if YAML ends or changes an unquoted text, as at `` #``, without an error."""
    value, bare = parse_yaml(text, f"command line: {key}"), text.strip(" ")
    is_changed = value != bare if isinstance(value, str) else value is None and bare.startswith("#")
    if is_changed and bare[0] not in "\"'|>!&":
        raise UserError(f"command line: {key}", f"YAML reads only {shown(value)}", f"quote it: '{key}=\"...\"'")
    return value


def _suggestion(key: str) -> str:
    """The end of an error about an unknown key: the most similar key of its section, else of all sections."""
    section, _, leaf = key.rpartition(".")
    if leaf in HINTS:
        keys, hint = config_keys(), HINTS[leaf]
        if hint not in keys:
            return f"; {hint}"
        sibling = f"{section}.{hint.rpartition('.')[2]}"  # prune.target_modules is prune.targets
        return f"; did you mean {sibling if sibling in keys else hint}?"
    keys = [name for name in config_keys() if section and name.startswith(f"{section}.")]
    prefix = f"{section}." if keys else ""
    keys = keys or config_keys()
    siblings = {name.removeprefix(prefix).partition(".")[0] for name in keys}
    leaves = {name.rpartition(".")[2]: name for name in reversed(keys)}
    close = "" if leaf in leaves else did_you_mean(leaf, {name: f"{prefix}{name}" for name in sorted(siblings)})
    return close or did_you_mean(leaf, leaves) or SEE_SCHEMA + (f", section {section}" if prefix else "")


def _convert(value: Any, hint: Any) -> Any:
    """The value converted to the type of a hint; raises ValueError if it is of another type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    mismatch = ValueError(f"expected {_type_name(hint)}, found {shown(value)}")
    if origin in (typing.Union, types.UnionType):
        # literals first: `pruned` is a choice, not a list of one name
        for option in sorted(arguments, key=lambda option: getattr(option, "__origin__", None) is not Literal):
            with contextlib.suppress(ValueError):
                return _convert(value, option)
        for option in arguments:
            if typing.get_origin(option) is list and isinstance(value, list):
                _convert(value, option)  # raises a more specific error about an item of the list
        raise mismatch
    if origin is Literal:
        if value in arguments and not isinstance(value, bool):
            return value
        names = ", ".join(map(str, arguments))
        raise ValueError(f"{shown(value)} is not one of {names}{did_you_mean(str(value), map(str, arguments))}")
    if origin is list:
        items = value.split(",") if isinstance(value, str) and value != "all-linear" else value
        if not isinstance(items, list):
            raise mismatch
        if items == ["none"] and typing.get_origin(arguments[0]) is Literal:
            names = ", ".join(map(str, typing.get_args(arguments[0])))
            raise ValueError(f"{shown(value)} is not one of {names}; write [] for none of them")
        return [_convert(item.strip() if isinstance(item, str) else item, arguments[0]) for item in items]
    if origin is dict:
        if not isinstance(value, dict):
            raise mismatch
        return {str(name): _convert(item, arguments[1]) for name, item in value.items()}
    if hint is Pattern:
        return Pattern.parse(value)
    if not isinstance(value, int | float if hint is float else hint) or value == "":
        raise mismatch
    if isinstance(value, bool) and hint is not bool:  # bool is a subclass of int
        raise mismatch
    return float(value) if hint is float else value


def _known_or_converted(value: Any, hint: Any, group: str | None) -> Any:
    """As :func:`_convert`; a name of the group of plugins is valid, too."""
    try:
        return _convert(value, hint)
    except ValueError as error:
        if group is None or not isinstance(value, str):
            raise
        if plugins.has(group, value):
            return value
        hint_of_plugins = "" if "did you mean" in str(error) else "; for one of your own, --import its module"
        raise ValueError(f"{error}{hint_of_plugins}") from error


def _expanded(value: Any) -> Any:
    """A path, a list of paths or weights of paths, with every ``~`` expanded."""
    if isinstance(value, dict):
        weights = {expand(name): weight for name, weight in value.items()}
        if len(weights) < len(value):
            raise ValueError(f"two of {', '.join(value)} are the same path")
        return weights
    return [expand(name) for name in value] if isinstance(value, list) else value and expand(value)


def _check_bounds(value: Any, bounds: Mapping[str, float]) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if math.isinf(value):
        raise ValueError(f"{value} is not a finite number")
    if isinstance(value, int) and abs(value) >= LARGEST:
        raise ValueError(f"{value} is too large (64 bits)")
    violated = [
        f"{text} {bounds[name]:.10g}"
        for name, (holds, text) in BOUNDS.items()
        if name in bounds and not holds(value, bounds[name])  # NaN violates every bound
    ]
    if violated:
        raise ValueError(f"{value} must be {' and '.join(violated)}")


def _check_combinations(config: Config, problems: Problems) -> None:
    """Adds problems of keys that contradict each other."""
    prune, train = config.prune, config.train
    if config.model.path is None:
        problems.add("model.path", "not set", "name a hub id, a local directory or package:NAME (--model)")
    if train.batch_size % train.micro_batch_size:
        problem = f"{train.micro_batch_size} does not divide train.batch_size {train.batch_size}"
        problems.add("train.micro_batch_size", problem)
    if prune.order == "module" and prune.reconstruct_epochs:
        problem = "needs the dense block's output, which prune.order module never computes"
        problems.add("prune.reconstruct_epochs", problem)
    if prune.mask_from is not None and prune.allocation != "uniform":
        problem = "the mask of prune.mask_from already determines the zeros"
        problems.add("prune.allocation", problem, "leave out one of the two")
    if prune.permute_channels:
        for key, uses in (("refresh.steps", train.refresh.steps), ("distill.hidden", train.distill.hidden)):
            if uses:
                problem = "compares with the dense model channel by channel, which prune.permute_channels reorders"
                problems.add(f"train.{key}", problem, "leave out one of the two")
    interval = {"eval_loss": "eval_steps", "perplexity": "perplexity_steps"}.get(train.keep_best or "")
    if interval is not None and getattr(train, interval) is None:
        problem = f"train.keep_best={train.keep_best} needs measurements"
        problems.add(f"train.{interval}", problem, "set the optimizer steps between two of them")
    if train.patience is not None and train.keep_best is None:
        problem = "without train.keep_best there are no measurements to wait for"
        problems.add("train.patience", problem, "set train.keep_best to eval_loss or perplexity")
    for key, names in (("prune.targets", prune.targets), ("train.targets", train.targets)):
        if names == []:
            problems.add(key, "an empty list", "name at least one layer")


# --- describing -------------------------------------------------------------------------------------------------------


def config_keys() -> list[str]:
    """Every key in dotted form, in order."""
    return list(flatten(to_dict(Config())))


def schema(section: str = "") -> list[dict[str, Any]]:
    """An entry for each key, of a section or of all: key, type, default, meaning; UserError: no such section or key."""
    return [entry for entry in _entries_of(section) if "type" in entry]


def schema_yaml(section: str = "") -> str:
    """The schema as YAML: every key with its default, above it a comment with its meaning and type.

    The text is itself a configuration, the default one; or a ``section`` of it.
    """
    text = ""
    for entry in _entries_of(section):
        *parents, name = entry["key"].split(".")
        kind = f" ({entry['type']})" if "type" in entry else ""
        comment = textwrap.indent(textwrap.fill(entry["meaning"] + kind, 100), "# ")
        value = f" {dump_yaml(entry['default'], flow=True)}" if "type" in entry else "\n"
        text += textwrap.indent(f"{comment}\n{name}:{value}", "  " * len(parents))
    return text


def _entries_of(section: str) -> list[dict[str, Any]]:
    """The entries of a section or key, and of the sections that it is in; empty: all."""
    entries = {entry["key"]: entry for entry in _entries(Config(), "")}
    if section and section not in entries:
        raise UserError("--schema", f"{section} is not a section or key{_suggestion(section)}")
    return [
        entry
        for key, entry in entries.items()
        if not section or f"{key}.".startswith(f"{section}.") or section.startswith(f"{key}.")
    ]


def _entries(config: Any, prefix: str) -> Iterator[dict[str, Any]]:
    """An entry for each section (key and meaning), followed by those of its keys."""
    hints = typing.get_type_hints(type(config))
    for f in dataclasses.fields(config):
        key, value = f"{prefix}{f.name}", getattr(config, f.name)
        if not f.metadata:  # a section
            yield {"key": key, "meaning": (inspect.getdoc(value) or "").partition("\n")[0]}
            yield from _entries(value, f"{key}.")
        else:
            kind = re.sub(r"\ban? ", "", _type_name(hints[f.name]))
            yield {"key": key, "type": kind, "default": _plain(value), "meaning": f.metadata["meaning"]}


def to_dict(config: Any, *, results_only: bool = False, recorded: bool = False) -> Tree:
    """The configuration as plain data for YAML and JSON.

    ``results_only``: without keys that cannot change a result. ``recorded``: without later keys that have their default
    (see :mod:`sppctl.config.settings`); :func:`sppctl.config.recorded.completed` adds them.
    """
    plain: Tree = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if not f.metadata:  # a section
            section = to_dict(value, results_only=results_only, recorded=recorded)
            plain |= {f.name: section} if section else {}
        elif recorded and f.metadata["later"] and value == f.default:
            continue
        elif f.metadata["affects_result"] or not results_only:
            plain[f.name] = _plain(value)
    return plain


def result_keys(config: Any) -> Tree:
    """:func:`to_dict` without the keys that cannot change a result (devices, batch sizes, logging)."""
    return to_dict(config, results_only=True)


def to_yaml(config: Config) -> str:
    """The configuration as YAML that readers of 1.1 and 1.2 understand alike."""
    return dump_yaml(to_dict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, Pattern):
        return str(value) if value.is_structured else value.ratio
    return {name: _plain(item) for name, item in value.items()} if isinstance(value, dict) else value


def flatten(tree: Mapping[str, Any], prefix: str = "", keys: Collection[str] = ()) -> Tree:
    """Nested sections to dotted keys; the values of ``keys`` are left as they are, mappings too."""
    flat: Tree = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        nested = isinstance(value, Mapping) and value and key not in keys
        flat |= flatten(value, f"{key}.", keys) if nested else {key: value}
    return flat


def _type_name(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_type_name, arguments))
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin is list:
        return f"a list of {'numbers' if arguments == (float,) else 'names'}"
    if origin is dict:
        return f"a mapping of name to {_type_name(arguments[1])}"
    return TYPE_NAMES[hint]


def shown(value: Any) -> str:
    """A value and its kind for an error, truncated if it is long."""
    kinds: dict[type, str] = {str: "the text ", list: "the list ", dict: "the section "}
    text = "null" if value is None else repr(value)
    return kinds.get(type(value), "") + (text if len(text) <= SHOWN else f"{text[:SHOWN]}...")
