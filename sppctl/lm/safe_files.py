"""Reading and writing safetensors files tensor by tensor, so that no file has to fit in memory.

The safetensors library reads lazily but writes a file only as a whole; :class:`TensorFile` writes the same format
(8 bytes of header length, JSON header, data) with every tensor's place known beforehand.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from sppctl.errors import UserError
from sppctl.files import writing

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
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
_PACKED = {"F4", "F6_E2M3", "F6_E3M2"}  # several to a byte: torch has no such numbers
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def reserve(path: Path, size: int) -> None:
    """Makes a file and takes its room at once: a write into a mapped file on a full disk would end the process.

    Raises:
        OSError: there is no room for ``size`` bytes.
    """
    with path.open("wb") as file:
        if size and hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(file.fileno(), 0, size)


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a safetensors file: dtype, shape, and where its bytes lie (counted from the file's start)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """The tensors of a safetensors file and its metadata.

    Raises:
        UserError: not safetensors, cut short, or with a dtype that torch does not have.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", None) or {}
        base = 8 + length
        foreign = [f"{name} has dtype {entry['dtype']}" for name, entry in header.items() if entry["dtype"] in _PACKED]
        if foreign:
            raise UserError(f"{path}: {foreign[0]}, which sppctl cannot read; use a checkpoint that is not quantised")
        specs = {
            name: TensorSpec(
                _DTYPES[entry["dtype"]],
                tuple(entry["shape"]),
                base + entry["data_offsets"][0],
                base + entry["data_offsets"][1],
            )
            for name, entry in header.items()
        }
    except (struct.error, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({error}); download or write it again") from error
    for name, spec in specs.items():
        if math.prod(spec.shape) * spec.dtype.itemsize != spec.stop - spec.start:
            raise UserError(f"{path}: tensor {name} does not have the size its header says; download it again")
    end = max((spec.stop for spec in specs.values()), default=base)
    if end != size:
        raise UserError(f"{path} is truncated or damaged: {size} bytes, its header says {end}; download it again")
    return specs, metadata


class TensorFile:
    """A safetensors file that is filled tensor by tensor, in any order."""

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        self.path = path
        self.specs = specs

    @classmethod
    def create(
        cls, path: Path, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
    ) -> TensorFile:
        """Lays out a new file; the bytes are zero until :meth:`write`."""
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        offset = 0
        for name, (dtype, shape) in shapes.items():
            stop = offset + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, stop]}
            offset = stop
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with writing(path, 8 + len(text) + offset), path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + offset)
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> TensorFile:
        """An existing file, to read from or to overwrite tensors in."""
        return cls(path, read_header(path)[0])

    def read(self, name: str, entry: int | None = None) -> torch.Tensor:
        """A tensor, or one entry along its first dimension, copied into memory."""
        spec = self.specs[name]
        start, stop, shape = spec.start, spec.stop, spec.shape
        if entry is not None:
            size = (stop - start) // shape[0]
            start, stop, shape = start + entry * size, start + (entry + 1) * size, shape[1:]
        if start == stop:
            return torch.empty(shape, dtype=spec.dtype)
        flat = torch.from_file(
            str(self.path), shared=False, size=stop, dtype=torch.uint8
        )  # a private mapping: only the pages of this tensor are read
        return flat[start:stop].clone().view(spec.dtype).reshape(shape)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Puts a tensor in its place, converted to the dtype laid out for it."""
        spec = self.specs[name]
        assert tuple(tensor.shape) == spec.shape, f"{name}: {tuple(tensor.shape)} into {spec.shape}"
        data = tensor.detach().to("cpu", spec.dtype).contiguous().view(-1).view(torch.uint8)
        with writing(self.path, spec.stop - spec.start), self.path.open("r+b") as file:
            file.seek(spec.start)
            file.write(data.numpy().data)

    def sync(self) -> None:
        """Waits until the bytes are on the disk."""
        with writing(self.path), self.path.open("r+b") as file:
            os.fsync(file.fileno())


class TensorFiles:
    """All safetensors files of a checkpoint directory as one mapping from name to tensor."""

    def __init__(self, directory: Path) -> None:
        """Reads every header.

        Raises:
            UserError: no safetensors files, a missing shard, or a damaged file.
        """
        self.directory = directory
        index = directory / INDEX_NAME
        if (directory / SINGLE_NAME).is_file():  # transformers, too, prefers it to an index
            names = [SINGLE_NAME]
        elif index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{index} is not a readable index of safetensors shards; download it again") from error
        else:
            names = sorted(path.name for path in directory.glob("*.safetensors"))
        if not names:
            pickled = sorted(path.name for path in directory.glob("*.bin"))
            more = f" (only {pickled[0]}, which is pickle: convert it to safetensors first)" if pickled else ""
            raise UserError(f"{directory} holds no safetensors weights{more}")
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise UserError(f"{directory}: shard {missing[0]} is missing, though {INDEX_NAME} names it")
        self.files: dict[str, TensorFile] = {}
        self.metadata: dict[str, dict[str, str]] = {}
        self.home: dict[str, str] = {}
        for name in names:
            specs, self.metadata[name] = read_header(directory / name)
            self.files[name] = TensorFile(directory / name, specs)
            self.home |= dict.fromkeys(specs, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.home)

    def __contains__(self, name: str) -> bool:
        return name in self.home

    def spec(self, name: str) -> TensorSpec:
        """Dtype, shape and place of a tensor."""
        return self.files[self.home[name]].specs[name]

    def read(self, name: str, entry: int | None = None) -> torch.Tensor:
        """A tensor, or one entry along its first dimension, copied into memory."""
        return self.files[self.home[name]].read(name, entry)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Overwrites a tensor in its file."""
        self.files[self.home[name]].write(name, tensor)

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(file.path.stat().st_size for file in self.files.values())
