"""Magnitude pruning: the smallest weights go (the baseline of every pruning paper)."""

from __future__ import annotations

from torch import Tensor

from sppctl.pattern import Pattern
from sppctl.pruners.masks import keep_largest, mask_by_row


def magnitude_mask(weight: Tensor, pattern: Pattern) -> Tensor:
    """Prunes the smallest |W| (out_features, in_features): over the whole matrix for a ratio, in each group for N:M."""
    scores = weight.float().abs()
    if pattern.is_structured:
        return mask_by_row(scores, pattern)
    return keep_largest(scores.reshape(1, -1), pattern.num_pruned(scores.numel())).view(scores.shape)
