"""Masks from another checkpoint (``prune.mask_from``), compared with the patterns."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sppctl import console
from sppctl.errors import UserError
from sppctl.model.targets import Target
from sppctl.pattern import Pattern
from sppctl.pruners.masks import rounding, shortfall
from sppctl.records import LayerRecord


def check(mask: Tensor, target: Target, pattern: Pattern) -> None:
    """Raises UserError if a mask (out_features, in_features), True = kept, does not have a layer's pattern."""
    if problem := shortfall(mask, pattern):
        fix = "set prune.pattern (or prune.overrides, prune.allocation) to what the mask has"
        raise UserError(f"{target.name}: the mask of prune.mask_from {problem}; {fix}")


def warn_of_sparser(layers: Sequence[LayerRecord]) -> None:
    """Warns of layers whose masks have clearly more zeros than the pattern asks for; the records hold their share."""
    sparser = [
        f"{layer.name} has {layer.sparsity:.4g}, {layer.pattern} asks for {layer.pattern.sparsity:.4g}"
        for layer in layers
        if layer.size * layer.sparsity > layer.size * layer.pattern.sparsity + rounding(layer.shape)
    ]
    if sparser:
        first = sparser[0] + (", ..." if len(sparser) > 1 else "")
        console.warn(f"{len(sparser)} masks of prune.mask_from have more zeros than prune.pattern: {first}")
