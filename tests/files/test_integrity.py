"""Hashes of whole files: right whatever the threads, remembered only as long as nothing changed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch

from sppctl.errors import UserError
from sppctl.files import integrity
from sppctl.files.integrity import check, compare, hash_files, hashes, listing, mask_digest

CONTENT = bytes(range(256)) * 9000  # 2.3 MB


@pytest.fixture
def reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Pieces that were read, with a cache of its own and without the wait for a file to settle."""
    read: list[Path] = []
    piece = integrity._piece_digest

    def watched(path: Path, start: int) -> bytes:
        read.append(path)
        return piece(path, start)

    monkeypatch.setattr(integrity, "_piece_digest", watched)
    monkeypatch.setattr(integrity, "SETTLED_NS", 0)
    monkeypatch.setenv("SPPCTL_CACHE", str(tmp_path / "cache"))
    return read


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "folder" / "model.safetensors"
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    return path


def test_pieces_give_the_hash_that_is_described(
    large: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integrity, "PIECE", 1_000_000)
    expected = hashlib.sha256(str(len(CONTENT)).encode())
    for start in range(0, len(CONTENT), 1_000_000):
        expected.update(hashlib.sha256(CONTENT[start : start + 1_000_000]).digest())
    assert hash_files([large]) == [expected.hexdigest()]
    assert len(reads) == 3


def test_an_unchanged_file_is_not_read_again_even_where_its_folder_moved(large: Path, reads: list[Path]) -> None:
    first = hash_files([large])
    assert hash_files([large]) == first
    moved = large.parent.rename(large.parent.with_name("moved")) / large.name
    assert hash_files([moved]) == first
    assert len(reads) == 1
    assert hash_files([moved], reread=True) == first
    assert len(reads) == 2


def test_a_change_that_restores_size_and_modification_time_is_seen(large: Path, reads: list[Path]) -> None:
    first, before = hash_files([large]), large.stat()
    with large.open("r+b") as file:
        file.seek(1_234_567)
        file.write(b"!")
    os.utime(large, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert large.stat().st_mtime_ns == before.st_mtime_ns
    assert hash_files([large]) != first


def test_what_was_changed_a_moment_ago_is_not_remembered(
    large: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integrity, "SETTLED_NS", 3600 * 10**9)
    assert hash_files([large]) == hash_files([large])
    assert len(reads) == 2


@pytest.mark.parametrize("damage", ["unwritable", "truncated", "another"])
def test_a_cache_that_is_of_no_use_costs_only_time(damage: str, large: Path, reads: list[Path], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    if damage == "unwritable":
        cache.write_text("a file where the folder should be")
    first = hash_files([large])
    if damage != "unwritable":
        (entry,) = (cache / "hashes").iterdir()
        text = entry.read_text()
        entry.write_text(text[:50] if damage == "truncated" else text.replace(first[0], "0" * 64))
    assert hash_files([large]) == first
    assert compare(large.parent, {large.name: first[0]}) == {large.name: "ok"}


def test_every_kind_of_damage_is_named_in_one_line(tmp_path: Path) -> None:
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        (tmp_path / name).write_text(name)
    recorded = hashes(tmp_path, listing(tmp_path))
    check(tmp_path, recorded, "do it again")
    (tmp_path / "model.safetensors").write_text("model.safetensorr")
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "model-2.safetensors").write_text("")
    (tmp_path / "notes.txt").write_text("of no model")
    with pytest.raises(UserError) as caught:
        check(tmp_path, recorded, "do it again")
    assert sorted(str(caught.value).splitlines()) == sorted(
        [
            f"{tmp_path}/model.safetensors is damaged: its content is not what was recorded; restore it, or do it "
            "again",
            f"{tmp_path}/tokenizer.json is missing; restore it, or do it again",
            f"{tmp_path}/model-2.safetensors is not in the record of its directory and would be loaded; remove it, or "
            "do it again",
        ]
    )


def test_folders_beside_the_weights_count_and_logs_do_not(tmp_path: Path) -> None:
    for name in (
        "a.json",
        "additional_chat_templates/tool.jinja",
        "logs/events",
        "NOTICE.md",
        "README.md",
        ".hidden",
        "stage.json",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert listing(tmp_path) == ["NOTICE.md", "a.json", "additional_chat_templates/tool.jinja"]
    assert listing(tmp_path, {"additional_chat_templates"}) == ["NOTICE.md", "a.json"]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone.safetensors cannot be read \(No such file"):
        hash_files([tmp_path / "gone.safetensors"])


def test_a_mask_is_identified_by_its_zeros_and_its_shape() -> None:
    weight = torch.tensor([[1.0, 0, -2, 0], [0, 3, 0, 4]], dtype=torch.bfloat16)
    assert mask_digest(weight) == hashlib.sha256(b"(2, 4)" + bytes([0b10100101])).hexdigest()
    assert mask_digest(weight * -7) == mask_digest(weight)
    assert mask_digest(weight.t().contiguous().t()) == mask_digest(weight)
    assert mask_digest(weight.view(4, 2)) != mask_digest(weight)
    weight[0, 1] = 1e-30
    assert mask_digest(weight) == hashlib.sha256(b"(2, 4)" + bytes([0b11100101])).hexdigest()
