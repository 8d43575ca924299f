"""Tuning a pruned block's kept weights on the dense block's output, the mask fixed (as in EBFT, arXiv 2402.12419)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import get_scheduler

from sppctl.config.settings import PruneConfig
from sppctl.model.blocks import Decoder
from sppctl.model.sublayers import Border
from sppctl.model.targets import Target
from sppctl.prune.activations import Activations
from sppctl.records import BlockErrors

AsStored = Callable[[Target, Tensor], Tensor]


@dataclass(frozen=True)
class Unit:
    """Pruned matrices of a block that are tuned together, to bring an output of the block back to the dense one's."""

    targets: dict[str, Target]
    dense: Tensor  # the dense output, (windows, tokens, width), for the same inputs or for those of the dense model
    border: Border | None = None  # where the output is taken; None: behind the block

    def output(
        self,
        stack: Decoder,
        index: int,
        activations: Activations,
        rows: slice,
        weights: dict[str, Tensor] | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """The output of the block ``index`` as it is, or with other weights or inputs, for some windows."""
        block = stack.blocks[index]
        call: Callable[..., Any] = block if weights is None else partial(_functional, block, weights)
        if self.border is not None:
            call = partial(self.border.output, block, call)
        return activations.output(index, rows, call, hidden)


def reconstruct(
    stack: Decoder, index: int, units: list[Unit], activations: Activations, settings: PruneConfig, as_stored: AsStored
) -> BlockErrors:
    """Tunes the units of a loaded and pruned block one after the other.

    Args:
        stack: with block ``index`` loaded and pruned.
        index: of the block.
        units: the last one's output is the block's.
        activations: the block's inputs.
        settings: passes over the windows, learning rate and its schedule.
        as_stored: a matrix of a target as it will be written; the tuned weights are rounded so, and then judged.

    Returns:
        Relative output error of the block before and after.
    """
    *others, last = units
    before = _error(stack, index, last, activations, settings) if others else None
    for unit in others:
        _tune(stack, index, unit, activations, settings, as_stored)
    errors = _tune(stack, index, last, activations, settings, as_stored)
    return errors if before is None else BlockErrors(before, errors.after)


def _tune(
    stack: Decoder, index: int, unit: Unit, activations: Activations, settings: PruneConfig, as_stored: AsStored
) -> BlockErrors:
    """Tunes the kept weights of a unit by Adam on the squared error of its output.

    Returns its relative error before and after; a tuning that did not lower it is undone.
    """
    before = _error(stack, index, unit, activations, settings)
    if not unit.targets:
        return BlockErrors(before, before)
    block = stack.blocks[index]
    masks = _kept(stack, unit.targets, f"{stack.blocks_name}.{index}.")
    stored = {name: block.get_parameter(name) for name in masks}
    pruned = {name: parameter.data.clone() for name, parameter in stored.items()}
    masters = {name: weight.float().clone().requires_grad_() for name, weight in pruned.items()}

    def tuned() -> dict[str, Tensor]:
        return {n: torch.where(masks[n], master.to(pruned[n].dtype), pruned[n]) for n, master in masters.items()}

    optimizer = torch.optim.Adam(masters.values(), lr=settings.reconstruct_lr)
    steps = settings.reconstruct_epochs * activations.steps(settings.reconstruct_batch_size)
    schedule = get_scheduler(
        settings.reconstruct_scheduler, optimizer, num_warmup_steps=0, num_training_steps=len(steps)
    )
    scaler = _scaler(unit.dense, settings.reconstruct_batch_size, next(iter(pruned.values())).dtype)
    for step in steps:
        first, count = step[0].start, step[-1].stop - step[0].start
        sizes = _squares(unit.dense[first : first + count].to(stack.device))
        if settings.reconstruct_loss == "mse":
            sizes = sizes.mean().expand_as(sizes)
        for rows in step:
            with torch.enable_grad():
                output = unit.output(stack, index, activations, rows, tuned()).float()
                errors = _squares(output - unit.dense[rows].to(output.device))
                relative = errors / sizes[rows.start - first : rows.stop - first]
                scaler.scale(relative.mean() * len(relative) / count).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        schedule.step()
    for name, weight in tuned().items():
        stored[name].data.copy_(weight.detach())
    for target in unit.targets.values():
        matrix = target.view(stack.model)
        matrix.copy_(as_stored(target, matrix))
    after = _error(stack, index, unit, activations, settings)
    if after < before:
        return BlockErrors(before, after)
    for name, parameter in stored.items():
        parameter.data.copy_(pruned[name])
    return BlockErrors(before, before)


def _scaler(dense: Tensor, batch_size: int, dtype: torch.dtype) -> torch.amp.GradScaler:
    """Scales the loss up where gradients of a mean over so many outputs would be too small for float16."""
    outputs = batch_size * dense[0].numel()
    return torch.amp.GradScaler(
        dense.device.type, init_scale=2.0 ** int(math.log2(outputs)), enabled=dtype == torch.float16
    )


def _functional(block: nn.Module, weights: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """The block with other weights."""
    return functional_call(block, weights, args, kwargs)


def _kept(stack: Decoder, targets: dict[str, Target], prefix: str) -> dict[str, Tensor]:
    """Masks of the tuned weights by parameter; fused experts also hold matrices that are not targets."""
    kept: dict[str, Tensor] = {}
    for target in targets.values():
        name = f"{target.owner.removeprefix(prefix)}.{target.parameter}"
        if name not in kept:
            kept[name] = torch.zeros_like(target.stored_parameter(stack.model), dtype=torch.bool)
        target.within(kept[name]).copy_(target.view(stack.model) != 0)
    return kept


@torch.no_grad()
def _error(stack: Decoder, index: int, unit: Unit, activations: Activations, settings: PruneConfig) -> float:
    """||output - dense output|| / ||dense output|| of a unit as it is now.

    Of all tokens together; with ``prune.reconstruct_loss`` token, the root mean square of that of each token.
    """
    change, size = 0.0, 0.0
    for rows in activations.batches:
        output = unit.output(stack, index, activations, rows).float()
        target = unit.dense[rows].to(output.device)
        errors, squares = _squares(output - target), _squares(target)
        if settings.reconstruct_loss == "token":
            errors, squares = errors / squares, torch.ones_like(squares)
        change += errors.sum().item()
        size += squares.sum().item()
    return (change / size) ** 0.5


def _squares(hidden: Tensor) -> Tensor:
    """The mean square of each token of hidden states (windows, tokens, width), in float32 and never zero."""
    return hidden.float().square().mean(-1).clamp_min(1e-30)
