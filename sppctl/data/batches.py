"""Batches of examples: in which order they are taken, padded or packed, and whether a model keeps packed ones apart."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DataCollatorWithFlattening

from sppctl.data.instructions import IGNORED, Example

MULTIPLE = 8  # padded batches are as wide as their longest example, rounded up to this
EXACT = 0.01  # packing_error below this is rounding; families that honour them show 0, others 0.02 to 1
POOL = 50  # batches whose examples are sorted by length together

Batch = dict[str, Any]


@dataclass(frozen=True)
class PadCollator:
    """Pads a batch of examples on the right to its longest, rounded up to a multiple of 8."""

    pad_token_id: int
    response_mask: bool = False

    def __call__(self, examples: list[Example]) -> Batch:
        """Returns input_ids, attention_mask and labels, each (batch, tokens) int64, and the examples' numbers.

        With ``response_mask`` also a boolean tensor of that shape, True for the tokens of the responses.
        """
        width = padded_width([len(example.input_ids) for example in examples])

        def padded(rows: list[list[Any]], filler: Any) -> Tensor:
            return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows])

        batch: Batch = {
            "input_ids": padded([example.input_ids for example in examples], self.pad_token_id),
            "attention_mask": padded([[1] * len(example.input_ids) for example in examples], 0),
            "labels": padded([example.labels for example in examples], IGNORED),
            "examples": [example.number for example in examples],
        }
        if self.response_mask:
            batch["response_mask"] = padded([example.response for example in examples], False)
        return batch


@dataclass(frozen=True)
class PackCollator:
    """Lays the examples of a batch one after the other into one row, without padding.

    Positions start again at 0 with every example. From that, and from the absence of an attention mask, transformers
    concludes where examples begin and masks attention between them; flash attention gets the same borders as lengths.
    """

    response_mask: bool = False

    def __call__(self, examples: list[Example]) -> Batch:
        """Returns input_ids, position_ids and labels, each (1, tokens) int64, and the examples' numbers.

        The first label of an example is IGNORED: the token before it belongs to another example. With
        ``response_mask`` also a boolean tensor of that shape, True for the tokens of the responses but such first ones.
        """
        flatten = DataCollatorWithFlattening(separator_id=IGNORED)
        batch: Batch = flatten([{"input_ids": one.input_ids, "labels": one.labels} for one in examples])
        batch["examples"] = [example.number for example in examples]
        if self.response_mask:
            parts = ([False, *example.response[1:]] for example in examples)
            batch["response_mask"] = torch.tensor([list(itertools.chain.from_iterable(parts))])
        return batch


def padded_width(lengths: Sequence[int]) -> int:
    """Tokens in each row of a padded batch of examples of these lengths."""
    return math.ceil(max(lengths) / MULTIPLE) * MULTIPLE


def padding_share(lengths: Sequence[int], order: Sequence[int], batch_size: int) -> float:
    """Share of the positions that padding fills when examples of these lengths are padded in batches in this order."""
    batches = [[lengths[number] for number in part] for part in slices(order, batch_size)]
    return 1 - sum(map(sum, batches)) / sum(len(batch) * padded_width(batch) for batch in batches)


def random_order(count: int, seed: int, epoch: int) -> list[int]:
    """A random order of so many examples, another one in every epoch."""
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
    return order


def grouped_order(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[int]:
    """An order in which examples of similar length are in the same batch, and which is another one in every epoch.

    Examples are shuffled, sorted by length in pools of 50 batches, and the batches are shuffled, but for the one with
    the longest example, which comes first: memory that does not suffice shows at once. transformers'
    ``get_length_grouped_indices`` leaves the batches of a pool in descending order of their lengths, so that the
    learning rate of a step would go with the length of its examples.
    """
    chooser = random.Random(f"{seed} {epoch}")
    order = list(range(len(lengths)))
    chooser.shuffle(order)
    # small sets are cut into four pools at least, or all epochs would have the same batches
    pool = max(1, min(POOL, len(order) // (4 * batch_size))) * batch_size
    parts = [sorted(part, key=lambda i: -lengths[i]) for part in slices(order, pool)]
    batches = slices(list(itertools.chain.from_iterable(parts)), batch_size)
    rest = [batches.pop()] if len(batches[-1]) < batch_size else []
    chooser.shuffle(batches)
    batches.sort(key=lambda batch: max(lengths[i] for i in batch) < max(lengths))  # stable: it only moves
    return list(itertools.chain.from_iterable(batches + rest))


def slices(numbers: Sequence[Any], size: int) -> list[list[Any]]:
    """The numbers in lists of ``size``; the last one may be shorter."""
    return [list(numbers[start : start + size]) for start in range(0, len(numbers), size)]


@torch.no_grad()
def packing_error(model: nn.Module, first: Sequence[int], second: Sequence[int]) -> float:
    """How far a model is from keeping two packed examples apart, seen at the first token of the second one.

    That token may attend to itself alone, so where borders are honoured no kernel has anything to round, whatever the
    dtype. Its logits behind the first example are compared with those at the start of a row of the same shape: the
    difference as a share of that without any border, 0 where attention and positions are exact, 1 where positions that
    start again mean nothing to the model, which is in evaluation mode.
    """
    device = next(model.parameters()).device

    def logits(tokens: Sequence[int], place: int, **inputs: Tensor) -> Tensor:
        row = torch.tensor([tokens], device=device)
        return model(input_ids=row, use_cache=False, **inputs).logits[0, place].float()

    positions = torch.tensor([[*range(len(first)), *range(len(second))]], device=device)
    alone = logits([*second, *first], 0)
    restarted = logits([*first, *second], len(first), position_ids=positions)
    continued = logits([*first, *second], len(first))
    return float((restarted - alone).norm() / (continued - alone).norm())
