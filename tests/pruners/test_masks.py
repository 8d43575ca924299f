"""Masks against hand-worked examples and a slow literal reference."""

from collections.abc import Callable

import pytest
import torch

from sppctl.pattern import Pattern
from sppctl.pruners import masks
from sppctl.pruners.magnitude import magnitude_mask
from sppctl.pruners.masks import keep_largest, keep_largest_in_groups, mask_by_row


def test_masks_by_hand() -> None:
    scores = torch.tensor([[1.0, 4.0, 3.0, 2.0, 9.0, 9.5, 0.0, 8.0]])
    assert keep_largest_in_groups(scores, 2, 4).int().tolist() == [[0, 1, 1, 0, 1, 1, 0, 0]]
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0], [8.0, 7.0, 6.0, 5.0]])
    half = Pattern.parse(0.5)
    assert mask_by_row(scores, half).int().tolist() == [[0, 0, 1, 1], [1, 1, 0, 0]]
    assert magnitude_mask(-scores, half).int().tolist() == [[0, 0, 0, 0], [1, 1, 1, 1]]


def test_ties_keep_the_exact_count_and_the_later_of_equals() -> None:
    scores = torch.full((1, 4), 5.0)
    expected = torch.tensor([[False, False, True, True]])
    assert torch.equal(keep_largest_in_groups(scores, 2, 4), expected)
    assert torch.equal(keep_largest(scores, 2), expected)


@pytest.mark.parametrize("pattern", ["1:4", "2:4", "2:8", "4:8", "3:5", "1:2", "8:16", "1:256", "200:300", "256:512"])
@pytest.mark.parametrize("levels", [3, 1000])
@pytest.mark.parametrize("ranks", [masks._ranks_in_pairs, masks._ranks_at_once])
def test_groups_against_sorting_each_group(
    pattern: str, levels: int, ranks: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masks, "_ranks_in_pairs", ranks)  # a GPU's way, too, on a CPU
    parsed = Pattern.parse(pattern)
    assert parsed.keep is not None
    assert parsed.group is not None
    generator = torch.Generator().manual_seed(1)
    scores = torch.randint(0, levels, (6, parsed.group * 5), generator=generator).float()  # few levels: many ties
    mask = keep_largest_in_groups(scores, parsed.keep, parsed.group)
    for row in range(6):
        for start in range(0, scores.shape[1], parsed.group):
            part = scores[row, start : start + parsed.group].tolist()
            order = sorted(range(parsed.group), key=lambda i, part=part: (part[i], i))
            kept = set(order[parsed.group - parsed.keep :])
            assert {i for i in range(parsed.group) if mask[row, start + i]} == kept


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.75, 0.99])
@pytest.mark.parametrize("levels", [2, 1000])
def test_exact_counts_per_row_whatever_the_ties(ratio: float, levels: int) -> None:
    scores = torch.randint(0, levels, (9, 37), generator=torch.Generator().manual_seed(2)).float()
    mask = mask_by_row(scores, Pattern.parse(ratio))
    assert (~mask).sum(1).tolist() == [int(37 * ratio)] * 9
    for row in range(9):
        assert scores[row][mask[row]].min() >= scores[row][~mask[row]].max()


def test_chunks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.rand(11, 13, generator=torch.Generator().manual_seed(3))
    whole = keep_largest(scores, 5)
    monkeypatch.setattr("sppctl.pruners.masks.CHUNK_ELEMENTS", 20)
    assert torch.equal(keep_largest(scores, 5), whole)


def test_scores_that_are_not_finite_give_no_mask() -> None:
    with pytest.raises(AssertionError, match="not finite"):
        keep_largest(torch.full((2, 4), torch.nan), 2)
