"""What a process runs on, which dtype that is good at, and how much memory it has taken."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import resource
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from sppctl import __version__

if TYPE_CHECKING:
    import torch

R = TypeVar("R")
PROCESS = Path("/proc/self")  # Linux; elsewhere the peak is that since the process started
CPU_INFORMATION = Path("/proc/cpuinfo")
# what switches the bfloat16 units of a CPU off: oneDNN's limits below AVX512_CORE_BF16 (in any case; its old name
# counts where the new one is not set), and PyTorch's own (only in lower case)
_ONEDNN = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
_ONEDNN_WITHOUT = {"sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_core", "avx512_core_vnni"}
_ATEN, _ATEN_WITHOUT = "ATEN_CPU_CAPABILITY", {"default", "avx2"}


class Compute(NamedTuple):
    """What something computes in."""

    dtype: str
    text: str  # says it, and why
    widened: bool = False  # float32 only because the device does not multiply what is stored


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``: the names that configurations and records use."""
    return str(dtype).removeprefix("torch.")


def torch_dtype(name: str) -> torch.dtype:
    """The inverse of :func:`dtype_name`."""
    import torch

    return getattr(torch, name)  # type: ignore[no-any-return]


def choose_dtype(wanted: str, stored: str, device: torch.device, *, training: bool = False) -> Compute:
    """The dtype to compute in; whoever loads a model asks this.

    ``wanted`` is model.compute_dtype: a name, or auto for the ``stored`` dtype of the weights where the device
    multiplies it natively, else float32. Training never uses float16, where gradients overflow without loss scaling.
    """
    if wanted != "auto":
        return Compute(wanted, f"computing in {wanted} as configured")
    dtype, reason = stored, ""
    if training and stored == "float16":
        dtype, reason = "bfloat16", " (float16 gradients overflow)"
    lacking = _lacking(dtype, device)
    if lacking is not None:
        dtype, reason = "float32", f" ({lacking})"
    return Compute(dtype, f"computing in {dtype}{reason}", lacking is not None)


def _lacking(dtype: str, device: torch.device) -> str | None:
    """Why a device does not multiply matrices of a dtype natively; None if it does."""
    import torch

    if dtype not in ("bfloat16", "float16"):
        return None
    if device.type == "cuda":
        with torch.cuda.device(device):
            native = dtype == "float16" or torch.cuda.is_bf16_supported(including_emulation=False)
        return None if native else "this GPU has no bfloat16 units"
    if device.type == "cpu":
        return "CPUs do not multiply float16 natively" if dtype == "float16" else _lacking_bfloat16()
    if (device.type, dtype) == ("mps", "float16"):
        return None
    return f"{dtype} on {device.type} is not known to be native"


def _lacking_bfloat16() -> str | None:
    """Why this CPU does not multiply bfloat16 natively, by its flags and by what switches its units off.

    Timing a few products would ask the hardware itself, but on a busy machine it would answer differently each time.
    """
    import torch

    flags = set(_entry(CPU_INFORMATION, "flags").split())
    if not flags:
        return "the dtypes that this CPU multiplies natively are unknown"
    if not flags & {"avx512_bf16", "amx_bf16"} or not torch.backends.mkldnn.is_available():
        return "this CPU has no bfloat16 units"
    name = next((name for name in _ONEDNN if os.environ.get(name)), _ONEDNN[0])
    for switch, without in ((name, _ONEDNN_WITHOUT), (_ATEN, _ATEN_WITHOUT)):
        value = os.environ.get(switch, "")
        if (value if switch == _ATEN else value.lower()) in without:
            return f"this CPU has no bfloat16 units under {switch}={value}"
    return None


def cpu_name() -> str:
    """The model of the processor."""
    return _entry(CPU_INFORMATION, "model name") or platform.processor() or platform.machine()


def _entry(file: Path, name: str) -> str:
    """The first value of that name in a file of Linux; empty where there is none."""
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name), "")


def describe() -> str:
    """The GPU, or the processor and the threads that PyTorch uses of it."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()} ({torch.cuda.device_count()} visible)"
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def versions(*libraries: str) -> dict[str, str]:
    """The versions of sppctl and of installed libraries."""
    return {"sppctl": __version__} | {name: importlib.metadata.version(name) for name in libraries}


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

    kib = _entry(PROCESS / "status", "VmHWM").split()
    peak = {"process": round((float(kib[0]) if kib else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1024, 1)}
    if torch.cuda.is_available():
        peak["cuda"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return peak


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device."""
    import psutil
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def in_halves(compute: Callable[[Any], list[R]], batch: Sequence[Any]) -> list[R]:
    """What is computed of a batch, in halves where the whole does not fit on the GPU."""
    import torch

    try:
        return compute(batch)
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    torch.cuda.empty_cache()
    half = len(batch) // 2
    return in_halves(compute, batch[:half]) + in_halves(compute, batch[half:])
