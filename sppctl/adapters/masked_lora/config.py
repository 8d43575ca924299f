"""Configuration of the masked LoRA adapter."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from sppctl.adapters.tuner import SparseConfig, check_branch


class MaskedLoraType(enum.StrEnum):
    """The method's name among PEFT's types."""

    MASKED_LORA = "MASKED_LORA"


PEFT_TYPE = MaskedLoraType.MASKED_LORA


@dataclass
class MaskedLoraConfig(SparseConfig):
    """Configuration of masked LoRA; the layers are chosen as :class:`SparseConfig` says.

    Args:
        r: rank of B A; it may exceed the layer's dimensions, to no use.
        scale: s, the weight of the adapter branch (lora_alpha / r of LoRA).
        dropout: probability of zeroing an input of the adapter branch while training.
        init_weights: True starts at the pruned model (B = 0); False draws B at random, for tests.
    """

    r: int = field(default=16, metadata={"help": "Rank of B A."})
    scale: float = field(default=2.0, metadata={"help": "Weight of the adapter branch."})
    dropout: float = field(default=0.05, metadata={"help": "Dropout on the input of the adapter branch."})
    init_weights: bool = field(default=True, metadata={"help": "Start at the pruned model."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE  # type: ignore[assignment]
        check_branch("MaskedLoraConfig", self.r, self.scale, self.dropout)
