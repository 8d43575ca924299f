"""What a benchmark ran on, and how it tells the time."""

from __future__ import annotations

import time
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

import torch

from sppctl.machine import cpu_name


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
    return f"{cpu_name()}, {torch.get_num_threads()} threads, {_instructions()}, torch {torch.__version__}"


def _instructions() -> str:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = [flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in text]
    return found[0] if found else torch.backends.cpu.get_cpu_capability()
