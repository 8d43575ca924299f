"""Training checkpoints: written atomically, verified, and found again to resume from."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from sppctl import console, distributed
from sppctl.errors import SharedError, StageError, UserError, first_line
from sppctl.files import integrity, sealed
from sppctl.files.disk import sync, sync_tree, writing
from sppctl.files.safe_files import hides_full_disk

# next to the checkpoints: the one being written, and the start time of the first attempt
SAVING, BEGAN = "saving", "began"
# in a checkpoint, with the adapter: optimizer, schedule, progress, random state of each process, hashes of all files
OPTIMIZER, SCHEDULER, STATE, RANDOM = "optimizer.pt", "scheduler.pt", "state.json", "rng_state_{}.pth"
HASHES = "files.json"
LATEST = "latest"  # of DeepSpeed: the name of the directory with its part
PREFIX = "checkpoint-"  # of the directories' names, before the step
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md")  # as PEFT writes them


def start_time(checkpoints: Path, resume: bool) -> datetime:
    """When the first attempt started: a chat template that prints the date prints the same one after a resume."""
    path = checkpoints / BEGAN
    with contextlib.suppress(OSError, ValueError):
        if resume:
            return datetime.fromisoformat(path.read_text())
    checkpoints.mkdir(parents=True, exist_ok=True)
    now = datetime.now()
    path.write_text(now.isoformat())
    return now


def save(checkpoints: Path, step: int, write: Callable[[Path], None], keep: int) -> None:
    """Writes a checkpoint to a temporary directory and renames it when complete. All processes must call it.

    ``write`` writes this process's part into a directory. The newest ``keep`` checkpoints are kept, and those with the
    adapter that was the best for one of them.

    Raises:
        StageError: one of the processes cannot write its part; no checkpoint is lost.
    """
    draft, final = checkpoints / SAVING, at_step(checkpoints, step)

    def begin() -> None:
        if distributed.is_main():
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)

    def complete() -> None:
        if distributed.is_main():
            files = integrity.hashes(draft, integrity.listing(draft))
            sealed.write(draft / HASHES, {"checkpoint": final.name, "files": files})
            sync_tree(draft)

    # the processes exchange their problems after each step, so none starts a step before all have finished the last
    problem = _problem(begin) or _problem(lambda: write(draft)) or _problem(complete)
    if problem is not None:
        shutil.rmtree(draft, ignore_errors=True)
        raise SharedError(
            f"the checkpoint of step {step} cannot be written to {checkpoints}: {problem}; {resume_advice(checkpoints)}"
        )
    if distributed.is_main():
        shutil.rmtree(final, ignore_errors=True)
        os.rename(draft, final)
        sync(checkpoints)  # the new name must be on disk before an older checkpoint is removed
        steps = _by_step(checkpoints)
        needed = {best_step(path) for _, path in steps[:keep]}
        for step, older in steps[keep:]:
            if step not in needed:
                shutil.rmtree(older)
    distributed.barrier()


def _problem(write: Callable[[], None]) -> str | None:
    """Runs ``write`` and returns the error of the first process that has one; None if all succeeded."""
    problem = None
    try:
        write()
    except (OSError, RuntimeError, SafetensorError, UserError) as error:
        problem = first_line(error)
        if hides_full_disk(error) and not isinstance(error, OSError):
            problem += " (is the disk full?)"
    return distributed.first_known(problem)


def save_engine(engine: Any, directory: Path) -> None:
    """Writes this process's part of DeepSpeed's checkpoint into a directory. All processes must call it.

    An error in writing is raised only after ``save_checkpoint``, which ends with a barrier: a process that left it
    early would exchange its problem with others that still wait there.
    """
    writer, tag, errors = engine.checkpoint_engine, f"global_step{engine.global_steps}", list[Exception]()
    original = writer.save

    def save(*args: Any, **kwargs: Any) -> None:
        try:
            original(*args, **kwargs)
        except Exception as error:
            errors.append(error)

    writer.save = save
    try:
        engine.save_checkpoint(str(directory), tag, save_latest=False, exclude_frozen_parameters=True)
    finally:
        writer.save = original
    if errors:
        raise errors[0]
    if distributed.is_main():
        (directory / LATEST).write_text(tag)  # which DeepSpeed would write before that barrier


def save_random_state(directory: Path) -> None:
    """Stores the state of this process's random generators."""
    state = {"python": random.getstate(), "cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    torch.save(state, directory / RANDOM.format(distributed.rank()))


def load_random_state(directory: Path) -> None:
    """Restores that state. A new process, or a new kind of device, keeps its freshly seeded generator."""
    path = directory / RANDOM.format(distributed.rank())
    if not path.is_file():
        return
    state = torch.load(path, weights_only=True)
    random.setstate(state["python"])
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def at_step(checkpoints: Path, step: int) -> Path:
    """The checkpoint of an optimizer step."""
    return checkpoints / f"{PREFIX}{step}"


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix(PREFIX))


def best_step(checkpoint: Path) -> int | None:
    """The step with the best adapter when a checkpoint was written; None: there was none, or it is damaged."""
    with contextlib.suppress(OSError, ValueError):
        state = json.loads((checkpoint / STATE).read_text())
        step = state.get("best_step") if isinstance(state, dict) else None
        return step if isinstance(step, int) else None
    return None


def copy_adapter(checkpoint: Path, directory: Path) -> None:
    """Copies the adapter of an intact checkpoint, as PEFT wrote it.

    Raises:
        StageError: the checkpoint is damaged.
    """
    problem = _damage(checkpoint)
    if problem is not None:
        raise StageError(f"the best adapter cannot be read: {checkpoint} is damaged ({problem}); train --no-resume")
    with writing(directory):
        for name in ADAPTER_FILES:
            shutil.copyfile(checkpoint / name, directory / name)


def _by_step(checkpoints: Path) -> list[tuple[int, Path]]:
    """Steps and directories, the newest first."""
    named = [(path.name.removeprefix(PREFIX), path) for path in checkpoints.glob(f"{PREFIX}*")]
    return sorted(((int(step), path) for step, path in named if step.isdigit() and path.is_dir()), reverse=True)


def newest(checkpoints: Path, strategy: str | None) -> Path | None:
    """The newest intact checkpoint; None if there are no checkpoints. Newer, damaged ones are renamed, with a warning.

    Raises:
        UserError: all are damaged, or it was written under a strategy that this one cannot resume from.
    """
    damaged: dict[Path, str] = {}
    for _, path in _by_step(checkpoints):
        if not any(path.iterdir()):
            path.rmdir()
            continue
        problem = _damage(path)
        if problem is None:
            demand_files(path, strategy)
            for broken, reason in damaged.items():
                renamed = broken.rename(broken.with_name(f"damaged-{broken.name}-{time.time_ns()}"))
                console.warn(
                    f"{broken} is damaged ({reason}) and was renamed to {renamed.name}; continuing from {path.name}"
                )
            return path
        damaged[path] = problem
    if damaged:
        path, reason = next(iter(damaged.items()))
        run = checkpoints.parents[1]
        raise UserError(
            f"no checkpoint in {checkpoints} is intact: {path.name} is damaged ({reason}); restore it, or start "
            f"again, which discards all checkpoints ({console.command('train', '--no-resume', run=run)})"
        )
    return None


def resume_advice(checkpoints: Path) -> str:
    """How to continue after an error: from the newest checkpoint, if there is one."""
    for _, path in _by_step(checkpoints):
        return f"{path} is intact: the same command continues from there"
    return "there is no checkpoint yet"


def _damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint; None if they are intact."""
    try:
        record = sealed.parse((checkpoint / HASHES).read_bytes())
    except (OSError, ValueError) as error:
        return f"{HASHES}: {getattr(error, 'strerror', error)}"
    if record["checkpoint"] != checkpoint.name:
        return f"{HASHES} belongs to {record['checkpoint']}"
    states, wrong = integrity.compare(checkpoint, record["files"]), (integrity.DAMAGED, integrity.MISSING)
    if problems := [f"{name} is {state}" for name, state in states.items() if state in wrong]:
        return ", ".join(problems)
    best = best_step(checkpoint)
    if best is None or best >= step_of(checkpoint):
        return None
    problem = _damage(best_one := at_step(checkpoint.parent, best))
    return None if problem is None else f"{best_one.name}, which holds the best adapter, is damaged: {problem}"


def demand_files(checkpoint: Path, strategy: str | None) -> None:
    """Raises UserError if a checkpoint cannot be resumed from under a strategy, by as many processes as there are."""
    is_deepspeed, processes = any(checkpoint.glob("global_step*")), len(list(checkpoint.glob(RANDOM.format("*"))))
    needed = [LATEST] if strategy == "zero3" else [OPTIMIZER, SCHEDULER, "adapter_model.safetensors"]
    missing = [name for name in [*needed, STATE] if not (checkpoint / name).is_file()]
    if not missing and (strategy != "zero3" or is_deepspeed):
        if strategy == "zero3" and processes != distributed.world_size():
            raise UserError(
                f"{checkpoint} was written by {processes} processes under launch.strategy=zero3, and "
                f"{distributed.world_size()} cannot read it; resume with {processes} (launch.num_processes), or start "
                "again (--no-resume)"
            )
        return
    writer = f"launch.strategy=zero3 (processes: {processes})" if is_deepspeed else "ddp or fsdp"
    reason = f": it was written under {writer}" if is_deepspeed != (strategy == "zero3") else ""
    raise UserError(
        f"{checkpoint} lacks {', '.join(missing) or 'global_step*'}, which training under {strategy or 'one process'} "
        f"continues from{reason}; resume with the original strategy, remove this checkpoint, or start again "
        "(--no-resume)"
    )
