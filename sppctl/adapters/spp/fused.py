"""SPP's Triton kernels, and the test that they must pass on a device before they are used there."""

from __future__ import annotations

import itertools
from types import ModuleType

import torch
from torch import Tensor

from sppctl.fused import FusedKernels
from sppctl.packed.linear import Weight, packed_in


def fused_for(weight: Weight) -> ModuleType | None:
    """``triton_kernels``, if they can be used for this weight."""
    return KERNELS.usable(weight if isinstance(weight, Tensor) else weight.mask)


def check(kernels: ModuleType, device: torch.device | str) -> None:
    """Raises AssertionError if the kernels differ from float64 by more than roundings, on dense or packed weights.

    Args:
        kernels: ``triton_kernels``.
        device: where they run.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = ((100, 272), (3, 272), (100, 1), (100, 272))
    weight, alpha, scaled, moment = (torch.randn(shape, generator=generator) for shape in shapes)
    weight[weight > 0.5] = 0
    group = torch.arange(len(weight)) * len(alpha) // len(weight)
    for dtype, base, packed in itertools.product((torch.float32, torch.bfloat16), (True, False), (True, False)):
        values, moments = weight.to(dtype), moment.to(dtype)
        given = packed_in(values, dtype, torch.device(device)) if packed else values.to(device)
        product, scales = moments.double() * values.double(), alpha.double()[group] * scaled.double()
        result, written = moments.to(device), torch.empty_like(moments, device=device)
        gradients = kernels.gradients(result, given, alpha.to(device), scaled.to(device), base)
        kernels.write(written, given, alpha.to(device), scaled.to(device), base)
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
