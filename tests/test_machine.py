from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from sppctl import machine


def taken(size: int) -> mmap.mmap:
    """Memory straight from the system: what an allocator has kept from earlier tests would hide it."""
    memory = mmap.mmap(-1, size)
    memory.write(b"1" * size)
    return memory


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc here")
def test_the_peak_is_that_since_it_was_reset() -> None:
    size = 256 << 20
    machine.reset_peak_memory()
    taken(size).close()
    before = machine.peak_memory_mb()["process"]
    machine.reset_peak_memory()
    after = machine.peak_memory_mb()["process"]
    assert after < before - 128
    held = taken(size)
    assert machine.peak_memory_mb()["process"] > after + 192
    held.close()


def test_without_proc_it_is_that_since_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "PROCESS", tmp_path / "nowhere")
    machine.reset_peak_memory()
    assert machine.peak_memory_mb()["process"] > 50


def test_the_processor_has_a_name() -> None:
    assert machine.cpu_name()
    assert machine.describe().endswith(" visible)" if torch.cuda.is_available() else " threads")
