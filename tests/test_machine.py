from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch
from conftest import AVX2, Cpu

from sppctl import machine

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda", 0), torch.device("mps")
AVX512 = f"{AVX2} avx512f avx512bw avx512vl avx512_vnni"
NO_UNITS = "computing in float32 (this CPU has no bfloat16 units"


def chosen(stored: str, device: torch.device = CPU, wanted: str = "auto", training: bool = False) -> str:
    compute = machine.choose_dtype(wanted, stored, device, training=training)
    assert compute.text.startswith(f"computing in {compute.dtype}")
    return compute.dtype


@pytest.mark.parametrize("flags", [f"{AVX512} avx512_bf16", f"{AVX512} avx512_bf16 amx_bf16 amx_tile"])
def test_a_cpu_with_bfloat16_units_computes_in_it(cpu: Cpu, flags: str) -> None:
    cpu(flags)
    assert machine.choose_dtype("auto", "bfloat16", CPU).text == "computing in bfloat16"


@pytest.mark.parametrize("flags", [AVX2, AVX512])
def test_a_cpu_without_them_computes_in_float32(cpu: Cpu, flags: str) -> None:
    cpu(flags)
    assert machine.choose_dtype("auto", "bfloat16", CPU) == ("float32", f"{NO_UNITS})", True)


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
    cpu(f"{AVX512} avx512_bf16", **{switch: value})
    expected = "computing in bfloat16" if on else f"{NO_UNITS} under {switch}={value})"
    assert machine.choose_dtype("auto", "bfloat16", CPU).text == expected


def test_the_old_name_of_the_switch_counts_only_alone(cpu: Cpu) -> None:
    cpu(f"{AVX512} avx512_bf16", ONEDNN_MAX_CPU_ISA="ALL", DNNL_MAX_CPU_ISA="AVX2")
    assert chosen("bfloat16") == "bfloat16"


def test_a_cpu_that_says_nothing_computes_in_float32(cpu: Cpu) -> None:
    cpu(None)
    assert machine.choose_dtype("auto", "bfloat16", CPU).text.endswith(
        "(the dtypes that this CPU multiplies natively are unknown)"
    )
    assert machine.cpu_name()


def test_float16_is_never_native_on_a_cpu(cpu: Cpu) -> None:
    cpu(f"{AVX512} avx512_bf16 avx512_fp16 amx_bf16 amx_fp16")
    assert chosen("float16") == "float32"
    assert machine.cpu_name() == "Some CPU @ 2: 3 GHz"


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


@pytest.mark.parametrize(("flags", "expected"), [(f"{AVX512} avx512_bf16", "bfloat16"), (AVX2, "float32")])
def test_float16_is_never_trained(cpu: Cpu, flags: str, expected: str) -> None:
    cpu(flags)
    assert chosen("float16", training=True) == expected


@pytest.mark.parametrize("flags", [f"{AVX512} avx512_bf16", AVX2])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_what_is_configured_is_computed_in(cpu: Cpu, flags: str, stored: str) -> None:
    cpu(flags)
    assert machine.choose_dtype("bfloat16", stored, CPU) == ("bfloat16", "computing in bfloat16 as configured", False)
    assert chosen("float32") == "float32"


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
