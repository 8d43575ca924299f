"""Configuration of the SPP adapter."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Literal

from sppctl.adapters.tuner import SparseConfig, check_branch


class SppType(enum.StrEnum):
    """PEFT's own enumeration is closed; a string enumeration of our own hashes and serialises alike."""

    SPP = "SPP"


PEFT_TYPE = SppType.SPP


@dataclass
class SppConfig(SparseConfig):
    """Configuration of SPP; the layers are chosen as :class:`SparseConfig` says.

    Args:
        r: rows of alpha; output features are split into r groups that share one row each. ``1 <= r <= out_features``
            of every target; r need not divide out_features.
        scale: s of Eq. 5, the weight of the adapter branch.
        dropout: probability of zeroing an input of the adapter branch while training (Eq. 5).
        beta: False leaves beta out: W' = W * alpha[g], an ablation of the paper.
        init_weights: where training starts. True: at the pruned model, by beta = 0 and alpha ~ U(-1/sqrt(in),
            1/sqrt(in)), or by alpha = 0 where there is no beta. ``"ones"``: at the pruned model too, by beta = 1 and
            alpha = 0. False: elsewhere, with alpha as above and beta ~ N(0, 1). The names of ``train.init``,
            ``"zero_beta"`` and ``"random"``, mean True and False.
    """

    r: int = field(default=16, metadata={"help": "Rows of alpha."})
    scale: float = field(default=2.0, metadata={"help": "s of Eq. 5."})
    dropout: float = field(default=0.05, metadata={"help": "Dropout on the input of the adapter branch."})
    beta: bool = field(default=True, metadata={"help": "Train beta too."})
    init_weights: bool | Literal["ones", "zero_beta", "random"] = field(
        default=True, metadata={"help": "Start at the pruned model."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE  # type: ignore[assignment]
        check_branch("SppConfig", self.r, self.scale, self.dropout)
        self.init_weights = {"zero_beta": True, "random": False}.get(str(self.init_weights), self.init_weights)
        if self.init_weights not in (True, False, "ones"):
            raise ValueError(
                f"SppConfig: init_weights = {self.init_weights!r} is not one of True or 'zero_beta', 'ones', "
                "False or 'random'"
            )
