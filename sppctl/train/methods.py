"""Training methods by name: their PEFT configurations, and what they do between steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import HiraConfig, LoraConfig, PeftConfig, PeftModel

from sppctl import console
from sppctl.adapters.config import SparseConfig
from sppctl.adapters.masked_full import MaskedFullConfig, MaskedFullLinear
from sppctl.adapters.masked_lora import MaskedLoraConfig
from sppctl.adapters.spp import SppConfig
from sppctl.adapters.ste import SteConfig, SteLinear
from sppctl.config.settings import TrainConfig, Unused, changed_in_vain
from sppctl.files.integrity import masks_digest
from sppctl.files.safe_files import TensorFiles
from sppctl.model.targets import stored_name
from sppctl.pattern import Pattern
from sppctl.train.watch import Hook, Metrics

Patterns = Mapping[str, Pattern]


def ignored(train: TrainConfig) -> list[str]:
    """Changed keys that have no effect, one line per reason."""
    unused = set().union(*(method.keys for method in METHODS.values())) - METHODS[train.method].keys
    found = [Unused(train, "train", unused, f"with train.method={train.method}")]
    if train.scheduler == "constant":
        reason = "with train.scheduler=constant; constant_with_warmup uses it"
        found.append(Unused(train, "train", {"warmup_ratio", "warmup_steps"}, reason))
    elif train.warmup_steps is not None:
        found.append(Unused(train, "train", {"warmup_ratio"}, "with train.warmup_steps"))
    if train.optimizer == "adafactor":
        found.append(Unused(train, "train", {"adam_beta1", "adam_beta2"}, "with train.optimizer=adafactor"))
    if train.distill.teacher is None:
        keys = {"weight", "temperature", "tokens", "hidden"}
        found.append(Unused(train.distill, "train.distill", keys, "without train.distill.teacher"))
    if train.refresh.steps is None:
        found.append(Unused(train.refresh, "train.refresh", {"until", "cycles"}, "without train.refresh.steps"))
    return changed_in_vain(found)


def adapter_config(
    train: TrainConfig, target_modules: list[str], patterns: Patterns, masks: Mapping[str, str] | None = None
) -> PeftConfig:
    """The PEFT configuration of ``train.method`` for linear layers by their full names, some pruned by ``patterns``.

    ``masks``: the recorded digest of each pruned layer's mask; their weights are not read again.
    """
    target_patterns = {name: patterns[name] for name in target_modules if name in patterns}
    config: Any = METHODS[train.method].config(train, target_patterns)
    config.task_type = "CAUSAL_LM"
    config.target_modules = set(target_modules)
    if isinstance(config, SparseConfig) and masks is not None:
        config.is_verified = True  # type: ignore[misc]
        if all(masks.get(name) for name in target_modules):
            config.mask_digest = masks_digest({name: masks[name] for name in target_modules})
    return config


def start_at_stored(model: PeftModel, pruned: Path, prefix: str) -> None:
    """Starts trained copies of weights at the values in ``pruned``, where a converted model holds them rounded.

    ``prefix`` is missing from the names in a headless checkpoint.
    """
    files = TensorFiles(pruned)
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, MaskedFullLinear):  # SteLinear is one
            stored = stored_name(files, f"{name}.weight", prefix)
            if files.spec(stored).dtype != layer.weight.dtype:
                for adapter in layer.active_adapters:
                    layer.start_at(adapter, files.read(stored))


def hooks(train: TrainConfig, max_steps: int) -> list[Hook]:
    """The method's hooks around the optimizer steps."""
    return [MaskSelection(train.mask_steps, train.mask_decay, max_steps)] if train.method == "ste" else []


@dataclass(frozen=True)
class Method:
    """One way of training."""

    keys: set[str]  # keys of ``train`` that it uses and some other method does not
    config: Callable[[TrainConfig, Patterns], Any]  # (section, patterns of the layers) -> PEFT configuration


def _branch(train: TrainConfig) -> dict[str, Any]:
    return {"r": train.rank, "scale": train.scale, "dropout": train.dropout}


# PEFT annotates lora_alpha as an integer, but only divides it by r
METHODS = {
    "spp": Method(
        {"rank", "scale", "dropout", "beta", "init"},
        lambda train, _: SppConfig(**_branch(train), beta=train.beta, init_weights=train.init),
    ),
    "lora": Method(
        {"rank", "scale", "dropout"},
        lambda train, _: LoraConfig(
            r=train.rank,
            lora_alpha=train.scale * train.rank,  # type: ignore[arg-type]
            lora_dropout=train.dropout,
        ),
    ),
    "hira": Method({"rank", "dropout"}, lambda train, _: HiraConfig(r=train.rank, hira_dropout=train.dropout)),
    "masked_lora": Method({"rank", "scale", "dropout"}, lambda train, _: MaskedLoraConfig(**_branch(train))),
    "masked_full": Method(set(), lambda *_: MaskedFullConfig()),
    "ste": Method(
        {"mask_steps", "mask_decay"},
        lambda _, patterns: SteConfig(patterns={name: str(p) for name, p in patterns.items() if p.is_structured}),
    ),
}


class MaskSelection(Hook):
    """Dynamic masks: decays pruned weights in every optimizer step, and re-selects the masks every ``steps`` steps."""

    def __init__(self, steps: int, decay: float, max_steps: int) -> None:
        self.steps, self.decay, self.max_steps = steps, decay, max_steps

    def before_update(self, model: PeftModel) -> None:
        """Adds the decay once per optimizer step, after gradient clipping."""
        for layer in _ste_layers(model):
            for name in layer.active_adapters:
                layer.add_decay(name, self.decay)

    def after_step(self, model: PeftModel, step: int) -> Metrics:
        """Re-selects before a checkpoint is written; not after the last step, since no training follows."""
        if step % self.steps or step >= self.max_steps:
            return {}
        dropped = sum(layer.select_mask(name) for layer in _ste_layers(model) for name in layer.active_adapters)
        console.note(f"step {step}: {dropped:,} weights of the masks were exchanged")
        return {"mask_changes": dropped}


def _ste_layers(model: PeftModel) -> list[SteLinear]:
    return [module for module in model.modules() if isinstance(module, SteLinear)]
