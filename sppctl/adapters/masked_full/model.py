"""PEFT's view of masked full tuning: which modules are replaced, and by what."""

from __future__ import annotations

from sppctl.adapters.masked_full.layer import MaskedFullLinear
from sppctl.adapters.tuner import SparseTuner


class MaskedFullModel(SparseTuner):
    """Replaces the target linear layers of a pruned model by :class:`MaskedFullLinear`."""

    prefix = "masked_full_"
    tuner_layer_cls = MaskedFullLinear
