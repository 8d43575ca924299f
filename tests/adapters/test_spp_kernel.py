"""SPP's arithmetic against a literal double loop in float64: forward, gradients, dropout, autocast, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import kept_for_backward
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sppctl.adapters.products import dropped_places
from sppctl.adapters.spp import kernel
from sppctl.adapters.spp.kernel import delta_weight, effective_weight, row_groups, spp_linear

SHAPES = [(12, 8, 4), (12, 8, 1), (12, 8, 12), (13, 8, 4), (7, 6, 3), (16, 4, 5)]  # out, in, r: dividing and not
SCALE = 2.0


def literal_delta(weight: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """s W' of Eq. 4, element by element; differentiable, in the dtype of the arguments."""
    out_features, in_features = weight.shape
    rows = []
    for i in range(out_features):
        group = i * alpha.shape[0] // out_features
        rows.append(torch.stack([SCALE * weight[i, j] * alpha[group, j] * beta[i, 0] for j in range(in_features)]))
    return torch.stack(rows)


def layer(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    out_features, in_features, r = shape
    generator = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(out_features, in_features, generator=generator)
    weight[torch.rand(weight.shape, generator=generator) < 0.5] = 0
    alpha = torch.randn(r, in_features, generator=generator, requires_grad=True)
    beta = torch.randn(out_features, 1, generator=generator, requires_grad=True)
    x = torch.randn(2, 3, in_features, generator=generator).to(dtype).requires_grad_()
    return weight.to(dtype), torch.randn(out_features, generator=generator).to(dtype), alpha, beta, x


def doubles(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk", [5, 40, 1 << 17])
@pytest.mark.parametrize("with_bias", [True, False])
def test_forward_and_gradients_equal_the_double_loop(
    shape: tuple[int, int, int], chunk: int, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "CPU_CHUNK", chunk)
    weight, bias, alpha, beta, x = layer(shape)
    y = spp_linear(x, weight, bias if with_bias else None, [(alpha, beta, SCALE, 0.0)])
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    gradients = torch.autograd.grad(y, (x, alpha, beta), upstream)

    x64, alpha64, beta64 = doubles(x, alpha, beta)
    w64 = weight.double()
    expected = F.linear(x64, w64 + literal_delta(w64, alpha64, beta64), bias.double() if with_bias else None)
    expected_gradients = torch.autograd.grad(expected, (x64, alpha64, beta64), upstream.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_merged_weight_equals_the_double_loop_and_keeps_every_zero(shape: tuple[int, int, int]) -> None:
    weight, _, alpha, beta, _ = layer(shape)
    merged = effective_weight(weight, alpha, beta, SCALE, torch.float32)
    expected = weight.double() + literal_delta(weight.double(), alpha.double(), beta.double())
    torch.testing.assert_close(merged.double(), expected, rtol=1e-6, atol=1e-6)
    delta = delta_weight(weight, alpha, beta, SCALE, torch.float32)
    torch.testing.assert_close((merged - weight), delta, rtol=1e-5, atol=1e-6)
    assert torch.equal(merged == 0, weight == 0)


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


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_bias_can_be_trained_too(dropout: float) -> None:
    weight, bias, alpha, beta, x = layer((12, 8, 4))
    bias.requires_grad_()
    y = spp_linear(x, weight, bias, [(alpha, beta, SCALE, dropout), (alpha, beta, SCALE, dropout)])
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(y, (bias,), upstream)
    torch.testing.assert_close(gradient, upstream.sum((0, 1)))


def test_rows_are_grouped_as_the_paper_repeats_them() -> None:
    assert row_groups(6, 3).tolist() == [0, 0, 1, 1, 2, 2]
    assert row_groups(7, 3).tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert row_groups(4, 4).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_beta_zero_the_output_is_the_pruned_layers_bit_for_bit(dtype: torch.dtype) -> None:
    weight, bias, alpha, beta, x = layer((12, 8, 4), dtype)
    for dropout in (0.0, 0.3):
        y = spp_linear(x, weight, bias, [(alpha, torch.zeros_like(beta), SCALE, dropout)])
        assert torch.equal(y, F.linear(x, weight, bias))


def test_bfloat16_rounds_the_effective_weight_once() -> None:
    weight, _, alpha, beta, x = layer((12, 8, 4), torch.bfloat16)
    y = spp_linear(x, weight, None, [(alpha, beta, SCALE, 0.0)])
    exact = weight.double() * (1 + SCALE * alpha.double()[row_groups(12, 4)] * beta.double())
    assert torch.equal(y, F.linear(x, exact.float().to(torch.bfloat16)))


def dropped_reference(x: Tensor, weight: Tensor, alpha: Tensor, beta: Tensor, mask: Tensor, p: float) -> Tensor:
    """Eq. 5 with a given dropout mask, in float64."""
    return F.linear(x, weight) + F.linear(x * mask / (1 - p), literal_delta(weight, alpha, beta))


@pytest.mark.parametrize("shape", [(12, 8, 4), (13, 8, 4)])
def test_dropout_is_exactly_equation_5(shape: tuple[int, int, int]) -> None:
    weight, _, alpha, beta, x = layer(shape)
    p = 0.4
    torch.manual_seed(11)
    y = spp_linear(x, weight, None, [(alpha, beta, SCALE, p)])
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    gradients = torch.autograd.grad(y, (x, alpha, beta), upstream)
    torch.manual_seed(11)
    seed = int(torch.randint(0, 2**62, (1,)))
    mask = torch.ones(x.numel(), dtype=torch.float64)
    mask[dropped_places(x, p, seed)] = 0
    mask = mask.view(x.shape)
    assert 0 < mask.mean() < 1

    x64, alpha64, beta64 = doubles(x, alpha, beta)
    expected = dropped_reference(x64, weight.double(), alpha64, beta64, mask, p)
    expected_gradients = torch.autograd.grad(expected, (x64, alpha64, beta64), upstream.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)


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
    whole = dropped_places(torch.empty(5000), 0.3, seed=1)
    assert whole[-1] > 4950
    monkeypatch.setattr("sppctl.adapters.products.SPARE_DRAWS", -10)
    pieces = dropped_places(torch.empty(5000), 0.3, seed=1)
    assert pieces[-1] > 4950
    assert (pieces.diff() > 0).all()


def test_dropout_draws_anew_and_keeps_the_mean() -> None:
    weight, _, alpha, beta, x = layer((12, 8, 4))
    draws = torch.stack([spp_linear(x, weight, None, [(alpha, beta, SCALE, 0.5)]).detach() for _ in range(4000)])
    assert not torch.equal(draws[0], draws[1])
    expected = spp_linear(x, weight, None, [(alpha, beta, SCALE, 0.0)])
    spread = draws.std(0) / 4000**0.5
    assert ((draws.mean(0) - expected).abs() < 6 * spread + 1e-4).all()


def test_checkpointing_recomputes_with_the_same_dropout() -> None:
    weight, _, alpha, beta, x = layer((12, 8, 4))

    def run(checkpointed: bool) -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        call = lambda inputs: spp_linear(inputs, weight, None, [(alpha, beta, SCALE, 0.5)]).square()  # noqa: E731
        y = torch.utils.checkpoint.checkpoint(call, x, use_reentrant=False) if checkpointed else call(x)
        return torch.autograd.grad(y.sum(), (x, alpha, beta))

    for plain, recomputed in zip(run(False), run(True), strict=True):
        assert torch.equal(plain, recomputed)


def test_several_adapters_add_up() -> None:
    weight, bias, alpha, beta, x = layer((12, 8, 4))
    alpha2, beta2 = torch.randn(3, 8), torch.randn(12, 1)
    both = spp_linear(x, weight, bias, [(alpha, beta, SCALE, 0.0), (alpha2, beta2, SCALE, 0.0)])
    expected = F.linear(x, weight + literal_delta(weight, alpha, beta) + literal_delta(weight, alpha2, beta2), bias)
    torch.testing.assert_close(both, expected, rtol=1e-4, atol=1e-4)


def test_autocast_computes_in_bfloat16_and_returns_float32_gradients() -> None:
    weight, bias, alpha, beta, x = layer((12, 8, 4))
    with torch.autocast("cpu", torch.bfloat16):
        y = spp_linear(x, weight, bias, [(alpha, beta, SCALE, 0.0)])
    assert y.dtype == torch.bfloat16
    effective = effective_weight(weight, alpha, beta, SCALE, torch.bfloat16)
    assert torch.equal(y, F.linear(x.bfloat16(), effective, bias.bfloat16()))
    gradients = torch.autograd.grad(y.float().sum(), (x, alpha, beta))
    assert [gradient.dtype for gradient in gradients] == [torch.float32] * 3


def test_mismatched_dtypes_are_refused() -> None:
    weight, _, alpha, beta, x = layer((12, 8, 4))
    with pytest.raises(ValueError, match=r"input is torch.float64"):
        spp_linear(x.double(), weight, None, [(alpha, beta, SCALE, 0.0)])


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_nothing_but_the_input_is_kept_for_backward(dropout: float) -> None:
    weight, _, alpha, beta, x = layer((64, 32, 4))
    kept = kept_for_backward(lambda: spp_linear(x, weight, None, [(alpha, beta, SCALE, dropout)]))
    assert kept
    own = {weight.data_ptr(), alpha.data_ptr(), beta.data_ptr(), x.data_ptr()}
    assert {tensor.data_ptr() for tensor in kept} <= own


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
    chunk, in_features = 1024, 64
    monkeypatch.setattr(kernel, "CPU_CHUNK", chunk)
    weight, _, alpha, beta, x = layer((2048, in_features, r), torch.bfloat16)
    with Float32Sizes() as sizes:
        spp_linear(x, weight, None, [(alpha, beta, SCALE, dropout)]).sum().backward()
        effective_weight(weight, alpha, beta, SCALE, torch.bfloat16)
    assert 0 < sizes.largest <= max(2 * chunk, alpha.numel(), beta.numel())
    assert sizes.largest < weight.numel() // 16


def test_frozen_inputs_and_adapters_cost_no_gradient() -> None:
    weight, _, alpha, beta, x = layer((12, 8, 4))
    y = spp_linear(x.detach(), weight, None, [(alpha, beta.detach(), SCALE, 0.0)])
    (gradient,) = torch.autograd.grad(y.sum(), (alpha,))
    assert gradient.abs().sum() > 0
