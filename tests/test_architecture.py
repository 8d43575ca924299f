"""Which part of sppctl may know which: the arrows of the design, read from the import statements."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import sppctl

PACKAGE = Path(sppctl.__file__).resolve().parent
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

# cli -> sweep -> pipeline -> stages -> lm, adapters -> pruning -> pattern; cli -> config -> pattern
MAY_IMPORT = {
    "__init__": {"adapters", "pruning", "pattern"},  # the public names, imported when they are asked for
    "__main__": {"cli"},
    "cli": {
        "sweep",
        "sweep_jobs",
        "grid",
        "paths",
        "pipeline",
        "run_directory",
        "stages",
        "lm",
        "config",
        "settings",
        "pattern",
        "console",
        "errors",
        "distributed",
        "launch",
    },
    "sweep": {"attempts", "grid", "pipeline", "launch", "run_directory", "config", "console", "errors", "distributed"},
    "sweep_jobs": {"grid", "errors"},
    "grid": {"config", "settings", "errors", "paths", "yaml12"},
    "launch": {"settings", "console", "errors", "distributed"},
    "pipeline": {
        "paths",
        "run_directory",
        "attempts",
        "files",
        "stages",
        "lm",
        "config",
        "settings",
        "pattern",
        "console",
        "errors",
        "distributed",
        "launch",
        "machine",
    },
    "stages": {
        "attempts",
        "files",
        "paths",
        "lm",
        "adapters",
        "pruning",
        "config",
        "settings",
        "pattern",
        "console",
        "errors",
        "distributed",
        "launch",
        "yaml12",
        "machine",
        "strict_json",
        "sealed",
    },
    "lm": {"pruning", "pattern", "errors", "distributed", "files", "machine", "strict_json", "sealed", "console"},
    "adapters": {"pruning", "pattern"},
    "pruning": {"pattern"},
    "run_directory": {
        "attempts",
        "files",
        "lm",
        "config",
        "settings",
        "console",
        "errors",
        "distributed",
        "machine",
        "strict_json",
        "sealed",
    },
    "attempts": {"config", "errors", "sealed"},
    "sealed": {"errors", "strict_json"},
    "config": {"settings", "pattern", "errors", "paths", "yaml12"},
    "settings": {"pattern"},
    "yaml12": {"errors"},
    "console": {"distributed", "strict_json"},
    "distributed": {"errors"},
    "errors": set(),
    "paths": {"errors"},
    "files": {"errors"},
    "machine": set(),
    "pattern": set(),
    "strict_json": {"files"},
}
LIGHT = [
    "__init__",
    "__main__",
    "attempts",
    "cli",
    "config",
    "settings",
    "console",
    "distributed",
    "errors",
    "files",
    "grid",
    "launch",
    "machine",
    "paths",
    "pattern",
    "pipeline",
    "run_directory",
    "strict_json",
    "sealed",
    "sweep",
    "sweep_jobs",
    "yaml12",
]
HEAVY = {"torch", "transformers", "peft", "datasets", "lm_eval", "accelerate", "safetensors", "matplotlib", "rich"}


@dataclass(frozen=True)
class Import:
    """One imported module, by its full name; ``lazy``: inside a function, or only for type checkers."""

    name: str
    line: int
    lazy: bool

    @property
    def top(self) -> str:
        return self.name.partition(".")[0]


def imports_of(module: str) -> Iterator[Import]:
    tree = ast.parse((PACKAGE / module).read_text(encoding="utf-8"))
    yield from _walk(tree, lazy=False)


def _walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        inside = lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or _for_types(child)
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, inside) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert not child.level, "imports are absolute"
            for alias in child.names:
                full = f"{child.module}.{alias.name}"
                yield Import(full if _is_module(full) else str(child.module), child.lineno, inside)
        else:
            yield from _walk(child, inside)


def _for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _is_module(name: str) -> bool:
    if not name.startswith("sppctl."):
        return False
    path = PACKAGE.joinpath(*name.split(".")[1:])
    return path.is_dir() or path.with_suffix(".py").is_file()


def room_of(module: str) -> str:
    """``lm/data.py`` -> ``lm``, ``cli.py`` -> ``cli``."""
    return module.partition("/")[0].removesuffix(".py")


def outside_imports(module: str) -> set[str]:
    """Top-level names of everything a module imports that is neither sppctl's nor the standard library's."""
    return {found.top for found in imports_of(module)} - sys.stdlib_module_names - {"sppctl"}


def test_every_room_has_its_place_in_the_order() -> None:
    assert {room_of(module) for module in MODULES} <= MAY_IMPORT.keys()


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_downwards(module: str) -> None:
    room = room_of(module)
    wrong = []
    for found in imports_of(module):
        if found.top != "sppctl" or found.name == "sppctl":  # sppctl itself: its version
            continue
        target = found.name.split(".")[1]
        if target != room and target not in MAY_IMPORT[room]:
            wrong.append(f"line {found.line}: {room} must not import {found.name}")
    assert not wrong


def test_the_order_has_no_cycle() -> None:
    order = {room: depth for depth, room in enumerate(_from_the_bottom())}
    assert order.keys() == MAY_IMPORT.keys()


def _from_the_bottom() -> Iterator[str]:
    left = dict(MAY_IMPORT)
    while left:
        free = [room for room, below in left.items() if not below & left.keys()]
        assert free, f"a cycle among {sorted(left)}"
        for room in free:
            del left[room]
        yield from free


@pytest.mark.parametrize("module", [m for m in MODULES if room_of(m) in ("lm", "adapters", "pruning", "pattern")])
def test_nothing_below_the_stages_knows_the_configuration(module: str) -> None:
    assert "sppctl.config" not in {found.name for found in imports_of(module)}


@pytest.mark.parametrize("module", [m for m in MODULES if room_of(m) == "pruning"])
def test_pruning_is_torch_and_pattern_alone(module: str) -> None:
    assert outside_imports(module) <= {"torch"}
    own = {found.name for found in imports_of(module) if found.top == "sppctl"}
    assert all(name == "sppctl.pattern" or name.startswith("sppctl.pruning") for name in own)


@pytest.mark.parametrize("module", [f"{name}.py" for name in LIGHT])
def test_the_command_line_starts_without_heavy_libraries(module: str) -> None:
    heavy = {
        found.name
        for found in imports_of(module)
        if not found.lazy and (found.top in HEAVY or found.name.startswith(("sppctl.lm", "sppctl.stages")))
    }
    assert not heavy


@pytest.mark.parametrize("module", [m for m in MODULES if room_of(m) != "lm"])
def test_only_lm_knows_datasets_and_lm_eval(module: str) -> None:
    assert not outside_imports(module) & {"datasets", "lm_eval", "huggingface_hub"}


@pytest.mark.parametrize(
    "module", [m for m in MODULES if room_of(m) in ("config", "settings", "pattern", "errors", "console")]
)
def test_schema_and_pattern_need_no_torch_at_all(module: str) -> None:
    assert not outside_imports(module) & {"torch", "transformers"}


@pytest.mark.parametrize("module", [m for m in MODULES if room_of(m) != "__main__"])
def test_every_module_says_what_it_is_for(module: str) -> None:
    assert ast.get_docstring(ast.parse((PACKAGE / module).read_text(encoding="utf-8")))


def test_walking_the_syntax_tree_sees_imports_wherever_they_stand() -> None:
    found = list(imports_of("cli.py"))
    assert Import("sppctl.config", next(f.line for f in found if f.name == "sppctl.config"), lazy=False) in found
    assert any(f.name == "sppctl.pipeline" and f.lazy for f in found)
