"""The processes of one job: who am I, sums over all, one does what only one may do. Without torchrun all is trivial."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn, Protocol, TypeVar

from sppctl.errors import StageError, UserError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


def rank() -> int:
    """Number of this process, 0 for the one that writes."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Number of processes on this machine; where nobody says so (srun), all may be here."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def is_main() -> bool:
    """Whether this process is the one that writes and talks."""
    return rank() == 0


def connect(device: torch.device) -> None:
    """Joins the other processes: gloo on the CPU, NCCL on GPUs; at most once."""
    import torch.distributed as dist

    if world_size() > 1 and not dist.is_initialized():
        backend = "gloo"
        if device.type == "cuda":
            import torch

            torch.cuda.set_device(device)
            backend = "nccl"
        # one process may unpack, tokenise or write for long while the others wait
        dist.init_process_group(backend, timeout=timedelta(hours=2))


def is_connected() -> bool:
    """Whether this process has joined the others: what it meets from then on they need not meet alike."""
    if world_size() == 1:
        return False  # without torch
    import torch.distributed as dist

    return dist.is_initialized()


def exit_now(code: int) -> NoReturn:
    """Ends a process that has joined the others, after what Python has registered for its end.

    Threads of the backends that still run when C++ tears its objects down abort the process (SIGABRT) now and then,
    whatever its exit code should have been.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def leave() -> bool:
    """The end of the work in several processes: the first goes on alone, the others have nothing left to do.

    Returns:
        Whether this process is the one that goes on.
    """
    import torch.distributed as dist

    if world_size() == 1:
        return True
    dist.barrier()
    dist.destroy_process_group()
    if not is_main():
        return False
    del os.environ["WORLD_SIZE"], os.environ["RANK"]
    return True


def barrier() -> None:
    """Waits for the others."""
    import torch.distributed as dist

    if is_connected():
        dist.barrier()


@contextmanager
def first_process_first() -> Iterator[None]:
    """The first process does what is inside, then the others, who find in a cache what it has made."""
    if not is_main():
        barrier()
    try:
        yield
    finally:
        if is_main():
            barrier()


def all_reduce_sum(*tensors: torch.Tensor) -> None:
    """Replaces each tensor by its sum over the processes."""
    import torch.distributed as dist

    if world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


class Counted(Protocol):
    """Sums over tokens, and how many these are."""

    num_tokens: int

    def totals(self) -> Sequence[torch.Tensor]:
        """The sums, to be changed in place."""


def all_reduce_counted(statistics: Counted) -> None:
    """Replaces sums and number of tokens by those of all processes."""
    import torch

    if world_size() > 1:
        totals = statistics.totals()
        count = torch.tensor(statistics.num_tokens, device=totals[0].device)
        all_reduce_sum(count, *totals)
        statistics.num_tokens = int(count)


def all_reduce_max(tensor: torch.Tensor) -> None:
    """Replaces a tensor by its maximum over the processes."""
    import torch.distributed as dist

    if world_size() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)


def broadcast(tensor: torch.Tensor, source: int) -> None:
    """Overwrites a tensor with that of process ``source``."""
    import torch.distributed as dist

    if world_size() > 1:
        dist.broadcast(tensor, source)


def first_known(value: T | None) -> T | None:
    """The small value of the first process that has one, known to all; None where none has."""
    return next((found for found in gather_objects(value) if found is not None), None)


def broadcast_object(value: T, source: int) -> T:
    """The small value that process ``source`` has."""
    import torch.distributed as dist

    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, source)
    return values[0]


def decide(choose: Callable[[], T], source: int = 0) -> T:
    """What process ``source`` finds, known to all; an error that it meets ends all of them alike."""
    if not is_connected():
        return choose()
    outcome: T | UserError | StageError | None = None
    if rank() == source:
        try:
            outcome = choose()
        except (UserError, StageError) as error:
            outcome = error
    outcome = broadcast_object(outcome, source)
    if isinstance(outcome, UserError | StageError):
        outcome.shared = True
        raise outcome
    return outcome  # type: ignore[return-value]


def gather_objects(value: T) -> list[T]:
    """The small values of all processes, in their order."""
    import torch.distributed as dist

    if world_size() == 1:
        return [value]
    values: list[T] = [value] * world_size()
    dist.all_gather_object(values, value)
    return values
