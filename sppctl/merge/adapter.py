"""A saved PEFT adapter: what it says about itself, its tensors by module, and what of it cannot be merged exactly."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key

from sppctl.errors import UserError
from sppctl.files.safe_files import TensorFile, adapter_file, adapter_settings
from sppctl.merge.rules import MERGERS
from sppctl.records import Settings

PEFT_PREFIX = "base_model.model."
BASE_LAYER = ".base_layer."  # in the name of a parameter of an adapted module itself
EMBEDDINGS = ("embed_tokens", "lm_head")  # PEFT stores these in full beside an adapter that changed them
# fields of PEFT's own configurations that merging uses, or that cannot change the merged weights
_USED = {"peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save"}
_WITHOUT_EFFECT = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "hira_dropout"),
    *("megatron_config", "megatron_core", "loftq_config", "eva_config", "runtime_config", "qalora_group_size"),
    *("ensure_weight_tying", "init_weights"),
}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    # other ways to initialise change the base weights, and the adapter is relative to the changed ones
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    "bias": ("none", "all", "lora_only"),
}
# keys of rank_pattern and alpha_pattern are regular expressions in PEFT; others than names could take for ever to match
_NAME = re.compile(r"\^?([\w-]|\\?\.)+\$?")
_FIXES = {
    "init_lora_weights": "save it relative to the original weights (path_initial_model_for_weight_conversion)",
    "fan_in_fan_out": "sppctl merges adapters of nn.Linear layers",
}


@dataclass(frozen=True)
class Adapter:
    """A saved PEFT adapter."""

    kind: str  # its PEFT type
    settings: Settings  # its adapter_config.json
    files: TensorFile  # its tensors
    modules: dict[str, dict[str, str]]  # names of the tensors of each adapted module, by part
    # names of tensors that replace one of the model, by the model's name: modules_to_save, biases, embeddings
    replaced: dict[str, str] = field(default_factory=dict)
    # names of copies of base weights, by the model's name: PEFT stores them for an adapted output head
    base: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, directory: Path) -> Adapter:
        """Reads the settings and headers of an adapter directory.

        Raises:
            UserError: not an adapter, a kind or an option that cannot be merged, or incomplete.
        """
        settings = adapter_settings(directory)
        kind = settings.get("peft_type")
        if kind not in MERGERS:
            raise UserError(f"{directory} is an adapter of type {kind}; sppctl merges {', '.join(MERGERS)}")
        _check_settings(directory, kind, settings)
        files = TensorFile(adapter_file(directory))
        modules: dict[str, dict[str, str]] = {}
        replaced: dict[str, str] = {}
        base: dict[str, str] = {}
        try:
            parts = MERGERS[kind].shapes(settings, 0, 0).keys()
        except KeyError as error:
            problem = f"adapter_config.json has no {error.args[0]}"
            raise UserError(str(directory), problem, "download the adapter again, or correct it") from error
        for name in files.specs:
            short = name.removeprefix(PEFT_PREFIX).replace(BASE_LAYER, ".")
            # parts may have dots (lora_A.weight)
            part = next((part for part in parts if name.endswith(f".{part}")), None)
            if part is None and BASE_LAYER in name and not _is_trained_bias(short, settings):
                base[short] = name
                continue
            if part is None and _replaces(short, settings):
                replaced[short] = name
                continue
            part = part or name.rpartition(".")[2]
            modules.setdefault(short.removesuffix(f".{part}"), {})[part] = name
        for module, names in modules.items():
            if names.keys() != parts:
                raise UserError(
                    str(directory), f"{module} has {', '.join(sorted(names))}, expected {', '.join(sorted(parts))}"
                )
        if not modules:
            raise UserError(f"{directory} adapts no layer; sppctl merges adapters of linear layers")
        return cls(kind, settings, files, modules, replaced, base)

    def settings_of(self, module: str) -> Settings:
        """The settings with the rank and alpha of one module (``rank_pattern``, ``alpha_pattern``)."""
        chosen = dict(self.settings)
        for key, patterns in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
            values = self.settings.get(patterns) or {}
            if key in chosen:
                chosen[key] = values.get(get_pattern_key(list(values), module), chosen[key])
        return chosen


def _check_settings(directory: Path, kind: str, settings: Settings) -> None:
    """Raises UserError for a wrong number, or an option of PEFT that would make the merged weights differ."""
    scale = settings.get("scale")
    if kind in ("SPP", "MASKED_LORA") and not (isinstance(scale, int | float) and 0 < scale < math.inf):
        raise UserError(
            str(directory), f"scale {scale!r} is not a positive, finite number", "correct adapter_config.json"
        )
    if kind not in ("LORA", "HIRA"):
        return
    for key, value in settings.items():
        if key in _USED | _WITHOUT_EFFECT or not value or value in _NEUTRAL.get(key, ()):
            continue
        fix = _FIXES.get(key, "merge it with PEFT (merge_and_unload) and prune the result")
        raise UserError(str(directory), f"{key}={value!r} cannot be merged exactly under a mask", fix)
    numbers = {"r": "rank_pattern"} | ({"lora_alpha": "alpha_pattern"} if kind == "LORA" else {})
    for key, patterns in numbers.items():
        values = settings.get(patterns) or {}
        if not isinstance(values, dict) or not all(map(_NAME.fullmatch, values)):
            raise UserError(
                str(directory), f"{patterns}={values!r} cannot be merged", "its keys must be names of modules"
            )
        for value in (settings.get(key), *values.values()):
            if not isinstance(value, int | float) or not math.isfinite(value) or (key == "r" and value <= 0):
                raise UserError(str(directory), f"{key} {value!r} is not a valid number", "correct adapter_config.json")


def _replaces(name: str, settings: Settings) -> bool:
    """Whether a tensor of an adapter is a parameter of the model that it stores in full."""
    if _is_trained_bias(name, settings):
        return True
    module, _, leaf = name.rpartition(".")
    full = (*(settings.get("modules_to_save") or ()), *EMBEDDINGS)
    return any(module.endswith(saved) for saved in full) and not leaf.startswith("lora_")


def _is_trained_bias(name: str, settings: Settings) -> bool:
    return name.endswith(".bias") and settings.get("bias", "none") != "none"
