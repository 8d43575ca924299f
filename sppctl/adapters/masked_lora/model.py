"""PEFT's view of masked LoRA: which modules are replaced, and by what."""

from __future__ import annotations

from sppctl.adapters.masked_lora.layer import MaskedLoraLinear
from sppctl.adapters.tuner import SparseTuner


class MaskedLoraModel(SparseTuner):
    """Replaces the target linear layers of a pruned model by :class:`MaskedLoraLinear`."""

    prefix = "masked_lora_"
    tuner_layer_cls = MaskedLoraLinear
