"""Channels in another order, in which N:M pruning loses less while the dense model computes the same.

Three kinds can be reordered freely, because nothing else depends on their order: the outputs of gate and up together
with the inputs of down; the values of an attention head together with the inputs of the output projection, for all
query heads that share the values; and the hidden states, together with everything that reads or writes them. That the
model really computes the same is checked by running it.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sppctl import distributed
from sppctl.errors import StageError
from sppctl.model.blocks import Decoder, Orders, Skeleton, reordered
from sppctl.model.targets import Target
from sppctl.pattern import Pattern
from sppctl.prune.activations import Activations
from sppctl.prune.layers import PrunePlan
from sppctl.prune.walk import dense_scores
from sppctl.pruners.channels import LAYER_ROWS, best_order, lost
from sppctl.records import Permuted

HIDDEN = "hidden states"
# the layers beside a layer whose outputs are its inputs, one by one
FEEDING = {"down_proj": ("gate_proj", "up_proj"), "fc2": ("fc1",), "o_proj": ("v_proj",), "out_proj": ("v_proj",)}
ATTENTION = ("o_proj", "out_proj")
READING = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc1")  # layers whose inputs are hidden states
OF_ATTENTION = ("q_proj", "k_proj", "v_proj")
OF_HEADS = ("q_norm", "k_norm")  # norms inside of attention
OF_QUERIES = ("q_", "k_")  # names of other modules that queries or keys alone go through
ROWS = 16_384  # of all layers that read the hidden states, by which their order is found
# relative errors of what a block adds in float32, and of hidden states in the dtype of the model: rounding is far below
# them, channels in different orders are above one of them
SAME_BLOCK, SAME = 1e-3, 0.1


@dataclass(frozen=True)
class Channels:
    """Channels with one order.

    The values of an attention head stay together, and are read by ``shared`` query heads each: the inputs of the output
    projection are heads * shared * width, the values heads * width. All others are one head.
    """

    name: str  # of the layer that reads them, or HIDDEN
    readers: list[Target]  # the layers that get an N:M pattern and have them as inputs
    pattern: Pattern  # of these layers
    parameters: dict[str, int]  # the dimension of each parameter that has the channels once, by its full name
    repeated: dict[str, int]  # of each that has them ``shared`` times
    heads: int = 1
    shared: int = 1

    def losses(self, scores: Tensor) -> Tensor:
        """The loss of pruning single weights of a reader, (heads, rows, width), as shares of the layer's.

        All rows of the only reader, some of each of several. ``scores``: Wanda's, (out_features, in_features).
        """
        squared = scores.square()
        squared /= squared.sum(dtype=torch.float64).clamp_min(1e-30).float()
        step = -(-sum(reader.out_features for reader in self.readers) // ROWS) if len(self.readers) > 1 else 1
        return squared[::step].unflatten(1, (self.heads, self.shared, -1)).permute(1, 0, 2, 3).flatten(1, 2)

    def orders(self, by_head: list[Tensor]) -> Orders:
        """The orders of all parameters, from one order for each head (width,)."""
        width = len(by_head[0])
        once = torch.cat([head * width + order for head, order in enumerate(by_head)])
        query_heads = torch.arange(self.heads * self.shared).repeat_interleave(width)
        repeated = torch.cat([order for order in by_head for _ in range(self.shared)]) + query_heads * width
        of_once = {name: {dim: once} for name, dim in self.parameters.items()}
        return of_once | {name: {dim: repeated} for name, dim in self.repeated.items()}


# --- what can be reordered --------------------------------------------------------------------------------------------


def find(skeleton: Skeleton, targets: dict[str, Target], patterns: dict[str, Pattern]) -> list[Channels]:
    """All channels that can be reordered, and that some of the targets read in groups of N:M."""
    readers = {name: target for name, target in targets.items() if target.is_linear and patterns[name].is_structured}
    found = [_inside(skeleton, target, patterns[name]) for name, target in readers.items()]
    return [channels for channels in (*found, _hidden(skeleton, readers, patterns)) if channels is not None]


def _inside(skeleton: Skeleton, target: Target, pattern: Pattern) -> Channels | None:
    """The inputs of a layer, if they are the outputs of layers beside it."""
    owner, _, leaf = target.name.rpartition(".")
    if leaf not in FEEDING:
        return None
    parent = skeleton.model.get_submodule(owner)
    if leaf in ATTENTION and not _is_plain_attention(parent, target):
        return None
    layers: dict[str, Any] = {f"{owner}.{other}": getattr(parent, other, None) for other in FEEDING[leaf]}
    heads, shared = _heads(skeleton, target) if leaf in ATTENTION else (1, 1)
    width = target.in_features // (heads * shared) if heads else 0
    fits = all(isinstance(layer, nn.Linear) and layer.out_features == heads * width for layer in layers.values())
    if not width or not fits or width % (pattern.group or 1):
        return None
    parts = {f"{name}.{part}": 0 for name, layer in layers.items() for part, _ in layer.named_parameters()}
    return Channels(target.name, [target], pattern, parts, {f"{target.name}.weight": 1}, heads, shared)


def _is_plain_attention(attention: nn.Module, output: Target) -> bool:
    """Whether only the output projection reads the values of the heads: no gate and no norm is between them."""
    for name, child in attention.named_children():
        is_known = isinstance(child, nn.Linear) and name in (*OF_ATTENTION, output.name.rpartition(".")[2])
        if not (is_known or name in OF_HEADS or name.startswith(OF_QUERIES)) and any(True for _ in child.parameters()):
            return False
    queries = getattr(attention, "q_proj", None)  # a gate is in further rows of it
    return isinstance(queries, nn.Linear) and queries.out_features == output.in_features


def _heads(skeleton: Skeleton, target: Target) -> tuple[int, int]:
    """Key-value heads, and query heads for each of them; 0 if the configuration does not tell."""
    config = skeleton.config.get_text_config()
    queries = getattr(config, "num_attention_heads", None) or 0
    heads = getattr(config, "num_key_value_heads", None) or queries
    return (heads, queries // heads) if heads and queries % heads == 0 and target.in_features % queries == 0 else (0, 0)


def _hidden(skeleton: Skeleton, readers: dict[str, Target], patterns: dict[str, Pattern]) -> Channels | None:
    """The hidden states, if every parameter of the model is known to read them, to write them, or to do neither."""
    width, parameters = skeleton.config.get_text_config().hidden_size, {}
    if any(buffer.dim() > 1 and buffer.shape[-1] == width for buffer in _outside_the_blocks(skeleton)):
        return None  # added to the hidden states, such as positions that are computed
    for name, parameter in skeleton.model.named_parameters():
        dim = _dim_of_hidden(skeleton, name, tuple(parameter.shape), width)
        if dim is None:
            return None
        if dim >= 0:
            parameters[name] = dim
    counts = Counter(patterns[name] for name in readers if name.rpartition(".")[2] in READING)
    pattern = max(counts, key=counts.__getitem__, default=Pattern(keep=1, group=2))
    layers = [
        target
        for name, target in readers.items()
        if name.rpartition(".")[2] in READING and patterns[name] == pattern and parameters.get(f"{name}.weight") == 1
    ]
    return Channels(HIDDEN, layers, pattern, parameters, {}) if layers and width % (pattern.group or 1) == 0 else None


def _outside_the_blocks(skeleton: Skeleton) -> Iterator[Tensor]:
    """The buffers that are in no block."""
    for name, buffer in skeleton.model.named_buffers():
        if not name.startswith(f"{skeleton.blocks_name}."):
            yield buffer


def _dim_of_hidden(skeleton: Skeleton, name: str, shape: tuple[int, ...], width: int) -> int | None:
    """The dimension of a parameter that is the hidden states'; -1 if it has none; None if that is not known."""
    owner, _, leaf = name.rpartition(".")
    above, _, kind = owner.rpartition(".")
    module = skeleton.model.get_submodule(owner)
    base, _, _ = skeleton.blocks_name.rpartition(".")
    if isinstance(module, nn.Embedding):
        return 1 if shape[1:] == (width,) else None
    if isinstance(module, nn.Linear):
        if module is skeleton.model.get_output_embeddings() or kind in READING:
            return -1 if leaf == "bias" else 1 if shape[1:] == (width,) else None
        return 0 if kind in FEEDING and shape[0] == width else None
    if "norm" not in kind:
        return None
    if kind in OF_HEADS:
        return -1
    is_between = base == above or skeleton.blocks_name == above.rpartition(".")[0]
    return 0 if is_between and shape == (width,) else None


# --- finding the orders -----------------------------------------------------------------------------------------------


def readers(found: list[Channels]) -> dict[str, Channels]:
    """The channels that each layer reads, by its name."""
    return {target.name: channels for channels in found for target in channels.readers}


@torch.no_grad()
def best_orders(
    stack: Decoder, plan: PrunePlan, found: list[Channels], activations: Activations
) -> tuple[dict[str, list[Tensor]], list[Permuted]]:
    """Runs the dense model on ``activations``, to the last block of the plan, whose targets are the :func:`readers`.

    Returns:
        The orders of each head of the channels by their names, and what they gain.

    Raises:
        StageError: inputs are not finite.
    """
    reading = readers(found)
    losses: dict[str, list[Tensor]] = {channels.name: [] for channels in found}
    orders: dict[str, list[Tensor]] = {}
    records = []
    for targets, scores in zip(plan.by_block(stack), dense_scores(stack, plan, activations), strict=False):
        for name, of_layer in zip(targets, scores, strict=True):
            channels = reading[name]
            losses[channels.name].append(channels.losses(of_layer))
            if len(losses[channels.name]) == len(channels.readers):
                of_heads = torch.cat(losses.pop(channels.name), dim=1)
                orders[channels.name] = distributed.decide(partial(_orders_of, of_heads, channels))
                records.append(_record(channels, of_heads, orders[channels.name]))
    return orders, records


def _orders_of(losses: Tensor, channels: Channels) -> list[Tensor]:
    return [best_order(one, channels.pattern, ROWS if len(channels.readers) > 1 else LAYER_ROWS) for one in losses]


def _record(channels: Channels, losses: Tensor, by_head: list[Tensor]) -> Permuted:
    """What the orders gain, for losses (heads, rows, width)."""
    in_order = [one[:, order.to(one.device)] for one, order in zip(losses, by_head, strict=True)]
    total = max(losses.sum(dtype=torch.float64).item(), 1e-30)
    before, after = (sum(lost(one, channels.pattern) for one in heads) / total for heads in (losses, in_order))
    return Permuted(channels.name, before, after)


def orders_of_parameters(found: list[Channels], orders: dict[str, list[Tensor]]) -> Orders:
    """The orders of all parameters, by their full names."""
    result: Orders = {}
    for channels in found:
        for name, of_parameter in channels.orders(orders[channels.name]).items():
            result[name] = result.get(name, {}) | of_parameter
    return result


def inverse(orders: Orders) -> Orders:
    """The orders that undo these."""
    return {name: {dim: order.argsort() for dim, order in of_one.items()} for name, of_one in orders.items()}


@torch.no_grad()
def check_same(
    stack: Decoder, num_blocks: int, first: Activations, expected: Tensor, orders: Orders, hidden: Tensor | None
) -> None:
    """Runs the first blocks of the reordered model on the first window, and each of them in both orders in float32.

    Args:
        stack: the model with its channels reordered.
        num_blocks: how many :func:`best_orders` ran.
        first: the embedded first window.
        expected: the hidden states (tokens, width) of the dense model behind these blocks.
        orders: of the parameters, as they are now.
        hidden: the order of the hidden states now (width,); None: as they were.

    Raises:
        StageError: the hidden states are others.
    """
    for index in range(num_blocks):
        stack.load_block(index)
        _check_error(stack, _error_of_block(stack, index, first, orders, hidden), SAME_BLOCK)
        first.run(index)
        stack.release_block(index)
    _check_error(stack, _error(first.hidden[0], _put(expected, hidden)), SAME)


def _error_of_block(stack: Decoder, index: int, first: Activations, orders: Orders, hidden: Tensor | None) -> float:
    """The error of what a loaded block adds to the hidden states, in float32: compared with the former order."""
    block, call = copy.deepcopy(stack.blocks[index]).float(), first.call(index, slice(0, 1)).widened()
    for module in block.modules():  # their configurations are copies, too; flash attention is not for float32
        config: Any = getattr(module, "config", None)
        if "flash" in str(getattr(config, "_attn_implementation", "")):
            config._attn_implementation = "sdpa"
    inputs = first.hidden[:1].to(stack.device).float()
    added = call(block, inputs) - inputs
    prefix = f"{stack.blocks_name}.{index}."
    own = {name.removeprefix(prefix): order for name, order in orders.items() if name.startswith(prefix)}
    for name, former in inverse(own).items():
        parameter = block.get_parameter(name)
        parameter.data = reordered(parameter.data, former)
    before = _put(inputs, None if hidden is None else hidden.argsort())
    return _error(added[0], _put(call(block, before) - before, hidden)[0])


def _put(states: Tensor, order: Tensor | None) -> Tensor:
    """States (..., width) in another order."""
    return states if order is None else states[..., order.to(states.device)]


def _error(states: Tensor, expected: Tensor) -> float:
    """The relative error of states (tokens, width), the median over the tokens."""
    expected = expected.float()
    difference = (states.float().to(expected.device) - expected).norm(dim=-1)
    return float((difference / expected.norm(dim=-1).clamp_min(1e-30)).median())


def _check_error(stack: Decoder, error: float, allowed: float) -> None:
    if not error <= allowed:
        raise StageError(
            f"prune.permute_channels: with its channels in another order {type(stack.model).__name__} computes "
            f"something else (hidden states {error:.1%} away), so more depends on that order; leave it out"
        )
