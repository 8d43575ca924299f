"""Training that is killed, told to stop, or runs out of disk: the same command continues to the same adapter."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import Ended, Process

from sppctl.files import sealed
from sppctl.train import stage as train  # noqa: F401  (what is imported here, no forked process has to import)

pytestmark = pytest.mark.slow

# before and after: what a function is called with goes to another one as well, which may end the process
START = """
import os, shutil, signal, sys
from pathlib import Path
import torch
from accelerate import Accelerator
from sppctl import cli, console
from sppctl.files import sealed

def die(number=signal.SIGKILL):
    os.kill(os.getpid(), number)

def around(owner, name, first=None, then=None):
    original = getattr(owner, name)
    def wrapped(*args, **kwargs):
        if first:
            first(*args)
        result = original(*args, **kwargs)
        if then:
            then(*args)
        return result
    setattr(owner, name, wrapped)

before, after = (lambda *args: around(*args[:2], args[2])), (lambda *args: around(*args[:2], None, args[2]))
"""
CUT = 'after(console.Progress, "advance", lambda bar, *_: bar.done == 5 and die())'  # a checkpoint of step 3 is left
# each ends the process as kill -9 does, at the named point of a training of 10 steps with a checkpoint every 3; and the
# checkpoint that is resumed from (test_kills.py tries every change of a file from the end of the training on)
DEATHS = {
    "before the first checkpoint": (
        'after(console.Progress, "advance", lambda bar, *_: bar.done == 2 and die())',
        None,
    ),
    "between two checkpoints": (CUT, 3),
    "half a checkpoint": (
        """
def half(state, path):
    if path.name == "optimizer.pt" and (path.parents[1] / "checkpoint-3").exists():
        os.truncate(path, os.path.getsize(path) // 2)
        die()
after(torch, "save", half)
""",
        3,
    ),
    "a checkpoint without its name": (
        'before(os, "rename", lambda old, new: Path(new).name == "checkpoint-6" and die())',
        3,
    ),
    "two checkpoints, one too many": (
        'before(shutil, "rmtree", lambda path: (Path(path).parent / "checkpoint-9").exists() and die())',
        9,
    ),
    "complete, not published": ('after(sealed, "write", lambda path, _: path.name == "stage.json" and die())', None),
}
OPTIONS = ["train.epochs=2", "train.save_steps=3", "train.keep_checkpoints=1", "train.dropout=0.1", "train.log_steps=1"]
OPTIONS.append("train.report_to=[]")


def sppctl(arguments: list[str], patch: str = "") -> Ended:
    """The command line in a process of its own, changed by ``patch``."""
    return Process(arguments, f"{START}\n{patch}").wait()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, write_config: Callable[..., Path]) -> list[str]:
    """Arguments of a training whose pruned checkpoint is there, and whose uninterrupted adapter is in RUN/whole."""
    folder = tmp_path_factory.mktemp("stops")
    config = write_config(folder / "tiny.yaml")
    arguments = [str(config), *OPTIONS]
    for stage in ("prune", "train"):
        done = sppctl([stage, *arguments])
        assert done.returncode == 0, done.stderr
    (folder / "run" / "adapter").rename(folder / "whole")
    return arguments


@pytest.fixture
def training(prepared: list[str], tmp_path: Path) -> list[str]:
    """``sppctl train`` in a run directory of its own, with nothing but the pruned checkpoint in it."""
    source = Path(prepared[0]).parent / "run"
    shutil.copytree(source / "pruned", tmp_path / "run" / "pruned")
    return ["train", *prepared, f"run.dir={tmp_path / 'run'}"]


def assert_same_adapter(prepared: list[str], adapter: Path) -> None:
    whole = Path(prepared[0]).parent / "whole"
    weights = [(path / "adapter_model.safetensors").read_bytes() for path in (whole, adapter)]
    assert weights[0] == weights[1]
    histories = [json.loads((path / "stage.json").read_text())["metrics"]["history"] for path in (whole, adapter)]
    losses = [[entry["loss"] for entry in history if "loss" in entry] for history in histories]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 10
    assert {path.name for path in adapter.iterdir()} == {path.name for path in whole.iterdir()}
    assert not (adapter / "checkpoints").exists()


@pytest.mark.parametrize("death", DEATHS, ids=lambda name: name.replace(" ", "-"))
def test_a_killed_training_continues_to_the_same_adapter(
    death: str, prepared: list[str], training: list[str], tmp_path: Path
) -> None:
    patch, step = DEATHS[death]
    assert sppctl(training, patch).returncode == -signal.SIGKILL
    assert not (tmp_path / "run" / "adapter").exists()
    done = sppctl(training)
    assert done.returncode == 0, done.stderr
    assert ("continuing from step" in done.stderr) == (step is not None)
    assert step is None or f"continuing from step {step} of 10 (" in done.stderr
    assert_same_adapter(prepared, tmp_path / "run" / "adapter")
    assert not list((tmp_path / "run").glob(".adapter*"))
    complete = death == "complete, not published"
    assert ("adapter: complete since an earlier command, published now" in done.stderr) == complete
    assert ("train: up to date" in done.stderr) == complete


@pytest.mark.parametrize(
    ("number", "name", "code"),
    [(signal.SIGTERM, "SIGTERM", 143), (signal.SIGUSR1, "SIGUSR1", 143), (signal.SIGINT, "Ctrl-C", 130)],
    ids=["SIGTERM", "SIGUSR1", "Ctrl-C"],
)
def test_a_signal_saves_the_next_step_and_the_same_command_continues(
    number: signal.Signals, name: str, code: int, prepared: list[str], training: list[str], tmp_path: Path
) -> None:
    # the signal arrives within step 5, as it does when Slurm sends it: in the first of two micro-batches
    patch = "calls = []\nafter(Accelerator, 'backward', lambda *_: calls.append(1) or len(calls) == 9 and die(%d))"
    stopped = sppctl(training, patch % number)
    assert stopped.returncode == code, stopped.stderr
    assert f"stopped by {name} after step 5 of 10; a checkpoint is written; the same command" in stopped.stderr
    assert ("Ctrl-C again stops at once" in stopped.stderr) == (number == signal.SIGINT)
    assert "requeuing" not in stopped.stderr, "not a job of Slurm"
    checkpoints = tmp_path / "run" / ".adapter.partial" / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"checkpoint-5"}
    done = sppctl(training)
    assert done.returncode == 0, done.stderr
    assert "continuing from step 5 of 10 (" in done.stderr
    assert_same_adapter(prepared, tmp_path / "run" / "adapter")


def test_a_second_ctrl_c_stops_at_once(prepared: list[str], training: list[str], tmp_path: Path) -> None:
    patch = """
calls = []
def twice(*_):
    calls.append(1)
    if len(calls) in (9, 10):  # both micro-batches of step 5
        die(signal.SIGINT)
after(Accelerator, "backward", twice)
"""
    stopped = sppctl(training, patch)
    assert stopped.returncode == 130, stopped.stderr
    assert "interrupted; the same command continues" in stopped.stderr
    checkpoints = tmp_path / "run" / ".adapter.partial" / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"checkpoint-3"}
    assert sppctl(training).returncode == 0
    assert_same_adapter(prepared, tmp_path / "run" / "adapter")


def test_an_attempt_at_something_else_is_not_thrown_away(training: list[str], tmp_path: Path) -> None:
    partial = tmp_path / "run" / ".adapter.partial"
    assert sppctl(training, CUT).returncode == -signal.SIGKILL
    before = set(partial.rglob("*"))
    for more in (["train.lr=1e-3"], ["train.lr=1e-3", "--force"]):
        refused = sppctl([*training, *more])
        assert refused.returncode == 2
        assert (
            f"error: {partial} holds the unfinished work of an attempt with train.lr = 0.01, now 0.001; continue "
            "it with its own settings, keep it by using another run.dir, or discard it with "
            + shlex.join(["sppctl", *training, "train.lr=1e-3", "--no-resume"])
            in refused.stderr
        )
    record = tmp_path / "run" / "pruned" / "stage.json"
    whole = record.read_text()
    record.write_text(json.dumps(sealed.seal(sealed.parse(whole) | {"output": "others"})))
    refused = sppctl(training)
    assert refused.returncode == 2
    assert "attempt with other pruned content" in refused.stderr
    record.write_text(whole)
    assert set(partial.rglob("*")) == before
    other = sppctl([*training, "train.lr=1e-3", "--no-resume"])
    assert other.returncode == 0, other.stderr
    assert "continuing" not in other.stderr


@pytest.mark.parametrize("again", [[], ["--force"]], ids=["without force", "with force"])
def test_a_forced_training_continues_before_it_replaces_what_is_published(
    again: list[str], prepared: list[str], training: list[str], tmp_path: Path
) -> None:
    adapter = tmp_path / "run" / "adapter"
    shutil.copytree(Path(prepared[0]).parent / "whole", adapter)
    record = sealed.parse((adapter / "stage.json").read_text())
    record["settings"]["train"]["lr"], record["fingerprint"] = 1.0, "another"
    (adapter / "stage.json").write_text(json.dumps(sealed.seal(record)))
    assert "--force redoes it" in sppctl(training).stderr
    assert sppctl([*training, "--force"], CUT).returncode == -signal.SIGKILL
    done = sppctl([*training, *again])
    assert done.returncode == 0, done.stderr
    assert "continuing from step 3 of 10 (" in done.stderr
    assert_same_adapter(prepared, adapter)
    if again:
        assert "training: 10/10" in sppctl([*training, "--force"]).stderr, "a finished stage is redone"


@pytest.mark.parametrize("note", ["", "null"], ids=["empty", "something else"])
def test_what_nobody_can_tell_the_settings_of_is_kept_if_it_holds_work(
    note: str, training: list[str], tmp_path: Path
) -> None:
    partial = tmp_path / "run" / ".adapter.partial"
    checkpoint = partial / "checkpoints" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    (checkpoint / "optimizer.pt").touch()
    (partial / "attempt.json").write_text(note)
    refused = sppctl(training)
    assert refused.returncode == 2
    assert "an attempt whose settings are unknown (attempt.json is damaged)" in refused.stderr
    (checkpoint / "optimizer.pt").unlink()  # an empty folder is no work
    done = sppctl(training)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("text", ["{", "{}"])
def test_a_damaged_record_is_named_and_force_redoes_the_stage(text: str, training: list[str], tmp_path: Path) -> None:
    adapter = tmp_path / "run" / "adapter"
    adapter.mkdir()
    (adapter / "stage.json").write_text(text)
    refused = sppctl(training)
    assert refused.returncode == 2
    assert f"error: {adapter}/stage.json is damaged" in refused.stderr
    assert f"{shlex.join(['sppctl', *training, '--force'])} redoes the stage" in refused.stderr
    done = sppctl([*training, "--force"])
    assert done.returncode == 0, done.stderr
    assert (adapter / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    "patch",
    [
        "from sppctl.model import checkpoint\ncheckpoint.load_model = lambda *_, **__: die(signal.SIGUSR1)",
        "from sppctl.train import loop\nloop.Loop.validate = lambda self: die(signal.SIGUSR1)",
        "cli.options.load_config = lambda *_: die(signal.SIGUSR1)",
    ],
    ids=["loading", "final validation", "start"],
)
def test_a_signal_outside_the_steps_is_no_failure(patch: str, training: list[str]) -> None:
    assert sppctl(training, patch).returncode == 143


def test_a_full_disk_leaves_the_checkpoint_before_intact(
    prepared: list[str], training: list[str], tmp_path: Path
) -> None:
    patch = """
def full(state, path):
    if (path.parents[1] / "checkpoint-3").exists():
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")
before(torch, "save", full)
"""
    stopped = sppctl(training, patch)
    assert stopped.returncode == 1
    (error,) = [line for line in stopped.stderr.splitlines() if line.startswith("error:")]
    assert "checkpoint of step 6 cannot be written" in error
    assert "checkpoint-3 is intact" in error
    assert [path.name for path in (tmp_path / "run/.adapter.partial/checkpoints").iterdir()] == ["checkpoint-3"]
    assert sppctl(training).returncode == 0
    assert_same_adapter(prepared, tmp_path / "run/adapter")
