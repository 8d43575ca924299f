"""Hashes of the whole content of files: what a record says a directory holds, and whether it still does.

A file is hashed in pieces by several threads: sha256 of each piece, then of the size and the pieces' hashes in their
order. The hash of a large file is remembered with its size, times and inode, in the cache: as long as those stay the
same the file is not read again. Nothing is called damaged before its bytes have been read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sppctl.errors import UserError
from sppctl.files import cache, sealed
from sppctl.files.names import RECORD

PIECE = 1 << 24
REMEMBERED = 1 << 20  # bytes: smaller files are read each time
SETTLED_NS = 2_000_000_000  # a file that was changed this recently could change again and keep its times
# of what lies in a directory no record is kept: notes for people, and what stages put aside
_IGNORED_FOLDERS = {"logs", "checkpoints", "__pycache__"}
# what a library would load though no record knows it
_LOADED = ("*.safetensors", "*.index.json", "*.gguf", "adapter_*", "*.jinja", "*token*", "vocab.*", "merges.txt")
OK, DAMAGED, MISSING, SURPLUS = "ok", "damaged", "missing", "surplus"


def listing(directory: Path, without: Collection[str] = ()) -> list[str]:
    """The files that belong to a checkpoint or an adapter, by their path below its directory.

    Those in files and folders named ``without`` do not.
    """
    ignored = {RECORD, *_IGNORED_FOLDERS, *without}
    names = []
    for path in directory.rglob("*"):
        name = path.relative_to(directory)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not hidden and name.parts[0] not in ignored and path.suffix != ".md":
            names.append(name.as_posix())
    return sorted(names)


def hashes(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """The hash of each of these files of a directory; raises UserError if one cannot be read."""
    chosen = list(names)
    return dict(zip(chosen, hash_files([directory / name for name in chosen]), strict=True))


def identity(files: Mapping[str, str]) -> str:
    """One short hash over the names and hashes of files."""
    return hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()[:16]


def compare(directory: Path, recorded: Mapping[str, str], *, anew: bool = False) -> dict[str, str]:
    """``ok``, ``damaged`` or ``missing`` for each file with a recorded hash, ``surplus`` for others that would load.

    With ``anew`` every byte is read, whatever is remembered. Raises UserError if a file cannot be read.
    """
    present = [name for name in recorded if (directory / name).is_file()]
    now = dict(zip(present, hash_files([directory / name for name in present], anew=anew), strict=True))
    doubtful = [] if anew else [name for name in present if now[name] != recorded[name]]
    now |= zip(doubtful, hash_files([directory / name for name in doubtful], anew=True), strict=True)
    states = {name: OK if now.get(name) == recorded[name] else DAMAGED for name in recorded}
    states |= dict.fromkeys(recorded.keys() - now.keys(), MISSING)
    surplus = set(listing(directory)) - recorded.keys()
    loaded = (name for name in sorted(surplus) if any(fnmatch(Path(name).name, pattern) for pattern in _LOADED))
    return states | dict.fromkeys(loaded, SURPLUS)


def check(directory: Path, recorded: Mapping[str, str], remedy: str) -> None:
    """Raises UserError if files of a directory do not have their recorded hashes; each is named with the remedy."""
    states = compare(directory, recorded)
    problems = [explain(directory / name, state, remedy) for name, state in states.items() if state != OK]
    if problems:
        raise UserError("\n".join(problems))


def check_record(directory: Path) -> dict[str, Any] | None:
    """The record of a stage in a directory, None without one; raises UserError if files are not as it says."""
    if not (directory / RECORD).is_file():
        return None
    record = sealed.read(directory / RECORD, remedy := "redo the stage with --force")
    check(directory, record["files"], remedy)
    return record


def explain(path: Path, state: str, remedy: str) -> str:
    """What is wrong with a file that is not ``ok``, and what to do, in one line."""
    if state == SURPLUS:
        return f"{path} is not in the record of its directory and would be loaded; remove it, or {remedy}"
    reason = "is missing" if state == MISSING else "is damaged: its content is not what was recorded"
    return f"{path} {reason}; restore it, or {remedy}"


def mask_digest(weight: Tensor) -> str:
    """A hash of the shape of a matrix and of which of its weights are not zero."""
    mask = (weight != 0).cpu().contiguous().numpy()
    return hashlib.sha256(f"{mask.shape}".encode() + np.packbits(mask).tobytes()).hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """A hash of the bytes of a tensor."""
    return hashlib.sha256(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def hash_files(paths: list[Path], *, anew: bool = False) -> list[str]:
    """The hash of the whole content of each file; ``anew``: every byte is read, whatever is remembered.

    Raises:
        UserError: one cannot be read.
    """
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        return list(_hash_all(paths, anew, pool))
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror})") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _hash_all(paths: list[Path], anew: bool, pool: ThreadPoolExecutor) -> Iterable[str]:
    started = time.time_ns()
    stats = [path.stat() for path in paths]
    remembered = [None if anew else _remembered(stat) for stat in stats]
    pieces = [
        [] if known else [pool.submit(_piece, path, start) for start in range(0, stat.st_size, PIECE)]
        for path, stat, known in zip(paths, stats, remembered, strict=True)
    ]
    for path, stat, known, parts in zip(paths, stats, remembered, pieces, strict=True):
        if known is not None:
            yield known
            continue
        digest = hashlib.sha256(str(stat.st_size).encode())
        for part in parts:
            digest.update(part.result())
        settled = started - max(stat.st_mtime_ns, stat.st_ctime_ns) >= SETTLED_NS
        place = _place(stat)
        if place is not None and settled and _signature(path.stat()) == _signature(stat):
            record = {"file": _signature(stat), "hash": digest.hexdigest()}
            cache.store(place, json.dumps(sealed.seal(record)).encode())
        yield digest.hexdigest()


def _piece(path: Path, start: int) -> bytes:
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            digest, left = hashlib.sha256(), PIECE
            while left and (data := file.read(min(left, 1 << 20))):
                digest.update(data)
                left -= len(data)
            return digest.digest()
    except OSError as error:
        error.filename = path  # reading, unlike opening, does not say of what
        raise


def _signature(stat: os.stat_result) -> list[int]:
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_dev, stat.st_ino]


def _place(stat: os.stat_result) -> Path | None:
    """Where a hash is remembered: by the inode, so that a directory may be moved, as publishing does."""
    root = cache.root() if stat.st_size >= REMEMBERED else None
    return root and root / "hashes" / f"{stat.st_dev:x}-{stat.st_ino:x}.json"


def _remembered(stat: os.stat_result) -> str | None:
    place = _place(stat)
    with contextlib.suppress(OSError, ValueError, KeyError):
        record = sealed.parse(place.read_bytes()) if place else {}
        return str(record["hash"]) if record["file"] == _signature(stat) else None
    return None
