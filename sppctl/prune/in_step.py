"""Micro-batches that go through a block in step: each waits at a layer until the others have reached it.

Those of other processes, too: what serves a layer adds up their sums.

A forward cannot be suspended, so each runs on its own stack (a greenlet). All run in one thread: with a thread each,
their pools of OpenMP workers and memory arenas would cost a fifth of a forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from greenlet import getcurrent, greenlet

from sppctl import distributed


@torch.no_grad()
def in_step(forwards: list[Callable[[], None]], serve: Callable[[int, list[Any]], None]) -> None:
    """Runs every forward from one :func:`wait_at` to the next until all are done.

    Args:
        forwards: of the micro-batches, without gradients.
        serve: called when every unfinished forward waits, with the first place where some do (the smallest number) and
            the arguments that each of those passed there (a tuple), in the order of ``forwards``; then they continue.
            Called in every process for that place, if need be without arguments.

    Raises:
        Exception: the first that a forward or ``serve`` raises; all other forwards are ended where they wait.
    """
    greenlets = [greenlet(forward) for forward in forwards]
    try:
        stops = {waiter: waiter.switch() for waiter in greenlets}
        while True:
            stops = {waiter: stop for waiter, stop in stops.items() if not waiter.dead}
            places = distributed.gather_objects(min((place for place, _ in stops.values()), default=None))
            first = min((place for place in places if place is not None), default=None)
            if first is None:
                break
            waiting = [waiter for waiter, (place, _) in stops.items() if place == first]
            serve(first, [stops[waiter][1] for waiter in waiting])
            for waiter in waiting:
                stops[waiter] = waiter.switch()
    finally:
        for waiter in greenlets:
            if waiter:  # started, and not at its end
                waiter.throw()


def wait_at(place: int, *arguments: Any) -> None:
    """Called inside a forward: stops it until this place has been served."""
    caller = getcurrent().parent
    assert caller is not None
    caller.switch((place, arguments))
