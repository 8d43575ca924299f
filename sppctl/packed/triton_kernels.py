"""Packed weights read on a GPU (Triton): a tile at a time within another kernel, or whole rows in one pass.

A value's place is the offset of its row and tile, plus the number of values before it in them. PyTorch's operations
need an int64 for each weight to count those. Triton compiles annotations, so these functions have only Triton's own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sppctl.packed.format import TILE, PackedWeight

ROWS, COLUMNS, WARPS = tl.constexpr(32), tl.constexpr(TILE), 8


@triton.jit
def read(values, mask, offsets, rows, row_mask, tile, n):
    """The tile of these rows and columns (rows, 256) of a matrix with n columns; zero where nothing is stored."""
    columns = (tile * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = row_mask[:, None] & (columns < n)
    byte = tl.load(mask + rows[:, None] * tl.cdiv(n, 8) + columns // 8, mask=inside, other=0)
    bit = (byte.to(tl.int32) >> (columns % 8)) & 1
    first = tl.load(offsets + rows * tl.cdiv(n, COLUMNS) + tile, mask=row_mask, other=0)
    return tl.load(values + first[:, None] + tl.cumsum(bit, 1) - bit, mask=bit == 1, other=0)


@triton.jit
def _unpack_kernel(out, values, mask, offsets, m, n):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row_mask = rows < m
    result = read(values, mask, offsets, rows, row_mask, tl.program_id(1), n).to(out.dtype.element_ty)
    tl.store(out + rows[:, None] * n + columns[None, :], result, mask=row_mask[:, None] & (columns < n)[None, :])


def unpack(weight: PackedWeight, rows: slice, out: Tensor) -> None:
    """Writes rows (rows, n) of a weight into ``out``, contiguous, of its dtype or one with all values of it."""
    values = weight.values
    if out.dtype == weight.stored:
        out = out.view(values.dtype)  # raw bits
    else:
        values = values.view(weight.stored)
    m, n = out.shape
    with torch.cuda.device_of(out):
        grid = triton.cdiv(m, ROWS.value), triton.cdiv(n, COLUMNS.value)
        _unpack_kernel[grid](out, values, weight.mask[rows], weight.offsets[rows], m, n, num_warps=WARPS)
