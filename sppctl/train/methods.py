"""The methods of training by name: which PEFT configuration each of them means, and what it does between steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import HiraConfig, LoraConfig, PeftConfig, PeftModel

from sppctl import console
from sppctl.adapters.masked_full import MaskedFullConfig, MaskedFullLinear
from sppctl.adapters.masked_lora import MaskedLoraConfig
from sppctl.adapters.spp import SppConfig
from sppctl.adapters.ste import SteConfig, SteLinear
from sppctl.config.settings import TrainConfig
from sppctl.files.safe_files import TensorFiles
from sppctl.model.targets import stored_name
from sppctl.pattern import Pattern
from sppctl.train.watch import Figures, Hook

Patterns = Mapping[str, Pattern]


def ignored(train: TrainConfig) -> list[str]:
    """Which keys were changed to no effect, one line for each reason."""
    unused = set().union(*(method.keys for method in METHODS.values())) - METHODS[train.method].keys
    sections: list[tuple[str, Any, set[str], str]] = [("", train, unused, f"with train.method={train.method}")]
    if train.distill.teacher is None:
        sections.append(("distill.", train.distill, {"weight", "temperature"}, "without train.distill.teacher"))
    if train.refresh.steps is None:
        sections.append(("refresh.", train.refresh, {"until", "cycles"}, "without train.refresh.steps"))
    lines = []
    for prefix, section, keys, reason in sections:
        usual = type(section)()
        changed = sorted(f"train.{prefix}{key}" for key in keys if getattr(section, key) != getattr(usual, key))
        if changed:
            lines.append(f"{', '.join(changed)}: no effect {reason}")
    return lines


def adapter_config(train: TrainConfig, target_modules: list[str], patterns: Patterns) -> PeftConfig:
    """The PEFT configuration of ``train.method`` for linear layers by their full names, some pruned by ``patterns``."""
    trained = {name: patterns[name] for name in target_modules if name in patterns}
    config: Any = METHODS[train.method].config(train, trained)
    config.task_type = "CAUSAL_LM"
    config.target_modules = set(target_modules)
    return config


def start_at_stored(model: PeftModel, pruned: Path, prefix: str) -> None:
    """Starts trained copies of weights at what ``pruned`` stores, where the model was converted: it holds them rounded.

    ``prefix`` is what a headless checkpoint's names lack.
    """
    files = TensorFiles(pruned)
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, MaskedFullLinear):  # SteLinear is one
            stored = stored_name(files, f"{name}.weight", prefix)
            if files.spec(stored).dtype != layer.weight.dtype:
                for adapter in layer.active_adapters:
                    layer.start_at(adapter, files.read(stored))


def hooks(train: TrainConfig, max_steps: int) -> list[Hook]:
    """What the method does around the optimizer steps."""
    return [MaskSelection(train.mask_steps, train.mask_decay, max_steps)] if train.method == "ste" else []


@dataclass(frozen=True)
class Method:
    """One way of training."""

    keys: set[str]  # those that it uses of the keys of ``train`` that not every method uses
    config: Callable[[TrainConfig, Patterns], Any]  # makes its PEFT configuration of section and patterns of the layers


def _branch(train: TrainConfig) -> dict[str, Any]:
    return {"r": train.rank, "scale": train.scale, "dropout": train.dropout}


# PEFT asks for a whole alpha and only ever divides it by r
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
    """Dynamic masks: the decay of pruned weights in every optimizer step, a new selection after every so many."""

    def __init__(self, steps: int, decay: float, max_steps: int) -> None:
        self.steps, self.decay, self.max_steps = steps, decay, max_steps

    def before_update(self, model: PeftModel) -> None:
        """Adds the decay once per step, whatever the accumulation, and after the gradient's norm was limited."""
        for layer in _ste_layers(model):
            for name in layer.active_adapters:
                layer.add_decay(name, self.decay)

    def after_step(self, model: PeftModel, step: int) -> Figures:
        """Selects before a checkpoint is written; not after the last step, for nothing would be trained under it."""
        if step % self.steps or step >= self.max_steps:
            return {}
        left = sum(layer.select_mask(name) for layer in _ste_layers(model) for name in layer.active_adapters)
        console.note(f"step {step}: {left:,} weights left the mask for others")
        return {"mask_changes": left}


def _ste_layers(model: PeftModel) -> list[SteLinear]:
    return [module for module in model.modules() if isinstance(module, SteLinear)]
