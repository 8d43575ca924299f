"""The order of a checkpoint's channels, which ``prune.permute_channels`` changes, as far as records tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sppctl.files import sealed
from sppctl.model import find


def order_of(checkpoint: str | Path | None) -> str | None:
    """A name for the order of the channels of a checkpoint; None: the dense model's, or not made by sppctl.

    Two checkpoints of a model with the same name have the same order.

    Args:
        checkpoint: a directory; anything else (a hub id, None) has no record.

    Raises:
        UserError: a record is damaged.
    """
    seen: set[str | Path] = set()
    while checkpoint and checkpoint not in seen:
        seen.add(checkpoint)
        record = _pruning_of(Path(checkpoint))
        if record is None:
            return None
        if record["metrics"].get("permuted"):
            return str(record["fingerprint"])
        checkpoint = record["settings"]["model"]["path"]  # what was pruned has that order, too
    return None


def _pruning_of(directory: Path) -> dict[str, Any] | None:
    for path in find.pruning_records(directory):
        content = sealed.read(path, "check it, or take another checkpoint")
        if content.get("stage") == "prune":
            return content
    return None
