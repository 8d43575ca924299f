"""Reading and writing safetensors files tensor by tensor, so that no file has to fit in memory.

The safetensors library reads lazily but writes a file only as a whole; :class:`OwnFile` writes the same format
(8 bytes of header length, JSON header, data) with every tensor's position fixed in advance.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from sppctl.errors import UserError, first_line
from sppctl.files.disk import FULL, sync, writing
from sppctl.files.names import INDEX_NAME, SINGLE_NAME

ADAPTER_NAME, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_SHARD = re.compile(r"(shard-\d+-)?model-\d+-of-\d+\.safetensors")  # transformers' names of shards
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@contextlib.contextmanager
def saving(path: Path) -> Iterator[None]:
    """Around a library call that writes a model or adapter to ``path``: raises WriteError if the disk is full."""
    with writing(path, reasons=FULL):
        try:
            yield
        except (RuntimeError, SafetensorError) as error:
            if not hides_full_disk(error):
                raise
            raise OSError(errno.ENOSPC, f"{first_line(error)} (is the disk full?)") from error


def hides_full_disk(error: Exception) -> bool:
    """Whether an error of a library that writes tensors or archives may be caused by a full disk."""
    text = str(error).lower()
    return isinstance(error, SafetensorError) or "write" in text or "writing" in text or "enforce fail" in text


def reserve(path: Path, size: int) -> None:
    """Creates a file and allocates its ``size`` bytes, or raises OSError.

    Without this, writing into the mapped file on a full disk would kill the process (SIGBUS).
    """
    with path.open("wb") as file:
        if size and hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(file.fileno(), 0, size)


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a safetensors file: dtype, shape, and the position of its bytes from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """The tensors of a safetensors file and its metadata.

    The library checks sizes and offsets, but it does not expose offsets, which writing in place needs, and accepts
    duplicate names. So the header is read again here.

    Raises:
        UserError: the file is not safetensors or damaged, or has a dtype that sppctl does not support.
    """

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        duplicates = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        if duplicates:
            raise ValueError(f"{duplicates[0]} appears twice")
        return dict(pairs)

    try:
        # for numpy, because for torch it maps the data, which counts where memory is limited
        with safe_open(path, "numpy"), path.open("rb") as file:
            start = 8 + struct.unpack("<Q", file.read(8))[0]
            # the library has limited its size and depth
            header = json.loads(file.read(start - 8), object_pairs_hook=without_duplicates)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is truncated or damaged, or not a safetensors file ({error}); download or write it again"
        ) from error
    metadata = header.pop("__metadata__", {})
    unprintable = [name for name in header if not name.isprintable()]
    if unprintable:
        raise UserError(f"{path}: {unprintable[0]!r} is not the name of a tensor; download or write it again")
    dtypes = {name: entry["dtype"] for name, entry in header.items()}
    unsupported = [f"{name} has dtype {dtype}" for name, dtype in dtypes.items() if dtype not in _DTYPES]
    if unsupported:
        raise UserError(f"{path}: {unsupported[0]}, which sppctl cannot read; use a checkpoint that is not quantised")
    specs = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        specs[name] = TensorSpec(_DTYPES[entry["dtype"]], tuple(entry["shape"]), start + first, start + last)
    return specs, metadata


class TensorFile:
    """A safetensors file to read from."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.specs, self.metadata = read_header(path)

    def read(self, name: str, entry: int | None = None, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """A tensor, or one entry along its first dimension, copied into memory.

        ``buffer``: uint8, large enough; the tensor is in its memory.
        """
        spec = self.specs[name]
        start, stop, shape = spec.start, spec.stop, spec.shape
        if entry is not None:
            size = (stop - start) // shape[0]
            start, stop, shape = start + entry * size, start + (entry + 1) * size, shape[1:]
        data = torch.empty(stop - start, dtype=torch.uint8) if buffer is None else buffer[: stop - start]
        # not a mapping, which would count with the size of the whole file where memory is limited
        with self.path.open("rb", buffering=0) as file:
            file.seek(start)
            view, count = data.numpy().data, 0
            while count < len(view):
                size = file.readinto(view[count:])
                if not size:
                    raise UserError(f"{self.path} has become shorter while it was read; write or download it again")
                count += size
        return data.view(spec.dtype).reshape(shape)


class OwnFile(TensorFile):
    """A safetensors file that sppctl writes, tensor by tensor in any order."""

    def __init__(self, path: Path) -> None:
        """Opens a file for writing; raises UserError for a link: sppctl must not change the file that it points to."""
        if path.is_symlink():
            raise UserError(f"{path} is a link, and sppctl only writes to its own files; delete {path.parent}")
        super().__init__(path)

    @classmethod
    def create(
        cls, path: Path, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
    ) -> Self:
        """Creates a file with space for these tensors; their bytes are zero until :meth:`write`."""
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        offset = 0
        for name, (dtype, shape) in shapes.items():
            stop = offset + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, stop]}
            offset = stop
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        path.unlink(missing_ok=True)
        with writing(path, 8 + len(text) + offset), path.open("xb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + offset)
        return cls(path)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Writes a tensor at its position, converted to the dtype given to :meth:`create`."""
        spec = self.specs[name]
        assert tuple(tensor.shape) == spec.shape, f"{name}: {tuple(tensor.shape)} into {spec.shape}"
        data = tensor.detach().to("cpu", spec.dtype).contiguous().view(-1).view(torch.uint8)
        with writing(self.path, spec.stop - spec.start), self.path.open("r+b") as file:
            file.seek(spec.start)
            file.write(data.numpy().data)


def is_plain(name: object) -> bool:
    """Whether a name from an index, a configuration or an archive is a plain file name, without a path."""
    return isinstance(name, str) and name.isprintable() and not {"/", "\\"} & set(name) and name not in ("", ".", "..")


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds a PEFT adapter and no model weights, which would take precedence."""
    names = {path.name for path in directory.iterdir()}
    if SINGLE_NAME in names or INDEX_NAME in names or any(map(_SHARD.fullmatch, names)):
        return False
    return not names.isdisjoint((ADAPTER_CONFIG, ADAPTER_NAME, "adapter_model.bin"))


def adapter_settings(directory: Path) -> dict[str, Any]:
    """The settings of a PEFT adapter; raises UserError if they are missing or damaged."""
    try:
        settings = json.loads((directory / ADAPTER_CONFIG).read_text())
        if not isinstance(settings, dict):
            raise ValueError("not a mapping")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{directory} is not a PEFT adapter, or its {ADAPTER_CONFIG} is damaged: {error}") from error
    return settings


def adapter_file(directory: Path) -> Path:
    """The weights file of a PEFT adapter; raises UserError if there is none, or only a pickled one (never loaded)."""
    path = directory / ADAPTER_NAME
    if not path.is_file():
        raise UserError(str(directory), f"this PEFT adapter has no {ADAPTER_NAME}{_pickled(directory)}")
    return path


def _pickled(directory: Path) -> str:
    names = sorted(path.name for path in directory.glob("*.bin"))
    return f" (only {names[0]}, which is pickle: convert it to safetensors first)" if names else ""


def read_index(path: Path) -> dict[str, str]:
    """The shard of each tensor; raises UserError for a damaged index, or a shard outside its directory."""
    try:
        content = json.loads(path.read_text())
        shards: dict[str, str] = dict(content["weight_map"].items())
        names = set(shards.values())
        content["metadata"]  # transformers requires it
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not a readable index of safetensors shards; download it again") from error
    for name in names:
        if not is_plain(name) or not name.endswith(".safetensors"):
            raise UserError(f"{path}: shard {name!r} is not the name of a safetensors file in the same directory")
    return shards


class TensorFiles:
    """All safetensors files of a checkpoint directory, to read from, as one mapping from name to tensor."""

    _kind: type[TensorFile] = TensorFile

    def __init__(self, directory: Path) -> None:
        """Reads every header.

        Raises:
            UserError: there are no safetensors files, one is missing or damaged, or the index does not match them.
        """
        self.directory = directory
        self.index = read_index(directory / INDEX_NAME) if (directory / INDEX_NAME).is_file() else None
        self.files: dict[str, TensorFile] = {name: self._kind(directory / name) for name in self._names()}
        self.home: dict[str, str] = {}
        for name, file in self.files.items():
            for tensor in file.specs:
                if tensor in self.home:
                    raise UserError(f"{directory}: {tensor} is in {self.home[tensor]} and in {name}; download it again")
                self.home[tensor] = name
        index = self.home if self.index is None or SINGLE_NAME in self.files else self.index
        for tensor in index.keys() | self.home.keys():
            actual, indexed = self.home.get(tensor, "no shard"), index.get(tensor, "no shard")
            if actual != indexed:
                raise UserError(
                    f"{directory}: {tensor} is in {actual}, but {INDEX_NAME} says {indexed}; download both again"
                )

    def _names(self) -> list[str]:
        directory = self.directory
        present = sorted(path.name for path in directory.glob("*.safetensors") if path.is_file())
        if SINGLE_NAME in present:  # takes precedence over an index, as in transformers
            names = [SINGLE_NAME]
        elif self.index is not None:
            names = sorted(set(self.index.values()))
        elif is_adapter(directory):
            raise UserError(f"{directory}: this is a PEFT adapter; model.path takes a full model")
        else:
            names = [name for name in present if name != ADAPTER_NAME]
        if not names:
            raise UserError(f"{directory} holds no safetensors weights{_pickled(directory)}")
        missing = [name for name in names if name not in present]
        if missing:
            raise UserError(f"{directory}: shard {missing[0]} is missing, but {INDEX_NAME} lists it; download it again")
        surplus = [name for name in present if _SHARD.fullmatch(name) and name not in names]
        if surplus and SINGLE_NAME in present:
            raise UserError(f"{directory}: {surplus[0]} is a shard beside {SINGLE_NAME}; remove one of them")
        if surplus:
            raise UserError(f"{directory}: {INDEX_NAME} does not list {surplus[0]}; download both again")
        return names

    def __iter__(self) -> Iterator[str]:
        return iter(self.home)

    def __contains__(self, name: str) -> bool:
        return name in self.home

    def spec(self, name: str) -> TensorSpec:
        """Dtype, shape and position of a tensor."""
        return self.files[self.home[name]].specs[name]

    def read(self, name: str, entry: int | None = None, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """As :meth:`TensorFile.read`."""
        return self.files[self.home[name]].read(name, entry, buffer)

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(file.path.stat().st_size for file in self.files.values())


class OwnFiles(TensorFiles):
    """The files of a checkpoint that sppctl writes: its tensors can be overwritten."""

    _kind = OwnFile

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Overwrites a tensor in its file."""
        file = self.files[self.home[name]]
        assert isinstance(file, OwnFile)
        file.write(name, tensor)

    def sync(self, names: Iterable[str] | None = None) -> None:
        """Waits until these files, or all of them, are on the disk."""
        for name in self.files if names is None else names:
            with writing(self.files[name].path):
                sync(self.files[name].path)
