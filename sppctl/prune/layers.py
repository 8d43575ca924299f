"""Plan, inputs and record of the matrices that are pruned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sppctl import distributed
from sppctl.errors import StageError
from sppctl.files.safe_files import TensorFiles
from sppctl.model.blocks import overflow_advice
from sppctl.model.targets import Target
from sppctl.pattern import Pattern
from sppctl.records import LayerRecord

ERROR_ROWS = 256  # inputs of a layer kept to measure how far its output moves


@dataclass(frozen=True)
class PrunePlan:
    """How every matrix is to be pruned."""

    method: str  # a key of ``PRUNERS``
    targets: dict[str, Target]  # the matrices, by name
    patterns: dict[str, Pattern]  # of each
    options: dict[str, float | int] = field(default_factory=dict)  # of the method
    # ``block`` (all statistics of the dense block, then prune, then run it again) or ``module`` (each layer is pruned
    # when its input arrives)
    order: str = "block"
    masks: TensorFiles | None = None  # a checkpoint whose zeros are the masks
    reconstruct_epochs: int = 0  # passes of tuning a pruned block's kept weights on the dense block's output; 0: none
    reconstruct_lr: float = 1e-4  # their learning rate

    def in_block(self, prefix: str) -> dict[str, Target]:
        """The targets whose names start with ``prefix``."""
        return {name: target for name, target in self.targets.items() if name.startswith(prefix)}


class LayerInputs:
    """Statistics of what a layer (or several that share their input) is given, and a few rows of it."""

    def __init__(self, make: Callable[..., Any], in_features: int, device: torch.device) -> None:
        self.statistics = make(in_features, device)
        self.sample: Tensor | None = None

    def update(self, inputs: Tensor) -> None:
        """Adds inputs (..., in_features)."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        if not len(rows):
            return
        self.statistics.update(rows)
        if self.sample is None:
            self.sample = rows[:ERROR_ROWS].clone()

    def reduce(self, name: str, dtype: torch.dtype) -> None:
        """Adds up the statistics of all processes.

        Args:
            name: of a layer that is given these inputs.
            dtype: of the model.

        Raises:
            StageError: they are not finite.
        """
        distributed.all_reduce_counted(self.statistics)
        if not all(torch.isfinite(total).all() for total in self.statistics.totals()):
            raise StageError(f"{name}: its calibration inputs are not finite: {overflow_advice(dtype)}")


class SharedInputs:
    """Which layers of a block receive the very same tensor; learned once for blocks of the same make."""

    def __init__(self) -> None:
        self._known: dict[frozenset[str], list[list[str]]] = {}

    def learn(self, relative: list[str], leaders: dict[str, str]) -> None:
        """Notes the groups; the first of each is the layer that is run first."""
        groups: dict[str, list[str]] = {}
        for name in sorted(relative, key=lambda name: leaders[name] != name):
            groups.setdefault(leaders[name], []).append(name)
        self._known[frozenset(relative)] = list(groups.values())

    def of(self, relative: list[str]) -> list[list[str]] | None:
        """The groups of a block with these layers; None if they are not known yet."""
        return self._known.get(frozenset(relative))


def measure(
    name: str,
    before: Tensor,
    after: Tensor,
    pattern: Pattern,
    inputs: LayerInputs | None,
    damp: float | None,
    seconds: float,
    fallback: str | None,
) -> LayerRecord:
    """What pruning a matrix (out_features, in_features) from ``before`` to ``after`` did."""
    # in the weights' dtype: a record of three digits is not worth float32 products of whole matrices
    difference = before - after
    output_error = None
    if inputs is not None and inputs.sample is not None:
        output_error = _ratio(inputs.sample @ difference.t(), inputs.sample @ before.t())
    return LayerRecord(
        name=name,
        shape=(before.shape[0], before.shape[1]),
        pattern=pattern,
        sparsity=int((after == 0).sum()) / after.numel(),
        relative_output_error=output_error,
        relative_weight_error=_ratio(difference, before),
        damp=damp,
        seconds=round(seconds, 4),
        fallback=fallback,
    )


def _ratio(part: Tensor, whole: Tensor) -> float:
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float32) for tensor in (part, whole)]
    return (norms[0] / norms[1].clamp_min(1e-30)).item()
