"""What a run prints before it starts: each stage that will run, and about how long it takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ALPACA

from sppctl.config.load import load_config
from sppctl.model import estimate
from sppctl.model.estimate import Work, duration, lines, seconds_per_token
from sppctl.run import pipeline
from sppctl.run.directory import Run


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "10 s"), (44, "40 s"), (89, "90 s"), (91, "2 min"), (1800, "30 min"), (5399, "90 min"), (9000, "2.5 h")],
)
def test_rough_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_token_takes_as_long_as_its_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "_multiplications_per_second", lambda width, dtype, device: 2e9 if width == 64 else 0)
    assert seconds_per_token(10**9, 64, "float32", torch.device("cpu")) == 0.5 * estimate.OVERHEAD


def test_the_speed_is_measured_in_the_dtype_computed_in() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert 1e6 < estimate._multiplications_per_second(64, dtype, torch.device("cpu")) < 1e15


def test_lines_with_and_without_a_known_speed() -> None:
    work = {"prune": Work("wanda 2:4", 1000.0), "train": Work("spp", 4000.0)}
    assert list(lines(work, 0.1)) == ["prune: wanda 2:4, about 2 min", "train: spp, about 7 min"]
    assert list(lines(work, None)) == ["prune: wanda 2:4", "train: spp"]


@pytest.fixture
def announced(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Work]]:
    """announced(*overrides) -> what the stages of a tiny run are about to do."""
    (tmp_path / "rows.json").write_text(json.dumps(ALPACA[:6]))
    (tmp_path / "text.txt").write_text("word " * 400)
    given = [f"model.path={make_checkpoint()}", f"run.dir={tmp_path / 'run'}", "model.device=cpu"]
    given += [f"prune.calibration.dataset={tmp_path / 'text.txt'}", "prune.calibration.samples=4"]
    given += ["prune.calibration.seq_len=32", f"train.data.dataset={tmp_path / 'rows.json'}", "train.data.seq_len=64"]
    given += [
        "train.batch_size=4",
        "train.micro_batch_size=2",
        "train.epochs=2",
        f"eval.perplexity=[{tmp_path}/text.txt]",
    ]
    given += ["eval.seq_len=32", "eval.max_tokens=96"]
    found: dict[str, Work] = {}
    monkeypatch.setattr(pipeline, "_announce", lambda run, skeleton, work: found.update(work))

    def announce(*overrides: str) -> dict[str, Work]:
        found.clear()
        pipeline.preflight(Run(load_config("quickstart", [*given, *overrides])), pipeline.STAGES, announce=True)
        return dict(found)

    return announce


def test_the_tokens_of_each_stage(announced: Callable[..., dict[str, Work]]) -> None:
    work = announced("train.data.packing=true")
    assert work["prune"] == Work("wanda 2:4, 14 matrices, 4 windows of 32 tokens", pytest.approx(2.1 * 4 * 32))
    # all six rows are longer than 64 bytes, and so cut to 64 tokens; forward, and twice as much backward
    assert work["train"] == Work("spp, 4 steps of 4 examples", 3 * 2 * 6 * 64)
    assert work["eval"].tokens == 96


def test_what_makes_them_more(announced: Callable[..., dict[str, Work]]) -> None:
    work = announced(
        "train.gradient_checkpointing=true", "train.max_steps=1", "eval.stride=16", "prune.method=magnitude"
    )
    assert work["train"].tokens == 4 * 4 * 64
    assert work["eval"].tokens == 2 * 96
    assert work["prune"].tokens == 0
