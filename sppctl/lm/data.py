"""Text: calibration windows, evaluation texts, and instruction examples."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sppctl.errors import UserError

ASSETS = Path(__file__).resolve().parent.parent / "assets"
IGNORED = -100  # the label that the loss leaves out
C4_FIRST_SHARD = "en/c4-train.00000-of-01024.json.gz"  # the whole of C4 would be a download of 300 GB

# the two prompts of Stanford Alpaca, as every Alpaca-trained model expects them
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
PROMPT_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Text:
    """Documents of one source, and how they are joined into one text."""

    name: str
    documents: list[str]
    joiner: str = "\n\n"


# --- sources ----------------------------------------------------------------------------------------------------------


def load_hub(repository: str, split: str, config: str | None = None, **options: Any) -> Any:
    """A split of a hub dataset, from the network or the cache.

    Raises:
        UserError: it cannot be had.
    """
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        return datasets.load_dataset(repository, config, split=split, **options)
    except Exception as error:  # datasets raises whatever its file formats, hub client and builders raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"dataset {repository} ({split}) cannot be had: {reason}; check the name and the network, "
            "download it first on a machine that has one, or give a local file"
        ) from error


def _c4(_: str) -> Text:
    import datasets

    if datasets.config.HF_DATASETS_OFFLINE:
        rows = load_hub("allenai/c4", "train", "en")
    else:
        rows = load_hub("allenai/c4", "train", data_files={"train": C4_FIRST_SHARD}, streaming=True).take(20_000)
    return Text("c4", [row["text"] for row in rows], joiner="\n\n")


def _wikitext2(split: str) -> Text:
    rows = load_hub("Salesforce/wikitext", split, "wikitext-2-raw-v1")
    return Text("wikitext2", list(rows["text"]))


def _alpaca(split: str) -> Text:
    return Text("alpaca", [formatted(row) for row in load_hub("tatsu-lab/alpaca", split)])


def _instructions(split: str) -> Text:
    return Text("instructions", [formatted(row) for row in built_in_rows("train" if split == "train" else "heldout")])


def _prose(_: str) -> Text:
    """Paragraphs of CPython's own reference manual, which every installation carries for ``help()``."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError("text prose: this Python comes without pydoc_data; name another text") from error
    paragraphs = (part for topic in sorted(topics) for part in topics[topic].split("\n\n"))
    # running text only: no code, tables, grammar or headings
    prose = [
        " ".join(part.split())
        for part in paragraphs
        if re.match(r"[A-Z]", part) and len(part) >= 200 and "::=" not in part
    ]
    return Text("prose", list(dict.fromkeys(prose)))


_TEXTS = {"c4": _c4, "wikitext2": _wikitext2, "alpaca": _alpaca, "instructions": _instructions, "prose": _prose}


def load_text(name: str, split: str, key: str) -> Text:
    """The documents behind a name.

    Args:
        name: a known name, a local file (.txt: one text; .jsonl / .json: the ``text`` or instruction columns), or a
            hub id with a ``text`` column.
        split: ``train`` or ``test``, where the source has splits.
        key: the configuration key, for errors.

    Raises:
        UserError: no such source, or nothing in it.
    """
    if name in _TEXTS:
        text = _TEXTS[name](split)
    elif Path(name).is_file():
        text = _local_text(Path(name), key)
    elif _is_hub_id(name):
        text = Text(name, _text_column(load_hub(name, split), name))
    else:
        raise UserError(f"{key}: {name} is no file and none of {', '.join(_TEXTS)}, nor a hub id (OWNER/NAME)")
    if not any(document.strip() for document in text.documents):
        raise UserError(f"{key}: {name} holds no text")
    return text


def _is_hub_id(name: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and Path(name).suffix not in (".json", ".jsonl", ".txt")


def _local_text(path: Path, key: str) -> Text:
    if path.suffix in (".jsonl", ".json"):
        return Text(path.name, _text_column(read_rows(path, key), str(path)))
    try:
        return Text(path.name, [path.read_text(encoding="utf-8")])
    except UnicodeDecodeError as error:
        raise UserError(f"{key}: {path} is not UTF-8 text ({error})") from error


def _text_column(rows: Any, name: str) -> list[str]:
    rows = list(rows)
    if rows and all("text" in row for row in rows):
        return [str(row["text"]) for row in rows]
    if rows and all({"instruction", "output"} <= row.keys() for row in rows):
        return [formatted(row) for row in rows]
    columns = ", ".join(dict.fromkeys(column for row in rows for column in row)) or "none"
    raise UserError(f"{name} lacks a column text (or instruction and output) in some row; its columns: {columns}")


def read_rows(path: Path, key: str) -> list[dict[str, Any]]:
    """The objects of a JSON list or of JSON lines.

    Raises:
        UserError: neither.
    """
    where = ""
    try:
        content = path.read_text(encoding="utf-8")
        if content.lstrip().startswith("["):
            rows = json.loads(content)
        else:
            rows = []
            for number, line in enumerate(content.split("\n"), start=1):  # splitlines would cut at U+2028 in a text
                where = f", line {number},"
                if line.strip():
                    rows.append(json.loads(line))
    except (OSError, ValueError) as error:
        reason = getattr(error, "msg", error)
        raise UserError(f"{key}: {path}{where} cannot be read as JSON or JSON lines: {reason}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{key}: {path} must hold one JSON object per row")
    return rows


def content_hash(documents: Sequence[str]) -> str:
    """Identifies a text by what it says."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.encode() + b"\0")
    return digest.hexdigest()[:16]


# --- calibration ------------------------------------------------------------------------------------------------------


def calibration_windows(
    tokenizer: Any, text: Text, *, samples: int, seq_len: int, seed: int, key: str = "prune.calibration"
) -> tuple[Tensor, str]:
    """Windows of calibration text, without padding.

    As published: a random document longer than a window, a random offset in it. Where a source has too few such
    documents, documents are joined in random order and cut into windows, of which some are chosen, none twice.

    Args:
        tokenizer: of the model.
        text: the source.
        samples: number of windows.
        seq_len: tokens in a window.
        seed: of the choice.
        key: for errors.

    Returns:
        (samples, seq_len) int64, and ``random-document`` or ``concatenate``, the way they were made.

    Raises:
        UserError: too little text.
    """
    order = list(text.documents)
    chooser = random.Random(seed)
    chooser.shuffle(order)
    windows: list[list[int]] = []
    for document in order:
        if len(document.encode()) < seq_len:  # no token is shorter than a byte: spare the tokeniser
            continue
        tokens = tokenizer(document).input_ids
        if len(tokens) > seq_len:
            offset = chooser.randint(0, len(tokens) - seq_len - 1)
            windows.append(tokens[offset : offset + seq_len])
        if len(windows) == samples:
            return torch.tensor(windows), "random-document"
    needed = samples * seq_len
    joined: list[int] = []
    for document in order:
        if len(joined) >= needed:
            break
        if document.strip():
            joined += tokenizer(document + text.joiner).input_ids
    if len(joined) < needed:
        raise UserError(
            f"{key}: {text.name} has {len(joined)} tokens, {samples} windows of {seq_len} need {needed}; "
            f"{needed - len(joined)} are missing: use fewer samples, a shorter seq_len or more text"
        )
    count = len(joined) // seq_len
    every = torch.tensor(joined[: count * seq_len]).view(count, seq_len)
    return every[sorted(chooser.sample(range(count), samples))], "concatenate"


# --- instructions -----------------------------------------------------------------------------------------------------


def built_in_rows(split: str) -> list[dict[str, Any]]:
    """The rows that come with sppctl; ``split`` is ``train`` or ``heldout``."""
    rows = read_rows(ASSETS / "instructions.jsonl", "instructions")
    return [row for row in rows if row["split"] == split]


def prompt_of(row: dict[str, Any]) -> str:
    """The Alpaca prompt of a row, up to where the response starts."""
    template = PROMPT_WITH_INPUT if (row.get("input") or "").strip() else PROMPT_WITHOUT_INPUT
    return template.format(instruction=row["instruction"], input=row.get("input", ""))


def formatted(row: dict[str, Any]) -> str:
    """Prompt and response of a row as one text."""
    return prompt_of(row) + row["output"]


@dataclass(frozen=True)
class Example:
    """A tokenised instruction: tokens, labels (IGNORED where the loss is not counted), and whether it was cut."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool


def load_instructions(
    dataset: str, split: str, *, val_size: int, max_rows: int | None, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and validation rows with instruction, input and output.

    Args:
        dataset: ``instructions``, ``alpaca``, a hub id, or a local .json / .jsonl file.
        split: of a hub dataset.
        val_size: rows held out; ``instructions`` holds out its own.
        max_rows: rows used at most, of the shuffled training rows.
        seed: of the shuffle.

    Raises:
        UserError: no such dataset, missing columns, nothing in it, or nothing left to train on.
    """
    key = "train.data.dataset"
    if dataset == "instructions":
        train, held_out = built_in_rows("train"), built_in_rows("heldout")
    else:
        if Path(dataset).is_file():
            rows = read_rows(Path(dataset), key)
        elif dataset == "alpaca" or _is_hub_id(dataset):
            rows = list(load_hub("tatsu-lab/alpaca" if dataset == "alpaca" else dataset, split))
        else:
            raise UserError(f"{key}: {dataset} is no file, neither instructions nor alpaca, nor a hub id (OWNER/NAME)")
        if not rows:
            raise UserError(f"{key}: {dataset} holds no rows")
        missing = {"instruction", "output"} - rows[0].keys()
        if missing:
            columns = ", ".join(map(str, rows[0]))
            raise UserError(f"{key}: {dataset} lacks {' and '.join(sorted(missing))}; its columns: {columns}")
        for number, row in enumerate(rows, start=1):
            wrong = [column for column in ("instruction", "output") if not isinstance(row.get(column), str)]
            wrong += [] if isinstance(row.get("input") or "", str) else ["input"]
            if wrong:
                raise UserError(f"{key}: {dataset}: row {number} has no text in {' and '.join(wrong)}")
        random.Random(seed).shuffle(rows)
        train, held_out = rows[val_size:], rows[:val_size]
    if max_rows is not None:
        random.Random(seed).shuffle(train)
        train = train[:max_rows]
    if not train:
        raise UserError(
            f"train.data.val_size: {val_size} leaves nothing of the {len(held_out)} rows of {dataset} to train on; "
            "hold out fewer"
        )
    return train, held_out


def tokenize_instruction(tokenizer: Any, row: dict[str, Any], *, seq_len: int, train_on_inputs: bool) -> Example:
    """Prompt, response and end-of-text as tokens.

    Prompt and whole are tokenised as whole texts, as the published code does, so that merges across their border are
    those that a model meets; the labels start after the prompt's tokens.
    """
    end = tokenizer.eos_token_id
    prompt, tokens = tokenizer(prompt_of(row)).input_ids, tokenizer(formatted(row)).input_ids
    # some tokenizers end every text by themselves
    prompt = prompt[:-1] if prompt[-1:] == [end] else prompt
    tokens = [*(tokens[:-1] if tokens[-1:] == [end] else tokens), end]
    labels = tokens if train_on_inputs else [IGNORED] * min(len(prompt), len(tokens)) + tokens[len(prompt) :]
    return Example(tokens[:seq_len], labels[:seq_len], len(tokens) > seq_len)
