"""A pruning that was interrupted: what is kept, what it continues from, and what it refuses."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import shards
from conftest import Command, Prune
from deaths import DEATHS, DONE, START
from processes import Process
from stage_calls import blank

from sppctl.errors import StageError, UserError
from sppctl.files import sealed
from sppctl.files.names import ALLOCATION, CHANNELS, JOURNAL, NOTE
from sppctl.files.safe_files import OwnFiles, TensorFiles
from sppctl.prune import walk
from sppctl.records import BlockRecord, LayerRecord, to_json

OWL = ["prune.pattern=0.5", "prune.allocation=owl"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("death", "options"),
    [(death, ["prune.method=sparsegpt"]) for death in DEATHS]
    + [
        ("write of block 2", OWL),
        ("block 0 done", ["prune.method=dsnot"]),
        ("block 2 done", ["prune.method=sparsegpt", "prune.order=module"]),
        ("block 2 done", ["prune.memory=disk", "prune.batch_size=3"]),
        ("block 0 done", ["prune.reconstruct_epochs=2", "prune.reconstruct_lr=1e-3", "prune.memory=disk"]),
        ("block 2 done", ["prune.reconstruct_epochs=2", "prune.reconstruct_target=dense", "prune.memory=disk"]),
        ("block 0 done", ["prune.reconstruct_epochs=2", "prune.reconstruct_unit=sublayer", "prune.memory=disk"]),
        ("block 2 done", ["prune.method=sparsegpt", "model.dtype=bfloat16", "model.compute_dtype=float32"]),
        ("block 0 done", ["prune.method=magnitude"]),
        (
            "block 2 done",
            ["prune.permute_channels=true", "prune.method=sparsegpt", "prune.targets=[down_proj, q_proj]"],
        ),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else ",".join(value).replace("prune.", ""),
)
def test_a_killed_run_continues_to_the_same_bytes(
    death: str, options: list[str], config_file: Path, deep: Path, tmp_path: Path, command: Command
) -> None:
    def arguments(name: str) -> list[str]:
        return ["prune", str(config_file), f"model.path={deep}", f"run.dir={tmp_path / name}", *options]

    killed = Process(arguments("killed"), START + DEATHS[death]).wait()
    assert killed.returncode == -9, killed.stderr
    assert not (tmp_path / "killed" / "pruned").exists()
    printed = command(*arguments("killed")).err
    assert "prune: continuing an interrupted attempt" in printed
    assert ("blocks are done" in printed) == (death in DONE)
    assert death not in DONE or f"prune: {DONE[death]} of 4 blocks are done" in printed
    assert command(*arguments("whole")).code == 0
    directories = [tmp_path / name / "pruned" for name in ("killed", "whole")]
    assert shards(directories[0]) == shards(directories[1])
    for directory in directories:
        assert {path.name for path in directory.iterdir()} == {path.name for path in deep.iterdir()} | {
            "stage.json",
            "README.md",
        }
    records = [json.loads((directory / "stage.json").read_text())["metrics"]["layers"] for directory in directories]
    for layer in [*records[0], *records[1]]:
        del layer["seconds"]
    assert records[0] == records[1]


@pytest.fixture
def stopped(command: Command, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """stopped(error, *arguments) -> what a command prints in which the error is raised after the first block."""

    def stop(error: type[Exception], *arguments: str) -> str:
        append = walk.Journal.append

        def then_stop(self: walk.Journal, entry: BlockRecord) -> None:
            append(self, entry)
            raise error("the machine goes down")

        with monkeypatch.context() as patch:
            patch.setattr(walk.Journal, "append", then_stop)
            return command(*arguments).err

    return stop


@pytest.mark.parametrize("error", [OSError, StageError])
def test_finished_blocks_are_not_thrown_away(
    error: type[Exception], config_file: Path, deep: Path, command: Command, stopped: Callable[..., str]
) -> None:
    arguments = ["prune", str(config_file), f"model.path={deep}", "prune.method=wanda"]
    assert "the machine goes down" in stopped(error, *arguments)
    refused = command(*arguments, "prune.pattern=4:8")
    assert refused.code == 2
    assert "now 4:8; " in refused.err.partition("attempt with prune.pattern = ")[2]
    assert shlex.join(["sppctl", *arguments, "prune.pattern=4:8", "--force"]) in refused.err
    assert "prune: 1 of 4 blocks are done" in command(*arguments, "--force").err
    assert "done" not in command(*arguments).err


def test_a_checkpoint_s_own_files_are_not_taken_for_notes_of_the_attempt(
    config_file: Path, deep: Path, command: Command, stopped: Callable[..., str], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(deep, base)
    for name in (NOTE, CHANNELS, ALLOCATION):
        (base / name).write_text('{"of": "somebody else"}')
    arguments = ["prune", str(config_file), f"model.path={base}", *OWL]
    assert "the machine goes down" in stopped(OSError, *arguments)
    outcome = command(*arguments)
    assert "prune: 1 of 4 blocks are done" in outcome.err
    assert outcome.code == 0
    permuted = command(*arguments[:3], "prune.permute_channels=true", f"run.dir={tmp_path / 'permuted'}")
    assert permuted.code == 0, permuted.err


@pytest.mark.parametrize("damage", ["the journal", "a block"])
def test_a_damaged_attempt_is_discarded_by_the_command_that_is_proposed(
    damage: str, config_file: Path, deep: Path, tmp_path: Path, command: Command, stopped: Callable[..., str]
) -> None:
    arguments = ["prune", str(config_file), f"model.path={deep}", f"run.dir={tmp_path / 'other'}"]
    stopped(OSError, *arguments)
    partial = tmp_path / "other/.pruned.partial"
    if damage == "the journal":
        (partial / JOURNAL).write_text("{}\n")
    else:
        name = "model.layers.0.mlp.down_proj.weight"
        OwnFiles(partial).write(name, TensorFiles(partial).read(name) * 2)
    refused = command(*arguments)
    assert refused.code == 2
    fix = refused.err.rpartition("; ")[2].partition(" discards the attempt")[0]
    assert command(*shlex.split(fix)[1:]).code == 0
    again = command(*arguments)
    assert again.code == 0, again.err
    assert "continuing" not in again.err


@pytest.mark.parametrize("torn", ['{"block": 2, "lay', '{"block": 2, "layers": [], "reconstruction": null}'])
@pytest.mark.parametrize(
    "options",
    [
        ["prune.method=dsnot"],
        OWL,
        ["prune.method=sparsegpt", "prune.skip=['*.1.*', '*.3.*']"],
        ["prune.method=sparsegpt", "prune.order=module", "prune.skip=['*.1.*', '*.3.*']"],
    ],
)
def test_a_torn_line_of_the_journal_is_not_a_finished_block(
    torn: str,
    options: list[str],
    prune: Prune,
    interrupt: Callable[..., Path],
    deep: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = interrupt(*options, base=deep)
    with (out / JOURNAL).open("a") as file:
        file.write(torn)
    prune(*options, base=deep, out=out)
    assert "prune: 2 of 4 blocks are done" in capsys.readouterr().err
    assert shards(out) == shards(prune(*options, base=deep).directory)


def finished(block: int) -> BlockRecord:
    return BlockRecord(block, [blank(LayerRecord, name="some", sparsity=0.5, shape=(2, 4))], None, {"some": "digest"})


def test_a_torn_line_is_cut_off_before_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    walk.Journal(path).append(finished(0))
    first = path.read_text()
    path.write_text(first + '{"block"')
    walk.Journal(path).append(finished(1))
    assert path.read_text() == f"{first}{json.dumps(sealed.seal(to_json(finished(1))))}\n"
    assert walk.Journal(path).blocks == [finished(0), finished(1)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [lines[0][:9], *lines[1:]], "line 1 is damaged"),
        (lambda lines: [lines[0], lines[1].replace("0.5", "0.7"), lines[2]], "line 2 is damaged (its content does not"),
        (lambda lines: [*lines[:2], "[3]"], "line 3 is damaged (it is not a JSON object)"),
        (lambda lines: [lines[0], lines[2]], "line 2 is damaged (it records block 2, not 1)"),
        (
            lambda lines: [lines[0], json.dumps(sealed.seal({"block": 1, "layers": [], "reconstruction": None}))],
            "line 2 is damaged (it has no weights)",
        ),
    ],
    ids=["cut", "a number", "another type", "a line is gone", "a key is gone"],
)
def test_a_damaged_line_of_the_journal_is_named(change: Callable[..., list[str]], message: str, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = walk.Journal(path)
    for block in range(3):
        journal.append(finished(block))
    path.write_text("".join(f"{line}\n" for line in change(path.read_text().splitlines())))
    with pytest.raises(UserError) as caught:
        walk.Journal(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    fix = f"sppctl clean {tmp_path.parent} --kinds unfinished --yes discards the attempt"
    assert str(caught.value).endswith(f"; {fix}, so that the same command starts again")


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_a_finished_block_that_was_changed_since_is_not_continued_from(
    method: str, prune: Prune, interrupt: Callable[..., Path], deep: Path
) -> None:
    out = interrupt(f"prune.method={method}", base=deep)
    name = "model.layers.1.mlp.down_proj"
    OwnFiles(out).write(f"{name}.weight", TensorFiles(out).read(f"{name}.weight") * 2)  # under the same mask
    with pytest.raises(
        UserError,
        match=rf"{out.name}: {name} does not match the journal; sppctl clean .* --kinds unfinished --yes discards",
    ):
        prune(f"prune.method={method}", base=deep, out=out)


def test_a_damaged_allocation_is_named(prune: Prune, interrupt: Callable[..., Path], deep: Path) -> None:
    out = interrupt(*OWL, base=deep)
    path = out / ALLOCATION
    path.write_text(path.read_text().replace("0.", "0.0", 1))
    with pytest.raises(
        UserError, match=r"allocation\.json is damaged \(its content does not match its digest\); sppctl"
    ):
        prune(*OWL, base=deep, out=out)


def test_a_torn_allocation_is_made_again(
    prune: Prune, deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends while the file of ratios is written."""
    out, replace = tmp_path / "out", os.replace

    def stop(aside: Path, path: Path) -> None:
        if Path(path).name != ALLOCATION:
            return replace(aside, path)
        aside.write_text(aside.read_text()[:10])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            prune(*OWL, base=deep, out=out)
    prune(*OWL, base=deep, out=out)
    assert shards(out) == shards(prune(*OWL, base=deep).directory)


def test_half_precision_on_a_cpu_continues_to_the_same_bytes(
    prune: Prune, interrupt: Callable[..., Path], make_checkpoint: Callable[..., Path]
) -> None:
    """Computed in float32, written in float16: the next block must see what was written."""
    base = make_checkpoint("llama", dtype=torch.float16)
    out = interrupt("prune.method=sparsegpt", base=base, blocks=1)
    prune("prune.method=sparsegpt", base=base, out=out)
    assert shards(out) == shards(prune("prune.method=sparsegpt", base=base).directory)
