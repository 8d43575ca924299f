"""Checkpoints are written whole, and an interrupted training continues from the newest that is as it was written."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from conftest import cut_after
from fitting import Fit, a_fit  # noqa: F401  (the fixture fit)

from sppctl.errors import StageError, UserError
from sppctl.train.checkpoints import HASHES, demand_files, newest, save, save_engine

FILES = ("adapter_model.safetensors", "optimizer.pt", "rng_state_0.pth", "scheduler.pt", "state.json")
DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "a bit": lambda path, other: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "truncated": lambda path, other: path.write_bytes(path.read_bytes()[:-3]),
    "missing": lambda path, other: path.unlink(),
    "another checkpoint's": lambda path, other: shutil.copy(other / path.name, path),
}


def made(checkpoints: Path, *steps: int, keep: int = 9) -> Path:
    def write(step: int, folder: Path) -> None:
        for name in FILES:
            (folder / name).write_text(f"{name} after step {step}")

    for step in steps:
        save(checkpoints, step, partial(write, step), keep)
    return checkpoints


def test_saving_keeps_the_newest_and_replaces_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "saving" / "half").mkdir(parents=True)  # of a process that was killed
    made(tmp_path, 3, 6, 9, 6, keep=2)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-6", "checkpoint-9"}
    assert {path.name for path in (tmp_path / "checkpoint-6").iterdir()} == {*FILES, HASHES}


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device"), r"No space left on device; "),
        (RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 64"), r"\(is the disk full\?\); "),
    ],
)
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(
    error: Exception, words: str, tmp_path: Path
) -> None:
    def fail(folder: Path) -> None:
        (folder / "optimizer.pt").touch()
        raise error

    words = rf"^the checkpoint of step 6 cannot be written to .*{words}.*checkpoint-3 is intact: the same command"
    with pytest.raises(StageError, match=words):
        save(made(tmp_path, 3), 6, fail, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


class Engine:
    """As DeepSpeed's: it writes two files and waits for the other processes at the end of its save_checkpoint."""

    def __init__(self, problem: Exception | None) -> None:
        self.checkpoint_engine, self.global_steps, self.problem = self, 3, problem
        self.written: list[str] = []
        self.waited = False

    def save(self, state_dict: object, path: str) -> None:
        self.written.append(path)
        if self.problem is not None:
            raise self.problem

    def save_checkpoint(self, folder: str, tag: str, *, save_latest: bool, exclude_frozen_parameters: bool) -> None:
        assert not save_latest, "rank 0 could fail in it"
        assert exclude_frozen_parameters
        for part in ("model", "optimizer"):
            self.checkpoint_engine.save({}, path=f"{folder}/{tag}/{part}")
        self.waited = True


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("problem", [None, OSError(28, "No space left on device")], ids=["written", "full"])
def test_a_process_that_cannot_write_its_shard_still_waits_for_the_others(
    problem: Exception | None, rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", str(rank))
    engine = Engine(problem)
    with pytest.raises(OSError, match="No space left") if problem else contextlib.nullcontext():
        save_engine(engine, tmp_path)
    assert engine.waited
    assert engine.written == [f"{tmp_path}/global_step3/{part}" for part in ("model", "optimizer")]
    assert [path.read_text() for path in tmp_path.iterdir()] == ["global_step3"] * (problem is None and rank == 0)
    with pytest.raises(OSError, match="No space left") if problem else contextlib.nullcontext():
        engine.checkpoint_engine.save({}, "as before")


def test_the_newest_by_its_number(tmp_path: Path) -> None:
    assert newest(tmp_path / "none", None) is None
    assert newest(made(tmp_path, 6, 9, 12), None) == tmp_path / "checkpoint-12"


@pytest.mark.parametrize(
    ("gone", "more", "strategy", "words"),
    [
        ("state.json", "trainer_state.json", None, r"lacks state\.json, which training under one process continues"),
        ("scheduler.pt", None, "ddp", r"lacks scheduler\.pt, which training under ddp continues from; resume with"),
        (None, None, "zero3", r"lacks latest, which training under zero3 .* it was written under ddp or fsdp; resume"),
        ("optimizer.pt", "global_step3/", "ddp", r"ddp .*: .* under .*zero3 \(processes: 1\); resume"),
    ],
    ids=["older", "no schedule", "for DeepSpeed", "of DeepSpeed"],
)
def test_nothing_is_continued_without_what_belongs_to_it(
    gone: str | None, more: str | None, strategy: str | None, words: str, tmp_path: Path
) -> None:
    saved = made(tmp_path, 3) / "checkpoint-3"
    if gone is not None:
        (saved / gone).unlink()
    if more is not None:
        (saved / more).mkdir() if more.endswith("/") else (saved / more).touch()
    with pytest.raises(UserError, match=words):
        demand_files(saved, strategy)


def test_zero3_continues_with_as_many_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = made(tmp_path, 3) / "checkpoint-3"
    for name in ("latest", "rng_state_1.pth"):
        (saved / name).touch()
    (saved / "global_step3").mkdir()
    monkeypatch.setenv("WORLD_SIZE", "2")
    demand_files(saved, "zero3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"by 2 processes under .*zero3, and 4 cannot read it; resume with 2 \(launch"):
        demand_files(saved, "zero3")
    (saved / "optimizer.pt").unlink()
    with pytest.raises(UserError, match=r"one process .* was written under launch\.strategy=zero3 \(processes: 2\)"):
        demand_files(saved, None)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [*FILES, HASHES])
def test_a_damaged_one_is_put_aside_for_the_one_before(
    name: str, damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(tmp_path, 3, 6)
    DAMAGES[damage](tmp_path / "checkpoint-6" / name, tmp_path / "checkpoint-3")
    assert newest(tmp_path, None) == tmp_path / "checkpoint-3"
    said = capsys.readouterr().err
    assert f"checkpoint-6 is damaged ({name}" in said
    assert "continuing from checkpoint-3" in said
    assert {path.name.rpartition("-")[0] for path in tmp_path.iterdir()} == {"checkpoint", "damaged-checkpoint-6"}
    assert newest(tmp_path, None) == tmp_path / "checkpoint-3"
    assert not capsys.readouterr().err


def test_where_all_are_damaged_nothing_is_discarded_without_being_asked(tmp_path: Path) -> None:
    for step in (3, 6):
        (made(tmp_path, step) / f"checkpoint-{step}" / "optimizer.pt").unlink()
    with pytest.raises(UserError, match=r"checkpoint-6 is damaged \(optimizer.pt is missing\); .*train .*--no-resume"):
        newest(tmp_path, None)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-3", "checkpoint-6"}


def test_an_empty_one_never_blocks(tmp_path: Path) -> None:
    for name in ("checkpoint-9", "checkpoint-3"):
        (tmp_path / name).mkdir(parents=True)
    assert newest(tmp_path, None) is None
    made(tmp_path, 6)
    (tmp_path / "checkpoint-9").mkdir()
    assert newest(tmp_path, None) == tmp_path / "checkpoint-6"


def test_a_training_falls_back_and_ends_with_the_same_adapter(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("train.save_steps=1", "train.dropout=0.1", "train.max_steps=4")
    fit("whole", *options)
    with cut_after(3):
        fit("cut", *options)
    optimizer = fit.root / "cut/checkpoints/checkpoint-2/optimizer.pt"
    content = optimizer.read_bytes()
    optimizer.write_bytes(content[:2000] + bytes([content[2000] ^ 4]) + content[2001:])
    fit("cut", *options)
    said = capsys.readouterr().err
    assert "checkpoint-2 is damaged (optimizer.pt is damaged)" in said
    assert f"continuing from step 1 of 4 ({fit.root}/cut/checkpoints/checkpoint-1)\n" in said
    assert fit.adapter("cut") == fit.adapter("whole")
