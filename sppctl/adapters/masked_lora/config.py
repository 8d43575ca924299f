"""Configuration of the masked LoRA adapter."""

from __future__ import annotations

from dataclasses import dataclass

from sppctl.adapters.config import BranchConfig, Method


@dataclass
class MaskedLoraConfig(BranchConfig):
    """Configuration of masked LoRA, with the fields of :class:`BranchConfig` and :class:`SparseConfig`.

    Args:
        r: rank of B A; it may exceed the layer's dimensions, without any benefit.
        init_weights: True starts at the pruned model (B = 0); False draws B at random, for tests.
    """

    method = Method.MASKED_LORA
    init_weights: bool = True
