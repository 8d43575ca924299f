"""SPP: Sparsity-Preserved Parameter-efficient fine-tuning (ICML 2024, arXiv 2405.16057), as a PEFT method."""

from sppctl.adapters.spp.config import PEFT_TYPE, SppConfig
from sppctl.adapters.spp.layer import SppLinear
from sppctl.adapters.spp.model import SppModel
from sppctl.adapters.tuner import register

register(PEFT_TYPE, SppConfig, SppModel)

__all__ = ["PEFT_TYPE", "SppConfig", "SppLinear", "SppModel"]
