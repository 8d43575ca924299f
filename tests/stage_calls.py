"""The work of the stages without a run directory: checked and done as a run does it, and records made up for it."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from sppctl.config.settings import Config
from sppctl.data import vocabulary
from sppctl.files import sealed
from sppctl.files.names import RECORD
from sppctl.merge import stage as merging
from sppctl.model import checkpoint
from sppctl.model.blocks import Skeleton
from sppctl.model.estimate import Work
from sppctl.pattern import Pattern
from sppctl.plan import run as plan
from sppctl.prune import checks
from sppctl.prune import stage as pruning
from sppctl.records import METRICS, MergeRecord, PruneRecord, StageRecord, TrainRecord, to_json
from sppctl.train import stage as training
from sppctl.train.feed import Feed

R = TypeVar("R")


def blank(kind: type[R], **values: Any) -> R:
    """A record whose other fields are empty."""
    hints = typing.get_type_hints(kind)
    missing = [field.name for field in dataclasses.fields(kind) if field.name not in values]
    return kind(**{name: _empty(hints[name]) for name in missing} | values)


def _empty(hint: Any) -> Any:
    if type(None) in typing.get_args(hint):
        return None
    return Pattern(ratio=0.5) if hint is Pattern else (typing.get_origin(hint) or hint)()


def outline(directory: Path) -> tuple[Skeleton, Any]:
    """A checkpoint without weights, and its tokenizer."""
    return Skeleton(checkpoint.load_config(directory)), checkpoint.load_tokenizer(directory)


def prune(config: Config, base: Path, out: Path, dtype: str = "float32", windows: Tensor | None = None) -> PruneRecord:
    """Prunes into a directory, which is made if it is not there; on these windows, whatever is configured."""
    out.mkdir(exist_ok=True)
    prepared = checks.prepare(config, *outline(base))
    if windows is not None:
        assert prepared.drawn is not None
        prepared = replace(prepared, drawn=replace(prepared.drawn, tokens=windows))
    return pruning.execute(config, prepared, base, out, dtype=dtype)


def train(
    config: Config,
    pruned: Path,
    record: PruneRecord,
    out: Path,
    *,
    dtype: str = "float32",
    resume: bool = True,
    packed: bool = False,
    base: Path | None = None,
) -> TrainRecord:
    """Trains into a directory, which is made if it is not there; without the checks."""
    out.mkdir(exist_ok=True)
    skeleton, tokenizer = outline(pruned)
    feed = Feed(config, tokenizer, vocabulary.embeddings(skeleton.model))
    prepared = training.Prepared(feed, tokenizer, Work("", 0), {})
    planned = partial(plan.bytes_on_each_device, config)
    return training.execute(
        config, prepared, pruned, record, out, dtype=dtype, resume=resume, packed=packed, base=base, planned=planned
    )


def merge(
    config: Config,
    pruned: Path,
    adapter: Path,
    out: Path,
    record: PruneRecord | None = None,
    trained: TrainRecord | None = None,
) -> MergeRecord:
    """Merges into a directory, which is made if it is not there; None: of this there is nothing to compare with."""
    out.mkdir(exist_ok=True)
    records = record or blank(PruneRecord), trained or blank(TrainRecord)
    return merging.execute(config, merging.prepare(config, pruned, adapter, *records, out), out)


def write_record(directory: Path, stage: str, **values: Any) -> None:
    """The record of a stage in its directory, where nothing else need be."""
    directory.mkdir(parents=True, exist_ok=True)
    record = blank(StageRecord, stage=stage, metrics=blank(METRICS[stage]), **values)
    sealed.write(directory / RECORD, to_json(record))
