"""A frozen linear layer with masked LoRA adapters on it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sppctl.adapters.linear import SparseLinear
from sppctl.adapters.masked_lora.config import MaskedLoraConfig
from sppctl.adapters.masked_lora.kernel import delta_weight, effective_weight, masked_lora_linear


class MaskedLoraLinear(SparseLinear[MaskedLoraConfig]):
    """``base_layer`` (an ``nn.Linear``, frozen) and, per adapter, A (r, in) and B (out, r) in float32."""

    adapter_layer_names = ("masked_lora_A", "masked_lora_B")
    other_param_names = ("r", "scaling", "dropout")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: MaskedLoraConfig) -> None:
        super().__init__(base_layer, adapter_name, config)
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        self.masked_lora_A = nn.ParameterDict({})
        self.masked_lora_B = nn.ParameterDict({})
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: MaskedLoraConfig) -> None:
        """Adds an adapter, or starts one anew: A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0 (or at random, for tests)."""
        self.r[adapter_name] = config.r
        self.scaling[adapter_name] = config.scale
        self.dropout[adapter_name] = config.dropout
        # float32 whatever the model's dtype: a small step is lost in bfloat16
        device = self._linear().weight.device
        self.masked_lora_A[adapter_name] = nn.Parameter(
            torch.empty(config.r, self.in_features, dtype=torch.float32, device=device)
        )
        self.masked_lora_B[adapter_name] = nn.Parameter(
            torch.zeros(self.out_features, config.r, dtype=torch.float32, device=device)
        )
        nn.init.kaiming_uniform_(self.masked_lora_A[adapter_name], a=math.sqrt(5))
        if not config.init_weights:
            nn.init.normal_(self.masked_lora_B[adapter_name], std=0.1)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """s M * (B A): (out_features, in_features), in the weight's dtype, zero wherever the weight is."""
        weight = self._linear().weight
        a, b = self.masked_lora_A[adapter], self.masked_lora_B[adapter]
        return delta_weight(weight, a, b, self.scaling[adapter], weight.dtype)

    def effective_weight(self, weight: Tensor, names: list[str]) -> Tensor:
        """W + the sum of s M * (B A), with the zeros of W."""
        adapters = [(self.masked_lora_A[name], self.masked_lora_B[name], self.scaling[name]) for name in names]
        return effective_weight(weight, adapters, weight.dtype)

    def adapted(self, x: Tensor, names: list[str]) -> Tensor:
        """x W^T + s dropout(x) (M * (B A))^T."""
        linear = self._linear()
        adapters = [
            (
                self.masked_lora_A[name],
                self.masked_lora_B[name],
                self.scaling[name],
                self.dropout[name] if self.training else 0.0,
            )
            for name in names
        ]
        return masked_lora_linear(x, linear.weight, linear.bias, adapters)
