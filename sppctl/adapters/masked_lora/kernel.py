"""The arithmetic of masked LoRA on one linear layer.

W (m, n) is the pruned weight, M = (W != 0) its mask, A (r, n) and B (m, r) are trained, s is the scale:

    y = x W^T + s dropout(x) (M * (B A))^T

Without dropout it is one product with W_eff = W + s M * (B A), computed in float32 and rounded once to the dtype of W:
training sees the weight that merging writes in it. Gradients pass the rounding unchanged. With P = (dy^T x) * M:

    dB = s P A^T          dA = s B^T P          dx = dy W_eff

B A and P are computed a few rows at a time; no float32 matrix of W's shape ever exists.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sppctl.adapters.masked import round_under_mask, row_chunks
from sppctl.adapters.products import Branch, Rule, autocast_inputs, moment_of, product
from sppctl.packed.linear import Weight, linear


@torch.no_grad()
def effective_weight(weight: Weight, adapters: list[tuple[Tensor, Tensor, float]], dtype: torch.dtype) -> Tensor:
    """W + the sum of s M * (B A), computed in float32 and rounded once; no gradient flows through it.

    Args:
        weight: (m, n) pruned weight, any float dtype.
        adapters: (A (r, n), B (m, r), s) of each.
        dtype: of the result (m, n), which is zero exactly where ``weight`` is.
    """
    result = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for rows in row_chunks(weight):
        kept = weight[rows]
        total = kept.float()
        for a, b, scale in adapters:
            total = torch.addmm(total, b[rows].float(), a.float(), alpha=scale)
        result[rows] = round_under_mask(total, kept, dtype)
    return result


@torch.no_grad()
def delta_weight(
    weight: Weight, a: Tensor, b: Tensor, scale: float, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """s M * (B A), computed in float32 and rounded once; shapes as in effective_weight; in ``out``, perhaps W."""
    result = torch.empty(weight.shape, dtype=dtype, device=weight.device) if out is None else out
    for rows in row_chunks(weight):
        result[rows] = (b[rows].float() @ a.float()).mul_(scale).masked_fill_(weight[rows] == 0, 0)
    return result


class _LowRank(Rule):
    """The rule of W, A and B. Gradients are summed in float32 and have the dtypes of A and B, which ZeRO-3 rounds."""

    def weight(
        self, weight: Weight, factors: Sequence[Tensor], dtype: torch.dtype, base: bool, out: Tensor | None = None
    ) -> Tensor:
        a, b = factors
        if base:
            return effective_weight(weight, [(a, b, self.branch_scale)], dtype)
        return delta_weight(weight, a, b, self.branch_scale, dtype, out)

    def gradients(
        self, dy: Tensor, x: Tensor, weight: Weight, factors: Sequence[Tensor], base: bool
    ) -> tuple[Tensor | None, Sequence[Tensor | None]]:
        a, b = factors
        a32, scale = a.float(), self.branch_scale
        grad_a, grad_b = torch.zeros_like(a32), torch.empty(b.shape, dtype=torch.float32, device=b.device)
        for rows in row_chunks(weight):
            moment = moment_of(dy[:, rows], x).float().masked_fill_(weight[rows] == 0, 0)
            torch.mm(moment, a32.t(), out=grad_b[rows])
            grad_a.addmm_(b[rows].t().float(), moment)
        return None, (None, grad_a.mul_(scale).to(a.dtype), grad_b.mul_(scale).to(b.dtype))


def masked_lora_linear(x: Tensor, weight: Weight, bias: Tensor | None, adapters: list[Branch]) -> Tensor:
    """One linear layer under its active adapters, in the dtype of :func:`autocast_inputs`.

    Args:
        x: (..., n).
        weight: (m, n), frozen; perhaps packed.
        bias: (m,) or None.
        adapters: (A (r, n), B (m, r), scale, dropout) of each active adapter; their branches add up.
    """

    def compute(x: Tensor, bias: Tensor | None) -> Tensor:
        if len(adapters) == 1 and adapters[0][3] == 0:
            ((a, b, scale, _),) = adapters
            return product(_LowRank(scale), x, bias, weight, a, b)
        y = linear(x, weight, bias)
        for a, b, scale, dropout in adapters:
            y = y + product(_LowRank(scale, dropout, base=False), x, None, weight, a, b)
        return y

    return autocast_inputs(x, weight, bias, compute)
