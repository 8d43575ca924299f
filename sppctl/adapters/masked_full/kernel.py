"""A linear layer whose trained weight is dense float32 and whose effective weight is that weight under a mask.

V (m, n) float32 is trained, M the mask, W_eff = M * V rounded once to the model's dtype, y = x W_eff^T + bias:

    dx = dy W_eff          dV = M * (dy^T x)          (Eq. 3 of arXiv 2405.16057: the mask is fixed)
                           dV = dy^T x                (Eq. 2: straight through a mask that will be chosen again)

Nothing is kept for the backward pass but x; W_eff is made again. The gradient of V is float32 and as large as V.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sppctl.adapters.linear import autocast_inputs
from sppctl.adapters.masked import round_under_mask, row_chunks
from sppctl.adapters.products import moment_of


@torch.no_grad()
def effective_weight(values: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """``values`` (m, n) float32 under a mask (m, n; kept where it is not zero), rounded to ``dtype``."""
    result = torch.empty(values.shape, dtype=dtype, device=values.device)
    for rows in row_chunks(values):
        result[rows] = round_under_mask(values[rows], mask[rows], dtype)
    return result


class _MaskedLinear(torch.autograd.Function):
    """y = x W_eff^T + bias; saves x alone besides the layer's own parameters and buffers."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, mask: Tensor, bias: Tensor | None, straight_through: bool
    ) -> Tensor:
        ctx.save_for_backward(x, values, mask)
        ctx.straight_through = straight_through
        return F.linear(x, effective_weight(values, mask, x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, values, mask = ctx.saved_tensors
        grad_x = grad_values = grad_bias = None
        rows = grad_output.reshape(-1, values.shape[0]).to(x.dtype)
        if ctx.needs_input_grad[0]:
            grad_x = (rows @ effective_weight(values, mask, x.dtype)).view(x.shape)
        if ctx.needs_input_grad[1]:
            flat = x.reshape(-1, values.shape[1])
            grad_values = torch.empty_like(values)
            for chunk in row_chunks(values):
                grad_values[chunk] = moment_of(rows[:, chunk], flat)
                if not ctx.straight_through:
                    grad_values[chunk].masked_fill_(mask[chunk] == 0, 0)
        if ctx.needs_input_grad[3]:
            grad_bias = rows.sum(0)
        return grad_x, grad_values, None, grad_bias, None


def masked_linear(
    x: Tensor, values: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None, *, straight_through: bool = False
) -> Tensor:
    """One linear layer with a trained weight under a mask.

    Args:
        x: (..., n).
        values: V (m, n) float32.
        mask: (m, n), any dtype; kept where it is not zero. The pruned weight is its own mask.
        weight: (m, n), the frozen weight, for its dtype.
        bias: (m,) or None.
        straight_through: the gradient reaches weights outside the mask too.

    Returns:
        (..., m), in autocast's dtype where autocast is on, else in the dtype of x.

    Raises:
        ValueError: without autocast, x and the weight differ in dtype.
    """
    return autocast_inputs(
        x, weight, bias, lambda x, bias: cast(Tensor, _MaskedLinear.apply(x, values, mask, bias, straight_through))
    )
