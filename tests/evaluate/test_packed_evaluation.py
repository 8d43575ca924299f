"""Evaluation with packed weights gives the numbers of dense ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Command

from sppctl import machine
from sppctl.config.settings import ModelConfig
from sppctl.evaluate.subjects import Subject
from sppctl.report import records


def results(here: Path, label: str) -> list[dict[str, Any]]:
    content = json.loads((here / "run" / "eval" / f"{label}.json").read_text())
    varying = {"seconds", "command", "weights"}
    return [{key: value for key, value in r.items() if key not in varying} for r in content["results"]]


def weights(here: Path, label: str) -> set[str]:
    content = json.loads((here / "run" / "eval" / f"{label}.json").read_text())
    return {result["weights"] for result in content["results"]}


@pytest.mark.parametrize("label", ["pruned", "adapter", "merged"])
def test_perplexity_and_divergence_are_the_same(label: str, here: Path, command: Command) -> None:
    outcomes = {}
    for kind in ("dense", "packed"):
        done = command("eval", "tiny.yaml", "--model", label, "--force", f"model.weights={kind}")
        assert done.code == 0, done.err
        assert weights(here, label) == {kind}
        outcomes[kind] = results(here, label)
    assert outcomes["packed"] == outcomes["dense"]


def test_the_dense_model_of_a_run_stays_dense_and_any_other_is_refused(here: Path, command: Command) -> None:
    done = command("eval", "tiny.yaml", "--model", "base", "--force", "model.weights=packed")
    assert done.code == 0, done.err
    assert weights(here, "base") == {"dense"}
    done = command("eval", "tiny.yaml", "--model", str(here / "base"), "--force", "model.weights=packed")
    assert done.code == 2
    assert "is not sparse enough to pack: its matrices take" in done.err


def test_auto_packs_what_does_not_fit(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    merged, base = Subject("merged", here / "run/merged"), Subject("base", here / "base")
    size = 4 * 32_160
    for free, packed in ((size, False), (size - 1, True)):
        monkeypatch.setattr(machine, "free_memory", lambda _, free=free: free)
        assert merged.is_packed(ModelConfig(), "float32") is packed
        assert not base.is_packed(ModelConfig(), "float32")
    assert "are free, so its weights are packed (model.weights)" in capsys.readouterr().err


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_memory", lambda _: 100_000)


@pytest.mark.usefixtures("little_memory")
def test_a_dense_model_that_does_not_fit_is_refused_before_it_is_loaded(here: Path, command: Command) -> None:
    reference = command("eval", "tiny.yaml", "--model", "merged", "--force", "model.weights=dense")
    assert reference.code == 2
    assert "eval.divergence: the dense model" in reference.err
    assert "set it to null" in reference.err
    base = command("eval", "tiny.yaml", "--model", "base", "--force")
    assert base.code == 2
    assert "--model: base: " in base.err
    assert "measure others without it (--model merged eval.divergence=null)" in base.err
    assert not (here / "run" / ".reference-0").exists()
    demanded = command("eval", "tiny.yaml", "--model", "base", "--force", "model.weights=dense")
    assert demanded.code == 0, demanded.err


@pytest.mark.usefixtures("little_memory")
def test_a_base_that_does_not_fit_writes_no_samples(here: Path, command: Command) -> None:
    options = ("--model", "merged", "--force", "eval.divergence=null", "eval.prompts=[One]")
    done = command("eval", "tiny.yaml", *options)
    assert done.code == 0, done.err
    assert weights(here, "merged") == {"packed"}
    assert "generate: without the base" in done.err
    stored = records.stored_samples(here / "run")
    assert stored is not None
    assert [one.checkpoint for one in stored.samples[0].completions] == ["pruned", "merged"]
