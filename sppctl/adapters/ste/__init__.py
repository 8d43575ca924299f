"""Dynamic masks with a straight-through estimator (Eq. 2 of arXiv 2405.16057) and SR-STE decay, as a PEFT method."""

from sppctl.adapters.ste.config import PEFT_TYPE, SteConfig
from sppctl.adapters.ste.layer import SteLinear
from sppctl.adapters.ste.model import SteModel
from sppctl.adapters.tuner import register

register(PEFT_TYPE, SteConfig, SteModel)

__all__ = ["PEFT_TYPE", "SteConfig", "SteLinear", "SteModel"]
