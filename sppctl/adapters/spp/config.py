"""Configuration of the SPP adapter."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from peft.config import PeftConfig


class SppType(str, enum.Enum):
    """PEFT's own enumeration is closed; a string enumeration of our own hashes and serialises alike."""

    SPP = "SPP"


PEFT_TYPE = SppType.SPP


@dataclass
class SppConfig(PeftConfig):
    """Configuration of SPP.

    Args:
        r: rows of alpha; output features are split into r groups that share one row each. ``1 <= r <= out_features``
            of every target; r need not divide out_features.
        scale: s of Eq. 5, the weight of the adapter branch.
        dropout: probability of zeroing an input of the adapter branch while training (Eq. 5).
        target_modules: names of the linear layers to adapt, or a regular expression, or ``"all-linear"``.
        exclude_modules: names to leave out, or a regular expression.
        init_weights: True starts at the pruned model (beta = 0); False draws beta at random, for tests.
        modules_to_save: further modules to train and store whole (for example a classifier head).
    """

    r: int = field(default=16, metadata={"help": "Rows of alpha."})
    scale: float = field(default=2.0, metadata={"help": "s of Eq. 5."})
    dropout: float = field(default=0.05, metadata={"help": "Dropout on the input of the adapter branch."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Linear layers to adapt."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Layers to leave out."})
    init_weights: bool = field(default=True, metadata={"help": "Start at the pruned model."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Further modules to train whole."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE  # type: ignore[assignment]
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        if self.r < 1:
            raise ValueError(f"SppConfig: r = {self.r}, but alpha needs at least one row")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"SppConfig: dropout = {self.dropout} is not in [0, 1)")
