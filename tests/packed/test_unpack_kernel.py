"""Packed weights unpacked by the GPU kernel: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import types
import warnings
from pathlib import Path

import pytest
import torch
from processes import without_interpreter

from sppctl.packed import format as packed_format
from sppctl.packed.format import RAW
from sppctl.packed.linear import packed_in

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def kernels() -> types.ModuleType:
    pytest.importorskip("triton", reason="Triton is not installed")
    from sppctl.packed import triton_kernels

    return triton_kernels


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(70, 256), (3, 8), (33, 515), (5, 1)])
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_any_rows_are_the_stored_bits(
    stored: torch.dtype,
    shape: tuple[int, int],
    density: float,
    kernels: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Any bits: negative zeros, subnormal numbers, infinities and all kinds of NaN."""
    monkeypatch.setattr(packed_format, "KERNELS", types.SimpleNamespace(usable=lambda _: kernels))
    generator, raw = torch.Generator().manual_seed(0), RAW[stored.itemsize]
    numbers = torch.randint(torch.iinfo(raw).min, torch.iinfo(raw).max, shape, generator=generator, dtype=raw)
    numbers[torch.rand(shape, generator=generator) >= density] = 0
    packed = packed_in(numbers.view(stored), stored, DEVICE)
    for rows in (slice(None), slice(1, 3), slice(2, 2), slice(shape[0] - 1, None)):
        assert torch.equal(packed[rows].cpu().view(raw), numbers[rows])


def test_a_wider_dtype_has_the_same_values(kernels: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_format, "KERNELS", types.SimpleNamespace(usable=lambda _: kernels))
    weight = torch.randn(20, 300, generator=torch.Generator().manual_seed(1)).relu().bfloat16()
    packed = packed_in(weight, torch.float32, DEVICE)
    assert torch.equal(packed[3:19].cpu(), weight[3:19].float())
    assert torch.equal(packed.to(torch.float16).cpu(), weight.float().half())  # rounded by PyTorch


def test_the_check_accepts_it_and_notices_a_wrong_result(kernels: types.ModuleType) -> None:
    packed_format.check(kernels, DEVICE)

    def unpack(weight: packed_format.PackedWeight, rows: slice, out: torch.Tensor) -> None:
        kernels.unpack(weight, rows, out)
        out[3, 7] += 1

    with pytest.raises(AssertionError, match="unpacked wrongly"):
        packed_format.check(types.SimpleNamespace(unpack=unpack), DEVICE)  # type: ignore[arg-type]


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from sppctl.packed import triton_kernels as kernels

for out, values in (("*i16", "*i16"), ("*fp32", "*bf16")):
    types = [out, values, "*u8", "*i32", "i32", "i32"]
    source = ASTSource(kernels._unpack_kernel, dict(zip(kernels._unpack_kernel.arg_names, types, strict=True)))
    for capability in (80, 90):
        made = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": kernels.WARPS})
        print(len(made.asm["cubin"]))
"""


@pytest.mark.slow
def test_it_compiles_for_gpus(kernels: types.ModuleType, tmp_path: Path) -> None:
    sizes = without_interpreter(COMPILE, tmp_path).split()
    assert len(sizes) == 4
    assert all(int(size) > 1000 for size in sizes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_it_is_used() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert packed_format.KERNELS.usable(torch.zeros(64, 64, device="cuda")) is not None
