"""Micro-batches that go through a block in step: each waits at a layer until the others have come as far.

Their forwards live in threads because a forward cannot be left and entered again otherwise; only one of them, or the
caller, computes at any time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch


def in_step(works: list[Callable[[], None]], serve: Callable[[int, list[Any]], None]) -> None:
    """Runs every work from one :func:`wait_at` to the next until all are done.

    Args:
        works: forwards of the micro-batches.
        serve: called, when every work that is not done waits, with the first place where some do (the smallest number)
            and what those brought there, in the order of ``works``; then they go on.

    Raises:
        Exception: the first that a work or ``serve`` raises; all other works are left where they are.
    """
    walkers = [_Walker(work) for work in works]
    try:
        for walker in walkers:
            walker.go_on()
        while waiting := [walker for walker in walkers if walker.place is not None]:
            place = min(walker.place for walker in waiting if walker.place is not None)
            here = [walker for walker in waiting if walker.place == place]
            serve(place, [walker.brought for walker in here])
            for walker in here:
                walker.go_on()
    finally:
        for walker in walkers:
            walker.give_up()


def wait_at(place: int, brought: Any) -> None:
    """Called inside a work: stops it until this place was served."""
    walker = threading.current_thread()
    assert isinstance(walker, _Walker)
    walker.wait(place, brought)


class _Walker(threading.Thread):
    """One work, and where it waits."""

    def __init__(self, work: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.work = work
        self.place: int | None = None
        self.brought: Any = None
        self._error: BaseException | None = None
        self._given_up = False
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)

    def run(self) -> None:
        """The thread."""
        try:
            with torch.no_grad():  # every thread has a mode of its own
                self.work()
        except _GivenUpError:
            pass
        except BaseException as error:  # for the caller, who waits in go_on
            self._error = error
        self._stopped.release()

    def wait(self, place: int, brought: Any) -> None:
        """In the thread: hands over to the caller until :meth:`go_on`."""
        self.place, self.brought = place, brought
        self._stopped.release()
        self._go.acquire()
        if self._given_up:
            raise _GivenUpError

    def go_on(self) -> None:
        """In the caller: runs the work to its next stop, or to its end."""
        self.place = self.brought = None
        if self.ident is None:
            self.start()
        else:
            self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error

    def give_up(self) -> None:
        """In the caller: ends the thread at its next stop."""
        self._given_up = True
        self._go.release()
        if self.ident is not None:
            self.join()


class _GivenUpError(Exception):
    """Leaves a forward that nobody waits for."""
