"""The arithmetic of SPP on one linear layer.

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
A packed W is unpacked into one of these buffers, and as a whole only for the product of the base, with dropout.
On a GPU the elementwise work is done by ``triton_kernels``, where they run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sppctl.adapters.masked import round_under_mask, row_chunks
from sppctl.adapters.products import Branch, Rule, autocast_inputs, has_amx, moment_of, product
from sppctl.adapters.spp.fused import fused_for
from sppctl.packed.linear import Weight, read_rows

# elements: 1 MiB of float32; smaller pieces cost calls, larger ones leave the cache. With AMX a quarter was best
CPU_CHUNK = 1 << (16 if has_amx() else 18)
GPU_CHUNK = 1 << 24


def row_groups(out_features: int, r: int, device: torch.device | str | None = None) -> Tensor:
    """The row of alpha that serves each output row: (out_features,) int64, ``floor(i r / out_features)``."""
    return torch.arange(out_features, device=device) * r // out_features


def effective_weight(weight: Tensor, alpha: Tensor, beta: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """W * (1 + s alpha[g] beta), computed in float32 and rounded once, for merging; no gradient flows through it.

    A kept weight that rounds to zero becomes the smallest number instead (:func:`round_under_mask`). The forward pass
    skips that search.

    Args:
        weight: (m, n) pruned weight, any float dtype.
        alpha: (r, n) float32.
        beta: (m, 1) float32.
        scale: s.
        dtype: of the result (m, n), which is zero exactly where ``weight`` is.
    """
    result = _rowwise(weight, alpha, beta, scale, dtype, base=True)
    for rows in row_chunks(weight):
        result[rows] = round_under_mask(result[rows], weight[rows], dtype)
    return result


def delta_weight(weight: Tensor, alpha: Tensor, beta: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """s W' = s W * alpha[g] * beta (Eq. 4), computed in float32 and rounded once; shapes as in effective_weight."""
    return _rowwise(weight, alpha, beta, scale, dtype, base=False)


@torch.no_grad()
def _rowwise(
    weight: Weight,
    alpha: Tensor,
    beta: Tensor,
    scale: float,
    dtype: torch.dtype,
    base: bool,
    out: Tensor | None = None,
) -> Tensor:
    """s W * alpha[g] * beta, with W added to it where ``base``; in ``out``, which may be W, if that is given."""
    result = torch.empty(weight.shape, dtype=dtype, device=weight.device) if out is None else out
    scaled = beta.float() * scale
    if fused := fused_for(weight):
        fused.write(result, weight, alpha.float(), scaled, base)
        return result
    for rows, alpha_rows, values, buffer in _pieces(weight, alpha):
        _write_rows(result[rows], values, alpha_rows, scaled[rows], buffer, base)
    return result


def _write_rows(out: Tensor, values: Tensor, alpha_rows: Tensor, scaled: Tensor, factor: Tensor, base: bool) -> None:
    """values * alpha * s beta, plus values where ``base``, into ``out``; ``factor`` is a float32 buffer as large."""
    shape = (alpha_rows.shape[0], -1, values.shape[1])
    values, factor, out = values.view(shape), factor.view(shape), out.view(shape)
    # one product per call: PyTorch vectorises two operands of which one is broadcast, not three
    torch.mul(alpha_rows.float().unsqueeze(1), scaled.view(shape[0], -1, 1), out=factor)
    if base:
        torch.addcmul(values, values, factor, out=out)
    else:
        torch.mul(values, factor, out=out)


def _pieces(weight: Weight, alpha: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Cuts the rows of a matrix into small slices.

    Yields:
        A slice; the rows of alpha (k, n) that serve it (its rows, viewed as (k, rows / k, n), belong to them in order:
        whole groups or a part of one where r divides m, else one row of alpha for each row); its values in a dtype
        that gives float32 results at full speed; and a float32 buffer of the same size.
    """
    (num_rows, n), r = weight.shape, alpha.shape[0]
    budget, size = max(1, (CPU_CHUNK if weight.device.type == "cpu" else GPU_CHUNK) // n), num_rows // r
    group = row_groups(num_rows, r, weight.device) if num_rows % r else None
    # a GPU converts within its kernels
    converts = weight.device.type != "cuda" and (weight.dtype != torch.float32 or not isinstance(weight, Tensor))
    # reused: allocating memory for each slice would cost more than the computation
    buffers = torch.empty(1 + converts, min(budget, num_rows), n, dtype=torch.float32, device=weight.device)
    start = 0
    while start < num_rows:
        if group is not None:
            stop = min(start + budget, num_rows)
            alpha_rows = alpha[group[start:stop]]
        elif budget < size:
            stop = start + min(budget, size - start % size)
            alpha_rows = alpha[start // size : start // size + 1]
        else:
            stop = min(start + budget // size * size, num_rows)
            alpha_rows = alpha[start // size : stop // size]
        rows = slice(start, stop)
        values = read_rows(weight, rows, buffers[1, : stop - start]) if converts else weight[rows]
        yield rows, alpha_rows, values, buffers[0, : stop - start]
        start = stop


class SppBranch(Rule):
    """The rule of W, alpha and beta."""

    def weight(
        self, weight: Weight, factors: Sequence[Tensor], dtype: torch.dtype, base: bool, out: Tensor | None = None
    ) -> Tensor:
        """s W', or W + s W'."""
        alpha, beta = factors
        return _rowwise(weight, alpha, beta, self.branch_scale, dtype, base, out)

    def gradients(
        self, dy: Tensor, x: Tensor, weight: Weight, factors: Sequence[Tensor], base: bool
    ) -> tuple[Tensor | None, Sequence[Tensor | None]]:
        """The gradients of alpha and beta, in float32; the weight that dx needs overwrites dy^T x."""
        alpha, beta = factors
        scaled = beta.float() * self.branch_scale
        moment, fused = moment_of(dy, x), fused_for(weight)
        gradients = fused.gradients if fused else _eager_gradients
        grad_alpha, grad_beta = gradients(moment, weight, alpha.float(), scaled, base)
        return moment, (None, grad_alpha, grad_beta.mul_(self.branch_scale))


def _eager_gradients(
    moment: Tensor, weight: Weight, alpha: Tensor, scaled: Tensor, base: bool
) -> tuple[Tensor, Tensor]:
    """As ``triton_kernels.gradients``, with PyTorch's operations on a few rows at a time."""
    grad_alpha = torch.zeros(alpha.shape, dtype=torch.float32, device=alpha.device)
    grad_beta = torch.empty(scaled.shape, dtype=torch.float32, device=scaled.device)
    group = row_groups(weight.shape[0], alpha.shape[0], weight.device)
    for rows, alpha_rows, values, buffer in _pieces(weight, alpha):
        elementwise = buffer.copy_(moment[rows]).mul_(values).view(alpha_rows.shape[0], -1, weight.shape[1])
        # a transposed row, not a column: MKL's batched product is ten times as fast with these strides
        grad_beta[rows] = torch.bmm(elementwise, alpha_rows.unsqueeze(1).mT).view(-1, 1)
        group_sums = torch.bmm(scaled[rows].view(elementwise.shape[0], 1, -1), elementwise).squeeze(1)
        grad_alpha.index_add_(0, group[rows][:: elementwise.shape[1]], group_sums)
        _write_rows(moment[rows], values, alpha_rows, scaled[rows], buffer, base)
    return grad_alpha, grad_beta


def spp_linear(x: Tensor, weight: Weight, bias: Tensor | None, adapters: list[Branch]) -> Tensor:
    """One linear layer under its active adapters (Eq. 5), in the dtype of :func:`autocast_inputs`.

    Args:
        x: (..., n).
        weight: (m, n), frozen; perhaps packed.
        bias: (m,) or None.
        adapters: (alpha (r, n), beta (m, 1), scale, dropout) of each active adapter; their branches add up.
    """
    (alpha, beta, scale, dropout), *others = adapters

    def compute(x: Tensor, bias: Tensor | None) -> Tensor:
        y = product(SppBranch(scale, dropout), x, bias, weight, alpha, beta)
        for alpha_2, beta_2, scale_2, dropout_2 in others:
            y = y + product(SppBranch(scale_2, dropout_2, base=False), x, None, weight, alpha_2, beta_2)
        return y

    return autocast_inputs(x, weight, bias, compute)
