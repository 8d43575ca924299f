"""Configuration of training under dynamic masks."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from sppctl.adapters.tuner import SparseConfig
from sppctl.pattern import Pattern


class SteType(enum.StrEnum):
    """The method's name among PEFT's types."""

    STE = "STE"


PEFT_TYPE = SteType.STE


@dataclass
class SteConfig(SparseConfig):
    """Configuration of dynamic masks; the layers are chosen as :class:`SparseConfig` says.

    Args:
        pattern: N:M of the masks; None: as many weights in each row as the pruned row has.
        patterns: N:M by a layer's full name, where it differs: ``{"model.layers.0.mlp.up_proj": "2:4"}``.
    """

    pattern: str | None = field(default=None, metadata={"help": "N:M of the masks."})
    patterns: dict[str, str] = field(default_factory=dict, metadata={"help": "N:M by full layer name."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE  # type: ignore[assignment]
        for text in [self.pattern, *self.patterns.values()]:
            if text is not None and not Pattern.parse(text).is_structured:
                raise ValueError(f"SteConfig: {text} is not N:M; null keeps the number of weights of each row")
