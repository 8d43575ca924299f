"""Pruners against the published references' outputs, a brute-force solver in float64, and hand calculations."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sppctl.pattern import Pattern
from sppctl.pruners import prune_linear
from sppctl.pruners.masks import holds
from sppctl.pruners.sparsegpt import prune_sparsegpt
from sppctl.pruners.stats import MAX_DAMP, Hessian

GOLDEN = {
    "unstructured_0.5": 0.5,
    "unstructured_0.75": 0.75,
    "keep_2_of_4": "2:4",
    "keep_1_of_4": "1:4",
    "keep_4_of_8": "4:8",
    "keep_2_of_8": "2:8",
}


@pytest.fixture(scope="module")
def golden(shared_data: Path) -> dict[str, Tensor]:
    return load_file(shared_data / "golden" / "pruners.safetensors")


def output_error(pruned: Tensor, weight: Tensor, inputs: Tensor) -> float:
    return (inputs @ (pruned - weight).t()).square().sum().item()


def made(seed: int, rows: int, columns: int, tokens: int, correlated: bool = False) -> tuple[Tensor, Tensor]:
    """A weight and inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight, inputs = torch.randn(rows, columns, generator=generator), torch.randn(tokens, columns, generator=generator)
    return weight, inputs @ torch.randn(columns, columns, generator=generator) if correlated else inputs


@pytest.mark.shared
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("name", GOLDEN)
def test_equals_the_published_reference(golden: dict[str, Tensor], name: str, method: str) -> None:
    """But for one weight: with a ratio, magnitude's and SparseGPT's references prune one too many."""
    weight, inputs, expected = golden["weight"], golden["inputs"], golden[f"{method}.{name}"]
    pruned = prune_linear(weight, inputs, method=method, pattern=GOLDEN[name])
    surplus = int(method != "wanda" and name.startswith("unstructured"))
    assert ((pruned != 0) != (expected != 0)).sum() == surplus
    assert (pruned != 0).sum() - (expected != 0).sum() == surplus
    if method != "sparsegpt":
        assert torch.equal(pruned[expected != 0], expected[expected != 0])
        return
    assert output_error(pruned, weight, inputs) <= 1.005 * output_error(expected, weight, inputs)
    if not surplus:
        torch.testing.assert_close(pruned, expected, rtol=1e-4, atol=1e-5)


def brute_force_obs(weight: Tensor, inputs: Tensor, mask: Tensor, damp: float) -> Tensor:
    """Optimal brain surgeon for a given mask, column by column, inverting the remaining Hessian anew each time."""
    solved = weight.double().clone()
    hessian = 2 / len(inputs) * inputs.double().t() @ inputs.double()
    fired = [entry for entry in hessian.diagonal().tolist() if entry]
    hessian += damp * sum(fired) / len(fired) * torch.eye(len(hessian), dtype=torch.float64)
    for column in range(solved.shape[1]):
        inverse = torch.linalg.inv(hessian[column:, column:])
        for row in range(solved.shape[0]):
            if not mask[row, column]:
                solved[row, column:] -= solved[row, column] / inverse[0, 0] * inverse[0]
    return solved


@pytest.mark.parametrize("pattern", ["2:4", "1:4", 0.5, 0.75])
@pytest.mark.parametrize("block_size", [4, 8, 128])
def test_sparsegpt_equals_brute_force(pattern: str | float, block_size: int) -> None:
    weight, inputs = made(0, 6, 16, 200, correlated=True)
    pruned = prune_linear(weight, inputs, method="sparsegpt", pattern=pattern, block_size=block_size)
    expected = brute_force_obs(weight, inputs, pruned != 0, 0.01)
    torch.testing.assert_close(pruned.double(), expected * (pruned != 0), rtol=1e-4, atol=1e-4)
    assert expected[pruned == 0].abs().max() < 1e-9  # the surgeon zeroes just those


@pytest.mark.parametrize("pattern", ["2:4", "2:8", 0.5])
def test_sparsegpt_beats_wanda_beats_magnitude(pattern: str | float) -> None:
    weight, inputs = made(4, 32, 64, 512, correlated=True)
    inputs *= torch.logspace(-1, 1, 64)
    errors = [
        output_error(prune_linear(weight, inputs, method=method, pattern=pattern), weight, inputs)
        for method in ("sparsegpt", "wanda", "magnitude")
    ]
    assert errors == sorted(errors)


def test_wanda_by_hand() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0], [-4.0, 3.0, -2.0, 1.0]])
    inputs = torch.tensor([[10.0, 1.0, 1.0, 2.0]])  # scores 10 2 3 8 and 40 3 2 2
    expected = torch.tensor([[1.0, 0.0, 0.0, 4.0], [-4.0, 3.0, 0.0, 0.0]])
    assert torch.equal(prune_linear(weight, inputs, method="wanda", pattern="2:4"), expected)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", ["2:4", "4:8", 0.5])
def test_counts_are_exact_in_every_dtype(method: str, dtype: torch.dtype, pattern: str | float) -> None:
    weight, inputs = (tensor.to(dtype) for tensor in made(5, 24, 48, 100))
    before = weight.clone()
    pruned = prune_linear(weight, inputs, method=method, pattern=pattern)
    assert torch.equal(weight, before)
    assert pruned.dtype == dtype
    assert (pruned == 0).sum().item() == 24 * 24
    parsed = Pattern.parse(pattern)
    if parsed.group is not None:
        assert ((pruned != 0).view(24, -1, parsed.group).sum(-1) == parsed.keep).all()


NEVER_FIRE = [1, 4, 5, 6]  # of 16 inputs


@pytest.fixture
def dead() -> tuple[Tensor, Tensor]:
    """A weight and its inputs, some of which never fire."""
    weight, inputs = made(6, 8, 16, 64)
    inputs[:, NEVER_FIRE] = 0
    return weight, inputs


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "dsnot"])
@pytest.mark.parametrize("pattern", [0.125, 0.25, 0.5, "2:4", "3:4", "1:4"])
def test_inputs_that_never_fire_are_pruned_first(
    method: str, pattern: str | float, dead: tuple[Tensor, Tensor]
) -> None:
    weight, inputs = dead
    pruned = prune_linear(weight, inputs, method=method, pattern=pattern)
    parsed = Pattern.parse(pattern)
    assert torch.isfinite(pruned).all()
    assert (pruned == 0).sum() == weight.numel() * parsed.sparsity
    if parsed.is_structured:
        assert ((pruned != 0).view(8, -1, 4).sum(-1) == parsed.keep).all()
    kept = pruned[:, NEVER_FIRE] != 0
    assert torch.equal(pruned[:, NEVER_FIRE][kept], weight[:, NEVER_FIRE][kept])  # nothing is made good there
    if pattern in (0.25, 0.5):  # as many as there are, or more
        assert not kept.any()


@pytest.mark.parametrize("pattern", ["1:4", 0.75])
@pytest.mark.parametrize("unit", [1.0, 100.0, 0.01])
def test_the_damping_is_a_share_of_the_inputs_that_fire(unit: float, pattern: str | float) -> None:
    """Whatever their unit, although half of them never do."""
    weight, inputs = made(10, 6, 16, 200, correlated=True)
    inputs[:, ::2] = 0
    pruned, scaled = (
        prune_linear(weight, given, method="sparsegpt", pattern=pattern, damp=0.2) for given in (inputs, inputs * unit)
    )
    expected = brute_force_obs(weight, inputs, pruned != 0, 0.2) * (pruned != 0)
    assert torch.equal(scaled != 0, pruned != 0)
    for ours in (pruned, scaled):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-4)


def test_sparsegpt_only_removes_weights_if_no_input_fires() -> None:
    weight, inputs = made(11, 8, 16, 64)
    pruned = prune_linear(weight, 0 * inputs, method="sparsegpt", pattern="2:4")
    assert holds(pruned, Pattern.parse("2:4"))
    assert torch.equal(pruned[pruned != 0], weight[pruned != 0])
    assert (pruned == 0).sum() == 4 * 16


def test_sparsegpt_keeps_a_given_mask_where_inputs_never_fire(dead: tuple[Tensor, Tensor]) -> None:
    mask = torch.rand(8, 16, generator=torch.Generator().manual_seed(6)) < 0.5
    assert torch.equal(prune_linear(*dead, method="sparsegpt", pattern=0.5, mask=mask) != 0, mask)


def test_damping_rises_until_the_factorisation_succeeds_and_is_reported() -> None:
    hessian = Hessian(4, "cpu")
    hessian.moment = torch.tensor([[1.0, 1.04, 0, 0], [1.04, 1.0, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 1.0]])  # indefinite
    hessian.num_tokens = 2
    _, damp = prune_sparsegpt([torch.randn(3, 4)], hessian, [Pattern.parse("2:4")], damp=0.001)
    assert damp == pytest.approx(0.1)


def test_a_hopeless_hessian_is_an_error_not_the_identity() -> None:
    hessian = Hessian(2, "cpu")
    hessian.moment = torch.tensor([[1.0, 9.0], [9.0, 1.0]])
    hessian.num_tokens = 2
    with pytest.raises(ValueError, match=f"damping of {MAX_DAMP:g}"):
        hessian.inverse_factor(0.01)


def test_layers_that_share_inputs_share_the_factorisation() -> None:
    hessian = Hessian(8, "cpu")
    hessian.update(made(7, 1, 8, 64)[1])
    assert hessian.inverse_factor(0.01)[0] is hessian.inverse_factor(0.01)[0]


@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize("patterns", [["2:4", "2:4", "2:4"], [0.5, 0.5, 0.25], ["2:4", 0.5, "4:8"]], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["chosen", "given"])
def test_sparsegpt_solves_layers_together_as_each_alone(
    masked: bool, patterns: list[str | float], block_size: int
) -> None:
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(rows, 64, generator=generator) for rows in (24, 8, 40)]
    masks = [torch.rand(weight.shape, generator=generator) < 0.5 for weight in weights] if masked else None
    hessian = Hessian(64, "cpu")
    hessian.update(torch.randn(256, 64, generator=generator) @ torch.randn(64, 64, generator=generator))
    parsed = [Pattern.parse(pattern) for pattern in patterns]
    together, damp = prune_sparsegpt(weights, hessian, parsed, masks, block_size=block_size)
    for index, (weight, pattern) in enumerate(zip(weights, parsed, strict=True)):
        mask = None if masks is None else [masks[index]]
        (alone,), own_damp = prune_sparsegpt([weight], hessian, [pattern], mask, block_size=block_size)
        assert own_damp == damp
        assert torch.equal(alone != 0, together[index] != 0)
        torch.testing.assert_close(together[index], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "dsnot"])
def test_a_layers_own_parameter_is_pruned_without_a_graph(method: str) -> None:
    weight = torch.nn.Linear(8, 4).weight
    pruned = prune_linear(weight, torch.randn(20, 8), method=method, pattern="2:4")
    assert not pruned.requires_grad
    assert weight.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "wnada"}, "wnada"),
        ({"inputs": None}, "wanda needs the layer's inputs"),
        ({"inputs": torch.zeros(0, 8)}, "needs the layer's inputs"),
        ({"inputs": torch.ones(4, 7)}, "7 features, the weight has 8"),
        ({"inputs": torch.full((4, 8), float("nan"))}, "not finite"),
        ({"weight": torch.full((4, 8), float("inf"))}, "not finite"),
        ({"weight": torch.ones(8)}, "expected \\(out_features, in_features\\)"),
        ({"pattern": "2:5"}, "not a multiple of 5"),
        ({"pattern": 1.5}, "between 0 and 1"),
        ({"mask": torch.ones(4, 7, dtype=torch.bool)}, r"expected bool \(4, 8\)"),
        *(
            ({"method": "sparsegpt", "damp": damp}, f"damp {damp} is not a positive, finite")
            for damp in (0.0, -0.01, math.nan, math.inf)
        ),
        *(({"method": "sparsegpt", "block_size": size}, f"block_size = {size} is not a positive") for size in (0, -1)),
        ({"method": "magnitude", "damp": 0.1}, "method magnitude has no option damp; its options: none"),
        ({"method": "sparsegpt", "dump": 0.1}, "has no option dump; its options: damp, block_size, keep_zeros"),
    ],
)
def test_bad_arguments(change: dict[str, object], message: str) -> None:
    arguments = {"weight": torch.ones(4, 8), "inputs": torch.ones(4, 8), "method": "wanda", "pattern": "2:4"} | change
    weight, inputs = arguments.pop("weight"), arguments.pop("inputs")
    with pytest.raises(ValueError, match=message):
        prune_linear(weight, inputs, **arguments)


@pytest.mark.parametrize(
    ("first", "second", "fills"),
    [(0.5, "2:4", True), ("2:4", "2:8", True), ("2:4", 0.75, False), ("1:4", "2:4", False)],
)
def test_sparsegpt_keeps_the_zeros_of_a_sparse_weight(first: float | str, second: float | str, fills: bool) -> None:
    weight, inputs = made(1, 16, 32, 64, correlated=True)
    sparse = prune_linear(weight, inputs, method="sparsegpt", pattern=first)
    kept = prune_linear(sparse, inputs, method="sparsegpt", pattern=second, keep_zeros=True)
    free = prune_linear(sparse, inputs, method="sparsegpt", pattern=second)
    assert (kept[sparse == 0] == 0).all()
    assert (free[sparse == 0] != 0).any() == fills, "without the option"
    assert Pattern.parse(second).ratio or holds(kept, Pattern.parse(second))
    assert (kept == 0).float().mean() >= max(Pattern.parse(pattern).sparsity for pattern in (first, second))
    masked = prune_linear(sparse, inputs, method="sparsegpt", pattern=second, mask=kept != 0)
    torch.testing.assert_close(kept, masked, rtol=1e-4, atol=1e-5)


def test_a_given_mask_does_not_bring_back_zeros() -> None:
    weight, inputs = made(2, 8, 16, 64)
    sparse = prune_linear(weight, inputs, method="magnitude", pattern="2:4")
    mask = torch.ones_like(weight, dtype=torch.bool)
    pruned = prune_linear(sparse, inputs, method="sparsegpt", pattern="2:4", mask=mask, keep_zeros=True)
    assert torch.equal(pruned == 0, sparse == 0)


def by_falling_cost(weights: list[Tensor], inputs: Tensor, group: int) -> list[int]:
    """The columns, whole groups with the greatest sum of (w x)^2 over all weights and tokens first."""
    costs = [
        sum(
            (weight[row, column] * token[column]).item() ** 2
            for column in range(start, start + group)
            for weight in weights
            for row in range(len(weight))
            for token in inputs
        )
        for start in range(0, inputs.shape[1], group)
    ]
    groups = sorted(range(len(costs)), key=lambda index: -costs[index])
    return [index * group + place for index in groups for place in range(group)]


@pytest.mark.parametrize("masked", [False, True], ids=["chosen", "given"])
@pytest.mark.parametrize(("patterns", "group"), [(["2:4"], 4), ([0.75, 0.5], 1), (["2:4", "2:8", 0.5], 8)], ids=str)
def test_act_order_is_pruning_the_reordered_layer(patterns: list[str | float], group: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(8)
    inputs = torch.randn(40, 32, generator=generator) * torch.rand(32, generator=generator) * 3
    weights = [torch.randn(6 + index, 32, generator=generator) for index in range(len(patterns))]
    masks = [torch.rand(weight.shape, generator=generator) < 0.5 for weight in weights]
    order = by_falling_cost(weights, inputs, group)
    assert order != list(range(32))
    parsed, given = [Pattern.parse(pattern) for pattern in patterns], masks if masked else None
    solve = partial(prune_sparsegpt, block_size=16, damp=0.02)
    hessian, reordered = Hessian(32, "cpu"), Hessian(32, "cpu")
    hessian.update(inputs)
    reordered.update(inputs[:, order])
    pruned, _ = solve(weights, hessian, parsed, given, act_order=True)
    moved = [mask[:, order] for mask in masks] if masked else None
    expected, _ = solve([weight[:, order] for weight in weights], reordered, parsed, moved)
    for result, wanted, pattern, mask in zip(pruned, expected, parsed, masks, strict=True):
        torch.testing.assert_close(result[:, order], wanted, rtol=1e-4, atol=1e-5)
        kept = result != 0
        assert torch.equal(kept[:, order], wanted != 0)
        assert torch.equal(kept, mask) if masked else pattern.ratio or holds(result, pattern)


def test_act_order_loses_less_where_the_last_inputs_matter_most() -> None:
    weight, inputs = made(9, 32, 64, 512, correlated=True)
    inputs *= torch.logspace(-1, 1, 64)
    plain, ordered = (
        output_error(prune_linear(weight, inputs, method="sparsegpt", pattern="2:4", act_order=act), weight, inputs)
        for act in (False, True)
    )
    assert ordered < 0.95 * plain
