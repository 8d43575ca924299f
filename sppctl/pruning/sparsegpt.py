"""SparseGPT: pruning with compensation of the error by the weights that remain (Frantar, Alistarh 2023, 2301.00774)."""

from __future__ import annotations

import torch
from torch import Tensor

from sppctl.pattern import Pattern
from sppctl.pruning.masks import keep_largest, keep_largest_in_groups
from sppctl.pruning.stats import Hessian


def prune_sparsegpt(
    weight: Tensor, statistics: Hessian, pattern: Pattern, *, damp: float = 0.01, block_size: int = 128
) -> tuple[Tensor, float]:
    """Solves the layer column by column (Algorithm 1 of the paper).

    The mask is chosen per block of ``block_size`` columns over all rows (ratio) or per group of M (N:M), by
    w^2 / [U_jj]^2 on the weights as updated so far; the error of each column is spread over the columns to its right.

    Args:
        weight: (out_features, in_features), any float dtype; computed in float32.
        statistics: second moment of the layer's inputs.
        pattern: N:M with N kept, or the ratio of zeros in every block of columns.
        damp: share of the mean Hessian diagonal added to the diagonal.
        block_size: columns updated lazily together; rounded up to a multiple of M.

    Returns:
        The pruned weight (same shape and dtype), and the damping that the factorisation needed.

    Raises:
        ValueError: the Hessian cannot be factorised.
    """
    factor, dead, damp = statistics.inverse_factor(damp)
    work = weight.float().clone()
    work[:, dead] = 0
    if pattern.group is not None:
        block_size = -(-block_size // pattern.group) * pattern.group
    num_columns = work.shape[1]
    kept = torch.empty_like(work, dtype=torch.bool)
    for start in range(0, num_columns, block_size):
        stop = min(start + block_size, num_columns)
        block, upper = work[:, start:stop], factor[start:stop, start:stop]
        mask, errors = _solve_block(block, upper, pattern)
        kept[:, start:stop] = mask
        work[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
    # a mask, not the value: rounding an update may make a kept weight zero, never a pruned one non-zero
    return work.masked_fill_(~kept, 0).to(weight.dtype), damp


def _solve_block(block: Tensor, upper: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Prunes a block of columns in place; returns its mask and its scaled errors, both (rows, columns)."""
    diagonal = upper.diagonal()
    errors = torch.empty_like(block)
    mask = torch.empty_like(block, dtype=torch.bool)
    if not pattern.is_structured:
        scores = (block / diagonal).square()
        mask = keep_largest(scores.reshape(1, -1), pattern.num_pruned(scores.numel())).view(scores.shape)
    for column in range(block.shape[1]):
        if pattern.keep is not None and pattern.group is not None and column % pattern.group == 0:
            group = slice(column, column + pattern.group)
            scores = (block[:, group] / diagonal[group]).square()
            mask[:, group] = keep_largest_in_groups(scores, pattern.keep, pattern.group)
        error = block[:, column] / diagonal[column]
        error.masked_fill_(mask[:, column], 0)
        block[:, column:].addr_(error, upper[column, column:], alpha=-1)
        errors[:, column] = error
    return mask, errors
