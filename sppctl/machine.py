"""What a process runs on, and how much memory it has taken."""

from __future__ import annotations

import contextlib
import platform
import resource
from pathlib import Path

PROCESS = Path("/proc/self")  # Linux; elsewhere the peak is that since the process started


def cpu_name() -> str:
    """The model of the processor."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def describe() -> str:
    """The GPU, or the processor and the threads that PyTorch uses of it."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()} ({torch.cuda.device_count()} visible)"
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def reset_peak_memory() -> None:
    """From here on :func:`peak_memory_mb` counts anew."""
    import torch

    with contextlib.suppress(OSError):  # no /proc, or one that cannot be written
        (PROCESS / "clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory_mb() -> dict[str, float]:
    """The most that this process has held in memory, and on the GPU, in MiB."""
    import torch

    peak = {"process": round(_peak_of_process() / 1024, 1)}
    if torch.cuda.is_available():
        peak["cuda"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return peak


def _peak_of_process() -> float:
    """In KiB."""
    status = PROCESS / "status"
    for line in status.read_text().splitlines() if status.exists() else []:
        if line.startswith("VmHWM:"):
            return float(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
