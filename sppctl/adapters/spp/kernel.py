"""The arithmetic of SPP on one linear layer, with a backward that keeps nothing but the layer's input.

Notation of the paper (arXiv 2405.16057): W (m, n) the pruned weight, alpha (r, n), beta (m, 1), s the scale.
Row i of W belongs to group g(i) = floor(i r / m), so that any m works, also where r does not divide it.

    W' = W * alpha[g] * beta                     (Eq. 4)
    y  = x W^T + s dropout(x) W'^T               (Eq. 5)

Without dropout the two matrix products are one, with the effective weight W_eff = W * (1 + s alpha[g] beta), which is
computed in float32 and rounded once to the dtype of W: training sees exactly the weight that merging writes. Gradients
pass the rounding unchanged. With P = (dy^T x) * W:

    dbeta_i  = s sum_n P_in alpha_g(i)n          dalpha_k = s sum_{i in group k} beta_i P_i          dx = dy W_eff

Float32 transients are made for a few rows at a time: small enough for a CPU's cache, never a second copy of W.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

CPU_CHUNK = 1 << 17  # elements: half a MiB of float32, measured twice as fast as whole matrices
GPU_CHUNK = 1 << 24
PRODUCT_CHUNK = 1 << 24  # of dy^T x, which is worth more rows at a time


def row_groups(out_features: int, r: int, device: torch.device | str | None = None) -> Tensor:
    """The row of alpha that serves each output row: (out_features,) int64, ``floor(i r / out_features)``."""
    return torch.arange(out_features, device=device) * r // out_features


def effective_weight(weight: Tensor, alpha: Tensor, beta: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """W * (1 + s alpha[g] beta), computed in float32 and rounded once; no gradient flows through it.

    Args:
        weight: (m, n) pruned weight, any float dtype.
        alpha: (r, n) float32.
        beta: (m, 1) float32.
        scale: s.
        dtype: of the result.

    Returns:
        (m, n); zero wherever ``weight`` is zero.
    """
    return _rowwise(weight, alpha, beta, scale, dtype, offset=1.0)


def delta_weight(weight: Tensor, alpha: Tensor, beta: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """s W' = s W * alpha[g] * beta (Eq. 4), computed in float32 and rounded once; shapes as in effective_weight."""
    return _rowwise(weight, alpha, beta, scale, dtype, offset=0.0)


@torch.no_grad()
def _rowwise(weight: Tensor, alpha: Tensor, beta: Tensor, scale: float, dtype: torch.dtype, offset: float) -> Tensor:
    result = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    start = torch.full((), offset, dtype=torch.float32, device=weight.device)
    for rows, alpha_rows in _pieces(weight, alpha, 0, weight.shape[0]):
        shape = (alpha_rows.shape[0], -1, weight.shape[1])
        factor = torch.addcmul(
            start, alpha_rows.unsqueeze(1).float(), beta[rows].float().mul(scale).view(shape[0], -1, 1)
        )
        torch.mul(factor, weight[rows].view(shape), out=factor)
        result[rows].view(shape).copy_(factor)
    return result


def _pieces(weight: Tensor, alpha: Tensor, first: int, last: int) -> Iterator[tuple[slice, Tensor]]:
    """Cuts the rows [first, last) into small slices, each with the rows of alpha (k, n) that serve it.

    The slice's rows, viewed as (k, rows / k, n), belong to the k rows of alpha in order: whole groups or a part of
    one where r divides m, else one row of alpha for each row.
    """
    num_rows, num_columns = weight.shape
    r = alpha.shape[0]
    budget = max(1, (CPU_CHUNK if weight.device.type == "cpu" else GPU_CHUNK) // num_columns)
    if num_rows % r:
        group = row_groups(num_rows, r, weight.device)
        for start in range(first, last, budget):
            rows = slice(start, min(start + budget, last))
            yield rows, alpha[group[rows]]
        return
    size = num_rows // r
    start = first
    while start < last:
        inside = start % size
        if inside or budget < size or last - start < size:
            stop = min(start + min(budget, size - inside), last)
            yield slice(start, stop), alpha[start // size : start // size + 1]
        else:
            stop = start + min(budget // size, (last - start) // size) * size
            yield slice(start, stop), alpha[start // size : stop // size]
        start = stop


def _adapter_gradients(
    grad_output: Tensor, inputs: Tensor, weight: Tensor, alpha: Tensor, beta: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of alpha (r, n) and beta (m, 1) in float32, from dy (tokens, m) and the branch's input (tokens, n)."""
    num_rows, num_columns = weight.shape
    grad_alpha = torch.zeros(alpha.shape, dtype=torch.float32, device=alpha.device)
    grad_beta = torch.empty(beta.shape, dtype=torch.float32, device=beta.device)
    group = row_groups(num_rows, alpha.shape[0], weight.device)
    step = max(1, PRODUCT_CHUNK // num_columns)
    for first in range(0, num_rows, step):
        last = min(first + step, num_rows)
        moment = grad_output[:, first:last].t() @ inputs
        for rows, alpha_rows in _pieces(weight, alpha, first, last):
            shape = (alpha_rows.shape[0], -1, num_columns)
            product = torch.mul(moment[rows.start - first : rows.stop - first].float(), weight[rows]).view(shape)
            grad_beta[rows] = torch.bmm(product, alpha_rows.float().unsqueeze(-1)).view(-1, 1)
            served = torch.bmm(beta[rows].float().view(shape[0], 1, -1), product).squeeze(1)
            grad_alpha.index_add_(0, group[rows][:: product.shape[1]], served)
    return grad_alpha.mul_(scale), grad_beta.mul_(scale)


class _EffectiveLinear(torch.autograd.Function):
    """y = x W_eff^T + bias: one product forward, two backward; saves x alone besides the layer's own parameters."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, alpha: Tensor, beta: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, alpha, beta)
        ctx.scale = scale
        return F.linear(x, effective_weight(weight, alpha, beta, scale, x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, alpha, beta = ctx.saved_tensors
        grad_x = grad_alpha = grad_beta = None
        rows = grad_output.reshape(-1, weight.shape[0]).to(x.dtype)
        if ctx.needs_input_grad[0]:
            grad_x = (rows @ effective_weight(weight, alpha, beta, ctx.scale, x.dtype)).view(x.shape)
        if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
            flat = x.reshape(-1, weight.shape[1])
            grad_alpha, grad_beta = _adapter_gradients(rows, flat, weight, alpha, beta, ctx.scale)
        return grad_x, None, None, grad_alpha, grad_beta, None


class _DeltaLinear(torch.autograd.Function):
    """s dropout(x) W'^T, the adapter branch alone (Eq. 5); the dropout mask is drawn again from its seed."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, alpha: Tensor, beta: Tensor, scale: float, dropout: float
    ) -> Tensor:
        # drawn from the global generator, which gradient checkpointing restores before it recomputes
        ctx.seed = int(torch.randint(0, 2**62, (1,))) if dropout else None
        ctx.scale, ctx.dropout = scale, dropout
        ctx.save_for_backward(x, weight, alpha, beta)
        return F.linear(_dropped(x, dropout, ctx.seed), delta_weight(weight, alpha, beta, scale, x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, alpha, beta = ctx.saved_tensors
        grad_x = grad_alpha = grad_beta = None
        rows = grad_output.reshape(-1, weight.shape[0]).to(x.dtype)
        if ctx.needs_input_grad[0]:
            grad_x = (rows @ delta_weight(weight, alpha, beta, ctx.scale, x.dtype)).view(x.shape)
            grad_x = _dropped(grad_x, ctx.dropout, ctx.seed)
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            flat = _dropped(x, ctx.dropout, ctx.seed).reshape(-1, weight.shape[1])
            grad_alpha, grad_beta = _adapter_gradients(rows, flat, weight, alpha, beta, ctx.scale)
        return grad_x, None, grad_alpha, grad_beta, None, None


def _dropped(x: Tensor, dropout: float, seed: int | None) -> Tensor:
    """x times a Bernoulli mask / (1 - p); the same seed gives the same mask."""
    if seed is None:
        return x
    generator = torch.Generator(x.device).manual_seed(seed)
    keep = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - dropout, generator=generator)
    return x * keep * (1 / (1 - dropout))


def spp_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: list[tuple[Tensor, Tensor, float, float]],
) -> Tensor:
    """One linear layer under its active adapters (Eq. 5).

    Args:
        x: (..., n).
        weight: (m, n), frozen.
        bias: (m,) or None, frozen.
        adapters: (alpha (r, n), beta (m, 1), scale, dropout) of each active adapter; their branches add up.

    Returns:
        (..., m), in autocast's dtype where autocast is on, else in the dtype of x.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = bias if bias is None else bias.to(x.dtype)
    elif x.dtype != weight.dtype:
        raise ValueError(f"SPP layer: the input is {x.dtype}, the weight {weight.dtype}; convert one, or use autocast")
    with torch.autocast(x.device.type, enabled=False):
        if len(adapters) == 1 and adapters[0][3] == 0:
            alpha, beta, scale, _ = adapters[0]
            return cast(Tensor, _EffectiveLinear.apply(x, weight, bias, alpha, beta, scale))
        y = F.linear(x, weight.to(x.dtype), bias)
        for alpha, beta, scale, dropout in adapters:
            y = y + _DeltaLinear.apply(x, weight, alpha, beta, scale, dropout)
        return y
