"""The processes of one job: ranks, collectives, and work for one process only. A single process needs none of it."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar

from sppctl.errors import StageError, UserError

if TYPE_CHECKING:
    import torch
T = TypeVar("T")


def rank() -> int:
    """Rank of this process; 0 is the one that writes."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Number of processes on this machine; if that is unknown (srun), of all machines."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0


def connect(device: torch.device) -> None:
    """Joins the other processes: gloo on the CPU, NCCL on GPUs; at most once."""
    if world_size() > 1 and not is_connected():
        if device.type == "cuda":
            import torch

            torch.cuda.set_device(device)
            if device.index is not None:  # accelerate and DeepSpeed take it for the number of a visible GPU
                os.environ["LOCAL_RANK"] = str(device.index)
        # a long timeout: one process may unpack, tokenise or write while the others wait
        backend = "nccl" if device.type == "cuda" else "gloo"
        _torch().init_process_group(backend, timeout=timedelta(hours=2))


def is_connected() -> bool:
    """Whether this process has joined the others; from then on, an error may occur in one process only."""
    return world_size() > 1 and bool(_torch().is_initialized())


def exit_now(code: int) -> NoReturn:
    """Ends a process that has joined the others, after running Python's exit handlers.

    Backend threads that still run while C++ destroys its objects sometimes abort the process (SIGABRT), which would
    replace its exit code.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def leave() -> bool:
    """Ends the work in several processes, or before they are connected prevents it; the first continues alone.

    Returns:
        Whether this is the first.
    """
    if world_size() == 1:
        return True
    if is_connected():
        _torch().barrier()
        _torch().destroy_process_group()
    if not is_main():
        return False
    for name in ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK"):  # libraries would join the others by any
        os.environ.pop(name, None)
    return True


def barrier() -> None:
    """Waits for the other processes."""
    if is_connected():
        _torch().barrier()


def await_others() -> None:
    """Waits at the end of a process for that of the others, after an error that all of them raise.

    A launcher ends all processes a few seconds after the first one, but another may still send its metrics to W&B.
    """
    with suppress(RuntimeError):  # one of them is gone
        barrier()


@contextmanager
def first_process_first() -> Iterator[None]:
    """Runs the body in the first process, then in the others, which find its results in a cache."""
    if not is_main():
        barrier()
    try:
        yield
    finally:
        if is_main():
            barrier()


def all_reduce_sum(*tensors: torch.Tensor) -> None:
    """Replaces each tensor by its sum over the processes."""
    if world_size() > 1:
        for tensor in tensors:
            _torch().all_reduce(tensor)


def summed(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The sum of a CPU tensor over the processes; computed on ``device``, because NCCL sums on GPUs only."""
    if world_size() == 1:
        return tensor
    shared = tensor.to(device)
    all_reduce_sum(shared)
    return shared.cpu()


class Counted(Protocol):
    """Sums over tokens, and the number of tokens."""

    num_tokens: int

    def totals(self) -> Sequence[torch.Tensor]:
        """The sums, to be changed in place."""


def all_reduce_counted(statistics: Counted) -> None:
    """Replaces sums and number of tokens by those of all processes."""
    if world_size() > 1:
        import torch

        totals = statistics.totals()
        count = torch.tensor(statistics.num_tokens, device=totals[0].device)
        all_reduce_sum(count, *totals)
        statistics.num_tokens = int(count)


def all_reduce_max(tensor: torch.Tensor) -> None:
    """Replaces a tensor by its maximum over the processes."""
    if world_size() > 1:
        _torch().all_reduce(tensor, _torch().ReduceOp.MAX)


def broadcast(tensor: torch.Tensor, source: int) -> None:
    """Overwrites a tensor with the one of process ``source``."""
    if world_size() > 1:
        _torch().broadcast(tensor, source)


def broadcast_from_cpu(tensor: torch.Tensor, source: int) -> None:
    """As :func:`broadcast`, for a tensor on the CPU, which NCCL cannot send."""
    on_device = tensor.cuda() if world_size() > 1 and _torch().get_backend() == "nccl" else tensor
    broadcast(on_device, source)
    if on_device is not tensor:
        tensor.copy_(on_device)


def first_known(value: T | None) -> T | None:
    """The (small) value of the first process whose value is not None, in all processes; None if all are None."""
    return next((gathered for gathered in gather_objects(value) if gathered is not None), None)


def broadcast_object(value: T, source: int) -> T:
    """The (small) value of process ``source``, in all processes."""
    values = [value]
    if world_size() > 1:
        _torch().broadcast_object_list(values, source)
    return values[0]


def gather_objects(value: T) -> list[T]:
    """The (small) values of all processes, by rank."""
    values = [value] * world_size()
    if world_size() > 1:
        _torch().all_gather_object(values, value)
    return values


def decide(choose: Callable[[], T], source: int = 0) -> T:
    """Calls ``choose`` in process ``source`` only; returns its result, or raises its error, in all processes."""
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


@contextmanager
def sharing_errors() -> Iterator[None]:
    """Marks an error of the body as shared if all processes raise the same one. All processes must run the body."""
    error: UserError | StageError | None = None
    try:
        yield
    except (UserError, StageError) as raised:
        error = raised
    texts = gather_objects(None if error is None else str(error)) if is_connected() else []
    if error is not None:
        error.shared = bool(texts) and set(texts) == {str(error)}
        raise error


def _torch() -> Any:
    """``torch.distributed``: a single process never imports it, so that commands start without torch."""
    import torch.distributed as dist

    return dist
