"""A linear layer whose trained weight is dense float32 and whose effective weight is that weight under a mask.

V (m, n) float32 is trained, M the mask, W_eff = M * V rounded once to the model's dtype, y = x W_eff^T + bias:

    dx = dy W_eff          dV = M * (dy^T x)          (Eq. 3 of arXiv 2405.16057: the mask is fixed)
                           dV = dy^T x                (Eq. 2: straight through a mask that will be re-selected)

The gradient of V is float32 and as large as V.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sppctl.adapters.masked import round_under_mask, row_chunks
from sppctl.adapters.products import Rule, autocast_inputs, moment_of, product
from sppctl.packed.linear import Weight


@torch.no_grad()
def effective_weight(values: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """``values`` (m, n) float32 under a mask (m, n; kept where it is not zero), rounded to ``dtype``."""
    result = torch.empty(values.shape, dtype=dtype, device=values.device)
    for rows in row_chunks(values):
        result[rows] = round_under_mask(values[rows], mask[rows], dtype)
    return result


@dataclass(frozen=True)
class _Masked(Rule):
    """The rule of V and its mask; ``straight_through``: the gradient also reaches weights outside the mask."""

    straight_through: bool = False

    def weight(
        self, weight: Weight, factors: Sequence[Tensor], dtype: torch.dtype, base: bool, out: Tensor | None = None
    ) -> Tensor:
        assert isinstance(weight, Tensor)
        return effective_weight(weight, factors[0], dtype)

    def gradients(
        self, dy: Tensor, x: Tensor, weight: Weight, factors: Sequence[Tensor], base: bool
    ) -> tuple[Tensor | None, Sequence[Tensor | None]]:
        assert isinstance(weight, Tensor)
        gradient, (mask,) = torch.empty_like(weight), factors
        for rows in row_chunks(weight):
            gradient[rows] = moment_of(dy[:, rows], x)
            if not self.straight_through:
                gradient[rows].masked_fill_(mask[rows] == 0, 0)
        return None, (gradient, None)


def masked_linear(
    x: Tensor, values: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None, *, straight_through: bool = False
) -> Tensor:
    """One linear layer with a trained weight under a mask, in the dtype of :func:`autocast_inputs`.

    Args:
        x: (..., n).
        values: V (m, n) float32.
        mask: (m, n), any dtype; kept where it is not zero. The pruned weight is its own mask.
        weight: (m, n), the frozen weight, for its dtype.
        bias: (m,) or None.
        straight_through: the gradient reaches weights outside the mask too.
    """
    rule = _Masked(straight_through=straight_through)
    return autocast_inputs(x, weight, bias, lambda x, bias: product(rule, x, bias, values, mask))
