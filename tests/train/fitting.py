"""Trainings of a tiny pruned model within the tests' own process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import stage_calls
from conftest import trained_dtype
from safetensors.torch import load_file
from torch import Tensor

from sppctl.config.settings import Config
from sppctl.errors import UserError
from sppctl.records import MergeRecord, PruneRecord, TrainRecord
from sppctl.train import stage as train

Configure = Callable[..., Config]


@dataclass
class Fit:
    """fit("name", "train.lr=1", ...) -> the record of a training with these overrides in the folder ``root``/name."""

    configure: Configure
    pruned: tuple[Path, PruneRecord]
    dense: Path
    root: Path
    trained: dict[str, TrainRecord] = field(default_factory=dict)  # by the name of the folder

    def __call__(self, name: str, *overrides: str, resume: bool = True) -> TrainRecord:
        config, dtype = self.configure(*overrides), trained_dtype(self.pruned[0])
        self.trained[name] = stage_calls.train(
            config, *self.pruned, self.root / name, dtype=dtype, resume=resume, base=self.dense
        )
        return self.trained[name]

    def merge(self, *overrides: str, into: str = "merged", adapter: str = "adapter") -> MergeRecord:
        """The record of merging a trained adapter into the folder ``root``/into."""
        records = self.pruned[1], self.trained[adapter]
        config = self.configure(*overrides)
        return stage_calls.merge(config, self.pruned[0], self.root / adapter, self.root / into, *records)

    def adapter(self, name: str) -> bytes:
        return (self.root / name / "adapter_model.safetensors").read_bytes()

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.root / name / "adapter_model.safetensors")

    def checkpoints(self, name: str) -> set[str]:
        """What is in the folder of the checkpoints."""
        return {path.name for path in (self.root / name / "checkpoints").iterdir()}


def figures(record: TrainRecord, *names: str) -> list[float]:
    """What the history of a training says, in its lines that have the first of the names."""
    return [line[name] for line in record.history if names[0] in line for name in names]


def preflight(config: Config, model: Path) -> None:
    train.prepare(config, *stage_calls.outline(model))


def problems(config: Config, model: Path) -> str:
    """What is found before the training; empty: nothing."""
    try:
        preflight(config, model)
    except UserError as error:
        return str(error)
    return ""


@pytest.fixture(name="fit")
def a_fit(configure: Configure, pruned: tuple[Path, PruneRecord], llama: Path, tmp_path: Path) -> Fit:
    """Trainings of the tiny Llama, pruned as the module's ``configure`` says."""
    return Fit(configure, pruned, llama, tmp_path)
