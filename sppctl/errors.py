"""The error classes of sppctl with their exit codes, and a collector that turns several problems into one error."""

from __future__ import annotations

import contextlib
import difflib
import signal
from collections.abc import Iterable, Iterator, Mapping


class UserError(ValueError):
    """Wrong usage, configuration or input, detected before anything expensive; exit code 2.

    Its text is one line, ``key: problem; fix``. An error with several problems has a line for each, and no key.
    """

    exit_code = 2
    shared = False  # raised in all processes of a job, so that only the first one reports it

    def __init__(self, key: str, problem: str | None = None, fix: str | None = None) -> None:
        """Takes a key (of the configuration, or a file or argument), problem and fix, or the full text alone."""
        self.key = None if problem is None else key
        self.problem = key if problem is None else problem
        self.fix = fix
        super().__init__(key, problem, fix)  # the arguments with which it is unpickled in other processes

    def __str__(self) -> str:
        text = self.problem if self.key is None else f"{self.key}: {self.problem}"
        return text if self.fix is None else f"{text}; {self.fix}"

    def under(self, key: str) -> UserError:
        """The same error with another key, such as a command-line argument instead of a configuration key."""
        return UserError(key, self.problem, self.fix)

    @property
    def lines(self) -> list[str]:
        """The lines of the text, one for each problem."""
        return str(self).splitlines()


class StageError(RuntimeError):
    """A failure that only running can show, such as NaN or a mask that changed; exit code 1."""

    exit_code = 1
    shared = False


class WriteError(StageError):
    """A file cannot be written, usually because the disk is full; finished work is intact."""


class Stopped(StageError):  # noqa: N818
    """Stopped by a signal after saving the work; exit code 130 after Ctrl-C, otherwise 143, as after SIGTERM."""

    shared = True

    def __init__(self, message: str, number: int = signal.SIGTERM) -> None:
        super().__init__(message)
        self.exit_code = 128 + (signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)


class SharedError(StageError):
    """A StageError that all processes of a job raise."""

    shared = True


class Problems:
    """Collects the problems of several checks for one error: ``with problems: check()`` catches a UserError."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, key: str, problem: str | None = None, fix: str | None = None) -> None:
        """Adds a problem, given like a :class:`UserError`."""
        self.lines += UserError(key, problem, fix).lines

    def __enter__(self) -> Problems:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if isinstance(error, UserError):
            self.lines += error.lines
        return isinstance(error, UserError)

    def raise_all(self) -> None:
        """Raises a UserError with all problems, without duplicates, one per line; does nothing if there are none."""
        if self.lines:
            raise UserError("\n".join(dict.fromkeys(self.lines)))


def did_you_mean(name: str, names: Mapping[str, str] | Iterable[str]) -> str:
    """The end of an error about an unknown name: the most similar valid name (of a mapping, the text for it)."""
    texts = dict(names) if isinstance(names, Mapping) else {valid: valid for valid in names}
    close = difflib.get_close_matches(name, texts, n=1, cutoff=0.6)
    return f"; did you mean {texts[close[0]]}?" if close else ""


def first_line(error: BaseException | str) -> str:
    """The first line of an error's text; the name of its class if it has no text."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


@contextlib.contextmanager
def with_argument_names(names: dict[str, str]) -> Iterator[None]:
    """Replaces configuration keys in errors by the command's arguments: ``names`` maps one to the other."""
    try:
        yield
    except UserError as error:
        if error.key is None or error.key not in names:
            raise
        raise error.under(names[error.key]) from error
