"""A training that runs out of memory: one line with its settings, the planned memory, and the fix."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from sppctl import distributed
from sppctl.config.settings import Config
from sppctl.errors import StageError
from sppctl.train import scope
from sppctl.train.checkpoints import resume_advice

# cuBLAS, NCCL, mapped files and the CPU's allocator raise plain RuntimeErrors
_MESSAGES = re.compile(r"out of memory|can(?:'t|not) allocate memory|not enough memory|alloc_failed", re.IGNORECASE)


@contextlib.contextmanager
def explained(
    config: Config, checkpoints: Path, planned: Callable[[], int | None], *, packed: bool = False
) -> Iterator[None]:
    """Turns the out-of-memory errors of libraries into a StageError with a fix.

    ``planned`` estimates the bytes that the training needs on each device; ``packed``: the weights are packed already.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        is_out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or _MESSAGES.search(str(error))
        if isinstance(error, StageError) or not is_out_of_memory:
            raise
        train, estimate = config.train, planned()
        request = re.search(r"tried to allocate ([\d.,]+ ?\w+)", str(error), re.IGNORECASE)
        amount = f" (tried to allocate {request[1]})" if request else ""
        plan = (
            "" if estimate is None else f", for which sppctl plan estimates {estimate / 2**30:.2f} GiB on each device"
        )
        fixes = ["lower train.micro_batch_size"] if train.micro_batch_size > 1 else []
        fixes += [] if train.gradient_checkpointing else ["set train.gradient_checkpointing=true"]
        if not packed and not scope.cannot_pack(config, distributed.world_size()).lines:
            fixes.append("set model.weights=packed")
        change = "lower train.data.seq_len, or split the weights (launch.strategy=fsdp)"
        if fixes:
            *most, last = fixes
            change = f"{', '.join(most)} or {last}, which do not" if most else f"{last}, which does not"
            change += " change the result"
        raise StageError(
            f"out of memory{amount} with train.micro_batch_size={train.micro_batch_size} and "
            f"train.gradient_checkpointing={str(train.gradient_checkpointing).lower()}{plan}; {change}; "
            f"{resume_advice(checkpoints)}"
        ) from error
