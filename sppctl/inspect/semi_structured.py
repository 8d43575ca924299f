"""PyTorch's 2:4 kernels: where they can be used, and a model's weights in their format beside the dense ones."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.sparse import (
    SparseSemiStructuredTensor,
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
    to_sparse_semi_structured,
)

AMPERE = (8, 0)  # compute capability of the first GPUs with sparse tensor cores
DTYPES = (torch.float16, torch.bfloat16)


def no_kernel(device_type: str, capability: tuple[int, int], dtype: torch.dtype) -> str | None:
    """Why no 2:4 kernel runs with a GPU's compute capability and a model's dtype; None if one does."""
    if device_type != "cuda":
        return (
            f"no sparse kernel on this device ({device_type}): PyTorch multiplies zeros like any other weight, so a "
            "sparse checkpoint is exactly as fast as a dense one; dense timings only"
        )
    if capability < AMPERE:
        return (
            f"this GPU has no sparse tensor cores (compute capability {'.'.join(map(str, capability))}; they start "
            "with 8.0, Ampere): zeros are multiplied like any other weight; dense timings only"
        )
    if dtype not in DTYPES:
        return f"the 2:4 kernel is measured in float16 and bfloat16, the checkpoint is {dtype}; dense timings only"
    return None


def supports_shape(shape: torch.Size, dtype: torch.dtype) -> bool:
    """Whether the kernel that ``to_sparse_semi_structured`` chooses supports (out_features, in_features)."""
    forced = SparseSemiStructuredTensor._FORCE_CUTLASS
    kernel = SparseSemiStructuredTensorCUTLASS if forced else SparseSemiStructuredTensorCUSPARSELT
    limits = kernel._DTYPE_SHAPE_CONSTRAINTS[dtype]
    return shape[0] % limits.sparse_min_rows == 0 and shape[1] % limits.sparse_min_cols == 0


@dataclass
class TwoWeights:
    """Linear layers with their weight dense (their own parameter) and in the 2:4 format; one of the two is in use."""

    layers: list[tuple[nn.Linear, Tensor, Tensor]] = field(default_factory=list)  # with both weights

    def add(self, layer: nn.Linear) -> None:
        """Converts one more layer; the dense weight stays in the model.

        Raises:
            RuntimeError: the kernel refuses the weight, or to multiply with it on this GPU.
        """
        weight = layer.weight
        converted: Any = to_sparse_semi_structured(weight.detach().contiguous())
        if not self.layers:  # some GPUs fail only here
            nn.functional.linear(weight.new_zeros(8, weight.shape[1]), converted, layer.bias)
        self.layers.append((layer, weight, nn.Parameter(converted, requires_grad=False)))

    def use(self, kind: str) -> None:
        """Puts the ``dense`` or the ``sparse`` weights into the model."""
        for layer, dense, sparse in self.layers:
            layer.weight = sparse if kind == "sparse" else dense
            layer.__dict__.pop("forward", None)
            if kind == "sparse":
                layer.forward = functools.partial(_of_rows, layer)  # type: ignore[method-assign]


def _of_rows(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer on (..., in_features): PyTorch's 2:4 formats multiply matrices only."""
    rows = nn.functional.linear(x.reshape(-1, x.shape[-1]), layer.weight, layer.bias)
    return rows.view(*x.shape[:-1], rows.shape[-1])
