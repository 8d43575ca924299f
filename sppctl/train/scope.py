"""Which layers are trained, for how many steps, by which optimizer, in which dtypes: for training and its plan."""

from __future__ import annotations

import math

from sppctl.config.settings import Config, TrainConfig
from sppctl.errors import Problems, UserError
from sppctl.model.blocks import Skeleton
from sppctl.model.targets import Target

PACKED_METHODS = ("spp", "masked_lora")  # which read a packed weight, a few rows at a time


def cannot_pack(config: Config, processes: int) -> Problems:
    """What forbids training on packed weights; empty: nothing."""
    problems, method, strategy = Problems(), config.train.method, config.launch.strategy
    if method not in PACKED_METHODS:
        problem = f"{method} needs dense weights; only {' and '.join(PACKED_METHODS)} read packed ones"
        problems.add("model.weights", problem, "set it to dense")
    if processes > 1 and strategy != "ddp":
        problem = f"launch.strategy={strategy} shards dense weights, and would leave packed ones whole on each device"
        problems.add("model.weights", problem, "set launch.strategy=ddp, or model.weights=dense")
    return problems


def adapted(config: Config, skeleton: Skeleton) -> dict[str, Target]:
    """The linear layers that are trained, by name.

    Raises:
        UserError: there are none, or the rank is too large for one: each row of SPP's alpha serves at least one output
            row. A low-rank product may have any rank.
    """
    train, prune = config.train, config.prune
    if train.targets == "pruned":
        selected = skeleton.targets(prune.targets, prune.skip)
    else:
        selected = skeleton.targets(train.targets, key="train.targets")
    targets = {name: target for name, target in selected.items() if target.is_linear}
    if not targets:
        raise UserError("train.targets", "none of these is an nn.Linear layer, the only kind that sppctl trains")
    for name, target in targets.items():
        if train.method == "spp" and train.rank > target.out_features:
            raise UserError("train.rank", f"{train.rank} exceeds the {target.out_features} output features of {name}")
    return targets


def num_steps(train: TrainConfig, examples: int) -> int:
    """Optimizer steps of a training on a number of examples."""
    return train.max_steps or math.ceil(train.epochs * math.ceil(examples / train.batch_size))


def num_warmup_steps(train: TrainConfig, steps: int) -> int:
    """Optimizer steps of the warm-up of a training of so many."""
    if train.warmup_steps is not None:
        return train.warmup_steps
    return math.ceil(train.warmup_ratio * steps)


def check_optimizer(config: Config) -> None:
    """Raises UserError if the strategy shards what the optimizer needs as a whole."""
    optimizer, strategy = config.train.optimizer, config.launch.strategy
    if optimizer != "adamw" and strategy != "ddp":
        problem = f"{optimizer} needs the gradient of each matrix as a whole, but launch.strategy={strategy} shards it"
        raise UserError("train.optimizer", problem, "use adamw, or launch.strategy=ddp")


def check_teacher(config: Config) -> None:
    """Raises UserError if the strategy would shard the teacher."""
    if config.train.distill.teacher is not None and config.launch.strategy == "zero3":
        raise UserError("train.distill.teacher", "launch.strategy=zero3 would shard the teacher", "use fsdp")


def check_dtype(config: Config) -> None:
    """Raises UserError if training would compute in float16."""
    if config.model.compute_dtype == "float16":
        raise UserError("model.compute_dtype", "float16 gradients overflow", "train in bfloat16, float32 or auto")
