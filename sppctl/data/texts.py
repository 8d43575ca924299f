"""Text: documents to calibrate with and to measure on, from files, from the hub, and built in."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sppctl.data.prompts import Row, formatted
from sppctl.errors import UserError
from sppctl.files import sources

ASSETS = Path(__file__).resolve().parent.parent / "assets"
ROW_FILES = (".jsonl", ".json", ".parquet")
PACKED_FILES = (".zst", ".bz2", ".xz", ".lz4", ".zip", ".tar", ".tgz")  # all that is not gzip of one file
INSTRUCTION_COLUMNS = ("instruction", "input", "output")
# the whole of C4 would be a download of 300 GB; the literature measures on 1,100 documents of the validation split
C4_FIRST_SHARD = {
    "train": "en/c4-train.00000-of-01024.json.gz",
    "validation": "en/c4-validation.00000-of-00008.json.gz",
}
C4_DOCUMENTS = {"train": 20_000, "validation": 1_100}
C4_WINDOWS = 256  # of the validation split that the literature measures on
# what calibration reads of a source at most: of web pages more than enough for hundreds of windows of long documents
MOST_DOCUMENTS = 20_000
MOST_CHARACTERS = 200_000_000


@dataclass(frozen=True)
class Text:
    """Documents of one source, and how they are joined into one text.

    Attributes:
        name: of the source.
        documents: in the source's order.
        joiner: between two of them.
        windows: how many of the joined text are measured at most; None: all.
        running: they follow each other as the paragraphs of one text.
    """

    name: str
    documents: list[str]
    joiner: str = "\n\n"
    windows: int | None = None
    running: bool = False


# --- sources ----------------------------------------------------------------------------------------------------------


def load_hub(repository: str, split: str, config: str | None = None, **options: Any) -> Any:
    """A split of a hub dataset, ``OWNER/NAME`` or ``OWNER/NAME:CONFIG``, from the network or the cache.

    Raises:
        UserError: it could not be loaded.
    """
    import datasets

    if config is None and ":" in repository:
        repository, _, config = repository.partition(":")
    if os.path.lexists(repository):
        raise UserError(
            f"dataset {repository}: {Path.cwd() / repository} has the same name and would be read in its place; "
            "rename it, or work in another directory"
        )
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    with _had(repository, split):
        found = datasets.load_dataset(repository, config, split=split, **options)
        sources.note(found)
        return found


@contextmanager
def _had(repository: str, split: str) -> Iterator[None]:
    """Says in one line why a hub dataset could not be loaded; streamed rows are fetched only while they are read."""
    try:
        yield
    except Exception as error:  # datasets raises whatever its file formats, hub client and builders raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        # datasets tells on the second line which configurations there are
        reason = " ".join(lines[:2]) + "; write NAME:CONFIG" if "Config name is missing" in lines[0] else lines[0]
        raise UserError(
            f"dataset {repository} ({split}) could not be loaded: {reason}; check the name and the network, "
            "download it first on a machine that has one, or give a local file"
        ) from error


def _c4(split: str) -> Text:
    """The first documents of the training split, or of the validation split to measure on.

    The latter as Wanda and SparseGPT have it: joined by blanks, the first 256 windows of it. They are read from the
    first shard where that file was downloaded, else streamed from the hub.
    """
    import datasets
    from huggingface_hub import try_to_load_from_cache

    split = "train" if split == "train" else "validation"
    first, count = C4_FIRST_SHARD[split], C4_DOCUMENTS[split]
    shard = try_to_load_from_cache("allenai/c4", first, repo_type="dataset")
    if isinstance(shard, str):
        with gzip.open(shard, "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in itertools.islice(file, count)]
    elif datasets.config.HF_DATASETS_OFFLINE:
        rows = load_hub("allenai/c4", split, "en")
        rows = rows.select(range(min(count, len(rows))))
    else:
        rows = load_hub("allenai/c4", split, data_files={split: first}, streaming=True).take(count)
    with _had("allenai/c4", split):
        documents = [row["text"] for row in rows]
    return Text("c4", documents) if split == "train" else Text("c4", documents, joiner=" ", windows=C4_WINDOWS)


def _wikitext2(split: str) -> Text:
    rows = load_hub("Salesforce/wikitext", split, "wikitext-2-raw-v1")
    return Text("wikitext2", list(rows["text"]), running=True)


def _alpaca(split: str) -> Text:
    return Text("alpaca", [formatted(row) for row in load_hub("tatsu-lab/alpaca", split)])


def _instructions(split: str) -> Text:
    return Text("instructions", [formatted(row) for row in built_in_rows("train" if split == "train" else "heldout")])


def built_in_rows(split: str) -> list[Row]:
    """The rows that come with sppctl; ``split`` is ``train`` or ``heldout``."""
    rows = read_rows(ASSETS / "instructions.jsonl", "instructions")
    return [row for row in rows if row["split"] == split]


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


def load_text(name: str, split: str, key: str, column: str | None = None, part: bool = False) -> Text:
    """The documents behind a name.

    Args:
        name: a known name; a local file, plain or .gz (.jsonl, .json, .parquet: the ``text`` or instruction columns;
            anything else: one text); or a hub dataset, ``OWNER/NAME`` or ``OWNER/NAME:CONFIG``, with such columns.
        split: ``train`` or ``test``, where the source has splits.
        key: the configuration key, for errors.
        column: that holds the documents of a file of rows or a hub dataset; None: as above.
        part: the first MOST_DOCUMENTS rows will do, or fewer that hold MOST_CHARACTERS: of JSON lines and of the hub
            no more is read.

    Raises:
        UserError: no such source, no such column, or nothing in it.
    """
    path = None if name in _TEXTS else local_file(name, key)
    if column is not None and (name in _TEXTS or (path is not None and _form(path) not in ROW_FILES)):
        raise UserError(f"{key}: {name} has no columns to choose from; leave out column {column}")
    if name in _TEXTS:
        text = _TEXTS[name](split)
    elif path is not None:
        text = _local_text(path, key, column, part)
    elif is_hub_id(name):
        text = _hub_text(name, split, key, column, part)
    else:
        raise UserError(f"{key}: {name} is not a file and none of {', '.join(_TEXTS)}, nor a hub id (OWNER/NAME)")
    if not any(document.strip() for document in text.documents):
        raise UserError(f"{key}: {name} holds no text")
    return text


def local_file(name: str, key: str) -> Path | None:
    """The local file that a name means; None if nothing here has that name, so that it may be one of the hub's.

    Raises:
        UserError: the name of a directory, or of what is neither file nor directory.
    """
    path = Path(name)
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.is_file())
        inside = f"; it holds {', '.join(files[:5])}{', ...' if len(files) > 5 else ''}" if files else ""
        raise UserError(f"{key}: {name} is a directory; name one file in it (.txt, .jsonl, .json, .parquet){inside}")
    if os.path.lexists(path) and not path.is_file():
        raise UserError(f"{key}: {name} is neither a file nor a link to one")
    return path if path.is_file() else None


def has_splits(name: str) -> bool:
    """Whether data is of the hub."""
    return is_hub_id(name) and not os.path.lexists(name)


def check_split(name: str, split: str, key: str) -> None:
    """A part can be chosen of data sets of the hub only.

    Raises:
        UserError: it is chosen of other data.
    """
    if split != "train" and not has_splits(name):
        raise UserError(
            f"{key}: {name} has no split {split}; only a data set of the hub (OWNER/NAME) has splits to choose from"
        )


def _form(path: Path) -> str:
    """The suffix that says how to read a file, whether compressed or not."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def is_hub_id(name: str) -> bool:
    """Whether a name can be ``OWNER/NAME`` or ``OWNER/NAME:CONFIG`` and is not a file that is missing."""
    is_file = _form(Path(name)) in (".txt", *ROW_FILES) or name.endswith(".gz")
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+(:.+)?", name)) and not is_file


def _hub_text(name: str, split: str, key: str, column: str | None, part: bool) -> Text:
    import datasets

    # what is streamed comes without its size, so slices of splits cannot be; offline it comes from the cache
    streamed = part and split.isidentifier() and not datasets.config.HF_DATASETS_OFFLINE
    rows = load_hub(name, split, streaming=True) if streamed else load_hub(name, split)
    with _had(name, split):
        columns = getattr(rows, "column_names", None)
        if columns:  # spare decoding what is not read
            rows = rows.select_columns(_readable(columns, column))
        found = list(_first(rows) if part else rows)
    return Text(name, _documents(found, column, name, key, columns))


def _first(rows: Iterable[Row]) -> Iterator[Row]:
    """The first rows, as many as calibration reads at most."""
    characters = 0
    for row in itertools.islice(rows, MOST_DOCUMENTS):
        yield row
        characters += sum(len(value) for value in row.values() if isinstance(value, str))
        if characters >= MOST_CHARACTERS:
            return


def _local_text(path: Path, key: str, column: str | None, part: bool) -> Text:
    _check_packing(path, key)
    if part and _form(path) in (".jsonl", ".json"):
        found = list(_first(_json_rows(path, key)))
        return Text(path.name, _documents(found, column, str(path), key, None))
    if _form(path) in ROW_FILES:
        rows, columns = file_rows(path, key, column)
        rows = list(_first(rows)) if part else rows
        return Text(path.name, _documents(rows, column, str(path), key, columns))
    try:
        with _opened(path) as file:
            return Text(path.name, [file.read()])
    except UnicodeDecodeError as error:
        raise UserError(f"{key}: {path} is not UTF-8 text ({error})") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{key}: {path} cannot be read: {error}") from error


def _check_packing(path: Path, key: str) -> None:
    if _form(path) in PACKED_FILES:
        raise UserError(f"{key}: {path} is packed in a way that is not read; unpack it, or compress it with gzip")


def file_rows(path: Path, key: str, column: str | None = None) -> tuple[list[Row], list[str]]:
    """The rows of a parquet, JSON or JSON lines file, and the names of all its columns.

    Args:
        path: of the file; JSON may be compressed with gzip.
        key: the configuration key, for errors.
        column: that is wanted; None: text or instruction columns. A parquet file is read without its others.

    Raises:
        UserError: it cannot be read as such.
    """
    _check_packing(path, key)
    if _form(path) == ".parquet":
        return _parquet_rows(path, key, column)
    rows = read_rows(path, key)
    return rows, list(dict.fromkeys(str(name) for row in rows for name in row))


def _opened(path: Path) -> IO[str]:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")  # some editors put a byte order mark in front


def _parquet_rows(path: Path, key: str, column: str | None) -> tuple[list[Row], list[str]]:
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


def _documents(rows: list[Row], column: str | None, name: str, key: str, columns: Sequence[str] | None) -> list[str]:
    """One document per row; ``columns``: all that the source has, for it may be read without some of them."""
    wanted = column or "text"
    if all(wanted in row for row in rows):
        _check_texts(rows, name, key, (), (wanted,))
        return [row[wanted] or "" for row in rows]
    if column is None and all({"instruction", "output"} <= row.keys() for row in rows):
        check_instructions(rows, name, key)
        return [formatted(row) for row in rows]
    found = ", ".join(columns or dict.fromkeys(column for row in rows for column in row)) or "none"
    wished = f"a column {column}" if column else "a column text (or instruction and output)"
    hint = "; prune.calibration.column names another" if key.startswith("prune.calibration") else ""
    raise UserError(f"{key}: {name} lacks {wished} in some row{hint}; its columns: {found}")


def read_rows(path: Path, key: str) -> list[Row]:
    """The objects of a JSON list or of JSON lines, plain or .gz.

    Raises:
        UserError: neither.
    """
    return list(_json_rows(path, key))


def _json_rows(path: Path, key: str) -> Iterator[Row]:
    for row in _json_values(path, key):
        if not isinstance(row, dict):
            raise UserError(f"{key}: {path} must hold one JSON object per row")
        yield row


def _json_values(path: Path, key: str) -> Iterator[Any]:
    """The values of JSON lines, no more of which are read than are taken, or those of a list, which is read whole."""
    where, first = "", True
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, start=1):  # unlike splitlines not cut at U+2028 in a text
                if not line.strip():
                    continue
                if first and line.lstrip().startswith("["):
                    yield from json.loads(line + file.read())
                    return
                where, first = f", line {number},", False
                yield json.loads(line)
                where = ""
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        reason = getattr(error, "msg", error)
        raise UserError(f"{key}: {path}{where} cannot be read as JSON or JSON lines: {reason}") from error


def check_instructions(rows: list[Row], name: str, key: str) -> None:
    """Every row must have texts as instruction and output, and as input a text or nothing.

    Raises:
        UserError: one has not, or one is text that cannot be encoded; it is named by its number.
    """
    _check_texts(rows, name, key, ("instruction", "output"), ("input",))


def _check_texts(rows: list[Row], name: str, key: str, needed: Sequence[str], optional: Sequence[str]) -> None:
    for number, row in enumerate(rows, start=1):
        wrong = [column for column in needed if not isinstance(row.get(column), str)]
        wrong += [column for column in optional if not isinstance(row.get(column), str | None)]
        if wrong:
            raise UserError(f"{key}: {name}: row {number} has no text in {' and '.join(wrong)}")
        for column in (*needed, *optional):
            half = re.search("[\ud800-\udfff]", row.get(column) or "")
            if half:
                raise UserError(
                    f"{key}: {name}: row {number}: {column} has half of a surrogate pair ({half[0]!r}), which is no "
                    "character; write the whole one, or leave it out"
                )


def file_hash(name: str) -> str | None:
    """Identifies a local file by content; None for data that is known by name."""
    path = Path(name)
    if not path.is_file():
        return None
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()[:16]


def content_hash(documents: Sequence[str]) -> str:
    """Identifies a text by what it says."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.encode() + b"\0")
    return digest.hexdigest()[:16]
