"""SPP: Sparsity-Preserved Parameter-efficient fine-tuning (ICML 2024, arXiv 2405.16057), as a PEFT method.

PEFT finds a method through four dictionaries keyed by its type; a plain string is a valid key, so no fork is needed.
"""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from sppctl.adapters.spp.config import PEFT_TYPE, SppConfig
from sppctl.adapters.spp.layer import SppLinear
from sppctl.adapters.spp.model import SppModel

PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = SppConfig  # type: ignore[index]
PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = SppModel  # type: ignore[index]
PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = SppModel.prefix  # type: ignore[index]

__all__ = ["PEFT_TYPE", "SppConfig", "SppLinear", "SppModel"]
