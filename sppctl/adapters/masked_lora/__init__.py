"""Masked LoRA, W + s (W != 0) * (B A), as a PEFT method: low rank, and every zero stays zero."""

from sppctl.adapters.masked_lora.config import MaskedLoraConfig
from sppctl.adapters.masked_lora.layer import MaskedLoraLinear
from sppctl.adapters.masked_lora.model import MaskedLoraModel

__all__ = ["MaskedLoraConfig", "MaskedLoraLinear", "MaskedLoraModel"]
