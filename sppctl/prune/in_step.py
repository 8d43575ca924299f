"""Micro-batches that go through a block in step: each waits at a layer until the others have come as far.

A forward cannot be left and entered again, so each runs on a stack of its own (a greenlet). All are on one thread: a
thread each would bring its own pool of OpenMP workers and its own memory arena, a fifth of a forward in all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from greenlet import getcurrent, greenlet


@torch.no_grad()
def in_step(works: list[Callable[[], None]], serve: Callable[[int, list[Any]], None]) -> None:
    """Runs every work from one :func:`wait_at` to the next until all are done.

    Args:
        works: forwards of the micro-batches, without gradients.
        serve: called, when every work that is not done waits, with the first place where some do (the smallest number)
            and what each of those brought there (a tuple), in the order of ``works``; then they continue.

    Raises:
        Exception: the first that a work or ``serve`` raises; all other works are ended where they wait.
    """
    walkers = [greenlet(work) for work in works]
    try:
        stops = {walker: walker.switch() for walker in walkers}
        while stops := {walker: stop for walker, stop in stops.items() if not walker.dead}:
            first = min(place for place, _ in stops.values())
            waiting = [walker for walker, (place, _) in stops.items() if place == first]
            serve(first, [stops[walker][1] for walker in waiting])
            for walker in waiting:
                stops[walker] = walker.switch()
    finally:
        for walker in walkers:
            if walker:  # started, and not at its end
                walker.throw()


def wait_at(place: int, *brought: Any) -> None:
    """Called inside a work: stops it until this place was served."""
    caller = getcurrent().parent
    assert caller is not None
    caller.switch((place, brought))
