"""What a benchmark ran on, and how it tells the time."""

from __future__ import annotations

import platform
import time
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

import torch

_CLEAR = Path("/proc/self/clear_refs")  # of Linux; 5 resets the peak that the kernel keeps


def add_clock(parser: ArgumentParser) -> None:
    """The option that the scripts share."""
    words = "count the process's CPU time, for a machine that others use too; needs OMP_NUM_THREADS=1 and no GPU"
    parser.add_argument(
        "--cpu-time", dest="clock", action="store_const", const=time.process_time, default=time.perf_counter, help=words
    )


def name_of(clock: Callable[[], float]) -> str:
    """For the head of a table."""
    return "CPU time" if clock is time.process_time else "wall-clock time"


def describe(device: torch.device) -> str:
    """Name of the processor or the GPU, threads, the instructions that PyTorch uses, and versions."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{_cpu_name()}, {torch.get_num_threads()} threads, {_instructions()}, torch {torch.__version__}"


def reset_peak(device: torch.device) -> None:
    """Forgets the peak of memory so far, of this process and of the GPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if _CLEAR.exists():
        _CLEAR.write_text("5")


def peak(device: torch.device) -> str:
    """MiB at the most since :func:`reset_peak`: resident, and allocated on the GPU if that is the device."""
    words = []
    if _CLEAR.exists():
        found = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        words.append(f"{int(found.split()[1]) / 1024:.0f}")
    if device.type == "cuda":
        words.append(f"{torch.cuda.max_memory_allocated(device) / 2**20:.0f} GPU")
    return ", ".join(words) or "-"


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    if not information.exists():
        return platform.processor() or platform.machine()
    names = [
        line.split(":")[1].strip() for line in information.read_text().splitlines() if line.startswith("model name")
    ]
    return names[0] if names else platform.machine()


def _instructions() -> str:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = [flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in text]
    return found[0] if found else torch.backends.cpu.get_cpu_capability()
