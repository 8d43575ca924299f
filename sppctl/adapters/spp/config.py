"""Configuration of the SPP adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sppctl.adapters.config import BranchConfig, Method


@dataclass
class SppConfig(BranchConfig):
    """Configuration of SPP (Eq. 5), with the fields of :class:`BranchConfig` and :class:`SparseConfig`.

    Args:
        r: rows of alpha; output features are split into r groups that share one row each. ``1 <= r <= out_features``
            of every target; r need not divide out_features.
        beta: False leaves beta out: W' = W * alpha[g], an ablation of the paper.
        init_weights: where training starts. True: at the pruned model, by beta = 0 and alpha ~ U(-1/sqrt(in),
            1/sqrt(in)), or by alpha = 0 where there is no beta. ``"ones"``: at the pruned model too, by beta = 1 and
            alpha = 0. False: elsewhere, with alpha as above and beta ~ N(0, 1). The names of ``train.init``,
            ``"zero_beta"`` and ``"random"``, mean True and False.
    """

    method = Method.SPP
    beta: bool = True
    init_weights: bool | Literal["ones", "zero_beta", "random"] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.init_weights = {"zero_beta": True, "random": False}.get(str(self.init_weights), self.init_weights)
        if self.init_weights in (True, False):
            self.init_weights = bool(self.init_weights)  # 1 and 0 are equal to them
        elif self.init_weights != "ones":
            raise ValueError(
                f"SppConfig: init_weights = {self.init_weights!r} is not one of True or 'zero_beta', 'ones', "
                "False or 'random'"
            )
