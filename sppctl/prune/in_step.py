"""Micro-batches that go through a block in step: each waits at a layer until the others have come as far.

A forward cannot be left and entered again, so each runs on a stack of its own (a greenlet). All are on one thread: a
thread each would bring its own pool of OpenMP workers and its own memory arena, a fifth of a forward in all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from greenlet import getcurrent, greenlet


class _Stop(NamedTuple):
    """Where a work waits."""

    work: greenlet
    place: int
    brought: Any


@torch.no_grad()
def in_step(works: list[Callable[[], None]], serve: Callable[[int, list[Any]], None]) -> None:
    """Runs every work from one :func:`wait_at` to the next until all are done.

    Args:
        works: forwards of the micro-batches, without gradients.
        serve: called, when every work that is not done waits, with the first place where some do (the smallest number)
            and what those brought there, in the order of ``works``; then they go on.

    Raises:
        Exception: the first that a work or ``serve`` raises; all other works are ended where they wait.
    """
    walkers = [greenlet(work) for work in works]
    try:
        stops = [stop for walker in walkers if (stop := _go_on(walker))]
        while stops:
            place = min(stop.place for stop in stops)
            serve(place, [stop.brought for stop in stops if stop.place == place])
            stops = [after for stop in stops if (after := _go_on(stop.work) if stop.place == place else stop)]
    finally:
        for walker in walkers:
            if walker and not walker.dead:
                walker.throw()


def wait_at(place: int, brought: Any) -> None:
    """Called inside a work: stops it until this place was served."""
    caller = getcurrent().parent
    assert caller is not None
    caller.switch((place, brought))


def _go_on(walker: greenlet) -> _Stop | None:
    """Runs a work to its next stop, or to its end: None then."""
    reached = walker.switch()
    return None if walker.dead else _Stop(walker, *reached)
