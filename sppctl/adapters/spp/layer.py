"""A frozen linear layer with SPP adapters on it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sppctl.adapters.linear import BranchLinear
from sppctl.adapters.masked import round_under_mask
from sppctl.adapters.spp.config import SppConfig
from sppctl.adapters.spp.kernel import delta_weight, effective_weight, spp_linear

NO_BETA = "ones"  # a buffer: otherwise every forward pass would allocate one and keep it for the backward pass


class SppLinear(BranchLinear[SppConfig]):
    """``base_layer`` (linear, frozen) and, per adapter, alpha (r, in) and beta (out, 1) in float32."""

    adapter_layer_names = ("spp_alpha", "spp_beta")
    spp_alpha: nn.ParameterDict
    spp_beta: nn.ParameterDict

    def create(self, adapter_name: str, config: SppConfig) -> None:
        """Initialises alpha and beta as described in :class:`SppConfig` (``init_weights``).

        Raises:
            ValueError: r is larger than out_features.
        """
        if config.r > self.out_features:
            raise ValueError(f"SPP: r = {config.r} exceeds the {self.out_features} output features of a target layer")
        start, device = config.init_weights, self.weight.device
        alpha = torch.empty(config.r, self.in_features, dtype=torch.float32, device=device)
        nn.init.kaiming_uniform_(alpha, a=math.sqrt(5))  # U(-1/sqrt(in), 1/sqrt(in))
        if start == "ones" or (start and not config.beta):
            nn.init.zeros_(alpha)
        self.spp_alpha[adapter_name] = nn.Parameter(alpha)
        beta = torch.ones(self.out_features, 1, dtype=torch.float32, device=device)
        if not config.beta:
            self.register_buffer(NO_BETA, beta, persistent=False)
            return
        if start is True:
            nn.init.zeros_(beta)
        elif start is False:
            nn.init.normal_(beta)
        self.spp_beta[adapter_name] = nn.Parameter(beta)

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """alpha (r, in) and beta (out, 1); an adapter without beta has ones that are not trained."""
        beta = self.spp_beta[adapter] if adapter in self.spp_beta else getattr(self, NO_BETA)
        return self.spp_alpha[adapter], beta

    def effective_weight(self, weight: Tensor, names: list[str]) -> Tensor:
        """W + the sum of the adapters' s W', with the zeros of W."""
        if len(names) == 1:
            return effective_weight(weight, *self.factors(names[0]), self.scaling[names[0]], weight.dtype)
        total = weight.float()
        for name in names:
            total = total + delta_weight(weight, *self.factors(name), self.scaling[name], torch.float32)
        return round_under_mask(total, weight, weight.dtype)

    def adapted(self, x: Tensor, names: list[str]) -> Tensor:
        """Eq. 5 with the named adapters."""
        return spp_linear(x, self.weight, self.bias, self.branches(names))
