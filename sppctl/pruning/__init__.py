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
from sppctl.pruning.magnitude import prune_magnitude
from sppctl.pruning.sparsegpt import prune_sparsegpt
from sppctl.pruning.stats import Hessian, InputNorms
from sppctl.pruning.wanda import prune_wanda

__all__ = ["PRUNERS", "Hessian", "InputNorms", "Pruned", "Pruner", "prune_linear"]

Statistics = InputNorms | Hessian


@dataclass(frozen=True)
class Pruned:
    """A pruned weight, and the damping of the Hessian where there was one."""

    weight: Tensor
    damp: float | None = None


@dataclass(frozen=True)
class Pruner:
    """One method: the statistics it needs of a layer's inputs (None: none), and its function."""

    statistics: type[InputNorms] | type[Hessian] | None
    prune: Callable[..., Pruned]


PRUNERS = {
    "magnitude": Pruner(None, lambda weight, _, pattern, **__: Pruned(prune_magnitude(weight, pattern))),
    "wanda": Pruner(InputNorms, lambda weight, norms, pattern, **__: Pruned(prune_wanda(weight, norms, pattern))),
    "sparsegpt": Pruner(
        Hessian,
        lambda weight, hessian, pattern, **options: Pruned(*prune_sparsegpt(weight, hessian, pattern, **options)),
    ),
}


def check_weight(weight: Tensor, pattern: Pattern, name: str = "weight") -> None:
    """Raises ValueError if a weight is not a finite matrix that the pattern fits."""
    if weight.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(weight.shape)}; expected (out_features, in_features)")
    pattern.check_in_features(weight.shape[1], name)
    if not torch.isfinite(weight).all():
        raise ValueError(f"{name} holds values that are not finite (NaN or infinity); the checkpoint is broken")


def prune_linear(
    weight: Tensor, inputs: Tensor | None = None, *, method: str, pattern: Pattern | str | float, **options: Any
) -> Tensor:
    """Prunes one linear layer.

    Args:
        weight: (out_features, in_features), any float dtype.
        inputs: (tokens, in_features) or (..., in_features), what the layer was given; magnitude needs none.
        method: a key of ``PRUNERS``.
        pattern: N:M with N kept in every M (``"2:4"``), or the ratio of zeros (``0.5``).
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
    return pruner.prune(weight, statistics, parsed, **options).weight
