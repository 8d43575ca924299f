"""A frozen linear layer with a packed weight, and what adapters ask of any base layer.

A base layer has ``in_features``, ``out_features``, ``weight`` and ``bias``. Its weight is a tensor, or a
:class:`PackedWeight`, which is read like one: ``shape``, ``dtype``, ``device``, ``weight[rows]``, ``weight.to(dtype)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sppctl.packed.format import PackedWeight, pack

Weight = Tensor | PackedWeight
TENSORS = ("mask", "values", "offsets")


class PackedLinear(nn.Module):
    """A linear layer (..., in_features) to (..., out_features) that unpacks its weight in every product.

    The packed tensors are buffers, so that they move with the module; their dtypes are integers, so that no conversion
    of the module changes them. They are not part of its state: the checkpoint that they were packed from is.
    """

    mask: Tensor
    values: Tensor
    offsets: Tensor

    def __init__(self, weight: PackedWeight, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self.set_weight(weight)

    def set_weight(self, weight: PackedWeight) -> None:
        """Replaces the weight by another of its shape."""
        assert weight.shape == (self.out_features, self.in_features), weight.shape
        for name in TENSORS:
            self.register_buffer(name, getattr(weight, name), persistent=False)
        self._stored, self.compute_dtype = weight.stored, weight.dtype

    @property
    def weight(self) -> PackedWeight:
        """W (out_features, in_features)."""
        return PackedWeight(self.mask, self.values, self.offsets, self.in_features, self._stored, self.compute_dtype)

    @property
    def device(self) -> torch.device:
        """Of the weight."""
        return self.mask.device

    def unpack(self, rows: slice = slice(None)) -> Tensor:
        """Some consecutive rows of W (rows, in_features), in ``compute_dtype``."""
        return self.weight[rows]

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + bias."""
        return linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of it."""
        packed, dense = self.weight.num_bytes, self.out_features * self.in_features * self.compute_dtype.itemsize
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, {self.compute_dtype}, packed to {packed / max(1, dense):.0%}"


BASE_LAYERS = (nn.Linear, PackedLinear)


def read_rows(weight: Weight, rows: slice, out: Tensor) -> Tensor:
    """Some consecutive rows of a weight in ``out``, contiguous and of their shape, in its dtype."""
    return out.copy_(weight[rows]) if isinstance(weight, Tensor) else weight.unpack(rows, out)


def write_weight(layer: nn.Module, values: Tensor) -> None:
    """Replaces the frozen weight of a base layer by ``values`` (out_features, in_features), rounded to its dtype."""
    weight = cast(Weight, layer.weight)
    if isinstance(weight, Tensor):
        weight.data.copy_(values)
    else:
        cast(PackedLinear, layer).set_weight(packed_in(values, weight.dtype, weight.device))


def packed_in(values: Tensor, dtype: torch.dtype, device: torch.device) -> PackedWeight:
    """``values`` (m, n) packed on a device, to be computed with in ``dtype``; rounded to it first if it is narrower."""
    values = values.detach().cpu()
    if torch.promote_types(values.dtype, dtype) != dtype:
        values = values.to(dtype)
    packed = pack(values, dtype)
    tensors = {name: getattr(packed, name).to(device) for name in TENSORS}
    return replace(packed, **tensors)


def packed_layers(model: nn.Module) -> Iterator[tuple[str, PackedLinear]]:
    """The packed layers of a model by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, PackedLinear))


def num_packed(model: nn.Module) -> int:
    """The number of weights in packed layers, zeros included, which are not among the model's parameters."""
    return sum(layer.in_features * layer.out_features for _, layer in packed_layers(model))


class _Linear(torch.autograd.Function):
    """x W^T + bias, where W is unpacked again for the backward pass instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight.to(x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        rows = grad_output.reshape(-1, grad_output.shape[-1])
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            # the last dimension by its size: -1 is ambiguous without tokens
            grad_x = (rows @ ctx.weight.to(rows.dtype)).view(*grad_output.shape[:-1], ctx.weight.shape[1])
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
        return grad_x, None, grad_bias


def linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """x W^T + bias with a frozen weight (m, n) in the dtype of x (..., n); nothing of W's size is kept for backward."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight.to(x.dtype), bias)
    return cast(Tensor, _Linear.apply(x, weight, bias))
