"""A linear layer whose kept weights are all trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sppctl.adapters.config import SparseConfig
from sppctl.adapters.linear import SparseLinear
from sppctl.adapters.masked_full.kernel import effective_weight, masked_linear


class MaskedFullLinear(SparseLinear[SparseConfig]):
    """``base_layer`` (linear, frozen: the mask is ``weight != 0``) and a float32 copy V (out, in) of its weight.

    Only one adapter of a layer can be active: weights that replace each other cannot be summed.
    """

    adapter_layer_names: tuple[str, ...] = ("masked_full_weight",)
    straight_through = False  # whether the gradient reaches weights outside the mask

    def values(self, adapter_name: str) -> nn.Parameter:
        """V of an adapter."""
        values: nn.Parameter = getattr(self, self.adapter_layer_names[0])[adapter_name]
        return values

    def mask(self, adapter_name: str, weight: Tensor) -> Tensor:
        """An adapter's mask (out, in), kept where it is not zero: the pruned weight itself."""
        return weight

    def create(self, adapter_name: str, config: SparseConfig) -> None:
        """Starts at the pruned weight."""
        values = self.weight.detach().to(torch.float32, copy=True)
        getattr(self, self.adapter_layer_names[0])[adapter_name] = nn.Parameter(values)

    @torch.no_grad()
    def start_at(self, adapter_name: str, weight: Tensor) -> None:
        """Starts an adapter at a weight (out, in) that ``base_layer`` holds rounded, with the same zeros."""
        self.values(adapter_name).copy_(weight)

    def effective_weight(self, weight: Tensor, names: list[str]) -> Tensor:
        """The trained weight under its mask.

        Raises:
            ValueError: several adapters.
        """
        name = _only(names)
        return effective_weight(self.values(name), self.mask(name, weight), weight.dtype)

    def adapted(self, x: Tensor, names: list[str]) -> Tensor:
        """The product with the trained weight under its mask."""
        name, weight = _only(names), self.weight
        mask = self.mask(name, weight)
        return masked_linear(x, self.values(name), mask, weight, self.bias, straight_through=self.straight_through)


def _only(names: list[str]) -> str:
    """The name of the only active adapter; raises ValueError if several would each replace the whole weight."""
    if len(names) > 1:
        raise ValueError(f"adapters {', '.join(names)} each replace the whole weight; activate one of them")
    return names[0]
