"""The arithmetic of merging, against the formulas in float64."""

from __future__ import annotations

import pytest
import torch

from sppctl.merge.rules import merged_weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["LORA", "HIRA", "MASKED_LORA"])
def test_an_adapter_of_any_dtype_is_merged_in_float32(kind: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 16, generator=generator) * (torch.rand(24, 16, generator=generator) < 0.5)
    a, b = (torch.randn(shape, generator=generator).to(dtype) for shape in ((4, 16), (24, 4)))
    part = {"LORA": "lora_{}.weight", "HIRA": "hira_{}", "MASKED_LORA": "masked_lora_{}"}[kind]
    tensors = dict(zip((part.format("A"), part.format("B")), (a, b), strict=True))
    settings = {"r": 4, "lora_alpha": 8, "scale": 2.0}
    product, dense = b.double() @ a.double(), weight.double()
    expected = {"LORA": 2 * product, "HIRA": dense * product, "MASKED_LORA": 2 * product * (dense != 0)}[kind] + dense
    mask = "dense" if kind == "LORA" else "keep"
    merged = merged_weight(kind, mask, weight, tensors, settings, torch.float32)
    torch.testing.assert_close(merged.double(), expected, rtol=1e-5, atol=1e-5)
