"""The arrows between the rooms of sppctl, read from its import statements; docs/design.md draws them."""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import sppctl

PACKAGE = Path(sppctl.__file__).resolve().parent
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

# each room imports only rooms further down, of those only what stands behind it
ROOMS = """
__main__     cli
cli          options sweep run show publish plan doctor inspect model launch config files console distributed records \
             plugins errors pattern
options      model launch config files console plugins errors
show         sweep run publish report evaluate doctor inspect console distributed records pattern
sweep        run report launch config files console distributed plugins errors
__init__     prune merge evaluate adapters pruners pattern
run          publish report plan merge train prune evaluate data model launch config files console distributed machine \
             records errors
publish      report evaluate data model config files console machine records errors
report       evaluate config files console records errors
plan         train prune pruners data model packed launch config console distributed machine errors pattern
merge        adapters pruners model config files console machine records errors pattern
train        evaluate adapters packed pruners data model launch config files console distributed records errors pattern
prune        pruners data model launch config files console distributed machine records errors pattern
evaluate     inspect packed data model config files console distributed machine errors
doctor       inspect adapters packed pruners files machine fused errors
inspect      pruners model packed files console machine errors pattern
adapters     packed pruners files fused pattern
pruners      plugins fused pattern errors
data         files console errors
model        packed files console distributed machine errors pattern
launch       config console distributed plugins errors
config       files plugins errors pattern
records      files console errors pattern
console      files distributed
files        errors
distributed  errors
plugins      errors
packed       fused
machine
fused        errors
pattern
errors
"""
TABLE = {room: below.split() for room, _, below in (line.partition(" ") for line in ROOMS.strip().splitlines())}
CONFIGURED = {"options", "cli", "sweep", "run", "report", "merge", "train", "plan", "prune", "evaluate"}
CONFIGURED |= {"launch", "config", "publish"}
BIGGEST = 1 / 8  # of the code, for a room
# imported when a command starts, so without the libraries that take seconds
LIGHT = ("__main__", "options", "cli", "config", "console", "distributed", "errors", "launch", "machine", "pattern")
LIGHT += ("plugins", "records", "show", "sweep")
HEAVY = {"torch", "transformers", "peft", "datasets", "lm_eval", "accelerate", "safetensors", "matplotlib", "rich"}
LIGHT_FILES = {f"files/{name}.py" for name in ("cache", "disk", "integrity", "names", "paths", "sealed", "strict_json")}
LIGHT_FILES |= {"files/sources.py", "data/chat.py", "data/prompts.py", "data/texts.py", "model/find.py"}
LIGHT_FILES |= {
    f"run/{name}.py" for name in ("attempts", "dense", "directory", "measure", "pipeline", "publish", "stages")
}


# rooms that do not import a library, not even in functions
NO_TORCH = {"config", "console", "errors", "pattern"}
NO_HUB = {*TABLE} - {"data", "doctor", "evaluate", "files", "model", "publish"}
WITHOUT = {
    "torch": NO_TORCH,
    "transformers": NO_TORCH,
    "datasets": NO_HUB,
    "lm_eval": NO_HUB,
    "huggingface_hub": NO_HUB,
}


@dataclass(frozen=True)
class Import:
    """One imported module, by its full name; ``lazy``: inside a function, or only for type checkers."""

    name: str
    line: int
    lazy: bool

    @property
    def top(self) -> str:
        return self.name.partition(".")[0]

    @property
    def room(self) -> str | None:
        """Of sppctl; its version and public names are everybody's."""
        return self.name.split(".")[1] if self.name.startswith("sppctl.") else None

    @property
    def file(self) -> str:
        return "/".join(self.name.split(".")[1:]) + ".py"


def tree_of(module: str) -> ast.Module:
    return ast.parse((PACKAGE / module).read_text(encoding="utf-8"))


def imports_of(node: ast.AST, lazy: bool = False) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        inside = lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name):
            inside |= child.test.id == "TYPE_CHECKING"
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, inside) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert not child.level, "imports are absolute"
            for alias in child.names:
                full = f"{child.module}.{alias.name}"
                yield Import(full if _is_module(full) else str(child.module), child.lineno, inside)
        else:
            yield from imports_of(child, inside)


def _is_module(name: str) -> bool:
    path = PACKAGE.joinpath(*name.split(".")[1:])
    return name.startswith("sppctl.") and (path.is_dir() or path.with_suffix(".py").is_file())


def room_of(module: str) -> str:
    """``data/texts.py`` -> ``data``, ``cli.py`` -> ``cli``."""
    return module.partition("/")[0].removesuffix(".py")


IMPORTS = {module: list(imports_of(tree_of(module))) for module in MODULES}


def test_the_table_has_every_room_and_points_downwards() -> None:
    assert {room_of(module) for module in MODULES} == TABLE.keys()
    order = list(TABLE)
    assert all(order.index(below) > order.index(room) for room, rooms in TABLE.items() for below in rooms)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_what_the_tables_say(module: str) -> None:
    room = room_of(module)
    assert not {f"line {f.line}: {f.name}" for f in IMPORTS[module] if f.room not in (None, room, *TABLE[room])}
    tops = {found.top for found in IMPORTS[module]}
    assert (
        not {library for libraries, rooms in WITHOUT.items() if room in rooms for library in libraries.split()} & tops
    )
    if room == "pruners":
        assert tops - sys.stdlib_module_names <= {"sppctl", "scipy", "torch", "triton"}
    if module != "__main__.py":
        assert ast.get_docstring(tree_of(module)), "it says what it is for"


def test_the_table_has_no_arrow_that_nobody_uses() -> None:
    used = {(room_of(module), found.room) for module in MODULES for found in IMPORTS[module]}
    assert {(room, below) for room, rooms in TABLE.items() for below in rooms} <= used


def test_no_room_is_too_big_to_hold_in_the_head() -> None:
    lines = Counter[str]()
    for module in MODULES:
        lines[room_of(module)] += len((PACKAGE / module).read_text(encoding="utf-8").splitlines())
    assert max(lines.values()) <= BIGGEST * lines.total(), lines.most_common(3)


def test_only_these_rooms_know_the_configuration() -> None:
    assert {room for room, below in TABLE.items() if "config" in below} | {"config"} == CONFIGURED


@pytest.mark.parametrize("module", [m for m in MODULES if room_of(m) in LIGHT or m in LIGHT_FILES])
def test_the_command_line_starts_without_heavy_libraries(module: str) -> None:
    early = [found for found in IMPORTS[module] if not found.lazy]
    light = {None, *LIGHT}
    assert not {f.name for f in early if f.top in HEAVY or (f.room not in light and f.file not in LIGHT_FILES)}


UNPICKLING = ("pickle", "dill", "joblib", "cloudpickle")


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_unpickled(module: str) -> None:
    """Pickles run code: ``torch.load`` has to be limited to tensors and plain values; ``numpy.load`` is by default."""
    tree = tree_of(module)
    assert not [one.name for one in imports_of(tree) if one.name.partition(".")[0] in UNPICKLING]
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        words = {word.arg: ast.unparse(word.value) for word in call.keywords}
        assert ast.unparse(call.func) != "torch.load" or words.get("weights_only") == "True", call.lineno
        assert "allow_pickle" not in words, call.lineno


def test_walking_the_syntax_tree_sees_imports_wherever_they_are() -> None:
    assert any(f.room == "config" and not f.lazy for f in IMPORTS["cli.py"])
    assert any(f.name == "sppctl.run.pipeline" and f.lazy for f in IMPORTS["cli.py"])
