"""Every benchmark runs, on models that are too small for its figures to mean anything, and prints what it promises."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sppctl.config.load import load_config
from sppctl.run.directory import Run
from sppctl.run.stages import PRUNE

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
TINY_TRAINING = [
    "train.data.seq_len=64",
    "train.data.max_rows=8",
    "train.max_steps=1",
    "train.batch_size=2",
    "train.micro_batch_size=2",
]

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


@pytest.fixture
def pruned(llama: Path, tmp_path: Path) -> Path:
    """A run with a pruned tiny model."""
    run = Run(
        load_config(
            None,
            [f"model.path={llama}", "model.gguf_file=null", f"run.dir={tmp_path / 'run'}", "prune.method=magnitude"],
        )
    )
    run.directory.mkdir()
    run.do(PRUNE)
    return run.path("prune")


def ratios(table: str, row: str) -> list[float]:
    """The numbers of the rows that start with ``row``."""
    lines = [line for line in table.splitlines() if line.startswith(f"| {row}")]
    assert lines, table
    return [
        float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*\.?\d*", " ".join(lines).replace(row, ""))
    ]


def test_spp_layer(bench: Callable[..., str]) -> None:
    said = bench(
        "spp_layer.py", "--tokens", 16, "--rounds", 1, "--rank", 4, "--shapes", "16x32,32x16", "--device", "cpu"
    )
    for dtype in ("bfloat16", "float32"):
        assert f"\n{dtype}\n" in said
    assert len(re.findall(r"^\| 16x32 \| SPP \|.*\| 0 \|$", said, re.MULTILINE)) == 2  # nothing beyond x is kept
    assert all(value > 0 for value in ratios(said, "residual |"))


def test_train_step(bench: Callable[..., str], llama: Path, same_process: list[list[str]]) -> None:
    said = bench("train_step.py", llama, "--batch", 1, "--seq-len", 16, "--rounds", 1, "--device", "cpu")
    assert len(same_process) == 10
    assert len(re.findall(r"^\| SPP \| .*\| 7 \|$", said, re.MULTILINE)) == 4
    assert (
        float(bench(*["train_step.py", llama, "--batch", 1, "--seq-len", 16, "--peak-of", 1, "--device", "cpu"])) > 100
    )


def test_evaluate(bench: Callable[..., str], llama: Path, same_process: list[list[str]]) -> None:
    said = bench("evaluate.py", llama, "--windows", 2, "--seq-len", 32, "--repeats", 1, "--device", "cpu")
    assert len(same_process) == 4
    assert ratios(said, "forward |")[0] == 1
    assert "| perplexity and divergence |" in said
    assert float(bench("evaluate.py", llama, "--windows", 1, "--seq-len", 32, "--memory-of", "perplexity")) >= 0


def test_prune(bench: Callable[..., str], llama: Path) -> None:
    said = bench("prune.py", llama, "--samples", 2, "--seq-len", 32, "--repeats", 1, "--device", "cpu")
    for row in (
        "magnitude, block",
        "wanda, block",
        "wanda, module",
        "sparsegpt, block",
        "sparsegpt, module",
        "dsnot, block",
    ):
        assert ratios(said, row)[1] > 0


def test_rounded_weight(bench: Callable[..., str], pruned: Path) -> None:
    said = bench("rounded_weight.py", pruned, "--lrs", "1e-2", "--device", "cpu", *TINY_TRAINING, "eval.seq_len=64")
    rounded = ratios(said, "1e-2 | rounded |")
    assert abs(rounded[0] - rounded[1]) < 1e-3  # the merged model is the one that was trained
    assert len(ratios(said, "1e-2 | residual |")) == len(rounded)
