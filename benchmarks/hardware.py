"""What a benchmark ran on."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def describe(device: torch.device) -> str:
    """Name of the processor or the GPU, threads, the instructions that PyTorch uses, and versions."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{_cpu_name()}, {torch.get_num_threads()} threads, {_instructions()}, torch {torch.__version__}"


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
