"""Files that are whole or absent, and one message for what cannot be written."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from sppctl.errors import UserError, WriteError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # of a disk, a quota, a limit


def write(path: Path, text: str) -> None:
    """Writes a file that is whole or absent, and on the disk before this returns; its folder is made if need be.

    Raises:
        WriteError: it cannot be written; what was there before is unchanged, and nothing is left beside it.
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
    """Turns errors of the operating system inside into a WriteError: ``path``, the reason, ``needed`` and free bytes.

    Errors of other numbers than ``reasons`` stay as they are; None: all are meant, as only ``path`` is written inside.
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
    """Raises UserError if there is no room for ``needed`` bytes of ``what`` below a directory.

    Files in it that match the pattern ``replaced`` will be written over, or make room first.
    """
    held = sum(path.stat().st_blocks * 512 for path in directory.glob(replaced))
    free = shutil.disk_usage(existing(directory)).free + held
    if needed > free:
        raise UserError(
            "run.dir",
            f"{directory} has {free / 2**30:.1f} GiB free, {what} takes {needed / 2**30:.1f} GiB",
            "make room, or name another (--output)",
        )


def demand_directory(path: Path, key: str) -> None:
    """Raises UserError, which names ``key``, if a directory cannot be made, or not be written."""
    if os.path.lexists(path) and not path.is_dir():
        kind = "a file" if path.is_file() else "a broken link or a special file"
        raise UserError(key, f"{path} is {kind}, not a directory", "name another (--output)")
    parent = next(folder for folder in [path, *path.absolute().parents] if os.path.lexists(folder))
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        what = "be written" if parent == path else f"be made, {parent} is not a writable directory"
        raise UserError(key, f"{path} cannot {what}", "name another")


def demand_file(path: Path, key: str) -> None:
    """Raises UserError, which names ``key``, if there is something in the place of a file that is to be written."""
    if os.path.lexists(path) and not path.is_file():
        raise UserError(key, f"{path} is not an ordinary file", "remove it, or name another place")


def demand_readable(path: Path) -> None:
    """Raises UserError if a file cannot be read, or would keep its reader waiting as a pipe does."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path} is not an ordinary file; remove it, or put the file in its place")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); remove it, or put the file in its place") from error
    if not os.access(path, os.R_OK):
        raise UserError(f"{path} cannot be read (permission denied); change its permissions")


def existing(path: Path) -> Path:
    """The nearest directory, from ``path`` upwards, that is there."""
    return next(folder for folder in [path, *path.absolute().parents] if folder.is_dir())


def sync_tree(directory: Path) -> None:
    """Waits until all files below a directory, and the names of them, are on the disk."""
    for path in [directory, *directory.rglob("*")]:
        sync(path)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
