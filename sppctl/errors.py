"""The ways in which a command can end badly, with their exit codes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class UserError(ValueError):
    """Wrong usage, configuration or input: found before anything expensive, exit code 2."""

    exit_code = 2
    shared = False  # known to all processes of a job, so that the first alone need tell it


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


@contextlib.contextmanager
def named_as_given(names: dict[str, str]) -> Iterator[None]:
    """Lets errors name the arguments that were given in place of configuration keys (``model.path``) that were not."""
    try:
        yield
    except UserError as error:
        words = str(error)
        for key, name in names.items():
            words = words.replace(f"{key}:", f"{name}:")
        raise UserError(words) from error
