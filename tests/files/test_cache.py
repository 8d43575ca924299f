"""The cache: an entry is what was written or is absent, and no fault of it costs more than time."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer
from safetensors.torch import load_file, save_file

from sppctl.files import cache
from sppctl.files.cache import tokenizer_identity

TENSORS = {"a": torch.arange(6, dtype=torch.int32), "b": torch.tensor([True, False])}


@pytest.fixture(autouse=True)
def own_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPPCTL_CACHE", str(tmp_path))


def entry(**depends_on: object) -> Path:
    path = cache.entry("things", {"tokenizer": "t", **depends_on})
    assert path is not None
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = entry(size=3)
    assert cache.read(path) == ({}, {})
    cache.write(path, TENSORS, made="by hand")
    tensors, metadata = cache.read(path)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())
    assert metadata["made"] == "by hand"
    assert [file.parent for file in tmp_path.rglob("*.*")] == [tmp_path / "things"]


def test_an_entry_is_named_by_all_that_it_depends_on() -> None:
    assert entry(size=3, seed=1) == entry(seed=1, size=3)
    assert len({entry(size=3, seed=1), entry(size=3, seed=2), entry(size=3), entry()}) == 4
    assert cache.entry("things", {"tokenizer": None}) is None  # one without identity
    cache.write(None, TENSORS)
    assert cache.read(None) == ({}, {})


def test_tensors_are_identified_by_name_dtype_shape_and_value() -> None:
    a = TENSORS["a"]
    others = [{"a": a}, {"b": a}, {"a": a.long()}, {"a": a.view(2, 3)}, {"a": a + 1}, {"a": a, "b": a}]
    assert len({cache.digest(other) for other in others}) == len(others)
    assert cache.digest({"a": a, "b": a + 1}) == cache.digest({"b": a + 1, "a": a})


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:-8]),
        lambda file: file.write_text("nothing of the kind"),
        lambda file: file.write_bytes(file.read_bytes()[:-1] + b"\x7f"),
        lambda file: save_file(load_file(file), file),
        lambda file: shutil.copy(file.with_name("other.safetensors"), file),
    ],
    ids=["empty", "cut", "no safetensors", "other values", "no hash", "another entry"],
)
def test_what_is_damaged_is_not_read(damage: Any) -> None:
    path = entry(size=3)
    for name in (path, path.with_name("other.safetensors")):
        cache.write(name, TENSORS)
    damage(path)
    assert cache.read(path) == ({}, {})


def test_what_cannot_be_written_costs_nothing_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        cache.write(entry(), TENSORS)
    assert list((tmp_path / "things").iterdir()) == []
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPPCTL_CACHE", str(tmp_path / "file"))
    cache.write(entry(), TENSORS)
    assert cache.read(entry()) == ({}, {})


def test_what_a_killed_process_left_goes_with_the_next_entry(tmp_path: Path) -> None:
    path = tmp_path / "entry.safetensors"
    gone, alive = (tmp_path / f".entry-{os.uname().nodename}-{pid}.tmp" for pid in (2**22 + 1, os.getppid()))
    for left in (gone, alive):
        left.touch()
    cache.write(path, {})
    assert {file.name for file in tmp_path.iterdir()} == {path.name, alive.name}


def test_it_is_in_the_home_directory_if_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SPPCTL_CACHE", "")
    assert entry().parent == tmp_path / ".cache" / "sppctl" / "things"
    monkeypatch.setattr(Path, "expanduser", homeless)
    assert cache.entry("things", {"tokenizer": "t"}) is None


def test_a_tokenizer_is_identified_by_what_it_does() -> None:
    one, other = byte_tokenizer(), byte_tokenizer()
    identity = tokenizer_identity(one)
    assert identity == tokenizer_identity(other)
    other(["a", "bc"], padding=True, truncation=True, max_length=2)  # how it was called before does not count
    assert identity == tokenizer_identity(other)
    other.add_tokens(["bc"])
    assert identity != tokenizer_identity(other)


def test_slow_tokenizers_are_identified_by_vocabulary_and_settings() -> None:
    class Slow:
        special_tokens_map = {"eos_token": "</s>"}

        def __init__(self, first: int = 0, lowercase: bool = False) -> None:
            self.vocabulary, self.lowercase = {chr(first + i): i for i in range(128)}, lowercase

        def get_vocab(self) -> dict[str, int]:
            return self.vocabulary

    assert tokenizer_identity(Slow()) == tokenizer_identity(Slow())
    assert len({tokenizer_identity(each) for each in (Slow(), Slow(1), Slow(lowercase=True))}) == 3


def test_what_cannot_be_identified_is_not() -> None:
    def no_vocabulary() -> None:
        raise NotImplementedError

    assert tokenizer_identity(SimpleNamespace(get_vocab=no_vocabulary)) is None
    assert tokenizer_identity(no_vocabulary) is None
