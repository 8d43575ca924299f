"""How a training is divided between GPUs: the strategies that it accepts, and what each GPU holds under them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sppctl.config.settings import Config
from sppctl.errors import Problems
from sppctl.model.blocks import Skeleton
from sppctl.model.targets import Target
from sppctl.plan import footprint
from sppctl.train import optimizers, refresh, scope

Strategy = Literal["ddp", "fsdp", "zero3"]
STRATEGIES: tuple[Strategy, ...] = ("ddp", "fsdp", "zero3")
WHOLE = ("ste",)  # methods whose matrices cannot be sharded, see the checks of sppctl.train.stage


@dataclass(frozen=True)
class OnGpu:
    """Bytes on each of several GPUs, and the sizes of GPU (in GB) that have room for the total."""

    gpus: int
    strategy: str
    gradient_checkpointing: bool
    weights: int
    training_state: int
    activations_peak: int
    total: int
    fits_gb: list[int]


def check(config: Config, skeleton: Skeleton, targets: Mapping[str, Target], processes: int) -> None:
    """Raises UserError if training refuses ``launch.strategy``; ``targets`` are trained by so many processes."""
    problems = Problems()
    problems.lines += _refusals(config, skeleton, targets, config.launch.strategy, processes)
    problems.raise_all()


def possible(
    config: Config, skeleton: Skeleton, targets: Mapping[str, Target], gpus: int, packed: bool
) -> Sequence[str]:
    """The strategies that training accepts on several GPUs; packed weights are never sharded."""
    if gpus == 1 or packed:
        return ("ddp",)
    return [name for name in STRATEGIES if not _refusals(config, skeleton, targets, name, gpus)]


def _refusals(
    config: Config, skeleton: Skeleton, targets: Mapping[str, Target], strategy: Strategy, processes: int
) -> list[str]:
    """The problems of training under a strategy that it does not have under ``ddp``, one per line.

    What is missing on this machine, such as a library, is the same under both.
    """

    def under(name: Strategy) -> list[str]:
        launch = replace(config.launch, strategy=name, num_processes=processes, num_machines=1)
        return _problems(replace(config, launch=launch), skeleton, targets)

    under_ddp = under("ddp")
    return [line for line in under(strategy) if line not in under_ddp]


def _problems(config: Config, skeleton: Skeleton, targets: Mapping[str, Target]) -> list[str]:
    """Training's checks of optimizer, schedule, teacher, mask refresh and method."""
    problems, method, strategy = Problems(), config.train.method, config.launch.strategy
    with problems:
        optimizers.check(config, problems)
    with problems:
        scope.check_teacher(config)
    with problems:
        refresh.check(config, skeleton, targets, problems)
    if method in WHOLE and strategy != "ddp":
        problem = f"{method} selects masks on full matrices, but launch.strategy={strategy} shards them"
        problems.add("train.method", problem, "use ddp")
    return problems.lines


def on_gpus(gpus: int, strategy: str, share: int, state: int, peaks: Mapping[bool, int]) -> Iterator[OnGpu]:
    """What each GPU holds, by gradient checkpointing; ``peaks``: of all that a step adds to weights and state."""
    for checkpointing, peak in peaks.items():
        total = share + state + peak
        yield OnGpu(gpus, strategy, checkpointing, share, state, peak, total, footprint.fits(total))


def shares(
    weights: int, outside: int, block: int, adapter: int, optimizer: int, gpus: int, strategy: str
) -> tuple[int, int]:
    """Bytes of weights, and of adapter, gradients and optimizer, on each of several GPUs.

    ddp: all of them, and the gradients again in the buckets that are reduced. fsdp and zero3: a share of everything,
    and unsharded what is in use: embeddings and head (``outside``), the running block and the next.
    """
    if strategy == "ddp":
        return weights, (2 if gpus == 1 else 3) * adapter + optimizer
    return weights // gpus + outside + 2 * block, (2 * adapter + optimizer) // gpus
