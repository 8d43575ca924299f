"""Pruners: pure functions of a weight, what is known of its inputs, and a pattern.

A new pruner is one function and one line in ``PRUNERS``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sppctl.pattern import Pattern
from sppctl.pruners.dsnot import update_mask
from sppctl.pruners.magnitude import prune_magnitude
from sppctl.pruners.masks import mask_by_row
from sppctl.pruners.sparsegpt import prune_sparsegpt
from sppctl.pruners.stats import Hessian, InputMoments, InputNorms
from sppctl.pruners.wanda import prune_wanda

__all__ = ["PRUNERS", "Hessian", "InputMoments", "InputNorms", "Pruned", "Pruner", "prune_linear"]

Statistics = InputNorms | Hessian


@dataclass(frozen=True)
class Pruned:
    """A pruned weight, and the damping of the Hessian where there was one."""

    weight: Tensor
    damp: float | None = None


@dataclass(frozen=True)
class Pruner:
    """One method.

    Attributes:
        statistics: what it needs to know of the inputs of layers that share them; None: nothing.
        prune: takes the weights of those layers, their statistics, a pattern for each, masks or None, and options;
            gives the pruned weights.
        options: names of the options it takes.
    """

    statistics: type[InputNorms] | type[Hessian] | None
    prune: Callable[..., list[Pruned]]
    options: tuple[str, ...] = ()


def _each(prune: Callable[..., Tensor]) -> Callable[..., list[Pruned]]:
    """A pruner of single layers; a mask given from outside leaves it nothing to choose."""

    def prune_all(
        weights: list[Tensor], statistics: Any, patterns: list[Pattern], masks: list[Tensor] | None, **options: Any
    ) -> list[Pruned]:
        if masks is not None:
            return [Pruned(weight.masked_fill(~mask, 0)) for weight, mask in zip(weights, masks, strict=True)]
        pairs = zip(weights, patterns, strict=True)
        return [Pruned(prune(weight, statistics, pattern, **options)) for weight, pattern in pairs]

    return prune_all


def _sparsegpt(
    weights: list[Tensor], hessian: Hessian, patterns: list[Pattern], masks: list[Tensor] | None, **options: Any
) -> list[Pruned]:
    pruned, damp = prune_sparsegpt(weights, hessian, patterns, masks, **options)
    return [Pruned(weight, damp) for weight in pruned]


def _dsnot(
    weights: list[Tensor], moments: InputMoments, patterns: list[Pattern], masks: list[Tensor] | None, **_: Any
) -> list[Pruned]:
    if masks is None:
        masks = [
            mask_by_row(weight.float().abs() * moments.norms(), pattern)
            for weight, pattern in zip(weights, patterns, strict=True)
        ]
    swapped = [update_mask(w, m, moments, p) for w, m, p in zip(weights, masks, patterns, strict=True)]
    return [Pruned(weight.masked_fill(~mask, 0)) for weight, mask in zip(weights, swapped, strict=True)]


PRUNERS = {
    "magnitude": Pruner(None, _each(lambda weight, _, pattern: prune_magnitude(weight, pattern))),
    "wanda": Pruner(InputNorms, _each(prune_wanda)),
    "sparsegpt": Pruner(Hessian, _sparsegpt, ("damp", "block_size")),
    "dsnot": Pruner(InputMoments, _dsnot),
}


def check_weight(weight: Tensor, pattern: Pattern, name: str = "weight") -> None:
    """Raises ValueError if a weight is not a finite matrix that the pattern fits."""
    if weight.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(weight.shape)}; expected (out_features, in_features)")
    pattern.check_in_features(weight.shape[1], name)
    if not torch.isfinite(weight).all():
        raise ValueError(f"{name} holds values that are not finite (NaN or infinity); the checkpoint is broken")


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
        inputs: (tokens, in_features) or (..., in_features), what the layer was given; magnitude needs none.
        method: a key of ``PRUNERS``.
        pattern: N:M with N kept in every M (``"2:4"``), or the ratio of zeros (``0.5``).
        mask: boolean, True = kept: SparseGPT repairs the weights under it, DSnoT starts from it, the others apply it.
        options: of the method: ``damp`` and ``block_size`` for SparseGPT.

    Returns:
        The pruned weight, a new tensor of the same shape and dtype.

    Raises:
        ValueError: unknown method, bad pattern, inputs that are missing, empty, of another width or not finite.
    """
    if method not in PRUNERS:
        raise ValueError(f"unknown pruning method {method!r}; there are {', '.join(PRUNERS)}")
    parsed = Pattern.parse(pattern)
    check_weight(weight, parsed)
    if mask is not None and (mask.shape != weight.shape or mask.dtype != torch.bool):
        raise ValueError(f"the mask is {mask.dtype} {tuple(mask.shape)}; expected bool {tuple(weight.shape)}")
    pruner = PRUNERS[method]
    statistics = None
    if pruner.statistics is not None:
        if inputs is None or inputs.numel() == 0:
            raise ValueError(f"method {method} needs the layer's inputs, (tokens, in_features)")
        if inputs.shape[-1] != weight.shape[1]:
            raise ValueError(f"inputs have {inputs.shape[-1]} features, the weight takes {weight.shape[1]}")
        if not torch.isfinite(inputs).all():
            raise ValueError("inputs hold values that are not finite (NaN or infinity)")
        statistics = pruner.statistics(weight.shape[1], weight.device)
        statistics.update(inputs.reshape(-1, weight.shape[1]))
    masks = None if mask is None else [mask]
    return pruner.prune([weight], statistics, [parsed], masks, **options)[0].weight
