"""Rounding a weight under a mask, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sppctl.packed.linear import Weight

CPU_CHUNK = 1 << 18  # elements: a MiB of float32 stays in a CPU's cache
GPU_CHUNK = 1 << 24


def row_chunks(weight: Weight) -> Iterator[slice]:
    """Cuts the rows of a matrix (m, n) so that a float32 transient of one slice is small."""
    num_rows, num_columns = weight.shape
    step = max(1, (CPU_CHUNK if weight.device.type == "cpu" else GPU_CHUNK) // num_columns)
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def round_under_mask(values: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """``values`` rounded to ``dtype``, with zeros exactly where ``mask`` has them.

    A kept weight that rounds to zero becomes the smallest number of the dtype, with its own sign: of billions of
    weights that cross zero, some hit it exactly, and would leave the mask, which is ``weight != 0``.

    Args:
        values: (rows, n) of any float dtype.
        mask: (rows, n), any dtype; kept where it is not zero.
        dtype: of the result (rows, n).
    """
    rounded, info = values.to(dtype), torch.finfo(dtype)
    if rounded.device.type == "cpu" and rounded.numel():  # where PyTorch vectorises arithmetic, but not selections
        kept = mask.to(dtype) if mask.dtype == torch.bool else mask.sign().abs_().to(dtype)  # ones and zeros
        result = torch.mul(rounded, kept).add_(0)  # 0 x a negative weight is -0, and -0 + 0 is 0
        if kept.neg_().add_(1).add_(result.abs()).amin() > 0:  # no kept weight is zero, and nothing is NaN
            return result
        del kept, result  # of whole tensors they are large
    # hardware may flush subnormal numbers to zero, but not float16's, whose smallest normal number, 6e-5, is too large
    tiny = info.tiny * info.eps if dtype == torch.float16 else info.tiny
    smallest = torch.tensor(tiny, dtype=dtype, device=rounded.device)
    rounded = torch.where(rounded == 0, smallest.copysign(rounded), rounded)
    return rounded.masked_fill_(mask == 0, 0)
