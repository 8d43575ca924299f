"""Hashes of whole files, and whether the files of a directory still match the hashes in its record.

A file is hashed in pieces by several threads: sha256 of each piece, then of the size and the pieces' hashes in order.
The cache keeps the hash of a large file with its size, times and inode: while those stay the same, the file is not read
again. No file is reported as damaged before its bytes have been read.
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
from typing import TYPE_CHECKING, Any

from sppctl.errors import UserError
from sppctl.files import cache, sealed
from sppctl.files.names import RECORD

if TYPE_CHECKING:
    from torch import Tensor

PIECE = 1 << 24  # bytes
REMEMBERED = 1 << 20  # bytes; smaller files are read each time
SETTLED_NS = 2_000_000_000  # a file changed more recently could change again with the same times
_IGNORED_FOLDERS = {"logs", "checkpoints", "__pycache__"}  # no part of what a stage publishes
# files that a library would load even if they are not in the record
_WEIGHTS = ("*.safetensors", "*.index.json", "*.gguf", "adapter_*", "pytorch_model*.bin")
_SETTINGS = ("*config.json", "chat_template.json", "*.jinja", "*token*", "*.model", "vocab.*", "merges.txt", "*.py")
_LOADED = (*_WEIGHTS, *_SETTINGS)
OK, DAMAGED, MISSING, SURPLUS = "ok", "damaged", "missing", "surplus"


def listing(directory: Path, without: Collection[str] = ()) -> list[str]:
    """The files of a checkpoint or an adapter, as paths below its directory; ``without``: names to leave out."""
    ignored = {RECORD, *_IGNORED_FOLDERS, *without}
    names = []
    for path in directory.rglob("*"):
        name = path.relative_to(directory)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not hidden and name.parts[0] not in ignored and path.name != "README.md":
            names.append(name.as_posix())
    return sorted(names)


def hashes(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """The hash of each of these files of a directory; raises UserError if one cannot be read."""
    names = list(names)
    return dict(zip(names, hash_files([directory / name for name in names]), strict=True))


def identity(files: Mapping[str, str]) -> str:
    """One short hash over the names and hashes of files."""
    return hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()[:16]


def compare(directory: Path, recorded: Mapping[str, str], *, reread: bool = False) -> dict[str, str]:
    """``ok``, ``damaged`` or ``missing`` for each file with a recorded hash, ``surplus`` for others that would load.

    With ``reread`` every byte is read, even of files whose hash is cached. Raises UserError if a file cannot be read.
    """
    present = [name for name in recorded if (directory / name).is_file()]
    current = dict(zip(present, hash_files([directory / name for name in present], reread=reread), strict=True))
    doubtful = [] if reread else [name for name in present if current[name] != recorded[name]]
    current |= zip(doubtful, hash_files([directory / name for name in doubtful], reread=True), strict=True)
    states = {name: OK if current.get(name) == recorded[name] else DAMAGED for name in recorded}
    states |= dict.fromkeys(recorded.keys() - current.keys(), MISSING)
    surplus = set(listing(directory)) - recorded.keys()
    loaded = (name for name in sorted(surplus) if any(fnmatch(Path(name).name, pattern) for pattern in _LOADED))
    return states | dict.fromkeys(loaded, SURPLUS)


def check(directory: Path, recorded: Mapping[str, str], remedy: str) -> None:
    """Raises UserError, with a line for each file, if files of a directory do not have their recorded hashes."""
    states = compare(directory, recorded)
    problems = [explain(directory / name, state, remedy) for name, state in states.items() if state != OK]
    if problems:
        raise UserError("\n".join(problems))


def check_record(directory: Path) -> dict[str, Any] | None:
    """The record of a stage in a directory, or None; raises UserError if files do not have their recorded hashes."""
    if not (directory / RECORD).is_file():
        return None
    record = sealed.read(directory / RECORD, remedy := "redo the stage with --force")
    check(directory, record["files"], remedy)
    return record


def explain(path: Path, state: str, remedy: str) -> str:
    """The problem of a file that is not ``ok``, and the fix, in one line."""
    if state == SURPLUS:
        return f"{path} is not in the record of its directory and would be loaded; remove it, or {remedy}"
    reason = "is missing" if state == MISSING else "is damaged: its content is not what was recorded"
    return f"{path} {reason}; restore it, or {remedy}"


def mask_digest(weight: Tensor) -> str:
    """A hash of a matrix's shape and of the positions of its nonzero weights."""
    import numpy as np

    mask = (weight != 0).cpu().contiguous().numpy()
    return hashlib.sha256(f"{mask.shape}".encode() + np.packbits(mask).tobytes()).hexdigest()


def masks_digest(masks: Mapping[str, str]) -> str:
    """One short hash over the masks of several matrices: their digests (:func:`mask_digest`) by the layers' names."""
    return identity(masks)


def tensor_digest(tensor: Tensor) -> str:
    """A hash of the bytes of a tensor."""
    import torch

    return hashlib.sha256(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def hash_files(paths: list[Path], *, reread: bool = False) -> list[str]:
    """The hash of each file's content; ``reread``: every byte is read, even of files whose hash is cached.

    Raises:
        UserError: a file cannot be read.
    """
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        return list(_hash_all(paths, reread, pool))
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror})") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _hash_all(paths: list[Path], reread: bool, pool: ThreadPoolExecutor) -> Iterable[str]:
    started = time.time_ns()
    stats = [path.stat() for path in paths]
    cached = [None if reread else _cached_hash(stat) for stat in stats]
    pieces = [
        [] if cached_hash else [pool.submit(_piece_digest, path, start) for start in range(0, stat.st_size, PIECE)]
        for path, stat, cached_hash in zip(paths, stats, cached, strict=True)
    ]
    for path, stat, cached_hash, digests in zip(paths, stats, cached, pieces, strict=True):
        if cached_hash is not None:
            yield cached_hash
            continue
        digest = hashlib.sha256(str(stat.st_size).encode())
        for piece in digests:
            digest.update(piece.result())
        settled = started - max(stat.st_mtime_ns, stat.st_ctime_ns) >= SETTLED_NS
        entry = _cache_entry(stat)
        # not cached if the file changed while it was read
        if entry is not None and settled and _signature(path.stat()) == _signature(stat):
            record = {"file": _signature(stat), "hash": digest.hexdigest()}
            cache.store(entry, json.dumps(sealed.seal(record)).encode())
        yield digest.hexdigest()


def _piece_digest(path: Path, start: int) -> bytes:
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            digest, remaining = hashlib.sha256(), PIECE
            while remaining and (data := file.read(min(remaining, 1 << 20))):
                digest.update(data)
                remaining -= len(data)
            return digest.digest()
    except OSError as error:
        error.filename = path  # errors of reading, unlike those of opening, name no file
        raise


def _signature(stat: os.stat_result) -> list[int]:
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_dev, stat.st_ino]


def _cache_entry(stat: os.stat_result) -> Path | None:
    """The cache file of a hash, named by the inode, so that a directory may be moved, as publishing does."""
    root = cache.root() if stat.st_size >= REMEMBERED else None
    return root and root / "hashes" / f"{stat.st_dev:x}-{stat.st_ino:x}.json"


def _cached_hash(stat: os.stat_result) -> str | None:
    entry = _cache_entry(stat)
    with contextlib.suppress(OSError, ValueError, KeyError):
        record = sealed.parse(entry.read_bytes()) if entry else {}
        return str(record["hash"]) if record["file"] == _signature(stat) else None
    return None
