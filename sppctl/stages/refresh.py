"""Mask refresh: while SPP trains, pruned and kept weights change places inside the sparsity budget.

Every so many optimizer steps DSnoT's exchanges (sppctl.pruning.dsnot) run on every adapted matrix, with the inputs that
the layers had in that step. What counts as the value of a weight is, for a kept one, its trained value
W (1 + s alpha beta), and for a pruned one the dense model's. A weight that is given up becomes exactly zero, one that
is taken back gets its dense value, all others and the adapter stay as they are. Every row, and every group of M under
N:M, keeps its number of zeros.

From then on the adapter belongs to the refreshed base weights: they are saved with each checkpoint and with the adapter
(``refreshed.safetensors``), and merging reads them in the place of the pruned checkpoint's.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from sppctl import console, distributed, launch
from sppctl.adapters.spp import SppLinear
from sppctl.adapters.spp.kernel import effective_weight
from sppctl.errors import StageError
from sppctl.lm.blocks import Skeleton
from sppctl.lm.safe_files import TensorFile, TensorFiles
from sppctl.lm.targets import stored_name
from sppctl.pattern import Pattern
from sppctl.pruning import dsnot
from sppctl.pruning.stats import InputMoments
from sppctl.settings import Config, RefreshConfig
from sppctl.stages.prune import planned_patterns
from sppctl.stages.watch import Reporting

REFRESHED = "refreshed.safetensors"
ADAPTER = "default"


def problems(config: Config) -> list[str]:
    """What forbids the configured refresh of the mask."""
    if config.train.refresh.steps is None:
        return []
    found = []
    if config.train.method != "spp":
        found.append(
            f"train.refresh.steps: only spp trains under a mask that is refreshed, not {config.train.method}; "
            "set train.method=spp, or train.refresh.steps=null"
        )
    if config.launch.strategy != "ddp" and launch.num_processes(config) > 1:
        found.append(
            f"train.refresh.steps: launch.strategy={config.launch.strategy} shares out the weights, a refresh needs "
            "them whole; set launch.strategy=ddp, or train.refresh.steps=null"
        )
    return found


def prepare(config: Config, model: PeftModel, base: Path | None, newest: str | None) -> MaskRefresh | None:
    """The configured refresh, in the state of the checkpoint ``newest`` if training resumes from one; None: no refresh.

    Args:
        config: the configuration.
        model: under SPP, still on the CPU.
        base: the dense checkpoint.
        newest: directory of a checkpoint.
    """
    settings = config.train.refresh
    if settings.steps is None:
        return None
    assert base is not None
    skeleton = Skeleton(model.get_base_model().config, trust_remote_code=config.model.trust_remote_code)
    refresh = MaskRefresh(model, TensorFiles(base), settings, patterns(config, skeleton), skeleton.base_prefix)
    if newest:
        refresh.restore(Path(newest))
    return refresh


def patterns(config: Config, skeleton: Skeleton) -> dict[str, Pattern]:
    """The pattern of each pruned layer by its name."""
    return planned_patterns(config.prune, skeleton.targets(config.prune.targets, config.prune.skip), skeleton)


def kept_per_group(weight: Tensor, pattern: Pattern) -> Tensor:
    """How many weights are not zero in each group of M, or in each row: (out_features, groups) int64."""
    width = pattern.group or weight.shape[1]
    return (weight != 0).view(weight.shape[0], -1, width).sum(-1)


class MaskRefresh(Reporting):
    """Gathers the inputs of a step's micro-batches, and exchanges weights after it."""

    def __init__(
        self,
        model: PeftModel,
        dense: TensorFiles,
        settings: RefreshConfig,
        patterns: dict[str, Pattern],
        base_prefix: str,
    ) -> None:
        self.model, self.dense, self.settings = model, dense, settings
        modules = model.get_base_model().named_modules()
        found = {name: module for name, module in modules if isinstance(module, SppLinear)}
        # a layer that is trained but was not pruned has nothing to exchange
        self.layers = {name: layer for name, layer in found.items() if name in patterns}
        self.patterns = patterns
        self.stored = {name: stored_name(dense, f"{name}.weight", base_prefix) for name in self.layers}
        self.changed: set[str] = set()
        self._statistics: dict[str, InputMoments] = {}
        self._hooks: list[Any] = []
        self._real: Tensor | None = None
        self._gathering = False

    def steps(self, max_steps: int) -> range:
        """The optimizer steps after which the mask is refreshed; never after the last, which nothing would follow."""
        assert self.settings.steps is not None
        last = min(int(self.settings.until * max_steps + 1e-9), max_steps - 1)
        return range(self.settings.steps, last + 1, self.settings.steps)

    # --- the Trainer's events -----------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Says what will happen."""
        steps = self.steps(state.max_steps)
        if steps:
            console.note(f"the mask is refreshed {len(steps)} times, after steps {steps[0]} to {steps[-1]}")
        else:
            console.warn(
                f"train.refresh: no refresh falls into the first {self.settings.until:.0%} of {state.max_steps} steps; "
                "lower train.refresh.steps"
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before a step that a refresh follows: starts to gather."""
        if state.global_step + 1 in self.steps(state.max_steps):
            self._start_gathering()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After such a step: exchanges weights, before anything is measured or saved."""
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        started = time.perf_counter()
        record = self._refresh() | {"seconds": time.perf_counter() - started}
        self._hooks, self._statistics, self._real = [], {}, None
        self.log(record)
        console.note(
            f"step {state.global_step}: {record['swaps']:,} exchanges change {record['changed_share']:.3%} of the mask"
        )

    # --- inputs -------------------------------------------------------------------------------------------------------

    def _start_gathering(self) -> None:
        for name, layer in self.layers.items():
            self._statistics[name] = InputMoments(layer.in_features, _base_weight(layer).device)
            self._hooks.append(layer.register_forward_pre_hook(partial(self._take, name)))
        self._hooks.append(self.model.register_forward_pre_hook(self._open, with_kwargs=True))
        self._hooks.append(self.model.register_forward_hook(self._close))

    def _open(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        real = kwargs.get("attention_mask")  # none where nothing is padded
        self._real = None if real is None else real.bool().flatten()
        self._gathering = module.training  # what is asked about packing is no input of the step

    def _close(self, *_: Any) -> None:
        self._gathering = False  # checkpointing runs the layers again in the backward pass

    def _take(self, name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self._gathering:
            inputs = args[0].detach().flatten(0, -2)
            self._statistics[name].update(inputs if self._real is None else inputs[self._real])

    # --- exchanges ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _refresh(self) -> dict[str, Any]:
        """Exchanges weights in every layer; the layers are shared out among the processes, which send their results."""
        swaps = total = 0
        for index, (name, layer) in enumerate(self.layers.items()):
            weight, statistics = _base_weight(layer), self._statistics[name]
            _add_up(statistics)
            before = weight.clone()
            source = index % distributed.world_size()
            if distributed.rank() == source:
                weight.copy_(self._exchanged(name, layer, statistics))
            distributed.send(weight, source)
            pattern = self.patterns[name]
            assert torch.equal(kept_per_group(weight, pattern), kept_per_group(before, pattern)), name
            regrown = int(((weight != 0) & (before == 0)).sum())
            if regrown:
                self.changed.add(name)
            swaps += regrown
            total += weight.numel()
        return {"swaps": swaps, "changed_share": 2 * swaps / total}

    def _exchanged(self, name: str, layer: SppLinear, statistics: InputMoments) -> Tensor:
        """The base weight of a layer under its next mask."""
        weight = _base_weight(layer)
        kept = weight != 0
        dense = self.dense.read(self.stored[name]).to(weight.device, weight.dtype)
        trained = effective_weight(weight, *layer.factors(ADAPTER), layer.scaling[ADAPTER], torch.float32)
        values = torch.where(kept, trained, dense.float())
        mask = dsnot.update_mask(values, kept, statistics, self.patterns[name], max_cycles=self.settings.cycles)
        return torch.where(kept, weight, dense).masked_fill_(~mask, 0)

    # --- files --------------------------------------------------------------------------------------------------------

    def save(self, directory: Path) -> None:
        """Writes the changed base weights under their names in checkpoints; no file where nothing has changed."""
        names = [name for name in self.layers if name in self.changed]
        if not names:
            return
        weights = {self.stored[name]: _base_weight(self.layers[name]) for name in names}
        layout = {key: (weight.dtype, tuple(weight.shape)) for key, weight in weights.items()}
        file = TensorFile.create(directory / REFRESHED, layout, {"format": "pt"})
        for key, weight in weights.items():
            file.write(key, weight)

    def restore(self, directory: Path) -> None:
        """Puts a checkpoint's refreshed weights into the model."""
        path = directory / REFRESHED
        if not path.is_file():
            return
        file = TensorFile.open(path)
        for name, layer in self.layers.items():
            if self.stored[name] in file.specs:
                _base_weight(layer).copy_(file.read(self.stored[name]))
                self.changed.add(name)

    def metrics(self, history: list[dict[str, Any]], pruned: Path) -> dict[str, Any]:
        """What is recorded of a training.

        Args:
            history: the Trainer's log, which holds a record of each refresh.
            pruned: the pruned checkpoint.
        """
        files = TensorFiles(pruned)
        regrown = kept = 0
        for name, layer in self.layers.items():
            weight = _base_weight(layer).cpu() != 0
            kept += int(weight.sum())
            if name in self.changed:
                regrown += int((weight & (files.read(self.stored[name]) == 0)).sum())
        return {
            "refreshes": [entry for entry in history if "swaps" in entry],
            "changed_matrices": len(self.changed),
            "regrown_share": regrown / max(1, kept),
            "base_weights": f"{REFRESHED} replaces matrices of the pruned checkpoint; on those the adapter is wrong"
            if self.changed
            else "those of the pruned checkpoint",
        }


def _base_weight(layer: SppLinear) -> Tensor:
    linear = layer.get_base_layer()
    assert isinstance(linear, nn.Linear)
    return linear.weight.data


def _add_up(statistics: InputMoments) -> None:
    """Sums the statistics of all processes."""
    tokens = torch.tensor(statistics.num_tokens, device=statistics.squares.device)
    distributed.add_up(tokens, *statistics.totals())
    statistics.num_tokens = int(tokens)


# --- merging ----------------------------------------------------------------------------------------------------------


class RefreshedFiles(TensorFiles):
    """A pruned checkpoint with the refreshed matrices of an adapter in the place of its own, to read from."""

    def __init__(self, pruned: Path, adapter: Path) -> None:
        super().__init__(pruned)
        self.refreshed: list[str] = []
        path = adapter / REFRESHED
        if path.is_file():
            file = TensorFile.open(path)
            self.files[REFRESHED] = file
            self.home |= dict.fromkeys(file.specs, REFRESHED)
            self.refreshed = list(file.specs)

    def prove(self, pruned: TensorFiles, patterns: dict[str, Pattern]) -> None:
        """Shows that the refreshed matrices have as many zeros in each row, or group of M, as the pruned ones.

        Args:
            pruned: the pruned checkpoint.
            patterns: by the name of the tensor.

        Raises:
            StageError: one has not.
        """
        for name in self.refreshed:
            if name not in patterns or pruned.spec(name).shape != self.spec(name).shape:
                raise StageError(f"{REFRESHED} holds {name}, which is not a pruned matrix: another model's adapter?")
            pattern = patterns[name]
            if not torch.equal(kept_per_group(self.read(name), pattern), kept_per_group(pruned.read(name), pattern)):
                raise StageError(
                    f"{REFRESHED}: {name} does not have the zeros per {'group' if pattern.group else 'row'} of the "
                    "pruned matrix; nothing was published"
                )
