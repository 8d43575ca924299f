"""Benchmarks run, on models that are too small for their figures to mean anything, and print what they promise.

Those on real data (``*_table.py``) and ``prune_scaling.py`` are not run here.
"""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Prune
from processes import Process

from sppctl.config.settings import Config
from sppctl.run.directory import Run
from sppctl.run.stages import PRUNE

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
TINY_TRAINING = ["train.data.seq_len=64", "train.data.max_rows=8", "train.max_steps=1", "eval.seq_len=64"]
TINY_TRAINING += ["train.batch_size=2", "train.micro_batch_size=2"]

pytestmark = pytest.mark.slow


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """bench("prune.py", ...) -> what the script prints with these arguments."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def run(script: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / script), *map(str, arguments)])
        runpy.run_path(sys.argv[0], run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def same_process(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that a benchmark would have measured in processes of their own: they say that they took 7 MiB."""
    asked: list[list[str]] = []
    original = subprocess.run

    def answer(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[Any]:
        if len(command) < 3 or command[0] != sys.executable:  # of a library that is imported meanwhile
            return original(command, **kwargs)
        asked.append(command[2:])
        text = kwargs.get("text", False)
        return subprocess.CompletedProcess(command, 0, "7.0\n" if text else b"7.0\n", None)

    monkeypatch.setattr(subprocess, "run", answer)
    return asked


def test_a_table_of_other_settings_is_not_continued(
    bench: Callable[..., str], llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "table.json").write_text(json.dumps({"settings": {"samples": 8}}))
    with pytest.raises(SystemExit):
        bench("pruning_table.py", llama, tmp_path / "table.md", "--samples", 4)
    assert "has cells of {'samples': 8}, not of " in capsys.readouterr().err
    assert not (tmp_path / "table.md").exists()


def ratios(table: str, row: str) -> list[float]:
    """The numbers of the rows that start with ``row``."""
    lines = [line for line in table.splitlines() if line.startswith(f"| {row}")]
    assert lines, table
    numbers = re.findall(r"\d[\d,]*\.?\d*", " ".join(lines).replace(row, ""))
    return [float(number.replace(",", "")) for number in numbers]


def test_spp_layer(bench: Callable[..., str]) -> None:
    options = ("--tokens", 16, "--rounds", 1, "--rank", 4, "--shapes", "16x32,32x16", "--device", "cpu")
    printed = bench("spp_layer.py", *options)
    for dtype in ("bfloat16", "float32"):
        assert f"\n{dtype}, 2:4\n" in printed
        assert len(ratios(printed, "training, dropout |")) == 2
    assert len(re.findall(r"^\| 16x32 \| SPP \|.*\| 0 \|$", printed, re.MULTILINE)) == 2  # nothing beyond x is kept
    assert all(value > 0 for value in ratios(printed, "residual |"))


def test_train_step(bench: Callable[..., str], llama: Path, same_process: list[list[str]]) -> None:
    options = (llama, "--batch", 1, "--seq-len", 16, "--device", "cpu")
    printed = bench("train_step.py", *options, "--rounds", 1)
    assert len(same_process) == 10
    assert len(re.findall(r"^\| SPP \| .*\| 7 \|$", printed, re.MULTILINE)) == 4
    assert float(bench("train_step.py", *options, "--peak-of", 1)) > 100


def test_train_step_with_packed_weights(bench: Callable[..., str], prune: Prune, same_process: list[list[str]]) -> None:
    pruned = prune("prune.method=magnitude", "prune.pattern=2:8").directory
    options = (pruned, "--batch", 1, "--seq-len", 16, "--device", "cpu", "--packed")
    printed = bench("train_step.py", *options, "--rounds", 1)
    assert len(re.findall(r"^\| SPP packed \| .*\| 7 \|$", printed, re.MULTILINE)) == 4


def test_evaluate(bench: Callable[..., str], llama: Path, same_process: list[list[str]]) -> None:
    printed = bench("evaluate.py", llama, "--windows", 2, "--seq-len", 32, "--repeats", 1, "--device", "cpu")
    assert len(same_process) == 4
    assert ratios(printed, "forward |")[0] == 1
    assert "| perplexity and divergence |" in printed
    assert float(bench("evaluate.py", llama, "--windows", 1, "--seq-len", 32, "--memory-of", "perplexity")) >= 0


def test_big_checkpoint(bench: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda command: Process(command[3:]))  # without the imports
    options = [tmp_path / "big", "--run", tmp_path / "run", "--hidden", 16, "--intermediate", 24, "--layers", 1]
    printed = bench("big_checkpoint.py", *options, "--heads", 2)
    for stage in ("prune", "train", "merge", "eval", "inspect", "train, by plan"):
        assert ratios(printed, f"{stage} |")[-1] > 0
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=78e9))
    with pytest.raises(SystemExit, match=r"other and .*run: 78\.1 GB of disk are needed, and 78\.0 GB are free"):
        bench("big_checkpoint.py", tmp_path / "other", "--run", tmp_path / "second run")


def test_prune(bench: Callable[..., str], llama: Path) -> None:
    printed = bench("prune.py", llama, "--samples", 2, "--seq-len", 32, "--repeats", 1, "--device", "cpu")
    cases = [("magnitude", "block"), ("dsnot", "block")]
    cases += [(method, order) for method in ("wanda", "sparsegpt") for order in ("block", "module")]
    for method, order in cases:
        assert ratios(printed, f"{method}, {order}")[1] > 0


def test_rounded_weight(bench: Callable[..., str], configure: Callable[..., Config]) -> None:
    run = Run(configure("prune.method=magnitude"))
    run.directory.mkdir()
    run.do(PRUNE)
    printed = bench("rounded_weight.py", run.path("prune"), "--lrs", "1e-2", "--device", "cpu", *TINY_TRAINING)
    rounded = ratios(printed, "1e-2 | rounded |")
    assert abs(rounded[0] - rounded[1]) < 1e-3  # the merged model is the one that was trained
    assert len(ratios(printed, "1e-2 | residual |")) == len(rounded)
