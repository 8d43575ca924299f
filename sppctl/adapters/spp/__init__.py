"""SPP: Sparsity-Preserved Parameter-efficient fine-tuning (ICML 2024, arXiv 2405.16057), as a PEFT method."""

from sppctl.adapters.spp.config import SppConfig
from sppctl.adapters.spp.layer import SppLinear
from sppctl.adapters.spp.model import SppModel

__all__ = ["SppConfig", "SppLinear", "SppModel"]
