"""Instruction data: rows from one or several data sets, mixed by weight, and the tokens and labels they become."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sppctl import console
from sppctl.data import texts
from sppctl.data.prompts import Row, Style, shared
from sppctl.errors import UserError
from sppctl.files import cache, sources

KEY = "train.data.dataset"
IGNORED = -100  # the label that the loss leaves out
HUB_NAMES = {"alpaca": "tatsu-lab/alpaca", "alpaca-gpt4": "vicgalle/alpaca-gpt4"}
CACHE_FORMAT = 3  # raised when examples are made in another way, so that no older file is taken for the same


# --- rows -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instructions:
    """Rows to train on and rows held out."""

    train: list[Row]  # no row of it says what a row held out says
    held_out: list[Row]  # for the validation loss
    taken: dict[str, int]  # how many training rows each data set gave
    left_out: int  # how many rows were not trained on because they say what a row held out says
    versions: dict[str, str]  # of the hub's data, see :class:`sppctl.files.sources.Recorded`

    @cached_property
    def hash(self) -> str:
        """Identifies all rows, in their order, by instruction, input and output."""
        columns = texts.INSTRUCTION_COLUMNS
        parts = ([row.get(name) or "" for row in rows for name in columns] for rows in (self.train, self.held_out))
        return texts.content_hash([texts.content_hash(part) for part in parts])


def load_instructions(
    weights: Mapping[str, float], split: str, *, val_size: int, max_rows: int | None, seed: int
) -> Instructions:
    """Rows with instruction, input and output.

    Several data sets are drawn from without replacement until one is used up: of data set i, with n_i training rows
    and weight w_i, floor(k w_i) rows are taken with k = min_i n_i / w_i. The shares are those of the weights, and no
    row is there twice. The held-out rows are divided by weight, too, and rows of any data set with the text of a
    held-out row are not trained on.

    Args:
        weights: data sets and the weights of their rows: ``instructions``, ``alpaca``, ``alpaca-gpt4``, a hub id, or a
            local .json, .jsonl or .parquet file. With a single one, the weight means nothing.
        split: of hub data sets.
        val_size: rows held out; ``instructions`` holds out its own instead.
        max_rows: training rows at most, of all data sets together.
        seed: of the choice of rows.

    Raises:
        UserError: no such data set, missing columns, nothing in it, nothing left to train on, an impossible weight, or
            a split of data that has none.
    """
    if not weights:
        raise UserError(f"{KEY}: names no data set; write a name, or {{name: weight, ...}}")
    for name, weight in weights.items():
        if not 0 < weight < math.inf:
            raise UserError(f"{KEY}: the weight of {name} is {weight:g}; it must be a number above 0")
    files = find(weights, split)
    shares = _proportional(val_size, {name: weight for name, weight in weights.items() if name != "instructions"})
    with sources.noting() as recorded:
        parts = {name: _split_rows(name, files[name], split, shares.get(name, 0), seed) for name in weights}
    left_out = _separate(parts)
    most = min(len(train) / weights[name] for name, (train, _) in parts.items())
    if max_rows is not None:
        most = min(most, max_rows / sum(weights.values()))
    mixed = Instructions([], [], {}, left_out, recorded.versions)
    for name, (train, held_out) in parts.items():
        count = math.floor(most * weights[name] + 1e-6)  # the division above may end just below a whole number
        if not count:
            raise UserError(f"{KEY}: the weight {weights[name]:g} of {name} gives none of its rows; raise it")
        if count < len(train):
            random.Random(seed).shuffle(train)
        mixed.train.extend(train[:count])
        mixed.held_out.extend(held_out)
        mixed.taken[name] = count
    return mixed


def find(names: Collection[str], split: str) -> dict[str, Path | None]:
    """The local file that each data set is; None if it is built in or of the hub.

    Raises:
        UserError: a directory, or a split where none of the data sets has any. Of a mixture it chooses a part of those
            of the hub.
    """
    texts.check_split("train.data.split", split, *(HUB_NAMES.get(name, name) for name in names))
    return {name: None if name in ("instructions", *HUB_NAMES) else texts.local_file(name, KEY) for name in names}


def _separate(parts: dict[str, tuple[list[Row], list[Row]]]) -> int:
    """Takes the rows that say what a row held out says out of those to train on; how many these were."""

    def content(row: Row) -> tuple[str, ...]:
        return tuple((row.get(name) or "").strip() for name in texts.INSTRUCTION_COLUMNS)

    unseen = {content(row) for _, held_out in parts.values() for row in held_out}
    left_out = 0
    for name, (train, held_out) in parts.items():
        kept = [row for row in train if content(row) not in unseen]
        if not kept:
            raise UserError(f"{KEY}: every row of {name} is held out too; hold out fewer (train.data.val_size)")
        left_out += len(train) - len(kept)
        parts[name] = kept, held_out
    return left_out


def _proportional(total: int, weights: Mapping[str, float]) -> dict[str, int]:
    """Whole numbers in proportion to the weights that add up to the total: the largest remainders are rounded up."""
    exact = {name: total * weight / sum(weights.values()) for name, weight in weights.items()}
    shares = {name: math.floor(share) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: shares[name] - exact[name])
    for name in by_remainder[: total - sum(shares.values())]:
        shares[name] += 1
    return shares


def _split_rows(name: str, file: Path | None, split: str, val_size: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Training rows and held-out rows of one data set, all with texts in the right columns."""
    if name == "instructions":
        return texts.built_in_rows("train"), texts.built_in_rows("heldout")
    known, wanted = ("instructions", *HUB_NAMES), texts.INSTRUCTION_COLUMNS
    rows, columns = texts.load_rows(HUB_NAMES.get(name, name), file, split, KEY, wanted=wanted, known=known)
    missing = [column for column in ("instruction", "output") if column not in columns]
    if columns and missing:
        raise UserError(f"{KEY}: {name} lacks {' and '.join(missing)}; its columns: {', '.join(columns)}")
    if not rows:
        raise UserError(f"{KEY}: {name} holds no rows")
    texts.check_texts(rows, name, KEY, ("instruction", "output"), ("input",))
    random.Random(seed).shuffle(rows)
    if val_size >= len(rows):
        raise UserError(
            f"train.data.val_size: {val_size} leaves nothing of the {len(rows)} rows of {name} to train on; "
            "hold out fewer"
        )
    return rows[val_size:], rows[:val_size]


# --- examples ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A tokenised instruction."""

    input_ids: list[int]
    labels: list[int]  # IGNORED: not in the loss
    truncated: bool
    number: int
    response: list[bool]  # whether a token belongs to the response, whatever the labels leave out


class Examples(Sequence[Example]):
    """Tokenised instructions, kept as five tensors.

    Args:
        tensors: ``tokens`` (all tokens, one example after the other) int32, and for each of them whether it is
            ``labelled`` and whether it belongs to a ``response``, bool; and of each example ``lengths`` int64 and
            ``truncated`` bool.
        numbers: of the examples; None: from 0 on.
    """

    def __init__(self, tensors: dict[str, Tensor], numbers: list[int] | None = None) -> None:
        self.tensors = tensors
        self.ends = tensors["lengths"].cumsum(0).tolist()
        self.numbers = list(range(len(self.ends))) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(number)
        part = slice(self.ends[number] - self.lengths[number], self.ends[number])
        tokens, labelled, response = (self.tensors[name][part].tolist() for name in ("tokens", "labelled", "response"))
        labels = [token if is_label else IGNORED for token, is_label in zip(tokens, labelled, strict=True)]
        return Example(tokens, labels, bool(self.tensors["truncated"][number]), self.numbers[number], response)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens in each example."""
        return self.tensors["lengths"].tolist()

    @property
    def truncated(self) -> int:
        """Examples that were cut."""
        return int(self.tensors["truncated"].sum())

    def having(self, kind: str) -> Examples:
        """The examples with a token that is ``labelled``, or of a ``response``, and that another one predicts."""
        lengths, ends = self.tensors["lengths"], self.tensors["lengths"].cumsum(0)
        marks_before = torch.nn.functional.pad(self.tensors[kind].cumsum(0), (1, 0))
        seconds = torch.minimum(ends - lengths + 1, ends)  # nothing predicts the first token of an example
        kept = marks_before[ends] > marks_before[seconds]
        if kept.all():
            return self
        tokens = kept.repeat_interleave(lengths)
        of_each = ("lengths", "truncated")
        tensors = {name: tensor[kept if name in of_each else tokens] for name, tensor in self.tensors.items()}
        return Examples(tensors, [number for number, keep in zip(self.numbers, kept.tolist(), strict=True) if keep])


def tokenize(tokenizer: Any, rows: Sequence[Row], style: Style, *, seq_len: int, train_on_inputs: bool) -> Examples:
    """Prompt, response and end-of-text of each row as tokens, from the cache if the same text was tokenised before.

    Prompt and whole are tokenised as whole texts, as the published code does, so that merges across their border are
    those that a model meets; the labels start after the prompt's tokens. In a chat, whose text is not simply prompt and
    response, they start with the first token that is not one of the prompt.

    Args:
        tokenizer: of the model, with an end-of-text token.
        rows: with instruction, input and output.
        style: how they become text.
        seq_len: tokens of the longest example; longer ones are cut.
        train_on_inputs: labels for the prompt too.
    """
    marked = [style.text(row) for row in rows]
    depends_on = {
        "format": CACHE_FORMAT,
        "texts": texts.content_hash([f"{start} {text}" for text, start in marked]),
        "special_tokens": style.special_tokens,
        "marks": None if style.marked is None else tokenizer.get_chat_template(),
        "tokenizer": cache.tokenizer_identity(tokenizer),
        "end": tokenizer.eos_token_id,
        "seq_len": seq_len,
        "train_on_inputs": train_on_inputs,
    }
    path = cache.entry("examples", depends_on)
    tensors, _ = cache.read(path)
    if not tensors:
        with console.working(f"tokenising {len(rows):,} examples"):
            tokenised = _tokenised(tokenizer, rows, marked, style)
        response = torch.cat([torch.zeros(0, dtype=torch.bool), *(marks[:seq_len] for _, marks in tokenised)])
        lengths = torch.tensor([len(tokens) for tokens, _ in tokenised], dtype=torch.int64)
        tensors = {
            "tokens": torch.tensor([id_ for tokens, _ in tokenised for id_ in tokens[:seq_len]], dtype=torch.int32),
            "labelled": torch.ones_like(response) if train_on_inputs else response.clone(),
            "response": response,
            "lengths": lengths.clamp(max=seq_len),
            "truncated": lengths > seq_len,
        }
        cache.write(path, tensors)
    return Examples(tensors)


def _tokenised(
    tokenizer: Any, rows: Sequence[Row], marked: Sequence[tuple[str, int]], style: Style
) -> list[tuple[list[int], Tensor]]:
    """The tokens of each row, and for each of them whether it belongs to the response."""
    if style.marked is not None:
        return [(tokens, torch.tensor(marks, dtype=torch.bool)) for tokens, marks in map(style.marked, rows)]
    if not rows:  # fast tokenizers fail on an empty list
        return []
    options = {"padding": False, "truncation": False, "add_special_tokens": style.special_tokens}
    wholes = tokenizer([text for text, _ in marked], **options).input_ids
    prompts = tokenizer([text[:start] for text, start in marked], **options).input_ids
    if style.special_tokens:
        end = [tokenizer.eos_token_id]
        # some tokenizers end every text by themselves
        wholes = [tokens if tokens[-1:] == end else tokens + end for tokens in wholes]
        starts = [len(tokens) - int(tokens[-1:] == end) for tokens in prompts]
    else:
        starts = [shared(*pair) for pair in zip(prompts, wholes, strict=True)]
    return [(tokens, torch.arange(len(tokens)) >= start) for tokens, start in zip(wholes, starts, strict=True)]
