"""Schedules and optimizers: transformers' learning rates, what an optimizer cannot do, and exact resuming with each."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from conftest import cut_after
from fitting import Configure, Fit, a_fit, figures, problems  # noqa: F401  (the fixture fit)

from sppctl.errors import UserError
from sppctl.train import optimizers

STEPS = ("train.max_steps=8", "train.log_steps=1", "train.lr=1e-3")
RAMP = [0.0, 5e-4]  # the first of two warm-up steps has learning rate 0


def cosine(step: int) -> float:
    return 1e-3 * 0.5 * (1 + math.cos(math.pi * (step - 2) / 6))


RATES = {
    "linear": RAMP + [1e-3 * (8 - step) / 6 for step in range(2, 8)],
    "cosine": RAMP + [cosine(step) for step in range(2, 8)],
    "constant_with_warmup": RAMP + [1e-3] * 6,
    "constant": [1e-3] * 8,
}


@pytest.mark.parametrize("name", RATES)
def test_the_learning_rate_follows_the_schedule(name: str, fit: Fit) -> None:
    metrics = fit("adapter", *STEPS, f"train.scheduler={name}", "train.warmup_steps=2")
    assert figures(metrics, "learning_rate") == pytest.approx(RATES[name], abs=1e-9)


def test_arguments_reach_the_schedule(fit: Fit) -> None:
    """As transformers documents it: up from min_lr_ratio times the rate, stable, and down to that by a shape."""
    given = "{num_decay_steps: 4, min_lr_ratio: 0.5, decay_type: linear}"
    options = ("train.scheduler=warmup_stable_decay", f"train.scheduler_kwargs={given}", "train.warmup_steps=2")
    rates = figures(fit("adapter", *STEPS, *options), "learning_rate")
    assert rates == pytest.approx([5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3, 8.75e-4, 7.5e-4, 6.25e-4])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["train.scheduler=cosin"], r"train\.scheduler: .*cosin.* is not one of .*; did you mean cosine"),
        (["train.keep_best=perplexity"], r"train\.perplexity_steps: train\.keep_best=perplexity needs measurements"),
        (["train.patience=3"], r"train\.patience: without train\.keep_best there are no measurements"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(options: list[str], words: str, configure: Configure) -> None:
    with pytest.raises(UserError, match=words):
        configure(*options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["train.scheduler_kwargs={num_cycle: 3}", "train.scheduler=cosine_with_restarts"],
            "train.scheduler_kwargs: cosine_with_restarts has no argument num_cycle; its arguments: num_cycles",
        ),
        (
            ["train.scheduler=cosine_with_min_lr"],
            "train.scheduler_kwargs: cosine_with_min_lr does not work with them: ",
        ),
        (
            ["train.scheduler=warmup_stable_decay"],
            "train.scheduler_kwargs: warmup_stable_decay needs the argument num_decay_steps; its arguments: ",
        ),
        (
            ["train.scheduler=warmup_stable_decay", "train.scheduler_kwargs={num_decay_steps: ten}"],
            "train.scheduler_kwargs: warmup_stable_decay does not work with them: ",
        ),
        (
            ["train.scheduler=cosine_with_min_lr", "train.scheduler_kwargs={min_lr: 1}", "train.lr=1e-3"],
            "train.scheduler_kwargs: the learning rate of cosine_with_min_lr at step 3 is ",
        ),
        (
            ["train.scheduler=polynomial", "train.scheduler_kwargs={power: .nan}"],
            "train.scheduler_kwargs: the learning rate of polynomial at step 3 is nan; it must be between 0 and ",
        ),
        (
            ["train.optimizer=adafactor", "launch.strategy=fsdp"],
            "train.optimizer: adafactor needs the gradient of each matrix as a whole, but launch.strategy=fsdp",
        ),
        (
            ["train.optimizer=adafactor", "launch.strategy=zero3"],
            "train.optimizer: adafactor needs the gradient of each matrix as a whole, but launch.strategy=zero3",
        ),
        (
            ["train.scheduler=polynomial", "launch.strategy=zero3"],
            "train.scheduler: polynomial does not work with launch.strategy=zero3",
        ),
        (
            ["train.keep_best=eval_loss", "train.eval_steps=2", "train.data.val_size=0"],
            "train.keep_best: no example is held out for eval_loss; set train.data.val_size",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_training(
    options: list[str], words: str, configure: Configure, llama: Path
) -> None:
    assert words in problems(configure(*options), llama)


def test_adamw_8bit_needs_bitsandbytes(configure: Configure, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find(name))
    found = problems(configure("train.optimizer=adamw_8bit"), llama)
    assert "train.optimizer: adamw_8bit needs bitsandbytes, which is not installed; pip install bitsandbytes" in found


def test_a_key_without_effect_is_named(configure: Configure, llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not problems(configure("train.scheduler=constant", "train.warmup_steps=2"), llama)
    assert "train.warmup_steps: no effect with train.scheduler=constant; constant_with" in capsys.readouterr().err
    assert not problems(configure("train.warmup_ratio=0.1", "train.warmup_steps=2"), llama)
    assert "warning: train.warmup_ratio: no effect with train.warmup_steps\n" in capsys.readouterr().err
    assert not problems(configure("train.max_steps=3", "train.warmup_steps=3", "train.lr=3e-3"), llama)
    never = (
        "warning: train.lr (0.003) is never reached: the highest learning rate of linear with 3 warm-up steps of 3 is "
    )
    assert f"{never}0.002\n" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "betas"), [([], (0.9, 0.999)), (["train.adam_beta1=0.5"], (0.5, 0.999))])
@pytest.mark.parametrize("second", [None, 0.95])
def test_adamw_by_hand(
    options: list[str], betas: tuple[float, float], second: float | None, configure: Configure
) -> None:
    """Two steps: the means of gradients and squares decay with the betas, and are corrected for the start."""
    options = [*options, *([] if second is None else [f"train.adam_beta2={second}"])]
    first, other = betas[0], second or betas[1]
    train = configure("train.lr=0.1", "train.weight_decay=0", *options).train
    weight, expected = torch.ones(2, requires_grad=True), torch.ones(2)
    optimizer = optimizers.make_optimizer(train, [weight])
    mean = square = torch.zeros(2)
    for step, gradient in enumerate([torch.tensor([1.0, -8.0]), torch.tensor([0.5, 2.0])], 1):
        weight.grad = gradient
        optimizer.step()
        mean = first * mean + (1 - first) * gradient
        square = other * square + (1 - other) * gradient**2
        expected = expected - 0.1 * mean / (1 - first**step) / ((square / (1 - other**step)).sqrt() + 1e-8)
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-5, atol=0)


def test_adafactor_by_hand(configure: Configure) -> None:
    """One step on a matrix: the second moment is the product of its row and column means."""
    train = configure("train.optimizer=adafactor", "train.lr=0.1", "train.weight_decay=0").train
    weight = torch.zeros(2, 2, requires_grad=True)
    weight.grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    optimizers.make_optimizer(train, [weight]).step()
    square = weight.grad**2
    rows, columns = square.mean(1, keepdim=True), square.mean(0, keepdim=True)
    update = weight.grad / (rows * columns / square.mean()).sqrt()
    update /= max(1.0, float(update.square().mean().sqrt()))  # clipped to a root mean square of 1
    torch.testing.assert_close(weight.detach(), -0.1 * update, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["spp", "masked_full"])
@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_a_resumed_training_ends_with_the_same_adapter(name: str, method: str, fit: Fit) -> None:
    options = [f"train.optimizer={name}", f"train.method={method}", "train.scheduler=cosine", "train.warmup_steps=2"]
    options += ["train.max_steps=6", "train.save_steps=2", *(["train.dropout=0.1"] if method == "spp" else [])]
    fit("whole", *options)
    with cut_after(5):
        fit("cut", *options)
    fit("cut", *options)
    assert fit.adapter("cut") == fit.adapter("whole")


def test_the_optimizer_matters(fit: Fit) -> None:
    options = ("train.max_steps=3", "train.dropout=0")
    fit("adamw", *options)
    fit("adafactor", *options, "train.optimizer=adafactor")
    assert fit.adapter("adamw") != fit.adapter("adafactor")
