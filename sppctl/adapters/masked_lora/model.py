"""PEFT's view of masked LoRA."""

from sppctl.adapters.masked_lora.config import MaskedLoraConfig
from sppctl.adapters.masked_lora.layer import MaskedLoraLinear
from sppctl.adapters.tuner import SparseTuner


class MaskedLoraModel(SparseTuner, config=MaskedLoraConfig):
    """Replaces the target linear layers of a pruned model by :class:`MaskedLoraLinear`."""

    prefix = "masked_lora_"
    tuner_layer_cls = MaskedLoraLinear
