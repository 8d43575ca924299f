"""Sparse matrices without their zeros: what a file of them would take, and the packing that proves it.

Two layouts, both lossless:

- N:M keeps N values of every M, and for each the index in its group, ceil(log2(M)) bits: for 2:4 what NVIDIA's sparse
  tensor cores read (values and 2-bit indices), though they have the indices in an order of their own.
- a bitmask keeps the values that are not zero, and one bit for every weight. It needs no pattern.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sppctl.pattern import Pattern


@dataclass(frozen=True)
class Packed:
    """A packed matrix.

    Attributes:
        values: (kept,) in the dtype of the weight.
        bits: (bytes,) uint8, the indices of the values or the mask, first bit highest.
        shape: of the weight.
        pattern: N:M; None: a bitmask.
    """

    values: Tensor
    bits: Tensor
    shape: tuple[int, ...]
    pattern: Pattern | None

    @property
    def num_bytes(self) -> int:
        """Of the values and the bits."""
        return self.values.numel() * self.values.element_size() + self.bits.numel()


def index_bits(group: int) -> int:
    """Bits of an index into a group of M."""
    return (group - 1).bit_length()


def structured_bytes(shape: tuple[int, ...], itemsize: int, pattern: Pattern) -> int:
    """Bytes of an N:M matrix, packed; groups with more zeros than they need take no less."""
    assert pattern.keep is not None
    assert pattern.group is not None
    kept = math.prod(shape) // pattern.group * pattern.keep
    return kept * itemsize + math.ceil(kept * index_bits(pattern.group) / 8)


def bitmask_bytes(shape: tuple[int, ...], itemsize: int, zeros: int) -> int:
    """Bytes of a matrix with any zeros, packed with a bitmask."""
    return (math.prod(shape) - zeros) * itemsize + math.ceil(math.prod(shape) / 8)


def pack_structured(weight: Tensor, pattern: Pattern) -> Packed:
    """Packs a matrix whose N:M groups lie along its last dimension.

    Args:
        weight: (..., in_features) on the CPU, at most N non-zero in every M.
        pattern: N:M (N kept).

    Raises:
        ValueError: some group has more than N that are not zero.
    """
    assert pattern.keep is not None
    assert pattern.group is not None
    groups = weight.reshape(-1, pattern.group)
    filled = (groups != 0).to(torch.uint8)
    if int(filled.sum(-1, dtype=torch.int64).max()) > pattern.keep:
        raise ValueError(f"the matrix is not {pattern}: a group keeps more than {pattern.keep}")
    # what is not zero first, then zeros to fill up with; in the order of the group again
    indices = filled.argsort(dim=-1, descending=True, stable=True)[:, : pattern.keep].sort(dim=-1).values
    width = index_bits(pattern.group)
    places = torch.arange(width - 1, -1, -1)
    bits = (indices.reshape(-1, 1) >> places) & 1
    return Packed(groups.gather(-1, indices).reshape(-1), _to_bytes(bits), tuple(weight.shape), pattern)


def pack_bitmask(weight: Tensor) -> Packed:
    """Packs a matrix on the CPU with zeros anywhere."""
    filled = weight != 0
    return Packed(weight[filled], _to_bytes(filled), tuple(weight.shape), None)


def unpack(packed: Packed) -> Tensor:
    """The weight again, bit by bit, except that a negative zero may be a positive one."""
    count = math.prod(packed.shape)
    if packed.pattern is None:
        flat = packed.values.new_zeros(count)
        flat[_from_bytes(packed.bits, count).bool()] = packed.values
        return flat.view(packed.shape)
    keep, group = packed.pattern.keep, packed.pattern.group
    assert keep is not None
    assert group is not None
    width = index_bits(group)
    bits = _from_bytes(packed.bits, packed.values.numel() * width).view(-1, width).long()
    indices = (bits << torch.arange(width - 1, -1, -1)).sum(-1).view(-1, keep)
    groups = packed.values.new_zeros(count // group, group)
    return groups.scatter_(-1, indices, packed.values.view(-1, keep)).view(packed.shape)


def _to_bytes(bits: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(bits.to(torch.uint8).reshape(-1).numpy()))


def _from_bytes(data: Tensor, count: int) -> Tensor:
    return torch.from_numpy(np.unpackbits(data.numpy(), count=count))
