"""The layout of a matrix without its zeros, for any sparsity pattern, bit for bit as stored.

A weight (m, n) becomes three tensors:

- ``mask`` (m, ceil(n / 8)) uint8, one bit for each weight, set where a value is stored. Bit j of byte b, counted from
  the least significant, belongs to column 8 b + j. A row that does not fill its last byte is padded with zero bits, so
  every row starts with a new byte.
- ``values`` (stored,) integers of the weight's width, its stored values as raw bits: row after row, by column.
- ``offsets`` (m, ceil(n / 256)) int32, the index into ``values`` of the first value of each row and each tile of 256
  columns. So any rows, and any tile of a row, can be unpacked alone.

A weight whose bits are all zero (+0) is not stored, every other one is: also -0, subnormal numbers and each kind of
NaN. A bit of the mask therefore means "stored", which is not quite "other than zero".

On a CPU the bits are turned into positions, to which the values are scattered. This takes 0.9 ns per weight at 50 %
and 0.75 ns at 75 %, whatever the pattern; ``masked_scatter_`` takes 3.9 and 2.3 ns because it predicts a branch for
each weight, and a table from mask byte to columns, which would serve N:M alone, 0.8 and 0.6 ns (EPYC 9004, one thread).
On a GPU ``triton_kernels`` unpack, where they run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from sppctl.fused import FusedKernels

TILE = 256  # columns
CHUNK = 1 << 18  # elements that are packed or unpacked at a time: their transients stay in a CPU's cache
GPU_CHUNK = 1 << 24
MOST_VALUES = 2**31 - 1  # of an int32 offset
RAW = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of an element
_BIT_COUNTS = np.array([byte.bit_count() for byte in range(256)], dtype=np.uint8)


@dataclass(frozen=True)
class PackedWeight:
    """A packed matrix (m, n), which is read like a tensor: ``shape``, ``dtype``, ``device``, rows, ``to(dtype)``.

    Attributes:
        mask, values, offsets: as described above, on one device.
        in_features: n.
        stored: the float dtype whose bits ``values`` are.
        dtype: the dtype that unpacking gives by default; it can represent every value of ``stored``.
    """

    mask: Tensor
    values: Tensor
    offsets: Tensor
    in_features: int
    stored: torch.dtype
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.mask.shape[0], self.in_features

    @property
    def device(self) -> torch.device:
        """Of its tensors."""
        return self.mask.device

    @property
    def num_bytes(self) -> int:
        """Of its tensors."""
        return sum(tensor.numel() * tensor.itemsize for tensor in (self.mask, self.values, self.offsets))

    def __getitem__(self, rows: slice) -> Tensor:
        """Some consecutive rows (rows, n), in ``dtype``."""
        return self.unpack(rows)

    def to(self, dtype: torch.dtype) -> Tensor:
        """The whole matrix (m, n), rounded to a dtype."""
        return self.unpack(slice(None), self._empty(self.shape[0], dtype))

    def unpack(self, rows: slice, out: Tensor | None = None) -> Tensor:
        """Writes some consecutive rows (rows, n) into ``out``, which is contiguous and of any float dtype, or new."""
        start, stop, step = rows.indices(self.shape[0])
        assert step == 1, rows
        stop = max(start, stop)
        out = self._empty(stop - start, self.dtype) if out is None else out
        for part in _slices(start, stop, self.in_features, CHUNK if self.device.type == "cpu" else GPU_CHUNK):
            self._unpack(part, out[part.start - start : part.stop - start])
        return out

    def _empty(self, num_rows: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(num_rows, self.in_features, dtype=dtype, device=self.device)

    def _unpack(self, rows: slice, out: Tensor) -> None:
        widened = torch.promote_types(self.stored, out.dtype) == out.dtype
        if widened and (fused := KERNELS.usable(self.mask)):
            fused.unpack(self, rows, out)
            return
        values, mask = self.values[self._place(rows)], self.mask[rows]
        if out.dtype == self.stored:
            out = out.view(values.dtype)  # raw bits
        else:
            values = values.view(self.stored).to(self.dtype).to(out.dtype)
        out.zero_()
        if mask.device.type == "cpu":
            out.view(-1).scatter_(0, _positions(mask, self.in_features), values)
        else:
            out.masked_scatter_(_stored(mask, self.in_features), values)

    def _place(self, rows: slice) -> slice:
        """The part of ``values`` that holds some rows, at least one."""
        stop = int(self.offsets[rows.stop, 0]) if rows.stop < len(self.offsets) else len(self.values)
        return slice(int(self.offsets[rows.start, 0]), stop)


def pack(weight: Tensor, dtype: torch.dtype | None = None) -> PackedWeight:
    """Packs a matrix (m, n) of 2, 4 or 8 byte floats on the CPU; ``dtype``: to unpack it in, by default its own.

    Raises:
        ValueError: it has no columns, ``dtype`` cannot represent all its values, or 2^31 of them are not zero.
    """
    (m, n), dtype = weight.shape, dtype or weight.dtype
    if not n:
        raise ValueError(f"a matrix of shape {m, n} has nothing to pack")
    if torch.promote_types(weight.dtype, dtype) != dtype:
        raise ValueError(f"{dtype} cannot represent all values of {weight.dtype}")
    raw = weight.detach().contiguous().view(RAW[weight.dtype.itemsize])
    mask = np.empty((m, math.ceil(n / 8)), dtype=np.uint8)
    for rows in _slices(0, m, n):
        mask[rows] = np.packbits(raw[rows].numpy() != 0, axis=1, bitorder="little")
    starts = range(0, mask.shape[1], TILE // 8)
    counts = np.add.reduceat(_BIT_COUNTS[mask], starts, axis=1, dtype=np.int64)
    ends = np.cumsum(counts)
    total = int(ends[-1]) if m else 0
    if total > MOST_VALUES:
        raise ValueError(f"{total:,} values are more than the {MOST_VALUES:,} that a packed matrix can hold")
    offsets = (ends - counts.reshape(-1)).astype(np.int32).reshape(counts.shape)
    values = torch.empty(total, dtype=raw.dtype)
    tensors = torch.from_numpy(mask), values, torch.from_numpy(offsets)
    packed = PackedWeight(*tensors, in_features=n, stored=weight.dtype, dtype=dtype)
    for rows in _slices(0, m, n):
        torch.take(raw[rows], _positions(packed.mask[rows], n), out=values[packed._place(rows)])
    return packed


def packed_bytes(m: int, n: int, num_stored: int, itemsize: int) -> int:
    """Bytes of a packed matrix (m, n) with so many stored values of ``itemsize`` bytes."""
    return num_stored * itemsize + m * math.ceil(n / 8) + m * math.ceil(n / TILE) * 4


def _positions(mask: Tensor, n: int) -> Tensor:
    """Where the flattened rows (rows, n) store a value: int64, in order; of the mask's bytes on a CPU."""
    stored = np.unpackbits(mask.numpy(), axis=1, count=n, bitorder="little").view(np.bool_)
    return torch.from_numpy(np.flatnonzero(stored))


def _stored(mask: Tensor, n: int) -> Tensor:
    """The rows (rows, n) as booleans, of the mask's bytes on any device."""
    places = torch.arange(8, device=mask.device, dtype=torch.uint8)
    return ((mask.unsqueeze(-1) >> places) & 1).bool().flatten(1)[:, :n]


def _slices(start: int, stop: int, n: int, elements: int | None = None) -> Iterator[slice]:
    """Cuts rows of n columns into slices of about so many elements."""
    size = max(1, (elements or CHUNK) // n)
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


def check(kernels: ModuleType, device: torch.device | str) -> None:
    """Raises AssertionError if the kernels do not unpack a small matrix bit for bit.

    Args:
        kernels: ``triton_kernels``.
        device: where they run.
    """
    weight = torch.randn(37, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight[weight < 0.5] = 0
    packed, rows = pack(weight), slice(2, 36)
    placed = replace(packed, **{name: getattr(packed, name).to(device) for name in ("mask", "values", "offsets")})
    for dtype in (torch.bfloat16, torch.float32):
        out = torch.full((34, 300), torch.nan, dtype=dtype, device=device)
        kernels.unpack(placed, rows, out)
        raw, expected = out.cpu().view(RAW[dtype.itemsize]), weight[rows].to(dtype).view(RAW[dtype.itemsize])
        assert torch.equal(raw, expected), f"{dtype} weights are unpacked wrongly"


KERNELS = FusedKernels(
    "sppctl.packed.triton_kernels", check, "packed weights are read without their GPU kernels, more slowly"
)
