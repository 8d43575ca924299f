"""Unfinished stages: what they are attempts at, what work they hold, and what that means for the next command."""

from __future__ import annotations

import shutil
from pathlib import Path

from sppctl.config.load import flatten
from sppctl.errors import UserError
from sppctl.files import sealed
from sppctl.files.names import CHECKPOINTS, JOURNAL, NOTE, WORKING
from sppctl.records import Attempt, from_json, to_json

DISCARDING = {"prune": "sppctl prune --force", "train": "sppctl train --no-resume"}


def read(partial: Path) -> Attempt | None:
    """The attempt in a directory; None if there is none, or its note is damaged."""
    try:
        return from_json(Attempt, sealed.parse((partial / NOTE).read_bytes()))
    except (OSError, ValueError):
        return None


def write(partial: Path, attempt: Attempt) -> None:
    """Notes what an attempt is made from."""
    sealed.write(partial / NOTE, to_json(attempt))


def clean(partial: Path) -> None:
    """Removes from a complete stage all that only an unfinished one needs."""
    for name in WORKING:
        if (partial / name).is_dir():
            shutil.rmtree(partial / name)
        else:
            (partial / name).unlink(missing_ok=True)


def holds_work(partial: Path) -> bool:
    """Whether an attempt has anything that another start would have to do again: a checkpoint, a finished block."""
    journal = partial / JOURNAL
    return any(partial.glob(f"{CHECKPOINTS}/checkpoint-*/*")) or (journal.is_file() and b"\n" in journal.read_bytes())


def check(partial: Path, stage: str, attempt: Attempt, *, inputs_known: bool = True) -> None:
    """Raises UserError if the attempt in a directory holds work that another attempt cannot continue.

    Args:
        partial: the directory.
        stage: prune, train or merge.
        attempt: what would be made.
        inputs_known: whether its inputs count.
    """
    if not holds_work(partial):
        return
    before = read(partial)
    if before is None:
        whose = f"whose settings are unknown ({NOTE} is damaged)"
    else:
        if not inputs_known:
            attempt = Attempt(attempt.settings, before.inputs)
        if before == attempt.as_in(before):
            return
        whose = f"with {differences(before, attempt)}"
    raise UserError(
        f"{partial} holds the unfinished work of an attempt {whose}; its own settings continue it, another run.dir "
        f"keeps it, {DISCARDING[stage]} discards it"
    )


def differences(before: Attempt, now: Attempt) -> str:
    """The keys in which what was made differs from what is wanted now, with both values."""
    old, new = flatten(before.settings), flatten(now.as_in(before).settings)
    changed = [f"{key} = {old.get(key)}, now {new.get(key)}" for key in old | new if old.get(key) != new.get(key)]
    changed += [
        f"other {key} content" for key in before.inputs | now.inputs if before.inputs.get(key) != now.inputs.get(key)
    ]
    return "; ".join(changed) or "an older version of sppctl"
