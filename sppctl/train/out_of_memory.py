"""A training that runs out of memory: one line with what it was given, what is planned for that, and what helps."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from sppctl import distributed
from sppctl.config.settings import Config
from sppctl.errors import StageError, UserError
from sppctl.plan import run as plan
from sppctl.train import resume

# cuBLAS, NCCL and the CPU's allocator raise plain RuntimeErrors
_WORDS = re.compile(r"out of memory|can't allocate memory|not enough memory|alloc_failed", re.IGNORECASE)


@contextlib.contextmanager
def explained(config: Config, checkpoints: Path) -> Iterator[None]:
    """Turns what libraries raise inside when memory runs out into an error for people.

    Args:
        config: of the training.
        checkpoints: the folder of its checkpoints, which stay.

    Raises:
        StageError: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        known = isinstance(error, MemoryError | torch.OutOfMemoryError) or _WORDS.search(str(error))
        if isinstance(error, StageError) or not known:
            raise
        raise StageError(_message(config, checkpoints, str(error))) from error


def _message(config: Config, checkpoints: Path, reason: str) -> str:
    train = config.train
    wanted = re.search(r"tried to allocate ([\d.,]+ ?\w+)", reason, re.IGNORECASE)
    planned = planned_bytes(config)
    helps = ["lower train.micro_batch_size"] if train.micro_batch_size > 1 else []
    helps += [] if train.gradient_checkpointing else ["set train.gradient_checkpointing=true"]
    change = (
        f"{' or '.join(helps)}, which change no result"
        if helps
        else "lower train.data.seq_len, or split the weights (launch.strategy=fsdp)"
    )
    return (
        f"out of memory{f' (tried to allocate {wanted[1]})' if wanted else ''} with train.micro_batch_size="
        f"{train.micro_batch_size} and train.gradient_checkpointing={str(train.gradient_checkpointing).lower()}"
        f"{'' if planned is None else f', for which sppctl plan estimates {planned / 2**30:.2f} GiB on each device'}; "
        f"{change}; {resume.rest(checkpoints)}"
    )


def planned_bytes(config: Config) -> int | None:
    """The memory of each device that is planned for a training in the processes that there are; None: not known."""
    processes, train = distributed.world_size(), config.train
    launch = replace(config.launch, num_processes=processes, num_machines=1)
    here = (processes, launch.strategy if processes > 1 else "ddp", train.gradient_checkpointing)
    with contextlib.suppress(UserError):
        for entry in plan.execute(replace(config, launch=launch))["memory"]["per_gpu"]:
            if (entry["gpus"], entry["strategy"], entry["gradient_checkpointing"]) == here:
                return int(entry["total"])
    return None
