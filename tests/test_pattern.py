"""Sparsity patterns: what is read, what is refused and with which words, and how many weights a pattern prunes."""

from __future__ import annotations

import pytest

from sppctl.pattern import Pattern


@pytest.mark.parametrize(
    ("value", "expected", "sparsity", "text"),
    [
        ("2:4", Pattern(keep=2, group=4), 0.5, "2:4"),
        (" 2 : 8 ", Pattern(keep=2, group=8), 0.75, "2:8"),  # N is the number kept
        *((value, Pattern(ratio=0.5), 0.5, "0.5") for value in (0.5, "0.5", " 0.5 ", ".5", "5e-1")),
        (0.9999999, Pattern(ratio=0.9999999), 0.9999999, "0.9999999"),
    ],
)
def test_patterns_are_read_from_numbers_and_text(value: object, expected: Pattern, sparsity: float, text: str) -> None:
    pattern = Pattern.parse(value)
    assert pattern == expected
    assert pattern.is_structured == (":" in text)
    assert pattern.sparsity == sparsity
    assert str(pattern) == text
    assert Pattern.parse(pattern) is pattern
    assert Pattern.parse(text) == pattern


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["4:2", "4:4", "0:4", "0:0"], r"pattern '.:.': N:M keeps N of every M weights, so 0 < N < M \(2:4"),
        (
            [0, 1, 0.0, 1.0, 1.5, -0.5, "50", "nan", float("inf")],
            r"a ratio is the share of zeros, between 0 and 1 \(0\.5 = half of them\)",
        ),
        (["half", "2-4", "2:4:8", "-2:4", "2:", "", None, True, [2, 4], {"n": 2}], "is neither N:M"),
    ],
    ids=["N:M", "ratio", "neither"],
)
def test_anything_else_is_refused_by_name(values: list[object], message: str) -> None:
    for value in values:
        with pytest.raises(ValueError, match=message) as caught:
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
    Pattern.parse("2:4").check_in_features(8, "q_proj")
    Pattern.parse(0.5).check_in_features(7, "q_proj")
    with pytest.raises(ValueError, match=r"pattern 2:4: q_proj has 10 input features, not a multiple of 4") as caught:
        Pattern.parse("2:4").check_in_features(10, "q_proj")
    assert "choose another pattern or leave the layer out of prune.targets" in str(caught.value)
