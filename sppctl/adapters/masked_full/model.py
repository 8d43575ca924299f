"""PEFT's view of masked full tuning."""

from sppctl.adapters.masked_full.config import MaskedFullConfig
from sppctl.adapters.masked_full.layer import MaskedFullLinear
from sppctl.adapters.tuner import SparseTuner


class MaskedFullModel(SparseTuner, config=MaskedFullConfig):
    """Replaces the target linear layers of a pruned model by :class:`MaskedFullLinear`."""

    prefix = "masked_full_"
    tuner_layer_cls = MaskedFullLinear
