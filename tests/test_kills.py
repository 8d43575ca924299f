"""Every stage, killed at every change of a file: the same command then ends with what an uninterrupted one makes.

Between two changes the disk stays as it is, so these are all moments at which a death can differ: before each file is
opened to be written, renamed, removed or cut, before each folder is made or removed, before and after each write of a
tensor, ``save_file``, ``torch.save`` and fsync; and, where anything was just written, once more with half of it.
``SPPCTL_KILLS=all`` tries all of them, else some are tried.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from processes import Ended, Process

from sppctl.config.load import flatten
from sppctl.evaluate import stage as evaluate  # noqa: F401  (forked with its imports)
from sppctl.files.names import LOG
from sppctl.merge import stage as merge  # noqa: F401  (forked with its imports)
from sppctl.prune import stage as prune  # noqa: F401  (forked with its imports)
from sppctl.report import plots_results  # noqa: F401  (forked with its imports)
from sppctl.train import stage as train  # noqa: F401  (forked with its imports)

# AT: at which change the process dies (-1: never); HALF: with half of what was written last; COUNT: file that lists all
# changes, marked where there is such a half
DYING = """
import os, signal, sys
import safetensors.torch, peft.peft_model, transformers.modeling_utils, torch
from sppctl.files.safe_files import OwnFile

AT, HALF, FOLDER, COUNT = {at}, {half}, {folder!r}, {count!r}
seen, inside, opened = 0, False, ("", 0)

def written():
    return os.path.isfile(opened[0]) and os.path.getsize(opened[0]) > opened[1]

def tear_opened():
    path, before = opened
    if written():
        os.truncate(path, (before + os.path.getsize(path)) // 2)

def change(what, path, tear=tear_opened):
    global seen, inside
    path = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
    if inside or not path.startswith(FOLDER):
        return
    inside = True
    if COUNT:
        with open(COUNT, "a") as file:
            torn = tear and (tear is not tear_opened or written())
            file.write(("half " if torn else "whole ") + what + " " + path[len(FOLDER):] + chr(10))
    if seen == AT:
        if HALF and tear:
            tear()
        os.kill(os.getpid(), signal.SIGKILL)
    seen, inside = seen + 1, False

def hook(event, args):
    global opened
    if event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        change("open", args[0])
        if not inside and isinstance(args[0], (str, bytes, os.PathLike)):
            kept = os.path.isfile(args[0]) and not args[2] & os.O_TRUNC
            opened = os.fsdecode(args[0]), os.path.getsize(args[0]) if kept else 0
    elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"):
        change(event, args[0])

def around(owner, name, place, tear_before=None, tear_after=None):
    original = getattr(owner, name)
    def wrapped(*args, **kwargs):
        path = place(*args)
        change("before " + name, path, tear_before and (lambda: tear_before(*args)))
        result = original(*args, **kwargs)
        change("after " + name, path, tear_after and (lambda: tear_after(path)))
        return result
    setattr(owner, name, wrapped)

def half_a_tensor(file, name, tensor):
    data = tensor.detach().to("cpu", file.specs[name].dtype).contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    with open(file.path, "r+b") as opened:
        opened.seek(file.specs[name].start)
        opened.write(data[: len(data) // 2])

def half_a_file(path):
    os.truncate(path, os.path.getsize(path) // 2)

around(OwnFile, "write", lambda file, *_: file.path, half_a_tensor)
around(os, "fsync", lambda descriptor: os.readlink(f"/proc/self/fd/{{descriptor}}"))
around(torch, "save", lambda value, path, **_: path, None, half_a_file)
for library in (safetensors.torch, peft.peft_model, transformers.modeling_utils):
    name = next(name for name in ("safe_save_file", "save_file") if hasattr(library, name))
    around(library, name, lambda tensors, path, *_, **__: path, None, half_a_file)
sys.addaudithook(hook)
"""
BASE = """
import sys
from transformers import AutoModelForCausalLM
from sppctl.config.load import load_config
from sppctl.model import checkpoint
from sppctl.run import dense
from sppctl.run.directory import Run

# what is read from a GGUF file is not what is tried here
checkpoint.convert_gguf = lambda source, *_: AutoModelForCausalLM.from_pretrained(source).save_pretrained(_[-1])
def base(config, *overrides):
    run = Run(load_config(config, overrides))
    with run.lock():
        dense.base(run)
from sppctl import cli
cli.app = lambda: base(*sys.argv[2:])
"""
STAGES = ("base", "prune", "train", "merge", "eval", "report")
PASSING = re.compile(r".*seconds|wall_time_s|created|command|peak_memory_mb|.*_per_second|.*_runtime")
MOMENTS = 7  # at which each stage is killed


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory, write_config: Callable[..., Path], llama: Path) -> list[str]:
    """A configuration whose stages take a few tenths of a second."""
    folder = tmp_path_factory.mktemp("kills")
    shutil.copytree(llama, folder / "llama")
    (folder / "llama" / "tiny.gguf").write_text("not read")
    options = (
        *(f"model.path={folder / 'llama'}", "prune.calibration.samples=2", "prune.calibration.seq_len=32"),
        *("train.data.seq_len=64", "train.data.max_rows=10", "train.data.val_size=2", "train.micro_batch_size=4"),
        *("train.save_steps=1", "train.keep_checkpoints=1", "train.report_to=[]", "train.lr=4e-3"),
        *("eval.seq_len=32", "eval.max_tokens=128", "eval.tasks=[]"),
    )
    return [str(write_config(folder / "tiny.yaml", *options))]


class Stage:
    """A stage from the same start as often as wanted, always in the same folders, which records name."""

    def __init__(self, name: str, start: Path, folder: Path, arguments: list[str]) -> None:
        self.name, self.start, self.folder, self.arguments = name, start, folder, arguments
        self._fresh()
        count = start.with_name(f"{name}.changes")
        done = self._call(count=str(count))
        assert done.returncode == 0, done.stderr
        lines = [line.partition(" ") for line in count.read_text().splitlines()]
        self.changes = [change for _, _, change in lines]  # of files below the run directory and the cache
        self.torn = [at for at, (state, _, _) in enumerate(lines) if state == "half"]  # half written
        self.expected = content(folder)  # what is there if nothing interrupts it

    def _fresh(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.start, self.folder)

    def _call(
        self, patch: str = "", at: int = -1, half: bool = False, count: str = "", more: Sequence[str] = ()
    ) -> Ended:
        if at >= 0 or count:
            patch = DYING.format(at=at, half=half, folder=str(self.folder), count=count)
        run = self.folder / "run"
        arguments = [str(run)] if self.name == "report" else [*self.arguments, f"run.dir={run}"]
        if self.name == "eval":
            arguments += ["--model=base", "--model=pruned"]
        if self.name == "base":
            arguments.append("model.gguf_file=tiny.gguf")
            patch += BASE
        return Process([self.name, *arguments, *more], patch, {"SPPCTL_CACHE": str(self.folder / "cache")}).wait()

    def moments(self) -> list[tuple[int, bool]]:
        """At which changes to kill it, and whether the last file has half of its bytes then."""
        every = len(self.changes)
        if os.environ.get("SPPCTL_KILLS") == "all":
            return [(at, False) for at in range(every)] + [(at, True) for at in self.torn]
        moments = [(at * every // MOMENTS, at % 2 > 0) for at in range(MOMENTS)]
        if self.name == "train":  # all from the moment that its work is done, which is alike in all stages
            done = next(at for at, change in enumerate(self.changes) if "/.stage.json" in change)
            moments += [(at, False) for at in range(done, every)]
            card = next(at for at, change in enumerate(self.changes) if change.endswith(".adapter.partial/README.md"))
            moments.append((card + 1, True))  # which PEFT continues instead of writing it anew
        return moments

    def kill(self, at: int, half: bool) -> str | None:
        """What is wrong after a death at a change and the same command once more."""
        where = f"{self.name} at {at} of {len(self.changes)} ({self.changes[at]}{', half' * half})"
        self._fresh()
        died = self._call(at=at, half=half)
        if died.returncode != -signal.SIGKILL:
            return f"{where}: ended with {died.returncode}: {died.stderr[-300:]}"
        return self._continue(where)

    def _continue(self, where: str) -> str | None:
        done = self._call()
        if done.returncode:
            return f"{where}: {done.stderr[-300:]}"
        found = content(self.folder)
        wrong = {name for name in found | self.expected if found.get(name, 0) != self.expected.get(name, 0)}
        said = [
            f"{name}: {self.expected.get(name, 'not there')}, now {found.get(name, 'gone')}" for name in sorted(wrong)
        ]
        return "\n".join([f"{where}:", *said]) if said else None

    def fill(self, limit: int, more: Sequence[str]) -> tuple[Ended, dict[str, Any], str | None]:
        """The command where no file may exceed ``limit`` bytes: its end, what it left, and what is wrong later."""
        self._fresh()
        ended = self._call(
            f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n", more=more
        )
        return ended, content(self.folder), self._continue("after a full disk")


def lasting(value: Any) -> Any:
    """A record without what differs between two runs of the same."""
    if isinstance(value, dict):
        return {key: lasting(inner) for key, inner in value.items() if not PASSING.fullmatch(key)}
    return [lasting(inner) for inner in value] if isinstance(value, list) else value


def content(folder: Path) -> dict[str, Any]:
    """What is below a folder, by path: of a record what lasts, by its keys; else a hash, of cards without times."""
    found: dict[str, Any] = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.name == LOG:  # of all attempts, with times
            continue
        if path.is_dir():
            found[name] = "a folder"
        elif path.suffix == ".json":
            record = json.loads(path.read_text())
            record.pop("digest", None)  # of all of it, times too
            kept = flatten(lasting(record))
            found |= {name: sorted(kept)} | {f"{name} {key}": value for key, value in kept.items()}
        else:
            own = path.read_bytes()
            own = re.sub(rb"\d[\d.,:T+-]*", b"", own) if path.name == "README.md" else own  # with times and memory
            found[name] = hashlib.sha256(own).hexdigest()
    return found


@pytest.fixture(scope="module")
def stages(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stage]:
    """Every stage, after the ones before it."""
    root = tmp_path_factory.mktemp("stages")
    folder, start = root / "work", root / "nothing"
    start.mkdir()
    made = {}
    for name in STAGES:
        made[name] = Stage(name, start, folder, arguments)
        if name != "base":
            start = shutil.copytree(folder, root / f"after {name}")
    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_killed_at_any_change_of_a_file_the_same_command_makes_the_same(name: str, stages: dict[str, Stage]) -> None:
    stage = stages[name]
    moments = stage.moments()
    print(f"{name}: killed at {len(moments)} of {len(stage.changes) + len(stage.torn)} moments")
    wrong = [said for said in (stage.kill(*moment) for moment in moments) if said]
    assert not wrong, "\n".join(wrong)


COPY = r"model\.safetensors cannot be written: .* \(\d\d\d,\d+ bytes needed, [\d,]+ bytes free\).*output was deleted"
# the size from which a file is too large, further arguments, and the error
FULL: dict[str, tuple[int, tuple[str, ...], str]] = {
    "base": (50_000, (), r"\.base\.partial cannot be written: .* \([\d,]+ bytes free\)"),
    "prune": (50_000, (), COPY),
    "train": (8_000, (), r"checkpoint of step 1 cannot be written to .*there is no checkpoint yet"),
    "merge": (50_000, (), COPY),
    "eval": (1_000, ("eval.divergence=null",), r"base\.json cannot be written: .* free\); .*earlier results are kept"),
    "report": (3_000, (), r"report\.\w+ cannot be written: .* \([\d,]+ bytes needed, .* free\)"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_a_full_disk_is_named_and_leaves_nothing_that_nobody_continues(name: str, stages: dict[str, Stage]) -> None:
    ended, left, later = stages[name].fill(*FULL[name][:2])
    assert ended.returncode == 1
    (error,) = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
    assert re.search(FULL[name][2], error)
    assert not [path for path in left if "partial" in path]
    assert not later
