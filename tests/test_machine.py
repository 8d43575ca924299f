from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sppctl import machine


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc here")
def test_the_peak_is_that_since_it_was_reset() -> None:
    torch.ones(64 << 20, dtype=torch.uint8)  # freed at once
    before = machine.peak_memory_mb()["process"]
    machine.reset_peak_memory()
    after = machine.peak_memory_mb()["process"]
    assert after < before - 32
    held = torch.ones(64 << 20, dtype=torch.uint8)
    assert machine.peak_memory_mb()["process"] > after + 48
    assert held.all()


def test_without_proc_it_is_that_since_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "PROCESS", tmp_path / "nowhere")
    machine.reset_peak_memory()
    assert machine.peak_memory_mb()["process"] > 50


def test_the_processor_has_a_name() -> None:
    assert machine.cpu_name()
    assert machine.describe().endswith(" visible)" if torch.cuda.is_available() else " threads")
