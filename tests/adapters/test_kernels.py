"""The arithmetic of every method on one layer, against literal formulas in float64 with autograd."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import kept_for_backward
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sppctl.adapters import masked, products
from sppctl.adapters.masked import round_under_mask
from sppctl.adapters.masked_full import kernel as masked_full
from sppctl.adapters.masked_full.kernel import masked_linear
from sppctl.adapters.masked_lora import kernel as masked_lora
from sppctl.adapters.masked_lora.kernel import masked_lora_linear
from sppctl.adapters.products import dropped_places
from sppctl.adapters.spp import kernel
from sppctl.adapters.spp.kernel import effective_weight, row_groups, spp_linear

Tensors = tuple[Tensor, ...]
SCALE = 2.0
SHAPE = (12, 8, 4)  # out, in, r


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- the methods, and what they should compute ------------------------------------------------------------------------


def spp_delta(weight: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """s W' of Eq. 4, element by element; differentiable, in the dtype of the arguments."""
    out_features, in_features = weight.shape
    rows = []
    for i in range(out_features):
        group = i * alpha.shape[0] // out_features
        rows.append(torch.stack([SCALE * weight[i, j] * alpha[group, j] * beta[i, 0] for j in range(in_features)]))
    return torch.stack(rows)


def masked_lora_delta(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """s (W != 0) * (B A), element by element; differentiable."""
    rows = []
    for i in range(weight.shape[0]):
        row = []
        for j in range(weight.shape[1]):
            product = sum(b[i, k] * a[k, j] for k in range(a.shape[0]))
            row.append(SCALE * product if weight[i, j] != 0 else torch.zeros((), dtype=a.dtype))
        rows.append(torch.stack(row))
    return torch.stack(rows)


@dataclass(frozen=True)
class Method:
    """factors: shapes of the trained tensors of (m, n, r); linear: x, W, bias, them and dropout to y; weight: W_eff."""

    factors: Callable[[int, int, int], tuple[tuple[int, int], ...]]
    linear: Callable[..., Tensor]
    weight: Callable[..., Tensor]


METHODS = {
    "spp": Method(
        lambda m, n, r: ((r, n), (m, 1)),
        lambda x, weight, bias, factors, dropout: spp_linear(x, weight, bias, [(*factors, SCALE, dropout)]),
        lambda weight, *factors: weight + spp_delta(weight, *factors),
    ),
    "masked_lora": Method(
        lambda m, n, r: ((r, n), (m, r)),
        lambda x, weight, bias, factors, dropout: masked_lora_linear(x, weight, bias, [(*factors, SCALE, dropout)]),
        lambda weight, *factors: weight + masked_lora_delta(weight, *factors),
    ),
    "masked_full": Method(
        lambda m, n, r: ((m, n),),
        lambda x, weight, bias, factors, _: masked_linear(x, *factors, weight, weight, bias),
        lambda weight, values: values * (weight != 0),
    ),
    "ste": Method(
        lambda m, n, r: ((m, n),),
        lambda x, weight, bias, factors, _: masked_linear(
            x, *factors, weight != 0, weight, bias, straight_through=True
        ),
        # as if the mask were added as a constant, so that its factor is in no gradient of V
        lambda weight, values: values + (values * (weight != 0) - values).detach(),
    ),
}
BRANCHES = ("spp", "masked_lora")
# out, in, r: dividing and not; a rank above both dimensions where that is possible
SHAPES = [(method, shape) for method in METHODS for shape in (SHAPE, (13, 8, 4), (12, 8, 1))]
SHAPES += [("spp", (12, 8, 12)), ("spp", (7, 6, 3)), ("spp", (16, 4, 5)), ("masked_lora", (7, 6, 9))]
in_all_ways = pytest.mark.parametrize(
    ("method", "dropout"), [*((method, 0.0) for method in METHODS), *((method, 0.2) for method in BRANCHES)]
)


@dataclass
class Layer:
    """A pruned weight, a bias, a method's trained tensors, and inputs (2, 3, in)."""

    method: Method
    weight: Tensor
    bias: Tensor
    factors: Tensors
    x: Tensor

    @classmethod
    def of(cls, method: str, shape: tuple[int, int, int] = SHAPE, dtype: torch.dtype = torch.float32) -> Layer:
        out_features, in_features, _ = shape
        weight = random((out_features, in_features), 0)
        weight[random(weight.shape, 1) < 0] = 0
        factors = (random(size, 2 + i).requires_grad_() for i, size in enumerate(METHODS[method].factors(*shape)))
        x = random((2, 3, in_features), 5).to(dtype).requires_grad_()
        return cls(METHODS[method], weight.to(dtype), random((out_features,), 6).to(dtype), tuple(factors), x)

    def __call__(self, dropout: float = 0.0, bias: Tensor | None = None) -> Tensor:
        return self.method.linear(self.x, self.weight, bias, self.factors, dropout)


def same_gradients(y: Tensor, ours: Tensors, expected: Tensor, theirs: Tensors) -> None:
    upstream = random(y.shape, 7)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(y, ours, upstream)
    wanted = torch.autograd.grad(expected, theirs, upstream.double())
    for gradient, reference in zip(gradients, wanted, strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient.double(), reference, rtol=1e-4, atol=1e-4)


def doubles(*tensors: Tensor) -> Tensors:
    return tuple(tensor.detach().double().requires_grad_() for tensor in tensors)


# --- all methods ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "shape"), SHAPES)
@pytest.mark.parametrize("chunk", [5, 40, 1 << 17])
@pytest.mark.parametrize("with_bias", [True, False])
def test_forward_and_gradients_equal_the_formula(
    method: str, shape: tuple[int, int, int], chunk: int, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (kernel, masked):
        monkeypatch.setattr(module, "CPU_CHUNK", chunk)
    layer = Layer.of(method, shape)
    x64, *factors64 = doubles(layer.x, *layer.factors)
    effective = layer.method.weight(layer.weight.double(), *factors64)
    expected = F.linear(x64, effective, layer.bias.double() if with_bias else None)
    y = layer(bias=layer.bias if with_bias else None)
    same_gradients(y, (layer.x, *layer.factors), expected, (x64, *factors64))


@in_all_ways
def test_a_bias_can_be_trained_too(method: str, dropout: float) -> None:
    layer = Layer.of(method)
    y = layer(dropout, layer.bias.requires_grad_())
    upstream = random(y.shape, 7)
    (gradient,) = torch.autograd.grad(y, (layer.bias,), upstream)
    torch.testing.assert_close(gradient, upstream.sum((0, 1)))


@in_all_ways
def test_nothing_but_the_input_is_kept_for_backward(method: str, dropout: float) -> None:
    layer = Layer.of(method, (64, 32, 4))
    mask = layer.weight != 0
    call = {"ste": lambda: masked_linear(layer.x, *layer.factors, mask, layer.weight, None, straight_through=True)}
    kept = kept_for_backward(call.get(method, lambda: layer(dropout)))
    assert kept
    own = {tensor.data_ptr() for tensor in (layer.weight, mask, layer.x, *layer.factors)}
    assert {tensor.data_ptr() for tensor in kept} <= own


@pytest.mark.parametrize("method", METHODS)
def test_autocast_computes_in_bfloat16_and_returns_float32_gradients(method: str) -> None:
    layer = Layer.of(method)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(bias=layer.bias)
    assert y.dtype == torch.bfloat16
    if method == "spp":
        weight = effective_weight(layer.weight, *layer.factors, SCALE, torch.bfloat16)
        assert torch.equal(y, F.linear(layer.x.bfloat16(), weight, layer.bias.bfloat16()))
    gradients = torch.autograd.grad(y.float().sum(), (layer.x, *layer.factors))
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


@in_all_ways
def test_backward_inside_the_autocast_region_is_that_outside(method: str, dropout: float) -> None:
    layer = Layer.of(method)
    trained = (layer.x, layer.bias.requires_grad_(), *layer.factors)
    results = []
    for inside in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(dropout, layer.bias)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            results.append(torch.autograd.grad(y, trained, random(y.shape, 7).bfloat16()))
    for outside, inside in zip(*results, strict=True):
        assert outside.dtype == inside.dtype == torch.float32
        assert torch.equal(outside, inside)


@in_all_ways
@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_no_tokens_give_no_outputs_and_zero_gradients(method: str, dropout: float, shape: tuple[int, ...]) -> None:
    layer = Layer.of(method)
    layer.x = torch.empty(*shape, 8, requires_grad=True)
    y = layer(dropout, layer.bias.requires_grad_())
    assert y.shape == (*shape, 12)
    trained = (layer.x, layer.bias, *layer.factors)
    for tensor, gradient in zip(trained, torch.autograd.grad(y.sum(), trained), strict=True):
        assert gradient.shape == tensor.shape
        assert not gradient.count_nonzero()


@pytest.mark.parametrize("method", METHODS)
def test_mismatched_dtypes_are_refused(method: str) -> None:
    layer = Layer.of(method)
    layer.x = layer.x.double()
    with pytest.raises(ValueError, match=r"input is torch.float64, its weight torch.float32"):
        layer()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_effective_weight_is_rounded_once(dtype: torch.dtype) -> None:
    for method, made in (
        ("spp", lambda weight, *factors: effective_weight(weight, *factors, SCALE, dtype)),
        ("masked_lora", lambda weight, *factors: masked_lora.effective_weight(weight, [(*factors, SCALE)], dtype)),
        ("masked_full", lambda weight, values: masked_full.effective_weight(values, weight, dtype)),
    ):
        layer = Layer.of(method, dtype=dtype)
        ours = made(layer.weight, *layer.factors)
        exact = layer.method.weight(layer.weight.double(), *doubles(*layer.factors)).float()
        torch.testing.assert_close(ours, exact.detach().to(dtype), rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
        assert torch.equal(layer(bias=layer.bias), F.linear(layer.x, ours, layer.bias)), "what is merged is trained"
        assert torch.equal(ours == 0, layer.weight == 0)


@pytest.mark.parametrize(("dtype", "smallest"), [(torch.bfloat16, 2.0**-126), (torch.float16, 2.0**-24)])
def test_a_kept_weight_that_lands_on_zero_stays_kept(dtype: torch.dtype, smallest: float) -> None:
    values, mask = torch.tensor([[0.0, -0.0, 1e-44, 2.0, 3.0]]), torch.tensor([[1.0, 0.5, -1.0, 2.0, 0.0]])
    rounded = round_under_mask(values, mask, dtype)
    assert rounded[0].tolist() == [smallest, -smallest, smallest, 2.0, 0.0]
    assert values[0].tolist()[3:] == [2.0, 3.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.bfloat16, torch.bool])
@pytest.mark.parametrize("special", [None, math.inf, math.nan, 0.0], ids=str)
def test_rounding_keeps_every_bit_inside_the_mask_and_writes_positive_zeros_outside(
    dtype: torch.dtype, mask_dtype: torch.dtype, special: float | None
) -> None:
    """With and without a number, here outside the mask, that keeps the quick way from being taken."""
    generator = torch.Generator().manual_seed(0)
    values, draw = torch.randn(6, 16, generator=generator), torch.randn(6, 16, generator=generator)
    mask = torch.where(draw > 0, draw, 0).to(mask_dtype)
    values[0, 0], mask[0, 0] = 1e-39, 1  # subnormal in float32 and bfloat16, zero in float16
    if special is not None:
        values[draw <= 0] = special
    values[draw <= 0] *= -1
    assert round_under_mask(values[:0], mask[:0], dtype).shape == (0, 16)
    rounded = round_under_mask(values, mask, dtype)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    for ours, value, kept in zip(rounded.flatten(), values.to(dtype).flatten(), mask.flatten(), strict=True):
        smallest = torch.tensor(2.0**-24, dtype=dtype)
        expected = torch.zeros_like(ours) if kept == 0 else value if value != 0 else smallest
        assert ours.view(bits) == expected.view(bits)


# --- branches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", BRANCHES)
@pytest.mark.parametrize("shape", [SHAPE, (13, 8, 4)])
def test_dropout_is_on_the_branch_alone(method: str, shape: tuple[int, int, int]) -> None:
    """Exactly Eq. 5, with the places that are drawn from the seed."""
    layer, p = Layer.of(method, shape), 0.4
    torch.manual_seed(11)
    y = layer(p)
    torch.manual_seed(11)
    seed = int(torch.randint(0, 2**62, (1,)))
    mask = torch.ones(layer.x.shape, dtype=torch.float64)
    mask.view(-1)[dropped_places(layer.x, p, seed)] = 0
    assert 0 < mask.mean() < 1
    x64, *factors64 = doubles(layer.x, *layer.factors)
    weight = layer.weight.double()
    expected = F.linear(x64, weight) + F.linear(x64 * mask / (1 - p), layer.method.weight(weight, *factors64) - weight)
    same_gradients(y, (layer.x, *layer.factors), expected, (x64, *factors64))


@pytest.mark.parametrize("method", BRANCHES)
def test_several_adapters_add_up(method: str) -> None:
    first, second = Layer.of(method), Layer.of(method, (12, 8, 3))
    adapters = [(*layer.factors, SCALE, 0.0) for layer in (first, second)]
    both = (spp_linear if method == "spp" else masked_lora_linear)(first.x, first.weight, first.bias, adapters)
    weight = sum(first.method.weight(first.weight, *layer.factors) for layer in (first, second)) - first.weight
    torch.testing.assert_close(both, F.linear(first.x, weight, first.bias), rtol=1e-4, atol=1e-4)
    if method == "masked_lora":
        merged = masked_lora.effective_weight(first.weight, [adapter[:3] for adapter in adapters], torch.float32)
        torch.testing.assert_close(merged, weight.detach(), rtol=1e-4, atol=1e-4)


def test_masked_loras_factors_may_be_bfloat16() -> None:
    """As ZeRO-3 makes them for the forward pass."""
    layer = Layer.of("masked_lora", dtype=torch.bfloat16)
    rounded = tuple(tensor.detach().bfloat16().requires_grad_() for tensor in layer.factors)
    for dropout in (0.0, 0.3):
        results = []
        for layer.factors in (rounded, tuple(tensor.detach().float().requires_grad_() for tensor in rounded)):
            torch.manual_seed(1)
            y = layer(dropout, layer.bias)
            results.append((y, *torch.autograd.grad(y.float().sum(), layer.factors)))
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other.bfloat16())


# --- SPP --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_kept_weight_that_would_merge_to_zero_becomes_the_smallest_number(dtype: torch.dtype) -> None:
    smallest = 2.0**-24 if dtype == torch.float16 else 2.0**-126
    weight = torch.tensor([[smallest, -smallest, 0, 1], [1, -1, 0, smallest]], dtype=dtype)
    beta = torch.tensor([[-0.4], [-0.5]])  # factors 0.2 and exactly 0
    merged = effective_weight(weight, torch.ones(2, 4), beta, SCALE, dtype)
    assert torch.equal(merged == 0, weight == 0)
    if dtype == torch.float16:  # in the other dtypes 0.2 * 2**-126 is subnormal, but no zero
        assert merged[0, :2].tolist() == [smallest, -smallest]
    assert merged[1].abs().tolist() == [smallest, smallest, 0, smallest]


def test_rows_are_grouped_as_the_paper_repeats_them() -> None:
    assert row_groups(6, 3).tolist() == [0, 0, 1, 1, 2, 2]
    assert row_groups(7, 3).tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert row_groups(4, 4).tolist() == [0, 1, 2, 3]


def test_frozen_inputs_and_factors_cost_no_gradient() -> None:
    layer = Layer.of("spp")
    layer.x, layer.factors = layer.x.detach(), (layer.factors[0], layer.factors[1].detach())
    (gradient,) = torch.autograd.grad(layer().sum(), layer.factors[:1])
    assert gradient.abs().sum() > 0


class Float32Sizes(TorchDispatchMode):
    """Remembers the elements of the largest float32 memory that any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float32:
            self.largest = max(self.largest, result.untyped_storage().nbytes() // 4)
        return result


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("r", [16, 7])
def test_a_bfloat16_layer_is_never_copied_to_float32(dropout: float, r: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = 1024
    monkeypatch.setattr(kernel, "CPU_CHUNK", chunk)
    layer = Layer.of("spp", (2048, 64, r), torch.bfloat16)
    with Float32Sizes() as sizes:
        layer(dropout).sum().backward()
        effective_weight(layer.weight, *layer.factors, SCALE, torch.bfloat16)
    assert 0 < sizes.largest <= max(2 * chunk, *(factor.numel() for factor in layer.factors))
    assert sizes.largest < layer.weight.numel() // 16


# --- dropout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.01, 0.05, 0.5, 0.9])
def test_dropped_places_are_a_bernoulli_process(p: float) -> None:
    size = 400_000
    places = dropped_places(torch.empty(size), p, seed=5)
    mask = torch.zeros(size).index_fill_(0, places, 1)
    assert mask.sum() == len(places), "no place comes twice"
    assert torch.equal(places, dropped_places(torch.empty(size), p, seed=5))
    assert not torch.equal(places[:100], dropped_places(torch.empty(size), p, seed=6)[:100])

    def spread(probability: float, draws: int) -> float:
        return 5 * (probability * (1 - probability) / draws) ** 0.5

    assert mask.mean().item() == pytest.approx(p, abs=spread(p, size))
    for distance in (1, 2, 7):  # neighbours know nothing of each other
        both = (mask[:-distance] * mask[distance:]).mean().item()
        assert both == pytest.approx(p * p, abs=2 * spread(p * p, size))
    parts = mask.view(8, -1).mean(1)
    assert (parts - p).abs().max().item() < spread(p, size // 8)


def test_dropout_reaches_the_last_element_however_few_were_drawn_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dropped_places(torch.empty(5000), 0.3, seed=1)[-1] > 4950
    monkeypatch.setattr(products, "SPARE_DRAWS", -10)
    pieces = dropped_places(torch.empty(5000), 0.3, seed=1)
    assert pieces[-1] > 4950
    assert (pieces.diff() > 0).all()


# --- the moment -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("tokens", [1, 63, 64, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_moment_equals_the_literal_sum(
    dtype: torch.dtype, tokens: int, amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whatever order its left side is put."""
    monkeypatch.setattr(products, "has_amx", lambda: amx)
    generator = torch.Generator().manual_seed(tokens)
    whole = torch.randint(-4, 5, (tokens, 12), generator=generator).to(dtype)  # sums are exact
    inputs = torch.randint(-4, 5, (tokens, 7), generator=generator).to(dtype)
    for grad_output in (whole, whole[:, 3:8]):
        expected = torch.zeros(grad_output.shape[1], 7, dtype=torch.float64)
        for dy, x in zip(grad_output.double(), inputs.double(), strict=True):
            expected += dy[:, None] * x
        assert torch.equal(products.moment_of(grad_output, inputs), expected.to(dtype))


def test_autocast_leaves_float64_alone() -> None:
    layer = Layer.of("spp")
    x, weight, alpha, beta = doubles(layer.x, layer.weight, *layer.factors)
    with torch.autocast("cpu", torch.bfloat16):
        y = spp_linear(x, weight, None, [(alpha, beta, SCALE, 0.0)])
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, F.linear(x, weight + spp_delta(weight, alpha, beta)), rtol=1e-6, atol=1e-6)
