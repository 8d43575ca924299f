"""The base weights that a mask refresh stores with an adapter: read instead of the pruned checkpoint's."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sppctl.errors import StageError
from sppctl.files.safe_files import TensorFile, TensorFiles
from sppctl.pattern import Pattern

REFRESHED = "refreshed.safetensors"


def kept_per_group(weight: Tensor, pattern: Pattern) -> Tensor:
    """Number of nonzero weights in each group of M, or in each row: (out_features, groups) int64."""
    width = pattern.group or weight.shape[1]
    return (weight != 0).view(weight.shape[0], -1, width).sum(-1)


class RefreshedFiles(TensorFiles):
    """A pruned checkpoint, to read from, with an adapter's refreshed matrices replacing its own."""

    def __init__(self, pruned: Path, adapter: Path) -> None:
        super().__init__(pruned)
        self.refreshed: list[str] = []
        path = adapter / REFRESHED
        if path.is_file():
            file = TensorFile(path)
            self.files[REFRESHED] = file
            self.home |= dict.fromkeys(file.specs, REFRESHED)
            self.refreshed = list(file.specs)

    def prove(self, pruned: TensorFiles, patterns: dict[str, Pattern]) -> None:
        """Raises StageError unless each refreshed matrix has as many zeros per row, or group of M, as the pruned one.

        ``patterns`` maps tensor names to patterns.
        """
        for name in self.refreshed:
            if name not in patterns or pruned.spec(name).shape != self.spec(name).shape:
                raise StageError(f"{REFRESHED} holds {name}, which is not a pruned matrix: another model's adapter?")
            pattern = patterns[name]
            if not torch.equal(kept_per_group(self.read(name), pattern), kept_per_group(pruned.read(name), pattern)):
                raise StageError(
                    f"{REFRESHED}: {name} does not have the zeros per {'group' if pattern.group else 'row'} of the "
                    "pruned matrix; nothing was published"
                )
