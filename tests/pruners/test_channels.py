"""Orders of channels in which N:M loses less, compared with all orders that there are."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sppctl.pattern import Pattern
from sppctl.pruners import channels


def lost(losses: Tensor, keep: int, group: int) -> float:
    """What N:M loses, row by row and group by group."""
    return sum(
        sum(sorted(row[first : first + group])[: group - keep])
        for row in losses.tolist()
        for first in range(0, len(row), group)
    )


def heavy(rows: int, count: int, seed: int = 0) -> Tensor:
    """Losses of which a few channels have most, (rows, count)."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randn(count, generator=generator).mul(2).exp()
    return (torch.randn(rows, count, generator=generator) * sizes).square()


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "2:8"])
def test_what_is_lost(pattern: str) -> None:
    losses, parsed = heavy(5, 16), Pattern.parse(pattern)
    keep, group = (int(number) for number in pattern.split(":"))
    assert channels.lost(losses, parsed) == pytest.approx(lost(losses, keep, group))


@pytest.mark.parametrize(("pattern", "count"), [("2:4", 12), ("1:4", 16), ("3:4", 12), ("2:6", 18)])
def test_the_last_place_has_the_best_of_all_assignments(pattern: str, count: int) -> None:
    losses, parsed = heavy(7, count), Pattern.parse(pattern)
    keep, group = (int(number) for number in pattern.split(":"))
    order = channels._exchange(losses, torch.arange(count), parsed)
    places = order.view(-1, group)
    assert order.sort().values.equal(torch.arange(count))
    everything = []
    for last in itertools.permutations(places[:, -1].tolist()):
        other = torch.cat([places[:, :-1], torch.tensor(last).view(-1, 1)], dim=1)
        everything.append(lost(losses[:, other.reshape(-1)], keep, group))
    assert len(set(everything)) > 1
    assert lost(losses[:, order], keep, group) == pytest.approx(min(everything))


def test_important_channels_of_one_group_are_spread() -> None:
    losses = torch.tensor([[9.0, 9.0, 9.0, 9.0, 1.0, 1.0, 1.0, 1.0]])
    order = channels.best_order(losses, Pattern.parse("2:4"))
    assert channels.lost(losses, Pattern.parse("2:4")) == 9 + 9 + 1 + 1
    assert channels.lost(losses[:, order], Pattern.parse("2:4")) == 4


def test_nearly_the_best_order_of_all() -> None:
    for seed in range(5):
        losses, pattern = heavy(6, 8, seed), Pattern.parse("2:4")
        best = min(
            lost(losses[:, [*first, *(set(range(8)) - set(first))]], 2, 4)
            for first in itertools.combinations(range(8), 4)
        )
        order = channels.best_order(losses, pattern)
        assert lost(losses[:, order], 2, 4) <= 1.15 * best
        assert lost(losses[:, order], 2, 4) <= lost(losses, 2, 4)


def test_an_order_that_gains_nothing_is_left() -> None:
    pattern = Pattern.parse("2:4")
    assert channels.best_order(torch.ones(3, 8), pattern).tolist() == list(range(8))
    # only the first row is looked at: what gains there loses more in the other
    losses = torch.tensor([[9.0, 9.0, 9.0, 9.0, 1.0, 1.0, 1.0, 1.0], [99.0, 1.0, 99.0, 1.0, 99.0, 1.0, 99.0, 1.0]])
    assert channels.best_order(losses[:1], pattern).tolist() != list(range(8))
    assert channels.best_order(losses, pattern, num_rows=1).tolist() == list(range(8))


def test_groups_with_the_greatest_losses_come_first() -> None:
    for losses in (heavy(40, 64), torch.arange(16.0).view(1, 16)):
        order = channels.best_order(losses, Pattern.parse("2:4"))
        sums = losses[:, order].view(len(losses), -1, 4).sum(dim=(0, 2))
        assert torch.equal(sums, sums.sort(descending=True).values)
        assert order.sort().values.equal(torch.arange(losses.shape[1]))


def test_the_same_losses_have_the_same_order() -> None:
    losses = heavy(40, 64)
    first, second = (channels.best_order(losses.clone(), Pattern.parse("2:4")) for _ in range(2))
    assert first.equal(second)
    assert lost(losses[:, first], 2, 4) < 0.8 * lost(losses, 2, 4)
