"""PEFT's view of SPP: which modules are replaced, and by what."""

from __future__ import annotations

from typing import Any

from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from sppctl.adapters.spp.config import SppConfig
from sppctl.adapters.spp.layer import SppLinear

# the paper adapts every projection of the blocks: attention q, k, v, o and MLP gate, up, down
DEFAULT_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS_BY_MODEL_TYPE = {
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
}


class SppModel(BaseTuner):
    """Replaces the target linear layers of a pruned model by :class:`SppLinear`."""

    prefix = "spp_"
    tuner_layer_cls = SppLinear
    target_module_mapping = TARGETS_BY_MODEL_TYPE

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        assert isinstance(peft_config, SppConfig)
        if peft_config.target_modules is None:
            names = self.target_module_mapping.get(model_config["model_type"], DEFAULT_TARGETS)
            peft_config.target_modules = set(names)  # type: ignore[assignment]
        return peft_config

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, SppConfig)
        if isinstance(target, SppLinear):
            target.update_layer(adapter_name, peft_config)
            return
        if not isinstance(target, nn.Linear):
            raise ValueError(f"SPP adapts nn.Linear layers; target {current_key} is a {type(target).__name__}")
        layer = SppLinear(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)
