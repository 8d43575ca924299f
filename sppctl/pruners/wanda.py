"""Wanda: pruning by weights and activations (Sun et al. 2023, arXiv 2306.11695)."""

from __future__ import annotations

from torch import Tensor

from sppctl.pattern import Pattern
from sppctl.pruners.masks import mask_by_row
from sppctl.pruners.stats import InputNorms


def prune_wanda(weight: Tensor, statistics: InputNorms, pattern: Pattern) -> Tensor:
    """Zeroes the smallest scores |W_ij| ||X_j||_2 of every output row.

    Args:
        weight: (out_features, in_features), any float dtype.
        statistics: of the layer's inputs.
        pattern: N:M with N kept, or the ratio of zeros in every row.

    Returns:
        The pruned weight, a new tensor of the same shape and dtype.
    """
    scores = weight.float().abs() * statistics.norms()
    return weight.masked_fill(~mask_by_row(scores, pattern), 0)
