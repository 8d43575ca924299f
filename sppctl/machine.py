"""The machine that a process runs on: its device, native dtypes and memory."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import os
import platform
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from sppctl import __version__

if TYPE_CHECKING:
    import torch

R = TypeVar("R")
PROCESS = Path("/proc/self")  # Linux only; elsewhere the peak counts from the start of the process
CPU_INFORMATION = Path("/proc/cpuinfo")
CGROUPS = Path("/sys/fs/cgroup")
# files of a control group with its limit and use, and the entries of memory.stat with pages of files, which the kernel
# gives up when memory is short; by version
_CGROUP_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
    2: ("memory.max", "memory.current", ("inactive_file", "active_file")),
}
# variables that disable the bfloat16 units of a CPU: oneDNN's limits below AVX512_CORE_BF16 (in upper or lower case;
# the old name is read if the new one is not set), and PyTorch's own (only in lower case)
_ONEDNN = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
_ONEDNN_WITHOUT = {"sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_core", "avx512_core_vnni"}
_ATEN, _ATEN_WITHOUT = "ATEN_CPU_CAPABILITY", {"default", "avx2"}


class Compute(NamedTuple):
    """A compute dtype."""

    dtype: str
    text: str  # a message with the dtype and the reason
    widened: bool = False  # float32 only because the device does not natively multiply the stored dtype


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``: the names used in configurations and records."""
    return str(dtype).removeprefix("torch.")


def torch_dtype(name: str) -> torch.dtype:
    """The inverse of :func:`dtype_name`."""
    import torch

    return getattr(torch, name)  # type: ignore[no-any-return]


def training_dtype(stored: str) -> str:
    """The dtype to train weights of a stored dtype in: never float16, where gradients overflow without loss scaling."""
    return "bfloat16" if stored == "float16" else stored


def choose_dtype(configured: str, stored: str, device: torch.device, *, training: bool = False) -> Compute:
    """The dtype to compute in, for everything that loads a model.

    ``configured`` is model.compute_dtype: a name, or auto for the ``stored`` dtype of the weights if the device
    multiplies it natively, else float32.
    """
    if configured != "auto":
        return Compute(configured, f"computing in {configured} as configured")
    dtype = training_dtype(stored) if training else stored
    reason = "" if dtype == stored else f" ({stored} gradients overflow)"
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
    """Why this CPU does not multiply bfloat16 natively, from its flags and the variables that disable its units.

    Timing a few products would be more direct, but gives different answers on a busy machine.
    """
    import torch

    flags = set(_entry(CPU_INFORMATION, "flags").split())
    if not flags:
        return "the dtypes that this CPU multiplies natively are unknown"
    if not flags & {"avx512_bf16", "amx_bf16"} or not torch.backends.mkldnn.is_available():
        return "this CPU has no bfloat16 units"
    onednn = next((variable for variable in _ONEDNN if os.environ.get(variable)), _ONEDNN[0])
    for variable, disabling_values in ((onednn, _ONEDNN_WITHOUT), (_ATEN, _ATEN_WITHOUT)):
        value = os.environ.get(variable, "")
        if (value if variable == _ATEN else value.lower()) in disabling_values:
            return f"this CPU has no bfloat16 units under {variable}={value}"
    return None


def cpu_name() -> str:
    """The model of the processor."""
    return _entry(CPU_INFORMATION, "model name") or platform.processor() or platform.machine()


def _entry(file: Path, name: str) -> str:
    """The first value of a name in a file of ``NAME: VALUE`` lines; empty if there is none."""
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name), "")


def describe() -> str:
    """The GPU, or the processor and PyTorch's number of threads."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()} ({torch.cuda.device_count()} visible)"
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def versions(*libraries: str) -> dict[str, str]:
    """The versions of sppctl and of installed libraries."""
    return {"sppctl": __version__} | {name: importlib.metadata.version(name) for name in libraries}


def reset_peak_memory() -> None:
    """Resets what :func:`peak_memory_mb` reports."""
    import torch

    with contextlib.suppress(OSError):  # no /proc, or one that cannot be written
        (PROCESS / "clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory_mb() -> dict[str, float]:
    """The peak memory of this process, and on the GPU, in MiB."""
    import torch

    kib = _entry(PROCESS / "status", "VmHWM").split()
    of_process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    peak = {"process": round((float(kib[0]) if kib else of_process) / 1024, 1)}
    if torch.cuda.is_available():
        peak["cuda"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return peak


def release_memory() -> None:
    """Frees the memory of models that are no longer referenced, on GPUs also what PyTorch keeps for itself."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; on the CPU, also within the limits of this process and its control groups."""
    import psutil
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return max(0, min([int(psutil.virtual_memory().available), *_left_in_groups(), *_left_of_data()]))


def _left_in_groups() -> Iterator[int]:
    """What each control group of this process that limits memory leaves to it, in bytes."""
    with contextlib.suppress(OSError):  # not Linux
        for line in (PROCESS / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            version = 1 if controllers else 2
            # the root of version 2 is elsewhere where both are in use
            roots = [CGROUPS / "memory"] if controllers else [CGROUPS / "unified", CGROUPS]
            for root in roots:
                # a container may show its own group as the root, and name it by its path outside
                folders = [root.joinpath(*Path(path).parts[1:depth]) for depth in range(1, len(Path(path).parts) + 1)]
                for folder in folders:
                    yield from _left_in(folder, *_CGROUP_FILES[version])


def _left_in(folder: Path, limit_file: str, use_file: str, reclaimable: tuple[str, ...]) -> Iterator[int]:
    with contextlib.suppress(OSError, ValueError):  # no such group, or no limit ("max")
        limit, use = (int((folder / file).read_text()) for file in (limit_file, use_file))
        entries = dict(line.split(" ", 1) for line in (folder / "memory.stat").read_text().splitlines())
        yield limit - use + sum(int(entries.get(name, 0)) for name in reclaimable)


def _left_of_data() -> Iterator[int]:
    """What the process's own limit of its data leaves (``ulimit -d``), in bytes."""
    limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
    used = _entry(PROCESS / "status", "VmData").split()
    if limit != resource.RLIM_INFINITY and used:
        yield limit - 1024 * int(used[0])


def in_halves(compute: Callable[[Any], list[R]], batch: Sequence[Any]) -> list[R]:
    """The results for a batch, computed in halves if the batch does not fit on the GPU."""
    import torch

    try:
        return compute(batch)
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    torch.cuda.empty_cache()
    half = len(batch) // 2
    return in_halves(compute, batch[:half]) + in_halves(compute, batch[half:])
