"""The methods of training by name: which PEFT configuration each of them means, and what it does between steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel

from sppctl import console
from sppctl.adapters.masked_full import MaskedFullConfig, MaskedFullLinear
from sppctl.adapters.masked_lora import MaskedLoraConfig
from sppctl.adapters.spp import SppConfig
from sppctl.adapters.ste import SteConfig, SteLinear
from sppctl.config.settings import Config, TrainConfig
from sppctl.errors import Problems, UserError
from sppctl.files.safe_files import TensorFiles
from sppctl.model.blocks import Skeleton
from sppctl.model.targets import stored_name
from sppctl.pattern import Pattern
from sppctl.train.watch import Figures, Hook

HIRA_SINCE = "0.20"

Patterns = Mapping[str, Pattern]


def check(config: Config, problems: Problems) -> None:
    """Notes what forbids the method."""
    train = config.train
    if train.method == "ste" and config.launch.strategy != "ddp":
        problems.add(
            "train.method",
            f"ste chooses masks from whole matrices, launch.strategy {config.launch.strategy} shards them",
            "use ddp",
        )
    if train.method == "hira":
        with problems:
            _hira_config()


def ignored(train: TrainConfig) -> list[str]:
    """Which keys were changed to no effect, one line for each reason."""
    usual = TrainConfig()
    keys = set().union(*(method.keys for method in METHODS.values())) - METHODS[train.method].keys
    cases: list[tuple[str, Any, Any, set[str], str]] = [("", train, usual, keys, f"with train.method={train.method}")]
    if train.distill.teacher is None:
        keys = {"weight", "temperature"}
        cases.append(("distill.", train.distill, usual.distill, keys, "without train.distill.teacher"))
    if train.refresh.steps is None:
        keys = {"until", "cycles"}
        cases.append(("refresh.", train.refresh, usual.refresh, keys, "without train.refresh.steps"))
    lines = []
    for prefix, section, default, keys, reason in cases:
        changed = sorted(f"train.{prefix}{key}" for key in keys if getattr(section, key) != getattr(default, key))
        if changed:
            lines.append(f"{', '.join(changed)}: no effect {reason}")
    return lines


def adapter_config(train: TrainConfig, target_modules: list[str], patterns: Patterns) -> PeftConfig:
    """The PEFT configuration of ``train.method``.

    Args:
        train: the section of the configuration.
        target_modules: full names of the linear layers to adapt.
        patterns: what those of them that were pruned were pruned by.
    """
    config: Any = METHODS[train.method].config(train, patterns)
    config.task_type = "CAUSAL_LM"
    config.target_modules = set(target_modules)
    return config


def start_at_stored(model: PeftModel, pruned: Path) -> None:
    """Starts trained copies of weights at what is stored, where the model was converted: it holds them rounded.

    Args:
        model: under the method's new adapters.
        pruned: the checkpoint that it was loaded from.
    """
    modules = model.get_base_model().named_modules()
    layers = {name: module for name, module in modules if isinstance(module, MaskedFullLinear | SteLinear)}
    if not layers:
        return
    files, prefix = TensorFiles(pruned), Skeleton(model.get_base_model().config).base_prefix
    for name, layer in layers.items():
        stored = stored_name(files, f"{name}.weight", prefix)
        if files.spec(stored).dtype != layer.weight.dtype:
            for adapter in layer.active_adapters:
                layer.start_at(adapter, files.read(stored))


def hooks(train: TrainConfig, max_steps: int) -> list[Hook]:
    """What the method does around the optimizer steps."""
    return [MaskSelection(train.mask_steps, train.mask_decay, max_steps)] if train.method == "ste" else []


def _hira_config() -> Any:
    try:
        from peft import HiraConfig
    except ImportError as error:
        raise UserError(
            "train.method",
            f"hira needs peft {HIRA_SINCE} or newer, installed is {version('peft')} (pip install 'peft>={HIRA_SINCE}')",
        ) from error
    return HiraConfig


def _patterns(patterns: Patterns) -> dict[str, str]:
    return {name: str(pattern) for name, pattern in patterns.items() if pattern.is_structured}


@dataclass(frozen=True)
class Method:
    """One way of training.

    Attributes:
        keys: those that it uses of the keys of ``train`` that not every method uses.
        config: makes its PEFT configuration of the section and the patterns of the layers.
    """

    keys: set[str]
    config: Callable[[TrainConfig, Patterns], Any]


METHODS = {
    "spp": Method(
        {"rank", "scale", "dropout", "beta", "init"},
        lambda train, _: SppConfig(
            r=train.rank, scale=train.scale, dropout=train.dropout, beta=train.beta, init_weights=train.init
        ),
    ),
    # PEFT asks for a whole alpha and only ever divides it by r
    "lora": Method(
        {"rank", "scale", "dropout"},
        lambda train, _: LoraConfig(
            r=train.rank,
            lora_alpha=train.scale * train.rank,  # type: ignore[arg-type]
            lora_dropout=train.dropout,
        ),
    ),
    "hira": Method({"rank", "dropout"}, lambda train, _: _hira_config()(r=train.rank, hira_dropout=train.dropout)),
    "masked_lora": Method(
        {"rank", "scale", "dropout"},
        lambda train, _: MaskedLoraConfig(r=train.rank, scale=train.scale, dropout=train.dropout),
    ),
    "masked_full": Method(set(), lambda *_: MaskedFullConfig()),
    "ste": Method({"mask_steps", "mask_decay"}, lambda _, patterns: SteConfig(patterns=_patterns(patterns))),
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
