"""Full tuning under the fixed mask (Eq. 3 of arXiv 2405.16057), as a PEFT method."""

from sppctl.adapters.masked_full.config import PEFT_TYPE, MaskedFullConfig
from sppctl.adapters.masked_full.layer import MaskedFullLinear
from sppctl.adapters.masked_full.model import MaskedFullModel
from sppctl.adapters.tuner import register

register(PEFT_TYPE, MaskedFullConfig, MaskedFullModel)

__all__ = ["PEFT_TYPE", "MaskedFullConfig", "MaskedFullLinear", "MaskedFullModel"]
