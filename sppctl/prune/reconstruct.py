"""Tuning a pruned block's kept weights on the dense block's output, the mask fixed (as in EBFT, arXiv 2402.12419)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers import get_scheduler

from sppctl.config.settings import PruneConfig
from sppctl.model.blocks import Decoder
from sppctl.model.targets import Target
from sppctl.prune.activations import Activations
from sppctl.records import BlockErrors


def reconstruct(
    stack: Decoder,
    index: int,
    targets: dict[str, Target],
    activations: Activations,
    dense: Tensor,
    settings: PruneConfig,
) -> BlockErrors:
    """Tunes the kept weights of the targets by Adam on the mean squared error of the block's output.

    Args:
        stack: with block ``index`` loaded and pruned.
        index: of the block.
        targets: its pruned matrices.
        activations: the block's inputs.
        dense: the dense block's outputs, (windows, tokens, width), for these inputs or for those of the dense model.
        settings: passes over the windows, learning rate and its schedule.

    Returns:
        Relative output error of the block before and after. A tuning that did not lower it is undone.
    """
    block = stack.blocks[index]
    masks = _kept(stack, targets, f"{stack.blocks_name}.{index}.")
    stored = {name: block.get_parameter(name) for name in masks}
    pruned = {name: parameter.data.clone() for name, parameter in stored.items()}
    masters = {name: weight.float().clone().requires_grad_() for name, weight in pruned.items()}

    def tuned() -> dict[str, Tensor]:
        return {n: torch.where(masks[n], master.to(pruned[n].dtype), pruned[n]) for n, master in masters.items()}

    before = _error(index, activations, dense)
    optimizer = torch.optim.Adam(masters.values(), lr=settings.reconstruct_lr)
    steps = settings.reconstruct_epochs * len(activations.batches)
    schedule = get_scheduler(settings.reconstruct_scheduler, optimizer, num_warmup_steps=0, num_training_steps=steps)
    for _ in range(settings.reconstruct_epochs):
        for rows in activations.batches:
            with torch.enable_grad():
                output = activations.output(index, rows, partial(_functional, block, tuned())).float()
                target = dense[rows].to(output.device).float()
                loss = F.mse_loss(output, target) / target.square().mean()
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            schedule.step()
    for name, weight in tuned().items():
        stored[name].data.copy_(weight.detach())
    after = _error(index, activations, dense)
    if after < before:
        return BlockErrors(before, after)
    for name, parameter in stored.items():
        parameter.data.copy_(pruned[name])
    return BlockErrors(before, before)


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
def _error(index: int, activations: Activations, dense: Tensor) -> float:
    """||output - dense output|| / ||dense output|| of the block as it is now."""
    change, size = 0.0, 0.0
    for rows in activations.batches:
        output = activations.output(index, rows).float()
        target = dense[rows].to(output.device).float()
        change += (output - target).square().sum().item()
        size += target.square().sum().item()
    return (change / max(size, 1e-30)) ** 0.5
