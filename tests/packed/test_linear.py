"""A packed linear layer computes what ``nn.Linear`` computes, bit for bit, and keeps its weight through conversions."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import kept_for_backward
from torch import Tensor, nn

from sppctl.packed.format import RAW, pack
from sppctl.packed.linear import PackedLinear, num_packed, packed_in, packed_layers, write_weight


def layers(dtype: torch.dtype, bias: bool = True) -> tuple[nn.Linear, PackedLinear]:
    """The same pruned layer (24 to 40), dense and packed."""
    torch.manual_seed(0)
    dense = nn.Linear(24, 40, bias=bias).to(dtype)
    with torch.no_grad():
        dense.weight[torch.rand(40, 24) < 0.7] = 0
    dense.weight.requires_grad_(False)
    return dense, PackedLinear(pack(dense.weight), dense.bias)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(RAW[tensor.dtype.itemsize])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 24), (0, 24), (2, 0, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_backward_equal_the_dense_layer(shape: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    results = []
    for layer in layers(dtype, bias):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        y = layer(x)
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        wanted = (x, layer.bias) if bias else (x,)
        results.append((y, *torch.autograd.grad(y, wanted, upstream)))
    for dense, packed in zip(*results, strict=True):
        assert torch.equal(bits(dense), bits(packed))


def test_no_dense_weight_is_kept_for_backward() -> None:
    _, packed = layers(torch.float32)
    x = torch.randn(2, 24, requires_grad=True)
    assert not kept_for_backward(lambda: packed(x))


def test_a_conversion_of_the_module_leaves_the_weight_as_it_is() -> None:
    dense, packed = layers(torch.float32)
    model = nn.Sequential(packed, nn.LayerNorm(40))
    assert torch.equal(bits(model.to(torch.bfloat16)[0].unpack()), bits(dense.weight))
    assert torch.equal(bits(model.half().double()[0].unpack(slice(3, 7))), bits(dense.weight[3:7]))
    assert (packed.compute_dtype, packed.weight.dtype, packed.device) == (torch.float32,) * 2 + (torch.device("cpu"),)
    meta = model.to("meta")[0]
    assert meta.weight.device.type == meta.device.type == "meta"


def test_what_is_packed_is_counted_as_if_it_were_dense_and_not_stored() -> None:
    _, packed = layers(torch.float32)
    model = nn.Sequential(packed, nn.Linear(40, 2))
    assert set(model.state_dict()) == {"0.bias", "1.weight", "1.bias"}
    assert [name for name, _ in packed_layers(model)] == ["0"]
    assert sum(p.numel() for p in model.parameters()) + num_packed(model) == 24 * 40 + 40 + 40 * 2 + 2
    assert (packed.in_features, packed.out_features) == (24, 40)
    assert "in_features=24, out_features=40, bias=True, torch.float32, packed to" in repr(model)


@pytest.mark.parametrize("kind", [0, 1])
def test_a_weight_can_be_replaced(kind: int) -> None:
    layer = layers(torch.bfloat16)[kind]
    values = torch.randn(40, 24).masked_fill_(torch.rand(40, 24) < 0.5, 0)
    write_weight(layer, values)
    assert torch.equal(bits(layer.weight[:]), bits(values.bfloat16()))
    assert torch.equal(layer.bias, layers(torch.bfloat16)[0].bias)


def test_values_that_round_to_zero_are_not_stored() -> None:
    """As in a dense model of that dtype, whose mask is the same."""
    values = torch.tensor([[1e-42, 1.0, -1e-42, 0.0, math.pi, 0, 0, 0]])
    packed = packed_in(values, torch.bfloat16, torch.device("cpu"))
    assert torch.equal(bits(packed[:]), bits(values.bfloat16()))
    assert len(packed.values) == 3, "-0 is stored"
    assert packed_in(values.bfloat16(), torch.float32, torch.device("cpu")).stored == torch.bfloat16
