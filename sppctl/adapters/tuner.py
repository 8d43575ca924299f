"""PEFT's view of the adapters: which modules are replaced, and how PEFT finds a method."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from sppctl.adapters.linear import SparseLinear

# SPP's paper adapts every projection of the blocks: attention q, k, v, o and MLP gate, up, down
DEFAULT_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS_BY_MODEL_TYPE = {
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
}


class SparseTuner(BaseTuner):
    """Replaces the target linear layers of a pruned model by those of a method."""

    prefix: str
    tuner_layer_cls: type[SparseLinear[Any]]
    target_module_mapping = TARGETS_BY_MODEL_TYPE

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        assert isinstance(peft_config, SparseConfig)
        if peft_config.target_modules is None:
            names = self.target_module_mapping.get(model_config["model_type"], DEFAULT_TARGETS)
            peft_config.target_modules = set(names)  # type: ignore[assignment]
        return peft_config

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config = self._layer_config(peft_config, current_key)
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, config)
            return
        if not isinstance(target, nn.Linear):
            raise ValueError(
                f"{type(self).__name__} adapts nn.Linear layers; target {current_key} is a {type(target).__name__}"
            )
        layer = self.tuner_layer_cls(target, adapter_name, config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """What PEFT enters around every forward pass; a batch whose rows have adapters of their own is refused."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                f"adapter_names: {type(self).__name__} has the same adapters for all rows of a batch; call the model "
                "once for each adapter, after set_adapter"
            )
        yield

    def _layer_config(self, peft_config: PeftConfig, name: str) -> PeftConfig:
        """The configuration for the layer of that name."""
        return peft_config


@dataclass
class SparseConfig(PeftConfig):
    """What the configurations of all methods hold.

    Args:
        target_modules: names of the linear layers to adapt, or a regular expression, or ``"all-linear"``.
        exclude_modules: names to leave out, or a regular expression.
        modules_to_save: further modules to train and store whole (for example a classifier head).
    """

    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Linear layers to adapt."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Layers to leave out."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Further modules to train whole."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]


def check_branch(name: str, r: int, scale: float, dropout: float) -> None:
    """Raises ValueError for a rank below 1, a scale that is not a positive number, or a dropout outside [0, 1)."""
    if r < 1:
        raise ValueError(f"{name}: r = {r}, but the adapter needs a rank of at least one")
    if not 0 < scale < math.inf:
        raise ValueError(f"{name}: scale = {scale}, but the adapter branch needs a positive, finite weight")
    if not 0 <= dropout < 1:
        raise ValueError(f"{name}: dropout = {dropout} is not in [0, 1)")


def register(peft_type: enum.Enum, config: type[SparseConfig], tuner: type[SparseTuner]) -> None:
    """Makes a method known to PEFT.

    PEFT finds a method through dictionaries keyed by its type; its own enumeration is closed, but any string
    enumeration hashes and serialises alike, so no fork is needed.
    """
    PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config  # type: ignore[index]
    PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = tuner  # type: ignore[index]
    PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = tuner.prefix  # type: ignore[index]
