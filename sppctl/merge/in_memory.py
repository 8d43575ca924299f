"""Merging an adapter into a pruned checkpoint from Python, without a run."""

from __future__ import annotations

import shutil
from os import PathLike
from pathlib import Path
from typing import Any

from sppctl import records
from sppctl.config.load import config_of
from sppctl.errors import UserError
from sppctl.files import disk, integrity
from sppctl.files.names import RECORD
from sppctl.merge import stage
from sppctl.model import find
from sppctl.records import MergeRecord


def merge_adapter(
    pruned: str | PathLike[str], adapter: str | PathLike[str], out: str | PathLike[str], **options: Any
) -> MergeRecord:
    """Merges a PEFT adapter into a pruned checkpoint: an ordinary checkpoint, whose zeros are verified.

    Args:
        pruned: directory or hub id of the pruned checkpoint, which is only read.
        adapter: directory or hub id of the adapter, made by sppctl or by PEFT.
        out: a directory, which must not exist; it appears when everything has been verified.
        options: the keys of ``merge`` in the configuration: ``mask`` (``keep``; ``reapply`` for a LoRA, whose update
            would fill the zeros) and ``dtype``.

    Returns:
        What became of each matrix.

    Raises:
        UserError: (a ValueError) ``out`` exists, the adapter belongs to another model or other zeros, or has something
            that cannot be merged exactly.
        StageError: the zeros would not be what ``mask`` promises, or a value is not finite. Nothing is left behind.
    """
    target = Path(out)
    if target.exists():
        raise UserError("merge_adapter", f"{target} exists", "name a new directory")
    config = config_of({"merge": options, "model": {"path": str(pruned)}}, "merge_adapter")
    base = find.locate(str(pruned), key="pruned")
    trained = find.locate(str(adapter), key="adapter", adapters=True)
    is_pruned_here = (integrity.check_record(base) or {}).get("stage") == "prune"
    pruning = records.read(base / RECORD, "prune").metrics if is_pruned_here else None
    prepared = stage.prepare(config, base, trained, pruning, stage.training_of(trained, base), target)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with disk.writing(partial, reasons=disk.FULL):
            merged = stage.execute(config, prepared, partial)
        disk.apply_umask(partial)
        disk.sync_tree(partial)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return merged
