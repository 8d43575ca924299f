"""The channels inside a block in another order, in which N:M pruning loses less.

Reordering the outputs of gate and up together with the inputs of down changes nothing but the order of a sum; so does
reordering the values of an attention head together with the inputs of the output projection, for all query heads that
share the values. That a block really computes the same is checked by running it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sppctl import distributed
from sppctl.errors import StageError
from sppctl.model.blocks import Decoder, Skeleton
from sppctl.model.targets import Target
from sppctl.pattern import Pattern
from sppctl.prune.activations import Activations
from sppctl.prune.layers import LayerInputs, PrunePlan
from sppctl.pruners import InputNorms
from sppctl.pruners.channels import best_order, lost
from sppctl.pruners.wanda import wanda_scores
from sppctl.records import Permuted

# the layers beside a layer whose outputs are its inputs, one by one
FEEDING = {"down_proj": ("gate_proj", "up_proj"), "fc2": ("fc1",), "o_proj": ("v_proj",), "out_proj": ("v_proj",)}
ATTENTION = ("o_proj", "out_proj")
SAME = 0.1  # relative error of a layer's output: rounding is far below it, another order of the inputs far above


@dataclass(frozen=True)
class Channels:
    """The inputs of a layer, and what must be reordered with them.

    The layer has heads * shared * width inputs, as many outputs of the feeding layers heads * width: a head's values
    stay together, and are read by ``shared`` query heads. An MLP is one head.
    """

    layer: Target
    feeding: list[Target]  # matrices and biases
    heads: int
    shared: int

    def losses(self, weight: Tensor, inputs: LayerInputs) -> Tensor:
        """The loss of pruning each weight of the layer alone, (heads, out_features * shared, width)."""
        squared = wanda_scores(weight, inputs.statistics).square()
        return squared.view(len(weight), self.heads, self.shared, -1).permute(1, 0, 2, 3).flatten(1, 2)

    def orders(self, by_head: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The orders of the feeding layers' outputs and of the layer's inputs, from one for each head (width,)."""
        width = len(by_head[0])
        outputs = torch.cat([head * width + order for head, order in enumerate(by_head)])
        query_heads = torch.arange(self.heads * self.shared).repeat_interleave(width)
        inputs = torch.cat([order for order in by_head for _ in range(self.shared)]) + query_heads * width
        return outputs, inputs


def find(skeleton: Skeleton, index: int, targets: dict[str, Target], patterns: dict[str, Pattern]) -> list[Channels]:
    """The channels of the block ``index`` that can be reordered: those of layers that get an N:M pattern."""
    found = []
    for name, target in targets.items():
        owner, _, leaf = name.rpartition(".")
        in_block = name.startswith(f"{skeleton.blocks_name}.{index}.")
        if not in_block or not target.is_linear or not patterns[name].is_structured or leaf not in FEEDING:
            continue
        parent = skeleton.model.get_submodule(owner)
        layers = {f"{owner}.{other}": getattr(parent, other, None) for other in FEEDING[leaf]}
        heads, shared = _heads(skeleton, target, layers) if leaf in ATTENTION else (1, 1)
        width = target.in_features // (heads * shared) if heads else 0
        group = patterns[name].group
        assert group is not None
        fits = all(isinstance(one, nn.Linear) and one.out_features == heads * width for one in layers.values())
        if width and fits and width % group == 0:
            found.append(Channels(target, [part for one in layers.items() for part in _parts(*one)], heads, shared))
    return found


def _heads(skeleton: Skeleton, target: Target, layers: dict[str, Any]) -> tuple[int, int]:
    """Key-value heads, and query heads for each of them; 0 if the configuration does not tell."""
    config = skeleton.config.get_text_config()
    queries = getattr(config, "num_attention_heads", None) or 0
    heads = getattr(config, "num_key_value_heads", None) or queries
    return (heads, queries // heads) if heads and queries % heads == 0 and target.in_features % queries == 0 else (0, 0)


def _parts(name: str, layer: Any) -> list[Target]:
    """The matrix of a feeding layer, and its bias if it has one."""
    matrix = Target(name, name, "weight", layer.out_features, layer.in_features)
    return [matrix, *([Target(f"{name}.bias", name, "bias", layer.out_features, 1)] if layer.bias is not None else [])]


def reordered(skeleton: Skeleton, index: int, plan: PrunePlan) -> dict[str, Target]:
    """The matrices and biases of a block that ``prune.permute_channels`` reorders, by name."""
    found = find(skeleton, index, plan.targets, plan.patterns) if plan.settings.permute_channels else []
    return {part.name: part for channels in found for part in (channels.layer, *channels.feeding)}


@torch.no_grad()
def permute(stack: Decoder, index: int, plan: PrunePlan, activations: Activations) -> list[Permuted]:
    """Reorders the channels of a loaded block, whose inputs are ``activations``.

    Raises:
        StageError: the block computes something else then, or its inputs are not finite.
    """
    found = find(stack, index, plan.targets, plan.patterns)
    inputs = {
        channels.layer.name: LayerInputs(InputNorms, channels.layer.in_features, stack.device) for channels in found
    }
    before = _run(stack, index, found, activations, inputs)
    records = []
    for channels in found:
        name, pattern = channels.layer.name, plan.patterns[channels.layer.name]
        inputs[name].reduce(name, stack.dtype)
        losses = channels.losses(channels.layer.view(stack.model), inputs[name])
        by_head = distributed.decide(partial(_best_orders, losses, pattern))
        in_order = [one[:, order.to(one.device)] for one, order in zip(losses, by_head, strict=True)]
        total = max(losses.sum(dtype=torch.float64).item(), 1e-30)
        shares = [sum(lost(one, pattern) for one in all_heads) / total for all_heads in (losses, in_order)]
        records.append(Permuted(name, *shares))
        outputs, order = channels.orders(by_head)
        for part in channels.feeding:
            stack.reorder(part, 0, outputs)
        stack.reorder(channels.layer, 1, order)
    after = _run(stack, index, found, activations)
    for name, output in before.items():
        _check_same(name, output, after[name])
    return records


def _best_orders(losses: Tensor, pattern: Pattern) -> list[Tensor]:
    return [best_order(one, pattern) for one in losses]


def _run(
    stack: Decoder,
    index: int,
    found: list[Channels],
    activations: Activations,
    inputs: dict[str, LayerInputs] | None = None,
) -> dict[str, Tensor]:
    """The layers' outputs for the first windows; ``inputs`` get the inputs of all windows."""
    outputs: dict[str, Tensor] = {}

    def see(name: str, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        outputs.setdefault(name, output.float())
        if inputs is not None:
            inputs[name].update(args[0])

    modules = {channels.layer.name: stack.model.get_submodule(channels.layer.owner) for channels in found}
    hooks = [module.register_forward_hook(partial(see, name)) for name, module in modules.items()]
    try:
        for rows in activations.batches[: None if inputs is not None else 1]:
            activations.output(index, rows)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs


def _check_same(name: str, before: Tensor, after: Tensor) -> None:
    """Raises StageError if the layer's output (..., out_features) changed by more than rounding, at most tokens."""
    errors = (after - before).norm(dim=-1) / before.norm(dim=-1).clamp_min(1e-30)
    if not errors.median() <= SAME:
        raise StageError(
            f"prune.permute_channels: {name} gives other outputs if its inputs are reordered ({errors.median():.0%} "
            "away), so the block depends on their order in another way, too; leave out prune.permute_channels"
        )
