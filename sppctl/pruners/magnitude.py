"""Magnitude pruning: the smallest weights go (the baseline of every pruning paper)."""

from __future__ import annotations

from torch import Tensor

from sppctl.pattern import Pattern
from sppctl.pruners.masks import mask_by_matrix


def prune_magnitude(weight: Tensor, pattern: Pattern) -> Tensor:
    """Zeroes the smallest |W|: over the whole matrix for a ratio, within each group for N:M.

    Args:
        weight: (out_features, in_features), any float dtype.
        pattern: N:M with N kept, or the ratio of zeros.

    Returns:
        The pruned weight, a new tensor of the same shape and dtype.
    """
    return weight.masked_fill(~mask_by_matrix(weight.float().abs(), pattern), 0)
