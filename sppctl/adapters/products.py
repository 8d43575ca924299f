"""Products of a linear layer whose weight a method recomputes in each pass; only x is kept for the backward pass.

With W_eff (m, n) computed from the method's tensors, y = x W_eff^T + bias and dx = dy W_eff. An adapter's branch with
dropout is a product of its own, y = x W^T + bias + dropout(x) W_branch^T; dropped places are drawn again from a seed.
W may be packed. It is then unpacked a few rows at a time, or, as a factor of a
product of its own, into the memory that the branch's weight takes before or after.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sppctl.packed.linear import Weight

STRIP = 64  # tokens: as many bfloat16 numbers as two cache lines hold
SPARE_DRAWS = 6  # of the gaps between dropped places, in standard deviations of their number
Branch = tuple[Tensor, Tensor, float, float]  # an active adapter's two factors, scale and dropout


@dataclass(frozen=True)
class Rule:
    """How a method computes its weight from a weight (m, n), frozen or trained, and factors.

    Attributes:
        scale: s, of an adapter's branch.
        dropout: probability of zeroing an input of the branch.
        base: whether the product includes that of W.
    """

    scale: float = 1.0
    dropout: float = 0.0
    base: bool = True

    @property
    def branch_scale(self) -> float:
        """s, scaled up for the inputs that dropout zeroes."""
        return self.scale / (1 - self.dropout)

    def weight(
        self, weight: Weight, factors: Sequence[Tensor], dtype: torch.dtype, base: bool, out: Tensor | None = None
    ) -> Tensor:
        """The weight (m, n), rounded once to ``dtype``; that of the branch alone unless ``base``.

        It is written to ``out`` if that is given, which may be W itself.
        """
        raise NotImplementedError

    def gradients(
        self, dy: Tensor, x: Tensor, weight: Weight, factors: Sequence[Tensor], base: bool
    ) -> tuple[Tensor | None, Sequence[Tensor | None]]:
        """The weight of :meth:`weight` if it is a by-product, else None; and the gradients of W and the factors.

        Args:
            dy: (tokens, m).
            x: (tokens, n), the branch's input.
            weight, factors, base: as in :meth:`weight`.
        """
        raise NotImplementedError


class _Product(torch.autograd.Function):
    """Products without dropout: one forward, two backward. With dropout on a base layer: two and three."""

    @staticmethod
    def forward(ctx: Any, rule: Rule, x: Tensor, bias: Tensor | None, weight: Weight, *factors: Tensor) -> Tensor:
        ctx.rule, ctx.packed = rule, None
        if isinstance(weight, Tensor):
            ctx.save_for_backward(x, *factors, weight)
        else:
            ctx.packed = weight
            ctx.save_for_backward(x, *factors)
        # drawn from the global generator, which gradient checkpointing restores before it recomputes
        ctx.seed = int(torch.randint(0, 2**62, (1,))) if rule.dropout else None
        if not rule.dropout:
            return F.linear(x, rule.weight(weight, factors, x.dtype, rule.base), bias)
        dropped = zeroed(x.reshape(-1, x.shape[-1]), dropped_places(x, rule.dropout, ctx.seed))
        if not rule.base:
            y = F.linear(dropped, rule.weight(weight, factors, x.dtype, base=False))
            return y.view(*x.shape[:-1], weight.shape[0])  # not -1, which is ambiguous without tokens
        whole = weight.to(x.dtype)
        y, out = F.linear(x, whole, bias), None
        if ctx.packed is not None and weight.dtype == x.dtype:  # unpacked without rounding, and not needed any more
            weight = out = whole
        y.view(-1, y.shape[-1]).addmm_(dropped, rule.weight(weight, factors, x.dtype, base=False, out=out).t())
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad_output.device.type, enabled=False):  # on where backward is called in its region
            return _Product._gradients(ctx, grad_output)

    @staticmethod
    def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        rule, (x, *factors) = ctx.rule, ctx.saved_tensors
        weight = factors.pop() if ctx.packed is None else ctx.packed
        m, n = weight.shape
        rows, inputs = grad_output.reshape(-1, m).to(x.dtype), x.reshape(-1, n)
        places = dropped_places(x, rule.dropout, ctx.seed) if rule.dropout else None
        base = rule.base and places is None
        grad_x, effective, gradients = None, None, [None] * (1 + len(factors))
        if any(ctx.needs_input_grad[3:]):
            branch_inputs = inputs if places is None else zeroed(inputs, places)
            effective, gradients = rule.gradients(rows, branch_inputs, weight, factors, base)
        if ctx.needs_input_grad[1]:
            effective = rule.weight(weight, factors, x.dtype, base) if effective is None else effective
            grad_x = rows @ effective
            if places is not None:
                grad_x.view(-1)[places] = 0
                if rule.base:
                    whole = weight.to(x.dtype) if ctx.packed is None else weight.unpack(slice(None), effective)
                    grad_x.addmm_(rows, whole)
            grad_x = grad_x.view(x.shape)
        return None, grad_x, rows.sum(0) if ctx.needs_input_grad[2] else None, *gradients


def product(rule: Rule, x: Tensor, bias: Tensor | None, weight: Weight, *factors: Tensor) -> Tensor:
    """The product (..., m) of x (..., n) with the weight that a rule computes; a branch alone has no bias."""
    return cast(Tensor, _Product.apply(rule, x, bias, weight, *factors))


def autocast_inputs(
    x: Tensor, weight: Weight, bias: Tensor | None, compute: Callable[[Tensor, Tensor | None], Tensor]
) -> Tensor:
    """The layer (..., n) to (..., m): ``compute`` of x and bias in autocast's dtype where it is on, else in that of x.

    Raises:
        ValueError: without autocast, x and the weight differ in dtype.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:  # which autocast leaves as it is
        x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = bias if bias is None else bias.to(x.dtype)
    elif x.dtype != weight.dtype:
        raise ValueError(f"the layer's input is {x.dtype}, its weight {weight.dtype}; convert one, or use autocast")
    with torch.autocast(x.device.type, enabled=False):
        return compute(x, bias)


def moment_of(grad_output: Tensor, inputs: Tensor) -> Tensor:
    """dy^T x (m, n) in their dtype, of dy (tokens, m) and x (tokens, n): the extra matmul of the weight gradient.

    oneDNN's kernel for AMX takes 2.6 times as long for a left side that is transposed as for one that is contiguous;
    the copy costs a fifth of the time that it saves.
    """
    if grad_output.dtype == torch.bfloat16 and grad_output.device.type == "cpu" and has_amx():
        # in strips: PyTorch's own copy of a transpose reads whole columns and misses the cache
        transposed = grad_output.new_empty(grad_output.shape[1], grad_output.shape[0])
        for start in range(0, grad_output.shape[0], STRIP):
            transposed[:, start : start + STRIP] = grad_output[start : start + STRIP].t()
        return transposed @ inputs
    return grad_output.t() @ inputs


def has_amx() -> bool:
    """Whether the CPU multiplies bfloat16 matrices in tiles."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return supported is not None and bool(supported())


def dropped_places(x: Tensor, dropout: float, seed: int) -> Tensor:
    """Where a Bernoulli mask zeroes x, seen flat; the same seed gives the same places.

    Returns:
        int64 positions on a CPU, where a draw for each zero is cheaper than one for each element: the gaps between the
        zeros are geometric. On a GPU a boolean mask (elements,).
    """
    size = x.numel()
    generator = torch.Generator(x.device).manual_seed(seed)
    if x.device.type != "cpu":
        return torch.empty(size, dtype=torch.bool, device=x.device).bernoulli_(dropout, generator=generator)
    draws = 16 + int(size * dropout + SPARE_DRAWS * math.sqrt(size * dropout))
    pieces, last = [], -1
    while last < size:
        uniform = torch.rand(draws, generator=generator)
        gaps = uniform.neg_().log1p_().div_(math.log1p(-dropout)).long().add_(1)
        pieces.append(gaps.cumsum_(0).add_(last))
        last = int(pieces[-1][-1])
    places = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return places[: int(torch.searchsorted(places, size))]


def zeroed(x: Tensor, places: Tensor) -> Tensor:
    """A contiguous copy of x with zeros at the places."""
    x = x.clone(memory_format=torch.contiguous_format)
    x.view(-1)[places] = 0
    return x
