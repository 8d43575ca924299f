"""YAML 1.2 for people: 2:4 is text, 4e-3 a number, `no` a word; and what is written, both versions read alike."""

from __future__ import annotations

import re
from typing import Any

import yaml

from sppctl.errors import UserError


class _Loader(yaml.SafeLoader):
    """YAML 1.1, which PyYAML follows, takes 2:4 for the number 124, 4e-3 for text and `no` for false; 1.2 does not."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        return int(text, 0) if text[:2] in ("0x", "0o") else int(text)

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        return float(re.sub(r"^([-+]?)\.(inf|nan)$", r"\1\2", self.construct_scalar(node).lower()))

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                where = f"line {key_node.start_mark.line + 1}"
                raise yaml.MarkedYAMLError(problem=f"key {key_node.value!r} stands twice, again in {where}")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


for _tag, _expression, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_expression})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would take for something else."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {
        first: [
            *yaml.SafeDumper.yaml_implicit_resolvers.get(first, []),
            *_Loader.yaml_implicit_resolvers.get(first, []),
        ]
        for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
    }


def parse_yaml(text: str, source: str) -> Any:
    """Reads YAML 1.2; ``source`` names the text in errors.

    Raises:
        UserError: not YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506  (a SafeLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from error


def dump_yaml(value: Any) -> str:
    """Plain data as YAML that both 1.1 and 1.2 readers take alike."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=120)
