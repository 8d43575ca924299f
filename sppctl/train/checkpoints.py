"""Checkpoints of a training that was interrupted: which are as they were written, and which it continues from."""

from __future__ import annotations

import contextlib
import time
from datetime import datetime
from pathlib import Path

from sppctl import console
from sppctl.errors import UserError
from sppctl.files import integrity, sealed

OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"  # the Trainer's own names
BEGAN = "began"  # beside the checkpoints: when the first of them was begun
HASHES = "files.json"  # in a checkpoint: what its files are


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


def seal(checkpoint: Path) -> None:
    """Records what the files of a checkpoint are, once all processes have written theirs.

    Raises:
        OSError: it cannot be written.
        UserError: a file cannot be read.
    """
    files = integrity.hashes(checkpoint, integrity.listing(checkpoint))
    sealed.write(checkpoint / HASHES, {"checkpoint": checkpoint.name, "files": files})


def newest(checkpoints: Path, strategy: str | None) -> str | None:
    """The newest checkpoint that is intact; None if there is none at all. Damaged ones are renamed, with a warning.

    Args:
        checkpoints: the folder that holds them.
        strategy: under which the training continues.

    Raises:
        UserError: all are damaged, or it was written under a strategy that this one cannot continue from.
    """
    steps = {path: path.name.removeprefix("checkpoint-") for path in checkpoints.glob("checkpoint-*") if path.is_dir()}
    damaged: dict[Path, str] = {}
    for path in sorted((path for path, step in steps.items() if step.isdigit()), key=lambda path: -int(steps[path])):
        if not any(path.iterdir()):
            path.rmdir()
            continue
        problem = _damage(path)
        if problem is None:
            demand_files(path, strategy)
            for other, reason in damaged.items():
                aside = other.rename(other.with_name(f"damaged-{other.name}-{time.time_ns()}"))
                console.warn(f"{other} is damaged ({reason}) and now called {aside.name}; continuing from {path.name}")
            return str(path)
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
    steps = [path.name.removeprefix("checkpoint-") for path in checkpoints.glob("checkpoint-*")]
    last = max((int(step) for step in steps if step.isdigit()), default=None)
    if last is None:
        return "there is no checkpoint yet"
    return f"{checkpoints / f'checkpoint-{last}'} is intact: the same command continues from there"


def _damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint; None: nothing."""
    try:
        record = sealed.parse((checkpoint / HASHES).read_bytes())
    except OSError as error:
        return f"{HASHES}: {error.strerror}"
    except ValueError as error:
        return f"{HASHES}: {error}"
    if record["checkpoint"] != checkpoint.name:
        return f"{HASHES} is that of {record['checkpoint']}"
    found = integrity.compare(checkpoint, record["files"])
    wrong = [f"{name} is {state}" for name, state in found.items() if state in (integrity.DAMAGED, integrity.MISSING)]
    return ", ".join(wrong) or None


def demand_files(checkpoint: Path, strategy: str | None) -> None:
    """Raises UserError if a checkpoint lacks what a training under a strategy continues from.

    The Trainer would do without, with an optimizer and a schedule that start anew.
    """
    of_deepspeed = any(checkpoint.glob("global_step*"))
    wanted = ["latest"] if strategy == "zero3" else [OPTIMIZER, SCHEDULER, "adapter_model.safetensors"]
    missing = [name for name in [*wanted, "trainer_state.json"] if not (checkpoint / name).is_file()]
    if not missing and (strategy != "zero3" or of_deepspeed):
        return
    other = "launch.strategy=zero3" if of_deepspeed else "ddp or fsdp"
    reason = f": it was written under {other}" if of_deepspeed != (strategy == "zero3") else ""
    raise UserError(
        f"{checkpoint} lacks {', '.join(missing) or 'global_step*'}, which training under {strategy or 'one process'} "
        f"continues from{reason}; resume with the original strategy, remove this checkpoint, or start again "
        "(--no-resume)"
    )
