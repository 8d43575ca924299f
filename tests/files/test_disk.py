"""Files that are whole or absent, and what is found before anything is written."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from sppctl.config.load import load_config
from sppctl.errors import UserError, WriteError
from sppctl.files import disk
from sppctl.model import find
from sppctl.run.directory import Run


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a" / "b.txt"
    disk.write(path, "before")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match=r"b\.txt cannot be written: No space .*\(5 bytes needed, [\d,]+ bytes free\)"):
        disk.write(path, "after")
    assert [found.name for found in path.parent.iterdir()] == ["b.txt"]
    assert path.read_text() == "before"


def test_only_errors_that_are_meant_are_translated(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), disk.writing(tmp_path, reasons=disk.FULL):
        (tmp_path / "absent").read_text()
    with pytest.raises(WriteError, match=r"\([\d,]+ bytes free\)"), disk.writing(tmp_path, reasons=disk.FULL):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")


@pytest.mark.parametrize("kind", ["pipe", "folder", "broken link", "unreadable"])
@pytest.mark.parametrize("name", ["extra.json", "notes.txt", "more.safetensors", "code.py"])
def test_odd_files_of_a_checkpoint_are_found_when_it_is_located(
    kind: str, name: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(llama, tmp_path / "model")
    odd = tmp_path / "model" / name
    make = {"pipe": os.mkfifo, "folder": Path.mkdir, "broken link": lambda path: path.symlink_to("absent")}
    make.get(kind, Path.touch)(odd)
    if kind == "unreadable":  # whoever is root may read everything
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != odd)
    reason = {"broken link": "cannot be read .No such file", "unreadable": "cannot be read .permission denied"}
    for locate in (find.locate, find.locate_weights):
        with pytest.raises(UserError, match=rf"{name} {reason.get(kind, 'is not a regular file')}"):
            locate(str(tmp_path / "model"))


def test_an_odd_run_directory_is_found_before_anything_is_written(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(load_config("quickstart", [f"model.path={llama}", f"run.dir={tmp_path / 'run'}"]))
    for name in (".lock", "resolved.yaml", "pruned", ".merged.partial", "eval"):
        (tmp_path / "run").mkdir()
        os.mkfifo(tmp_path / "run" / name)
        with pytest.raises(UserError, match=rf"run\.dir: .*{name} is (not a regular file|a broken link or)"):
            run.check_directory()
        shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").symlink_to("absent")
    with pytest.raises(UserError, match=r"run\.dir: .*run is a broken link"):
        run.check_directory()
    (tmp_path / "run").unlink()
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "run")
    with pytest.raises(UserError, match=r"run\.dir: .*run is not writable"):
        run.check_directory()
