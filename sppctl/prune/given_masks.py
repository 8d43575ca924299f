"""Masks from another checkpoint (``prune.mask_from``): read matrix by matrix, and held against the pattern."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sppctl import console
from sppctl.errors import StageError
from sppctl.files.safe_files import TensorFiles
from sppctl.model.blocks import BlockStack
from sppctl.model.targets import Target
from sppctl.pattern import Pattern
from sppctl.records import LayerRecord


def given_mask(stack: BlockStack, target: Target, pattern: Pattern, files: TensorFiles) -> Tensor:
    """The mask of one matrix, (out_features, in_features), True = kept: its zeros in ``files``.

    Raises:
        StageError: another shape, or a mask that keeps more than the pattern allows, though it passed the checks.
    """
    mask = (stack.matrix(target, files) != 0).to(stack.device)
    found = problem(mask, target, pattern)
    if found is not None:
        raise StageError(found)
    return mask


def problem(mask: Tensor, target: Target, pattern: Pattern) -> str | None:
    """What is wrong with a mask (out_features, in_features) for a layer and its pattern."""
    shape = (target.out_features, target.in_features)
    if mask.shape != shape:
        return (
            f"{target.name}: the mask of prune.mask_from has shape {tuple(mask.shape)}, the layer {shape}; "
            "it has to be a pruned copy of the same model"
        )
    if pattern.keep is not None and pattern.group is not None:
        kept = mask.view(mask.shape[0], -1, pattern.group).sum(-1)
        if bool((kept > pattern.keep).any()):
            return f"{target.name}: the mask of prune.mask_from is not {pattern}"
    zeros = mask.numel() - int(mask.sum())
    if zeros < mask.numel() * pattern.sparsity - _rounding(shape):
        return (
            f"{target.name}: the mask of prune.mask_from is not {pattern}: a share of {zeros / mask.numel():.4g} is "
            "zero; set prune.pattern (or prune.overrides, prune.allocation) to what the mask has"
        )
    return None


def warn_of_sparser(layers: Sequence[LayerRecord]) -> None:
    """Warns of layers whose masks have clearly more zeros than the pattern asks for; their records hold the share."""
    sparser = [
        f"{layer.name} has {layer.sparsity:.4g}, {layer.pattern} asks for {layer.pattern.sparsity:.4g}"
        for layer in layers
        if layer.size * layer.sparsity > layer.size * layer.pattern.sparsity + _rounding(layer.shape)
    ]
    if sparser:
        first = sparser[0] + (", ..." if len(sparser) > 1 else "")
        console.warn(f"{len(sparser)} masks of prune.mask_from have more zeros than prune.pattern: {first}")


def _rounding(shape: Sequence[int]) -> int:
    """Zeros more or fewer that say nothing: methods round the count down in every row, or every block of columns."""
    return max(shape)
