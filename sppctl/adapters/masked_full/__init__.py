"""Full tuning under the fixed mask (Eq. 3 of arXiv 2405.16057), as a PEFT method."""

from sppctl.adapters.masked_full.config import MaskedFullConfig
from sppctl.adapters.masked_full.layer import MaskedFullLinear
from sppctl.adapters.masked_full.model import MaskedFullModel

__all__ = ["MaskedFullConfig", "MaskedFullLinear", "MaskedFullModel"]
