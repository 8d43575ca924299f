"""The terminal: the command line, notes and progress on stderr, results on stdout; and the log file of a run.

rich is imported only when something is drawn, so that ``--help`` stays fast.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any, TextIO

from sppctl import distributed
from sppctl.files import strict_json

BAR_WIDTH = 10
NUMBER_WIDTH = 12  # of a message's end: ``error 0.123``
PLAIN_SECONDS = 15  # between two lines of progress if stderr is not a terminal
SILENT_SECONDS = 1.0  # before a step without a bar is named, if stderr is not a terminal
_running: dict[Path, Sequence[str]] = {}  # CONFIG and KEY=VALUE of the running command, by its run directory


class Verbosity(Enum):
    """How much is printed on stderr; the log file has all of it, except the messages of libraries."""

    QUIET = "quiet"  # warnings and errors
    NORMAL = "normal"  # also notes and progress
    VERBOSE = "verbose"  # also the messages of libraries


verbosity = Verbosity.NORMAL


def note(message: str, stream: TextIO | None = None) -> None:
    """Prints a message for the user on stderr; of several processes only the first prints."""
    if distributed.is_main():
        _log.write(message)
        if verbosity is not Verbosity.QUIET:
            print(plain_lines(message), file=stream or sys.stderr, flush=True)


_is_warned = False  # by another command, of what is checked now


def warn(message: str) -> None:
    """Prints a warning on stderr."""
    if distributed.is_main() and not _is_warned:
        print_error(f"warning: {message}")


@contextmanager
def warned_before(is_warned: bool) -> Iterator[None]:
    """In its body no warning is printed if a command that makes the same checks has printed them."""
    global _is_warned
    before, _is_warned = _is_warned, is_warned
    try:
        yield
    finally:
        _is_warned = before


def print_error(message: str) -> None:
    """Prints a warning or an error of this process on stderr, whichever process it is."""
    _log.write(message)
    print(plain_lines(message), file=sys.stderr, flush=True)


def note_in_handler(message: str) -> None:
    """As :func:`note`, but for a signal handler, which must not use the buffered stream that it may interrupt."""
    if distributed.is_main():
        os.write(2, f"\n{message}\n".encode())


def note_interrupt() -> None:
    """Reports that Ctrl-C ended the command at once."""
    if distributed.is_main() and sys.stderr.isatty():
        print(file=sys.stderr)  # the terminal has written ^C
    note("interrupted; the same command continues or starts the stage again")


class _Log:
    """The log file of a run: lines with their times, kept in memory until the file is known."""

    def __init__(self) -> None:
        self._file: TextIO | None = None
        self._waiting: list[str] = []

    def write(self, message: str) -> None:
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        self._waiting += [f"{now} {plain(line)}\n" for line in message.split("\n")]
        if self._file is not None:
            lines, self._waiting = self._waiting, []
            with contextlib.suppress(OSError):  # a full disk must not end a command because of its log
                self._file.writelines(lines)
                self._file.flush()

    def open(self, path: Path | None) -> None:
        with contextlib.suppress(OSError):
            if self._file is not None:
                self._file.close()
            self._file = None
            self._file = None if path is None else path.open("a", encoding="utf-8")


_log = _Log()


def log_to(path: Path | None) -> None:
    """Appends the messages of this process to a file from now on; None: keeps them for the next file."""
    _log.open(path)


def log(message: str) -> None:
    """Writes a message to the log file only."""
    _log.write(message)


def plain(text: str) -> str:
    """Text for one line, with escapes for unprintable characters: line breaks, colours, cursor movements."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def plain_lines(text: str) -> str:
    """As :func:`plain`, but keeps line breaks."""
    return "\n".join(map(plain, text.split("\n")))


def _markup(text: object) -> str:
    """Escapes text for rich."""
    from rich.markup import escape

    return escape(plain(str(text)))


def command_line() -> str:
    """The command line of this process, to be pasted into a shell."""
    return shlex.join(["sppctl", *sys.argv[1:]])


def remember(run: str | Path | None, configuration: Sequence[str] = ()) -> None:
    """Keeps the CONFIG and KEY=VALUE with which the running command works on a run; None: on none."""
    _running.clear()
    if run is not None:
        _running[Path(run).resolve()] = configuration


def configuration(run: str | Path) -> str | None:
    """The CONFIG of the running command, if it works on this run and has one."""
    return next((text for text in _running.get(Path(run).resolve(), ()) if "=" not in text), None)


def command(name: str, *options: str, run: str | Path) -> str:
    """A sppctl command on a run, to suggest: can be pasted into a shell.

    It has the configuration of the running command if that works on this run, and otherwise the run directory.
    """
    return shlex.join(["sppctl", name, *(_running.get(Path(run).resolve()) or [str(run)]), *options])


@contextmanager
def working(label: str) -> Iterator[None]:
    """Names a step of unknown length, such as loading: a spinner on a terminal, otherwise a line if it takes long."""
    stream = sys.stderr  # the step may redirect it, to silence a library
    if stream.isatty() and distributed.is_main() and verbosity is not Verbosity.QUIET:
        from rich.console import Console

        with Console(file=stream).status(_markup(label)):
            yield
        return
    timer = threading.Timer(SILENT_SECONDS, note, [label, stream])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Progress:
    """A bar on a terminal; otherwise a line at the start and every few seconds. Use as a context manager.

    Args:
        label: name of the work.
        total: number of steps.
        start: steps that were done before; the time left is estimated from the others.
    """

    def __init__(self, label: str, total: int, start: int = 0) -> None:
        self.label, self.total, self.start, self.done = label, total, start, start
        self._bar: Any = None
        self._task: Any = None
        self._started = self._last = time.monotonic()

    def __enter__(self) -> Progress:
        if sys.stderr.isatty() and distributed.is_main() and verbosity is not Verbosity.QUIET:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(BAR_WIDTH),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[rate]}"),
                TextColumn("{task.fields[message]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("", total=self.total, completed=self.start, message="", rate="")
            self._draw("")
            self._bar.start()
        else:
            note(f"{self.label}: {self.done}/{self.total}")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _draw(self, message: str) -> None:
        """Updates the bar; where the terminal is narrow, names are shortened and numbers kept."""
        rate, elapsed = "", time.monotonic() - self._started
        if self.done > self.start and elapsed:
            seconds = elapsed / (self.done - self.start)
            minutes, rest = divmod(round(seconds * (self.total - self.done)), 60)
            rate = f"{seconds:.1f} s/step" if seconds >= 1 else f"{1 / seconds:.1f}/s"
            rate += f" {minutes // 60}:{minutes % 60:02}:{rest:02} left"
        counts = 2 * len(str(self.total)) + 1
        room = self._bar.console.width - BAR_WIDTH - counts - len("0:00:00") - len(rate) - 5  # spaces between columns
        label, message = fitted(plain(self.label), plain(message), room)
        shown = {"description": _markup(label), "message": _markup(message), "rate": rate}
        self._bar.update(self._task, completed=self.done, **shown)

    def advance(self, message: str = "", steps: int = 1) -> None:
        """Counts steps as done; ``message`` is about the last one, such as its loss."""
        self.done += steps
        if self._bar is not None:
            self._draw(message)
        now = time.monotonic()
        if now - self._last >= PLAIN_SECONDS or self.done >= self.total:
            self._last = now
            elapsed = now - self._started
            rate = elapsed / (self.done - self.start)
            left = f"{rate * (self.total - self.done):.0f} s left" if self.done < self.total else "done"
            line = f"{self.label}: {self.done}/{self.total}, {elapsed:.0f} s, {left}{', ' if message else ''}{message}"
            if self._bar is None:
                note(line)
            else:
                _log.write(line)


def fitted(label: str, message: str, room: int) -> tuple[str, str]:
    """Shortens the beginning of a message, whose number is at its end, and the end of a label, to fit a line.

    Args:
        label: name of the work.
        message: about its last step.
        room: characters for both.
    """
    left = max(room - len(label), min(NUMBER_WIDTH, room - NUMBER_WIDTH), 0)
    if len(message) > left:
        message = f"…{message[len(message) - left + 1 :]}" if left > 4 else ""
    room = max(room - len(message), 0)
    return label if len(label) <= room else f"{label[: max(room - 1, 0)]}…", message


def show_json(value: Any) -> None:
    """Prints a result as JSON, for programs."""
    print(strict_json.dumps(value, indent=2, default=str))


def show_table(title: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Prints a result as a table, for people; the first column is left-aligned, the others right-aligned."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=_markup(title), title_justify="left")
    for index, name in enumerate(header):
        table.add_column(_markup(name), justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(_markup, row))
    # not a terminal (a log, a pipe): wide enough that tables are rarely broken
    Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(table)


def show_texts(title: str, header: Sequence[str], texts: Sequence[str]) -> None:
    """Prints texts of several lines side by side."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=_markup(title), title_justify="left", expand=True)
    for name in header:
        table.add_column(_markup(name), overflow="fold", ratio=1)
    table.add_row(*("\n".join(map(_markup, text.strip().split("\n"))) for text in texts))
    Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(table)
