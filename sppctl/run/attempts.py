"""Unfinished stages: what they are attempts at, what work they hold, and what that means for the next command."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from sppctl.config.load import flatten
from sppctl.errors import UserError
from sppctl.files import sealed
from sppctl.files.names import CHECKPOINTS, JOURNAL, NOTE, WORKING

DISCARDING = {"prune": "sppctl prune --force", "train": "sppctl train --no-resume"}


def read(partial: Path) -> dict[str, Any] | None:
    """Settings and inputs of the attempt in a directory; empty if that cannot be told, None if there is no attempt."""
    if not partial.is_dir():
        return None
    try:
        return sealed.parse((partial / NOTE).read_bytes())
    except (OSError, ValueError):
        return {}


def write(partial: Path, settings: dict[str, Any], inputs: dict[str, Any]) -> None:
    """Notes what an attempt is made from."""
    sealed.write(partial / NOTE, {"settings": settings, "inputs": inputs})


def clean(partial: Path) -> None:
    """Removes from a complete stage all that only an unfinished one needs."""
    for name in WORKING:
        if (partial / name).is_dir():
            shutil.rmtree(partial / name)
        else:
            (partial / name).unlink(missing_ok=True)


def settled(settings: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """The settings as a record or an attempt has them where they leave the choice: auto computes in its dtype."""
    model, recorded = settings.get("model", {}), before["settings"].get("model", {})
    if model.get("compute_dtype") != "auto" or "compute_dtype" not in recorded:
        return settings
    return resolved(settings, recorded["compute_dtype"])


def resolved(settings: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The settings with the dtype that is computed in instead of auto."""
    return settings | {"model": settings["model"] | {"compute_dtype": dtype}}


def holds_work(partial: Path) -> bool:
    """Whether an attempt has anything that another start would have to do again: a checkpoint, a finished block."""
    journal = partial / JOURNAL
    return any(partial.glob(f"{CHECKPOINTS}/checkpoint-*/*")) or (journal.is_file() and b"\n" in journal.read_bytes())


def check(partial: Path, stage: str, settings: dict[str, Any], inputs: dict[str, Any] | None) -> None:
    """Raises UserError if the attempt in a directory holds work that these settings and inputs cannot continue.

    Args:
        partial: the directory.
        stage: prune, train or merge.
        settings: the configuration that the stage depends on.
        inputs: fingerprints of what it reads; None: not known yet.
    """
    attempt = read(partial)
    if attempt is None or not holds_work(partial):
        return
    if not attempt:
        said = f"that nobody can tell the settings of ({NOTE} is damaged)"
    elif attempt["settings"] != settled(settings, attempt) or inputs not in (None, attempt["inputs"]):
        said = f"with {differences(attempt, settings, attempt['inputs'] if inputs is None else inputs)}"
    else:
        return
    raise UserError(
        f"{partial} holds the unfinished work of an attempt {said}; its own settings continue it, another run.dir "
        f"keeps it, {DISCARDING[stage]} discards it"
    )


def differences(before: dict[str, Any], settings: dict[str, Any], inputs: dict[str, Any]) -> str:
    """The keys in which a record differs from what is wanted now, with both values."""
    old, new = flatten(before["settings"]), flatten(settled(settings, before))
    changed = [f"{key} = {old.get(key)}, now {new.get(key)}" for key in old | new if old.get(key) != new.get(key)]
    changed += [
        f"other {key} content" for key in before["inputs"] | inputs if before["inputs"].get(key) != inputs.get(key)
    ]
    return "; ".join(changed) or "an older version of sppctl"
