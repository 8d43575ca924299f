"""A frozen linear layer with masked LoRA adapters on it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sppctl.adapters.linear import BranchLinear
from sppctl.adapters.masked_lora.config import MaskedLoraConfig
from sppctl.adapters.masked_lora.kernel import effective_weight, masked_lora_linear


class MaskedLoraLinear(BranchLinear[MaskedLoraConfig]):
    """``base_layer`` (linear, frozen) and, per adapter, A (r, in) and B (out, r) in float32."""

    adapter_layer_names = ("masked_lora_A", "masked_lora_B")
    masked_lora_A: nn.ParameterDict  # noqa: N815
    masked_lora_B: nn.ParameterDict  # noqa: N815

    def create(self, adapter_name: str, config: MaskedLoraConfig) -> None:
        """A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0 (or at random, for tests)."""
        device = self.weight.device
        a = torch.empty(config.r, self.in_features, dtype=torch.float32, device=device)
        b = torch.zeros(self.out_features, config.r, dtype=torch.float32, device=device)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        if not config.init_weights:
            nn.init.normal_(b, std=0.1)
        self.masked_lora_A[adapter_name], self.masked_lora_B[adapter_name] = nn.Parameter(a), nn.Parameter(b)

    def effective_weight(self, weight: Tensor, names: list[str]) -> Tensor:
        """W + the sum of s M * (B A), with the zeros of W."""
        return effective_weight(weight, [(*self.factors(name), self.scaling[name]) for name in names], weight.dtype)

    def adapted(self, x: Tensor, names: list[str]) -> Tensor:
        """x W^T + s dropout(x) (M * (B A))^T."""
        return masked_lora_linear(x, self.weight, self.bias, self.branches(names))
