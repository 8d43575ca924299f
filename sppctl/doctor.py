"""What this installation and machine can do: versions, dtypes, kernels, memory, caches; each with what to do."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch
from packaging.requirements import Requirement

from sppctl import __version__, machine
from sppctl.adapters.spp import fused
from sppctl.errors import first_line
from sppctl.files import cache
from sppctl.fused import FusedKernels
from sppctl.inspect import semi_structured
from sppctl.packed import format as packed_format
from sppctl.pruners import sparsegpt

OPTIONAL = {"deepspeed": "launch.strategy=zero3"}  # extras of sppctl, and what needs each
GIB = 2**30
NVIDIA_DRIVER = Path("/proc/driver/nvidia")
LITTLE_DISK = 10 * GIB  # a 2-billion-parameter model takes about as much through the pipeline


class State(StrEnum):
    """How a finding is meant."""

    OK = "ok"
    NOTE = "note"  # works, with a limit worth knowing
    PROBLEM = "problem"  # something will fail


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    subject: str
    state: State
    text: str
    advice: str = ""  # what to do; empty: nothing


def examine() -> list[Finding]:
    """Looks at everything; computes for a moment where a GPU kernel is tested, and downloads nothing."""
    return [*_software(), *_optional(), *_compute(), *_kernels(), *_memory(), *_places(), *_hub()]


def _software() -> Iterator[Finding]:
    yield Finding("sppctl", State.OK, f"{__version__}, Python {platform.python_version()}, {platform.platform()}")
    versions = {}
    for text in importlib.metadata.requires("sppctl") or ():
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        install = f"pip install '{requirement.name}{requirement.specifier}'"
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(requirement.name, State.PROBLEM, "not installed", install)
            continue
        versions[requirement.name] = version
        if not requirement.specifier.contains(version, prereleases=True):
            yield Finding(requirement.name, State.PROBLEM, f"{version} is outside {requirement.specifier}", install)
    shown = ("torch", "transformers", "peft", "accelerate", "datasets", "lm-eval", "safetensors", "huggingface-hub")
    text = ", ".join(f"{name} {versions[name]}" for name in shown if name in versions)
    yield Finding("libraries", State.OK, text)


def _optional() -> Iterator[Finding]:
    for name, use in OPTIONAL.items():
        try:
            yield Finding(name, State.OK, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, State.NOTE, f"not installed; only {use} needs it", f"pip install 'sppctl[{name}]'")


def _compute() -> Iterator[Finding]:
    count = torch.cuda.device_count()
    device = torch.device("cuda" if count else "cpu")
    if not count and torch.version.cuda is None and NVIDIA_DRIVER.exists():
        text = f"{machine.describe()}; there is an NVIDIA driver, but this build of torch has no CUDA"
        yield Finding("device", State.NOTE, text, "install a CUDA build of torch (pytorch.org)")
    else:
        yield Finding("device", State.OK, machine.describe())
    for dtype in ("bfloat16", "float16"):
        compute = machine.choose_dtype("auto", dtype, device)
        native = compute.dtype == dtype
        text = "computed natively" if native else f"model.compute_dtype=auto means {compute.text}"
        yield Finding(dtype, State.OK if native else State.NOTE, text)


def _kernels() -> Iterator[Finding]:
    tested = {
        "SPP kernels": fused.KERNELS,
        "SparseGPT kernel": sparsegpt.KERNELS,
        "packed weights": packed_format.KERNELS,
    }
    if not torch.cuda.is_available():
        for subject in tested:
            yield Finding(subject, State.OK, "PyTorch's own operations (the Triton kernels need a GPU)")
        yield Finding("2:4 kernels", State.OK, "none on this device: zeros are multiplied like any other weight")
        return
    for subject, kernels in tested.items():
        yield _self_test(subject, kernels, torch.device("cuda", torch.cuda.current_device()))
    reason = semi_structured.no_kernel("cuda", torch.cuda.get_device_capability(), torch.bfloat16) or ""
    yield Finding("2:4 kernels", State.NOTE if reason else State.OK, reason or "sparse tensor cores available")


def _self_test(subject: str, kernels: FusedKernels, device: torch.device) -> Finding:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = kernels.on(device)
    if module is not None:
        return Finding(subject, State.OK, "the Triton kernels passed their self-test")
    reason = first_line(str(caught[-1].message)) if caught else "the self-test failed"
    return Finding(subject, State.NOTE, reason, "install triton and a C compiler that match torch")


def _memory() -> Iterator[Finding]:
    free = machine.free_memory(torch.device("cpu")) / GIB
    yield Finding("memory", State.OK, f"{free:.1f} GiB free; `sppctl plan CONFIG` estimates what a run needs")
    for index in range(torch.cuda.device_count()):
        available, total = (size / GIB for size in torch.cuda.mem_get_info(index))
        yield Finding(f"GPU {index}", State.OK, f"{available:.1f} of {total:.1f} GiB free")


def _places() -> Iterator[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE

    root = cache.root()
    places = {"run directory": Path.cwd(), "hub cache": Path(HF_HUB_CACHE)} | ({"cache": root} if root else {})
    fixes = {"run directory": "set run.dir", "hub cache": "set HF_HOME", "cache": "set SPPCTL_CACHE"}
    if root is None:
        yield Finding("cache", State.NOTE, "no home directory, nothing is cached between runs", "set SPPCTL_CACHE")
    for subject, path in places.items():
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
        free = shutil.disk_usage(existing).free
        text = f"{path}, {free / GIB:.1f} GiB free"
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            yield Finding(subject, State.PROBLEM, f"{text}, not writable", f"{fixes[subject]} to a writable directory")
        elif free < LITTLE_DISK:
            yield Finding(subject, State.NOTE, text, f"make room, or {fixes[subject]} to a larger disk")
        else:
            yield Finding(subject, State.OK, text)


def _hub() -> Iterator[Finding]:
    from datasets.config import HF_DATASETS_OFFLINE
    from huggingface_hub import get_token
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE

    if HF_HUB_OFFLINE or HF_DATASETS_OFFLINE:
        advice = "unset HF_HUB_OFFLINE and HF_DATASETS_OFFLINE to download; scripts/prefetch.sh fills the cache"
        yield Finding("hub", State.NOTE, "offline: only what is in the cache is found", advice)
    else:
        yield Finding("hub", State.OK, f"{ENDPOINT}, downloads are allowed")
    if get_token() is None:
        advice = "hf auth login, or set HF_TOKEN"
        yield Finding("hub token", State.NOTE, "none: gated models (Llama, Gemma) cannot be downloaded", advice)
    else:
        yield Finding("hub token", State.OK, "found")
