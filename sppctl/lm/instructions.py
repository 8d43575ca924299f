"""Instruction data: rows from one or several data sets, mixed by weight, and the tokens and labels they become."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sppctl.errors import UserError
from sppctl.lm import cache, data
from sppctl.lm.prompts import Style

Row = dict[str, Any]
KEY = "train.data.dataset"
IGNORED = -100  # the label that the loss leaves out
HUB_NAMES = {"alpaca": "tatsu-lab/alpaca", "alpaca-gpt4": "vicgalle/alpaca-gpt4"}
CACHE_FORMAT = 2  # raised when examples are made in another way, so that no older file is taken for the same


# --- rows -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instructions:
    """Rows to train on and rows held out.

    Attributes:
        train: no row of it says what a row held out says.
        held_out: for the validation loss.
        taken: how many training rows each data set gave.
        left_out: how many rows were not trained on because they say what a row held out says.
    """

    train: list[Row]
    held_out: list[Row]
    taken: dict[str, int]
    left_out: int

    @cached_property
    def hash(self) -> str:
        """Identifies all rows, in their order, by what they say."""
        return data.content_hash([rows_hash(self.train), rows_hash(self.held_out)])


def rows_hash(rows: Sequence[Row]) -> str:
    """Identifies rows, in their order, by instruction, input and output."""
    return data.content_hash([row.get(name) or "" for row in rows for name in data.INSTRUCTION_COLUMNS])


def load_instructions(
    weights: Mapping[str, float], split: str, *, val_size: int, max_rows: int | None, seed: int
) -> Instructions:
    """Rows with instruction, input and output.

    Several data sets are drawn from without replacement until one is used up: of data set i, with n_i training rows
    and weight w_i, floor(k w_i) rows are taken with k = min_i n_i / w_i. The shares are those of the weights, and no
    row is there twice. The rows held out are shared out by weight too, and rows of any data set with the text of a
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
    _check_weights(weights)
    for name in weights:
        data.check_split(HUB_NAMES.get(name, name), split, "train.data.split")
    shares = _shared_out(val_size, {name: weight for name, weight in weights.items() if name != "instructions"})
    sources = {name: _split_rows(name, split, shares.get(name, 0), seed) for name in weights}
    left_out = _separate(sources)
    most = min(len(train) / weights[name] for name, (train, _) in sources.items())
    if max_rows is not None:
        most = min(most, max_rows / sum(weights.values()))
    mixed = Instructions([], [], {}, left_out)
    for name, (train, held_out) in sources.items():
        count = math.floor(most * weights[name] + 1e-6)  # the division above may end just below a whole number
        if not count:
            raise UserError(f"{KEY}: the weight {weights[name]:g} of {name} gives none of its rows; raise it")
        if count < len(train):
            random.Random(seed).shuffle(train)
        mixed.train.extend(train[:count])
        mixed.held_out.extend(held_out)
        mixed.taken[name] = count
    return mixed


def _separate(sources: dict[str, tuple[list[Row], list[Row]]]) -> int:
    """Takes the rows that say what a row held out says out of those to train on; how many these were."""
    held_out = {_said(row) for _, rows in sources.values() for row in rows}
    left_out = 0
    for name, (train, own) in sources.items():
        kept = [row for row in train if _said(row) not in held_out]
        if not kept:
            raise UserError(f"{KEY}: every row of {name} is held out too; hold out fewer (train.data.val_size)")
        left_out += len(train) - len(kept)
        sources[name] = kept, own
    return left_out


def _said(row: Row) -> tuple[str, ...]:
    return tuple((row.get(name) or "").strip() for name in data.INSTRUCTION_COLUMNS)


def _check_weights(weights: Mapping[str, float]) -> None:
    if not weights:
        raise UserError(f"{KEY}: names no data set; write a name, or {{name: weight, ...}}")
    for name, weight in weights.items():
        if not 0 < weight < math.inf:
            raise UserError(f"{KEY}: the weight of {name} is {weight:g}; it must be a number above 0")


def _shared_out(total: int, weights: Mapping[str, float]) -> dict[str, int]:
    """Whole numbers in proportion to the weights that add up to the total: the largest remainders are rounded up."""
    whole = sum(weights.values())
    exact = {name: total * weight / whole for name, weight in weights.items()}
    shares = {name: math.floor(share) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: shares[name] - exact[name])
    for name in by_remainder[: total - sum(shares.values())]:
        shares[name] += 1
    return shares


def _split_rows(name: str, split: str, val_size: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Training rows and held-out rows of one data set."""
    if name == "instructions":
        return data.built_in_rows("train"), data.built_in_rows("heldout")
    rows = _read(name, split)
    random.Random(seed).shuffle(rows)
    if val_size >= len(rows):
        raise UserError(
            f"train.data.val_size: {val_size} leaves nothing of the {len(rows)} rows of {name} to train on; "
            "hold out fewer"
        )
    return rows[val_size:], rows[:val_size]


def _read(name: str, split: str) -> list[Row]:
    """All rows of one data set, with the right columns."""
    path = None if name in HUB_NAMES else data.local_file(name, KEY)
    if path is not None:
        rows, columns = data.file_rows(path, KEY)
    elif name in HUB_NAMES or data.is_hub_id(name):
        found = data.load_hub(HUB_NAMES.get(name, name), split)
        columns = list(found.column_names)
        rows = list(found.select_columns([column for column in columns if column in data.INSTRUCTION_COLUMNS]))
    else:
        known = ", ".join(("instructions", *HUB_NAMES))
        raise UserError(f"{KEY}: {name} is no file and none of {known}, nor a hub id (OWNER/NAME)")
    missing = [column for column in ("instruction", "output") if column not in columns]
    if columns and missing:
        raise UserError(f"{KEY}: {name} lacks {' and '.join(missing)}; its columns: {', '.join(columns)}")
    if not rows:
        raise UserError(f"{KEY}: {name} holds no rows")
    data.check_instructions(rows, name, KEY)
    return rows


# --- examples ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A tokenised instruction: tokens, labels (IGNORED: not in the loss), whether it was cut, its number.

    The first ``prompt_tokens`` of the tokens are the prompt, whatever the labels leave out.
    """

    input_ids: list[int]
    labels: list[int]
    truncated: bool
    number: int
    prompt_tokens: int


class Examples(Sequence[Example]):
    """Tokenised instructions, kept as five tensors.

    Args:
        tensors: ``tokens`` (all tokens, one example after the other) int32; and of each example ``lengths`` int64,
            ``starts`` (tokens in front of the first label) int64, ``prompts`` (tokens in front of the response) int64
            and ``truncated`` bool.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.ends = tensors["lengths"].cumsum(0).tolist()

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(number)
        end, length, start = self.ends[number], self.lengths[number], int(self.tensors["starts"][number])
        tokens = self.tensors["tokens"][end - length : end].tolist()
        labels = [IGNORED] * min(start, length) + tokens[start:]
        prompt = min(int(self.tensors["prompts"][number]), length)
        return Example(tokens, labels, bool(self.tensors["truncated"][number]), number, prompt)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens in each example."""
        return self.tensors["lengths"].tolist()

    @property
    def truncated(self) -> int:
        """Examples that were cut."""
        return int(self.tensors["truncated"].sum())

    @property
    def have_labels(self) -> bool:
        """Whether any token is in the loss."""
        return bool((self.tensors["starts"] < self.tensors["lengths"]).any())

    @property
    def have_responses(self) -> bool:
        """Whether any token belongs to a response."""
        return bool((self.tensors["prompts"] < self.tensors["lengths"]).any())


def examples(tokenizer: Any, rows: Sequence[Row], style: Style, *, seq_len: int, train_on_inputs: bool) -> Examples:
    """The rows as of :func:`tokenize`, from the cache if they were tokenised before."""
    path = cache.entry(
        "examples",
        {
            "format": CACHE_FORMAT,
            "rows": rows_hash(rows),
            "style": style.identity,
            "tokenizer": cache.tokenizer_identity(tokenizer),
            "end": tokenizer.eos_token_id,
            "seq_len": seq_len,
            "train_on_inputs": train_on_inputs,
        },
    )
    tensors, _ = cache.read(path) or ({}, {})
    if tensors.keys() != {"tokens", "lengths", "starts", "prompts", "truncated"}:
        made = tokenize(tokenizer, rows, style, seq_len=seq_len, train_on_inputs=train_on_inputs)
        cache.write(path, made.tensors)
        return made
    return Examples(tensors)


def tokenize(tokenizer: Any, rows: Sequence[Row], style: Style, *, seq_len: int, train_on_inputs: bool) -> Examples:
    """Prompt, response and end-of-text of each row as tokens.

    Prompt and whole are tokenised as whole texts, as the published code does, so that merges across their border are
    those that a model meets; the labels start after the prompt's tokens.

    Args:
        tokenizer: of the model, with an end-of-text token.
        rows: with instruction, input and output.
        style: how they become text.
        seq_len: tokens of the longest example; longer ones are cut.
        train_on_inputs: labels for the prompt too.
    """
    prompts = [style.prompt(row) for row in rows]
    wholes = _tokens(tokenizer, [p + row["output"] + style.end for p, row in zip(prompts, rows, strict=True)], style)
    wholes = [[*tokens, tokenizer.eos_token_id] for tokens in wholes]
    prompt_tokens = list(map(len, _tokens(tokenizer, prompts, style)))
    starts = [0] * len(rows) if train_on_inputs else prompt_tokens
    return Examples(
        {
            "tokens": torch.tensor([token for tokens in wholes for token in tokens[:seq_len]], dtype=torch.int32),
            "lengths": torch.tensor([min(len(tokens), seq_len) for tokens in wholes], dtype=torch.int64),
            "starts": torch.tensor(starts, dtype=torch.int64),
            "prompts": torch.tensor(prompt_tokens, dtype=torch.int64),
            "truncated": torch.tensor([len(tokens) > seq_len for tokens in wholes], dtype=torch.bool),
        }
    )


def _tokens(tokenizer: Any, texts: list[str], style: Style) -> list[list[int]]:
    """The tokens of each text; some tokenizers end every text by themselves, and that end is left out."""
    if not texts:  # fast tokenizers fail on an empty list
        return []
    options = {"padding": False, "truncation": False, "add_special_tokens": style.special_tokens}
    found = tokenizer(texts, **options).input_ids
    return [tokens[:-1] if tokens[-1:] == [tokenizer.eos_token_id] else tokens for tokens in found]
