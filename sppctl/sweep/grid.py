"""Reads the file of a sweep: a grid over configuration keys -> the runs and their shared directories.

Each run has its own directory. Runs with the same pruning share a directory with the pruned checkpoint, and all runs of
a model share one with the results of the dense model. Each directory has its own configuration.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sppctl.config.load import config_keys, find_file, load_config, override_value, quoted, shipped_configs, shown
from sppctl.config.settings import Config
from sppctl.config.yaml12 import read_yaml
from sppctl.errors import UserError, did_you_mean
from sppctl.files import paths

Point = dict[str, Any]  # configuration key -> value
KEYS = ("base", "dir", "grid", "overrides", "exclude")
DENSE, PRUNED, REPORT = "dense", "pruned", "report"
# keys that the checkpoints depend on; the seed, because pruning draws calibration windows with it
DENSE_KEYS = ("model.",)
PRUNED_KEYS = ("model.", "prune.", "run.seed")
SHORT = {"prune.method": "", "prune.pattern": "", "train.method": "", "train.rank": "r", "run.seed": "s"}
MOST_RUNS = 10_000
OWN_DIRECTORY = "a sweep names the directories of its runs; set their parent folder with `dir`"


@dataclass(frozen=True)
class Member:
    """One directory of a sweep."""

    name: str  # name of the directory
    parent: str | None  # the member whose checkpoints and results it uses
    arguments: tuple[str, ...]  # CONFIG and KEY=VALUE for ``sppctl``
    config: Config


@dataclass(frozen=True)
class Sweep:
    """All directories of a sweep, by name; ``runs`` in the order of the grid."""

    file: Path
    directory: Path
    dense: dict[str, Member] = field(default_factory=dict)
    pruned: dict[str, Member] = field(default_factory=dict)
    runs: dict[str, Member] = field(default_factory=dict)

    def members(self) -> Iterator[Member]:
        """All members, each after its parent, and the runs of one pruned checkpoint together."""
        for dense in self.dense.values():
            yield dense
            for pruned in self.children(dense):
                yield from (pruned, *self.children(pruned))

    def children(self, parent: Member) -> list[Member]:
        """The members whose parent is this member."""
        return [member for member in (self.pruned | self.runs).values() if member.parent == parent.name]

    def runs_of(self, member: Member) -> list[Member]:
        """The runs that depend on a member; of a run, itself."""
        children = self.children(member)
        return [run for child in children for run in self.runs_of(child)] if children else [member]


def load_sweep(name: str, overrides: Sequence[str] = ()) -> Sweep:
    """Reads a sweep file, or a shipped one, and resolves the configuration of every run.

    The overrides, KEY=VALUE, apply to all runs: an overridden key is removed from the grid, and run.dir sets the
    directory of the sweep.

    Raises:
        UserError: every problem of the file and of its configurations, one per line.
    """
    path = find_file(name, sweep=True)
    tree = read_yaml(path)
    problems = list(_problems(tree))
    if problems:
        raise UserError("\n".join(f"{path}: {problem}" for problem in problems))
    override_of = {text.partition("=")[0].strip(): text for text in overrides}
    run_dir = override_value("run.dir", override_of.pop("run.dir", "").partition("=")[2])
    if not isinstance(run_dir, str | None):
        raise UserError("command line: run.dir", f"expected text, found {shown(run_dir)}")
    directory = Path(paths.expand(run_dir or tree.get("dir") or f"runs/{path.stem}"))
    grid = {key: values for key, values in tree["grid"].items() if key not in override_of}
    if math.prod(map(len, grid.values())) > MOST_RUNS:
        raise UserError(f"{path}: grid", f"more than {MOST_RUNS:,} combinations", "split it into several sweeps")
    texts = {key: override_of[key].partition("=")[2] for key in tree["grid"] if key in override_of}
    fixed = {key: override_value(key, text) for key, text in texts.items()}
    points = expand(grid, tree.get("exclude") or [], fixed)
    if not points:
        raise UserError(f"{path}: exclude", "leaves no run")
    sweep = Sweep(path, directory)
    resolver = _Resolver(sweep, tree, override_of, [key for key, values in grid.items() if len(values) > 1])
    for point in points:
        resolver.add(point)
    raise_problems(resolver.problems, len(points))
    if len(sweep.runs) < len(points):
        raise UserError(f"{path}: grid", "two combinations would have the same directory", "write values that differ")
    return sweep


def expand(
    grid: Mapping[str, Sequence[Any]], exclude: Sequence[Point] = (), fixed: Mapping[str, Any] | None = None
) -> list[Point]:
    """All combinations of the grid's values, the last key varying fastest, without those that match an exclusion.

    ``fixed``: values of keys that the command line has removed from the grid.
    """
    points, fixed = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())], fixed or {}
    possible = [rule for rule in exclude if all(rule[key] == fixed[key] for key in rule.keys() & fixed.keys())]
    rules = [{key: value for key, value in rule.items() if key not in fixed} for rule in possible]
    return [point for point in points if not any(rule and rule.items() <= point.items() for rule in rules)]


def run_name(point: Mapping[str, Any], varying: Sequence[str]) -> str:
    """The values of the keys that vary, such as wanda-2of4-spp-r16-s0; empty if no key varies."""
    order = [key for key in config_keys() if not key.startswith("run.")] + ["run.seed"]
    return paths.file_stem("-".join(_word(key, point[key]) for key in sorted(varying, key=order.index)))


def _word(key: str, value: Any) -> str:
    text = str(value).replace(":", "of") if key == "prune.pattern" else str(value)
    leaf = key.rpartition(".")[2].replace("_", "")
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return SHORT.get(key, leaf if is_number else f"{leaf}-") + re.sub(r"[^\w.]+", "-", text).strip("-.")


# --- the file ---------------------------------------------------------------------------------------------------------


def _problems(tree: Any) -> Iterator[str]:
    if not isinstance(tree, dict) or "grid" not in tree:
        needed = "configuration keys with the lists of their values (prune.pattern: [2:4, 4:8])"
        yield f"a sweep needs `grid:`, {needed}; {_example()}"
        return
    for key in tree:
        if key not in KEYS:
            keys = f"; a sweep has {', '.join(KEYS)}; {_example()}"
            yield f"{key}: unknown key{did_you_mean(str(key), KEYS) or keys}"
    for key in ("base", "dir"):
        if key in tree and not (isinstance(tree[key], str) and tree[key]):
            yield f"{key}: expected text, found {shown(tree[key])}"
    grid, overrides, exclude = tree["grid"], tree.get("overrides") or {}, tree.get("exclude") or []
    if not isinstance(overrides, dict):
        yield f"overrides: expected KEY: VALUE, found {shown(overrides)}"
        overrides = {}
    if not isinstance(grid, dict) or not grid:
        yield f"grid: expected KEY: [VALUES], found {shown(grid)}"
        return
    for key, values in grid.items():
        yield from _grid_problems(str(key), values)
        if key in overrides:
            yield f"overrides: {key} is in the grid too; leave it in one of them"
    if "run.dir" in overrides:
        yield f"overrides: run.dir: {OWN_DIRECTORY}"
    if not isinstance(exclude, list):
        yield f"exclude: expected a list of combinations, found {shown(exclude)}"
        return
    for number, rule in enumerate(exclude, 1):
        yield from (f"exclude, entry {number}: {problem}" for problem in _rule_problems(rule, grid))


def _example() -> str:
    return f"docs/evaluation.md describes sweeps, {shipped_configs(sweeps=True)['sweep-example']} is an example"


def _grid_problems(key: str, values: Any) -> Iterator[str]:
    if key == "run.dir":
        yield f"grid: run.dir: {OWN_DIRECTORY}"
    elif key not in (known := config_keys()):
        yield f"grid: {key}: unknown key{did_you_mean(key, known) or '; see `sppctl config --schema`'}"
    if not isinstance(values, list) or not values:
        yield f"grid: {key}: expected a list of values, found {shown(values)}"
    elif any(value in values[:index] for index, value in enumerate(values)):
        yield f"grid: {key}: duplicate value in {values!r}"


def _rule_problems(rule: Any, grid: Mapping[str, Any]) -> Iterator[str]:
    if not isinstance(rule, dict) or not rule:
        yield f"expected KEY: VALUE of the grid, found {shown(rule)}"
        return
    for key, value in rule.items():
        if key not in grid:
            yield f"{key} is not in the grid{did_you_mean(str(key), list(grid))}"
        elif isinstance(grid[key], list) and value not in grid[key]:
            yield f"{key}: {value!r} is not in the grid's {grid[key]!r}"


# --- configurations ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Resolver:
    """Adds members to a sweep, and collects the problems of their configurations."""

    sweep: Sweep
    tree: Mapping[str, Any]  # content of the file
    override_of: Mapping[str, str]  # KEY=VALUE of the command line, by key
    varying: Sequence[str]  # keys with several values
    problems: dict[str, list[str]] = field(default_factory=dict)  # names of the runs by problem

    def add(self, point: Point) -> None:
        """Adds a run and, if they are new, the members that it shares with other runs."""
        sweep, names = self.sweep, {}
        for name, prefixes in ((DENSE, DENSE_KEYS), (PRUNED, PRUNED_KEYS)):
            keys = [key for key in self.varying if key.startswith(prefixes)]
            names[name] = "-".join(filter(None, (name, run_name(point, keys))))
        run = self._run(run_name(point, self.varying) or "run", names[PRUNED], point)
        sweep.runs[run.name] = run
        for members, name, parent in ((sweep.dense, names[DENSE], None), (sweep.pruned, names[PRUNED], names[DENSE])):
            directory = str(sweep.directory / name)
            run_config = dataclasses.replace(run.config.run, dir=directory)
            arguments = (*run.arguments[:-1], f"run.dir={quoted(directory)}")
            members.setdefault(name, Member(name, parent, arguments, dataclasses.replace(run.config, run=run_config)))

    def _run(self, name: str, parent: str, point: Point) -> Member:
        values = [(self.tree.get("overrides") or {}).items(), point.items()]
        of_file, of_point = ([f"{key}={quoted(value)}" for key, value in items] for items in values)
        directory = f"run.dir={quoted(str(self.sweep.directory / name))}"
        base = self.tree.get("base") or "quickstart"
        overrides = [*of_file, *self.override_of.values(), *of_point, directory]
        try:
            config = load_config(base, overrides)
        except UserError as error:
            for line in error.lines:
                self.problems.setdefault(self._source(line), []).append(name)
            config = Config()
        return Member(name, parent, (base, *overrides), config)

    def _source(self, line: str) -> str:
        """The line of a problem with its true source: overrides that are not on the command line are the sweep's."""
        problem = line.removeprefix("command line: ")
        from_file = problem != line and problem.partition(":")[0] not in self.override_of
        return f"{self.sweep.file}: {problem}" if from_file else line


def raise_problems(problems: Mapping[str, Sequence[str]], num_runs: int) -> None:
    """Raises a UserError with a line for each problem, which lists the runs that have it unless all do."""
    if problems:
        runs = {line: "" if len(names) == num_runs else f" ({', '.join(names)})" for line, names in problems.items()}
        raise UserError("\n".join(f"{line}{names}" for line, names in runs.items()))
