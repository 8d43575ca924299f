"""The best adapter is published instead of the last one, and training ends early when nothing improves."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from conftest import cut_after
from fitting import Fit, a_fit, figures  # noqa: F401  (the fixture fit)

from sppctl.errors import StageError
from sppctl.files import strict_json
from sppctl.run.attempts import settings_of
from sppctl.train import checkpoints
from sppctl.train.loop import Loop
from sppctl.train.watch import State

# the learning rate makes it worse after a while: measured by a script, not by the model
VALUES = [3.0, 2.0, 2.5, 2.2, 1.9, 2.4, 2.4, 2.4]
OPTIONS = ("train.max_steps=8", "train.eval_steps=1", "train.keep_best=eval_loss", "train.dropout=0.1")


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation losses by step as in VALUES; the real ones are still computed, with all their effects."""
    validate = Loop.validate

    def losses(self: Loop) -> float:
        validate(self)
        return VALUES[self.state.step - 1]

    monkeypatch.setattr(Loop, "validate", losses)


def test_the_state_counts_measurements() -> None:
    state, best = State(), []
    for state.step, value in enumerate([3.0, float("nan"), 3.0, 2.0, float("inf"), 2.5], 1):
        best.append(state.compare(value))
    assert best == [True, False, False, True, False, False]
    assert (state.best_step, state.best_value, state.since_best) == (4, 2.0, 2)
    assert not State().compare(float("inf"))


def test_the_best_adapter_is_the_one_of_a_shorter_training(scripted: None, fit: Fit) -> None:
    """With a constant learning rate a training of five steps ends where one of eight was after five."""
    options = ("train.scheduler=constant", *OPTIONS)
    metrics = fit("adapter", *options, "train.save_steps=3", "train.keep_checkpoints=1")
    assert (metrics.steps, metrics.best_step, metrics.validation_loss) == (8, 5, 1.9)
    assert fit.checkpoints("adapter") == {"checkpoint-5", "checkpoint-8"}
    fit("five", *options, "train.max_steps=5")
    assert fit.adapter("adapter") == fit.adapter("five")
    assert {path.name for path in (fit.root / "adapter").iterdir()} == {
        path.name for path in (fit.root / "five").iterdir()
    }


@pytest.mark.parametrize(("patience", "steps", "best"), [(1, 3, 2), (2, 4, 2), (3, 8, 5)])
def test_training_stops_after_measurements_without_improvement(
    patience: int, steps: int, best: int, scripted: None, fit: Fit, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = fit("adapter", *OPTIONS, f"train.patience={patience}")
    assert (metrics.steps, metrics.best_step) == (steps, best)
    assert len(figures(metrics, "eval_loss")) == steps
    said = capsys.readouterr().err
    early = f"step {steps}: no better eval_loss in {patience} measurements, training ends early"
    assert (early in said) == (steps < 8)
    assert f"the adapter of step {best} of {steps} is the best: eval_loss {VALUES[best - 1]:.4g}" in said
    again = fit("adapter", *OPTIONS, f"train.patience={patience}")  # stopped before it was published: no further step
    assert (again.steps, again.best_step) == (steps, best)


@pytest.mark.parametrize("cut", [3, 5, 7])
def test_a_resumed_training_publishes_the_same_adapter(cut: int, scripted: None, fit: Fit) -> None:
    options = (*OPTIONS, "train.save_steps=3", "train.keep_checkpoints=1", "train.patience=3")
    fit("whole", *options)
    with cut_after(cut):
        fit("cut", *options)
    assert fit("cut", *options).best_step == 5
    assert fit.adapter("cut") == fit.adapter("whole")


def test_perplexity_selects_too(fit: Fit) -> None:
    options = ("train.perplexity_steps=2", "train.keep_best=perplexity", "eval.max_tokens=256", "train.max_steps=5")
    metrics = fit("adapter", *options, "train.lr=1e-1")
    assert figures(metrics, "perplexity", "step")[1::2] == [2, 4, 5]  # also after the last step
    values = dict(zip([2, 4, 5], figures(metrics, "perplexity"), strict=True))
    assert metrics.best_step == min(values, key=values.__getitem__)
    assert metrics.validation_loss is not None


def test_masks_that_change_later_are_not_published(scripted: None, fit: Fit) -> None:
    """A refresh after step 4 changes weights that the adapter of step 2 belongs to."""
    more = ("train.refresh.steps=2", "train.refresh.until=0.5", "train.refresh.cycles=1")
    metrics = fit("adapter", *OPTIONS, *more)
    assert metrics.best_step == 5
    fit.merge()


def test_the_text_that_selects_is_part_of_the_settings(fit: Fit) -> None:
    options = ("train.perplexity_steps=2", "eval.max_tokens=256")
    plain = settings_of(fit.configure(*options), "train")
    assert plain == settings_of(fit.configure(), "train")
    selecting = [
        settings_of(fit.configure(*options, "train.keep_best=perplexity", more), "train")
        for more in ("train.lr=1e-2", "train.perplexity_steps=3", "eval.max_tokens=300")
    ]
    assert selecting[0] != selecting[1] != selecting[2] != selecting[0]


# --- checkpoints ------------------------------------------------------------------------------------------------------


def made(folder: Path, best: dict[int, int], keep: int) -> set[str]:
    """The checkpoints that are left after writing some, by step with the best step so far."""

    def write(step: int, draft: Path) -> None:
        for name in checkpoints.ADAPTER_FILES:
            (draft / name).write_text(f"{name} after step {step}")
        strict_json.write(draft / checkpoints.STATE, {"best_step": best[step]})

    for step in best:
        checkpoints.save(folder, step, partial(write, step), keep)
    return {path.name for path in folder.iterdir()}


def test_the_best_one_is_kept_as_long_as_a_kept_one_needs_it(tmp_path: Path) -> None:
    assert made(tmp_path / "a", {1: 1, 2: 1, 3: 1}, 1) == {"checkpoint-1", "checkpoint-3"}
    assert made(tmp_path / "b", {1: 1, 2: 1, 3: 3}, 1) == {"checkpoint-3"}
    assert made(tmp_path / "c", {1: 1, 2: 1, 3: 3}, 2) == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}


DAMAGES: dict[str, Callable[[Path], object]] = {
    "damaged": lambda path: (path / "adapter_model.safetensors").write_text("another"),
    "missing": shutil.rmtree,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_whose_best_one_is_damaged_is_not_continued(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkpoints, "demand_files", lambda *_: None)
    made(tmp_path, {1: 1, 2: 2, 3: 2}, 3)
    DAMAGES[damage](tmp_path / "checkpoint-2")
    assert checkpoints.newest(tmp_path, None) == tmp_path / "checkpoint-1"
    assert (
        "checkpoint-3 is damaged (checkpoint-2, which holds the best adapter, is damaged: " in capsys.readouterr().err
    )


def test_a_damaged_adapter_is_not_published(tmp_path: Path) -> None:
    made(tmp_path, {2: 2}, 1)
    DAMAGES["damaged"](tmp_path / "checkpoint-2")
    with pytest.raises(StageError, match=r"^the best adapter cannot be read: .*checkpoint-2 is damaged"):
        checkpoints.copy_adapter(tmp_path / "checkpoint-2", tmp_path)
