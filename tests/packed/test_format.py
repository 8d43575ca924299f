"""The packed layout: by hand, against a literal reader of its bytes, bit for bit for everything that a float holds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sppctl.packed import format as packing
from sppctl.packed.format import PackedWeight, pack, packed_bytes
from sppctl.pattern import Pattern
from sppctl.pruners.masks import mask_by_row

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PATTERNS = ("2:4", "2:8", "4:8", "1:4", "8:16", "0.5", "0.75", "0.9")
RAW = packing.RAW


def random(m: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def pruned(m: int, n: int, pattern: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random weights with the zeros of a pattern; a ratio's are anywhere."""
    weight, scores, parsed = random(m, n), random(m, n, 1), Pattern.parse(pattern)
    if parsed.is_structured:
        mask = mask_by_row(scores, parsed)
    else:
        mask = scores.flatten().argsort().argsort().view(m, n) >= parsed.ratio * m * n
    return (weight * mask.to(weight.dtype)).masked_fill_(~mask, 0).to(dtype)


def raw(weight: Tensor) -> Tensor:
    """The bits, as integers."""
    return weight.contiguous().view(RAW[weight.dtype.itemsize])


def read_literally(packed: PackedWeight) -> Tensor:
    """The bits that the layout's description says, from its tensors alone, a tile at a time."""
    (m, n), mask, values = packed.shape, packed.mask.tolist(), packed.values.tolist()
    weight = torch.zeros(m, n, dtype=packed.values.dtype)
    for row in range(m):
        for tile in range(math.ceil(n / 256)):
            place = int(packed.offsets[row, tile])
            for column in range(256 * tile, min(256 * tile + 256, n)):
                if mask[row][column // 8] >> column % 8 & 1:
                    weight[row, column] = values[place]
                    place += 1
        for column in range(n, 8 * len(mask[row])):
            assert not mask[row][column // 8] >> column % 8 & 1, "padding is zero"
    return weight


def test_a_matrix_by_hand() -> None:
    weight = torch.tensor([[0, 1, 0, 0, 0, 0, 0, -2, 3], [0, 0, 0, 0, 0, 0, 0, 0, 0], [4, 0, 0, 0, 0, 0, 0, 0, 0.0]])
    packed = pack(weight)
    assert packed.mask.tolist() == [[0b10000010, 1], [0, 0], [1, 0]]
    assert packed.values.view(torch.float32).tolist() == [1, -2, 3, 4]
    assert packed.offsets.tolist() == [[0], [3], [3]]
    assert (packed.mask.dtype, packed.values.dtype, packed.offsets.dtype) == (torch.uint8, torch.int32, torch.int32)
    assert packed.num_bytes == 3 * 2 + 4 * 4 + 3 * 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", [(6, 16), (5, 528), (33, 272)])
def test_every_pattern_comes_back_bit_for_bit(shape: tuple[int, int], pattern: str, dtype: torch.dtype) -> None:
    weight = pruned(*shape, pattern, dtype)
    packed = pack(weight)
    assert torch.equal(raw(packed[:]), raw(weight))
    assert torch.equal(read_literally(packed), raw(weight))
    assert (packed.shape, packed.dtype, packed.stored) == (shape, dtype, dtype)
    stored = int((weight != 0).sum())
    assert packed.num_bytes == packed_bytes(*shape, stored, dtype.itemsize)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (3, 255), (3, 257), (13, 41), (2, 1000), (0, 8)])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_any_shape(shape: tuple[int, int], share: float, dtype: torch.dtype) -> None:
    weight = random(*shape).to(dtype)
    weight[torch.rand(shape, generator=torch.Generator().manual_seed(2)) < share] = 0
    packed = pack(weight)
    assert torch.equal(raw(packed[:]), raw(weight))
    assert torch.equal(read_literally(packed), raw(weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", ["2:8", "0.75"])
def test_whatever_bits_a_float_has_are_kept(dtype: torch.dtype, pattern: str) -> None:
    integer = RAW[dtype.itemsize]
    limits = torch.iinfo(integer)
    # -0, subnormal numbers, infinities, and NaNs that are quiet, signalling, negative and with other payloads
    info = torch.finfo(dtype)
    infinity = int(raw(torch.tensor([math.inf], dtype=dtype)))
    special = [limits.min, 1, limits.min + 1, int(raw(torch.tensor([info.tiny], dtype=dtype))) - 1]
    special += [infinity, limits.min + infinity, infinity + 1, limits.max, -1, limits.min + infinity + 3]
    weight = raw(pruned(16, 64, pattern, dtype)).clone()
    places = (weight != 0).nonzero()[: 5 * len(special) : 5]
    for (row, column), bits in zip(places.tolist(), special, strict=True):
        weight[row, column] = bits
    packed = pack(weight.view(dtype))
    assert torch.equal(raw(packed[:]), weight)
    assert torch.equal(read_literally(packed), weight)
    assert len(packed.values) == int((weight != 0).sum()), "-0 is among them"


@pytest.mark.parametrize("pattern", ["2:4", "0.75"])
@pytest.mark.parametrize("n", [24, 264, 41])
def test_any_rows_alone(pattern: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = pruned(20, n, "0.6" if n == 41 else pattern)
    packed = pack(weight)
    for chunk in (1, 3 * n, 1 << 18):
        monkeypatch.setattr(packing, "CHUNK", chunk)
        for start, stop in ((0, 20), (0, 1), (19, 20), (3, 17), (5, 5), (20, 20)):
            assert torch.equal(raw(packed[start:stop]), raw(weight[start:stop]))
            out = torch.full((stop - start, n), torch.nan)
            assert packed.unpack(slice(start, stop), out) is out
            assert torch.equal(raw(out), raw(weight[start:stop]))
        assert torch.equal(raw(pack(weight)[:]), raw(weight))
    assert torch.equal(raw(packed[-3:]), raw(weight[-3:]))


@pytest.mark.parametrize("pattern", ["2:4", "0.75"])
@pytest.mark.parametrize(
    ("stored", "dtype"), [("bfloat16", "float32"), ("float16", "float32"), ("float32", "bfloat16")]
)
def test_unpacking_in_another_dtype_is_a_conversion(pattern: str, stored: str, dtype: str) -> None:
    weight = pruned(8, 64, pattern, getattr(torch, stored))
    weight[0, 0] = -0.0
    wanted = getattr(torch, dtype)
    assert torch.equal(raw(pack(weight).to(wanted)), raw(weight.to(wanted)))
    if wanted == torch.float32:  # the files' dtype is kept, and takes half the memory
        packed = pack(weight, wanted)
        assert (packed.dtype, packed.values.itemsize) == (wanted, 2)
        assert torch.equal(raw(packed[2:5]), raw(weight[2:5].float()))
        assert torch.equal(raw(packed.to(weight.dtype)), raw(weight))


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"torch.bfloat16 cannot represent all values of torch.float32"):
        pack(torch.ones(2, 8), torch.bfloat16)
    with pytest.raises(ValueError, match=r"shape \(3, 0\) has nothing to pack"):
        pack(torch.ones(3, 0))
    with pytest.raises(ValueError, match=r"torch.float16 cannot represent all values of torch.bfloat16"):
        pack(torch.ones(2, 8).bfloat16(), torch.float16)


def test_more_values_than_offsets_can_count_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "MOST_VALUES", 15)
    with pytest.raises(ValueError, match="16 values are more than the 15"):
        pack(torch.ones(2, 8))
    assert len(pack(torch.tensor([[1.0] * 7 + [0]] * 2)).values) == 14


def test_the_bytes_of_bfloat16() -> None:
    """2:4: 9.1 bits of 16; 2:8 and 75 %: 5.1."""
    for pattern, most in (("2:4", 9.2), ("2:8", 5.2), ("0.75", 5.2)):
        packed = pack(pruned(64, 1024, pattern, torch.bfloat16))
        assert 8 * packed.num_bytes / (64 * 1024) < most
