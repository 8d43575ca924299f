"""Attempts: the settings and inputs of unfinished stages, their work, and how two attempts differ."""

from __future__ import annotations

import shutil
from pathlib import Path

from sppctl.config.load import config_keys, flatten, result_keys, to_dict
from sppctl.config.recorded import completed
from sppctl.config.settings import Config
from sppctl.config.yaml12 import inline
from sppctl.files import sealed
from sppctl.files.names import CHECKPOINTS, JOURNAL, NOTE, WORKING
from sppctl.records import Attempt, Settings, from_json, to_json


def settings_of(config: Config, stage: str) -> Settings:
    """The configuration that the result of a stage depends on."""
    settings = {stage: to_dict(getattr(config, stage), results_only=True, recorded=True)}
    if stage == "merge":
        return settings
    model = result_keys(config.model)
    if stage == "train":  # the other keys of the model take effect in pruning
        model = {"compute_dtype": model["compute_dtype"]}
        if config.train.keep_best == "perplexity":  # which otherwise only reports it
            settings["train"]["perplexity_steps"] = config.train.perplexity_steps
            settings["eval"] = {
                "perplexity": config.eval.perplexity[:1],
                "seq_len": config.eval.seq_len,
                "max_tokens": config.eval.max_tokens,
            }
    return {"seed": config.run.seed, "model": model} | settings


def read(partial: Path) -> Attempt | None:
    """The attempt noted in a directory; None if there is no note, or it is damaged."""
    try:
        return from_json(Attempt, sealed.parse((partial / NOTE).read_bytes()))
    except (OSError, ValueError):
        return None


def write(partial: Path, attempt: Attempt) -> None:
    """Writes the note of an attempt."""
    sealed.write(partial / NOTE, to_json(attempt))


def clean(partial: Path) -> None:
    """Removes from a complete stage the files that only an unfinished one needs."""
    for name in WORKING:
        if (partial / name).is_dir():
            shutil.rmtree(partial / name)
        else:
            (partial / name).unlink(missing_ok=True)


def holds_work(partial: Path) -> bool:
    """Whether an attempt has finished work: a training checkpoint or a pruned block."""
    journal = partial / JOURNAL
    return any(partial.glob(f"{CHECKPOINTS}/checkpoint-*/*")) or (journal.is_file() and b"\n" in journal.read_bytes())


def differences(before: Attempt, settings: Settings, inputs: dict[str, str] | None = None) -> str:
    """The keys in which an attempt, finished or not, differs from a new one, with both values; empty if it does not.

    ``inputs`` of the new attempt; None: not known yet, and assumed to be unchanged.
    """
    current = Attempt(settings, before.inputs if inputs is None else inputs).as_in(before)
    if current == before:
        return ""
    keys = config_keys()
    old, new = (flatten(completed(attempt.settings), keys=keys) for attempt in (before, current))
    changed = [
        f"{key} = {inline(old.get(key))}, now {inline(new.get(key))}"
        for key in old | new
        if old.get(key) != new.get(key)
    ]
    names = before.inputs | current.inputs
    if changed:  # they explain why one attempt has inputs that the other has not
        names = {name: before.inputs[name] for name in before.inputs.keys() & current.inputs.keys()}
    changed += [f"other {name} content" for name in names if before.inputs.get(name) != current.inputs.get(name)]
    return "; ".join(changed) or "an older version of sppctl"
