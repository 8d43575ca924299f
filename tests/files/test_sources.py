"""What a task of lm-eval is made from is noticed when it changes: whatever its form and place, and times set back."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from sppctl.evaluate import harness
from sppctl.files import sources

ROWS = [{"question": f"Is {i} even?", "gold": i % 2} for i in range(4)]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """own/ with a task, what it includes in other/, its data in data/, and the current directory beside them."""
    for name in ("own", "other", "data", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.syspath_prepend(tmp_path / "other")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("SPPCTL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "other/common.yaml").write_text(
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: !function words.text\ndoc_to_target: gold\n"
        "doc_to_choice: ['yes', 'no']\nmetric_list: [{metric: acc}]\n"
    )
    (tmp_path / "other/words.py").write_text("from starts_of_words import START\n\n\ndef text(doc): return START\n")
    (tmp_path / "other/starts_of_words.py").write_text("START = 'Q: '\n")
    return tmp_path


def write_task(place: Path, source: str) -> None:
    text = f"task: mine\ninclude: {place}/other/common.yaml\n{source}\n"
    (place / "own/mine.yaml").write_text(text)


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def loaded(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What is recorded of the task, and its rows."""
    harness._task_manager.cache_clear()  # as another command would find it
    found, recorded = harness._load(["mine"], str(folder))
    return recorded.summary(str(folder)), list(found["tasks"]["mine"].test_docs())


def is_current(recorded: dict[str, Any], folder: Path) -> bool:
    harness._task_manager.cache_clear()
    return harness.are_current("mine", recorded, str(folder))


def rewrite(path: Path, content: bytes) -> None:
    """Other content with the times of before."""
    before = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def as_csv(separator: str) -> Callable[[list[dict[str, Any]]], bytes]:
    return lambda rows: "\n".join(
        ["question,gold".replace(",", separator), *(f"{row['question']}{separator}{row['gold']}" for row in rows), ""]
    ).encode()


@pytest.mark.parametrize(
    ("source", "name", "form"),
    [
        ("dataset_path: csv\ndataset_kwargs: {data_files: {test: DATA/a.csv}}", "a.csv", as_csv(",")),
        ('dataset_path: csv\ndataset_kwargs: {sep: "\\t", data_files: {test: DATA/a.tsv}}', "a.tsv", as_csv("\t")),
        ("dataset_path: json\ndataset_kwargs: {data_files: {test: ../data/a.jsonl.gz}}", "a.jsonl.gz",
         lambda rows: gzip.compress(lines(rows), mtime=0)),
        ("dataset_path: json\ndataset_kwargs: {data_files: {test: 'DATA/*.jsonl'}}", "a.jsonl", lines),
        ("dataset_path: DATA", "test.jsonl", lines),
    ],
    ids=["csv", "tsv", "gzip", "glob", "folder"],
)  # fmt: skip
def test_other_data_is_read_and_noticed(
    place: Path, source: str, name: str, form: Callable[[list[dict[str, Any]]], bytes]
) -> None:
    write_task(place, source.replace("DATA", str(place / "data")))
    (place / "data" / name).write_bytes(form(ROWS))
    before, rows = loaded(place / "own")
    assert rows == ROWS
    assert is_current(before, place / "own")
    assert loaded(place / "own")[0] == before
    changed = [row | {"gold": 1 - row["gold"]} for row in ROWS]
    rewrite(place / "data" / name, form(changed))
    assert not is_current(before, place / "own")
    after, rows = loaded(place / "own")
    assert rows == changed
    assert after["digest"] != before["digest"]


def test_parquet_and_data_saved_by_datasets(place: Path) -> None:
    """Both are read without Python's knowledge."""
    write_task(place, f"dataset_path: parquet\ndataset_kwargs: {{data_files: {{test: {place}/data/a.parquet}}}}")
    datasets.Dataset.from_list(ROWS).to_parquet(place / "data/a.parquet")
    before, _ = loaded(place / "own")
    datasets.Dataset.from_list(ROWS[:3]).to_parquet(place / "data/a.parquet")
    assert not is_current(before, place / "own")
    (place / "own/data.py").write_text(
        "import datasets\n\n\ndef saved(**_): return datasets.load_from_disk('../data/saved')\n"
    )
    write_task(place, "custom_dataset: !function data.saved")
    datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS)}).save_to_disk(place / "data/saved")
    before, rows = loaded(place / "own")
    assert rows == ROWS
    assert is_current(before, place / "own")
    arrow = next((place / "data/saved/test").glob("*.arrow"))
    rewrite(arrow, arrow.read_bytes().replace(b"even", b"ever"))
    assert not is_current(before, place / "own")


@pytest.mark.parametrize("name", ["own/mine.yaml", "other/common.yaml", "other/words.py", "other/starts_of_words.py"])
def test_what_a_task_includes_and_imports_counts(place: Path, name: str) -> None:
    write_task(place, f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {place}/data/a.jsonl}}}}")
    (place / "data/a.jsonl").write_bytes(lines(ROWS))
    before, _ = loaded(place / "own")
    (place / "here/unrelated.txt").write_text("new")
    assert is_current(before, place / "own")
    rewrite(place / name, (place / name).read_bytes() + b"\n")
    assert not is_current(before, place / "own")
    assert loaded(place / "own")[0]["digest"] != before["digest"]


def test_a_file_that_a_pattern_finds_anew(place: Path) -> None:
    write_task(place, f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: '{place}/data/*.jsonl'}}}}")
    (place / "data/a.jsonl").write_bytes(lines(ROWS))
    before, _ = loaded(place / "own")
    (place / "data/b.jsonl").write_bytes(lines(ROWS))
    assert not is_current(before, place / "own")


def test_the_tasks_that_are_configured_count_wherever_they_are(place: Path) -> None:
    write_task(place, f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {place}/data/a.jsonl}}}}")
    (place / "data/a.jsonl").write_bytes(lines(ROWS))
    before, _ = loaded(place / "own")
    moved = shutil.copytree(place / "own", place / "moved")
    assert is_current(before, moved)
    assert loaded(moved)[0] == before
    (moved / "mine.yaml").rename(moved / "renamed.yaml")
    assert not is_current(before, moved), "another file defines it"
    (moved / "renamed.yaml").rename(moved / "mine.yaml")
    with (moved / "mine.yaml").open("a") as file:
        file.write("num_fewshot: 1\n")
    assert not is_current(before, moved)
    assert is_current(before, place / "own")


def test_data_of_the_hub_is_known_by_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    folder = tmp_path / "owner___name/part/0.0.0"
    (folder / "abc").mkdir(parents=True)
    with sources.recording() as recorded:
        sources.note({"test": type("Data", (), {"cache_files": [{"filename": f"{folder}/abc/name-test.arrow"}]})()})
    found = recorded.summary(None)
    assert (found["files"], found["versions"]) == ({}, {"owner___name/part/0.0.0": "abc"})
    assert sources.are_current(found, None, None)
    (folder / "def").mkdir()
    os.utime(folder / "def", (2e9, 2e9))
    assert not sources.are_current(found, None, None)
    assert sources.newer(found["versions"]) == {"owner___name/part/0.0.0": "def"}
    with sources.recording() as recorded:  # by its revision, though a later one is there
        sources.note(type("Data", (), {"cache_files": [{"filename": f"{folder}/abc/name-test.arrow"}]})())
    assert sources.newer(recorded.versions) == {}
    assert recorded.versions != found["versions"]
    shutil.rmtree(tmp_path / "owner___name")  # a machine that does not have the data
    assert sources.are_current(found, None, None)
