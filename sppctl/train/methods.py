"""The methods of training by name: which PEFT configuration each of them means, and what it does between steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel
from transformers import TrainerCallback

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
from sppctl.train.watch import Reporting

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
    keys = set().union(*KEYS.values()) - KEYS[train.method]
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
    config = METHODS[train.method](train, patterns)
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


def callbacks(train: TrainConfig) -> list[TrainerCallback]:
    """What the method does between optimizer steps."""
    return [MaskSelection(train.mask_steps, train.mask_decay)] if train.method == "ste" else []


def _spp(train: TrainConfig, patterns: Patterns) -> PeftConfig:
    return SppConfig(r=train.rank, scale=train.scale, dropout=train.dropout, beta=train.beta, init_weights=train.init)


def _lora(train: TrainConfig, patterns: Patterns) -> PeftConfig:
    alpha: Any = train.scale * train.rank  # PEFT asks for a whole number and only ever divides it by r
    return LoraConfig(r=train.rank, lora_alpha=alpha, lora_dropout=train.dropout)


def _hira(train: TrainConfig, patterns: Patterns) -> PeftConfig:
    config: PeftConfig = _hira_config()(r=train.rank, hira_dropout=train.dropout)
    return config


def _hira_config() -> Any:
    try:
        from peft import HiraConfig
    except ImportError as error:
        raise UserError(
            "train.method",
            f"hira needs peft {HIRA_SINCE} or newer, installed is {version('peft')} (pip install 'peft>={HIRA_SINCE}')",
        ) from error
    return HiraConfig


def _masked_lora(train: TrainConfig, patterns: Patterns) -> PeftConfig:
    return MaskedLoraConfig(r=train.rank, scale=train.scale, dropout=train.dropout)


def _masked_full(train: TrainConfig, patterns: Patterns) -> PeftConfig:
    return MaskedFullConfig()


def _ste(train: TrainConfig, patterns: Patterns) -> PeftConfig:
    return SteConfig(patterns={name: str(pattern) for name, pattern in patterns.items() if pattern.is_structured})


METHODS: dict[str, Callable[[TrainConfig, Patterns], Any]] = {
    "spp": _spp,
    "lora": _lora,
    "hira": _hira,
    "masked_lora": _masked_lora,
    "masked_full": _masked_full,
    "ste": _ste,
}


# which of the keys that not every method heeds each of them does
KEYS: dict[str, set[str]] = {
    "spp": {"rank", "scale", "dropout", "beta", "init"},
    "lora": {"rank", "scale", "dropout"},
    "hira": {"rank", "dropout"},
    "masked_lora": {"rank", "scale", "dropout"},
    "masked_full": set(),
    "ste": {"mask_steps", "mask_decay"},
}


class MaskSelection(Reporting):
    """Dynamic masks: the decay of pruned weights in every optimizer step, a new selection after every so many."""

    def __init__(self, steps: int, decay: float) -> None:
        self.steps, self.decay = steps, decay

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Adds the decay once per step, whatever the accumulation, and after the gradient's norm was limited."""
        for layer in _ste_layers(model):
            for name in layer.active_adapters:
                layer.add_decay(name, self.decay)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Selects before a checkpoint is written; not after the last step, for nothing would be trained under it."""
        if state.global_step % self.steps or state.global_step >= state.max_steps:
            return
        left = sum(layer.select_mask(name) for layer in _ste_layers(model) for name in layer.active_adapters)
        self.log({"mask_changes": left})
        console.note(f"step {state.global_step}: {left:,} weights left the mask for others")


def _ste_layers(model: Any) -> list[SteLinear]:
    return [module for module in model.modules() if isinstance(module, SteLinear)]
