"""Statistics of inputs against the formulas in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sppctl.pruners.stats import Hessian, InputMoments, InputNorms, Statistics

KINDS = (InputNorms, InputMoments, Hessian)


def some_inputs(dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """(200, 12) with another mean and spread in every feature."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(200, 12, generator=generator) * torch.linspace(0.5, 2, 12) + torch.linspace(-1, 1, 12)
    return inputs.to(dtype)


def gathered(kind: type[Statistics], *batches: Tensor) -> Statistics:
    statistics = kind(batches[0].shape[1], "cpu")
    for batch in batches:
        statistics.update(batch)
    return statistics


def test_two_tokens_by_hand() -> None:
    inputs = torch.tensor([[1.0, -2.0, 0.0], [3.0, -2.0, 0.0]])
    moments, hessian = gathered(InputMoments, inputs), gathered(Hessian, inputs)
    assert moments.mean().tolist() == [2, -2, 0]
    assert moments.variance().tolist() == [1, 0, 0]  # over tokens, not over tokens - 1
    assert moments.norms().square().tolist() == pytest.approx([5, 4, 0])
    assert hessian.moment.tolist() == [[10, -8, 0], [-8, 8, 0], [0, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_statistics_are_those_of_float64(dtype: torch.dtype) -> None:
    inputs = some_inputs(dtype)
    norms, moments, hessian = InputNorms(12, "cpu"), InputMoments(12, "cpu"), Hessian(12, "cpu")
    for statistics in (norms, moments, hessian):
        statistics.update(inputs)
        assert statistics.norms().dtype == torch.float32
        expected = inputs.double().square().mean(0).sqrt()
        torch.testing.assert_close(statistics.norms().double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(moments.mean().double(), inputs.double().mean(0), rtol=1e-5, atol=1e-6)
    expected = inputs.double().var(0, correction=0)
    torch.testing.assert_close(moments.variance().double(), expected, rtol=1e-5, atol=1e-6)
    assert hessian.moment.dtype == torch.float32
    torch.testing.assert_close(hessian.moment.double(), inputs.double().t() @ inputs.double(), rtol=1e-5, atol=1e-3)
    assert torch.equal(inputs, some_inputs(dtype)), "they are left as they are"


def test_the_factor_is_that_of_the_damped_inverse() -> None:
    inputs = some_inputs().double()
    factor, dead, damp = gathered(Hessian, inputs.float()).inverse_factor(0.01)
    hessian = 2 / len(inputs) * inputs.t() @ inputs
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(factor.double().t() @ factor.double(), torch.linalg.inv(hessian), rtol=1e-4, atol=1e-5)
    assert torch.equal(factor, factor.triu())
    assert not dead.any()
    assert damp == 0.01


def test_more_inputs_make_a_new_factor() -> None:
    hessian = gathered(Hessian, some_inputs())
    first = hessian.inverse_factor(0.01)[0]
    hessian.update(3 * some_inputs(seed=1))
    assert not torch.allclose(hessian.inverse_factor(0.01)[0], first)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [[1, 199], [50, 50, 100], [0, 200], [20] * 10])
def test_several_updates_equal_one(kind: type[Statistics], sizes: list[int]) -> None:
    inputs = some_inputs()
    parts, whole = gathered(kind, *inputs.split(sizes)), gathered(kind, inputs)
    assert parts.num_tokens == whole.num_tokens == 200
    for part, total in zip(parts.totals(), whole.totals(), strict=True):
        torch.testing.assert_close(part, total, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_totals_added_in_place_are_those_of_all_inputs(kind: type[Statistics]) -> None:
    """What several processes do: each sums over its own inputs, then the sums are added in place."""
    inputs = some_inputs()
    first, second, whole = gathered(kind, inputs[:80]), gathered(kind, inputs[80:]), gathered(kind, inputs)
    for total, other in zip(first.totals(), second.totals(), strict=True):
        total += other
    first.num_tokens += second.num_tokens
    torch.testing.assert_close(first.norms(), whole.norms())
    if isinstance(first, InputMoments):
        torch.testing.assert_close(first.variance(), whole.variance(), rtol=1e-5, atol=1e-5)
    if isinstance(first, Hessian):
        torch.testing.assert_close(first.inverse_factor(0.01)[0], whole.inverse_factor(0.01)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_totals_are_all_that_is_summed(kind: type[Statistics]) -> None:
    statistics = gathered(kind, some_inputs())
    held = [value for value in vars(statistics).values() if isinstance(value, Tensor)]
    assert {id(total) for total in statistics.totals()} == {id(value) for value in held}


@pytest.mark.parametrize("kind", KINDS)
def test_no_inputs_at_all_are_zeros_not_nan(kind: type[Statistics]) -> None:
    statistics = kind(3, "cpu")
    assert statistics.norms().tolist() == [0, 0, 0]
    if isinstance(statistics, InputMoments):
        assert statistics.mean().tolist() == statistics.variance().tolist() == [0, 0, 0]


def test_rounding_never_makes_a_variance_negative() -> None:
    inputs = torch.full((1000, 64), 0.1) * torch.linspace(1, 100, 64)
    assert (gathered(InputMoments, *inputs.split(7)).variance() >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_moment_of_several_strips_is_whole_and_symmetric(dtype: torch.dtype) -> None:
    inputs = torch.randn(300, 600, generator=torch.Generator().manual_seed(4)).to(dtype)
    moment = gathered(Hessian, *inputs.split(100)).moment
    assert torch.equal(moment, moment.t())
    torch.testing.assert_close(moment.double(), inputs.double().t() @ inputs.double(), rtol=1e-5, atol=1e-3)
