"""PEFT's view of the adapters: which modules are replaced, and how PEFT finds a method."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from sppctl.adapters.config import SparseConfig
from sppctl.adapters.linear import SparseLinear
from sppctl.files.integrity import mask_digest, masks_digest
from sppctl.packed.linear import BASE_LAYERS, PackedLinear, Weight

# SPP's paper adapts every projection of the blocks: attention q, k, v, o and MLP gate, up, down
DEFAULT_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DENSE = 0.01  # share of zeros below which a layer was not pruned
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

    def __init_subclass__(cls, config: type[SparseConfig]) -> None:
        """Makes a method known to PEFT, which finds it in dictionaries by its type."""
        PEFT_TYPE_TO_CONFIG_MAPPING[config.method] = config  # type: ignore[index]
        PEFT_TYPE_TO_TUNER_MAPPING[config.method] = cls  # type: ignore[index]
        PEFT_TYPE_TO_PREFIX_MAPPING[config.method] = cls.prefix  # type: ignore[index]

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        assert isinstance(peft_config, SparseConfig)
        if peft_config.target_modules is None:
            names = self.target_module_mapping.get(model_config["model_type"], DEFAULT_TARGETS)
            peft_config.target_modules = set(names)
        return peft_config

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """PEFT's method, which wraps the target layers; warns if their zeros are not what the adapter is for."""
        # a copy, because what is set in it below belongs to this model, and the caller may adapt another one with his
        self.peft_config[adapter_name] = copy.copy(self.peft_config[adapter_name])
        result = super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]
        assert isinstance(config, SparseConfig)
        if not config.is_verified:
            check_zeros(model, adapter_name, config)
        return result

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
        assert isinstance(peft_config, SparseConfig)
        config = peft_config.for_layer(current_key)
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, config)
            return
        if not isinstance(target, BASE_LAYERS):
            raise ValueError(
                f"{type(self).__name__} adapts nn.Linear layers; target {current_key} is a {type(target).__name__}"
            )
        if isinstance(target, PackedLinear) and not self.tuner_layer_cls.takes_packed:
            raise ValueError(f"{type(self).__name__} needs dense weights, but {current_key} is packed")
        layer = self.tuner_layer_cls(target, adapter_name, config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """What PEFT enters around every forward pass; a batch with different adapters per row is refused."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                f"adapter_names: {type(self).__name__} has the same adapters for all rows of a batch; call the model "
                "once for each adapter, after set_adapter"
            )
        yield


@torch.no_grad()
def check_zeros(model: nn.Module, adapter_name: str, config: SparseConfig) -> None:
    """Warns of adapted layers that are dense, or whose zeros differ from those that an adapter was made on.

    A new adapter's configuration gets the digest of the zeros. Layers without data (on the meta device, or sharded),
    and quantised ones, are not read.
    """
    layers = {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, SparseLinear) and adapter_name in getattr(module, module.adapter_layer_names[0])
    }
    if not layers or not all(map(_is_readable, layers.values())):
        return
    kind, dense = type(config).__name__, [name for name, weight in layers.items() if _is_dense(weight[:])]
    if dense and config.keeps_zeros:
        others = f" and {len(dense) - 1} more of {len(layers)} adapted layers are" if dense[1:] else " is"
        warnings.warn(
            f"{kind}: {dense[0]}{others} dense; {kind} keeps the zeros of pruned weights, so prune the model before "
            "(sppctl.prune_model, or the command sppctl prune)",
            stacklevel=2,
        )
    digest = masks_digest({name: mask_digest(weight[:]) for name, weight in layers.items()})
    if config.mask_digest not in (None, digest):
        warnings.warn(
            f"{kind}: the weights have other zeros than those that the adapter {adapter_name!r} was trained on "
            f"(mask_digest {config.mask_digest}, here {digest}); load it on the pruned checkpoint that it belongs to",
            stacklevel=2,
        )
    elif config.mask_digest is None:
        config.mask_digest = digest


def _is_readable(weight: Weight) -> bool:
    if not isinstance(weight, Tensor):
        return weight.device.type != "meta"
    return not weight.is_meta and weight.numel() > 0 and weight.is_floating_point()


def _is_dense(weight: Tensor) -> bool:
    return int((weight == 0).sum()) < DENSE * weight.numel()
