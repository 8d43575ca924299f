"""Atomic writes of files, checks before writing, and one message for files that cannot be written."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from sppctl.errors import UserError, WriteError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # full disk, quota reached, file size limit


def write(path: Path, text: str) -> None:
    """Writes a file atomically and waits until it is on the disk; creates its folder if necessary.

    Raises:
        WriteError: the file cannot be written; an existing one is unchanged, and no temporary file is left.
    """
    partial, data = path.with_name(f".{path.name}.partial"), text.encode()
    with writing(path, len(data)):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
        sync(path.parent)


@contextlib.contextmanager
def writing(path: Path, needed: int | None = None, reasons: set[int] | None = None) -> Iterator[None]:
    """Turns errors of the operating system into a WriteError with ``path``, the reason, ``needed`` and free bytes.

    Errors with other numbers than ``reasons`` pass unchanged; None: all are converted, as only ``path`` is written.
    """
    try:
        yield
    except OSError as error:
        if reasons is not None and error.errno not in reasons:
            raise
        sizes = [] if needed is None else [f"{needed:,} bytes needed"]
        with contextlib.suppress(OSError):
            sizes.append(f"{shutil.disk_usage(existing(path.absolute().parent)).free:,} bytes free")
        raise WriteError(f"{path} cannot be written: {error.strerror or error} ({', '.join(sizes)})") from error


def demand_space(directory: Path, needed: int, what: str, replaced: str) -> None:
    """Raises UserError if a directory has no space for ``needed`` bytes of ``what``.

    Files in it that match the pattern ``replaced`` count as free: they will be overwritten or deleted.
    """
    replaced_bytes = sum(path.stat().st_blocks * 512 for path in directory.glob(replaced))
    free = shutil.disk_usage(existing(directory)).free + replaced_bytes
    if needed > free:
        raise UserError(
            "run.dir",
            f"{directory} has {free / 2**30:.1f} GiB free, {what} takes {needed / 2**30:.1f} GiB",
            "free some space, or choose another directory (--output)",
        )


def demand_directory(path: Path, key: str) -> None:
    """Raises UserError, which names ``key``, if a directory cannot be created or written to."""
    if os.path.lexists(path) and not path.is_dir():
        kind = "a file" if path.is_file() else "a broken link or a special file"
        raise UserError(key, f"{path} is {kind}, not a directory", "choose another directory (--output)")
    parent = next(folder for folder in [path, *path.absolute().parents] if os.path.lexists(folder))
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        problem = "is not writable" if parent == path else f"cannot be created, {parent} is not a writable directory"
        raise UserError(key, f"{path} {problem}", "choose another directory")


def demand_file(path: Path, key: str) -> None:
    """Raises UserError, which names ``key``, if the path of a file to be written is something else than a file."""
    if os.path.lexists(path) and not path.is_file():
        raise UserError(key, f"{path} is not a regular file", "remove it, or choose another directory")


def demand_readable(path: Path) -> None:
    """Raises UserError if a file cannot be read, or would block its reader as a pipe does."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path} is not a regular file; remove it, or replace it by the file")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); remove it, or replace it by the file") from error
    if not os.access(path, os.R_OK):
        raise UserError(f"{path} cannot be read (permission denied); change its permissions")


def existing(path: Path) -> Path:
    """The nearest existing directory, from ``path`` upwards."""
    return next(folder for folder in [path, *path.absolute().parents] if folder.is_dir())


def apply_umask(directory: Path) -> None:
    """Gives all files below a directory the permissions of new files.

    Libraries that write through temporary files leave theirs readable by the owner alone.
    """
    mask = os.umask(0o077)  # which can only be read by setting it
    os.umask(mask)
    for path in directory.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~mask)


def sync_tree(directory: Path) -> None:
    """Waits until all files below a directory, and their names, are on the disk."""
    for path in [directory, *directory.rglob("*")]:
        sync(path)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some file systems do not sync directories, and answer one of these
        if error.errno not in (errno.EINVAL, errno.EBADF) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
