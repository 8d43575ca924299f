"""DSnoT against a slow literal reference, one row and one swap at a time, and what its docstring promises."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sppctl.pattern import Pattern
from sppctl.pruners import prune_linear
from sppctl.pruners.dsnot import MAX_CYCLES, THRESHOLD, expected_change, update_mask
from sppctl.pruners.masks import mask_by_matrix, mask_by_row
from sppctl.pruners.stats import InputMoments

PATTERNS = ["2:4", "1:4", "4:8", "2:8", 0.5, 0.75]
ROUNDING = 1e-4  # of the float32 sums


def made(seed: int, rows: int = 12, columns: int = 32) -> tuple[Tensor, Tensor]:
    """A weight, and inputs with means away from zero."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(64, columns, generator=generator) * torch.rand(columns, generator=generator).add(0.2)
    return weight, inputs + torch.randn(columns, generator=generator)


def moments_of(inputs: Tensor) -> InputMoments:
    moments = InputMoments(inputs.shape[1], "cpu")
    moments.update(inputs)
    return moments


def first_mask(method: str, weight: Tensor, inputs: Tensor, pattern: Pattern) -> Tensor:
    if method == "wanda":
        return mask_by_row(weight.abs() * moments_of(inputs).norms(), pattern)
    if method == "magnitude":
        return mask_by_matrix(weight.abs(), pattern)
    return prune_linear(weight, inputs, method=method, pattern=pattern) != 0


# --- the reference ----------------------------------------------------------------------------------------------------


def change_of(weight: list[float], kept: list[bool], mean: list[float]) -> float:
    return -sum(w * m for w, m, k in zip(weight, mean, kept, strict=True) if not k)


def one_row(
    weight: list[float], kept: list[bool], inputs: Tensor, group: int, max_cycles: int, threshold: float
) -> list[bool]:
    """The algorithm in float64: each cycle tries one regrowth; what was tried in vain or given up is not regrown."""
    mean = inputs.mean(0).tolist()
    variance = inputs.var(0, correction=0).tolist()
    norm = inputs.square().mean(0).sqrt().tolist()
    kept, tried = list(kept), set()
    for _ in range(max_cycles):
        change = change_of(weight, kept, mean)
        if abs(change) <= threshold:
            break
        gains = {
            j: -math.copysign(1, change) * weight[j] * mean[j] / max(variance[j], 1e-12)
            for j in range(len(weight))
            if not kept[j] and j not in tried
        }
        grown = max(gains, key=lambda j: gains[j], default=None)
        if grown is None or gains[grown] <= 0:
            break
        first = grown // group * group
        droppable = [
            k
            for k in range(first, first + group)
            if kept[k] and abs(change + weight[grown] * mean[grown] - weight[k] * mean[k]) < abs(change)
        ]
        if not droppable:
            tried.add(grown)
            continue
        dropped = min(droppable, key=lambda k: abs(weight[k]) * norm[k])
        kept[grown], kept[dropped] = True, False
        tried.add(dropped)
    return kept


def literal(
    weight: Tensor,
    mask: Tensor,
    inputs: Tensor,
    pattern: Pattern,
    max_cycles: int = MAX_CYCLES,
    threshold: float = THRESHOLD,
) -> Tensor:
    group = pattern.group or weight.shape[1]
    rows = zip(weight.double().tolist(), mask.tolist(), strict=True)
    return torch.tensor([one_row(w, m, inputs.double(), group, max_cycles, threshold) for w, m in rows])


def swap_is_possible(weight: list[float], kept: list[bool], mean: list[float], group: int) -> bool:
    """Whether exchanging some kept and some pruned weight that goes against the error makes it smaller."""
    change = change_of(weight, kept, mean)
    part = [w * m for w, m in zip(weight, mean, strict=True)]
    return any(
        not kept[j] and kept[k] and part[j] * change < 0 and abs(change + part[j] - part[k]) < abs(change) - ROUNDING
        for j in range(len(weight))
        for k in range(j // group * group, j // group * group + group)
    )


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_expected_change_by_hand() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0], [-4.0, 3.0, -2.0, 1.0]])
    mask = torch.tensor([[False, True, True, False], [True, False, False, True]])
    mean = torch.tensor([1.0, 10.0, 0.5, -2.0])
    # -(1 * 1 + 4 * -2) and -(3 * 10 - 2 * 0.5)
    assert expected_change(weight, mask, mean).tolist() == [7.0, -29.0]


def test_nothing_pruned_changes_nothing() -> None:
    weight, inputs = made(0)
    everything = torch.ones_like(weight, dtype=torch.bool)
    assert (expected_change(weight, everything, inputs.mean(0)) == 0).all()
    updated = update_mask(weight, everything, moments_of(inputs), Pattern.parse(0.5))
    assert updated.all()


def test_two_swaps_by_hand() -> None:
    # means 1, variances 1, norms sqrt 2; 3 and 2 are pruned, so eps = -5; 3 comes back (-2) for 1, the least kept (-3)
    inputs = torch.tensor([[0.0, 0.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    weight = torch.tensor([[3.0, 1.0, 2.0, 1.5]])
    mask = torch.tensor([[False, True, False, True]])
    once = update_mask(weight, mask, moments_of(inputs), Pattern.parse("2:4"), max_cycles=1)
    assert once.tolist() == [[True, False, False, True]]
    # then 2 comes back (-1) for 1.5 (-2.5), as 3 would leave -4; 1 and 1.5 were given up
    assert update_mask(weight, mask, moments_of(inputs), Pattern.parse("2:4")).tolist() == [[True, False, True, False]]


def test_a_swap_stays_in_its_group() -> None:
    inputs = torch.tensor([[0.0] * 4, [2.0] * 4])
    weight = torch.tensor([[4.0, 1.0, 0.1, 3.0]])
    mask = torch.tensor([[False, True, True, False]])  # eps = -7; 0.1 has the smallest score, but not beside 4
    grouped = update_mask(weight, mask, moments_of(inputs), Pattern.parse("1:2"), max_cycles=1)
    assert grouped.tolist() == [[True, False, True, False]]
    free = update_mask(weight, mask, moments_of(inputs), Pattern.parse(0.5), max_cycles=1)
    assert free.tolist() == [[True, True, False, False]]


def test_a_steady_input_is_regrown_before_a_larger_but_wavering_one() -> None:
    inputs = torch.tensor([[0.9, -3.0, 0.5], [1.1, 5.0, 1.5]])  # means 1, variances 0.01, 16, 0.25
    weight, mask = torch.tensor([[2.0, 3.0, 0.5]]), torch.tensor([[False, False, True]])
    updated = update_mask(weight, mask, moments_of(inputs), Pattern.parse(0.66), max_cycles=1)
    assert updated.tolist() == [[True, False, False]]


def test_no_swap_that_would_overshoot() -> None:
    inputs = torch.tensor([[0.0, 0.0], [2.0, 2.0]])
    weight = torch.tensor([[1.0, -3.0]])  # eps = -1; 1 for -3 would leave +3
    mask = torch.tensor([[False, True]])
    assert torch.equal(update_mask(weight, mask, moments_of(inputs), Pattern.parse("1:2")), mask)


# --- against the reference --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("start", ["magnitude", "wanda", "sparsegpt"])
def test_equals_the_reference(start: str, pattern: str | float, seed: int) -> None:
    parsed = Pattern.parse(pattern)
    weight, inputs = made(seed)
    mask = first_mask(start, weight, inputs, parsed)
    updated = update_mask(weight, mask, moments_of(inputs), parsed)
    assert torch.equal(updated, literal(weight, mask, inputs, parsed))
    assert not torch.equal(updated, mask)


@pytest.mark.parametrize("max_cycles", [1, 2, 3, 7])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("pattern", ["2:4", 0.5])
def test_equals_the_reference_for_other_settings(pattern: str | float, threshold: float, max_cycles: int) -> None:
    parsed = Pattern.parse(pattern)
    weight, inputs = made(7)
    mask = first_mask("wanda", weight, inputs, parsed)
    updated = update_mask(weight, mask, moments_of(inputs), parsed, max_cycles=max_cycles, threshold=threshold)
    assert torch.equal(updated, literal(weight, mask, inputs, parsed, max_cycles, threshold))


# --- promises ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("start", ["magnitude", "wanda", "sparsegpt"])
def test_the_expected_change_falls_wherever_it_can(start: str, pattern: str | float, seed: int) -> None:
    parsed = Pattern.parse(pattern)
    weight, inputs = made(100 + seed)
    mask = first_mask(start, weight, inputs, parsed)
    updated = update_mask(weight, mask, moments_of(inputs), parsed)
    before = expected_change(weight, mask, inputs.mean(0)).abs()
    after = expected_change(weight, updated, inputs.mean(0)).abs()
    assert (after <= before + ROUNDING).all()
    group = parsed.group or weight.shape[1]
    mean = inputs.mean(0).tolist()
    possible = [swap_is_possible(w, m, mean, group) for w, m in zip(weight.tolist(), mask.tolist(), strict=True)]
    improvable = torch.tensor(possible) & (before > THRESHOLD)
    assert improvable.any()
    assert (after < before)[improvable].all()
    assert torch.equal(updated[~improvable], mask[~improvable])


@pytest.mark.parametrize("max_cycles", range(1, 12))
def test_more_cycles_never_make_it_worse(max_cycles: int) -> None:
    weight, inputs = made(8)
    pattern = Pattern.parse(0.5)
    mask = first_mask("wanda", weight, inputs, pattern)
    fewer, more = (
        expected_change(
            weight, update_mask(weight, mask, moments_of(inputs), pattern, max_cycles=cycles), inputs.mean(0)
        ).abs()
        for cycles in (max_cycles - 1, max_cycles)
    )
    assert (more <= fewer + ROUNDING).all()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "3:5"])
@pytest.mark.parametrize("start", ["magnitude", "wanda", "sparsegpt"])
def test_every_group_keeps_its_count(start: str, pattern: str, seed: int) -> None:
    parsed = Pattern.parse(pattern)
    assert parsed.group is not None
    weight, inputs = made(seed, columns=40)
    updated = update_mask(weight, first_mask(start, weight, inputs, parsed), moments_of(inputs), parsed)
    assert (updated.view(12, -1, parsed.group).sum(-1) == parsed.keep).all()


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("start", ["magnitude", "wanda", "sparsegpt"])
def test_every_row_keeps_its_count(start: str, ratio: float) -> None:
    weight, inputs = made(9, columns=37)
    pattern = Pattern.parse(ratio)
    mask = first_mask(start, weight, inputs, pattern)
    updated = update_mask(weight, mask, moments_of(inputs), pattern)
    assert updated.dtype == torch.bool
    assert torch.equal(updated.sum(1), mask.sum(1))


def test_rows_that_are_near_enough_are_left_alone() -> None:
    weight, inputs = made(10)
    pattern = Pattern.parse("2:4")
    mask = first_mask("wanda", weight, inputs, pattern)
    change = expected_change(weight, mask, inputs.mean(0)).abs()
    threshold = change.median().item()
    updated = update_mask(weight, mask, moments_of(inputs), pattern, threshold=threshold)
    touched = (updated != mask).any(1)
    assert touched.any()
    assert not touched[change < threshold - ROUNDING].any()


def test_no_cycles_change_nothing_and_the_mask_given_is_never_touched() -> None:
    weight, inputs = made(11)
    pattern = Pattern.parse("2:4")
    mask = first_mask("wanda", weight, inputs, pattern)
    before = mask.clone()
    same = update_mask(weight, mask, moments_of(inputs), pattern, max_cycles=0)
    assert torch.equal(same, before)
    assert same is not mask
    assert not torch.equal(update_mask(weight, mask, moments_of(inputs), pattern), before)
    assert torch.equal(mask, before)


@pytest.mark.parametrize("elements", [1, 32, 33, 100, 12 * 32])
@pytest.mark.parametrize("pattern", ["2:4", 0.5])
def test_chunks_of_rows_change_nothing(pattern: str | float, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = Pattern.parse(pattern)
    weight, inputs = made(12)
    mask = first_mask("wanda", weight, inputs, parsed)
    whole = update_mask(weight, mask, moments_of(inputs), parsed)
    monkeypatch.setattr("sppctl.pruners.dsnot.CHUNK_ELEMENTS", elements)
    assert torch.equal(update_mask(weight, mask, moments_of(inputs), parsed), whole)


# --- inputs and weights at the edge -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["2:4", 0.5])
def test_inputs_that_never_vary(pattern: str | float) -> None:
    parsed = Pattern.parse(pattern)
    weight, inputs = made(13)
    inputs = (inputs[:1] * 8).round().div(8).expand(64, -1)  # eighths: mean and variance are exact
    moments = moments_of(inputs)
    assert (moments.variance() == 0).all()
    mask = first_mask("wanda", weight, inputs, parsed)
    updated = update_mask(weight, mask, moments, parsed)
    assert torch.equal(updated, literal(weight, mask, inputs, parsed))
    assert not torch.equal(updated, mask)


@pytest.mark.parametrize("pattern", ["2:4", 0.5])
def test_some_inputs_that_never_fire(pattern: str | float) -> None:
    parsed = Pattern.parse(pattern)
    weight, inputs = made(14)
    inputs[:, ::3] = 0
    mask = first_mask("wanda", weight, inputs, parsed)
    updated = update_mask(weight, mask, moments_of(inputs), parsed)
    assert torch.equal(updated, literal(weight, mask, inputs, parsed))
    assert torch.equal(updated.sum(1), mask.sum(1))


def test_no_input_that_fires_leaves_the_mask() -> None:
    weight, inputs = made(15)
    pattern = Pattern.parse("2:4")
    mask = mask_by_row(weight.abs(), pattern)
    assert torch.equal(update_mask(weight, mask, moments_of(0 * inputs), pattern), mask)


def test_rows_all_kept_or_all_pruned_stay() -> None:
    weight, inputs = made(16, rows=3)
    mask = mask_by_row(weight.abs(), Pattern.parse(0.5))
    mask[0], mask[2] = True, False
    updated = update_mask(weight, mask, moments_of(inputs), Pattern.parse(0.5))
    assert updated[0].all()
    assert not updated[2].any()
    assert (updated[1] != mask[1]).any()


@pytest.mark.parametrize("pattern", ["2:4", 0.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_computed_with_in_float32(pattern: str | float, dtype: torch.dtype) -> None:
    parsed = Pattern.parse(pattern)
    weight, inputs = made(17)
    weight, inputs = weight.to(dtype), inputs.to(dtype)
    mask = first_mask("wanda", weight.float(), inputs.float(), parsed)
    updated = update_mask(weight, mask, moments_of(inputs), parsed)
    assert torch.equal(updated, update_mask(weight.float(), mask, moments_of(inputs.float()), parsed))
    assert torch.equal(updated, literal(weight, mask, inputs.float(), parsed))


# --- the pruner -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_pruner_starts_from_wanda_s_mask(pattern: str | float, dtype: torch.dtype) -> None:
    parsed = Pattern.parse(pattern)
    weight, inputs = (tensor.to(dtype) for tensor in made(18))
    before = weight.clone()
    pruned = prune_linear(weight, inputs, method="dsnot", pattern=pattern)
    wanda = prune_linear(weight, inputs, method="wanda", pattern=pattern)
    expected = literal(weight, wanda != 0, inputs.float(), parsed)
    assert torch.equal(pruned, weight * expected)
    assert pruned.dtype == dtype
    assert (pruned == 0).sum() == (wanda == 0).sum()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("start", ["magnitude", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["2:4", 0.5])
def test_the_pruner_starts_from_a_mask_it_is_given(pattern: str | float, start: str) -> None:
    parsed = Pattern.parse(pattern)
    weight, inputs = made(19)
    mask = first_mask(start, weight, inputs, parsed)
    pruned = prune_linear(weight, inputs, method="dsnot", pattern=pattern, mask=mask)
    assert torch.equal(pruned, weight * literal(weight, mask, inputs, parsed))
    assert not torch.equal(pruned, prune_linear(weight, inputs, method="dsnot", pattern=pattern))


@pytest.mark.parametrize("pattern", ["2:4", "1:4", 0.5])
def test_the_mean_output_is_nearer_to_the_dense_one_than_wanda_s(pattern: str | float) -> None:
    weight, inputs = made(20)
    dense = inputs.mean(0) @ weight.t()
    errors = [
        (inputs.mean(0) @ prune_linear(weight, inputs, method=method, pattern=pattern).t() - dense).norm().item()
        for method in ("dsnot", "wanda")
    ]
    assert errors[0] < errors[1]


def test_the_pruner_needs_inputs_and_a_mask_that_fits() -> None:
    weight, inputs = made(21)
    with pytest.raises(ValueError, match="dsnot needs the layer's inputs"):
        prune_linear(weight, method="dsnot", pattern="2:4")
    with pytest.raises(ValueError, match=r"expected bool \(12, 32\)"):
        prune_linear(weight, inputs, method="dsnot", pattern="2:4", mask=torch.ones(12, 31, dtype=torch.bool))
