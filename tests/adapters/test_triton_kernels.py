"""SPP's GPU kernels: on a GPU if there is one, else in Triton's interpreter, which cuts bfloat16 off unrounded."""

from __future__ import annotations

import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import without_interpreter

from sppctl.adapters.spp import fused, kernel
from sppctl.adapters.spp.kernel import effective_weight, row_groups, spp_linear
from sppctl.packed.format import RAW
from sppctl.packed.linear import Weight, packed_in

SHAPES = [(64, 300, 2), (70, 300, 3), (13, 8, 4), (16, 8, 16), (33, 257, 1)]  # out, in, r: dividing and not
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def kernels() -> types.ModuleType:
    pytest.importorskip("triton", reason="Triton is not installed")
    from sppctl.adapters.spp import triton_kernels

    return triton_kernels


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_they_equal_the_formulas_in_float64(
    shape: tuple[int, int, int], base: bool, dtype: torch.dtype, kernels: types.ModuleType
) -> None:
    out_features, in_features, r = shape
    generator = torch.Generator(DEVICE).manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator, device=DEVICE)
    weight = weight.masked_fill_(torch.rand(weight.shape, generator=generator, device=DEVICE) < 0.5, 0).to(dtype)
    alpha = torch.randn(r, in_features, generator=generator, device=DEVICE)
    scaled = torch.randn(out_features, 1, generator=generator, device=DEVICE)
    moment = torch.randn(weight.shape, generator=generator, device=DEVICE).to(dtype)
    product, group = moment.double() * weight.double(), row_groups(out_features, r, DEVICE)
    expected = weight.double() * (alpha.double()[group] * scaled.double() + base)

    written = torch.full_like(weight, torch.nan)
    kernels.write(written, weight, alpha, scaled, base)
    grad_alpha, row_sums = kernels.gradients(moment, weight, alpha, scaled, base)

    torch.testing.assert_close(written.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(moment, written)
    assert torch.equal(written == 0, weight == 0)
    over_group = torch.stack([(product * scaled.double())[group == row].sum(0) for row in range(r)])
    torch.testing.assert_close(grad_alpha.double(), over_group, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        row_sums.double(), (product * alpha.double()[group]).sum(1, keepdim=True), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("shape", [(70, 300, 3), (16, 8, 16), (40, 515, 2)])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtypes", ["float32", "float16", "bfloat16", "bfloat16 in float32"])
def test_a_packed_weight_gives_the_bits_of_the_dense_one(
    shape: tuple[int, int, int], density: float, dtypes: str, kernels: types.ModuleType
) -> None:
    stored, dtype = (getattr(torch, name) for name in (dtypes.split()[0], dtypes.split()[-1]))
    out_features, in_features, r = shape
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(out_features, in_features, generator=generator)
    weight[torch.rand(weight.shape, generator=generator) >= density] = 0
    weight[2, 1:5] = torch.tensor([-0.0, 1e-40, 6e-8, 3e4])
    if stored != dtype and DEVICE == "cpu":
        weight[2, 2] = 0  # the interpreter widens subnormal bfloat16 numbers wrongly
    packed = packed_in(weight.to(stored), dtype, torch.device(DEVICE))
    alpha = torch.randn(r, in_features, generator=generator).to(DEVICE)
    scaled = torch.randn(out_features, 1, generator=generator).to(DEVICE)
    moments = torch.randn(weight.shape, generator=generator).to(dtype)
    for base in (True, False):
        results = []
        for one in (weight.to(stored).to(DEVICE, dtype), packed):
            moment, written = moments.to(DEVICE, copy=True), torch.full(weight.shape, torch.nan).to(DEVICE, dtype)
            kernels.write(written, one, alpha, scaled, base)
            results.append([written, *kernels.gradients(moment, one, alpha, scaled, base), moment])
        for one, other in zip(*results, strict=True):
            raw = RAW[one.itemsize]
            assert torch.equal(one.contiguous().view(raw), other.contiguous().view(raw))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_that_uses_them_equals_one_that_does_not(
    dropout: float, dtype: torch.dtype, kernels: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator(DEVICE).manual_seed(1)
    weight = torch.randn(70, 300, generator=generator, device=DEVICE).to(dtype)
    x = torch.randn(9, 300, generator=generator, device=DEVICE).to(dtype).requires_grad_()
    alpha = torch.rand(4, 300, generator=generator, device=DEVICE, requires_grad=True)
    beta = torch.randn(70, 1, generator=generator, device=DEVICE, requires_grad=True)

    def everything(weight: Weight) -> list[torch.Tensor]:
        torch.manual_seed(3)  # of the dropout masks
        y = spp_linear(x, weight, None, [(alpha, beta, 2.0, dropout)])
        gradients = torch.autograd.grad(y, (x, alpha, beta), torch.ones_like(y))
        return [y, *gradients]

    monkeypatch.setattr(kernel, "fused_for", lambda _: None)
    plain = [*everything(weight), effective_weight(weight, alpha, beta, 2.0, dtype)]
    monkeypatch.setattr(kernel, "fused_for", lambda _: kernels)
    dense = [*everything(weight), effective_weight(weight, alpha, beta, 2.0, dtype)]
    for one, other in zip(dense, plain, strict=True):
        assert (one - other).norm() <= max(torch.finfo(dtype).eps, 1e-6) * other.norm()
    for one, other in zip(everything(packed_in(weight, dtype, weight.device)), dense, strict=False):
        assert torch.equal(one, other)


def test_the_check_accepts_them_and_notices_a_wrong_result(kernels: types.ModuleType) -> None:
    fused.check(kernels, DEVICE)

    def doubled(*args: Any) -> list[torch.Tensor]:
        return [2 * one for one in kernels.gradients(*args)]

    wrong = types.SimpleNamespace(write=kernels.write, gradients=doubled)
    with pytest.raises(AssertionError, match="not close"):
        fused.check(wrong, DEVICE)


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from sppctl.adapters.spp import triton_kernels as kernels

for kernel, gradient in ((kernels._write_kernel, False), (kernels._gradient_kernel, True)):
  for packed in (False, True):
    memory = ["*u8", "*i32"] if packed else ["constexpr"] * 2
    sums = ["*fp32"] * 2 * gradient
    types = ["*bf16"] * 2 + memory + ["*fp32"] * 2 + sums + ["i32"] * 4 + ["constexpr"]
    constants = {"base": True} | ({} if packed else {"mask": None, "offsets": None})
    source = ASTSource(kernel, dict(zip(kernel.arg_names, types, strict=True)), constants)
    for capability in (80, 90):
        made = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": kernels.WARPS})
        print(len(made.asm["cubin"]))
"""


@pytest.mark.slow
def test_they_compile_for_gpus(kernels: types.ModuleType, tmp_path: Path) -> None:
    sizes = without_interpreter(COMPILE, tmp_path).split()
    assert len(sizes) == 8
    assert all(int(size) > 1000 for size in sizes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_they_are_used() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fused.fused_for(torch.zeros(64, 64, device="cuda")) is not None
