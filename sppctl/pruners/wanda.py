"""Wanda: pruning by weights and activations (Sun et al. 2023, arXiv 2306.11695)."""

from __future__ import annotations

from torch import Tensor

from sppctl.pattern import Pattern
from sppctl.pruners.masks import mask_by_row
from sppctl.pruners.stats import Statistics


def wanda_scores(weight: Tensor, statistics: Statistics) -> Tensor:
    """|W_ij| ||X_j||_2 of a weight (out_features, in_features), float32."""
    return weight.float().abs() * statistics.norms()


def wanda_mask(weight: Tensor, statistics: Statistics, pattern: Pattern) -> Tensor:
    """Prunes the smallest scores of every output row (a ratio) or of each group of M (N:M)."""
    return mask_by_row(wanda_scores(weight, statistics), pattern)
