"""Pruners and allocations from outside the package: by --import, by entry point, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import weights_of
from conftest import Command

from sppctl import Pruner, launch, plugins, prune_linear, register_allocation, register_pruner
from sppctl.pruners import PRUNERS
from sppctl.pruners.allocate import ALLOCATIONS
from sppctl.sweep import grid, slurm

MODULE = """
from sppctl import Allocation, Pruner, register_allocation, register_pruner
from sppctl.pruners.masks import mask_by_row


def prune(weights, statistics, patterns, masks=None):
    return [w.masked_fill(~mask_by_row(-w.abs().float(), p), 0) for w, p in zip(weights, patterns)], None


register_pruner("largest_first", Pruner(None, prune))
register_pruner("dense", Pruner(None, lambda weights, *_: (weights, None)))
register_allocation("rising", Allocation(len, lambda values, sizes, ratio: [ratio - 0.1, ratio + 0.1]))
"""


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A current directory with the module, which is forgotten afterwards."""
    (tmp_path / "own_pruners.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plugins, "imported", [])
    monkeypatch.setattr(plugins, "_registered", {plugins.PRUNERS: {}, plugins.ALLOCATIONS: {}})
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    sys.modules.pop("own_pruners", None)


def test_a_pruner_of_ones_own(command: Command, config_file: Path) -> None:
    options = ["--method", "largest_first", "run.dir=own"]
    unknown = command("prune", str(config_file), *options)
    assert unknown.code == 2
    assert "'largest_first' is not one of magnitude" in unknown.err
    assert "--import its module" in unknown.err
    shown = command("config", str(config_file), "prune.method=largest_first", "--import", "own_pruners")
    assert "method: largest_first" in shown.out
    done = command("prune", str(config_file), *options, "--import", "own_pruners")
    assert done.code == 0, done.err
    assert command("inspect", "own/pruned", "--expect", "2:4").code == 0
    assert plugins.flags() == ["--import=own_pruners"], "what other processes are started with"


def test_other_processes_and_jobs_import_it_too(config_file: Path, tmp_path: Path) -> None:
    plugins.import_module("own_pruners")
    assert launch.start(["config", str(config_file), "prune.method=largest_first"], 1, silent=True) == 0
    text = f"base: {config_file}\ndir: s\ngrid: {{prune.method: [largest_first, wanda]}}\n"
    (tmp_path / "sweep.yaml").write_text(text)
    jobs = slurm.jobs(grid.load_sweep("sweep.yaml"))
    assert all("--import=own_pruners" in job.arguments for job in jobs)


def test_an_allocation_of_ones_own(command: Command, config_file: Path) -> None:
    options = ["--pattern", "0.5", "prune.allocation=rising", "run.dir=own", "--import", "own_pruners"]
    done = command("prune", str(config_file), *options)
    assert done.code == 0, done.err
    weights = weights_of(Path("own/pruned"))
    shares = [(weights[f"model.layers.{i}.mlp.up_proj.weight"] == 0).float().mean().item() for i in (0, 1)]
    assert shares == pytest.approx([0.4, 0.6], abs=0.03)


@pytest.mark.parametrize(("pattern", "problem"), [("2:4", "2:4"), ("0.5", "0.5: its share of zeros is 0")])
def test_a_pruner_that_does_not_keep_its_promise(
    command: Command, config_file: Path, pattern: str, problem: str
) -> None:
    options = ["--method", "dense", "--pattern", pattern, "run.dir=own", "--import", "own_pruners"]
    failed = command("prune", str(config_file), *options)
    assert failed.code == 1
    assert f"q_proj: the result of prune.method dense is not {problem}" in failed.err
    assert not Path("own/pruned").exists()


@pytest.mark.parametrize(("text", "reason"), [("import nothing_there", "ModuleNotFoundError"), ("1 / 0", "division")])
def test_a_module_that_cannot_be_imported(command: Command, text: str, reason: str) -> None:
    Path("broken_module.py").write_text(text)
    failed = command("prune", "--import", "broken_module")
    assert failed.code == 2
    assert "--import: broken_module could not be imported" in failed.err
    assert reason in failed.err


def test_a_configuration_cannot_import(command: Command) -> None:
    Path("c.yaml").write_text("import: own_pruners\n")
    refused = command("prune", "c.yaml")
    assert refused.code == 2
    assert "import: unknown key" in refused.err
    assert "own_pruners" not in sys.modules


def test_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    package = Path("installed/own-1.0.dist-info")
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: own\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[sppctl.pruners]\nby_package = own_package:PRUNER\n")
    Path("installed/own_package.py").write_text(
        "from sppctl.pruners import PRUNERS\nPRUNER = PRUNERS['magnitude'].__class__(None, PRUNERS['magnitude'].prune)"
    )
    monkeypatch.syspath_prepend("installed")
    weight = torch.randn(4, 8)
    pruned = prune_linear(weight, method="by_package", pattern="2:4")
    assert torch.equal(pruned, prune_linear(weight, method="magnitude", pattern="2:4"))
    with pytest.raises(ValueError, match="unknown pruning method 'by_nobody'"):
        prune_linear(weight, method="by_nobody", pattern="2:4")


def test_own_names_are_taken() -> None:
    with pytest.raises(ValueError, match="'wanda' is one of sppctl's own"):
        register_pruner("wanda", Pruner(None, PRUNERS["wanda"].prune))
    with pytest.raises(ValueError, match="'owl' is one of sppctl's own"):
        register_allocation("owl", ALLOCATIONS["owl"])
