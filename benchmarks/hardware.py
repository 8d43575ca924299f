"""Describes the hardware of a benchmark and selects its clock."""

from __future__ import annotations

import time
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

import torch

from sppctl.machine import cpu_name


def add_clock(parser: ArgumentParser) -> None:
    """Adds the option that the scripts share."""
    text = "measure the CPU time of the process, for a shared machine; needs OMP_NUM_THREADS=1 and no GPU"
    parser.add_argument(
        "--cpu-time", dest="clock", action="store_const", const=time.process_time, default=time.perf_counter, help=text
    )


def name_of(clock: Callable[[], float]) -> str:
    """The name of the clock for the heading of a table."""
    return "CPU time" if clock is time.process_time else "wall-clock time"


def describe(device: torch.device) -> str:
    """The name of the CPU or GPU, the number of threads, the instruction set that PyTorch uses, and versions."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{cpu_name()}, {torch.get_num_threads()} threads, {_instructions()}, torch {torch.__version__}"


def _instructions() -> str:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = [flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in text]
    return found[0] if found else torch.backends.cpu.get_cpu_capability()
