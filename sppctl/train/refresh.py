"""Mask refresh: while SPP trains, pruned and kept weights are exchanged within the sparsity budget.

Every ``train.refresh.steps`` optimizer steps, DSnoT's exchanges (sppctl.pruners.dsnot) run on every adapted matrix,
with the layers' inputs in that step. A kept weight counts with its trained value W (1 + s alpha beta), a pruned one
with its dense value. A dropped weight becomes exactly zero. A regrown one gets the base weight that the adapter
turns into its dense value, dense / (1 + s alpha beta). All others and the adapter do not change. Every row, and every
group of M under N:M, keeps its number of zeros.

From then on the adapter belongs to the refreshed base weights: they are saved with each checkpoint and with the adapter
(``refreshed.safetensors``), and merging reads them instead of the pruned checkpoint's. They have the dtype of the
pruned checkpoint, whatever dtype the model is trained in, so that kept weights do not change.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from sppctl import console, distributed, launch
from sppctl.adapters.config import SparseConfig
from sppctl.adapters.masked import round_under_mask
from sppctl.adapters.spp import SppLinear
from sppctl.adapters.spp.kernel import effective_weight
from sppctl.config.settings import Config
from sppctl.data.batches import of_examples
from sppctl.errors import Problems
from sppctl.files import integrity
from sppctl.files.safe_files import OwnFile, TensorFile, TensorFiles
from sppctl.model.blocks import Skeleton
from sppctl.model.refreshed import REFRESHED, kept_per_group
from sppctl.model.targets import stored_name
from sppctl.packed.linear import write_weight
from sppctl.pattern import Pattern
from sppctl.pruners import dsnot
from sppctl.pruners.stats import InputMoments
from sppctl.records import RefreshRecord
from sppctl.train.watch import Hook, Metrics

ADAPTER = "default"
SMALLEST_FACTOR = 0.1  # of |1 + s alpha beta| for a weight to be regrown: its base weight is divided by that


def check(config: Config, skeleton: Skeleton, trained: Collection[str], problems: Problems) -> None:
    """Adds what forbids the configured refresh of the mask of the ``trained`` layers to ``problems``."""
    train, strategy = config.train, config.launch.strategy
    if train.refresh.steps is None:
        return
    if train.method != "spp":
        problem = f"only spp can refresh its mask, not {train.method}"
        problems.add("train.refresh.steps", problem, "set train.method=spp, or train.refresh.steps=null")
    if strategy != "ddp" and launch.num_processes(config) > 1:
        problem = f"launch.strategy={strategy} shards the weights, but a refresh needs full matrices"
        problems.add("train.refresh.steps", problem, "set launch.strategy=ddp, or train.refresh.steps=null")
    if skeleton.targets(config.prune.targets, config.prune.skip).keys().isdisjoint(trained):
        problem = "none of the layers that train.targets selects is pruned, so no mask can be refreshed"
        problems.add("train.refresh.steps", problem, "set train.targets=pruned, or train.refresh.steps=null")


class MaskRefresh(Hook):
    """Collects the inputs of a step's micro-batches, and exchanges weights after the step.

    Args:
        model: with its SPP adapter, still on the CPU.
        pruned: the checkpoint that it was loaded from.
        dense: the checkpoint that was pruned.
        patterns: of the pruned layers.
        resumed: the checkpoint that training continues from.

    Attributes:
        layers: those that are trained and were pruned, by name.
        stored: their weights' names in checkpoints.
        steps: the optimizer steps after which the mask is refreshed; never the last one.
    """

    def __init__(
        self,
        config: Config,
        model: PeftModel,
        pruned: Path,
        dense: Path | None,
        patterns: dict[str, Pattern],
        max_steps: int,
        resumed: Path | None,
    ) -> None:
        assert dense is not None
        self.model, self.patterns, self.settings = model, patterns, config.train.refresh
        self.pruned, self.dense = TensorFiles(pruned), TensorFiles(dense)
        base, trust = model.get_base_model(), config.model.trust_remote_code
        prefix = Skeleton(base.config, trust_remote_code=trust).base_prefix
        self.layers = {name: m for name, m in base.named_modules() if isinstance(m, SppLinear) and name in patterns}
        assert self.layers, "check() refuses a training without pruned layers"
        self.stored = {name: stored_name(self.dense, f"{name}.weight", prefix) for name in self.layers}
        self.changed: set[str] = set()
        self._unrounded: dict[str, Tensor] = {}  # changed matrices as stored, on the CPU, if the model rounds them
        self._statistics: dict[str, InputMoments] = {}
        self._hooks: list[Any] = []
        self._attended: Tensor | None = None
        self._collecting = False
        interval, until = self.settings.steps, self.settings.until
        assert interval is not None
        self.steps = range(interval, min(int(until * max_steps + 1e-9), max_steps - 1) + 1, interval)
        if self.steps:
            count, first, last = len(self.steps), self.steps[0], self.steps[-1]
            console.note(f"the mask is refreshed {count} times, after steps {first} to {last}")
        else:
            console.warn(
                f"train.refresh: no refresh falls into the first {until:.0%} of {max_steps} steps; "
                "lower train.refresh.steps"
            )
        if resumed is not None and (resumed / REFRESHED).is_file():
            file = TensorFile(resumed / REFRESHED)
            for name, key in self.stored.items():
                if key in file.specs:
                    self._replace_weight(name, file.read(key))

    # --- inputs -------------------------------------------------------------------------------------------------------

    def before_step(self, step: int) -> None:
        """Starts to collect inputs before a step that a refresh follows."""
        if step in self.steps:
            for name, layer in self.layers.items():
                self._statistics[name] = InputMoments(layer.in_features, layer.weight.device)
                self._hooks.append(layer.register_forward_pre_hook(partial(self._collect, name)))
            self._hooks.append(self.model.register_forward_pre_hook(self._start_collecting, with_kwargs=True))
            self._hooks.append(self.model.register_forward_hook(self._stop_collecting))

    def _start_collecting(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._attended = of_examples(kwargs)
        self._collecting = True

    def _stop_collecting(self, *_: Any) -> None:
        self._collecting = False  # checkpointing runs the layers again in the backward pass

    def _collect(self, name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self._collecting:
            inputs = args[0].detach().flatten(0, -2)
            self._statistics[name].update(inputs if self._attended is None else inputs[self._attended])

    # --- exchanges ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def after_step(self, model: PeftModel, step: int) -> Metrics:
        """Exchanges weights after such a step, before anything is measured or saved.

        Each process computes its share of the layers and sends the results.
        """
        if not self._hooks:
            return {}
        started = time.perf_counter()
        for hook in self._hooks:
            hook.remove()
        swaps = total = 0
        for index, (name, layer) in enumerate(self.layers.items()):
            before, statistics = self.base_weight(name), self._statistics[name]
            distributed.all_reduce_counted(statistics)
            after = before.clone()
            source = index % distributed.world_size()
            if distributed.rank() == source:
                after.copy_(self._exchange(name, layer, before, statistics))
            distributed.broadcast(after, source)
            pattern = self.patterns[name]
            assert torch.equal(kept_per_group(after, pattern), kept_per_group(before, pattern)), name
            regrown = int(((after != 0) & (before == 0)).sum())
            if regrown:
                self._replace_weight(name, after)
            swaps += regrown
            total += after.numel()
        self._hooks, self._statistics, self._attended = [], {}, None
        share = 2 * swaps / total
        console.note(f"step {step}: {swaps:,} exchanges change {share:.3%} of the mask")
        return {"swaps": swaps, "changed_share": share, "seconds": time.perf_counter() - started}

    def changes_later(self, step: int) -> bool:
        """Whether a refresh follows: the adapter of a step belongs to the masks of that step."""
        return bool(self.steps) and step < self.steps[-1]

    def _exchange(self, name: str, layer: SppLinear, weight: Tensor, statistics: InputMoments) -> Tensor:
        """The base weight of a layer after its exchanges."""
        kept = weight != 0
        adapter = *layer.factors(ADAPTER), layer.scaling[ADAPTER]
        dense = self.dense.read(self.stored[name]).to(weight.device, torch.float32)
        factor = effective_weight(torch.ones_like(dense), *adapter, torch.float32)
        # a weight that the adapter scales to almost nothing cannot be regrown
        dense.masked_fill_(factor.abs() < SMALLEST_FACTOR, 0)
        values = torch.where(kept, effective_weight(weight, *adapter, torch.float32), dense)
        mask = dsnot.update_mask(values, kept, statistics, self.patterns[name], max_cycles=self.settings.cycles)
        regrown = round_under_mask(dense / factor, mask, weight.dtype)
        return torch.where(kept, weight, regrown).masked_fill_(~mask, 0)

    def base_weight(self, name: str) -> Tensor:
        """A layer's base weight on the layer's device, in its stored dtype; the model may hold it rounded."""
        weight, key = self.layers[name].weight, self.stored[name]
        if weight.dtype == self.pruned.spec(key).dtype:
            return weight[:].detach()
        stored = self._unrounded[name] if name in self._unrounded else self.pruned.read(key)
        return stored.to(weight.device)

    def _replace_weight(self, name: str, stored: Tensor) -> None:
        layer = self.layers[name].get_base_layer()
        write_weight(layer, stored)
        self.changed.add(name)
        config = self.model.peft_config[ADAPTER]
        if isinstance(config, SparseConfig):
            config.mask_digest = None  # of zeros that the adapter no longer belongs to
        if layer.weight.dtype != stored.dtype:
            self._unrounded[name] = stored.cpu()

    # --- files --------------------------------------------------------------------------------------------------------

    def save(self, directory: Path) -> None:
        """Writes the changed base weights under their names in checkpoints; no file if nothing has changed."""
        weights = {key: self.base_weight(name) for name, key in self.stored.items() if name in self.changed}
        if weights:
            layout = {key: (weight.dtype, tuple(weight.shape)) for key, weight in weights.items()}
            file = OwnFile.create(directory / REFRESHED, layout, {"format": "pt"})
            for key, weight in weights.items():
                file.write(key, weight)

    def record(self, history: list[dict[str, Any]]) -> RefreshRecord:
        """The record of the refreshes, with the lines of ``history`` that report them."""
        regrown = kept = 0
        masks = {}
        for name in self.layers:
            weight = self.base_weight(name).cpu()
            mask = weight != 0
            kept += int(mask.sum())
            if name in self.changed:
                masks[name] = integrity.mask_digest(weight)
                regrown += int((mask & (self.pruned.read(self.stored[name]) == 0)).sum())
        return RefreshRecord(
            refreshes=[line for line in history if "swaps" in line],
            changed_matrices=len(self.changed),
            masks=masks,
            regrown_share=regrown / max(1, kept),
            base_weights=f"{REFRESHED} replaces matrices of the pruned checkpoint; on those the adapter is wrong"
            if self.changed
            else "those of the pruned checkpoint",
        )
