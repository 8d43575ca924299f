"""Tuning a pruned block's kept weights on the dense block's output, the mask fixed (as EBFT does, arXiv 2402.12419)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from sppctl.lm.activations import Activations
from sppctl.lm.blocks import BlockStack
from sppctl.lm.targets import Target


def reconstruct(
    stack: BlockStack,
    index: int,
    targets: dict[str, Target],
    activations: Activations,
    dense: list[Tensor],
    *,
    epochs: int,
    lr: float,
) -> dict[str, float]:
    """Tunes the parameters that hold the targets by Adam on the mean squared error of the block's output.

    Args:
        stack: with block ``index`` loaded and pruned.
        index: of the block.
        targets: its pruned matrices.
        activations: the block's inputs.
        dense: what the dense block made of them, a tensor (windows, tokens, width) per micro-batch.
        epochs: passes over the windows.
        lr: learning rate.

    Returns:
        Relative output error of the block ``before`` and ``after``. A tuning that did not lower it is undone.
    """
    block = stack.blocks[index]
    prefix = f"{stack.blocks_name}.{index}."
    parameters = {f"{t.owner.removeprefix(prefix)}.{t.parameter}": t for t in targets.values()}
    stored = {name: block.get_parameter(name) for name in parameters}
    masks = {name: parameter.data != 0 for name, parameter in stored.items()}
    pruned = {name: parameter.data.clone() for name, parameter in stored.items()}
    masters = {name: weight.float().clone().requires_grad_() for name, weight in pruned.items()}
    before = _error(stack, index, activations, dense)
    optimizer = torch.optim.Adam(masters.values(), lr=lr)
    with torch.enable_grad():
        for _ in range(epochs):
            for rows, wanted in zip(activations.batches, dense, strict=True):
                weights = {n: (m * masks[n]).to(stored[n].dtype) for n, m in masters.items()}

                def run(*args: Any, weights: dict[str, Tensor] = weights, **kwargs: Any) -> Any:
                    return functional_call(block, weights, args, kwargs)

                output = activations.call(index, rows)(run, activations.inputs(rows))
                target = wanted.to(output.device)
                loss = F.mse_loss(output.float(), target.float()) / target.float().square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    for name, parameter in stored.items():
        parameter.data.copy_(masters[name].detach() * masks[name])
    after = _error(stack, index, activations, dense)
    if not after < before:
        for name, parameter in stored.items():
            parameter.data.copy_(pruned[name])
        after = before
    return {"before": before, "after": after}


@torch.no_grad()
def _error(stack: BlockStack, index: int, activations: Activations, dense: list[Tensor]) -> float:
    """||output - dense output|| / ||dense output|| of the block as it is now."""
    change, size = 0.0, 0.0
    for rows, wanted in zip(activations.batches, dense, strict=True):
        output = activations.call(index, rows)(stack.blocks[index], activations.inputs(rows)).float()
        target = wanted.to(output.device).float()
        change += (output - target).square().sum().item()
        size += target.square().sum().item()
    return (change / max(size, 1e-30)) ** 0.5
