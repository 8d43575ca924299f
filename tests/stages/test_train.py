"""Training: it learns, it resumes exactly, it leaves the pruned checkpoint alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sppctl.config import load_config
from sppctl.errors import StageError, UserError
from sppctl.lm.data import IGNORED, Example
from sppctl.settings import Config
from sppctl.stages import prune, train


@pytest.fixture
def configure(config_file: Path) -> Callable[..., Config]:
    return lambda *overrides: load_config(str(config_file), overrides)


@pytest.fixture
def pruned(configure: Callable[..., Config], llama: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    out = tmp_path / "pruned"
    out.mkdir()
    metrics = prune.execute(configure(), llama, out)
    return out, [layer["name"] for layer in metrics["layers"]]


def trained(config: Config, pruned: tuple[Path, list[str]], out: Path, resume: bool = True) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    return train.execute(config, *pruned, out, resume=resume)


def test_the_loss_falls_and_the_record_says_so(
    configure: Callable[..., Config], pruned: tuple[Path, list[str]], tmp_path: Path
) -> None:
    before = (pruned[0] / "model.safetensors").read_bytes()
    config = configure("train.epochs=12", "train.lr=5e-2", "train.log_steps=1", "train.dropout=0.0")
    metrics = trained(config, pruned, tmp_path / "adapter")
    losses = [entry["loss"] for entry in metrics["history"] if "loss" in entry]
    assert metrics["steps"] == len(losses) == 12 * 5
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.05 * 5
    assert metrics["examples"] == 20
    assert metrics["validation_examples"] == 4
    assert metrics["validation_loss"] < losses[0]
    assert (pruned[0] / "model.safetensors").read_bytes() == before
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "README.md",
        "logs",
        "checkpoints",  # until the stage is published
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_figures_go_to_tensorboard_and_perplexity_to_the_record(
    configure: Callable[..., Config], pruned: tuple[Path, list[str]], tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = configure("train.log_steps=1", "train.perplexity_steps=2", "eval.seq_len=64", "eval.max_tokens=256")
    history = trained(config, pruned, tmp_path / "adapter")["history"]
    events = EventAccumulator(str(tmp_path / "adapter" / "logs"))
    events.Reload()
    logged = [entry for entry in history if "loss" in entry]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx([e["loss"] for e in logged])
    assert all(event.value > 0 for event in events.Scalars("train/grad_norm"))
    measured = [entry for entry in history if "perplexity" in entry]
    assert [entry["step"] for entry in measured] == [2, 4]
    assert measured[1]["perplexity"] < measured[0]["perplexity"]


def test_learning_rate_warms_up_and_decays_linearly(
    configure: Callable[..., Config], pruned: tuple[Path, list[str]], tmp_path: Path
) -> None:
    config = configure("train.epochs=4", "train.lr=1e-3", "train.warmup_ratio=0.25", "train.log_steps=1")
    rates = [
        entry["learning_rate"]
        for entry in trained(config, pruned, tmp_path / "adapter")["history"]
        if "learning_rate" in entry
    ]
    warm = [1e-3 * step / 5 for step in range(5)]
    decay = [1e-3 * (20 - step) / 15 for step in range(5, 20)]
    assert rates == pytest.approx(warm + decay, abs=1e-9)


def test_a_resumed_training_ends_with_the_same_adapter(
    configure: Callable[..., Config], pruned: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure("train.epochs=2", "train.save_steps=3", "train.dropout=0.1")
    trained(config, pruned, tmp_path / "whole")

    class CutError(Exception):
        pass

    original = train.Watch.on_step_end

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        original(self, args, state, control, **kwargs)
        if state.global_step == 5:
            raise CutError

    monkeypatch.setattr(train.Watch, "on_step_end", stop)
    with pytest.raises(CutError):
        trained(config, pruned, tmp_path / "cut")
    monkeypatch.undo()
    checkpoint = tmp_path / "cut" / "checkpoints" / "checkpoint-3"
    stored = {path.name for path in checkpoint.iterdir()}
    assert "adapter_model.safetensors" in stored
    assert "model.safetensors" not in stored
    metrics = trained(config, pruned, tmp_path / "cut")
    assert metrics["steps"] == 10
    whole, cut = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut"))
    for name, tensor in whole.items():
        assert torch.equal(tensor, cut[name]), name


def test_no_resume_starts_again(
    configure: Callable[..., Config], pruned: tuple[Path, list[str]], tmp_path: Path
) -> None:
    config = configure("train.save_steps=2", "train.dropout=0.1")
    trained(config, pruned, tmp_path / "one", resume=False)
    trained(config, pruned, tmp_path / "two", resume=False)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_accumulation_gives_the_loss_and_gradient_of_the_whole_batch(
    configure: Callable[..., Config], pruned: tuple[Path, list[str]], tmp_path: Path
) -> None:
    figures = []
    for micro in (1, 2, 4):
        overrides = (f"train.micro_batch_size={micro}", "train.dropout=0.0", "train.log_steps=1", "train.lr=1e-4")
        history = trained(configure(*overrides), pruned, tmp_path / f"micro{micro}")["history"]
        figures.append(
            [figure for entry in history if "loss" in entry for figure in (entry["loss"], entry["grad_norm"])]
        )
    assert figures[1] == pytest.approx(figures[0], rel=1e-3)
    assert figures[2] == pytest.approx(figures[0], rel=1e-3)


def test_truncation_is_counted(
    configure: Callable[..., Config],
    pruned: tuple[Path, list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    metrics = trained(configure("train.data.seq_len=96", "train.max_steps=1"), pruned, tmp_path / "adapter")
    assert metrics["truncated_examples"] == 20
    assert "20 of 20 examples (100.0%) are longer than 96 tokens and were cut" in capsys.readouterr().err


def test_no_response_token_left_is_an_error(
    configure: Callable[..., Config], pruned: tuple[Path, list[str]], tmp_path: Path
) -> None:
    config = configure("train.data.seq_len=64", "train.data.train_on_inputs=false")
    with pytest.raises(UserError, match="leaves no response token"):
        trained(config, pruned, tmp_path / "adapter")


def test_a_loss_that_is_not_finite_stops_it(
    configure: Callable[..., Config], pruned: tuple[Path, list[str]], tmp_path: Path
) -> None:
    config = configure("train.lr=1e30", "train.max_grad_norm=0", "train.log_steps=1", "train.epochs=3")
    with pytest.raises(StageError, match=r"loss is (nan|inf) at step"):
        trained(config, pruned, tmp_path / "adapter")


def test_gradient_checkpointing_changes_nothing(
    configure: Callable[..., Config], pruned: tuple[Path, list[str]], tmp_path: Path
) -> None:
    adapters = []
    for value in ("false", "true"):
        trained(configure(f"train.gradient_checkpointing={value}"), pruned, tmp_path / value)
        adapters.append(load_file(tmp_path / value / "adapter_model.safetensors"))
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(tensor, adapters[1][name], rtol=1e-4, atol=1e-5)


def test_other_targets(configure: Callable[..., Config], pruned: tuple[Path, list[str]], tmp_path: Path) -> None:
    trained(configure("train.targets=[q_proj]", "train.max_steps=1"), pruned, tmp_path / "adapter")
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name.split(".")[-2] for name in names} == {"q_proj"}


def test_the_collator_pads_on_the_right_to_a_multiple_of_eight() -> None:
    batch = train.Collator(pad_token_id=9)(
        [Example([1, 2, 3], [IGNORED, 2, 3], False, 0), Example([4] * 5, [4] * 5, False, 1)]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3, 9, 9, 9, 9, 9], [4, 4, 4, 4, 4, 9, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 2, 3, *[IGNORED] * 5], [4, 4, 4, 4, 4, *[IGNORED] * 3]]


@pytest.mark.slow
def test_float16_checkpoints_are_trained_in_another_dtype(
    configure: Callable[..., Config], make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_checkpoint("llama", torch.float16)
    (tmp_path / "half").mkdir()
    layers = [layer["name"] for layer in prune.execute(configure(), base, tmp_path / "half")["layers"]]
    metrics = trained(configure(), (tmp_path / "half", layers), tmp_path / "adapter")
    assert metrics["dtype"] in ("bfloat16", "float32")
    shutil.rmtree(tmp_path / "adapter")
