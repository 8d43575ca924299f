"""The configuration of a run directory: what its stages recorded, and resolved.yaml for all else.

resolved.yaml is that of the last command, which may have configured a finished stage differently; the records have the
settings that the stages were made with. They leave out the keys that cannot change a result.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sppctl.config.settings import Config
from sppctl.config.yaml12 import read_yaml
from sppctl.files import sealed
from sppctl.files.names import DIRECTORIES, NOTE, RECORD, RESOLVED

Tree = dict[str, Any]  # sections of a configuration as plain data


def is_run(directory: Path) -> bool:
    """Whether a directory is that of a run: it has its configuration, or the record of a stage.

    A checkpoint is none, whatever else is in it: it may come from anybody.
    """
    if (directory / "config.json").is_file():
        return False
    files = (directory / RESOLVED, *(directory / name / RECORD for name in DIRECTORIES.values()))
    return any(file.is_file() for file in files)


def tree_of(directory: Path) -> dict[Any, Any]:
    """The sections of a run's configuration, whose run.dir is the directory as it was written.

    A damaged record is skipped: the stage reports it, with a fix, when it is used.
    """
    path = directory / RESOLVED
    content = read_yaml(path) if path.is_file() else None
    tree: dict[Any, Any] = content if isinstance(content, dict) else {}
    stages = merged(
        _settings(directory / name / RECORD) or _settings(directory / f".{name}.partial" / NOTE)
        for name in DIRECTORIES.values()
    )
    if isinstance(stages.get("model"), dict):
        stages["model"].pop("compute_dtype", None)  # the dtype computed in, in place of auto
    settings, recorded = tree.get("eval"), stages.get("eval")
    if isinstance(settings, dict) and isinstance(recorded, dict):
        # train.keep_best: perplexity records the first text alone
        texts = settings.get("perplexity")
        if isinstance(texts, list) and texts[:1] == recorded.get("perplexity"):
            del recorded["perplexity"]
    return _joined(_joined(tree, stages, Config()), {"run": {"dir": str(directory)}}, Config())


def trusts_code(directory: Path) -> bool:
    """Whether a directory is that of a run whose configuration allows code that comes with the model."""
    model = tree_of(directory).get("model") if is_run(directory) else None
    return isinstance(model, dict) and model.get("trust_remote_code") is True


def merged(settings: Iterable[Mapping[str, Any]]) -> Tree:
    """The settings of stages (see :class:`sppctl.records.Attempt`), the first one first, as one configuration."""
    tree: Tree = {}
    for content in settings:
        sections = {key: value for key, value in content.items() if key != "seed"}
        seed = {"run": {"seed": content["seed"]}} if "seed" in content else {}
        tree = _joined(_joined(tree, seed, Config()), sections, Config())
    return tree


def completed(content: Mapping[str, Any], section: Any = None) -> Tree:
    """The settings of a stage, or their ``section``, with the keys that records leave out at their default."""
    tree = dict(content)
    for f in dataclasses.fields(section or Config()):
        default, value = getattr(section or Config(), f.name), tree.get(f.name)
        if dataclasses.is_dataclass(default) and isinstance(value, dict):
            tree[f.name] = completed(value, default)
        elif f.metadata.get("later"):
            tree.setdefault(f.name, default)
    return tree


def _settings(path: Path) -> Tree:
    """The settings in the record or the note of a stage; empty if it is missing or damaged."""
    settings: Any = None
    with contextlib.suppress(OSError, ValueError):
        settings = sealed.parse(path.read_bytes()).get("settings")
    return completed(settings) if isinstance(settings, dict) else {}


def _joined(tree: Mapping[Any, Any], content: Mapping[str, Any], section: Any) -> dict[Any, Any]:
    """Both trees of a ``section``: where both have a key that is not a section itself, the value of ``content``."""
    joined = dict(tree)
    for name, value in content.items():
        inner, previous = getattr(section, name, None), joined.get(name)
        joined[name] = value
        if dataclasses.is_dataclass(inner) and isinstance(value, dict) and isinstance(previous, dict):
            joined[name] = _joined(previous, value, inner)
    return joined
