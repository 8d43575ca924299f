"""Reads YAML 1.2, where 2:4 is text, 4e-3 a number and `no` text, and writes YAML that 1.1 and 1.2 read alike.

Files are not trusted: size, depth, aliases and numbers are bounded, so that no file takes long to read.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from sppctl.errors import UserError

MOST_BYTES = 1 << 18
MOST_VALUES = 10_000  # with every alias expanded
DEEPEST = 32
LONGEST_NUMBER = 40  # characters


def _error(problem: str, at: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


class _Loader(yaml.SafeLoader):
    """A loader of YAML 1.2; PyYAML follows 1.1, where 2:4 is the number 124, 4e-3 is text and `no` is false."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    # the types of YAML 1.2's core schema; any other tag is an error
    yaml_constructors = {
        tag: make
        for tag, make in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._values = 0
        self._sizes: dict[int, int] = {}  # number of values in each finished node, by its id

    def compose_node(self, parent: Any, index: Any) -> Any:
        event, before = self.peek_event(), self._values
        self._depth += 1
        self._values += 1
        if self._depth > DEEPEST:
            raise _error(f"more than {DEEPEST} levels", event)
        node = super().compose_node(parent, index)
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._sizes:
                raise _error(f"*{event.anchor} refers to a node that contains it", event)
            self._values = before + self._sizes[id(node)]
        if self._values > MOST_VALUES:
            raise _error(f"more than {MOST_VALUES:,} values", event)
        self._sizes[id(node)] = self._values - before
        self._depth -= 1
        return node

    def construct_yaml_str(self, node: yaml.ScalarNode) -> str:
        text: str = self.construct_scalar(node)
        if re.search("[\0\ud800-\udfff]", text):
            raise _error(f"{text!r:.60} is not text", node)
        return text

    def _number(self, node: yaml.ScalarNode) -> str:
        text: str = self.construct_scalar(node)
        if len(text) > LONGEST_NUMBER:
            raise _error(f"a number of {len(text):,} characters, more than {LONGEST_NUMBER}", node)
        return text

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = self._number(node)
        return int(text, 0) if text[:2] in ("0x", "0o") else int(text)

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        return float(re.sub(r"^([-+]?)\.(inf|nan)$", r"\1\2", self._number(node).lower()))

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key_node, yaml.ScalarNode):
                raise _error("a list or section as a key", key_node)
            if key_node.value in seen:
                where = f"line {key_node.start_mark.line + 1}"
                raise yaml.MarkedYAMLError(problem=f"key {key_node.value!r:.60} appears twice, again in {where}")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
for _tag, _expression, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_expression})$"), _first)
for _tag in ("int", "float", "str"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", getattr(_Loader, f"construct_yaml_{_tag}"))


class _Dumper(yaml.SafeDumper):
    """A dumper that quotes text which either version of YAML would read as another type."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {
        first: [
            *yaml.SafeDumper.yaml_implicit_resolvers.get(first, []),
            *_Loader.yaml_implicit_resolvers.get(first, []),
        ]
        for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
    }


def read_yaml(path: Path) -> Any:
    """Reads a file of YAML 1.2; raises UserError as :func:`read_text` and :func:`parse_yaml` do."""
    return parse_yaml(read_text(path), str(path))


def read_text(path: Path) -> str:
    """The text of a configuration; raises UserError if it is not a regular file, too large, or not UTF-8."""
    try:
        if not path.is_file():
            raise UserError(f"{path} is not a regular file; give a YAML file")
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise UserError(f"{path} has {size:,} bytes, more than the {MOST_BYTES:,} of a configuration")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def parse_yaml(text: str, source: str) -> Any:
    """Reads YAML 1.2; ``source`` names the text in errors.

    Raises:
        UserError: not YAML, or larger or deeper than any configuration.
    """
    try:
        if len(text) > MOST_BYTES:
            raise yaml.YAMLError(f"more than {MOST_BYTES:,} characters")
        return yaml.load(text, Loader=_Loader)  # noqa: S506  (a SafeLoader)
    except (yaml.YAMLError, ValueError, LookupError) as error:  # LookupError: a value that does not match its tag
        raise UserError(source, f"not valid YAML: {' '.join(str(error).split())}") from error


def dump_yaml(value: Any, *, flow: bool = False) -> str:
    """Plain data as YAML that readers of 1.1 and 1.2 understand alike; ``flow``: on one line."""
    width = math.inf if flow else 120
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=flow, width=width)
    return text.removesuffix("...\n")  # after a scalar


def inline(value: Any) -> Any:
    """A value for a line of text: a mapping as YAML, anything else as it is."""
    return dump_yaml(value, flow=True).strip() if isinstance(value, dict) else value
