"""A frozen linear layer with SPP adapters on it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sppctl.adapters.linear import SparseLinear
from sppctl.adapters.masked import round_under_mask
from sppctl.adapters.spp.config import SppConfig
from sppctl.adapters.spp.kernel import delta_weight, effective_weight, spp_linear

NO_BETA = "ones"  # a buffer, or every forward pass would make one anew and keep it for the backward pass


class SppLinear(SparseLinear[SppConfig]):
    """``base_layer`` (an ``nn.Linear``, frozen) and, per adapter, alpha (r, in) and beta (out, 1) in float32."""

    adapter_layer_names = ("spp_alpha", "spp_beta")
    other_param_names = ("r", "scaling", "dropout")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: SppConfig) -> None:
        super().__init__(base_layer, adapter_name, config)
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        self.spp_alpha = nn.ParameterDict({})
        self.spp_beta = nn.ParameterDict({})
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: SppConfig) -> None:
        """Adds an adapter, or starts one anew.

        Raises:
            ValueError: r is larger than out_features.
        """
        if config.r > self.out_features:
            raise ValueError(f"SPP: r = {config.r} exceeds the {self.out_features} output features of a target layer")
        self.r[adapter_name] = config.r
        self.scaling[adapter_name] = config.scale
        self.dropout[adapter_name] = config.dropout
        device = self._linear().weight.device
        # float32 whatever the model's dtype: an update of 1e-3 relative to 1 is lost in bfloat16
        self.spp_alpha[adapter_name] = nn.Parameter(
            torch.empty(config.r, self.in_features, dtype=torch.float32, device=device)
        )
        if config.beta:
            self.spp_beta[adapter_name] = nn.Parameter(
                torch.empty(self.out_features, 1, dtype=torch.float32, device=device)
            )
        else:
            self.register_buffer(NO_BETA, torch.ones(self.out_features, 1, device=device), persistent=False)
        self.reset_adapter_parameters(adapter_name, config.init_weights)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_adapter_parameters(self, adapter_name: str, init_weights: bool | str) -> None:
        """Where training starts, as :class:`SppConfig` says of ``init_weights``."""
        alpha = self.spp_alpha[adapter_name]
        nn.init.kaiming_uniform_(alpha, a=math.sqrt(5))  # U(-1/sqrt(in), 1/sqrt(in))
        if adapter_name not in self.spp_beta:
            if init_weights is not False:
                nn.init.zeros_(alpha)
        elif init_weights == "ones":
            nn.init.zeros_(alpha)
            nn.init.ones_(self.spp_beta[adapter_name])
        elif init_weights:
            nn.init.zeros_(self.spp_beta[adapter_name])
        else:
            nn.init.normal_(self.spp_beta[adapter_name])

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """alpha (r, in) and beta (out, 1); without a beta of its own an adapter has ones that are not trained."""
        beta = self.spp_beta[adapter] if adapter in self.spp_beta else getattr(self, NO_BETA)
        return self.spp_alpha[adapter], beta

    def get_delta_weight(self, adapter: str) -> Tensor:
        """s W' (Eq. 4): (out_features, in_features), in the weight's dtype, zero wherever the weight is."""
        weight = self._linear().weight
        return delta_weight(weight, *self.factors(adapter), self.scaling[adapter], weight.dtype)

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
        linear = self._linear()
        adapters = [
            (*self.factors(name), self.scaling[name], self.dropout[name] if self.training else 0.0) for name in names
        ]
        return spp_linear(x, linear.weight, linear.bias, adapters)
