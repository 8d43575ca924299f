"""Checkpoints of a training: written so that they are whole or absent, and which of them an interrupted one resumes."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import torch
from safetensors import SafetensorError

from sppctl import console, distributed
from sppctl.errors import SharedError, UserError, first_line
from sppctl.files import integrity, sealed
from sppctl.files.disk import sync, sync_tree
from sppctl.files.safe_files import hides_full_disk

# beside the checkpoints: the one that is being written, and when the first of them was begun
SAVING, BEGAN = "saving", "began"
# in a checkpoint, with the adapter: steps, tokens and history; random generators of each process; hashes of all files
OPTIMIZER, SCHEDULER, STATE, RANDOM = "optimizer.pt", "scheduler.pt", "state.json", "rng_state_{}.pth"
HASHES = "files.json"


def began(checkpoints: Path, resume: bool) -> datetime:
    """When the attempt began: a chat template that prints the date prints the same one when training is resumed."""
    note = checkpoints / BEGAN
    with contextlib.suppress(OSError, ValueError):
        if resume:
            return datetime.fromisoformat(note.read_text())
    checkpoints.mkdir(parents=True, exist_ok=True)
    now = datetime.now()
    note.write_text(now.isoformat())
    return now


def save(checkpoints: Path, step: int, write: Callable[[Path], None], keep: int) -> None:
    """Writes a checkpoint aside, and names it once all processes have their parts of it on the disk. All must call it.

    ``write`` puts this process's part into a directory; of all checkpoints the newest ``keep`` stay.

    Raises:
        StageError: one of the processes cannot write its part; no checkpoint is lost.
    """
    draft, final = checkpoints / SAVING, checkpoints / f"checkpoint-{step}"

    def begin() -> None:
        if distributed.is_main():
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)

    def complete() -> None:
        if distributed.is_main():
            files = integrity.hashes(draft, integrity.listing(draft))
            sealed.write(draft / HASHES, {"checkpoint": final.name, "files": files})
            sync_tree(draft)

    # none begins before all have ended what comes before it, because each asks the others for their problems
    problem = _problem(begin) or _problem(lambda: write(draft)) or _problem(complete)
    if problem is not None:
        shutil.rmtree(draft, ignore_errors=True)
        raise SharedError(
            f"the checkpoint of step {step} cannot be written to {checkpoints}: {problem}; {rest(checkpoints)}"
        )
    if distributed.is_main():
        shutil.rmtree(final, ignore_errors=True)
        os.rename(draft, final)
        sync(checkpoints)  # the name is on the disk before an older checkpoint goes
        for _, older in _by_step(checkpoints)[keep:]:
            shutil.rmtree(older)
    distributed.barrier()


def _problem(write: Callable[[], None]) -> str | None:
    """Why this process, or the first of the others, cannot write its part of a checkpoint; None: all have."""
    problem = None
    try:
        write()
    except (OSError, RuntimeError, SafetensorError, UserError) as error:
        problem = first_line(error)
        if hides_full_disk(error) and not isinstance(error, OSError):
            problem += " (is the disk full?)"
    return distributed.first_known(problem)


def save_random_state(directory: Path) -> None:
    """Stores the state of this process's random generators."""
    state = {"python": random.getstate(), "cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    torch.save(state, directory / RANDOM.format(distributed.rank()))


def load_random_state(directory: Path) -> None:
    """Takes up that state; a process that did not exist then, or on another kind of device, draws new numbers."""
    path = directory / RANDOM.format(distributed.rank())
    if not path.is_file():
        return
    state = torch.load(path, weights_only=True)
    random.setstate(state["python"])
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def _by_step(checkpoints: Path) -> list[tuple[int, Path]]:
    """Steps and directories, the newest first."""
    named = [(path.name.removeprefix("checkpoint-"), path) for path in checkpoints.glob("checkpoint-*")]
    return sorted(((int(step), path) for step, path in named if step.isdigit() and path.is_dir()), reverse=True)


def newest(checkpoints: Path, strategy: str | None) -> Path | None:
    """The newest checkpoint that is intact; None if there is none at all. Damaged ones are renamed, with a warning.

    Raises:
        UserError: all are damaged, or it was written under a strategy that this one cannot continue from.
    """
    damaged: dict[Path, str] = {}
    for _, path in _by_step(checkpoints):
        if not any(path.iterdir()):
            path.rmdir()
            continue
        problem = _damage(path)
        if problem is None:
            demand_files(path, strategy)
            for other, reason in damaged.items():
                aside = other.rename(other.with_name(f"damaged-{other.name}-{time.time_ns()}"))
                console.warn(f"{other} is damaged ({reason}) and now called {aside.name}; continuing from {path.name}")
            return path
        damaged[path] = problem
    if damaged:
        path, reason = next(iter(damaged.items()))
        raise UserError(
            f"no checkpoint in {checkpoints} is intact: {path.name} is damaged ({reason}); restore it, or start the "
            "training again, which discards them (sppctl train --no-resume)"
        )
    return None


def rest(checkpoints: Path) -> str:
    """What an error leaves: the newest checkpoint."""
    for _, path in _by_step(checkpoints):
        return f"{path} is intact: the same command continues from there"
    return "there is no checkpoint yet"


def _damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint; None: nothing."""
    try:
        record = sealed.parse((checkpoint / HASHES).read_bytes())
    except (OSError, ValueError) as error:
        return f"{HASHES}: {getattr(error, 'strerror', error)}"
    if record["checkpoint"] != checkpoint.name:
        return f"{HASHES} is that of {record['checkpoint']}"
    states, wrong = integrity.compare(checkpoint, record["files"]), (integrity.DAMAGED, integrity.MISSING)
    return ", ".join(f"{name} is {state}" for name, state in states.items() if state in wrong) or None


def demand_files(checkpoint: Path, strategy: str | None) -> None:
    """Raises UserError if a checkpoint lacks what a training under a strategy continues from."""
    of_deepspeed = any(checkpoint.glob("global_step*"))
    needed = ["latest"] if strategy == "zero3" else [OPTIMIZER, SCHEDULER, "adapter_model.safetensors"]
    missing = [name for name in [*needed, STATE] if not (checkpoint / name).is_file()]
    if not missing and (strategy != "zero3" or of_deepspeed):
        return
    other = "launch.strategy=zero3" if of_deepspeed else "ddp or fsdp"
    reason = f": it was written under {other}" if of_deepspeed != (strategy == "zero3") else ""
    raise UserError(
        f"{checkpoint} lacks {', '.join(missing) or 'global_step*'}, which training under {strategy or 'one process'} "
        f"continues from{reason}; resume with the original strategy, remove this checkpoint, or start again "
        "(--no-resume)"
    )
