"""PEFT's view of SPP: which modules are replaced, and by what."""

from __future__ import annotations

from sppctl.adapters.spp.layer import SppLinear
from sppctl.adapters.tuner import SparseTuner


class SppModel(SparseTuner):
    """Replaces the target linear layers of a pruned model by :class:`SppLinear`."""

    prefix = "spp_"
    tuner_layer_cls = SppLinear
