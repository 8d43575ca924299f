"""The scripts in examples/, on a tiny model."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from sppctl import plugins
from sppctl.inspect import inspect
from sppctl.pattern import Pattern

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plugins, "_registered", {plugins.PRUNERS: {}, plugins.ALLOCATIONS: {}})


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_in_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], llama: Path, text_file: Path
) -> None:
    sizes = ("--samples", "4", "--seq-len", "32", "--steps", "2")
    run(monkeypatch, "in_memory.py", "--model", str(llama), "--text", str(text_file), *sizes)
    out = capsys.readouterr().out
    assert "14 matrices, 50.0% zeros" in out
    assert all(f"{label}: ppl" in out for label in ("dense", "pruned", "merged"))


def test_own_pruner(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], llama: Path, text_file: Path
) -> None:
    sizes = ("--samples", "4", "--seq-len", "32")
    run(monkeypatch, "own_pruner.py", "--model", str(llama), "--text", str(text_file), *sizes)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines if ": " in line and "perplexity" in line] == [
        "wanda, uniform",
        "rows_wanda, uniform",
        "rows_wanda, spread",
    ]


def test_own_data(monkeypatch: pytest.MonkeyPatch, llama: Path, text_file: Path, tmp_path: Path) -> None:
    rows = text_file.read_text().splitlines()[:200]
    Path("my.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    run(monkeypatch, "own_data.py", "--model", str(llama), "--data", "my.jsonl", "--seq-len", "32")
    matrices, _ = inspect.measure(tmp_path / "pruned", Pattern.parse("2:4"))
    assert not inspect.violations(matrices, Pattern.parse("2:4"))


def test_paper_table(monkeypatch: pytest.MonkeyPatch, llama: Path, text_file: Path) -> None:
    texts = ("--text", str(text_file), "--calibration", str(text_file))
    run(monkeypatch, "paper_table.py", "--model", str(llama), *texts, "--samples", "2", "--seq-len", "64")
    assert Path("table.csv").read_text().splitlines()[0] == "method,0.5,4:8,2:4"
    assert Path("table.tex").read_text().count(r"\\") == 4


def test_every_example_is_tested() -> None:
    tested = Path(__file__).read_text()
    assert all(f'"{path.name}"' in tested for path in EXAMPLES.glob("*.py"))
