"""Files that are whole or absent, and one message for what cannot be written."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from sppctl.errors import UserError, WriteError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # of a disk, a quota, a limit


def write(path: Path, text: str) -> None:
    """Writes a file that is whole or absent, and on the disk before this returns; its folder is made if need be.

    Raises:
        WriteError: it cannot be written; what was there before is unchanged, and nothing is left beside it.
    """
    aside = path.with_name(f".{path.name}.partial")
    data = text.encode()
    with writing(path, len(data)):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with aside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except OSError:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
            raise
        sync(path.parent)


@contextlib.contextmanager
def writing(path: Path, needed: int | None = None, reasons: set[int] | None = None) -> Iterator[None]:
    """Errors of the operating system while ``path`` is written inside name it.

    Args:
        path: the file or directory.
        needed: bytes that it takes, where they are known.
        reasons: the error numbers that are meant; None: all, for nothing else is done inside.

    Raises:
        WriteError: with the reason, what is needed and what is free.
    """
    try:
        yield
    except OSError as error:
        if reasons is not None and error.errno not in reasons:
            raise
        place = existing(path.absolute().parent)
        sizes = [f"{needed:,} bytes needed"] * (needed is not None)
        with contextlib.suppress(OSError):
            sizes.append(f"{shutil.disk_usage(place).free:,} bytes free")
        raise WriteError(f"{path} cannot be written: {error.strerror or error} ({', '.join(sizes)})") from error


def demand_space(directory: Path, needed: int, what: str, replaced: str) -> None:
    """Checks that there is room for what will be written below a directory.

    Args:
        directory: need not be there yet.
        needed: bytes.
        what: takes them, for the message.
        replaced: pattern of files in ``directory`` that will be written over, or make room first.

    Raises:
        UserError: there is not.
    """
    held = sum(path.stat().st_blocks * 512 for path in directory.glob(replaced))
    free = shutil.disk_usage(existing(directory)).free + held
    if needed > free:
        raise UserError(
            f"run.dir: {directory} has {free / 2**30:.1f} GiB free, {what} takes {needed / 2**30:.1f} GiB; make room, "
            "or name another (--output)"
        )


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
