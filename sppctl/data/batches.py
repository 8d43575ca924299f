"""Batches of examples: their order, padding and packing, and whether a model keeps packed examples apart."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DataCollatorWithFlattening

from sppctl.data.instructions import IGNORED, Example

MULTIPLE = 8  # the width of a padded batch is that of its longest example, rounded up to this
EXACT = 1e-5  # of packing_error: 0 in families that keep examples apart, 0.0003 to 1 in others
FILLER = -1  # the number of examples of one token that are not from the data, see sppctl.train.feed
POOL = 50  # batches in a pool, within which examples are sorted by length

Batch = dict[str, Any]


Distilled = Literal["responses", "all", "text"]  # the tokens whose predictions a student learns


def _distilled(example: Example, tokens: Distilled) -> list[bool]:
    if tokens == "responses":
        return example.response
    return [tokens == "all" or example.is_plain] * len(example.input_ids)


@dataclass(frozen=True)
class PadCollator:
    """Pads a batch of examples on the right to its longest, rounded up to a multiple of 8."""

    pad_token_id: int
    distilled: Distilled | None = None

    def __call__(self, examples: list[Example]) -> Batch:
        """Returns input_ids, attention_mask and labels, each (batch, tokens) int64, and the examples' numbers.

        With ``distilled`` also a boolean tensor of that shape and that name, True for these tokens.
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
        if self.distilled is not None:
            batch["distilled"] = padded([_distilled(example, self.distilled) for example in examples], False)
        return batch


@dataclass(frozen=True)
class PackCollator:
    """Concatenates the examples of a batch in one row, without padding.

    Positions restart at 0 with every example. From that, and because there is no attention mask, transformers infers
    where examples start and masks attention between them; flash attention gets the same boundaries as lengths.
    """

    distilled: Distilled | None = None

    def __call__(self, examples: list[Example]) -> Batch:
        """Returns input_ids, position_ids and labels, each (1, tokens) int64, and the examples' numbers.

        The first label of an example is IGNORED: the token before it belongs to another example. With ``distilled``
        also a boolean tensor of that shape and that name, True for these tokens, first tokens of examples excepted.
        """
        flatten = DataCollatorWithFlattening(separator_id=IGNORED)
        batch: Batch = flatten([{"input_ids": example.input_ids, "labels": example.labels} for example in examples])
        batch["examples"] = [example.number for example in examples]
        if self.distilled is not None:
            parts = ([False, *_distilled(example, self.distilled)[1:]] for example in examples)
            batch["distilled"] = torch.tensor([list(itertools.chain.from_iterable(parts))])
        return batch


def num_tokens(batch: Batch) -> int:
    """Tokens in the examples of a batch, without padding and fillers."""
    tokens = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    return int(tokens.sum()) - batch["examples"].count(FILLER)


def of_examples(inputs: Mapping[str, Tensor]) -> Tensor | None:
    """Which positions of a batch hold tokens of the data: (rows x width,) bool, False for padding and fillers.

    A filler is a single token, padded or packed; an example to learn from has at least two. None: all positions.
    """
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is not None:
        return (mask.bool() & (mask.sum(-1, keepdim=True) > 1)).flatten()
    if positions is None:
        return None
    starts = torch.nn.functional.pad(positions.flatten() == 0, (0, 1), value=True)
    return ~(starts[:-1] & starts[1:])


def padded_width(lengths: Sequence[int]) -> int:
    """Tokens in each row of a padded batch of examples of these lengths."""
    return math.ceil(max(lengths) / MULTIPLE) * MULTIPLE


def padding_share(lengths: Sequence[int], order: Sequence[int], batch_size: int) -> float:
    """The share of padding among all positions when examples of these lengths are batched in this order."""
    batches = [[lengths[number] for number in part] for part in slices(order, batch_size)]
    return 1 - sum(map(sum, batches)) / sum(len(batch) * padded_width(batch) for batch in batches)


def random_order(count: int, seed: int, epoch: int) -> list[int]:
    """A random order of ``count`` examples, a different one in every epoch."""
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
    return order


def grouped_order(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[int]:
    """An order in which the examples of a batch have similar lengths, a different one in every epoch.

    Examples are shuffled, sorted by length in pools of 50 batches, and the batches are shuffled, except that the one
    with the longest example comes first, so that a lack of memory shows at once. transformers'
    ``get_length_grouped_indices`` leaves the batches of a pool in descending order of length, which would correlate
    the learning rate of a step with the length of its examples.
    """
    generator = random.Random(f"{seed} {epoch}")
    order = list(range(len(lengths)))
    generator.shuffle(order)
    # at least four pools, or a small set would have the same batches in every epoch
    pool = max(1, min(POOL, len(order) // (4 * batch_size))) * batch_size
    parts = [sorted(part, key=lambda i: -lengths[i]) for part in slices(order, pool)]
    batches = slices(list(itertools.chain.from_iterable(parts)), batch_size)
    incomplete = [batches.pop()] if len(batches[-1]) < batch_size else []
    generator.shuffle(batches)
    if batches:
        widths = [max(lengths[i] for i in batch) for batch in batches]
        # only one of them: in a mixture all windows of plain text have the greatest length
        batches.insert(0, batches.pop(widths.index(max(widths))))
    return list(itertools.chain.from_iterable(batches + incomplete))


def slices(numbers: Sequence[Any], size: int) -> list[list[Any]]:
    """The numbers in lists of ``size``; the last list may be shorter."""
    return [list(numbers[start : start + size]) for start in range(0, len(numbers), size)]


@torch.no_grad()
def packing_error(model: nn.Module, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> float:
    """How much the first of two packed examples leaks into the second, at most, measured at its first token.

    That token should attend only to itself, so a model that honours the boundary has nothing to round in any dtype.
    Its logits after the first example are compared with those at the start of a row of the same shape. The difference
    is relative to that without any boundary: 0 where attention and positions are exact, 1 where the model ignores
    restarted positions, NaN if the model's logits are. The model must be in evaluation mode.
    """
    errors = torch.tensor([_leakage(model, first, second) for first, second in pairs])
    return float(errors.max())  # NaN if one is


def _leakage(model: nn.Module, first: Sequence[int], second: Sequence[int]) -> float:
    device = next(model.parameters()).device

    def logits(tokens: Sequence[int], position: int, **inputs: Tensor) -> Tensor:
        row = torch.tensor([tokens], device=device)
        return model(input_ids=row, use_cache=False, **inputs).logits[0, position].float()

    positions = torch.tensor([[*range(len(first)), *range(len(second))]], device=device)
    alone = logits([*second, *first], 0)
    restarted = logits([*first, *second], len(first), position_ids=positions)
    continued = logits([*first, *second], len(first))
    difference = (restarted - alone).norm()
    return float(difference / (continued - alone).norm()) if difference else 0.0
