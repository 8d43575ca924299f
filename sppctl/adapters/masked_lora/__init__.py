"""Masked LoRA, W + s (W != 0) * (B A), as a PEFT method: low rank, and every zero stays zero."""

from sppctl.adapters.masked_lora.config import PEFT_TYPE, MaskedLoraConfig
from sppctl.adapters.masked_lora.layer import MaskedLoraLinear
from sppctl.adapters.masked_lora.model import MaskedLoraModel
from sppctl.adapters.tuner import register

register(PEFT_TYPE, MaskedLoraConfig, MaskedLoraModel)

__all__ = ["PEFT_TYPE", "MaskedLoraConfig", "MaskedLoraLinear", "MaskedLoraModel"]
