"""The methods of training by name: which PEFT configuration each of them means."""

from __future__ import annotations

from collections.abc import Callable

from peft import PeftConfig

from sppctl.adapters.spp import SppConfig
from sppctl.settings import TrainConfig


def adapter_config(train: TrainConfig, target_modules: list[str]) -> PeftConfig:
    """The PEFT configuration of ``train.method`` for the given linear layers."""
    return METHODS[train.method](train, target_modules)


def _spp(train: TrainConfig, target_modules: list[str]) -> PeftConfig:
    return SppConfig(
        r=train.rank,
        scale=train.scale,
        dropout=train.dropout,
        target_modules=target_modules,
        task_type="CAUSAL_LM",
    )


METHODS: dict[str, Callable[[TrainConfig, list[str]], PeftConfig]] = {"spp": _spp}
