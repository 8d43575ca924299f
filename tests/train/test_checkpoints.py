"""Which checkpoint an interrupted training continues from: the newest that is as it was written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import stage_calls
import torch
from conftest import cut_after
from safetensors.torch import load_file

from sppctl.config.load import load_config
from sppctl.config.settings import Config
from sppctl.errors import UserError
from sppctl.records import PruneRecord
from sppctl.train.checkpoints import HASHES, newest, seal

FILES = ("adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json")
DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "a bit": lambda path, other: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "truncated": lambda path, other: path.write_bytes(path.read_bytes()[:-3]),
    "missing": lambda path, other: path.unlink(),
    "another checkpoint's": lambda path, other: shutil.copy(other / path.name, path),
}


@pytest.fixture
def configure(config_file: Path) -> Callable[..., Config]:
    return lambda *overrides: load_config(str(config_file), overrides)


def made(checkpoints: Path, *steps: int) -> Path:
    for step in steps:
        folder = checkpoints / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        for name in FILES:
            (folder / name).write_text(f"{name} after step {step}")
        seal(folder)
    return checkpoints


def test_the_newest_by_its_number(tmp_path: Path) -> None:
    assert newest(tmp_path / "none", None) is None
    assert newest(made(tmp_path, 6, 9, 12), None) == str(tmp_path / "checkpoint-12")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [*FILES, HASHES])
def test_a_damaged_one_is_put_aside_for_the_one_before(
    name: str, damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(tmp_path, 3, 6)
    DAMAGES[damage](tmp_path / "checkpoint-6" / name, tmp_path / "checkpoint-3")
    assert newest(tmp_path, None) == str(tmp_path / "checkpoint-3")
    said = capsys.readouterr().err
    assert f"checkpoint-6 is damaged ({name}" in said
    assert "continuing from checkpoint-3" in said
    assert {path.name.rpartition("-")[0] for path in tmp_path.iterdir()} == {"checkpoint", "damaged-checkpoint-6"}
    assert newest(tmp_path, None) == str(tmp_path / "checkpoint-3")
    assert not capsys.readouterr().err


def test_where_all_are_damaged_nothing_is_discarded_without_being_asked(tmp_path: Path) -> None:
    for step in (3, 6):
        (made(tmp_path, step) / f"checkpoint-{step}" / "optimizer.pt").unlink()
    with pytest.raises(UserError, match=r"checkpoint-6 is damaged \(optimizer.pt is missing\); .*train --no-resume"):
        newest(tmp_path, None)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-3", "checkpoint-6"}


def test_an_empty_one_never_blocks(tmp_path: Path) -> None:
    for name in ("checkpoint-9", "checkpoint-3"):
        (tmp_path / name).mkdir(parents=True)
    assert newest(tmp_path, None) is None
    made(tmp_path, 6)
    (tmp_path / "checkpoint-9").mkdir()
    assert newest(tmp_path, None) == str(tmp_path / "checkpoint-6")


def test_a_training_falls_back_and_ends_with_the_same_adapter(
    configure: Callable[..., Config],
    pruned: tuple[Path, PruneRecord],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = configure("train.save_steps=1", "train.dropout=0.1", "train.max_steps=4")
    do = partial(stage_calls.train, config, *pruned)
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    do(tmp_path / "whole")
    with cut_after(3):
        do(tmp_path / "cut")
    optimizer = tmp_path / "cut/checkpoints/checkpoint-2/optimizer.pt"
    content = optimizer.read_bytes()
    optimizer.write_bytes(content[:2000] + bytes([content[2000] ^ 4]) + content[2001:])
    do(tmp_path / "cut")
    said = capsys.readouterr().err
    assert "checkpoint-2 is damaged (optimizer.pt is damaged)" in said
    assert f"resuming from {tmp_path}/cut/checkpoints/checkpoint-1\n" in said
    whole, cut = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(tensor, cut[name]) for name, tensor in whole.items())
