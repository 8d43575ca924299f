from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import ALPACA

from sppctl.data import texts
from sppctl.data.prompts import formatted
from sppctl.data.texts import Text
from sppctl.errors import UserError

KEY = "prune.calibration.dataset"


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


# --- texts ------------------------------------------------------------------------------------------------------------


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("One.\n\nZwölf.\n", encoding="utf-8")
    assert texts.load_text(str(path), "train", KEY).documents == ["One.\n\nZwölf.\n"]


@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_the_text_column(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"mine.{form}"
    rows = [{"text": "One.", "id": 1}, {"text": "Two.", "id": 2}]
    path.write_text(json.dumps(rows) if form == "json" else "\n\n".join(map(json.dumps, rows)))
    assert texts.load_text(str(path), "train", KEY).documents == ["One.", "Two."]


def test_instruction_columns_become_prompt_and_response(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Add.", "input": "", "output": "What?"},
    ]
    path = write_lines(tmp_path / "mine.jsonl", rows)
    assert texts.load_text(str(path), "train", KEY).documents == [formatted(row) for row in rows]


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"instruction": "a", "output": "b"}]', encoding="utf-8-sig")
    assert texts.read_rows(path, "train.data.dataset") == [{"instruction": "a", "output": "b"}]


def test_json_lines_end_at_newlines_alone(tmp_path: Path) -> None:
    rows = [{"text": "one\u2028line"}, {"text": "next\x85line"}]  # both are line ends to str.splitlines
    path = write_lines(tmp_path / "mine.jsonl", rows)
    assert texts.load_text(str(path), "train", KEY).documents == ["one\u2028line", "next\x85line"]


def test_a_column_that_is_missing_in_a_later_row(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "mine.jsonl", [{"text": "One."}, {"txt": "Two."}])
    with pytest.raises(UserError, match="text"):
        texts.load_text(str(path), "train", KEY)


@pytest.mark.parametrize("rows", [[{"content": "One.", "id": 1}], [{"instruction": "Add."}]])
def test_unknown_columns_are_listed(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path = write_lines(tmp_path / "mine.jsonl", rows)
    with pytest.raises(UserError, match=f"its columns: {', '.join(rows[0])}$"):
        texts.load_text(str(path), "train", KEY)


@pytest.mark.parametrize("content", ["{", '{"text": 1}\nno JSON\n', '["text"]', "3\n"])
def test_files_that_are_not_rows(tmp_path: Path, content: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=rf"^{KEY}: .*mine\.jsonl\b"):
        texts.load_text(str(path), "train", KEY)


@pytest.mark.parametrize("content", ["", " \n\n"])
def test_a_file_without_text(tmp_path: Path, content: str) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(content)
    with pytest.raises(UserError, match=r"mine\.txt holds no text"):
        texts.load_text(str(path), "train", KEY)


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "mine.parquet"
    datasets.Dataset.from_list([{"text": "One.", "id": 1}, {"text": "Two.", "id": 2}]).to_parquet(path)
    assert texts.load_text(str(path), "train", KEY) == Text("mine.parquet", ["One.", "Two."])
    with pytest.raises(UserError, match=r"lacks a column content .*its columns: text, id$"):
        texts.load_text(str(path), "train", KEY, "content")
    with pytest.raises(UserError, match="row 1 has no text in id"):
        texts.load_text(str(path), "train", KEY, "id")
    datasets.Dataset.from_list(ALPACA).to_parquet(path)
    assert texts.load_text(str(path), "train", KEY).documents == [formatted(row) for row in ALPACA]


def test_a_parquet_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "mine.parquet").write_text("text")
    with pytest.raises(UserError, match=rf"^{KEY}: .*mine\.parquet cannot be read as parquet: "):
        texts.load_text(str(tmp_path / "mine.parquet"), "train", KEY)


@pytest.mark.parametrize("form", ["txt", "jsonl", "json"])
def test_gzipped_files(tmp_path: Path, form: str) -> None:
    contents = {"txt": "One.", "jsonl": '{"text": "One."}\n', "json": '[{"text": "One."}]'}
    path = tmp_path / f"mine.{form}.gz"
    path.write_bytes(gzip.compress(contents[form].encode()))
    assert texts.load_text(str(path), "train", KEY) == Text(f"mine.{form}.gz", ["One."])
    for damaged in (path.read_bytes()[:-9], b"no gzip", path.read_bytes()[:10] + b"\xff" * 20):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"^{KEY}: .*mine\.{form}\.gz\b.* cannot be read"):
            texts.load_text(str(path), "train", KEY)


@pytest.mark.parametrize("name", ["mine.jsonl.zst", "mine.zip", "mine.tar.gz"])
def test_files_packed_in_other_ways(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x28\xb5\x2f\xfd")
    with pytest.raises(UserError, match=rf"^{KEY}: .*{name} is packed in a way that is not read"):
        texts.load_text(str(tmp_path / name), "train", KEY)


def test_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    with pytest.raises(UserError, match=rf"^{KEY}: owner/name is a directory; name one file in it \(.*parquet\)$"):
        texts.load_text("owner/name", "train", KEY)
    (tmp_path / "owner" / "name" / "mine.txt").write_text("One.")
    with pytest.raises(UserError, match=r"; it holds mine\.txt$"):
        texts.load_text(str(tmp_path / "owner" / "name"), "train", KEY)


def test_a_column_by_name(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "mine.jsonl", [{"text": "One.", "story": "1"}, {"text": "Two.", "story": "2"}])
    assert texts.load_text(str(path), "train", KEY, "story").documents == ["1", "2"]
    with pytest.raises(UserError, match=rf"^{KEY}: .* lacks a column title .*its columns: text, story$"):
        texts.load_text(str(path), "train", KEY, "title")


@pytest.mark.parametrize("name", ["instructions", "mine.txt"])
def test_a_column_of_what_has_none(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("One.")
    with pytest.raises(UserError, match=rf"^{KEY}: {name} has no columns to choose from; leave out column text$"):
        texts.load_text(name, "train", KEY, "text")


@pytest.mark.parametrize("value", [3, ["One."], {"a": "One."}])
def test_rows_that_hold_no_text(tmp_path: Path, value: Any) -> None:
    path = write_lines(tmp_path / "mine.jsonl", [{"text": "One."}, {"text": None}, {"text": value}])
    with pytest.raises(UserError, match=rf"^{KEY}: .*mine\.jsonl: row 3 has no text in text$"):
        texts.load_text(str(path), "train", KEY)
    path = write_lines(tmp_path / "mine.jsonl", [{"instruction": "Add.", "output": value}])
    with pytest.raises(UserError, match=rf"^{KEY}: .*mine\.jsonl: row 1 has no text in output$"):
        texts.load_text(str(path), "train", KEY)


def test_rows_without_a_text_are_empty(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "mine.jsonl", [{"text": "One."}, {"text": None}])
    assert texts.load_text(str(path), "train", KEY).documents == ["One.", ""]


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes(b"Zw\xf6lf")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        texts.load_text(str(path), "train", KEY)


@pytest.mark.parametrize("name", ["nothing", "folder/missing.txt", "missing.jsonl", "/no/such/file"])
def test_unknown_names_are_told_what_there_is(name: str) -> None:
    with pytest.raises(UserError) as caught:
        texts.load_text(name, "train", KEY)
    assert str(caught.value) == (
        f"{KEY}: {name} is not a file and none of c4, wikitext2, alpaca, instructions, prose, nor a hub id (OWNER/NAME)"
    )


def test_a_hub_dataset_is_read_by_its_text_column(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def load(name: str, split: str) -> list[dict[str, str]]:
        asked.append((name, split))
        return [{"text": "One."}]

    monkeypatch.setattr(texts, "load_hub", load)
    assert texts.load_text("owner/name", "test", KEY) == Text("owner/name", ["One."])
    assert asked == [("owner/name", "test")]


def test_a_hub_dataset_is_read_without_its_other_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_list([{"text": "One.", "story": "1", "id": 1}, {"text": None, "story": "2", "id": 2}])
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: asked.append((*args, options)) or rows)
    assert texts.load_text("owner/name", "train", KEY).documents == ["One.", ""]
    assert texts.load_text("owner/name:20231101.en", "train", KEY, "story").documents == ["1", "2"]
    assert asked == [("owner/name", None, {"split": "train"}), ("owner/name", "20231101.en", {"split": "train"})]
    with pytest.raises(UserError, match=rf"^{KEY}: owner/name lacks a column txt .*its columns: text, story, id$"):
        texts.load_text("owner/name", "train", KEY, "txt")


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


def test_a_part_of_a_hub_dataset_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Streamed()
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **options: asked.append(options) or rows)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", False)
    monkeypatch.setattr(texts, "MOST_DOCUMENTS", 2)
    documents = ["Document 0.", "Document 1."]
    assert texts.load_text("owner/name", "validation", KEY, part=True).documents == documents
    assert asked == [{"split": "validation", "streaming": True}]
    assert rows.fetched == 2
    monkeypatch.setattr(texts, "MOST_DOCUMENTS", 20)
    monkeypatch.setattr(texts, "MOST_CHARACTERS", len("".join(documents)))
    assert texts.load_text("owner/name", "train", KEY, part=True).documents == documents
    monkeypatch.setattr(texts, "MOST_CHARACTERS", 1000)
    with pytest.raises(
        UserError, match=r"dataset owner/name \(train\) could not be loaded: no network; check the name"
    ):
        texts.load_text("owner/name", "train", KEY, part=True)


@pytest.mark.parametrize(("split", "offline"), [("train", True), ("train[50%:]", False)])
def test_offline_and_of_slices_a_part_is_taken_from_the_cache(
    split: str, offline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = datasets.Dataset.from_list([{"text": f"Document {number}."} for number in range(5)])
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **options: asked.append(options) or rows)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", offline)
    monkeypatch.setattr(texts, "MOST_DOCUMENTS", 2)
    assert texts.load_text("owner/name", split, KEY, part=True).documents == ["Document 0.", "Document 1."]
    assert asked == [{"split": split}]


@pytest.mark.parametrize("packed", [False, True])
def test_of_json_lines_no_more_is_read_than_is_needed(
    packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / ("mine.jsonl.gz" if packed else "mine.jsonl")
    with gzip.open(path, "wt") if packed else path.open("w") as file:
        file.write('{"text": "One."}\n\n{"text": "Two."}\nno JSON\n')
    with pytest.raises(UserError, match=r"line 4, cannot be read as JSON"):
        texts.load_text(str(path), "train", KEY, part=True)
    monkeypatch.setattr(texts, "MOST_DOCUMENTS", 2)
    assert texts.load_text(str(path), "train", KEY, part=True).documents == ["One.", "Two."]
    with pytest.raises(UserError, match=r"line 4, cannot be read as JSON"):
        texts.load_text(str(path), "train", KEY)


@pytest.mark.parametrize("form", ["json", "parquet"])
def test_a_part_of_what_is_read_whole(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": f"Document {number}."} for number in range(5)]
    if form == "json":
        (tmp_path / "mine.json").write_text(json.dumps(rows, indent=1))
    else:
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "mine.parquet")
    monkeypatch.setattr(texts, "MOST_DOCUMENTS", 2)
    found = texts.load_text(str(tmp_path / f"mine.{form}"), "train", KEY, part=True)
    assert found.documents == ["Document 0.", "Document 1."]


def test_the_configurations_of_a_hub_dataset_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['a', 'b']\nExample")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match=r"could not be loaded: .*available configs: \['a', 'b'\]; write NAME:CONFIG"):
        texts.load_hub("owner/name", "train")


def test_a_hub_dataset_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no network\nmore words")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match=r"dataset owner/name \(test\) could not be loaded: no network; check the name"):
        texts.load_hub("owner/name", "test")


def test_prose_is_plain_paragraphs() -> None:
    text = texts.load_text("prose", "test", KEY)
    assert sum(map(len, text.documents)) > 100_000
    assert len(set(text.documents)) == len(text.documents)
    assert all(len(document) > 150 and "\n" not in document and "  " not in document for document in text.documents)
    assert not any("::=" in document or ">>>" in document for document in text.documents)
    assert texts.load_text("prose", "train", KEY) == text


def test_the_built_in_instructions_as_text() -> None:
    train, test = (texts.load_text("instructions", split, KEY).documents for split in ("train", "test"))
    assert len(test) == 64
    assert not set(train) & set(test)
    assert train[0] == formatted(texts.built_in_rows("train")[0])


def test_a_text_is_identified_by_what_it_says() -> None:
    assert texts.content_hash(["a", "bc"]) == texts.content_hash(["a", "bc"])
    assert texts.content_hash(["a", "bc"]) != texts.content_hash(["ab", "c"])
    assert texts.content_hash([]) != texts.content_hash([""])


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


# --- the data mirror --------------------------------------------------------------------------------------------------

FromMirror = Callable[[str], Any]


def test_c4_is_read_from_the_shard_that_was_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "datasets--allenai--c4"
    shard = repository / "snapshots" / "abc" / texts.C4_FIRST_SHARD["train"]
    shard.parent.mkdir(parents=True)
    with gzip.open(shard, "wt") as file:
        file.writelines(json.dumps({"text": f"document {number}", "url": ""}) + "\n" for number in range(5))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setitem(texts.C4_DOCUMENTS, "train", 3)
    assert texts.load_text("c4", "train", KEY).documents == ["document 0", "document 1", "document 2"]


def test_c4_is_measured_on_as_in_the_literature(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_dict({"text": [f"document {number}" for number in range(1200)]})
    monkeypatch.setattr(texts, "load_hub", lambda repository, split, *_: rows if split == "validation" else None)
    text = texts.load_text("c4", "test", KEY)
    assert (len(text.documents), text.documents[-1]) == (1100, "document 1099")
    assert (text.joiner, text.windows) == (" ", 256)


@pytest.mark.slow
@pytest.mark.shared
def test_c4_of_the_mirror(from_mirror: FromMirror) -> None:
    found = from_mirror("texts.load_text('c4', 'train', 'key').documents")
    assert len(found) == 1300
    assert all(document.strip() for document in found)


@pytest.mark.slow
@pytest.mark.shared
def test_wikitext2_of_the_mirror(from_mirror: FromMirror) -> None:
    text = from_mirror("vars(texts.load_text('wikitext2', 'test', 'key'))")
    assert len(text["documents"]) == 4358
    assert text["joiner"] == "\n\n"
    assert text["running"]
    assert text["documents"][:2] == ["", " = Robert Boulter = \n"]


@pytest.mark.slow
@pytest.mark.shared
def test_alpaca_of_the_mirror(from_mirror: FromMirror) -> None:
    (text,) = from_mirror("texts.load_text('alpaca', 'train[:1]', 'key').documents")
    assert text.startswith("Below is an instruction that describes a task")
