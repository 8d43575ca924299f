"""Configuration of full tuning under the fixed mask."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from sppctl.adapters.tuner import SparseConfig


class MaskedFullType(enum.StrEnum):
    """The method's name among PEFT's types."""

    MASKED_FULL = "MASKED_FULL"


PEFT_TYPE = MaskedFullType.MASKED_FULL


@dataclass
class MaskedFullConfig(SparseConfig):
    """Configuration of masked full tuning: nothing but the layers, chosen as :class:`SparseConfig` says."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE  # type: ignore[assignment]
