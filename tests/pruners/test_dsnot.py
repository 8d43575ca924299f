"""DSnoT against a slow literal reference, one row and one swap at a time, and what its docstring promises."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sppctl.pattern import Pattern
from sppctl.pruners import prune_linear
from sppctl.pruners.dsnot import MAX_CYCLES, THRESHOLD, expected_change, update_mask
from sppctl.pruners.masks import mask_by_row
from sppctl.pruners.stats import InputMoments

PATTERNS = [Pattern.parse(value) for value in ("2:4", "1:4", "4:8", "2:8", 0.5, 0.75)]
TWO_FOUR, HALF = Pattern.parse("2:4"), Pattern.parse(0.5)
starts = pytest.mark.parametrize("start", ["magnitude", "wanda", "sparsegpt"])
patterns = pytest.mark.parametrize("pattern", PATTERNS, ids=str)
of_both_kinds = pytest.mark.parametrize("pattern", [TWO_FOUR, HALF], ids=str)
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


def first_mask(weight: Tensor, inputs: Tensor, pattern: Pattern, method: str = "wanda") -> Tensor:
    return prune_linear(weight, inputs, method=method, pattern=pattern) != 0


def updated(weight: Tensor, mask: Tensor, inputs: Tensor, pattern: Pattern, **settings: Any) -> Tensor:
    return update_mask(weight, mask, moments_of(inputs), pattern, **settings)


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


def check(weight: Tensor, mask: Tensor, inputs: Tensor, pattern: Pattern, **settings: Any) -> None:
    """What is updated equals the reference, and with the usual settings is another mask."""
    found = updated(weight, mask, inputs, pattern, **settings)
    assert torch.equal(found, literal(weight, mask, inputs, pattern, **settings))
    assert settings or not torch.equal(found, mask)


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


EQUAL = [[0.0] * 4, [2.0] * 4]  # means 1, variances 1, norms sqrt 2


@pytest.mark.parametrize(
    ("inputs", "weight", "mask", "pattern", "cycles", "expected"),
    [
        # 3 and 2 are pruned, so eps = -5; 3 comes back (-2) for 1, the least kept (-3)
        (EQUAL, [3.0, 1.0, 2.0, 1.5], [0, 1, 0, 1], "2:4", 1, [1, 0, 0, 1]),
        # then 2 comes back (-1) for 1.5 (-2.5), as 3 would leave -4; 1 and 1.5 were given up
        (EQUAL, [3.0, 1.0, 2.0, 1.5], [0, 1, 0, 1], "2:4", MAX_CYCLES, [1, 0, 1, 0]),
        # eps = -7; 0.1 has the smallest score, but not beside 4 in its group of two
        (EQUAL, [4.0, 1.0, 0.1, 3.0], [0, 1, 1, 0], "1:2", 1, [1, 0, 1, 0]),
        (EQUAL, [4.0, 1.0, 0.1, 3.0], [0, 1, 1, 0], 0.5, 1, [1, 1, 0, 0]),
        # means 1, variances 0.01, 16, 0.25: a steady input is regrown before a larger but wavering one
        ([[0.9, -3.0, 0.5], [1.1, 5.0, 1.5]], [2.0, 3.0, 0.5], [0, 0, 1], 0.66, 1, [1, 0, 0]),
        # eps = -1; 1 for -3 would overshoot to +3
        ([[0.0, 0.0], [2.0, 2.0]], [1.0, -3.0], [0, 1], "1:2", MAX_CYCLES, [0, 1]),
    ],
    ids=["one swap", "two swaps", "in its group", "in the row", "steady", "overshoot"],
)
def test_swaps_by_hand(
    inputs: list[list[float]],
    weight: list[float],
    mask: list[int],
    pattern: str | float,
    cycles: int,
    expected: list[int],
) -> None:
    start = torch.tensor([mask]).bool()
    found = updated(torch.tensor([weight]), start, torch.tensor(inputs), Pattern.parse(pattern), max_cycles=cycles)
    assert found.int().tolist() == [expected]


# --- against the reference --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
@patterns
@starts
def test_equals_the_reference(start: str, pattern: Pattern, seed: int) -> None:
    weight, inputs = made(seed)
    check(weight, first_mask(weight, inputs, pattern, start), inputs, pattern)


@pytest.mark.parametrize("max_cycles", [1, 2, 3, 7])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 2.0])
@of_both_kinds
def test_equals_the_reference_for_other_settings(pattern: Pattern, threshold: float, max_cycles: int) -> None:
    weight, inputs = made(7)
    check(weight, first_mask(weight, inputs, pattern), inputs, pattern, max_cycles=max_cycles, threshold=threshold)


@of_both_kinds
@pytest.mark.parametrize("kind", ["inputs that never vary", "some never fire", torch.bfloat16, torch.float16], ids=str)
def test_equals_the_reference_at_the_edge(kind: str | torch.dtype, pattern: Pattern) -> None:
    weight, inputs = made(13)
    if isinstance(kind, torch.dtype):  # computed with in float32
        weight, inputs = weight.to(kind), inputs.to(kind)
        assert moments_of(inputs).mean().dtype == torch.float32
    elif kind == "some never fire":
        inputs[:, ::3] = 0
    else:
        inputs = (inputs[:1] * 8).round().div(8).expand(64, -1)  # eighths: mean and variance are exact
        assert (moments_of(inputs).variance() == 0).all()
    check(weight, first_mask(weight.float(), inputs.float(), pattern), inputs, pattern)


# --- promises ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
@patterns
@starts
def test_the_expected_change_falls_wherever_it_can(start: str, pattern: Pattern, seed: int) -> None:
    weight, inputs = made(100 + seed)
    mask = first_mask(weight, inputs, pattern, start)
    found = updated(weight, mask, inputs, pattern)
    before = expected_change(weight, mask, inputs.mean(0)).abs()
    after = expected_change(weight, found, inputs.mean(0)).abs()
    assert (after <= before + ROUNDING).all()
    group = pattern.group or weight.shape[1]
    mean = inputs.mean(0).tolist()
    possible = [swap_is_possible(w, m, mean, group) for w, m in zip(weight.tolist(), mask.tolist(), strict=True)]
    improvable = torch.tensor(possible) & (before > THRESHOLD)
    assert improvable.any()
    assert (after < before)[improvable].all()
    assert torch.equal(found[~improvable], mask[~improvable])


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "3:5", 0.1, 0.5, 0.9])
@starts
def test_every_row_and_group_keeps_its_count(start: str, pattern: str | float) -> None:
    parsed = Pattern.parse(pattern)
    weight, inputs = made(9, columns=40 if parsed.is_structured else 37)
    mask = first_mask(weight, inputs, parsed, start)
    found = updated(weight, mask, inputs, parsed)
    assert found.dtype == torch.bool
    assert torch.equal(found.sum(1), mask.sum(1))
    if parsed.group is not None:
        assert (found.view(12, -1, parsed.group).sum(-1) == parsed.keep).all()


def test_the_mask_that_is_given_is_never_touched() -> None:
    weight, inputs = made(11)
    mask = first_mask(weight, inputs, TWO_FOUR)
    before = mask.clone()
    same = updated(weight, mask, inputs, TWO_FOUR, max_cycles=0)
    assert torch.equal(same, before)
    assert same is not mask
    assert not torch.equal(updated(weight, mask, inputs, TWO_FOUR), before)
    assert torch.equal(mask, before)


@pytest.mark.parametrize("elements", [1, 32, 33, 100, 12 * 32])
@of_both_kinds
def test_chunks_of_rows_change_nothing(pattern: Pattern, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = made(12)
    mask = first_mask(weight, inputs, pattern)
    whole = updated(weight, mask, inputs, pattern)
    monkeypatch.setattr("sppctl.pruners.dsnot.CHUNK_ELEMENTS", elements)
    assert torch.equal(updated(weight, mask, inputs, pattern), whole)


def test_no_input_that_fires_leaves_the_mask() -> None:
    weight, inputs = made(15)
    mask = mask_by_row(weight.abs(), TWO_FOUR)
    assert torch.equal(updated(weight, mask, 0 * inputs, TWO_FOUR), mask)


def test_rows_all_kept_or_all_pruned_stay() -> None:
    weight, inputs = made(16, rows=3)
    mask = mask_by_row(weight.abs(), HALF)
    mask[0], mask[2] = True, False
    assert (expected_change(weight, mask, inputs.mean(0))[0] == 0).all()
    found = updated(weight, mask, inputs, HALF)
    assert found[0].all()
    assert not found[2].any()
    assert (found[1] != mask[1]).any()


# --- the pruner -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@patterns
def test_the_pruner_starts_from_wanda_s_mask(pattern: Pattern, dtype: torch.dtype) -> None:
    weight, inputs = (tensor.to(dtype) for tensor in made(18))
    before = weight.clone()
    pruned = prune_linear(weight, inputs, method="dsnot", pattern=pattern)
    wanda = prune_linear(weight, inputs, method="wanda", pattern=pattern)
    assert torch.equal(pruned, weight * literal(weight, wanda != 0, inputs.float(), pattern))
    assert pruned.dtype == dtype
    assert torch.equal(weight, before)
    mean = inputs.float().mean(0)
    errors = [(mean @ (one - weight).float().t()).norm() for one in (pruned, wanda)]
    assert errors[0] < errors[1]  # the mean output is nearer to the dense one


@pytest.mark.parametrize("start", ["magnitude", "sparsegpt"])
@of_both_kinds
def test_the_pruner_starts_from_a_mask_it_is_given(pattern: Pattern, start: str) -> None:
    weight, inputs = made(19)
    mask = first_mask(weight, inputs, pattern, start)
    pruned = prune_linear(weight, inputs, method="dsnot", pattern=pattern, mask=mask)
    assert torch.equal(pruned, weight * literal(weight, mask, inputs, pattern))
    assert not torch.equal(pruned, prune_linear(weight, inputs, method="dsnot", pattern=pattern))
