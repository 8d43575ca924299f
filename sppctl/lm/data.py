"""Text: documents to calibrate with and to measure on, and instruction examples."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sppctl.errors import UserError

ASSETS = Path(__file__).resolve().parent.parent / "assets"
IGNORED = -100  # the label that the loss leaves out
ROW_FILES = (".jsonl", ".json", ".parquet")
PACKED_FILES = (".zst", ".bz2", ".xz", ".lz4", ".zip", ".tar", ".tgz")  # all that is not gzip of one file
INSTRUCTION_COLUMNS = ("instruction", "input", "output")
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
    """A split of a hub dataset, ``OWNER/NAME`` or ``OWNER/NAME:CONFIG``, from the network or the cache.

    Raises:
        UserError: it cannot be had.
    """
    import datasets

    if config is None and ":" in repository:
        repository, _, config = repository.partition(":")
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        return datasets.load_dataset(repository, config, split=split, **options)
    except Exception as error:  # datasets raises whatever its file formats, hub client and builders raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        # datasets tells on the second line which configurations there are
        reason = " ".join(lines[:2]) + "; write NAME:CONFIG" if "Config name is missing" in lines[0] else lines[0]
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


def load_text(name: str, split: str, key: str, column: str | None = None) -> Text:
    """The documents behind a name.

    Args:
        name: a known name; a local file, plain or .gz (.jsonl, .json, .parquet: the ``text`` or instruction columns;
            anything else: one text); or a hub dataset, ``OWNER/NAME`` or ``OWNER/NAME:CONFIG``, with such columns.
        split: ``train`` or ``test``, where the source has splits.
        key: the configuration key, for errors.
        column: that holds the documents of a file of rows or a hub dataset; None: as above.

    Raises:
        UserError: no such source, no such column, or nothing in it.
    """
    if column is not None and (name in _TEXTS or (Path(name).is_file() and _form(Path(name)) not in ROW_FILES)):
        raise UserError(f"{key}: {name} has no columns to choose from; leave out column {column}")
    if name in _TEXTS:
        text = _TEXTS[name](split)
    elif Path(name).is_file():
        text = _local_text(Path(name), key, column)
    elif Path(name).is_dir():
        files = sorted(path.name for path in Path(name).iterdir() if path.is_file())
        inside = f"; it holds {', '.join(files[:5])}{', ...' if len(files) > 5 else ''}" if files else ""
        raise UserError(f"{key}: {name} is a directory; name one file in it (.txt, .jsonl, .json, .parquet){inside}")
    elif _is_hub_id(name):
        rows = load_hub(name, split)
        columns = getattr(rows, "column_names", None)
        if columns:  # spare decoding what is not read
            rows = rows.select_columns(_readable(columns, column))
        text = Text(name, _documents(list(rows), column, name, key, columns))
    else:
        raise UserError(f"{key}: {name} is no file and none of {', '.join(_TEXTS)}, nor a hub id (OWNER/NAME)")
    if not any(document.strip() for document in text.documents):
        raise UserError(f"{key}: {name} holds no text")
    return text


def _form(path: Path) -> str:
    """The suffix that says how to read a file, whether compressed or not."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _is_hub_id(name: str) -> bool:
    is_file = _form(Path(name)) in (".txt", *ROW_FILES) or name.endswith(".gz")
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+(:.+)?", name)) and not is_file


def _local_text(path: Path, key: str, column: str | None) -> Text:
    if _form(path) in PACKED_FILES:
        raise UserError(f"{key}: {path} is packed in a way that is not read; unpack it, or compress it with gzip")
    if _form(path) == ".parquet":
        rows, columns = _parquet_rows(path, key, column)
        return Text(path.name, _documents(rows, column, str(path), key, columns))
    if _form(path) in ROW_FILES:
        return Text(path.name, _documents(read_rows(path, key), column, str(path), key))
    try:
        return Text(path.name, [_content(path)])
    except UnicodeDecodeError as error:
        raise UserError(f"{key}: {path} is not UTF-8 text ({error})") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{key}: {path} cannot be read: {error}") from error


def _content(path: Path) -> str:
    if path.suffix.lower() == ".gz":
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return file.read()
    return path.read_text(encoding="utf-8")


def _parquet_rows(path: Path, key: str, column: str | None) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows, of the columns that may be needed, and the names of all columns."""
    import pyarrow
    import pyarrow.parquet

    try:
        columns = list(pyarrow.parquet.read_schema(path).names)
        table = pyarrow.parquet.read_table(path, columns=_readable(columns, column), partitioning=None)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{key}: {path} cannot be read as parquet: {error}") from error
    return table.to_pylist(), columns


def _readable(columns: Sequence[str], column: str | None) -> list[str]:
    """The columns that a document can be made of; all of them if there is none, so that rows stay rows."""
    wanted = ("text", *INSTRUCTION_COLUMNS) if column is None else (column,)
    return [name for name in columns if name in wanted] or list(columns)


def _documents(
    rows: list[dict[str, Any]], column: str | None, name: str, key: str, columns: Sequence[str] | None = None
) -> list[str]:
    """One document per row; ``columns``: all that the source has, if the rows were read without some of them."""
    wanted = column or "text"
    if all(wanted in row for row in rows):
        for number, row in enumerate(rows, start=1):
            if not isinstance(row[wanted], str | None):
                raise UserError(f"{key}: {name}: row {number} has no text in {wanted}")
        return [row[wanted] or "" for row in rows]
    if column is None and all({"instruction", "output"} <= row.keys() for row in rows):
        _check_instructions(rows, name, key)
        return [formatted(row) for row in rows]
    found = ", ".join(columns or dict.fromkeys(column for row in rows for column in row)) or "none"
    wished = f"a column {column}" if column else "a column text (or instruction and output)"
    hint = "; prune.calibration.column names another" if key.startswith("prune.calibration") else ""
    raise UserError(f"{key}: {name} lacks {wished} in some row{hint}; its columns: {found}")


def read_rows(path: Path, key: str) -> list[dict[str, Any]]:
    """The objects of a JSON list or of JSON lines, plain or .gz.

    Raises:
        UserError: neither.
    """
    where = ""
    try:
        content = _content(path)
        if content.lstrip().startswith("["):
            rows = json.loads(content)
        else:
            rows = []
            for number, line in enumerate(content.split("\n"), start=1):  # splitlines would cut at U+2028 in a text
                where = f", line {number},"
                if line.strip():
                    rows.append(json.loads(line))
    except (OSError, EOFError, zlib.error, ValueError) as error:
        reason = getattr(error, "msg", error)
        raise UserError(f"{key}: {path}{where} cannot be read as JSON or JSON lines: {reason}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{key}: {path} must hold one JSON object per row")
    return rows


def _check_instructions(rows: list[dict[str, Any]], name: str, key: str) -> None:
    for number, row in enumerate(rows, start=1):
        wrong = [column for column in ("instruction", "output") if not isinstance(row.get(column), str)]
        wrong += [] if isinstance(row.get("input") or "", str) else ["input"]
        if wrong:
            raise UserError(f"{key}: {name}: row {number} has no text in {' and '.join(wrong)}")


def content_hash(documents: Sequence[str]) -> str:
    """Identifies a text by what it says."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.encode() + b"\0")
    return digest.hexdigest()[:16]


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
    """A tokenised instruction: tokens, labels (IGNORED: not in the loss), whether it was cut, its number.

    The first ``prompt_tokens`` of the tokens are the prompt, whatever the labels leave out.
    """

    input_ids: list[int]
    labels: list[int]
    truncated: bool
    number: int
    prompt_tokens: int = 0


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
        _check_instructions(rows, dataset, key)
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


def tokenize_instruction(
    tokenizer: Any, row: dict[str, Any], number: int, *, seq_len: int, train_on_inputs: bool
) -> Example:
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
    prompt_tokens = min(len(prompt), len(tokens), seq_len)
    return Example(tokens[:seq_len], labels[:seq_len], len(tokens) > seq_len, number, prompt_tokens)
