"""Sparsity patterns: what is read, what is refused and with which words, and how many weights a pattern prunes."""

from __future__ import annotations

import pytest

from sppctl.pattern import Pattern


def test_two_four_keeps_two_weights_in_every_four() -> None:
    pattern = Pattern.parse("2:4")
    assert (pattern.keep, pattern.group, pattern.ratio) == (2, 4, None)
    assert pattern.is_structured
    assert pattern.sparsity == 0.5
    assert str(pattern) == "2:4"


def test_two_eight_is_three_quarters_zeros() -> None:
    assert Pattern.parse("2:8").sparsity == 0.75


@pytest.mark.parametrize("value", [0.5, "0.5", " 0.5 ", ".5", "5e-1"])
def test_a_ratio_may_be_a_number_or_text(value: object) -> None:
    pattern = Pattern.parse(value)
    assert pattern == Pattern(ratio=0.5)
    assert not pattern.is_structured
    assert str(pattern) == "0.5"


def test_a_pattern_parses_to_itself_and_from_its_own_text() -> None:
    for pattern in (Pattern(keep=4, group=8), Pattern(ratio=0.7), Pattern(ratio=0.9999999)):
        assert Pattern.parse(pattern) is pattern
        assert Pattern.parse(str(pattern)) == pattern


@pytest.mark.parametrize("value", ["4:2", "4:4", "0:4", "0:0"])
def test_n_of_m_must_keep_some_and_prune_some(value: str) -> None:
    with pytest.raises(ValueError, match=rf"pattern '{value}': N:M keeps N of every M weights, so 0 < N < M \(2:4"):
        Pattern.parse(value)


@pytest.mark.parametrize("value", [0, 1, 0.0, 1.0, 1.5, -0.5, "50", "nan", float("inf")])
def test_a_ratio_lies_between_zero_and_one(value: object) -> None:
    with pytest.raises(ValueError, match=r"a ratio is the share of zeros, between 0 and 1 \(0\.5 = half of them\)"):
        Pattern.parse(value)


@pytest.mark.parametrize("value", ["half", "2-4", "2:4:8", "-2:4", "2:", "", None, True, [2, 4], {"n": 2}])
def test_anything_else_is_refused_by_name(value: object) -> None:
    with pytest.raises(ValueError, match="is neither N:M") as caught:
        Pattern.parse(value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "count", "pruned"),
    [
        ("2:4", 8, 4),
        ("2:8", 8, 6),
        ("1:3", 9, 6),  # 9 * (1 - 1 / 3) is 6.000000000000001 or 5.999999999999999 in floating point
        (0.5, 7, 3),  # never more than the share asked for
        (0.3, 10, 3),
        (0.29, 100, 29),  # 100 * 0.29 is 28.999999999999996
        (0.5, 1, 0),
    ],
)
def test_num_pruned_counts_exactly(pattern: object, count: int, pruned: int) -> None:
    assert Pattern.parse(pattern).num_pruned(count) == pruned


def test_groups_must_fit_into_the_input_features() -> None:
    pattern = Pattern.parse("2:4")
    pattern.check_in_features(8, "q_proj")
    with pytest.raises(ValueError, match=r"pattern 2:4: q_proj has 10 input features, not a multiple of 4") as caught:
        pattern.check_in_features(10, "q_proj")
    assert "choose another pattern or leave the layer out of prune.targets" in str(caught.value)


def test_a_ratio_fits_any_layer() -> None:
    Pattern.parse(0.5).check_in_features(7, "q_proj")
