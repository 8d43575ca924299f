"""A frozen linear layer with SPP adapters on it."""

from __future__ import annotations

import math
import warnings
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from sppctl.adapters.spp.config import SppConfig
from sppctl.adapters.spp.kernel import delta_weight, effective_weight, spp_linear


class SppLinear(nn.Module, BaseTunerLayer):
    """``base_layer`` (an ``nn.Linear``, frozen) and, per adapter, alpha (r, in) and beta (out, 1) in float32."""

    adapter_layer_names = ("spp_alpha", "spp_beta")
    other_param_names = ("r", "scaling", "dropout")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: SppConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        linear = self._linear()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        self.spp_alpha = nn.ParameterDict({})
        self.spp_beta = nn.ParameterDict({})
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._weight_before_merge: Tensor | None = None
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def _linear(self) -> nn.Linear:
        linear = self.get_base_layer()
        assert isinstance(linear, nn.Linear)
        return linear

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
        self.spp_beta[adapter_name] = nn.Parameter(
            torch.empty(self.out_features, 1, dtype=torch.float32, device=device)
        )
        self.reset_adapter_parameters(adapter_name, config.init_weights)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_adapter_parameters(self, adapter_name: str, init_weights: bool) -> None:
        """alpha ~ U(-1/sqrt(in), 1/sqrt(in)) (Kaiming-uniform, a = sqrt 5); beta = 0, or random for tests."""
        nn.init.kaiming_uniform_(self.spp_alpha[adapter_name], a=math.sqrt(5))
        if init_weights:
            nn.init.zeros_(self.spp_beta[adapter_name])
        else:
            nn.init.normal_(self.spp_beta[adapter_name])

    def get_delta_weight(self, adapter: str) -> Tensor:
        """s W' (Eq. 4): (out_features, in_features), in the weight's dtype, zero wherever the weight is."""
        weight = self._linear().weight
        alpha, beta = self.spp_alpha[adapter], self.spp_beta[adapter]
        return delta_weight(weight, alpha, beta, self.scaling[adapter], weight.dtype)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Puts the effective weight into the base layer; the pattern of zeros does not change.

        Args:
            safe_merge: refuse a result that is not finite.
            adapter_names: adapters to merge; the active ones if None.

        Raises:
            ValueError: safe_merge found a value that is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.spp_alpha]
        if not names:
            return
        linear = self._linear()
        source = linear.weight.data if self._weight_before_merge is None else self._weight_before_merge
        every = [*self.merged_adapters, *names]
        if len(every) == 1:
            alpha, beta = self.spp_alpha[every[0]], self.spp_beta[every[0]]
            merged = effective_weight(source, alpha, beta, self.scaling[every[0]], source.dtype)
        else:
            total = source.float()
            for name in every:
                alpha, beta = self.spp_alpha[name], self.spp_beta[name]
                total = total + delta_weight(source, alpha, beta, self.scaling[name], torch.float32)
            merged = total.to(source.dtype)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"merging {', '.join(names)} gives values that are not finite; the adapter is broken")
        self._weight_before_merge = source
        linear.weight.data = merged
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Restores the weight as it was before the first merge, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        assert self._weight_before_merge is not None
        self._linear().weight.data = self._weight_before_merge
        self._weight_before_merge = None
        self.merged_adapters.clear()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in_features) to (..., out_features), under the active adapters (Eq. 5)."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return cast(Tensor, self.base_layer(x, *args, **kwargs))
        active = [name for name in self.active_adapters if name in self.spp_alpha]
        if self.merged or not active:
            return cast(Tensor, self.base_layer(x, *args, **kwargs))
        linear = self._linear()
        adapters = [
            (
                self.spp_alpha[name],
                self.spp_beta[name],
                self.scaling[name],
                self.dropout[name] if self.training else 0.0,
            )
            for name in active
        ]
        return spp_linear(x, linear.weight, linear.bias, adapters)

    def __repr__(self) -> str:
        return "spp." + super().__repr__()
