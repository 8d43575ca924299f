from __future__ import annotations

import pytest

from sppctl.inspect.storage import bitmask_bytes, index_bits, structured_bytes
from sppctl.pattern import Pattern


@pytest.mark.parametrize(("group", "bits"), [(2, 1), (3, 2), (4, 2), (5, 3), (8, 3), (16, 4)])
def test_bits_of_an_index(group: int, bits: int) -> None:
    assert index_bits(group) == bits


def test_bytes_by_hand() -> None:
    assert structured_bytes((1, 8), 4, Pattern.parse("2:4")) == 4 * 4 + 1  # four values, four indices of two bits
    assert structured_bytes((3, 5), 2, Pattern.parse("3:5")) == 9 * 2 + 4  # nine indices of three bits
    assert bitmask_bytes((1, 10), 4, zeros=7) == 3 * 4 + 2


def test_in_16_bits_the_two_layouts_of_2_4_are_nine_sixteenths() -> None:
    assert structured_bytes((64, 64), 2, Pattern.parse("2:4")) == 64 * 64 * 2 * 9 // 16
    assert bitmask_bytes((64, 64), 2, zeros=64 * 32) == 64 * 64 * 2 * 9 // 16
