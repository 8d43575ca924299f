"""Pruners: pure functions of a weight, the statistics of its inputs, and a pattern.

A new pruner is one function and one line in ``PRUNERS``; outside the package, :func:`sppctl.register_pruner`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sppctl import plugins
from sppctl.pattern import Pattern
from sppctl.pruners.dsnot import update_mask
from sppctl.pruners.magnitude import magnitude_mask
from sppctl.pruners.sparsegpt import prune_sparsegpt
from sppctl.pruners.stats import Hessian, InputMoments, InputNorms, Statistics
from sppctl.pruners.wanda import wanda_mask

__all__ = ["PRUNERS", "Hessian", "InputMoments", "InputNorms", "Pruner", "Statistics", "prune_linear"]

Pruned = tuple[list[Tensor], float | None]  # the weights of several layers, and the damping of their Hessian


@dataclass(frozen=True)
class Pruner:
    """One method."""

    statistics: type[Statistics] | None  # of the inputs of layers that share them; None: it needs no inputs
    # takes the weights of those layers, their statistics, a pattern for each, masks or None, and options
    prune: Callable[..., Pruned]
    options: tuple[str, ...] = ()  # their names


def _by_mask(choose: Callable[..., Tensor], improve: Callable[..., Tensor] | None = None) -> Callable[..., Pruned]:
    """A method that only chooses a mask, unless masks are given, and may improve it."""

    def prune(
        weights: list[Tensor], statistics: Any, patterns: list[Pattern], masks: list[Tensor] | None = None
    ) -> Pruned:
        pruned = []
        for index, (weight, pattern) in enumerate(zip(weights, patterns, strict=True)):
            mask = choose(weight, statistics, pattern) if masks is None else masks[index]
            if improve is not None:
                mask = improve(weight, mask, statistics, pattern)
            pruned.append(weight.masked_fill(~mask, 0))
        return pruned, None

    return prune


PRUNERS = {
    "magnitude": Pruner(None, _by_mask(lambda weight, _, pattern: magnitude_mask(weight, pattern))),
    "wanda": Pruner(InputNorms, _by_mask(wanda_mask)),
    "sparsegpt": Pruner(Hessian, prune_sparsegpt, ("damp", "block_size", "keep_zeros", "act_order")),
    "dsnot": Pruner(InputMoments, _by_mask(wanda_mask, update_mask)),
}


def check_weight(weight: Tensor, pattern: Pattern, name: str = "weight") -> None:
    """Raises ValueError if a weight is not a finite matrix that can have the pattern."""
    if weight.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(weight.shape)}; expected (out_features, in_features)")
    pattern.check_in_features(weight.shape[1], name)
    if not torch.isfinite(weight).all():
        raise ValueError(f"{name} holds values that are not finite (NaN or infinity); the checkpoint is broken")


@torch.no_grad()
def prune_linear(
    weight: Tensor,
    inputs: Tensor | None = None,
    *,
    method: str,
    pattern: Pattern | str | float,
    mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Prunes one linear layer.

    Args:
        weight: (out_features, in_features), any float dtype.
        inputs: (tokens, in_features) or (..., in_features), the layer's inputs; magnitude needs none.
        method: magnitude, wanda, sparsegpt, dsnot, or a registered pruner.
        pattern: N:M with N kept in every M (``"2:4"``), or the ratio of zeros (``0.5``).
        mask: boolean, True = kept: SparseGPT updates the weights under it, DSnoT starts from it, the others apply it.
        options: of the method: ``damp``, ``block_size``, ``act_order`` and ``keep_zeros`` for SparseGPT; without the
            last one, zeros of the weight may be filled.

    Returns:
        The pruned weight, a new tensor of the same shape and dtype.

    Raises:
        ValueError: unknown method, bad pattern or option, inputs that are missing, empty, of another width or not
            finite.
    """
    if method not in PRUNERS and not plugins.has(plugins.PRUNERS, method):
        raise ValueError(f"unknown pruning method {method!r}; choose one of {', '.join(PRUNERS)}")
    parsed = Pattern.parse(pattern)
    check_weight(weight, parsed)
    if mask is not None and (mask.shape != weight.shape or mask.dtype != torch.bool):
        raise ValueError(f"the mask is {mask.dtype} {tuple(mask.shape)}; expected bool {tuple(weight.shape)}")
    pruner, statistics = PRUNERS.get(method) or plugins.find(plugins.PRUNERS, method), None
    if unknown := options.keys() - set(pruner.options):
        known = ", ".join(pruner.options) or "none"
        raise ValueError(f"method {method} has no option {min(unknown)}; its options: {known}")
    if pruner.statistics is not None:
        if inputs is None or inputs.numel() == 0:
            raise ValueError(f"method {method} needs the layer's inputs, (tokens, in_features)")
        if inputs.shape[-1] != weight.shape[1]:
            raise ValueError(f"inputs have {inputs.shape[-1]} features, the weight has {weight.shape[1]}")
        if not torch.isfinite(inputs).all():
            raise ValueError("inputs hold values that are not finite (NaN or infinity)")
        statistics = pruner.statistics(weight.shape[1], weight.device)
        statistics.update(inputs.reshape(-1, weight.shape[1]))
    (pruned,), _ = pruner.prune([weight], statistics, [parsed], None if mask is None else [mask], **options)
    return pruned
