"""The arithmetic of SPP on one linear layer, with a backward that keeps nothing but the layer's input.

Notation of the paper (arXiv 2405.16057): W (m, n) the pruned weight, alpha (r, n), beta (m, 1), s the scale.
Row i of W belongs to group g(i) = floor(i r / m), so that any m works, also where r does not divide it.

    W' = W * alpha[g] * beta                     (Eq. 4)
    y  = x W^T + s dropout(x) W'^T               (Eq. 5)

Without dropout the two matrix products are one, with the effective weight W_eff = W * (1 + s alpha[g] beta), which is
computed in float32 and rounded once to the dtype of x: training sees the weight that merging writes in it. Gradients
pass the rounding unchanged. With P = (dy^T x) * W:

    dbeta_i  = s sum_n P_in alpha_g(i)n          dalpha_k = s sum_{i in group k} beta_i P_i          dx = dy W_eff

With dropout the adapter branch is added into the product of the base, and its places are drawn again from a seed.
Transients: one matrix of W's shape in the dtype of x, which in backward is dy^T x first and W_eff then, two float32
buffers of a few rows, small enough for a CPU's cache, and on CPUs with AMX a copy of dy. W is never copied to float32.
On a GPU the elementwise work is done by ``triton_kernels``, where they run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sppctl.adapters.dropout import dropped_places, zeroed
from sppctl.adapters.linear import autocast_inputs
from sppctl.adapters.masked import round_under_mask, row_chunks
from sppctl.adapters.products import has_amx, moment_of
from sppctl.adapters.spp.fused import fused_for

# elements: 1 MiB of float32; smaller pieces cost calls, larger ones leave the cache. With AMX a quarter was best
CPU_CHUNK = 1 << (16 if has_amx() else 18)
GPU_CHUNK = 1 << 24


def row_groups(out_features: int, r: int, device: torch.device | str | None = None) -> Tensor:
    """The row of alpha that serves each output row: (out_features,) int64, ``floor(i r / out_features)``."""
    return torch.arange(out_features, device=device) * r // out_features


def effective_weight(weight: Tensor, alpha: Tensor, beta: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """W * (1 + s alpha[g] beta), computed in float32 and rounded once, for merging; no gradient flows through it.

    A kept weight that rounds to zero becomes the smallest number instead (:func:`round_under_mask`). The forward pass
    spares itself that search.

    Args:
        weight: (m, n) pruned weight, any float dtype.
        alpha: (r, n) float32.
        beta: (m, 1) float32.
        scale: s.
        dtype: of the result.

    Returns:
        (m, n); zero exactly where ``weight`` is zero.
    """
    result = _rowwise(weight, alpha, beta, scale, dtype, base=True)
    for rows in row_chunks(weight):
        result[rows] = round_under_mask(result[rows], weight[rows], dtype)
    return result


def delta_weight(weight: Tensor, alpha: Tensor, beta: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """s W' = s W * alpha[g] * beta (Eq. 4), computed in float32 and rounded once; shapes as in effective_weight."""
    return _rowwise(weight, alpha, beta, scale, dtype, base=False)


@torch.no_grad()
def _rowwise(weight: Tensor, alpha: Tensor, beta: Tensor, scale: float, dtype: torch.dtype, base: bool) -> Tensor:
    """s W * alpha[g] * beta, with W added to it where ``base``."""
    result = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    scaled = beta.float() * scale
    if fused := fused_for(weight):
        fused.write(result, weight, alpha.float(), scaled, base)
        return result
    buffers = _Buffers(weight)
    for rows, alpha_rows in _pieces(weight, alpha):
        _write_rows(result[rows], buffers.values(weight[rows]), alpha_rows, scaled[rows], buffers.room(rows), base)
    return result


def _write_rows(out: Tensor, values: Tensor, alpha_rows: Tensor, scaled: Tensor, factor: Tensor, base: bool) -> None:
    """values * alpha * s beta, plus values where ``base``, into ``out``; ``factor`` is room for as much in float32."""
    shape = (alpha_rows.shape[0], -1, values.shape[1])
    values, factor, out = values.view(shape), factor.view(shape), out.view(shape)
    # one product per call: PyTorch vectorises two operands of which one is broadcast, not three
    torch.mul(alpha_rows.float().unsqueeze(1), scaled.view(shape[0], -1, 1), out=factor)
    if base:
        torch.addcmul(values, values, factor, out=out)
    else:
        torch.mul(values, factor, out=out)


class _Buffers:
    """Float32 buffers for pieces of a matrix: memory that is asked for anew for each costs more than the work."""

    def __init__(self, weight: Tensor) -> None:
        # a GPU converts within its kernels
        self._convert = weight.dtype != torch.float32 and not weight.is_cuda
        shape = (1 + self._convert, min(_budget(weight), weight.shape[0]), weight.shape[1])
        self._buffers = torch.empty(shape, dtype=torch.float32, device=weight.device)

    def values(self, rows: Tensor) -> Tensor:
        """The rows of the matrix in a dtype that gives float32 results at full speed."""
        return self._buffers[1, : len(rows)].copy_(rows) if self._convert else rows

    def room(self, rows: slice) -> Tensor:
        """Room for a result of as many rows."""
        return self._buffers[0, : rows.stop - rows.start]


def _budget(weight: Tensor) -> int:
    """Rows of a matrix that are worked on at once."""
    return max(1, (CPU_CHUNK if weight.device.type == "cpu" else GPU_CHUNK) // weight.shape[1])


def _pieces(weight: Tensor, alpha: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Cuts the rows into small slices, each with the rows of alpha (k, n) that serve it.

    The slice's rows, viewed as (k, rows / k, n), belong to the k rows of alpha in order: whole groups or a part of
    one where r divides m, else one row of alpha for each row.
    """
    num_rows, r = weight.shape[0], alpha.shape[0]
    budget = _budget(weight)
    if num_rows % r:
        group = row_groups(num_rows, r, weight.device)
        for start in range(0, num_rows, budget):
            rows = slice(start, min(start + budget, num_rows))
            yield rows, alpha[group[rows]]
        return
    size = num_rows // r
    start = 0
    while start < num_rows:
        if budget < size:
            stop = start + min(budget, size - start % size)
            yield slice(start, stop), alpha[start // size : start // size + 1]
        else:
            stop = min(start + budget // size * size, num_rows)
            yield slice(start, stop), alpha[start // size : stop // size]
        start = stop


def _adapter_gradients(
    moment: Tensor, weight: Tensor, alpha: Tensor, beta: Tensor, scale: float, base: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of alpha (r, n) and beta (m, 1) in float32, while the weight that dx needs is made in passing.

    Args:
        moment: dy^T x (m, n), x the branch's input; overwritten by what _rowwise returns.
        weight, alpha, beta, scale, base: as in _rowwise.
    """
    scaled = beta.float() * scale
    fused = fused_for(weight)
    gradients = fused.gradients if fused else _eager_gradients
    grad_alpha, grad_beta = gradients(moment, weight, alpha.float(), scaled, base)
    return grad_alpha, grad_beta.mul_(scale)


def _eager_gradients(
    moment: Tensor, weight: Tensor, alpha: Tensor, scaled: Tensor, base: bool
) -> tuple[Tensor, Tensor]:
    """As ``triton_kernels.gradients``, with PyTorch's operations on a few rows at a time."""
    grad_alpha = torch.zeros(alpha.shape, dtype=torch.float32, device=alpha.device)
    grad_beta = torch.empty(scaled.shape, dtype=torch.float32, device=scaled.device)
    group = row_groups(weight.shape[0], alpha.shape[0], weight.device)
    buffers = _Buffers(weight)
    for rows, alpha_rows in _pieces(weight, alpha):
        values, room = buffers.values(weight[rows]), buffers.room(rows)
        product = room.copy_(moment[rows]).mul_(values).view(alpha_rows.shape[0], -1, weight.shape[1])
        # a transposed row, not a column: MKL's batched product is ten times as fast with these strides
        grad_beta[rows] = torch.bmm(product, alpha_rows.unsqueeze(1).mT).view(-1, 1)
        served = torch.bmm(scaled[rows].view(product.shape[0], 1, -1), product).squeeze(1)
        grad_alpha.index_add_(0, group[rows][:: product.shape[1]], served)
        _write_rows(moment[rows], values, alpha_rows, scaled[rows], room, base)
    return grad_alpha, grad_beta


class _SppLinear(torch.autograd.Function):
    """One adapter's branch, with the base layer where ``base``; saves x alone besides the layer's own parameters.

    Products without dropout: one forward, two backward. With dropout: two (the base's and the branch's) and three.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        alpha: Tensor,
        beta: Tensor,
        scale: float,
        dropout: float,
        base: bool,
    ) -> Tensor:
        # drawn from the global generator, which gradient checkpointing restores before it recomputes
        ctx.seed = int(torch.randint(0, 2**62, (1,))) if dropout else None
        ctx.scale, ctx.dropout, ctx.base = scale / (1 - dropout), dropout, base
        ctx.save_for_backward(x, weight, alpha, beta)
        if not dropout:
            return F.linear(x, _rowwise(weight, alpha, beta, scale, x.dtype, base), bias)
        branch_weight = _rowwise(weight, alpha, beta, ctx.scale, x.dtype, base=False)
        dropped = zeroed(x.reshape(-1, x.shape[-1]), dropped_places(x, dropout, ctx.seed))
        if not base:
            return F.linear(dropped, branch_weight).view(*x.shape[:-1], -1)
        y = F.linear(x, weight.to(x.dtype), bias)
        y.view(-1, weight.shape[0]).addmm_(dropped, branch_weight.t())
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, alpha, beta = ctx.saved_tensors
        grad_x = grad_bias = grad_alpha = grad_beta = None
        rows, inputs = grad_output.reshape(-1, weight.shape[0]).to(x.dtype), x.reshape(-1, weight.shape[1])
        places = dropped_places(x, ctx.dropout, ctx.seed) if ctx.dropout else None
        with_base = ctx.base and places is None
        if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
            branch_weight = moment_of(rows, inputs if places is None else zeroed(inputs, places))
            grad_alpha, grad_beta = _adapter_gradients(branch_weight, weight, alpha, beta, ctx.scale, with_base)
        else:
            branch_weight = _rowwise(weight, alpha, beta, ctx.scale, x.dtype, with_base)
        if ctx.needs_input_grad[0]:
            grad_x = rows @ branch_weight
            if places is not None:
                grad_x.view(-1)[places] = 0
                if ctx.base:
                    grad_x.addmm_(rows, weight.to(x.dtype))
            grad_x = grad_x.view(x.shape)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
        return grad_x, None, grad_bias, grad_alpha, grad_beta, None, None, None


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
        bias: (m,) or None.
        adapters: (alpha (r, n), beta (m, 1), scale, dropout) of each active adapter; their branches add up.

    Returns:
        (..., m), in autocast's dtype where autocast is on, else in the dtype of x.

    Raises:
        ValueError: without autocast, x and the weight differ in dtype.
    """
    (alpha, beta, scale, dropout), *others = adapters

    def compute(x: Tensor, bias: Tensor | None) -> Tensor:
        y = cast(Tensor, _SppLinear.apply(x, weight, bias, alpha, beta, scale, dropout, True))
        for adapter in others:
            y = y + _SppLinear.apply(x, weight, None, *adapter, False)
        return y

    return autocast_inputs(x, weight, bias, compute)
