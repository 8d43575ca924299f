"""Dynamic masks: chosen by magnitude, as many weights as the pattern keeps, and pulled back to zero outside."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sppctl import SteConfig
from sppctl.adapters.ste import SteLinear
from sppctl.pruners.masks import keep_largest, keep_largest_of_rows


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def pruned() -> Tensor:
    """A weight (12, 8), half of it zero."""
    return random((12, 8), 0).masked_fill(random((12, 8), 1) < 0, 0)


def test_each_row_keeps_its_own_number() -> None:
    scores = torch.tensor([[5.0, 1.0, 4.0, 2.0], [1.0, 1.0, 1.0, 1.0], [9.0, 8.0, 7.0, 6.0]])
    mask = keep_largest_of_rows(scores, torch.tensor([2, 3, 0]))
    assert mask.tolist() == [[True, False, True, False], [False, False, False, True], [True] * 4]
    many = random((40, 30), 0)
    assert torch.equal(keep_largest_of_rows(many, torch.full((40,), 11)), keep_largest(many, 11))


def ste_layer(weight: Tensor, **options: str) -> SteLinear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    return SteLinear(linear, "default", SteConfig(**options))


def test_a_ratio_starts_with_the_pruned_mask_and_keeps_the_count_of_every_row(pruned: Tensor) -> None:
    weight = pruned
    ste = ste_layer(weight)
    assert torch.equal(ste.ste_mask["default"], weight != 0)
    ste.ste_weight["default"].data = random(weight.shape, 9)
    left = ste.select_mask("default")
    mask = ste.ste_mask["default"]
    assert torch.equal(mask.sum(1), (weight != 0).sum(1))
    assert left == int(((weight != 0) & ~mask).sum()) > 0
    scores = ste.ste_weight["default"].abs()
    for row in range(len(weight)):
        if 0 < mask[row].sum() < mask.shape[1]:
            assert scores[row][mask[row]].min() >= scores[row][~mask[row]].max()


def test_n_of_m_is_chosen_in_every_group() -> None:
    weight = random((6, 8), 0)
    weight[:, [0, 3, 5, 6]] = 0
    ste = ste_layer(weight, pattern="2:4")
    assert torch.equal(ste.ste_mask["default"], weight != 0)
    values = ste.ste_weight["default"].data = random(weight.shape, 1)
    ste.select_mask("default")
    for row in range(6):
        for start in (0, 4):
            group = values[row, start : start + 4].abs()
            chosen = set(group.topk(2).indices.tolist())
            assert {i for i in range(4) if ste.ste_mask["default"][row, start + i]} == chosen


def test_it_starts_at_the_pruned_weight_where_groups_have_zeros_of_their_own() -> None:
    weight = torch.tensor([[1.0, 0, 0, 0, 1, -2, 0, 0], [0, 0, 0, 0, 0, 0, 3, 4]])
    ste = ste_layer(weight, pattern="2:4")
    assert torch.equal(ste.ste_mask["default"], weight != 0)
    assert torch.equal(ste.effective_weight(weight, ["default"]), weight)
    ste.ste_weight["default"].data += 0.5
    ste.select_mask("default")
    assert (ste.ste_mask["default"].view(2, 2, 4).sum(-1) == 2).all()


def test_the_decay_pulls_only_what_is_outside_the_mask(pruned: Tensor) -> None:
    ste = ste_layer(pruned)
    values, mask = ste.ste_weight["default"], ste.ste_mask["default"]
    values.data = random(values.shape, 2)
    values.grad = random(values.shape, 3)
    before = values.grad.clone()
    ste.add_decay("default", 0.1)
    torch.testing.assert_close(values.grad, before + 0.1 * (~mask) * values.data)


def test_bad_patterns() -> None:
    with pytest.raises(ValueError, match=r"0.5 is not N:M"):
        SteConfig(patterns={"model.layers.0.mlp.up_proj": "0.5"})
