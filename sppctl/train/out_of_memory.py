"""A training that runs out of memory: one line with what it was given, what is planned for that, and what helps."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from sppctl.config.settings import Config
from sppctl.errors import StageError
from sppctl.train.checkpoints import rest

# cuBLAS, NCCL and the CPU's allocator raise plain RuntimeErrors
_WORDS = re.compile(r"out of memory|can't allocate memory|not enough memory|alloc_failed", re.IGNORECASE)


@contextlib.contextmanager
def explained(config: Config, checkpoints: Path, planned: Callable[[], int | None]) -> Iterator[None]:
    """Turns what libraries raise inside when memory runs out into an error for people.

    Args:
        config: of the training.
        checkpoints: the folder of its checkpoints, which stay.
        planned: estimates the bytes that it needs on each device.

    Raises:
        StageError: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        known = isinstance(error, MemoryError | torch.OutOfMemoryError) or _WORDS.search(str(error))
        if isinstance(error, StageError) or not known:
            raise
        raise StageError(_message(config, checkpoints, planned(), str(error))) from error


def _message(config: Config, checkpoints: Path, planned: int | None, reason: str) -> str:
    train = config.train
    wanted = re.search(r"tried to allocate ([\d.,]+ ?\w+)", reason, re.IGNORECASE)
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
        f"{change}; {rest(checkpoints)}"
    )
