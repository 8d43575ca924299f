"""Tensors kept between runs, under a name that says what they were made from.

The cache only saves time: an entry that is damaged is as good as none, and one that cannot be written costs no run.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor


def root() -> Path | None:
    """``$SPPCTL_CACHE`` or ``~/.cache/sppctl``; None if there is no place for a cache."""
    try:
        return Path(os.environ.get("SPPCTL_CACHE") or "~/.cache/sppctl").expanduser()
    except RuntimeError:  # no home directory
        return None


def entry(folder: str, depends_on: Mapping[str, Any]) -> Path | None:
    """The file in a folder of the cache for tensors that depend on these values alone.

    None if there is no place for a cache, or if the ``tokenizer`` that they depend on cannot be identified.
    """
    cache = root()
    if depends_on["tokenizer"] is None or cache is None:
        return None
    name = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:32]
    return cache / folder / f"{name}.safetensors"


def read(path: Path | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of an entry; both empty if it is not there, or not as it was written."""
    if path is None:
        return {}, {}
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError):
        return {}, {}
    return (tensors, metadata) if metadata.pop("hash", None) == seal(path, tensors, metadata) else ({}, {})


def write(path: Path | None, tensors: dict[str, Tensor], **metadata: str) -> None:
    """Puts an entry with its hash in place."""
    if path is not None:
        store(path, save(tensors, metadata | {"hash": seal(path, tensors, metadata)}))


def store(path: Path, data: bytes) -> None:
    """Puts a whole file into the cache, or none: a disk that is full or read-only is not a reason to stop."""
    here = f".{path.stem}-{platform.node()}-"
    partial = path.with_name(f"{here}{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f"{glob.escape(here)}*.tmp"):
            if not psutil.pid_exists(int(left.stem.rpartition("-")[2])):  # of a process that was killed
                left.unlink(missing_ok=True)
        try:
            partial.write_bytes(data)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def seal(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """What an entry holds as its ``hash``: of its name too, so one that was copied over another is not an entry."""
    return f"{digest(tensors)} {hashlib.sha256(json.dumps([path.name, metadata], sort_keys=True).encode()).hexdigest()}"


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Identifies tensors by names, dtypes, shapes and values."""
    content = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        content.update(tensor.contiguous().numpy().tobytes())
    return content.hexdigest()[:16]


def tokenizer_identity(tokenizer: Any) -> str | None:
    """Identifies a tokenizer by what it makes of a text; None if that cannot be told, so nothing is cached.

    Fast tokenizers write out all they do. Of others, class, vocabulary, special tokens and plain settings are taken.
    """
    parts: list[Any] = [type(tokenizer).__module__, type(tokenizer).__qualname__]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        try:
            serialised = json.loads(backend.to_str())
        except Exception:  # what tokenizers raises when a part is written in Python
            return None
        # both depend on how the tokenizer was last called, and what is cached is made without them
        serialised.pop("padding", None)
        serialised.pop("truncation", None)
        parts += [serialised, getattr(tokenizer, "split_special_tokens", None)]
    else:
        try:
            vocabulary = sorted((str(token), index) for token, index in tokenizer.get_vocab().items())
        except (AttributeError, NotImplementedError):
            return None
        plain = {
            name: value
            for name, value in vars(tokenizer).items()
            if isinstance(value, bool | int | float | str) and name != "name_or_path"
        }
        special = {name: str(token) for name, token in getattr(tokenizer, "special_tokens_map", {}).items()}
        parts += [vocabulary, special, plain]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def same_tokenizer(one: Any, other: Any) -> bool:
    """Whether two tokenizers make the same tokens: that of a GGUF file need not be that of the unpacked model."""
    identity = tokenizer_identity(one)
    marks = ("chat_template", "special_tokens_map")
    same_marks = all(getattr(one, mark, None) == getattr(other, mark, None) for mark in marks)
    return identity is not None and identity == tokenizer_identity(other) and same_marks
