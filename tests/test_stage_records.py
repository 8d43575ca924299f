"""Records: to JSON and back, and the errors of one with wrong content."""

from __future__ import annotations

import json
from typing import Any

import pytest
from stage_calls import blank

from sppctl.pattern import Pattern
from sppctl.records import (
    METRICS,
    Attempt,
    BlockErrors,
    Calibration,
    DistillationRecord,
    LayerRecord,
    MatrixRecord,
    MergeRecord,
    PruneRecord,
    RefreshRecord,
    StageRecord,
    TrainRecord,
    from_json,
    to_json,
)

LAYERS = [
    LayerRecord("a.q_proj", (2, 8), Pattern(keep=2, group=4), 0.5, 0.25, 1.0, None, 1.5, None, "digest"),
    LayerRecord("a.down_proj", (4, 8), Pattern(ratio=0.7), 0.7, None, 0.5, 0.01, 2.0, "magnitude", "other"),
]
FULL = {
    "prune": blank(
        PruneRecord, layers=LAYERS, reconstruction={3: BlockErrors(0.5, 0.25)}, calibration=blank(Calibration)
    ),
    "train": blank(
        TrainRecord,
        modules=["a.q_proj"],
        distillation=blank(DistillationRecord),
        refresh=blank(RefreshRecord, masks={"a.q_proj": "digest"}),
        history=[{"loss": 1.5, "step": 1}],
    ),
    "merge": blank(MergeRecord, records=[blank(MatrixRecord, name="a.q_proj.weight")]),
}


def content(stage: str) -> Any:
    """A whole record, as it is read from its file."""
    record = blank(StageRecord, stage=stage, settings={"prune": {"skip": []}}, metrics=FULL[stage])
    return json.loads(json.dumps(to_json(record)))


@pytest.mark.parametrize("stage", METRICS)
def test_there_and_back(stage: str) -> None:
    record = from_json(StageRecord, content(stage), METRICS[stage])
    assert record.metrics == FULL[stage]
    assert json.loads(json.dumps(to_json(record))) == content(stage)


def test_what_later_stages_take_from_pruning() -> None:
    record = from_json(PruneRecord, content("prune")["metrics"])
    assert record.patterns == {"a.q_proj": Pattern.parse("2:4"), "a.down_proj": Pattern.parse(0.7)}
    assert record.masks == {"a.q_proj": "digest", "a.down_proj": "other"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record.pop("inputs"), "it has no inputs"),
        (lambda record: record["metrics"]["layers"][1].pop("sparsity"), r"it has no metrics.layers\[1\].sparsity"),
        (lambda record: record["metrics"].update(speed=3), "its metrics has an unknown field speed"),
        (lambda record: record["metrics"].update(matrices="14"), "its metrics.matrices has the wrong type"),
        (lambda record: record["metrics"].update(matrices=True), "its metrics.matrices has the wrong type"),
        (lambda record: record.update(metrics=[]), "its metrics has the wrong type"),
        (lambda record: record["metrics"]["layers"][0].update(pattern="4:2"), "pattern '4:2'"),
    ],
)
def test_what_is_wrong_is_named(change: Any, message: str) -> None:
    record = content("prune")
    change(record)
    with pytest.raises(ValueError, match=message):
        from_json(StageRecord, record, PruneRecord)


def test_an_attempt_that_leaves_the_dtype_open_is_the_same_as_one_that_chose_it() -> None:
    wanted = Attempt({"model": {"compute_dtype": "auto"}, "seed": 0}, {"base": "x"})
    chosen = wanted.computing_in("float32")
    assert wanted != chosen
    assert wanted.as_in(chosen) == chosen
    assert wanted.as_in(chosen).fingerprint == chosen.fingerprint != wanted.fingerprint
    configured = wanted.computing_in("bfloat16")
    assert configured.as_in(chosen) == configured
