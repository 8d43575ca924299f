from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
import pytest
from conftest import ALPACA

from sppctl.data import texts
from sppctl.data.prompts import formatted
from sppctl.data.texts import Text
from sppctl.errors import UserError

KEY = "prune.calibration.dataset"
SUMS = [{"instruction": "Add.", "input": "1 and 2", "output": "3"}, {"instruction": "Add.", "output": "What?"}]


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def documents(name: Path | str, column: str | None = None, **options: Any) -> list[str]:
    return texts.load_text(str(name), "train", KEY, column, **options).documents


@pytest.mark.parametrize(
    ("name", "content", "column", "expected"),
    [
        ("a.txt", "One.\n\nZwölf.\n", None, ["One.\n\nZwölf.\n"]),
        ("a.jsonl", '{"text": "One.", "id": 1}\n\n{"text": "Two."}', None, ["One.", "Two."]),
        ("a.json", json.dumps([{"text": "One.", "id": 1}, {"text": "Two."}], indent=1), None, ["One.", "Two."]),
        ("a.json", '\ufeff[{"text": "One."}]', None, ["One."]),  # a byte order mark
        (
            "a.jsonl",
            lines({"text": "one\u2028line"}, {"text": "next\x85line"}),
            None,
            ["one\u2028line", "next\x85line"],
        ),
        ("a.jsonl", lines({"text": "One."}, {"text": None}), None, ["One.", ""]),
        ("a.csv", '\ufefftext,id\n"One, ""two"".\nThree.",1\nNA,2\n\n', None, ['One, "two".\nThree.', "NA"]),
        ("a.csv", "id;text\r\n1;One, two.\r\n", None, ["One, two."]),
        ("a.tsv", "id\ttext\n1\tOne; two.\n", None, ["One; two."]),
        ("a.csv", "instruction,input,output\nAdd.,,What?\n", None, [formatted(SUMS[1])]),
        ("a.jsonl", lines(*SUMS), None, [formatted(row) for row in SUMS]),
        ("a.jsonl", lines({"text": "One.", "story": "1"}, {"text": "Two.", "story": "2"}), "story", ["1", "2"]),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_documents_of_a_file(
    name: str, content: str, column: str | None, expected: list[str], packed: bool, tmp_path: Path
) -> None:
    data = content.encode()
    if packed:
        name, data = f"{name}.gz", gzip.compress(data)
    path = write(tmp_path / name, data)
    assert texts.load_text(path, "train", KEY, column) == Text(name, expected)


@pytest.mark.parametrize(
    ("name", "content", "column", "message"),
    [
        ("a.txt", "", None, r"holds no text"),
        ("a.txt", " \n\n", None, r"holds no text"),
        ("a.txt", b"Zw\xf6lf", None, "is not UTF-8 text"),
        ("a.txt", "One.", "text", "has no columns to choose from; leave out column text$"),
        ("a.jsonl", "{", None, "line 1, cannot be read as JSON or JSON lines"),
        ("a.jsonl", '{"text": "1"}\nno JSON\n', None, "line 2, cannot be read as JSON or JSON lines"),
        ("a.json", '["text"]', None, "must hold one JSON object per row"),
        ("a.jsonl", "3\n", None, "must hold one JSON object per row"),
        ("a.jsonl", lines({"text": "One."}, {"txt": "Two."}), None, r"lacks a column text .*in some row.*: text, txt$"),
        ("a.jsonl", lines({"content": "One.", "id": 1}), None, "its columns: content, id$"),
        ("a.jsonl", lines({"instruction": "Add."}), None, "its columns: instruction$"),
        (
            "a.jsonl",
            lines({"text": "One.", "story": "1"}),
            "title",
            r"lacks a column title .*its columns: text, story$",
        ),
        ("a.jsonl", lines({"text": "One."}, {"text": None}, {"text": 3}), None, "row 3 has no text in text$"),
        ("a.jsonl", lines({"text": ["One."]}), None, "row 1 has no text in text$"),
        ("a.jsonl", lines({"instruction": "Add.", "output": {"a": "b"}}), None, "row 1 has no text in output$"),
        ("a.parquet", "text", None, "cannot be read as parquet: "),
        ("a.csv", "text,id\nOne.\n", None, "line 2, has fewer values than the header; put values that contain"),
        ("a.csv", "text\nOne.\nTwo, three.\n", None, "line 3, has more values than the header"),
        ("a.csv", "text,text\nOne.,Two.\n", None, "has two columns of the same name: text, text$"),
        ("a.csv", b"text\nZw\xf6lf\n", None, "cannot be read as CSV: .*; save it as UTF-8$"),
        ("a.tsv", 'text\n"One.\n', None, "cannot be read as TSV: "),
        ("a.csv", "", None, "holds no text"),
        *((f"a.{form}.gz", "no gzip", None, "cannot be read") for form in ("txt", "jsonl", "json")),
        *(
            (f"a.{form}.gz", gzip.compress(b"One.", mtime=0)[:-9], None, "cannot be read")
            for form in ("txt", "jsonl", "json")
        ),
        ("a.txt.gz", gzip.compress(b"One.", mtime=0)[:10] + b"\xff" * 20, None, "cannot be read"),
        *((name, b"\x28\xb5", None, "is packed in a format that") for name in ("a.jsonl.zst", "a.zip", "a.tar.gz")),
    ],
)
def test_a_file_that_cannot_be_used(
    name: str, content: str | bytes, column: str | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"^{KEY}: .*{name}\b.*{message}"):
        documents(write(tmp_path / name, content), column)


def test_parquet_that_is_not_utf8(tmp_path: Path) -> None:
    buffers = pyarrow.array([b"One.", b"Zw\xf6lf"], pyarrow.binary()).buffers()
    table = pyarrow.table({"text": pyarrow.StringArray.from_buffers(2, *buffers[1:])})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(
        UserError, match=rf"^{KEY}: .*a\.parquet cannot be read as parquet: .*; save its texts as UTF-8$"
    ):
        documents(tmp_path / "a.parquet")


def test_parquet_with_two_columns_of_the_same_name_is_an_error_of_one_line(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table([["One."], ["Two."]], names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=rf"^{KEY}: .*a\.parquet cannot be read as parquet: [^\n]*\Z"):
        documents(tmp_path / "a.parquet")


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "mine.parquet"
    datasets.Dataset.from_list([{"text": "One.", "id": 1}, {"text": "Two.", "id": 2}]).to_parquet(path)
    assert documents(path) == ["One.", "Two."]
    with pytest.raises(UserError, match=r"lacks a column content .*its columns: text, id$"):
        documents(path, "content")
    with pytest.raises(UserError, match="row 1 has no text in id"):
        documents(path, "id")
    datasets.Dataset.from_list(ALPACA).to_parquet(path)
    assert documents(path) == [formatted(row) for row in ALPACA]


def test_documents_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "owner" / "name.d"
    folder.mkdir(parents=True)
    with pytest.raises(UserError, match=rf"^{KEY}: owner/name\.d holds no data file \(\.txt, .*, plain or \.gz\)$"):
        documents("owner/name.d")
    write(folder / "b.txt", "Two.")
    write(folder / "a.jsonl", lines({"text": "One."}, {"text": "Another."}))
    assert documents("owner/name.d") == ["One.", "Another.", "Two."]
    # without names of splits, all of it is measured
    measured = texts.load_text("owner/name.d", "test", "eval.perplexity")
    assert measured == Text("name.d", ["One.", "Another.", "Two."])
    with pytest.raises(UserError, match=rf"^{KEY}: owner/name\.d has no split test; its splits: train$"):
        texts.load_text("owner/name.d", "test", KEY)
    write(folder / "test.txt", "Three.")
    assert texts.load_text("owner/name.d", "test", "eval.perplexity").documents == ["Three."]
    write(folder / "test-2.csv", "id,story\n1,Four.\n")
    with pytest.raises(UserError, match=r"^eval\.perplexity: owner/name\.d lacks a column text .* in some row"):
        texts.load_text("owner/name.d", "test", "eval.perplexity")


@pytest.mark.parametrize("name", ["nothing", "folder/missing.txt", "missing.jsonl", "/no/such/file"])
def test_unknown_names_are_told_what_there_is(name: str) -> None:
    with pytest.raises(UserError) as caught:
        documents(name)
    assert str(caught.value) == (
        f"{KEY}: {name} is not a file, not one of c4, wikitext2, alpaca, instructions, prose, "
        "and not a hub id (OWNER/NAME)"
    )


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[Any]]:
    """hub(rows, or an error) -> what is asked of the hub from then on, which has these."""

    def has(rows: Any) -> list[Any]:
        asked: list[Any] = []

        def load_dataset(*arguments: Any, **options: Any) -> Any:
            asked.append((*arguments, options))
            if isinstance(rows, Exception):
                raise rows
            return rows

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    return has


def test_a_hub_dataset_is_read_without_its_other_columns(hub: Callable[[Any], list[Any]]) -> None:
    rows = [{"text": "One.", "story": "1", "id": 1}, {"text": None, "story": "2", "id": 2}]
    asked = hub(datasets.Dataset.from_list(rows))
    assert texts.load_text("owner/name", "test", KEY) == Text("owner/name", ["One.", ""])
    assert documents("owner/name:20231101.en", "story") == ["1", "2"]
    assert asked == [("owner/name", None, {"split": "test"}), ("owner/name", "20231101.en", {"split": "train"})]
    with pytest.raises(UserError, match=rf"^{KEY}: owner/name lacks a column txt .*its columns: text, story, id$"):
        documents("owner/name", "txt")


class Streamed:
    """Rows that are counted as they are fetched, of which the fourth could not be loaded."""

    column_names = None

    def __init__(self) -> None:
        self.fetched = 0

    def __iter__(self) -> Iterator[dict[str, str]]:
        for number in range(3):
            self.fetched += 1
            yield {"text": f"Document {number}."}
        raise ConnectionError("no network")


def test_a_part_of_a_hub_dataset_is_streamed(hub: Callable[[Any], list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Streamed()
    asked = hub(rows)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", False)
    monkeypatch.setattr(texts, "MOST_DOCUMENTS", 2)
    first = ["Document 0.", "Document 1."]
    assert documents("owner/name", part=True) == first
    assert asked == [("owner/name", None, {"split": "train", "streaming": True})]
    assert rows.fetched == 2
    monkeypatch.setattr(texts, "MOST_DOCUMENTS", 20)
    monkeypatch.setattr(texts, "MOST_CHARACTERS", len("".join(first)))
    assert documents("owner/name", part=True) == first
    monkeypatch.setattr(texts, "MOST_CHARACTERS", 1000)
    with pytest.raises(UserError, match=r"dataset owner/name \(train\) could not be loaded: no network; check the nam"):
        documents("owner/name", part=True)


@pytest.mark.parametrize(("split", "offline"), [("train", True), ("train[50%:]", False)])
def test_offline_and_of_slices_a_part_is_taken_from_the_cache(
    split: str, offline: bool, hub: Callable[[Any], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = hub(datasets.Dataset.from_list([{"text": f"Document {number}."} for number in range(5)]))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", offline)
    monkeypatch.setattr(texts, "MOST_DOCUMENTS", 2)
    assert texts.load_text("owner/name", split, KEY, part=True).documents == ["Document 0.", "Document 1."]
    assert asked == [("owner/name", None, {"split": split})]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("no network\nmore words"), "no network; check the name"),
        (ValueError('Unknown split "test". Should be one of ["train"].'), r'.*"train"\].; name a split that it has'),
        (
            ValueError("Config name is missing.\nPlease pick one among the available configs: ['a', 'b']\nExample"),
            r".*available configs: \['a', 'b'\]; write NAME:CONFIG",
        ),
    ],
)
def test_a_hub_dataset_that_cannot_be_loaded(error: Exception, message: str, hub: Callable[[Any], list[Any]]) -> None:
    hub(error)
    with pytest.raises(UserError, match=rf"^dataset owner/name \(test\) could not be loaded: {message}"):
        texts.load_hub("owner/name", "test")


@pytest.mark.parametrize("packed", [False, True])
def test_of_json_lines_no_more_is_read_than_is_needed(
    packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b'{"text": "One."}\n\n{"text": "Two."}\nno JSON\n'
    path = write(tmp_path / f"mine.jsonl{'.gz' * packed}", gzip.compress(content) if packed else content)
    with pytest.raises(UserError, match=r"line 4, cannot be read as JSON"):
        documents(path, part=True)
    monkeypatch.setattr(texts, "MOST_DOCUMENTS", 2)
    assert documents(path, part=True) == ["One.", "Two."]
    with pytest.raises(UserError, match=r"line 4, cannot be read as JSON"):
        documents(path)


@pytest.mark.parametrize("form", ["json", "parquet"])
def test_a_part_of_what_is_read_whole(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": f"Document {number}."} for number in range(5)]
    path = tmp_path / f"mine.{form}"
    if form == "json":
        write(path, json.dumps(rows, indent=1))
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    monkeypatch.setattr(texts, "MOST_DOCUMENTS", 2)
    assert documents(path, part=True) == ["Document 0.", "Document 1."]


def test_prose_is_plain_paragraphs() -> None:
    text = texts.load_text("prose", "test", KEY)
    assert sum(map(len, text.documents)) > 100_000
    assert len(set(text.documents)) == len(text.documents)
    assert all(len(document) > 150 and "\n" not in document and "  " not in document for document in text.documents)
    assert not any("::=" in document or ">>>" in document for document in text.documents)
    assert texts.load_text("prose", "train", KEY) == text


def test_the_built_in_rows() -> None:
    train, held_out = texts.built_in_rows("train"), texts.built_in_rows("heldout")
    assert len(train) + len(held_out) >= 320
    assert len(held_out) == 64
    for row in train + held_out:
        assert row["instruction"].strip()
        assert row["output"].strip()
        assert isinstance(row["input"], str)
    asked = [(row["instruction"], row["input"]) for row in train + held_out]
    assert len(set(asked)) == len(asked)
    assert documents("instructions") == [formatted(row) for row in train]
    assert texts.load_text("instructions", "test", KEY).documents == [formatted(row) for row in held_out]
    with pytest.raises(UserError, match=rf"^{KEY}: instructions has no columns to choose from; leave out column text$"):
        documents("instructions", "text")


def test_a_text_is_identified_by_what_it_says() -> None:
    assert texts.content_hash(["a", "bc"]) == texts.content_hash(["a", "bc"])
    assert texts.content_hash(["a", "bc"]) != texts.content_hash(["ab", "c"])
    assert texts.content_hash([]) != texts.content_hash([""])


def test_c4_is_read_from_the_shard_that_was_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "datasets--allenai--c4"
    shard = repository / "snapshots" / "abc" / texts.C4_FIRST_SHARD["train"]
    shard.parent.mkdir(parents=True)
    rows = lines(*({"text": f"document {number}", "url": ""} for number in range(5)))
    shard.write_bytes(gzip.compress(rows.encode()))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setitem(texts.C4_DOCUMENTS, "train", 3)
    assert documents("c4") == ["document 0", "document 1", "document 2"]


def test_c4_is_measured_on_as_in_the_literature(
    hub: Callable[[Any], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    asked = hub(datasets.Dataset.from_dict({"text": [f"document {number}" for number in range(1200)]}))
    text = texts.load_text("c4", "test", KEY)
    assert asked == [("allenai/c4", "en", {"split": "validation"})]
    assert (len(text.documents), text.documents[-1]) == (1100, "document 1099")
    assert (text.joiner, text.windows) == (" ", 256)


@pytest.mark.slow
@pytest.mark.shared
def test_texts_of_the_mirror(from_mirror: Callable[[str], Any]) -> None:
    c4 = from_mirror("texts.load_text('c4', 'train', 'key').documents")
    assert len(c4) == 1300
    assert all(document.strip() for document in c4)
    wikitext = from_mirror("vars(texts.load_text('wikitext2', 'test', 'key'))")
    assert len(wikitext["documents"]) == 4358
    assert wikitext["joiner"] == "\n\n"
    assert wikitext["running"]
    assert wikitext["documents"][:2] == ["", " = Robert Boulter = \n"]
    (alpaca,) = from_mirror("texts.load_text('alpaca', 'train[:1]', 'key').documents")
    assert alpaca.startswith("Below is an instruction that describes a task")
