"""Pruning in several processes: the masks of one, the same bytes after a kill, errors of any of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import agreement, shards, stored, weights_of
from conftest import Command
from deaths import DEATHS, START
from processes import Ended, environment, sppctl, sppctl_in_ranks

pytestmark = pytest.mark.slow


def in_processes(arguments: list[str], number: int, start: str = "ranks") -> Ended:
    """``sppctl prune`` in several processes that it starts itself (launch), that torchrun starts, or that are there."""
    arguments = ["prune", *arguments]
    if start == "ranks":
        return sppctl_in_ranks(arguments, number)
    command = [sys.executable, "-m", "sppctl", *arguments, f"launch.num_processes={number}"]
    if start == "torchrun":
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)]
        command = [sys.executable, *torchrun, "-m", "sppctl", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
    return Ended(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize(
    ("family", "options", "start"),
    [
        ("llama", ["prune.method=wanda", "prune.memory=disk"], "launch"),
        ("llama", ["prune.method=sparsegpt", "model.dtype=bfloat16", "model.compute_dtype=float32"], "torchrun"),
        ("llama", ["prune.method=dsnot", "prune.order=module"], "ranks"),
        ("llama", ["prune.pattern=0.5", "prune.allocation=owl"], "ranks"),
        ("gpt2", ["prune.method=sparsegpt"], "ranks"),
        ("qwen3_moe", ["prune.method=wanda"], "ranks"),
        ("llama", ["prune.method=magnitude"], "ranks"),
        ("llama", ["prune.permute_channels=true"], "ranks"),
    ],
    ids=lambda value: ",".join(value).replace("prune.", "") if isinstance(value, list) else None,
)
def test_two_processes_make_the_masks_of_one(
    family: str,
    options: list[str],
    start: str,
    config_file: Path,
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    command: Command,
) -> None:
    common = [str(config_file), f"model.path={make_checkpoint(family)}", "prune.targets=all-linear"]
    common += ["prune.calibration.samples=5", *options]
    assert command("prune", *common, f"run.dir={tmp_path / 'one'}").code == 0
    two_processes = [*common, f"run.dir={tmp_path / 'two'}"]
    done = in_processes([*two_processes, "--json"], 2, start)
    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout)["metrics"]  # one process talks
    assert metrics["processes"] == 2
    assert done.stderr.count("prune: done in") == 1
    one, two = (tmp_path / name / "pruned" for name in ("one", "two"))
    alone = json.loads((one / "stage.json").read_text())["metrics"]
    assert metrics["sparsity"] == alone["sparsity"]
    for first, second in ((one, two), (one.parent, two.parent)):
        assert {path.name for path in first.iterdir()} == {path.name for path in second.iterdir()}
    names = [stored(layer["name"], family) for layer in alone["layers"]]
    assert agreement(weights_of(one), weights_of(two), names) >= 0.999
    for first, second in zip(alone["layers"], metrics["layers"], strict=True):
        assert (first["name"], first["damp"]) == (second["name"], second["damp"])
    assert "up to date" in command("prune", *two_processes).err


def test_two_killed_processes_continue_to_the_same_bytes(config_file: Path, deep: Path, tmp_path: Path) -> None:
    def arguments(name: str) -> list[str]:
        return [str(config_file), f"model.path={deep}", "prune.method=sparsegpt", f"run.dir={tmp_path / name}"]

    ended = sppctl_in_ranks(["prune", *arguments("killed")], 2, START + DEATHS["block 2 done"])
    assert ended.returncode == -9, ended.stderr
    done = in_processes(arguments("killed"), 2)
    assert "prune: 3 of 4 blocks are done" in done.stderr
    assert in_processes(arguments("whole"), 2).returncode == 0
    killed, whole = (shards(tmp_path / name / "pruned") for name in ("killed", "whole"))
    assert killed
    assert killed == whole


def test_one_process_tunes_on_all_windows(config_file: Path) -> None:
    """The only one that is started; several that exist already are refused."""
    arguments = [str(config_file), "prune.reconstruct_epochs=2", "prune.reconstruct_lr=1e-3", "--json"]
    refused = in_processes(arguments, 2)
    assert refused.returncode == 2
    assert "prune.reconstruct_epochs: needs a single process; prune before, without a launcher" in refused.stderr
    done = in_processes(arguments, 2, "launch")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metrics"]["processes"] == 1


OF_EVEN_WINDOWS = """
import os
from transformers.models.llama.modeling_llama import LlamaMLP
forward = LlamaMLP.forward
def forward_even(self, hidden):
    if "RANK" in os.environ:  # the first of two processes has them
        return forward(self, hidden) if os.environ["RANK"] == "0" else hidden
    result = hidden.clone()
    result[::2] = forward(self, hidden[::2])
    return result
LlamaMLP.forward = forward_even
"""


@pytest.mark.parametrize("order", ["block", "module"])
def test_layers_that_only_the_windows_of_one_process_reach(order: str, config_file: Path, tmp_path: Path) -> None:
    common = ["prune", str(config_file), f"prune.order={order}", "prune.calibration.samples=4", "prune.batch_size=4"]
    one, two = ([*common, f"run.dir={tmp_path / name}"] for name in ("one", "two"))
    ended = sppctl(one, OF_EVEN_WINDOWS)
    assert ended.returncode == 0, ended.stderr
    ended = sppctl_in_ranks(two, 2, OF_EVEN_WINDOWS)
    assert ended.returncode == 0, ended.stderr
    alone, shared = (weights_of(tmp_path / name / "pruned") for name in ("one", "two"))
    assert agreement(alone, shared, [name for name in alone if name.endswith("_proj.weight")]) >= 0.999


REFUSES = """
import os
from sppctl.prune import block_work
def refuse(*_):
    raise ValueError("it refuses")
if os.environ["RANK"] == "1":
    block_work.check_weight = refuse
"""


def test_what_the_second_process_finds_wrong_is_reported(config_file: Path) -> None:
    """o_proj, in the second group of layers, is its turn."""
    done = sppctl_in_ranks(["prune", str(config_file)], 2, REFUSES)
    assert done.returncode == 1
    assert "o_proj: it refuses" in done.stderr


@pytest.mark.parametrize("start", ["launch", "torchrun"])
def test_fewer_windows_than_processes(start: str, config_file: Path, tmp_path: Path) -> None:
    done = in_processes([str(config_file), "prune.calibration.samples=1"], 2, start)
    assert done.returncode != 0
    assert "prune.calibration.samples: 1 windows are too few for 2 processes" in done.stderr
    assert not (tmp_path / "run" / "pruned").exists()
