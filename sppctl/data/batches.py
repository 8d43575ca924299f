"""Batches of examples: in which order they are taken, padded or packed, and whether a model keeps packed ones apart."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from sppctl.data.instructions import IGNORED, Example

MULTIPLE = 8  # padded batches are as wide as their longest example, rounded up to this
EXACT = 0.01  # packing_error below this is rounding; families that honour them show 0, others 0.02 to 1
POOL = 50  # batches whose examples are sorted by length together


@dataclass(frozen=True)
class PadCollator:
    """Pads a batch of examples on the right to its longest, rounded up to a multiple of 8."""

    pad_token_id: int
    response_mask: bool = False

    def __call__(self, examples: list[Example]) -> dict[str, Any]:
        """Returns input_ids, attention_mask and labels, each (batch, tokens) int64, and the examples' numbers.

        With ``response_mask`` also a boolean tensor of that shape, True for the tokens of the responses.
        """
        width = padded_width([len(example.input_ids) for example in examples])
        input_ids = torch.full((len(examples), width), self.pad_token_id)
        attention_mask = torch.zeros(len(examples), width, dtype=torch.int64)
        labels = torch.full((len(examples), width), IGNORED)
        for row, example in enumerate(examples):
            length = len(example.input_ids)
            input_ids[row, :length] = torch.tensor(example.input_ids)
            attention_mask[row, :length] = 1
            labels[row, :length] = torch.tensor(example.labels)
        numbers = [example.number for example in examples]
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, "examples": numbers}
        if self.response_mask:
            batch["response_mask"] = torch.tensor(
                [[*e.response, *[False] * (width - len(e.response))] for e in examples]
            )
        return batch


@dataclass(frozen=True)
class PackCollator:
    """Lays the examples of a batch one after the other into one row, without padding.

    Positions start again at 0 with every example. From that, and from the absence of an attention mask, transformers
    concludes where examples begin and masks attention between them; flash attention gets the same borders as lengths.
    """

    response_mask: bool = False

    def __call__(self, examples: list[Example]) -> dict[str, Any]:
        """Returns input_ids, position_ids and labels, each (1, tokens) int64, and the examples' numbers.

        The first label of an example is IGNORED: the token before it belongs to another example. With
        ``response_mask`` also a boolean tensor of that shape, True for the tokens of the responses but such first ones.
        """
        batch: dict[str, Any] = {
            "input_ids": _row(example.input_ids for example in examples),
            "position_ids": _row(range(len(example.input_ids)) for example in examples),
            "labels": _row([IGNORED, *example.labels[1:]] for example in examples),
            "examples": [example.number for example in examples],
        }
        if self.response_mask:
            batch["response_mask"] = _row([False, *example.response[1:]] for example in examples)
        return batch


def _row(parts: Any) -> Tensor:
    return torch.tensor([list(itertools.chain.from_iterable(parts))])


def padded_width(lengths: Sequence[int]) -> int:
    """Tokens in each row of a padded batch of examples of these lengths."""
    return math.ceil(max(lengths) / MULTIPLE) * MULTIPLE


def padding_share(lengths: Sequence[int], order: Sequence[int], batch_size: int) -> float:
    """Share of the positions that padding fills when examples of these lengths are padded in batches in this order."""
    positions = 0
    for start in range(0, len(order), batch_size):
        batch = [lengths[number] for number in order[start : start + batch_size]]
        positions += len(batch) * padded_width(batch)
    return 1 - sum(lengths[number] for number in order) / positions


class LengthGrouped(Sampler[int]):
    """An order in which examples of similar length are in the same batch, and which is another one in every epoch.

    Examples are shuffled, sorted by length in pools of 50 batches, and the batches are shuffled, but for the one with
    the longest example, which comes first: memory that does not suffice shows at once. The order depends on seed and
    epoch alone, so that several processes, and a training that is resumed, agree on it.

    Args:
        lengths: of all examples.
        batch_size: examples in a batch.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """The Trainer tells which epoch begins."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        chooser = random.Random(f"{self.seed} {self.epoch}")
        order = list(range(len(self.lengths)))
        chooser.shuffle(order)
        # small sets are cut into four pools at least, or all epochs would have the same batches
        pool = max(1, min(POOL, len(order) // (4 * self.batch_size))) * self.batch_size
        parts = [sorted(part, key=lambda i: -self.lengths[i]) for part in _slices(order, pool)]
        batches = _slices(list(itertools.chain.from_iterable(parts)), self.batch_size)
        rest = [batches.pop()] if len(batches[-1]) < self.batch_size else []
        chooser.shuffle(batches)
        batches.sort(key=lambda batch: max(self.lengths[i] for i in batch) < max(self.lengths))  # stable: it only moves
        return itertools.chain.from_iterable(batches + rest)


def _slices(numbers: list[int], size: int) -> list[list[int]]:
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]


@torch.no_grad()
def packing_error(model: nn.Module, first: Sequence[int], second: Sequence[int]) -> float:
    """How far a model is from keeping two packed examples apart, seen at the first token of the second one.

    That token may attend to itself alone, so where borders are honoured no kernel has anything to round, whatever the
    dtype. Its logits behind the first example are compared with those at the start of a row of the same shape.

    Args:
        model: in evaluation mode, in any dtype.
        first: tokens.
        second: other tokens.

    Returns:
        The difference as a share of the difference when the model is told of no border: 0 where attention and
        positions are exact, 1 where positions that start again mean nothing to the model.
    """
    device = next(model.parameters()).device

    def logits(tokens: Sequence[int], place: int, **inputs: Tensor) -> Tensor:
        row = torch.tensor([tokens], device=device)
        return model(input_ids=row, use_cache=False, **inputs).logits[0, place].float()

    positions = torch.tensor([[*range(len(first)), *range(len(second))]], device=device)
    alone = logits([*second, *first], 0)
    told = logits([*first, *second], len(first), position_ids=positions)
    untold = logits([*first, *second], len(first))
    return float((told - alone).norm() / (untold - alone).norm())


class FilledOrder(Sampler[int]):
    """The order of another sampler, then the fillers that make it as long for every process."""

    def __init__(self, sampler: Any, total: int) -> None:
        self.sampler, self.total = sampler, total

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        yield from self.sampler
        yield from range(len(self.sampler), self.total)

    def set_epoch(self, epoch: int) -> None:
        """Another order for another epoch."""
        self.sampler.set_epoch(epoch)
