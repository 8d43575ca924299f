"""Reads and describes the configuration: YAML 1.2 files, over which ``key=value`` overrides win.

Precedence: command line over YAML over the defaults of :mod:`sppctl.config.settings`. Every problem is reported in one
message.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import math
import os
import re
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from sppctl.config.settings import Config
from sppctl.config.yaml12 import DEEPEST, dump_yaml, parse_yaml, read_yaml
from sppctl.errors import UserError
from sppctl.files.paths import expand
from sppctl.pattern import Pattern

LARGEST = 2**63
SHOWN = 200  # characters of a value in an error

# --- reading ----------------------------------------------------------------------------------------------------------


def shipped_configs() -> dict[str, Path]:
    """The configurations of runs that come with sppctl, by name."""
    return {path.stem: path for path in _shipped() if not _is_sweep(path)}


def shipped_sweeps() -> dict[str, Path]:
    """The sweeps that come with sppctl, by name."""
    return {path.stem: path for path in _shipped() if _is_sweep(path)}


def _shipped() -> list[Path]:
    package = Path(__file__).resolve().parents[1]
    folder = next((path for path in (package / "configs", package.parent / "configs") if path.is_dir()), None)
    return sorted(folder.glob("*.yaml")) if folder else []


def _is_sweep(path: Path) -> bool:
    return re.search(r"^grid:", path.read_text(encoding="utf-8"), re.MULTILINE) is not None


def find_config(name: str | None) -> Path:
    """The file a CONFIG argument means: a path, the name of a shipped configuration, or quickstart if None.

    Raises:
        UserError: there is no such file.
    """
    shipped = shipped_configs()
    if name is None:
        return shipped["quickstart"]
    if os.path.isdir(name):
        raise UserError(f"config {name} is a directory; name the YAML file in it")
    if os.path.exists(name):
        return Path(name)
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
    tree = read_yaml(path)
    problems: list[str] = []
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected sections such as 'model:' and 'prune:', found {shown(tree)}")
    if "grid" in tree:
        raise UserError(f"{path} is a sweep, not the configuration of one run: sppctl sweep {path}")
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
        if len(parents) > DEEPEST:
            out.append(f"command line: {key:.60}...: unknown key; see `sppctl config --schema`")
            continue
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
        context.report(prefix.rstrip("."), f"expected a section with keys, found {shown(tree)}")
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
                if known[name].metadata["path"]:
                    values[name] = _expanded(values[name])
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
    prefix = f"{section}." if inside else ""
    beside = {name.removeprefix(prefix).partition(".")[0] for name in inside or every}
    leaves = {name.rpartition(".")[2]: name for name in reversed(inside or every)}
    siblings = {} if leaf in leaves else {name: f"{prefix}{name}" for name in sorted(beside)}
    close = did_you_mean(leaf, siblings) or did_you_mean(leaf, leaves)
    return close or f"; see `sppctl config --schema`{f', section {section}' if inside else ''}"


def did_you_mean(name: str, known: Mapping[str, str] | Iterable[str]) -> str:
    """The end of an error about an unknown name: the known one that is most like it; empty if none is.

    Args:
        name: that is not known.
        known: all that are, perhaps with what to print for each.
    """
    shown_as = dict(known) if isinstance(known, Mapping) else {each: each for each in known}
    close = difflib.get_close_matches(name, shown_as, n=1, cutoff=0.6)
    return f"; did you mean {shown_as[close[0]]}?" if close else ""


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
        raise ValueError(f"expected {_type_name(hint)}, found {shown(value)}")
    if origin is Literal:
        if value in arguments and not isinstance(value, bool):
            return value
        names = ", ".join(map(str, arguments))
        raise ValueError(f"{shown(value)} is not one of {names}{did_you_mean(str(value), map(str, arguments))}")
    if origin is list:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list) or (isinstance(value, str) and value == "all-linear"):
            raise ValueError(f"expected {_type_name(hint)}, found {shown(value)}")
        return [_convert(item.strip() if isinstance(item, str) else item, arguments[0]) for item in items]
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"expected {_type_name(hint)}, found {shown(value)}")
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
        raise ValueError(f"expected {_type_name(hint)}, found {shown(value)}")
    return value


def _expanded(value: Any) -> Any:
    """A path, a list of paths or weights of paths with every ``~`` replaced, so that nobody else needs to."""
    if isinstance(value, dict):
        found = {expand(name): weight for name, weight in value.items()}
        if len(found) < len(value):
            raise ValueError(f"two of {', '.join(value)} are the same path")
        return found
    return [expand(name) for name in value] if isinstance(value, list) else value and expand(value)


def _check_bounds(value: Any, bounds: Mapping[str, float | None]) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if math.isinf(value):
        raise ValueError(f"{value} is not a finite number")
    if isinstance(value, int) and abs(value) >= LARGEST:
        raise ValueError(f"{value} is larger than any number that is computed with")
    tests = {
        "low": (value >= (bounds["low"] or 0), "at least"),
        "above": (value > (bounds["above"] or 0), "more than"),
        "high": (bounds["high"] is None or value <= bounds["high"], "at most"),
        "below": (bounds["below"] is None or value < bounds["below"], "less than"),
    }
    wrong = [
        f"{words} {bounds[name]:.10g}"
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
    if config.prune.mask_from is not None and config.prune.allocation != "uniform":
        yield "prune.allocation: the mask of prune.mask_from says where the zeros are; leave out one of the two"
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
            {"key": key, "type": _without_articles(hint), "default": _plain(default), "meaning": f.metadata["meaning"]}
        )
    return entries


def schema_yaml() -> str:
    """The schema as YAML: every key with its default, above it a comment with its meaning and type.

    The text is itself a configuration, the default one.
    """
    return "".join(_section_yaml(Config(), ""))


def _section_yaml(config: Any, indent: str) -> Iterator[str]:
    hints = typing.get_type_hints(type(config))
    for f in fields(config):
        value = getattr(config, f.name)
        if _is_section(type(value)):
            yield f"{indent}# {(inspect.getdoc(type(value)) or '').splitlines()[0]}\n{indent}{f.name}:\n"
            yield from _section_yaml(value, f"{indent}  ")
        else:
            comment = f"{f.metadata['meaning']} ({_without_articles(hints[f.name])})"
            yield textwrap.indent("\n".join(textwrap.wrap(comment, 100)), f"{indent}# ") + "\n"
            yield textwrap.indent(dump_yaml({f.name: _plain(value)}, flow=True), indent)


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
        return f"a list of {'numbers' if arguments == (float,) else 'names'}"
    if origin is dict:
        return f"a mapping of name to {_type_name(arguments[1])}"
    names = {int: "an integer", float: "a number", str: "text", bool: "true or false", types.NoneType: "null"}
    return names.get(hint, "N:M or a ratio" if hint is Pattern else str(hint))


def _without_articles(hint: Any) -> str:
    return re.sub(r"\ban? ", "", _type_name(hint))


def shown(value: Any) -> str:
    """A value and its kind for an error, cut where it is long."""
    kind = {str: "the text ", bool: "", int: "", float: "", list: "the list ", dict: "the section "}
    text = "null" if value is None else repr(value)
    return kind.get(type(value), "") + (text if len(text) <= SHOWN else f"{text[:SHOWN]}...")
