"""SparseGPT's loop over the columns of a block on a GPU, in one pass (Triton).

PyTorch's operations take a few launches for each column, a quarter of a millisecond whatever the number of rows. The
rows do not depend on each other: here each program keeps some of them in registers while it solves all columns.
Divisions are rounded to the nearest, and no product is fused with the subtraction that follows it, so the result does
not depend on the compiler, and equal scores stay equal. Triton compiles annotations, so these functions have only
Triton's own.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from sppctl.pattern import Pattern

COLUMNS = 128  # solved by one launch
# rows of a program, and columns of each of its warps: sums over the columns of a single warp need no barrier
ROWS, WARP_COLUMNS = 4, 128


@triton.jit
def _solve_kernel(
    work, kept, errors, zeros, upper, scale, num_rows, width, stride, error_stride,
    keep: tl.constexpr, group: tl.constexpr, rows_per_program: tl.constexpr, padded_width: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * rows_per_program + tl.arange(0, rows_per_program)
    columns = tl.arange(0, padded_width)[None, :]
    row_mask, column_mask = rows < num_rows, columns < width
    places, inside = rows[:, None] * stride + columns, row_mask[:, None] & column_mask
    values = tl.load(work + places, mask=inside, other=0.0)
    scales = tl.load(scale + columns, mask=column_mask, other=1.0)
    pruned = tl.load(kept + places, mask=inside, other=1) == 0 if group == 1 else places < 0
    if zeros is not None:
        stays_zero = tl.load(zeros + places, mask=inside, other=0) != 0
    for start in range(0, width, group):
        if group > 1:
            scores = tl.div_rn(values, scales)
            scores = scores * scores
            if zeros is not None:
                scores = tl.where(stays_zero, -1.0, scores)
            ranks = tl.zeros([rows_per_program, padded_width], tl.int32)
            for column in range(start, start + group):
                score = tl.sum(tl.where(columns == column, scores, 0.0), 1)[:, None]
                # among equal scores the later is kept
                ranks += ((score < scores) | ((score == scores) & (column < columns))).to(tl.int32)
            chosen = (ranks < group - keep) | (scores < 0)
            pruned = tl.where((columns >= start) & (columns < start + group), chosen, pruned)
        for column in range(start, start + group):
            # the weight of a row that loses it, else zero
            lost = tl.sum(tl.where((columns == column) & pruned, values, 0.0), 1)
            error = tl.div_rn(lost, tl.load(upper + column * width + column))
            factors = tl.load(upper + column * width + columns, mask=(columns >= column) & column_mask, other=0.0)
            values -= error[:, None] * factors
            tl.store(errors + rows * error_stride + column, error, mask=row_mask)
    tl.store(work + places, values, mask=inside)
    if group > 1:
        tl.store(kept + places, pruned == 0, mask=inside)


def solve(
    work: Tensor,
    kept: Tensor,
    errors: Tensor,
    zeros: Tensor | None,
    upper: Tensor,
    scale: Tensor,
    choices: list[tuple[slice, Pattern]],
) -> None:
    """Prunes some columns of all layers in place.

    Args:
        work: (rows, columns) float32 weights; like the next three, perhaps columns of a wider matrix.
        kept: (rows, columns) boolean mask, with the strides of ``work``; chosen here in the rows of an N:M pattern.
        errors: (rows, columns) float32, written: the scaled errors.
        zeros: (rows, columns) boolean, with the strides of ``work``: weights that must stay zero; None: there are none.
        upper: (columns, columns) float32, of the factor.
        scale: (columns,) float32, contiguous, its diagonal; infinite for inputs that never fired.
        choices: the rows and pattern of each layer; empty if the masks are given.
    """
    width, upper = work.shape[1], upper.contiguous()
    assert all(width % (pattern.group or 1) == 0 for _, pattern in choices), "a group that is not complete"
    padded_width = triton.next_power_of_2(width)
    warps = max(1, padded_width // WARP_COLUMNS)
    with torch.cuda.device_of(work):
        for rows, keep, group in _launches(choices, len(work)):
            num_rows, own_zeros = rows.stop - rows.start, None if zeros is None else zeros[rows]
            _solve_kernel[(triton.cdiv(num_rows, ROWS),)](
                work[rows], kept[rows], errors[rows], own_zeros, upper, scale,
                num_rows, width, work.stride(0), errors.stride(0),
                keep, group, ROWS, padded_width, num_warps=warps, enable_fp_fusion=False,
            )  # fmt: skip


def _launches(choices: list[tuple[slice, Pattern]], num_rows: int) -> list[tuple[slice, int, int]]:
    """Rows, N and M of each launch: neighbouring layers of one pattern together; 0 and 1 where the mask is given."""
    forms = [(rows, (pattern.keep or 0, pattern.group or 1)) for rows, pattern in choices]
    launches = []
    for (keep, group), layers in itertools.groupby(forms or [(slice(0, num_rows), (0, 1))], lambda form: form[1]):
        first, *_, last = [rows for rows, _ in layers] * 2
        launches.append((slice(first.start, last.stop), keep, group))
    return launches
