from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sppctl.files import cache

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
    assert cache.read(path) is None
    cache.write(path, TENSORS, made="by hand")
    found, metadata = cache.read(path) or ({}, {})
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert metadata["made"] == "by hand"
    assert [file.parent for file in tmp_path.rglob("*.*")] == [tmp_path / "things"]


def test_an_entry_is_named_by_all_that_it_depends_on() -> None:
    assert entry(size=3, seed=1) == entry(seed=1, size=3)
    assert len({entry(size=3, seed=1), entry(size=3, seed=2), entry(size=3), entry()}) == 4


def test_nothing_is_kept_for_a_tokenizer_without_identity() -> None:
    assert cache.entry("things", {"tokenizer": None}) is None
    cache.write(None, TENSORS)
    assert cache.read(None) is None


def test_tensors_are_identified_by_name_dtype_shape_and_value() -> None:
    a = TENSORS["a"]
    others = [{"a": a}, {"b": a}, {"a": a.long()}, {"a": a.view(2, 3)}, {"a": a + 1}, {"a": a, "b": a}]
    assert len({cache.digest(other) for other in others}) == len(others)
    assert cache.digest({"a": a, "b": a + 1}) == cache.digest({"b": a + 1, "a": a})
