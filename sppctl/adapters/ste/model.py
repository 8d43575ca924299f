"""PEFT's view of dynamic masks."""

from sppctl.adapters.ste.config import SteConfig
from sppctl.adapters.ste.layer import SteLinear
from sppctl.adapters.tuner import SparseTuner


class SteModel(SparseTuner, config=SteConfig):
    """Replaces the target linear layers of a pruned model by :class:`SteLinear`."""

    prefix = "ste_"
    tuner_layer_cls = SteLinear
