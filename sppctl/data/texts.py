"""Documents for calibration and perplexity: from files, from the hub, and built in."""

from __future__ import annotations

import contextlib
import csv
import glob
import gzip
import hashlib
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sppctl.data.prompts import Row, formatted
from sppctl.errors import UserError, did_you_mean, first_line
from sppctl.files import sources

ASSETS = Path(__file__).resolve().parent.parent / "assets"
TEXT_FILES = (".txt",)  # each is one document
PACKED_FILES = (".zst", ".bz2", ".xz", ".lz4", ".zip", ".tar", ".tgz")  # unsupported: anything but gzip of one file
INSTRUCTION_COLUMNS = ("instruction", "input", "output")
# all of C4 would be a download of 300 GB; the literature measures on 1,100 documents of the validation split
C4_FIRST_SHARD = {
    "train": "en/c4-train.00000-of-01024.json.gz",
    "validation": "en/c4-validation.00000-of-00008.json.gz",
}
C4_DOCUMENTS = {"train": 20_000, "validation": 1_100}
# hub ids of the known texts and instruction rows that are on the hub
HUB_ROWS = {"alpaca": "tatsu-lab/alpaca", "alpaca-gpt4": "vicgalle/alpaca-gpt4"}
HUB_TEXTS = {"c4": "allenai/c4", "wikitext2": "Salesforce/wikitext", "alpaca": "tatsu-lab/alpaca"}
C4_WINDOWS = 256  # windows of the validation split in the literature
# limits of what calibration reads from a source: enough web pages for hundreds of windows of long documents
MOST_DOCUMENTS = 20_000
MOST_CHARACTERS = 200_000_000


@dataclass(frozen=True)
class Text:
    """Documents of one source, in its order, and how they are joined into one text."""

    name: str
    documents: list[str]
    joiner: str = "\n\n"  # between two documents
    windows: int | None = None  # maximum number of windows to measure; None: all
    running: bool = False  # the documents are the paragraphs of one text


def load_text(name: str, split: str, key: str, column: str | None = None, part: bool = False) -> Text:
    """The documents behind a name.

    Args:
        name: a short name; a local file, plain or .gz (the formats of READERS: the ``text`` or instruction columns;
            anything else: one text), or a folder of such files; or a hub dataset, ``OWNER/NAME`` or
            ``OWNER/NAME:CONFIG``, with such columns.
        split: ``train`` or ``test``, where the source has splits. To be measured, a folder needs no split ``test``.
        key: the configuration key, for errors.
        column: column with the documents of a file of rows or a hub dataset; None: as above.
        part: read only the first MOST_DOCUMENTS rows or MOST_CHARACTERS characters of JSON lines and hub datasets.

    Raises:
        UserError: the source or column does not exist, or holds no text.
    """
    if name == "alpaca" and split == "test":
        raise UserError(key, "alpaca has only rows for training", "use instructions, or a file of rows")
    path = None if name in _TEXTS else local_file(name, key)
    has_no_columns = name in _TEXTS or (path is not None and path.is_file() and _form(path) not in READERS)
    if column is not None and has_no_columns:
        raise UserError(key, f"{name} has no columns to choose from", f"leave out column {column}")
    if name in _TEXTS:
        text = _TEXTS[name](split)
    elif path is not None and has_no_columns:
        text = Text(path.name, [_plain_text(path, key)])
    else:
        is_folder = path is not None and path.is_dir()
        if is_folder and key.startswith("eval.") and [*splits_of(Path(name), key)] == ["train"]:
            split = "train"
        columns = ("text", *INSTRUCTION_COLUMNS) if column is None else (column,)
        rows, all_columns = load_rows(name, path, split, key, columns=columns, short_names=_TEXTS, part=part)
        text = Text(name if path is None else path.name, _documents(rows, column, name, key, all_columns))
    if not any(document.strip() for document in text.documents):
        raise UserError(key, f"{name} holds no text")
    return text


def _documents(rows: list[Row], column: str | None, name: str, key: str, columns: Sequence[str]) -> list[str]:
    """One document per row; ``columns``: all columns of the source, including those that were not read."""
    text_column = column or "text"
    if all(text_column in row for row in rows):
        check_texts(rows, name, key, optional=(text_column,))
        return [row[text_column] or "" for row in rows]
    if column is None and all({"instruction", "output"} <= row.keys() for row in rows):
        check_texts(rows, name, key, ("instruction", "output"), ("input",))
        return [formatted(row) for row in rows]
    expected = f"a column {column}" if column else "a column text (or instruction and output)"
    hint = "; prune.calibration.column selects another" if key.startswith("prune.calibration") else ""
    raise UserError(key, f"{name} lacks {expected} in some row{hint}", f"its columns: {', '.join(columns) or 'none'}")


def check_texts(rows: list[Row], name: str, key: str, needed: Sequence[str] = (), optional: Sequence[str] = ()) -> None:
    """Every row must have texts in the needed columns, and a text or null in the optional ones.

    Raises:
        UserError: a row, named by its number, lacks a text or has one that cannot be encoded.
    """
    for number, row in enumerate(rows, start=1):
        wrong = [column for column in needed if not isinstance(row.get(column), str)]
        wrong += [column for column in optional if not isinstance(row.get(column), str | None)]
        if wrong:
            raise UserError(key, f"{name}: row {number} has no text in {' and '.join(wrong)}")
        for column in (*needed, *optional):
            check_characters(row.get(column) or "", f"{key}: {name}: row {number}: {column}")


def check_characters(text: str, where: str) -> None:
    """Raises UserError if a text has half of a surrogate pair, which cannot be encoded."""
    surrogate = re.search("[\ud800-\udfff]", text)
    if surrogate:
        raise UserError(
            f"{where} has half of a surrogate pair ({surrogate[0]!r}), which is not a character; write the full pair, "
            "or remove it"
        )


# --- texts with short names -------------------------------------------------------------------------------------------


def _c4(split: str) -> Text:
    """The first documents of the training split, or of the validation split to measure on.

    As in Wanda and SparseGPT, the validation documents are joined by blanks and their first 256 windows measured. The
    documents are read from the first shard if that file was downloaded, otherwise streamed from the hub.
    """
    import datasets
    from huggingface_hub import try_to_load_from_cache

    split = "train" if split == "train" else "validation"
    first, count = C4_FIRST_SHARD[split], C4_DOCUMENTS[split]
    shard = try_to_load_from_cache(HUB_TEXTS["c4"], first, repo_type="dataset")
    if isinstance(shard, str):
        with gzip.open(shard, "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in itertools.islice(file, count)]
    elif datasets.config.HF_DATASETS_OFFLINE:
        rows = load_hub(HUB_TEXTS["c4"], split, "en")
        rows = rows.select(range(min(count, len(rows))))
    else:
        rows = load_hub(HUB_TEXTS["c4"], split, data_files={split: first}, streaming=True).take(count)
    with _loading(f"allenai/c4 ({split})"):
        documents = [row["text"] for row in rows]
    return Text("c4", documents) if split == "train" else Text("c4", documents, joiner=" ", windows=C4_WINDOWS)


def _wikitext2(split: str) -> Text:
    rows = load_hub(HUB_TEXTS["wikitext2"], split, "wikitext-2-raw-v1")
    return Text("wikitext2", list(rows["text"]), running=True)


def _prose(_: str) -> Text:
    """Paragraphs of CPython's reference manual, which every installation includes for ``help()``."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError("text prose: this Python comes without pydoc_data; use another text") from error
    paragraphs = (part for topic in sorted(topics) for part in topics[topic].split("\n\n"))
    # paragraphs only: no code, tables, grammar or headings
    prose = [
        " ".join(part.split())
        for part in paragraphs
        if re.match(r"[A-Z]", part) and len(part) >= 200 and "::=" not in part
    ]
    return Text("prose", list(dict.fromkeys(prose)))


def _instructions(split: str) -> Text:
    return Text("instructions", [formatted(row) for row in built_in_rows("train" if split == "train" else "heldout")])


_TEXTS: dict[str, Callable[[str], Text]] = {
    "c4": _c4,
    "wikitext2": _wikitext2,
    "alpaca": lambda split: Text("alpaca", [formatted(row) for row in load_hub(HUB_TEXTS["alpaca"], split)]),
    "instructions": _instructions,
    "prose": _prose,
}


NAMES = tuple(_TEXTS)
ROWS = tuple(dict.fromkeys(("instructions", *HUB_ROWS, *NAMES)))  # short names of training data


def built_in_rows(split: str) -> list[Row]:
    """The rows that come with sppctl; ``split`` is ``train`` or ``heldout``."""
    return [row for row in json_rows(ASSETS / "instructions.jsonl", "instructions") if row["split"] == split]


# --- rows -------------------------------------------------------------------------------------------------------------


def local_file(name: str, key: str) -> Path | None:
    """The local file or folder of data files of that name; None if there is none, so that it may be a hub id.

    Raises:
        UserError: the name is that of a folder without data, of something else than a file, or of an archive.
    """
    path = Path(name)
    if path.is_dir():
        splits_of(path, key)
        return path
    if os.path.lexists(path) and not path.is_file():
        raise UserError(key, f"{name} is neither a file nor a link to one")
    if path.is_file() and _form(path) in PACKED_FILES:
        raise UserError(key, f"{path} is packed in a format that is not supported", "unpack it, or use gzip")
    return path if path.is_file() else None


def check_name(name: str, key: str, *, rows: bool = False) -> None:
    """Raises UserError for a name that no text, or no training data (``rows``), can have."""
    short_names = ROWS if rows else NAMES
    if name not in short_names and not os.path.lexists(name) and not is_hub_id(name):
        raise _unknown(name, key, short_names)


def _unknown(name: str, key: str, short_names: Iterable[str]) -> UserError:
    names = ", ".join(short_names)
    problem = f"{name} is not a file, not one of {names}, and not a hub id (OWNER/NAME)"
    return UserError(key, problem + did_you_mean(name, short_names))


def is_hub_id(name: str) -> bool:
    """Whether a name looks like ``OWNER/NAME`` or ``OWNER/NAME:CONFIG``, and not like a missing file."""
    is_file = _form(Path(name)) in FORMS or name.endswith(".gz")
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+(:.+)?", name)) and not is_file


def check_split(key: str, split: str, *names: str) -> None:
    """Raises UserError if a split is chosen though no data set is on the hub or in a folder: only those have splits."""
    have_splits = any(Path(name).is_dir() or (is_hub_id(name) and not os.path.lexists(name)) for name in names)
    if split != "train" and not have_splits:
        raise UserError(key, f"{names[0]} has no split {split}", "only hub data sets (OWNER/NAME) have splits")


def splits_of(folder: Path, key: str) -> dict[str, list[Path]]:
    """The data files in a folder and its subfolders by split, each split in the order of their paths.

    As in datasets: files or subfolders with ``train``, ``validation`` or ``test`` in their names are these splits;
    without such names, every file belongs to ``train``.

    Raises:
        UserError: there is no data file.
    """
    from datasets.data_files import get_data_patterns, resolve_pattern

    base, splits = glob.escape(str(folder.absolute())), {}
    try:
        for split, patterns in get_data_patterns(base).items():
            files = set()
            for pattern in patterns:
                with contextlib.suppress(FileNotFoundError):  # nothing has such a name
                    files |= {Path(name) for name in resolve_pattern(pattern, base)}
            if data := sorted(file for file in files if _form(file) in FORMS):
                splits[str(split)] = data
    except FileNotFoundError:  # no file at all
        pass
    except ValueError as error:  # what looks like a part of a split has no split's name
        raise UserError(key, f"{folder}: {first_line(error)}") from error
    if not splits:
        raise UserError(key, f"{folder} holds no data file ({', '.join(FORMS)}, plain or .gz)")
    return splits


def load_rows(
    name: str,
    path: Path | None,
    split: str,
    key: str,
    *,
    columns: Sequence[str],
    short_names: Iterable[str],
    part: bool = False,
) -> tuple[list[Row], list[str]]:
    """The rows of a data set, and the names of all its columns, even if only ``columns`` were read.

    Args:
        name: name of the data set.
        path: its file or folder, see :func:`local_file`; plain text is one row, with the column ``text``; formats
            other than those of FORMS are read as JSON or JSON lines.
        split: split of a hub dataset or a folder.
        key: the configuration key, for errors.
        columns: the columns to read.
        short_names: names that the key accepts besides files and hub datasets, for errors.
        part: see :func:`load_text`.

    Raises:
        UserError: the data set does not exist, or cannot be read.
    """
    rows: Iterable[Row]
    if path is not None:
        files = _files_of_split(path, split, key) if path.is_dir() else [path]
        parts = [_reader(file)(file, key, columns) for file in files]
        rows = itertools.chain.from_iterable(rows for rows, _ in parts)
        all_columns = None if any(names is None for _, names in parts) else _union(names or () for _, names in parts)
        loaded = list(_first(rows) if part else rows)
    elif is_hub_id(name):
        import datasets

        # slices of splits cannot be streamed, as the size is unknown; offline, data comes from the cache
        streamed = part and split.isidentifier() and not datasets.config.HF_DATASETS_OFFLINE
        rows = load_hub(name, split, streaming=True) if streamed else load_hub(name, split)
        with _loading(f"{name} ({split})"):
            all_columns = getattr(rows, "column_names", None)
            if all_columns:  # decode only the columns that are used
                rows = rows.select_columns(_readable(all_columns, columns))  # type: ignore[attr-defined]
            loaded = list(_first(rows) if part else rows)
    else:
        raise _unknown(name, key, short_names)
    return loaded, all_columns or _union(loaded)


def _union(columns: Iterable[Iterable[str]]) -> list[str]:
    return list(dict.fromkeys(itertools.chain.from_iterable(columns)))


def _files_of_split(folder: Path, split: str, key: str) -> list[Path]:
    splits = splits_of(folder, key)
    if split not in splits:
        raise UserError(key, f"{folder} has no split {split}", f"its splits: {', '.join(splits)}")
    return splits[split]


def load_hub(repository: str, split: str, config: str | None = None, **options: Any) -> Any:
    """A split of a hub dataset, ``OWNER/NAME`` or ``OWNER/NAME:CONFIG``, from the network or the cache.

    Raises:
        UserError: the dataset could not be loaded.
    """
    import datasets

    if config is None and ":" in repository:
        repository, _, config = repository.partition(":")
    if os.path.lexists(repository):
        raise UserError(
            f"dataset {repository}: {Path.cwd() / repository} has the same name and would be read instead; "
            "rename it, or work in another directory"
        )
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    with _loading(f"{repository} ({split})"):
        dataset = datasets.load_dataset(repository, config, split=split, **options)
        sources.note(dataset)
        return dataset


@contextlib.contextmanager
def _loading(dataset: str) -> Iterator[None]:
    """Turns errors of loading a hub dataset into a UserError; around reading, too, as streamed rows load lazily."""
    try:
        yield
    except Exception as error:  # datasets raises whatever its file formats, hub client and builders raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        # the second line lists the available configurations
        reason = " ".join(lines[:2]) + "; write NAME:CONFIG" if "Config name is missing" in lines[0] else lines[0]
        fix = "check the name and the network, download it first on a machine with network access, or give a local file"
        if "Unknown split" in reason:
            fix = "name a split that it has, or give a local file"
        raise UserError(f"dataset {dataset} could not be loaded: {reason}; {fix}") from error


def _first(rows: Iterable[Row]) -> Iterator[Row]:
    """The first rows, up to the limits of what calibration reads."""
    characters = 0
    for row in itertools.islice(rows, MOST_DOCUMENTS):
        yield row
        characters += sum(len(value) for value in row.values() if isinstance(value, str))
        if characters >= MOST_CHARACTERS:
            return


def _readable(all_columns: Sequence[str], columns: Sequence[str]) -> list[str]:
    """Those of ``columns`` that exist; if none does, all columns, so that the number of rows is right."""
    return [name for name in all_columns if name in columns] or list(all_columns)


# --- files ------------------------------------------------------------------------------------------------------------


def _form(path: Path) -> str:
    """The suffix of a file's format, without ``.gz``."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _opened(path: Path) -> IO[str]:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")  # some editors start files with a byte order mark


def _plain_text(path: Path, key: str) -> str:
    try:
        with _opened(path) as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise UserError(key, f"{path} is not UTF-8 text ({error})") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(key, f"{path} cannot be read: {error}") from error


def json_rows(path: Path, key: str) -> Iterator[Row]:
    """The objects of JSON lines (read lazily) or of a JSON list; plain or .gz.

    Raises:
        UserError: the file is neither.
    """
    where, first = "", True
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, start=1):  # not splitlines, which would cut at U+2028 in a text
                if not line.strip():
                    continue
                if first and line.lstrip().startswith("["):
                    rows = json.loads(line + file.read())
                else:
                    where = f", line {number},"
                    rows = [json.loads(line)]
                where, first = "", False
                if not all(isinstance(row, dict) for row in rows):
                    raise UserError(key, f"{path} must hold one JSON object per row")
                yield from rows
    except UserError:
        raise
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        reason = getattr(error, "msg", error)
        known = None if _form(path) in FORMS else f"files may be {', '.join(FORMS)}"
        raise UserError(key, f"{path}{where} cannot be read as JSON or JSON lines: {reason}", known) from error


def csv_rows(path: Path, key: str) -> Iterator[Row]:
    """The rows of a CSV or TSV file with a header, read lazily; every value is text.

    A CSV file whose header has semicolons and no comma is separated by semicolons.

    Raises:
        UserError: the file is neither, has two columns of one name, or a row has more or fewer values than the header.
    """
    csv.field_size_limit(2**31 - 1)  # documents are longer than the default of 128 KiB
    try:
        with _opened(path) as file:
            header = file.readline()
            file.seek(0)
            in_csv = ";" if ";" in header and "," not in header else ","
            reader = csv.DictReader(file, delimiter="\t" if _form(path) == ".tsv" else in_csv, strict=True)
            names = reader.fieldnames or []
            if len(set(names)) < len(names):
                raise UserError(key, f"{path} has two columns of the same name: {', '.join(names)}")
            for row in reader:
                if None in row or None in row.values():
                    count = "more" if None in row else "fewer"
                    problem = f"{path}, line {reader.line_num}, has {count} values than the header"
                    raise UserError(key, problem, "put values that contain the separator in quotes")
                yield row
    except UserError:
        raise
    except (OSError, EOFError, zlib.error, ValueError, csv.Error) as error:
        fix = "save it as UTF-8" if isinstance(error, UnicodeDecodeError) else None
        raise UserError(key, f"{path} cannot be read as {_form(path)[1:].upper()}: {error}", fix) from error


def _parquet_file(path: Path, key: str, columns: Sequence[str]) -> tuple[list[Row], list[str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        all_columns = list(pyarrow.parquet.read_schema(path).names)
        table = pyarrow.parquet.read_table(path, columns=_readable(all_columns, columns), partitioning=None)
        return table.to_pylist(), all_columns
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        fix = "save its texts as UTF-8" if isinstance(error, UnicodeDecodeError) else None
        raise UserError(key, f"{path} cannot be read as parquet: {first_line(error)}", fix) from error


# readers of files of rows by suffix: path, key and columns to read -> rows, and the names of all columns (None if only
# the rows have them)
READERS: dict[str, Callable[[Path, str, Sequence[str]], tuple[Iterable[Row], list[str] | None]]] = {
    ".jsonl": lambda path, key, _: (json_rows(path, key), None),
    ".json": lambda path, key, _: (json_rows(path, key), None),
    ".csv": lambda path, key, _: (csv_rows(path, key), None),
    ".tsv": lambda path, key, _: (csv_rows(path, key), None),
    ".parquet": _parquet_file,
}
FORMS = (*TEXT_FILES, *READERS)  # suffixes of data files


def _reader(path: Path) -> Callable[[Path, str, Sequence[str]], tuple[Iterable[Row], list[str] | None]]:
    """The reader of a file of training data."""
    if _form(path) in TEXT_FILES:
        return lambda path, key, _: ([{"text": _plain_text(path, key)}], ["text"])
    return READERS.get(_form(path), READERS[".json"])


def file_hash(name: str) -> str | None:
    """A hash of the content of a local file, or of a folder's data files; None for data identified by its name."""
    path = Path(name)
    if path.is_dir() and name not in {*_TEXTS, *HUB_ROWS}:
        with contextlib.suppress(UserError):  # without data files; whatever reads it says so
            files = itertools.chain.from_iterable(splits_of(path, name).values())
            return content_hash([f"{file.relative_to(path.absolute())} {sources.content_hash(file)}" for file in files])
    return sources.content_hash(path) if path.is_file() else None


def content_hash(documents: Sequence[str]) -> str:
    """A hash of the documents of a text."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.encode() + b"\0")
    return digest.hexdigest()[:16]
