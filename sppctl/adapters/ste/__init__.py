"""Dynamic masks with a straight-through estimator (Eq. 2 of arXiv 2405.16057) and SR-STE decay, as a PEFT method."""

from sppctl.adapters.ste.config import SteConfig
from sppctl.adapters.ste.layer import SteLinear
from sppctl.adapters.ste.model import SteModel

__all__ = ["SteConfig", "SteLinear", "SteModel"]
