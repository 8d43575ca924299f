"""The arithmetic of masked LoRA on one linear layer, with a backward that keeps nothing but the layer's input.

W (m, n) is the pruned weight, M = (W != 0) its mask, A (r, n) and B (m, r) are trained, s is the scale:

    y = x W^T + s dropout(x) (M * (B A))^T

Without dropout it is one product with W_eff = W + s M * (B A), computed in float32 and rounded once to the dtype of W:
training sees the weight that merging writes in it. Gradients pass the rounding unchanged. With P = (dy^T x) * M:

    dB = s P A^T          dA = s B^T P          dx = dy W_eff

B A and P are made for a few rows at a time; no float32 matrix of W's shape ever exists.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sppctl.adapters.dropout import dropped_places, zeroed
from sppctl.adapters.linear import autocast_inputs
from sppctl.adapters.masked import round_under_mask, row_chunks
from sppctl.adapters.products import moment_of

Factors = tuple[Tensor, Tensor, float]  # A (r, n), B (m, r), s


@torch.no_grad()
def effective_weight(weight: Tensor, adapters: list[Factors], dtype: torch.dtype) -> Tensor:
    """W + the sum of s M * (B A), computed in float32 and rounded once; no gradient flows through it.

    Args:
        weight: (m, n) pruned weight, any float dtype.
        adapters: (A (r, n), B (m, r), s) of each.
        dtype: of the result.

    Returns:
        (m, n); zero exactly where ``weight`` is zero.
    """
    result = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for rows in row_chunks(weight):
        total = weight[rows].float()
        for a, b, scale in adapters:
            total = torch.addmm(total, b[rows].float(), a.float(), alpha=scale)
        result[rows] = round_under_mask(total, weight[rows], dtype)
    return result


@torch.no_grad()
def delta_weight(weight: Tensor, a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """s M * (B A), computed in float32 and rounded once; shapes as in effective_weight."""
    result = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for rows in row_chunks(weight):
        result[rows] = (b[rows].float() @ a.float()).mul_(scale).masked_fill_(weight[rows] == 0, 0)
    return result


def _factor_gradients(
    grad_output: Tensor, inputs: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of A (r, n) and B (m, r), from dy (tokens, m) and the branch's input (tokens, n).

    They are added up in float32 and have the dtypes of A and B: ZeRO-3 rounds those to the model's.
    """
    a32 = a.float()
    grad_a, grad_b = torch.zeros_like(a32), torch.empty(b.shape, dtype=torch.float32, device=b.device)
    for rows in row_chunks(weight):
        moment = moment_of(grad_output[:, rows], inputs).float().masked_fill_(weight[rows] == 0, 0)
        torch.mm(moment, a32.t(), out=grad_b[rows])
        grad_a.addmm_(b[rows].t().float(), moment)
    return grad_a.mul_(scale).to(a.dtype), grad_b.mul_(scale).to(b.dtype)


class _MaskedLoraLinear(torch.autograd.Function):
    """One adapter's branch, or without dropout the base layer with it; saves x alone besides the layer's parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        dropout: float,
        base: bool,
    ) -> Tensor:
        # drawn from the global generator, which gradient checkpointing restores before it recomputes
        ctx.seed = int(torch.randint(0, 2**62, (1,))) if dropout else None
        ctx.scale, ctx.dropout, ctx.base = scale / (1 - dropout), dropout, base
        ctx.save_for_backward(x, weight, a, b)
        if dropout:
            x = zeroed(x, dropped_places(x, dropout, ctx.seed))
        return F.linear(x, _factor(weight, a, b, ctx.scale, x.dtype, base), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        grad_x = grad_bias = grad_a = grad_b = None
        rows = grad_output.reshape(-1, weight.shape[0]).to(x.dtype)
        places = dropped_places(x, ctx.dropout, ctx.seed) if ctx.dropout else None
        if ctx.needs_input_grad[0]:
            grad_x = rows @ _factor(weight, a, b, ctx.scale, x.dtype, ctx.base)
            if places is not None:
                grad_x.view(-1)[places] = 0
            grad_x = grad_x.view(x.shape)
        if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
            inputs = (x if places is None else zeroed(x, places)).reshape(-1, weight.shape[1])
            grad_a, grad_b = _factor_gradients(rows, inputs, weight, a, b, ctx.scale)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
        return grad_x, None, grad_bias, grad_a, grad_b, None, None, None


def _factor(weight: Tensor, a: Tensor, b: Tensor, scale: float, dtype: torch.dtype, base: bool) -> Tensor:
    """What the branch's input is multiplied by: with the base layer W_eff, else s M * (B A)."""
    return effective_weight(weight, [(a, b, scale)], dtype) if base else delta_weight(weight, a, b, scale, dtype)


def masked_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, adapters: list[tuple[Tensor, Tensor, float, float]]
) -> Tensor:
    """One linear layer under its active adapters.

    Args:
        x: (..., n).
        weight: (m, n), frozen.
        bias: (m,) or None.
        adapters: (A (r, n), B (m, r), scale, dropout) of each active adapter; their branches add up.

    Returns:
        (..., m), in autocast's dtype where autocast is on, else in the dtype of x.

    Raises:
        ValueError: without autocast, x and the weight differ in dtype.
    """

    def compute(x: Tensor, bias: Tensor | None) -> Tensor:
        if len(adapters) == 1 and adapters[0][3] == 0:
            a, b, scale, _ = adapters[0]
            return cast(Tensor, _MaskedLoraLinear.apply(x, weight, bias, a, b, scale, 0.0, True))
        y = F.linear(x, weight.to(x.dtype), bias)
        for a, b, scale, dropout in adapters:
            y = y + _MaskedLoraLinear.apply(x, weight, None, a, b, scale, dropout, False)
        return y

    return autocast_inputs(x, weight, bias, compute)
