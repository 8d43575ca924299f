"""The moment dy^T x is the plain product, in whatever order its left side is put."""

from __future__ import annotations

import pytest
import torch

from sppctl.adapters import products


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("tokens", [1, 63, 64, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_literal_sum(dtype: torch.dtype, tokens: int, amx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "has_amx", lambda: amx)
    generator = torch.Generator().manual_seed(tokens)
    whole = torch.randint(-4, 5, (tokens, 12), generator=generator).to(dtype)  # sums are exact
    inputs = torch.randint(-4, 5, (tokens, 7), generator=generator).to(dtype)
    for grad_output in (whole, whole[:, 3:8]):
        expected = torch.zeros(grad_output.shape[1], 7, dtype=torch.float64)
        for dy, x in zip(grad_output.double(), inputs.double(), strict=True):
            expected += dy[:, None] * x
        assert torch.equal(products.moment_of(grad_output, inputs), expected.to(dtype))
