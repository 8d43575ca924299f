"""Configuration of training under dynamic masks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from sppctl.adapters.config import Method, SparseConfig
from sppctl.pattern import Pattern


@dataclass
class SteConfig(SparseConfig):
    """Configuration of dynamic masks; the layers are selected as in :class:`SparseConfig`.

    Args:
        pattern: N:M of the masks; None: as many weights in each row as the pruned row has.
        patterns: N:M by a layer's full name, where it differs: ``{"model.layers.0.mlp.up_proj": "2:4"}``.
    """

    method = Method.STE
    keeps_zeros = False
    pattern: str | None = None
    patterns: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        for text in [self.pattern, *self.patterns.values()]:
            if text is not None and not Pattern.parse(text).is_structured:
                raise ValueError(f"SteConfig: {text} is not N:M; null keeps the number of weights of each row")

    def for_layer(self, name: str) -> SteConfig:
        """With the pattern of one layer."""
        return replace(self, pattern=self.patterns.get(name, self.pattern))
