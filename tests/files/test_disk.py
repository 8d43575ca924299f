"""Files that are whole or absent, and what is found before anything is written."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
from pathlib import Path

import pytest

from sppctl.config.load import load_config
from sppctl.errors import UserError, WriteError
from sppctl.files import disk
from sppctl.model import find
from sppctl.run import publish
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


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBADF])
def test_a_file_system_that_does_not_sync_directories_is_no_error(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        if refused == "files" or stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))

    refused = "directories"
    monkeypatch.setattr(os, "fsync", refuse)
    disk.write(tmp_path / "a.txt", "whole")
    refused = "files"
    with pytest.raises(WriteError):
        disk.write(tmp_path / "b.txt", "whole")


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


@pytest.mark.parametrize("where", ["new", "there", "link", "."])
def test_a_command_that_fails_deletes_only_what_it_made(
    where: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "resolved.yaml").write_text("mine: 1")
    (tmp_path / "link").symlink_to("there")
    monkeypatch.chdir(tmp_path / "there" if where == "." else tmp_path)
    run = Run(load_config("quickstart", [f"model.path={llama}", f"run.dir={where if where != 'new' else 'new/deep'}"]))
    with pytest.raises(UserError, match="the real error"), run.lock():
        raise UserError("the real error")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "there"]
    assert (tmp_path / "there" / "resolved.yaml").read_text() == "mine: 1"
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["resolved.yaml"]


def test_a_stage_takes_the_place_of_a_link_and_not_of_what_it_leads_to(llama: Path, tmp_path: Path) -> None:
    run = Run(load_config("quickstart", [f"model.path={llama}", f"run.dir={tmp_path / 'run'}"]))
    other = tmp_path / "other"
    other.mkdir()
    (other / "weights").touch()
    for name in ("run/base", "run/.base.old", "run/.base.partial"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(other)
    run.fresh_partial("base")
    run._publish("base")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["base"]
    assert not (run.directory / "base").is_symlink()
    assert (other / "weights").exists()


def test_the_base_of_a_run_is_not_its_model(llama: Path, tmp_path: Path) -> None:
    base = shutil.copytree(llama, tmp_path / "run" / "base")
    with pytest.raises(UserError, match=r"model\.path: .*base is an output of this run"):
        Run(load_config("quickstart", [f"model.path={base}", f"run.dir={tmp_path / 'run'}"])).check_directory()


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EAGAIN, "another sppctl command is working in this directory; wait for it"),
        (errno.EACCES, "another sppctl command is working in this directory; wait for it"),
        (errno.ENOLCK, "cannot be locked (No locks available); use a directory on a file system with locks"),
    ],
)
def test_a_lock_that_fails_names_the_reason(
    number: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError) as caught, publish.exclusive(tmp_path):
        pass
    assert str(caught.value) == f"{tmp_path}: {message}"
