"""The fields that the configurations of the methods share, and their PEFT types."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import ClassVar

from peft.config import PeftConfig


class Method(enum.StrEnum):
    """PEFT's enumeration of types cannot be extended; this string enumeration hashes and serialises alike."""

    SPP = "SPP"
    MASKED_LORA = "MASKED_LORA"
    MASKED_FULL = "MASKED_FULL"
    STE = "STE"


@dataclass
class SparseConfig(PeftConfig):
    """The fields of all configurations.

    Args:
        target_modules: names of the linear layers to adapt, or a regular expression, or ``"all-linear"``.
        exclude_modules: names to leave out, or a regular expression.
        modules_to_save: further modules to train and store in full (for example a classifier head).
        mask_digest: a hash of the zeros of the adapted layers, set when an adapter is made. Loading the adapter on
            weights with other zeros warns; without it, nothing is compared.
    """

    method: ClassVar[Method]
    keeps_zeros: ClassVar[bool] = True  # those of the pruned weights; False: training chooses the mask
    is_verified: ClassVar[bool] = False  # set on an object: the weights are known to have the zeros of mask_digest
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    modules_to_save: list[str] | None = None
    mask_digest: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.method  # type: ignore[assignment]
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)

    def for_layer(self, name: str) -> SparseConfig:
        """The configuration of one layer, by its full name."""
        return self


@dataclass
class BranchConfig(SparseConfig):
    """The fields of methods that add a branch to the layer.

    Args:
        r: rank, at least 1.
        scale: s, the weight of the branch (lora_alpha / r of LoRA); positive and finite.
        dropout: probability, below 1, of zeroing an input of the branch while training.
    """

    r: int = 16
    scale: float = 2.0
    dropout: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if self.r < 1:
            raise ValueError(f"{name}: r = {self.r}, but the adapter needs a rank of at least one")
        if not 0 < self.scale < math.inf:
            raise ValueError(f"{name}: scale = {self.scale}, but the adapter branch needs a positive, finite weight")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"{name}: dropout = {self.dropout} is not in [0, 1)")
