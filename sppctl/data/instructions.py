"""Training data: rows of one or several data sets, mixed by weight, and their tokens and labels."""

from __future__ import annotations

import itertools
import math
import random
from array import array
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sppctl import console
from sppctl.data import formats, texts
from sppctl.data.formats import KEY, KINDS, content, kind_of
from sppctl.data.prompts import Kind, Row, Style, shared_prefix
from sppctl.data.texts import HUB_ROWS
from sppctl.errors import UserError
from sppctl.files import cache, sources

IGNORED = -100  # the label that the loss leaves out
CACHE_FORMAT = 4  # raised when examples are made in another way, so that older cache files are not used
AT_ONCE = 1000  # documents tokenised in one call

Part = tuple[list[Row], list[Row]]  # the training rows and the held-out rows of a data set

# cuts the documents of a data set into windows; its name is for messages
Cut = Callable[[str, Sequence[str]], list[Row]]


# --- rows -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instructions:
    """Rows to train on and rows held out, both ordered by kind (:data:`sppctl.data.formats.KINDS`)."""

    train: list[Row]  # none repeats the text of a held-out row
    held_out: list[Row]  # for the validation loss
    taken: dict[str, int]  # number of training rows by data set
    left_out: int  # number of rows that are not trained on because they repeat a held-out row
    versions: dict[str, str]  # of hub data, see :class:`sppctl.files.sources.Recorded`

    @cached_property
    def hash(self) -> str:
        """Identifies all rows, in their order, by what is trained on."""
        parts = ([part for row in rows for part in content(row)] for rows in (self.train, self.held_out))
        return texts.content_hash([texts.content_hash(part) for part in parts])


def load_instructions(
    weights: Mapping[str, float],
    split: str,
    *,
    columns: Mapping[str, str],
    cut: Cut,
    val_size: int,
    max_rows: int | None,
    seed: int,
) -> Instructions:
    """Rows of one of the formats of :data:`sppctl.data.formats.FORMATS`; a window of plain text counts as a row.

    Several data sets are sampled without replacement until one is used up: of data set i, with n_i training rows and
    weight w_i, floor(k w_i) rows are used, where k = min_i n_i / w_i. So the shares follow the weights, and no row is
    repeated. The held-out rows are divided by weight, too, and rows of any data set that repeat the text of a held-out
    row are not trained on.

    Args:
        weights: data sets and the weights of their rows: one of texts.ROWS, a hub id, or a local file or folder. The
            weight of a single data set has no effect.
        split: split of hub data sets and folders.
        columns: columns of the data sets that have other names, by the names of the format.
        cut: cuts plain text into windows.
        val_size: number of rows to hold out; ``instructions`` always holds out its own.
        max_rows: maximum number of training rows, all data sets together.
        seed: seed of the choice of rows.

    Raises:
        UserError: a data set does not exist, is of no format, is empty or has no split of that name; nothing is left to
            train on; or a weight is impossible.
    """
    if not weights:
        raise UserError(KEY, "names no data set", "write a name, or {name: weight, ...}")
    for name, weight in weights.items():
        if not 0 < weight < math.inf:
            raise UserError(KEY, f"the weight of {name} is {weight:g}", "it must be a number above 0")
    files = find(weights, split)
    shares = _proportional(val_size, {name: weight for name, weight in weights.items() if name != "instructions"})
    with sources.noting() as recorded:
        loaded = {name: _load(name, files[name], split, columns) for name in weights}
    formats.check_mapping(columns, {name: names for name, (_, names) in loaded.items()})
    parts = {}
    for name in weights:
        rows, names = loaded.pop(name)
        parts[name] = _split_rows(name, _standard(name, rows, names, columns, cut), shares.get(name, 0), seed)
    mixed = Instructions([], [], {}, _remove_duplicates_of_held_out(parts), recorded.versions)
    _mix(mixed, parts, weights, max_rows, seed)
    for rows in (mixed.train, mixed.held_out):
        rows.sort(key=lambda row: list(KINDS).index(kind_of(row)))
    return mixed


def _mix(
    mixed: Instructions, parts: Mapping[str, Part], weights: Mapping[str, float], max_rows: int | None, seed: int
) -> None:
    """Adds the rows of all data sets, as many training rows of each as its weight demands."""
    rows_per_weight = min(len(train) / weights[name] for name, (train, _) in parts.items())
    if max_rows is not None:
        rows_per_weight = min(rows_per_weight, max_rows / sum(weights.values()))
    for name, (train, held_out) in parts.items():
        count = math.floor(rows_per_weight * weights[name] + 1e-6)  # rounding may put the product just below an integer
        if not count:
            raise UserError(KEY, f"the weight {weights[name]:g} of {name} gives none of its rows", "raise it")
        if count < len(train):
            random.Random(seed).shuffle(train)
        mixed.train.extend(train[:count])
        mixed.held_out.extend(held_out)
        mixed.taken[name] = count


def find(names: Collection[str], split: str) -> dict[str, Path | None]:
    """The local file or folder of each data set; None if it is built in or on the hub.

    Raises:
        UserError: a name is that of a folder without data, or a split is given and no data set is on the hub.
    """
    texts.check_split("train.data.split", split, *(HUB_ROWS.get(name, name) for name in names))
    return {name: None if name in texts.ROWS else texts.local_file(name, KEY) for name in names}


def _remove_duplicates_of_held_out(parts: dict[str, Part]) -> int:
    """Removes training rows that repeat the text of a held-out row; returns their number."""

    def stripped(row: Row) -> tuple[str, ...]:
        return tuple(part.strip() for part in content(row))

    held_out_contents = {stripped(row) for _, held_out in parts.values() for row in held_out}
    left_out = 0
    for name, (train, held_out) in parts.items():
        kept = [row for row in train if stripped(row) not in held_out_contents]
        if not kept:
            raise UserError(KEY, f"every row of {name} is held out too", "hold out fewer (train.data.val_size)")
        left_out += len(train) - len(kept)
        parts[name] = kept, held_out
    return left_out


def _proportional(total: int, weights: Mapping[str, float]) -> dict[str, int]:
    """Integers in proportion to the weights that add up to the total: the largest remainders are rounded up."""
    exact = {name: total * weight / sum(weights.values()) for name, weight in weights.items()}
    shares = {name: math.floor(share) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: shares[name] - exact[name])
    for name in by_remainder[: total - sum(shares.values())]:
        shares[name] += 1
    return shares


def _load(name: str, file: Path | None, split: str, mapping: Mapping[str, str]) -> tuple[list[Row], list[str]]:
    """The rows of a data set as they are, and all its columns."""
    if name == "instructions":
        return texts.built_in_rows("train"), list(texts.INSTRUCTION_COLUMNS)
    if name in texts.NAMES and name not in HUB_ROWS:
        text = texts.load_text(name, "train", KEY)  # train.data.split is of hub data sets and folders
        documents = [text.joiner.join(text.documents)] if text.running else text.documents
        return [{"text": document} for document in documents], ["text"]
    columns = (*formats.READ, *formats.PROMPTING, *mapping.values())
    return texts.load_rows(HUB_ROWS.get(name, name), file, split, KEY, columns=columns, short_names=texts.ROWS)


def _standard(name: str, rows: list[Row], columns: list[str], mapping: Mapping[str, str], cut: Cut) -> list[Row]:
    """The rows of a data set in the columns of their format, documents as windows."""
    if not rows:
        raise UserError(KEY, f"{name} holds no rows")
    if name == "instructions":
        return rows
    rows = formats.standard_rows(rows, columns, mapping, name)
    if rows and "text" not in rows[0]:
        return rows
    windows = cut(name, [row["text"] for row in rows])
    if not windows:
        raise UserError(KEY, f"{name} holds no text")
    return windows


def _split_rows(name: str, rows: list[Row], val_size: int, seed: int) -> Part:
    """Training rows and held-out rows of one data set."""
    if name == "instructions":
        return rows, texts.built_in_rows("heldout")
    random.Random(seed).shuffle(rows)
    if val_size >= len(rows):
        what = "windows" if kind_of(rows[0]) == "window" else "rows"
        raise UserError(
            "train.data.val_size",
            f"{val_size} leaves nothing of the {len(rows)} {what} of {name} to train on",
            "hold out fewer",
        )
    return rows[val_size:], rows[:val_size]


def cut_windows(tokenizer: Any, seq_len: int, name: str, documents: Sequence[str]) -> list[Row]:
    """Plain text as windows of ``seq_len`` tokens; the last one may be shorter.

    Documents follow one another in their order, each with the tokenizer's special tokens and an end-of-text token, so a
    window may hold parts of several. Tokens are cached.

    Args:
        tokenizer: the model's tokenizer, with an end-of-text token.
        seq_len: tokens in a window.
        name: the data set's name, for messages.
        documents: none of them blank.

    Returns:
        Rows with ``tokens``, an array of C integers.
    """
    depends_on = {
        "format": CACHE_FORMAT,
        "documents": texts.content_hash(documents),
        "tokenizer": cache.tokenizer_identity(tokenizer),
        "end": tokenizer.eos_token_id,
    }
    path = cache.entry("examples", depends_on)
    tensors, _ = cache.read(path)
    tokens = array("i", tensors["tokens"].numpy().tobytes() if tensors else b"")
    if not tensors:
        end = [tokenizer.eos_token_id]
        with console.working(f"tokenising {len(documents):,} documents of {name}"):
            for first in range(0, len(documents), AT_ONCE):
                part = list(documents[first : first + AT_ONCE])
                for ids in tokenizer(part, padding=False, truncation=False).input_ids:
                    tokens.extend(ids if ids[-1:] == end else ids + end)
        cache.write(path, {"tokens": _int32(tokens)})
    starts = range(0, len(tokens) - 1, seq_len)  # no token predicts one that is alone in the last window
    return [{"tokens": tokens[start : start + seq_len]} for start in starts]


def _int32(tokens: array[int]) -> Tensor:
    return torch.frombuffer(tokens, dtype=torch.int32) if tokens else torch.zeros(0, dtype=torch.int32)


# --- examples ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A tokenised row."""

    input_ids: list[int]
    labels: list[int]  # IGNORED: not in the loss
    truncated: bool
    number: int
    response: list[bool]  # whether a token belongs to the response, whether or not it is in the loss
    is_plain: bool = False  # whether it is a window of plain text


class Examples(Sequence[Example]):
    """Tokenised rows, kept as six tensors.

    Args:
        tensors: ``tokens`` (all tokens, one example after the other) int32; for each token whether it is ``labelled``
            and whether it belongs to a ``response``, bool; for each example ``lengths`` int64, and whether it is
            ``truncated`` and whether it is ``plain`` text, bool.
        numbers: numbers of the examples; None: counted from 0.
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
        truncated, plain = (bool(self.tensors[name][number]) for name in ("truncated", "plain"))
        return Example(tokens, labels, truncated, self.numbers[number], response, plain)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens in each example."""
        return self.tensors["lengths"].tolist()

    @property
    def truncated(self) -> int:
        """Number of truncated examples."""
        return int(self.tensors["truncated"].sum())

    def having(self, kind: str) -> Examples:
        """The examples with a token of that kind, ``labelled`` or ``response``, that another token predicts."""
        lengths, ends = self.tensors["lengths"], self.tensors["lengths"].cumsum(0)
        marks_before = torch.nn.functional.pad(self.tensors[kind].cumsum(0), (1, 0))
        second_tokens = torch.minimum(ends - lengths + 1, ends)  # no token predicts the first one of an example
        kept = marks_before[ends] > marks_before[second_tokens]
        if kept.all():
            return self
        kept_tokens = kept.repeat_interleave(lengths)
        per_example = ("lengths", "truncated", "plain")
        tensors = {name: tensor[kept if name in per_example else kept_tokens] for name, tensor in self.tensors.items()}
        return Examples(tensors, [number for number, keep in zip(self.numbers, kept.tolist(), strict=True) if keep])


def examples(
    tokenizer: Any, rows: Sequence[Row], styles: Mapping[Kind, Style], *, seq_len: int, train_on_inputs: bool
) -> Examples:
    """Rows of all kinds, ordered by kind, as examples: see :func:`tokenize`.

    The loss covers windows as a whole, and of conversations and completions the responses alone; ``train_on_inputs`` is
    about instructions.
    """
    parts = []
    for kind, part in itertools.groupby(rows, key=kind_of):
        if kind == "window":
            parts.append(_examples_of_windows([row["tokens"] for row in part]))
        else:
            on_inputs = train_on_inputs and kind == "instruction"
            parts.append(tokenize(tokenizer, list(part), styles[kind], seq_len=seq_len, train_on_inputs=on_inputs))
    if len(parts) < 2:
        return parts[0] if parts else _examples_of_windows([])
    return Examples({name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})


def _examples_of_windows(windows: list[array[int]]) -> Examples:
    tokens = _int32(array("i", b"".join(window.tobytes() for window in windows)))
    lengths = torch.tensor([len(window) for window in windows], dtype=torch.int64)
    every = torch.ones_like(tokens, dtype=torch.bool)
    tensors = {"tokens": tokens, "labelled": every, "response": every, "lengths": lengths}
    plain = torch.ones_like(lengths, dtype=torch.bool)
    return Examples(tensors | {"truncated": ~plain, "plain": plain})


def tokenize(tokenizer: Any, rows: Sequence[Row], style: Style, *, seq_len: int, train_on_inputs: bool) -> Examples:
    """Prompt, response and end-of-text of each row as tokens, from the cache if the same text was tokenised before.

    The prompt and the full text are tokenised separately, as in the published code, so that merges across the end of
    the prompt are those that a model sees; the labels start after the prompt's tokens. In a chat, whose text is not
    simply prompt and response, they start with the first token that differs from the prompt's. Responses that do not
    end the text end with the last token that they share with the text up to there.

    Args:
        tokenizer: the model's tokenizer, with an end-of-text token.
        rows: rows of one kind, not windows.
        style: how rows become text.
        seq_len: maximum number of tokens in an example; longer ones are truncated.
        train_on_inputs: whether the prompt has labels, too.
    """
    marked = [style.text(row) for row in rows]
    depends_on = {
        "format": CACHE_FORMAT,
        "texts": texts.content_hash([f"{','.join(map(str, borders))} {text}" for text, borders in marked]),
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
    return Examples(tensors | {"plain": torch.zeros_like(tensors["truncated"])})


def _tokenised(
    tokenizer: Any, rows: Sequence[Row], marked: Sequence[tuple[str, list[int]]], style: Style
) -> list[tuple[list[int], Tensor]]:
    """The tokens of each row, and for each of them whether it belongs to a response."""
    if style.marked is not None:
        return [(tokens, torch.tensor(marks, dtype=torch.bool)) for tokens, marks in map(style.marked, rows)]
    options = {"padding": False, "truncation": False, "add_special_tokens": style.special_tokens}

    def ids(texts: list[str]) -> list[list[int]]:
        encoded: list[list[int]] = tokenizer(texts, **options).input_ids if texts else []  # some fail on an empty list
        return encoded

    full_texts = ids([text for text, _ in marked])
    beginnings = iter(ids([text[:border] for text, borders in marked for border in borders]))
    end = [tokenizer.eos_token_id]
    appended = 0  # end-of-text tokens that the tokenizer itself adds to a text
    if style.special_tokens:
        appended = int(ids(["x"])[0][-1:] == end)
        full_texts = [tokens if tokens[-1:] == end else tokens + end for tokens in full_texts]
    tokenised = []
    for tokens, (_, borders) in zip(full_texts, marked, strict=True):
        positions, response = torch.arange(len(tokens)), torch.zeros(len(tokens), dtype=torch.bool)
        for number, beginning in enumerate(itertools.islice(beginnings, len(borders))):
            if style.special_tokens and number % 2 == 0:  # a start
                border = len(beginning) - appended
            else:
                border = shared_prefix(beginning, tokens)
            response ^= positions >= border
        tokenised.append((tokens, response))
    return tokenised
