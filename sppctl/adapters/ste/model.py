"""PEFT's view of dynamic masks: which modules are replaced, and by what."""

from __future__ import annotations

from dataclasses import replace

from peft.config import PeftConfig

from sppctl.adapters.ste.config import SteConfig
from sppctl.adapters.ste.layer import SteLinear
from sppctl.adapters.tuner import SparseTuner


class SteModel(SparseTuner):
    """Replaces the target linear layers of a pruned model by :class:`SteLinear`."""

    prefix = "ste_"
    tuner_layer_cls = SteLinear

    def _layer_config(self, peft_config: PeftConfig, name: str) -> PeftConfig:
        assert isinstance(peft_config, SteConfig)
        return replace(peft_config, pattern=peft_config.patterns.get(name, peft_config.pattern))
