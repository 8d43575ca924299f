"""Plan, inputs and record of the matrices that are pruned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sppctl import distributed
from sppctl.config.settings import PruneConfig
from sppctl.errors import StageError
from sppctl.files.safe_files import TensorFiles
from sppctl.model.blocks import Decoder, overflow_advice
from sppctl.model.targets import Target
from sppctl.pattern import Pattern
from sppctl.records import LayerRecord

ERROR_ROWS = 256  # inputs of a layer kept to measure the error of its output


@dataclass(frozen=True)
class PrunePlan:
    """How each matrix is pruned."""

    settings: PruneConfig
    targets: dict[str, Target]  # the matrices, by name
    patterns: dict[str, Pattern]  # of each
    masks: TensorFiles | None = None  # a checkpoint whose zeros are the masks

    def by_block(self, stack: Decoder) -> list[dict[str, Target]]:
        """The targets of each block."""
        blocks = [f"{stack.blocks_name}.{index}." for index in range(len(stack))]
        return [{name: t for name, t in self.targets.items() if name.startswith(prefix)} for prefix in blocks]

    def last_block(self, stack: Decoder) -> int:
        """The last block with targets: its outputs, and those of later blocks, are not needed."""
        return max(index for index, targets in enumerate(self.by_block(stack)) if targets)


class LayerInputs:
    """Input statistics of a layer (or of several that share their input), and a few rows of the input."""

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

    def reduce(self, name: str, dtype: torch.dtype, may_be_empty: bool = False) -> None:
        """Adds up the statistics of all processes.

        Raises:
            StageError: naming the layer, they are not finite or, unless they ``may_be_empty``, of no token.
        """
        distributed.all_reduce_counted(self.statistics)
        if not self.statistics.num_tokens and not may_be_empty:
            raise no_inputs(name)
        if not all(torch.isfinite(total).all() for total in self.statistics.totals()):
            raise StageError(f"{name}: its calibration inputs are not finite: {overflow_advice(dtype)}")


def no_inputs(name: str) -> StageError:
    """The error about a layer that no calibration window reaches."""
    return StageError(f"{name} received no calibration input; leave it out (prune.skip) or use magnitude")


def measure(
    before: Tensor, after: Tensor, sample: Tensor | None, name: str, pattern: Pattern, **result: Any
) -> LayerRecord:
    """The record of a matrix (out_features, in_features): ``result`` of its pruning, and its errors.

    ``sample``: some of its inputs (tokens, in_features).
    """
    output, weight = _errors(before, after, sample)
    return LayerRecord(
        name=name,
        shape=(before.shape[0], before.shape[1]),
        pattern=pattern,
        sparsity=_sparsity(after),
        relative_output_error=output,
        relative_weight_error=weight,
        **result,
    )


def measure_again(record: LayerRecord, before: Tensor, after: Tensor, sample: Tensor | None) -> LayerRecord:
    """The record of a matrix whose kept weights were changed after it was made; see :func:`measure`."""
    output, weight = _errors(before, after, sample)
    return replace(record, sparsity=_sparsity(after), relative_output_error=output, relative_weight_error=weight)


def _errors(before: Tensor, after: Tensor, sample: Tensor | None) -> tuple[float | None, float]:
    """The relative errors of the outputs, if there are inputs, and of the weights."""
    # in the weights' dtype: three digits of a record are not worth float32 products of full matrices
    difference = before - after
    output = None if sample is None else _relative_norm(sample @ difference.t(), sample @ before.t())
    return output, _relative_norm(difference, before)


def _sparsity(weight: Tensor) -> float:
    return int((weight == 0).sum()) / weight.numel()


def _relative_norm(difference: Tensor, reference: Tensor) -> float:
    dtype = torch.promote_types(reference.dtype, torch.float32)  # vector_norm does not narrow float64
    norms = [torch.linalg.vector_norm(tensor, dtype=dtype) for tensor in (difference, reference)]
    return (norms[0] / norms[1].clamp_min(1e-30)).item()
