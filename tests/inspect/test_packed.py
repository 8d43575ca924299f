from __future__ import annotations

import pytest
import torch

from sppctl.inspect.packed import bitmask_bytes, index_bits, pack_bitmask, pack_structured, structured_bytes, unpack
from sppctl.pattern import Pattern
from sppctl.pruners.masks import mask_by_row

TWO_FOUR = Pattern.parse("2:4")


def test_two_of_four_by_hand() -> None:
    packed = pack_structured(torch.tensor([[0.0, 5.0, 0.0, 7.0, 1.0, 2.0, 0.0, 0.0]]), TWO_FOUR)
    assert packed.values.tolist() == [5, 7, 1, 2]
    assert packed.bits.tolist() == [0b01_11_00_01]  # places 1 and 3, 0 and 1
    assert packed.num_bytes == 4 * 4 + 1


def test_groups_with_more_zeros_are_filled_up() -> None:
    packed = pack_structured(torch.tensor([[0.0, 0.0, 0.0, 9.0, 0.0, 0.0, 0.0, 0.0]]), TWO_FOUR)
    assert packed.values.tolist() == [0, 9, 0, 0]
    assert packed.bits.tolist() == [0b00_11_00_01]


def test_a_bitmask_by_hand() -> None:
    packed = pack_bitmask(torch.tensor([[3.0, 0.0, 0.0, 4.0, 0.0, 0.0, 0.0, 0.0, 0.0, 5.0]]))
    assert packed.values.tolist() == [3, 4, 5]
    assert packed.bits.tolist() == [0b1001_0000, 0b0100_0000]
    assert packed.num_bytes == 3 * 4 + 2


@pytest.mark.parametrize("more_zeros", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("text", ["2:4", "4:8", "1:4", "8:16", "2:3", "3:5"])
def test_unpacked_is_the_same_bit_by_bit(text: str, dtype: torch.dtype, more_zeros: bool) -> None:
    pattern = Pattern.parse(text)
    torch.manual_seed(0)
    dense = torch.randn(7, 16 * 15).to(dtype)  # 7 rows: not always whole bytes
    weight = torch.where(mask_by_row(dense.float().abs(), pattern), dense, 0)
    if more_zeros:
        weight = torch.where(torch.rand(weight.shape) < 0.3, 0, weight)
    zeros = int((weight == 0).sum())
    packed, masked = pack_structured(weight, pattern), pack_bitmask(weight)
    itemsize = dtype.itemsize
    assert packed.num_bytes == structured_bytes((7, 240), itemsize, pattern)
    assert masked.num_bytes == bitmask_bytes((7, 240), itemsize, zeros)
    for again in (unpack(packed), unpack(masked)):
        assert again.dtype == dtype
        assert torch.equal(again.view(torch.uint8), weight.view(torch.uint8))


def test_experts_in_one_tensor() -> None:
    weight = torch.tensor([1.0, 0.0, 0.0, 2.0]).repeat(3, 2, 4)
    assert torch.equal(unpack(pack_structured(weight, TWO_FOUR)), weight)


def test_what_is_not_the_pattern_is_refused() -> None:
    with pytest.raises(ValueError, match="not 2:4"):
        pack_structured(torch.tensor([[1.0, 2.0, 3.0, 0.0]]), TWO_FOUR)


@pytest.mark.parametrize(("group", "bits"), [(2, 1), (3, 2), (4, 2), (5, 3), (8, 3), (16, 4)])
def test_bits_of_an_index(group: int, bits: int) -> None:
    assert index_bits(group) == bits


def test_in_16_bits_the_two_layouts_of_2_4_are_nine_sixteenths() -> None:
    assert structured_bytes((64, 64), 2, TWO_FOUR) == bitmask_bytes((64, 64), 2, 64 * 32) == 64 * 64 * 2 * 9 // 16
