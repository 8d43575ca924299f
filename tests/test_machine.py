from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import AVX2, Cpu

from sppctl import machine

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda", 0), torch.device("mps")
AVX512 = f"{AVX2} avx512f avx512bw avx512vl avx512_vnni"
BF16 = "avx512_bf16"
NO_UNITS = "computing in float32 (this CPU has no bfloat16 units"


def chosen(stored: str, device: torch.device = CPU, training: bool = False) -> str:
    compute = machine.choose_dtype("auto", stored, device, training=training)
    assert compute.text.startswith(f"computing in {compute.dtype}")
    return compute.dtype


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (f"{AVX512} {BF16}", ("bfloat16", "computing in bfloat16", False)),
        (f"{AVX512} {BF16} amx_bf16 amx_tile", ("bfloat16", "computing in bfloat16", False)),
        (AVX2, ("float32", f"{NO_UNITS})", True)),
        (AVX512, ("float32", f"{NO_UNITS})", True)),
    ],
)
def test_bfloat16_is_computed_in_where_the_cpu_has_units_for_it(cpu: Cpu, flags: str, expected: Any) -> None:
    cpu(flags)
    assert machine.choose_dtype("auto", "bfloat16", CPU) == expected
    assert chosen("float16") == "float32"  # never native on a CPU
    assert chosen("float16", training=True) == expected[0]  # and never trained
    assert chosen("float32") == "float32"
    for stored in ("float32", "bfloat16", "float16"):
        configured = ("bfloat16", "computing in bfloat16 as configured", False)
        assert machine.choose_dtype("bfloat16", stored, CPU) == configured


@pytest.mark.parametrize(
    ("switch", "value", "on"),
    [
        ("ONEDNN_MAX_CPU_ISA", "AVX2", False),
        ("ONEDNN_MAX_CPU_ISA", "avx512_core", False),
        ("ONEDNN_MAX_CPU_ISA", "Avx512_Core_Vnni", False),
        ("ONEDNN_MAX_CPU_ISA", "AVX2_VNNI_2", False),
        ("DNNL_MAX_CPU_ISA", "SSE41", False),
        ("ATEN_CPU_CAPABILITY", "avx2", False),
        ("ATEN_CPU_CAPABILITY", "default", False),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16", True),
        ("ONEDNN_MAX_CPU_ISA", "avx512_core_amx", True),
        ("ONEDNN_MAX_CPU_ISA", "ALL", True),
        ("ONEDNN_MAX_CPU_ISA", "nonsense", True),  # oneDNN ignores it
        ("ONEDNN_MAX_CPU_ISA", "", True),
        ("ATEN_CPU_CAPABILITY", "avx512", True),
        ("ATEN_CPU_CAPABILITY", "AVX2", True),  # PyTorch ignores it
    ],
)
def test_switches_are_honoured_as_their_libraries_do(cpu: Cpu, switch: str, value: str, on: bool) -> None:
    cpu(f"{AVX512} {BF16}", **{switch: value})
    expected = "computing in bfloat16" if on else f"{NO_UNITS} under {switch}={value})"
    assert machine.choose_dtype("auto", "bfloat16", CPU).text == expected
    assert machine.cpu_name() == "Some CPU @ 2: 3 GHz"
    cpu(f"{AVX512} {BF16}", ONEDNN_MAX_CPU_ISA="ALL", DNNL_MAX_CPU_ISA="AVX2")  # the old name counts only alone
    assert chosen("bfloat16") == "bfloat16"


def test_a_cpu_that_says_nothing_computes_in_float32(cpu: Cpu) -> None:
    cpu(None)
    assert machine.choose_dtype("auto", "bfloat16", CPU).text.endswith(
        "(the dtypes that this CPU multiplies natively are unknown)"
    )
    assert machine.cpu_name()


@pytest.mark.parametrize("native", [True, False])
def test_a_gpu_is_asked(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: asked.append(options) or native)
    monkeypatch.setattr(torch.cuda, "_exchange_device", lambda _: -1, raising=False)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", lambda _: -1, raising=False)
    assert chosen("bfloat16", CUDA) == ("bfloat16" if native else "float32")
    assert chosen("float16", CUDA) == "float16"
    assert chosen("float16", CUDA, training=True) == ("bfloat16" if native else "float32")
    assert asked == [{"including_emulation": False}] * 2


def test_other_devices_compute_in_float32() -> None:
    assert (chosen("float16", MPS), chosen("bfloat16", MPS)) == ("float16", "float32")
    assert chosen("float16", torch.device("xpu")) == "float32"


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
    of_linux = machine.peak_memory_mb()["process"]
    assert of_linux > 50
    monkeypatch.setattr(machine.sys, "platform", "darwin")  # whose ru_maxrss is in bytes
    assert machine.peak_memory_mb()["process"] == pytest.approx(of_linux / 1024, rel=0.1, abs=0.1)


def test_the_processor_has_a_name() -> None:
    assert machine.cpu_name()
    assert machine.describe().endswith(" visible)" if torch.cuda.is_available() else " threads")


GROUPS = {
    "version 1": (
        "4:memory:/a/b\n3:cpuset:/\n0::/\n",
        "memory",
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        "total_",
    ),
    "version 2": ("0::/a/b\n", "", ("memory.max", "memory.current"), ""),
    "both": ("4:cpu:/\n0::/a/b\n", "unified", ("memory.max", "memory.current"), ""),
}


@pytest.mark.parametrize("kind", GROUPS)
@pytest.mark.parametrize("folder", ["", "a", "a/b"])
def test_free_memory_is_what_the_control_groups_leave(
    kind: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the process's own group or of one around it; pages of files are given up when they are needed."""
    groups, root, files, prefix = GROUPS[kind]
    process = tmp_path / "proc"
    process.mkdir()
    (process / "cgroup").write_text(groups)
    (process / "status").write_text("VmData:\t 10 kB\n")
    monkeypatch.setattr(machine, "PROCESS", process)
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "cgroups")
    before = machine.free_memory(CPU)
    assert before > 1 << 20
    group = tmp_path / "cgroups" / root / folder
    group.mkdir(parents=True)
    (group / files[0]).write_text("100000\n")
    (group / files[1]).write_text("70000\n")
    (group / "memory.stat").write_text(f"anon 5\n{prefix}inactive_file 2000\n{prefix}active_file 300\n")
    assert machine.free_memory(CPU) == 100_000 - 70_000 + 2_300
    (group / files[1]).write_text("170000\n")
    assert machine.free_memory(CPU) == 0
    (group / files[0]).write_text("max\n" if prefix == "" else f"{2**63 - 4096}\n")
    assert machine.free_memory(CPU) > 1 << 20


def test_free_memory_is_within_the_limit_of_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "status").write_text("VmData:\t 10 kB\n")
    monkeypatch.setattr(machine, "PROCESS", tmp_path)
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (50_000, -1))
    assert machine.free_memory(CPU) == 50_000 - 10 * 1024
