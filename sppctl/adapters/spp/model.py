"""PEFT's view of SPP."""

from sppctl.adapters.spp.config import SppConfig
from sppctl.adapters.spp.layer import SppLinear
from sppctl.adapters.tuner import SparseTuner


class SppModel(SparseTuner, config=SppConfig):
    """Replaces the target linear layers of a pruned model by :class:`SppLinear`."""

    prefix = "spp_"
    tuner_layer_cls = SppLinear
