"""A cache of tensors between runs, under names derived from everything that they depend on.

The cache only saves time: a damaged entry counts as missing, and an entry that cannot be written stops no run.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from torch import Tensor

FOLDERS = ("windows", "examples", "samples")  # of calibration, of training, of generated text


def root() -> Path | None:
    """``$SPPCTL_CACHE`` or ``~/.cache/sppctl``; None if there is no home directory."""
    try:
        return Path(os.environ.get("SPPCTL_CACHE") or "~/.cache/sppctl").expanduser()
    except RuntimeError:  # expanduser without a home directory
        return None


def entry(folder: str, depends_on: Mapping[str, Any]) -> Path | None:
    """The file in a folder of the cache for tensors that depend only on these values.

    None if there is no cache, or if the ``tokenizer`` that they depend on cannot be identified.
    """
    cache = root()
    if depends_on["tokenizer"] is None or cache is None:
        return None
    name = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:32]
    return cache / folder / f"{name}.safetensors"


def read(path: Path | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of an entry; both empty if it does not exist or is damaged."""
    if path is None:
        return {}, {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError):
        return {}, {}
    return (tensors, metadata) if metadata.pop("hash", None) == seal(path, tensors, metadata) else ({}, {})


def write(path: Path | None, tensors: dict[str, Tensor], **metadata: str) -> None:
    """Writes an entry with its hash."""
    if path is not None:
        from safetensors.torch import save

        store(path, save(tensors, metadata | {"hash": seal(path, tensors, metadata)}))


def store(path: Path, data: bytes) -> None:
    """Writes a file into the cache atomically; errors are ignored: a full or read-only disk is no reason to stop."""
    prefix = f".{path.stem}-{platform.node()}-"  # of this machine, whose process ids can be checked
    partial = path.with_name(f"{prefix}{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in path.parent.glob(f"{glob.escape(prefix)}*.tmp"):
            if not psutil.pid_exists(int(leftover.stem.rpartition("-")[2])):  # its process was killed
                leftover.unlink(missing_ok=True)
        try:
            partial.write_bytes(data)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def seal(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """The ``hash`` of an entry; it covers the file's name, so that an entry copied over another is detected."""
    return f"{digest(tensors)} {hashlib.sha256(json.dumps([path.name, metadata], sort_keys=True).encode()).hexdigest()}"


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Identifies tensors by names, dtypes, shapes and values."""
    content = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        content.update(tensor.contiguous().numpy().tobytes())
    return content.hexdigest()[:16]


def tokenizer_identity(tokenizer: Any) -> str | None:
    """A hash of everything that determines a tokenizer's tokens; None if it is unknown, so nothing is cached.

    Fast tokenizers serialise all of it. Others are identified by class, vocabulary, special tokens and plain settings.
    """
    parts: list[Any] = [type(tokenizer).__module__, type(tokenizer).__qualname__]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        try:
            serialised = backend.to_str()
        except Exception:  # tokenizers raises this type for parts written in Python
            return None
        return _serialised_identity(*parts, serialised, getattr(tokenizer, "split_special_tokens", None))
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
    return _hash([*parts, vocabulary, special, plain])


@functools.lru_cache(maxsize=2)  # a sweep asks for that of one tokenizer several times in every run
def _serialised_identity(module: str, name: str, serialised: str, splits: bool | None) -> str:
    content = json.loads(serialised)
    # both depend on the tokenizer's last call, and cached tokens are made without them
    content.pop("padding", None)
    content.pop("truncation", None)
    return _hash([module, name, content, splits])


def _hash(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def same_tokenizer(first: Any, second: Any) -> bool:
    """Whether two tokenizers make the same tokens: those of a GGUF file and of the unpacked model may differ."""
    identity = tokenizer_identity(first)
    settings = ("chat_template", "special_tokens_map")
    same_settings = all(getattr(first, name, None) == getattr(second, name, None) for name in settings)
    return identity is not None and identity == tokenizer_identity(second) and same_settings
