"""Tensors kept between runs, under a name that says what they were made from.

The cache only saves time: an entry that is damaged is as good as none, and one that cannot be written costs no run.
"""

from __future__ import annotations

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
    """The file for tensors that depend on these values alone: ``$SPPCTL_CACHE/FOLDER`` or ``~/.cache/sppctl/FOLDER``.

    None if there is no place for a cache, or if the tokenizer that they depend on cannot be identified.
    """
    folder_of_all = root()
    if depends_on["tokenizer"] is None or folder_of_all is None:
        return None
    name = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:32]
    return folder_of_all / folder / f"{name}.safetensors"


def folder(name: str) -> Path | None:
    """An existing folder of the cache; None if it cannot be made or written."""
    found = root()
    if found is None:
        return None
    try:
        (found / name).mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return found / name if os.access(found / name, os.W_OK) else None


def read(path: Path | None) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Tensors and metadata of an entry; None if it is not there, or not as it was written."""
    if path is None:
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError):
        return None
    return (tensors, metadata) if metadata.pop("hash", None) == seal(path, tensors, metadata) else None


def write(path: Path | None, tensors: dict[str, Tensor], **metadata: str) -> None:
    """Puts a whole entry in place, or none: a disk that is full or read-only is not a reason to stop."""
    if path is None:
        return
    here = f".{path.stem}-{platform.node()}-"
    partial = path.with_name(f"{here}{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f"{glob.escape(here)}*.tmp"):
            if not psutil.pid_exists(int(left.stem.rpartition("-")[2])):  # of a process that was killed
                left.unlink(missing_ok=True)
        try:
            partial.write_bytes(save(tensors, metadata | {"hash": seal(path, tensors, metadata)}))
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError:
        return


def seal(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """What an entry holds as its ``hash``: of its name too, so one that was copied over another is not an entry."""
    return f"{digest(tensors)} {hashlib.sha256(json.dumps([path.name, metadata], sort_keys=True).encode()).hexdigest()}"


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Identifies tensors by names, dtypes, shapes and values."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def tokenizer_identity(tokenizer: Any) -> str | None:
    """Identifies a tokenizer by what it makes of a text; None if that cannot be told, so nothing is cached.

    Fast tokenizers write out all they do. Of others, class, vocabulary, special tokens and plain settings are taken.
    """
    kind = type(tokenizer)
    parts: list[Any] = [kind.__module__, kind.__qualname__]
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
    elif callable(getattr(tokenizer, "get_vocab", None)):
        plain = {
            name: value
            for name, value in vars(tokenizer).items()
            if isinstance(value, bool | int | float | str) and name != "name_or_path"
        }
        special = {name: str(token) for name, token in getattr(tokenizer, "special_tokens_map", {}).items()}
        try:
            vocabulary = sorted((str(token), index) for token, index in tokenizer.get_vocab().items())
        except NotImplementedError:
            return None
        parts += [vocabulary, special, plain]
    else:
        return None
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def same_tokenizer(one: Any, other: Any) -> bool:
    """Whether two tokenizers make the same tokens: that of a GGUF file need not be that of the unpacked model."""
    identity = tokenizer_identity(one)
    marks = ("chat_template", "special_tokens_map")
    return (
        identity is not None
        and identity == tokenizer_identity(other)
        and all(getattr(one, mark, None) == getattr(other, mark, None) for mark in marks)
    )
