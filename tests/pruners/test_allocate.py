"""Ratios per block: outliers counted by hand, and what the shares of OWL promise."""

from __future__ import annotations

import random

import pytest
import torch

from sppctl.pruners.allocate import OWL_OUTLIER, OWL_RANGE, outlier_share, owl

# --- outliers ---------------------------------------------------------------------------------------------------------


def test_outliers_by_hand() -> None:
    one = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 33.0]])  # mean 5: only 33 exceeds 25
    assert outlier_share([one]) == 1 / 8
    assert outlier_share([one], outlier=7) == 0  # 33 does not exceed 35


def test_the_matrices_of_a_block_have_one_mean_over_all_their_weights() -> None:
    small = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 33.0]])  # mean 5: alone 33 would exceed 25
    large = 9 * torch.ones(4, 2)
    assert outlier_share([small, large]) == 0  # mean 7
    wide = torch.ones(4, 6)
    # mean (24 + 40 + 40) / 34: the limit is 15.3, which both 20s exceed though their own matrix has no outlier
    assert outlier_share([wide, 20 * torch.ones(1, 2), small]) == 3 / 34


def test_a_score_that_just_equals_the_limit_is_not_an_outlier() -> None:
    scores = torch.tensor([[0.0, 0.0, 0.0, 0.0, 5.0]])  # mean 1
    assert outlier_share([scores]) == 0
    assert outlier_share([scores], outlier=4.9) == 1 / 5


def test_the_unit_of_the_scores_does_not_matter() -> None:
    scores = torch.rand(8, 16, generator=torch.Generator().manual_seed(0)) ** 8
    assert 0 < outlier_share([scores]) < 1
    assert outlier_share([scores]) == outlier_share([1024 * scores])


# --- ratios -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shares", "sizes", "ratio", "spread", "expected"),
    [
        # scaled to 0, 0.04, 0.16 (spread 0.08); their mean is 0.2 / 3
        ([0.01, 0.02, 0.05], [100, 100, 100], 0.6, 0.08, [0.6 + 0.2 / 3, 0.56 + 0.2 / 3, 0.44 + 0.2 / 3]),
        # scaled to 0 and 0.2; their mean over all weights is 0.15
        ([0.0, 0.3], [100, 300], 0.5, 0.1, [0.65, 0.45]),
        ([0.02] * 4, [1, 20, 300, 4000], 0.55, 0.08, [0.55] * 4),
        ([0.02], [7], 0.55, 0.08, [0.55]),
    ],
    ids=["three", "unequal sizes", "equal shares", "one"],
)
def test_ratios_by_hand(
    shares: list[float], sizes: list[int], ratio: float, spread: float, expected: list[float]
) -> None:
    ratios = owl(shares, sizes, ratio, spread)
    assert ratios == pytest.approx(expected, abs=1e-12)
    assert all(type(value) is float for value in ratios)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("ratio", "spread"), [(0.5, 0.08), (0.7, 0.08), (0.3, 0.01), (0.5, 0.2)])
def test_mean_range_and_order(seed: int, ratio: float, spread: float) -> None:
    chooser = random.Random(seed)
    shares = [chooser.random() / 10 for _ in range(12)]
    sizes = [chooser.randrange(1, 10**9) for _ in range(12)]
    ratios = owl(shares, sizes, ratio, spread)
    assert sum(r * size for r, size in zip(ratios, sizes, strict=True)) / sum(sizes) == pytest.approx(ratio, abs=1e-12)
    assert max(ratios) - min(ratios) == pytest.approx(2 * spread, abs=1e-12)
    by_share = [ratios[place] for place in sorted(range(12), key=lambda place: shares[place])]
    assert by_share == sorted(by_share, reverse=True)  # the more outliers, the fewer zeros


def test_the_published_constants_are_the_defaults() -> None:
    assert (OWL_OUTLIER, OWL_RANGE) == (5, 0.08)
    assert owl([0.1, 0.2], [1, 1], 0.5) == owl([0.1, 0.2], [1, 1], 0.5, 0.08)


@pytest.mark.parametrize(("ratio", "spread"), [(0.05, 0.08), (0.95, 0.08), (0.5, 0.6)])
def test_a_ratio_outside_0_and_1_is_an_error(ratio: float, spread: float) -> None:
    with pytest.raises(ValueError, match=r"outside \(0, 1\); lower the spread"):
        owl([0.0, 0.1], [1, 1], ratio, spread)
