"""Optimizers and learning-rate schedules, under the names that they have in transformers."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import Adafactor, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import SchedulerType

from sppctl import console
from sppctl.config.settings import Config, TrainConfig
from sppctl.errors import Problems, UserError, first_line
from sppctl.model import checkpoint
from sppctl.train import scope

# arguments of the schedules that are not train.scheduler_kwargs
_STEPS = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
# schedules that read the initial learning rate from the optimizer, where DeepSpeed's has none
_READ_RATE = ("polynomial", "cosine_with_min_lr", "cosine_warmup_with_min_lr")


def make_optimizer(train: TrainConfig, parameters: Iterable[Tensor]) -> Optimizer:
    """The optimizer of float32 parameters; checked by :func:`check`."""
    if train.optimizer == "adafactor":  # with the learning rate of our schedule, as transformers' Trainer uses it
        fixed = {"scale_parameter": False, "relative_step": False}
        return Adafactor(list(parameters), lr=train.lr, weight_decay=train.weight_decay, **fixed)
    betas = (train.adam_beta1, train.adam_beta2)
    if train.optimizer == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        optimizer: Optimizer = AdamW8bit(parameters, lr=train.lr, betas=betas, weight_decay=train.weight_decay)
        return optimizer
    return torch.optim.AdamW(parameters, lr=train.lr, betas=betas, weight_decay=train.weight_decay, fused=True)


def make_schedule(train: TrainConfig, optimizer: Optimizer, max_steps: int) -> LambdaLR:
    """The learning-rate schedule of a training of ``max_steps`` optimizer steps."""
    warmup, more = scope.num_warmup_steps(train, max_steps), dict(train.scheduler_kwargs)
    schedule: LambdaLR = get_scheduler(train.scheduler, optimizer, warmup, max_steps, more)
    return schedule


def check(config: Config, problems: Problems) -> None:
    """Adds what the installation, the device or the strategy does not allow to ``problems``."""
    train = config.train
    with problems:
        scope.check_optimizer(config)
    if train.optimizer == "adamw_8bit":
        if importlib.util.find_spec("bitsandbytes") is None:
            fix = "pip install bitsandbytes, or use adamw or adafactor"
            problems.add("train.optimizer", "adamw_8bit needs bitsandbytes, which is not installed", fix)
        elif checkpoint.pick_device(config.model.device).type != "cuda":
            problems.add("train.optimizer", "adamw_8bit needs a GPU", "use adamw or adafactor")
    if config.launch.strategy == "zero3" and train.scheduler in _READ_RATE:
        problem = f"{train.scheduler} does not work with launch.strategy=zero3"
        problems.add("train.scheduler", problem, "use linear or cosine, or launch.strategy=fsdp")


def check_schedule(train: TrainConfig, max_steps: int) -> None:
    """Checks the learning rates of a training of ``max_steps`` optimizer steps; warns if all are below ``train.lr``.

    Raises:
        UserError: the schedule does not accept ``train.scheduler_kwargs``, or a rate is not between 0 and ``train.lr``.
    """
    function: Any = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(train.scheduler)]
    accepted = {
        name: parameter.default for name, parameter in signature(function).parameters.items() if name not in _STEPS
    }
    key, fix = "train.scheduler_kwargs", f"its arguments: {', '.join(accepted) or 'none'}"
    for name in train.scheduler_kwargs.keys() - accepted.keys():
        raise UserError(key, f"{train.scheduler} has no argument {name}", fix)
    for name, default in accepted.items():
        if default is Parameter.empty and name not in train.scheduler_kwargs:
            raise UserError(key, f"{train.scheduler} needs the argument {name}", fix)
    try:
        factor = make_schedule(train, SGD([torch.zeros(1)], lr=train.lr), max_steps).lr_lambdas[0]
        factors = [factor(step) for step in range(max_steps)]
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(key, f"{train.scheduler} does not work with them: {first_line(error)}", fix) from error
    for step, share in enumerate(factors, 1):
        if not 0 <= share <= 1 + 1e-9:  # NaN is neither
            problem = f"the learning rate of {train.scheduler} at step {step} is {share * train.lr:.3g}"
            raise UserError(key, problem, f"it must be between 0 and train.lr ({train.lr:.3g})")
    if max(factors) < 1 - 1e-9:
        warmup = scope.num_warmup_steps(train, max_steps)
        console.warn(
            f"train.lr ({train.lr:.3g}) is never reached: the highest learning rate of {train.scheduler} with "
            f"{warmup} warm-up steps of {max_steps} is {max(factors) * train.lr:.3g}"
        )
