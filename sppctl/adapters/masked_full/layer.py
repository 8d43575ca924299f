"""A linear layer whose kept weights are all trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sppctl.adapters.linear import SparseLinear, only
from sppctl.adapters.masked_full.config import MaskedFullConfig
from sppctl.adapters.masked_full.kernel import effective_weight, masked_linear


class MaskedFullLinear(SparseLinear[MaskedFullConfig]):
    """``base_layer`` (an ``nn.Linear``, frozen: the mask is ``weight != 0``) and a float32 copy of its weight.

    Only one adapter of a layer can be active: weights that replace each other have no sum.
    """

    adapter_layer_names = ("masked_full_weight",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: MaskedFullConfig) -> None:
        super().__init__(base_layer, adapter_name, config)
        self.masked_full_weight = nn.ParameterDict({})
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: MaskedFullConfig) -> None:
        """Adds an adapter, or starts one anew at the pruned weight."""
        values = self._linear().weight.detach().to(torch.float32, copy=True)
        self.masked_full_weight[adapter_name] = nn.Parameter(values)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def start_at(self, adapter_name: str, weight: Tensor) -> None:
        """Starts an adapter at a weight (out, in) that ``base_layer`` holds rounded, with the same zeros."""
        self.masked_full_weight[adapter_name].copy_(weight)

    def effective_weight(self, weight: Tensor, names: list[str]) -> Tensor:
        """The trained weight under the mask of ``weight``.

        Raises:
            ValueError: several adapters.
        """
        return effective_weight(self.masked_full_weight[only(names)], weight, weight.dtype)

    def adapted(self, x: Tensor, names: list[str]) -> Tensor:
        """The product with the trained weight under the mask of the frozen one."""
        linear = self._linear()
        return masked_linear(x, self.masked_full_weight[only(names)], linear.weight, linear.weight, linear.bias)
