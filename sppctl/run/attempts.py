"""Unfinished stages: what they are attempts at, what work they hold, and in what another attempt differs."""

from __future__ import annotations

import shutil
from pathlib import Path

from sppctl.config.load import flatten, result_keys
from sppctl.config.settings import Config
from sppctl.files import sealed
from sppctl.files.names import CHECKPOINTS, JOURNAL, NOTE, WORKING
from sppctl.records import Attempt, Settings, from_json, to_json


def settings_of(config: Config, stage: str) -> Settings:
    """The configuration that the result of a stage depends on."""
    settings = {stage: result_keys(getattr(config, stage))}
    if stage == "merge":
        return settings
    model = result_keys(config.model)
    if stage == "train":  # which starts from what pruning made of all other keys
        model = {"compute_dtype": model["compute_dtype"]}
    return {"seed": config.run.seed, "model": model} | settings


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


def differences(before: Attempt, settings: Settings, inputs: dict[str, str] | None = None) -> str:
    """The keys in which an attempt, finished or not, differs from one made now, with both values; empty if in none.

    ``inputs`` is None where those of now are not known yet, and taken for the same.
    """
    now = Attempt(settings, before.inputs if inputs is None else inputs).as_in(before)
    if now == before:
        return ""
    old, new = flatten(before.settings), flatten(now.settings)
    changed = [f"{key} = {old.get(key)}, now {new.get(key)}" for key in old | new if old.get(key) != new.get(key)]
    contents = before.inputs | now.inputs
    changed += [f"other {key} content" for key in contents if before.inputs.get(key) != now.inputs.get(key)]
    return "; ".join(changed) or "an older version of sppctl"
