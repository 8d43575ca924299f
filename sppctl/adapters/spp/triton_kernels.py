"""The elementwise half of SPP's arithmetic on a GPU, in one pass over W each (Triton).

PyTorch's eager operations read and write float32 buffers of W's size several times, which takes a GPU longer than the
matrix products. Here every tile of W is read once and its result written once. Notation as in :mod:`kernel`. A packed
W is unpacked within the tile, so no dense copy of it exists.

Sums over tiles use no atomic additions: each tile has its own place in a buffer that is summed afterwards, so that the
same inputs give the same bits. Triton compiles annotations, so these functions have only Triton's own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sppctl.packed.linear import Weight
from sppctl.packed.triton_kernels import COLUMNS, ROWS, WARPS, read


@triton.jit
def _tile(weight, mask, offsets, alpha, scaled, m, n, r, parts):
    """This program's rows and columns, masks of those that exist, and W, the group's alpha and s beta, in float32."""
    group = (tl.program_id(0) // parts).to(tl.int64)
    start = (group * m + r - 1) // r + (tl.program_id(0) % parts) * ROWS
    stop = ((group + 1) * m + r - 1) // r
    rows = start + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row_mask, column_mask = rows < stop, columns < n
    tile_mask = row_mask[:, None] & column_mask[None, :]
    if mask is None:
        values = tl.load(weight + rows[:, None] * n + columns[None, :], mask=tile_mask, other=0.0)
    else:
        values = read(weight, mask, offsets, rows, row_mask, tl.program_id(1), n)
    values = values.to(tl.float32)
    alpha_row = tl.load(alpha + group * n + columns, mask=column_mask, other=0.0)
    scaled_rows = tl.load(scaled + rows, mask=row_mask, other=0.0)
    return rows, columns, row_mask, column_mask, values, alpha_row, scaled_rows


@triton.jit
def _rescaled(values, alpha_row, scaled_rows, base: tl.constexpr):
    result = values * (alpha_row[None, :] * scaled_rows[:, None])
    if base:
        result += values
    return result


@triton.jit
def _write_kernel(out, weight, mask, offsets, alpha, scaled, m, n, r, parts, base: tl.constexpr):
    rows, columns, row_mask, column_mask, values, alpha_row, scaled_rows = _tile(
        weight, mask, offsets, alpha, scaled, m, n, r, parts
    )
    result = _rescaled(values, alpha_row, scaled_rows, base).to(out.dtype.element_ty)
    tl.store(out + rows[:, None] * n + columns[None, :], result, mask=row_mask[:, None] & column_mask[None, :])


@triton.jit
def _gradient_kernel(
    moment, weight, mask, offsets, alpha, scaled, alpha_sums, beta_sums, m, n, r, parts, base: tl.constexpr
):
    rows, columns, row_mask, column_mask, values, alpha_row, scaled_rows = _tile(
        weight, mask, offsets, alpha, scaled, m, n, r, parts
    )
    places = moment + rows[:, None] * n + columns[None, :]
    tile_mask = row_mask[:, None] & column_mask[None, :]
    product = tl.load(places, mask=tile_mask, other=0.0).to(tl.float32) * values
    over_rows = tl.sum(product * scaled_rows[:, None], 0)
    over_columns = tl.sum(product * alpha_row[None, :], 1)
    tl.store(alpha_sums + tl.program_id(0).to(tl.int64) * n + columns, over_rows, mask=column_mask)
    tl.store(beta_sums + tl.program_id(1).to(tl.int64) * m + rows, over_columns, mask=row_mask)
    result = _rescaled(values, alpha_row, scaled_rows, base).to(moment.dtype.element_ty)
    tl.store(places, result, mask=tile_mask)


def _memory(weight: Weight) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The kernels' arguments for W: a dense matrix alone, or values, mask and offsets."""
    if isinstance(weight, Tensor):
        return weight, None, None
    return weight.values.view(weight.stored), weight.mask, weight.offsets


def write(out: Tensor, weight: Weight, alpha: Tensor, scaled: Tensor, base: bool) -> None:
    """W * alpha[g] * s beta, plus W where ``base``, into ``out``: computed in float32 and rounded once.

    Args:
        out: (m, n), contiguous.
        weight: (m, n), contiguous or packed.
        alpha: (r, n) float32.
        scaled: (m, 1) float32, s beta.
        base: whether W is added.
    """
    grid, sizes = _layout(weight, alpha)
    factors = alpha.contiguous(), scaled.contiguous()
    with torch.cuda.device_of(out):
        _write_kernel[grid](out, *_memory(weight), *factors, *sizes, base, num_warps=WARPS)


def gradients(moment: Tensor, weight: Weight, alpha: Tensor, scaled: Tensor, base: bool) -> tuple[Tensor, Tensor]:
    """Sums of P = moment * W in float32, while ``moment`` is overwritten with what :func:`write` gives.

    Args:
        moment: (m, n), contiguous, dy^T x.
        weight, alpha, scaled, base: as in :func:`write`.

    Returns:
        (r, n) s sum over the rows of each group of beta_i P_i, and (m, 1) the sums over columns of alpha[g] P.
    """
    grid, sizes = _layout(weight, alpha)
    m, n, r, parts = sizes
    alpha_sums = torch.empty(r, parts, n, dtype=torch.float32, device=moment.device)
    beta_sums = torch.empty(grid[1], m, dtype=torch.float32, device=moment.device)
    factors = alpha.contiguous(), scaled.contiguous()
    with torch.cuda.device_of(moment):
        _gradient_kernel[grid](moment, *_memory(weight), *factors, alpha_sums, beta_sums, *sizes, base, num_warps=WARPS)
    return alpha_sums.sum(1), beta_sums.sum(0).unsqueeze(1)


def _layout(weight: Weight, alpha: Tensor) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """The grid of programs, and m, n, r and the number of tiles that the rows of a group need."""
    (m, n), r = weight.shape, alpha.shape[0]
    parts = triton.cdiv(triton.cdiv(m, r), ROWS.value)
    return (r * parts, triton.cdiv(n, COLUMNS.value)), (m, n, r, parts)
