"""SPP's Triton kernels, and the test that they must pass on a device before they are used there."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from sppctl.fused import FusedKernels
from sppctl.packed.linear import Weight


def fused_for(weight: Weight) -> ModuleType | None:
    """``triton_kernels``, if they can be used for this weight."""
    return KERNELS.usable(weight) if isinstance(weight, Tensor) else None


def check(kernels: ModuleType, device: torch.device | str) -> None:
    """Raises AssertionError if the kernels differ from float64 by more than roundings.

    Args:
        kernels: ``triton_kernels``.
        device: where they run.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = ((100, 272), (3, 272), (100, 1), (100, 272))
    weight, alpha, scaled, moment = (torch.randn(shape, generator=generator) for shape in shapes)
    group = torch.arange(len(weight)) * len(alpha) // len(weight)
    for dtype, base in ((torch.float32, True), (torch.bfloat16, False)):
        values, moments = weight.to(dtype), moment.to(dtype)
        product, scales = moments.double() * values.double(), alpha.double()[group] * scaled.double()
        result, written = moments.to(device), torch.empty_like(moments, device=device)
        gradients = kernels.gradients(result, values.to(device), alpha.to(device), scaled.to(device), base)
        kernels.write(written, values.to(device), alpha.to(device), scaled.to(device), base)
        expected = values.double() * (scales + base)
        sums = (
            torch.zeros(alpha.shape, dtype=torch.float64).index_add_(0, group, product * scaled.double()),
            (product * alpha.double()[group]).sum(1, keepdim=True),
        )
        for gradient, expected_sum in zip(gradients, sums, strict=True):
            torch.testing.assert_close(gradient.cpu().double(), expected_sum, rtol=1e-4, atol=1e-4)
        for output in (result, written):
            # a unit in the last place: rounded to the nearest on a GPU, cut off by Triton's interpreter
            torch.testing.assert_close(output.cpu().double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


KERNELS = FusedKernels(
    "sppctl.adapters.spp.triton_kernels", check, "SPP trains without its fused GPU kernels, more slowly"
)
