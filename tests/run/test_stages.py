"""What the checks of a stage load is handed to its work, as long as it is what the work would read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ALPACA

from sppctl.config.settings import Config
from sppctl.data import instructions, texts
from sppctl.files import cache, sealed
from sppctl.files.names import JOURNAL, NOTE
from sppctl.prune import walk
from sppctl.records import Attempt, BlockRecord
from sppctl.run import pipeline
from sppctl.run.attempts import differences, settings_of
from sppctl.run.directory import Run
from sppctl.run.stages import MERGE, PRUNE, TRAIN


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts and rows that have been loaded."""
    names: list[str] = []
    load_text, load_rows = texts.load_text, instructions.load_instructions

    def text(name: str, *args: object, **options: object) -> texts.Text:
        names.append(name)
        return load_text(name, *args, **options)  # type: ignore[arg-type]

    def rows(weights: dict[str, float], *args: object, **options: object) -> instructions.Instructions:
        names.extend(weights)
        return load_rows(weights, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(texts, "load_text", text)
    monkeypatch.setattr(instructions, "load_instructions", rows)
    return names


def checked(config: Config, *stages: str) -> Run:
    run = Run(config, force=True)
    pipeline.preflight(run, stages)
    return run


def test_pruning_takes_over_the_windows_of_its_checks(
    configure: Callable[..., Config], tmp_path: Path, loaded: list[str]
) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("Some words to calibrate with. " * 40)
    config = configure(f"prune.calibration.dataset={text}")
    first = checked(config, "prune").do(PRUNE).metrics.calibration
    assert first is not None
    assert (loaded, first.samples) == ([str(text)], 4)
    run = checked(config, "prune")
    text.write_text("Other words to calibrate with. " * 40)  # since the checks
    other = run.do(PRUNE).metrics.calibration
    assert other is not None
    assert loaded == [str(text)] * 3
    assert other.documents_hash != first.documents_hash


def test_training_takes_over_the_rows_of_its_checks(
    configure: Callable[..., Config], tmp_path: Path, loaded: list[str]
) -> None:
    rows = tmp_path / "mine.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ALPACA))
    config = configure("prune.method=magnitude", "train.max_steps=1", f"train.data.dataset={rows}")
    Run(config).do(PRUNE)
    first = checked(config, "train").do(TRAIN).metrics
    assert loaded == [str(rows)]
    run = checked(config, "train")
    rows.write_text("".join(json.dumps(row) + "\n" for row in ALPACA[:12]))  # since the checks
    other = run.do(TRAIN).metrics
    assert loaded == [str(rows)] * 3
    assert (first.examples, other.examples) == (20, 8)


def test_a_stage_leaves_no_memory_to_the_next(
    configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    def prune(*arguments: Any) -> Any:
        record = original(*arguments)
        events.append("done")
        return record

    events: list[str] = []
    original = PRUNE.do
    monkeypatch.setattr(PRUNE, "do", prune)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("emptied"))
    Run(configure("prune.method=magnitude")).do(PRUNE)
    assert events[-2:] == ["done", "emptied"]


def test_another_tokenizer_makes_other_windows(
    configure: Callable[..., Config], tmp_path: Path, loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of a GGUF file may differ from that of the unpacked model."""
    run = checked(configure(), "prune")
    monkeypatch.setattr(cache, "same_tokenizer", lambda *_: False)
    run.do(PRUNE)
    assert len(loaded) == 2


def test_the_time_of_a_stage_is_that_of_all_attempts(
    configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of interrupted ones until their last finished block, without the time between attempts."""
    run = Run(configure("prune.method=magnitude"))
    partial, append = run.partial("pruned"), walk.Journal.append

    def interrupted(seconds: int) -> float:
        """The seconds in the note of an attempt that finishes a block after so many seconds."""

        def stop(self: walk.Journal, entry: BlockRecord) -> None:
            append(self, entry)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(walk.Journal, "append", stop)
            with pytest.raises(KeyboardInterrupt):
                run.do(PRUNE)
        began = os.stat(partial / NOTE).st_mtime
        for file in partial.rglob("*"):
            os.utime(file, (began + seconds, began + seconds if file.name == JOURNAL else began))
        noted: float = sealed.read(partial / NOTE, "")["seconds"]
        return noted

    assert (interrupted(20_000), interrupted(4_000)) == (0, pytest.approx(20_000))
    record = run.do(PRUNE)
    assert 24_000 < record.wall_time_s < 30_000
    assert f"prune: done in {record.wall_time_s:.0f} s over all attempts" in capsys.readouterr().err
    assert Run(configure("prune.method=magnitude"), force=True).do(PRUNE).wall_time_s < 20_000


def test_what_changed_is_named_once(configure: Callable[..., Config]) -> None:
    columns = "train.data.columns={instruction: question, output: answer}"
    before = Attempt(settings_of(configure(), "train"), {"pruned": "a", "data one": "b"})
    shown = "train.data.columns = {}, now {instruction: question, output: answer}"
    settings = settings_of(configure(columns), "train")
    assert differences(before, settings, before.inputs) == shown
    assert differences(before, settings, {"pruned": "c", "data two": "d"}) == f"{shown}; other pruned content"
    newer = before.inputs | {"data version": "e"}
    assert differences(before, before.settings, newer) == "other data version content"


def test_a_lora_is_merged_under_the_mask(configure: Callable[..., Config]) -> None:
    assert MERGE.options(Run(configure("train.method=lora"))) == ["merge.mask=reapply"]
    assert MERGE.options(Run(configure("train.method=lora", "merge.mask=dense"))) == []
    assert MERGE.options(Run(configure())) == []
