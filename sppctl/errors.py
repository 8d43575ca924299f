"""The two error classes of sppctl with their exit codes, and how the problems of several checks become one error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class UserError(ValueError):
    """Wrong usage, configuration or input: found before anything expensive, exit code 2.

    Its text is one line, ``key: problem; fix``. Errors of several problems have a line for each, and no key.
    """

    exit_code = 2
    shared = False  # known to all processes of a job, so that the first alone need report it

    def __init__(self, key: str, problem: str | None = None, fix: str | None = None) -> None:
        """Takes the key (of the configuration, or a file or argument) and what follows, or a whole text alone."""
        self.key = None if problem is None else key
        self.problem = key if problem is None else problem
        self.fix = fix
        super().__init__(key, problem, fix)  # as it is pickled for other processes

    def __str__(self) -> str:
        text = self.problem if self.key is None else f"{self.key}: {self.problem}"
        return text if self.fix is None else f"{text}; {self.fix}"

    def under(self, key: str) -> UserError:
        """The same error of another key: that of what was being read, or an argument in place of a key."""
        return UserError(key, self.problem, self.fix)

    @property
    def lines(self) -> list[str]:
        """One for each problem."""
        return str(self).splitlines()


class StageError(RuntimeError):
    """Something that only running could tell (a failed stage, a broken expectation): exit code 1."""

    exit_code = 1
    shared = False


class WriteError(StageError):
    """A file that cannot be written, mostly for want of space: nothing is wrong with what was done so far."""


class Stopped(StageError):  # noqa: N818
    """A signal asked for the end and the work was saved: exit code 143, as of a process ended by SIGTERM."""

    exit_code = 143
    shared = True


class SharedError(StageError):
    """A StageError that all processes have agreed on."""

    shared = True


class Problems:
    """What several checks find wrong, for one error that names it all: ``with problems: check()`` notes a UserError."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, key: str, problem: str | None = None, fix: str | None = None) -> None:
        """Notes a problem without an exception, in the parts of a :class:`UserError`."""
        self.lines += UserError(key, problem, fix).lines

    def __enter__(self) -> Problems:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if isinstance(error, UserError):
            self.lines += error.lines
        return isinstance(error, UserError)

    def raise_all(self) -> None:
        """Raises a UserError with every problem that was noted, each once, one per line; nothing if there are none."""
        if self.lines:
            raise UserError("\n".join(dict.fromkeys(self.lines)))


def first_line(error: BaseException | str) -> str:
    """The first line of an error's text, the name of its class where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


@contextlib.contextmanager
def named_as_given(names: dict[str, str]) -> Iterator[None]:
    """Lets errors name the arguments that were given in place of configuration keys (``model.path``) that were not."""
    try:
        yield
    except UserError as error:
        if error.key is None or error.key not in names:
            raise
        raise error.under(names[error.key]) from error
