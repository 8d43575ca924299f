"""What can be freed of a run, how much it is, and what each piece would cost to make again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from sppctl import console, records
from sppctl.errors import UserError
from sppctl.files import cache, sealed
from sppctl.files.names import CHECKPOINTS, DIRECTORIES, RECORD
from sppctl.report.records import no_run
from sppctl.run import attempts
from sppctl.run.dense import BASE
from sppctl.run.publish import PUBLISHED, RESUMABLE, exclusive, remove


class Kind(StrEnum):
    """What a piece is, by what its removal costs."""

    LEFTOVERS = "leftovers"  # nothing
    BASE = "base"  # unpacking a GGUF file
    CACHE = "cache"  # tokenising, and generating samples, of all runs
    UNFINISHED = "unfinished"  # the work of an interrupted stage
    WEIGHTS = "weights"  # pruning, to train or merge again


# removed unless kinds are named: the next command makes these again by itself, and no result depends on them
HARMLESS = (Kind.LEFTOVERS, Kind.BASE)
OF_A_RUN = [kind for kind in Kind if kind != Kind.CACHE]


@dataclass(frozen=True)
class Piece:
    """Files that can be removed together."""

    kind: Kind
    path: str  # of its folder
    size: int  # bytes
    cost: str  # what their removal means


def find(run_dir: Path) -> list[Piece]:
    """Everything of a run that can be freed; nothing is changed.

    Raises:
        UserError: there is no run.
    """
    return [piece for piece, _ in _pieces(run_dir)]


def free(run_dir: Path, kinds: Sequence[Kind]) -> list[Piece]:
    """Removes the pieces of these kinds, and returns them.

    Raises:
        UserError: there is no run, or another command works in it.
    """
    _demand_run(run_dir)
    with exclusive(run_dir):
        removed = [(piece, files) for piece, files in _pieces(run_dir) if piece.kind in kinds]
        for piece, files in removed:
            for file in files:
                file.unlink()
            if piece.kind not in (Kind.WEIGHTS, Kind.CACHE):  # whose folders hold other things too
                remove(Path(piece.path))
    return [piece for piece, _ in removed]


def kinds_of(text: str | None, caches: bool) -> tuple[Kind, ...]:
    """The kinds that ``--kinds`` names (None: the :data:`HARMLESS` ones), and the ``caches``, which all runs share.

    Raises:
        UserError: a run has no such kind.
    """
    shared = (Kind.CACHE,) if caches else ()
    if text is None:
        return (*HARMLESS, *shared)
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in OF_A_RUN]
    if unknown:
        fix = "--caches deletes the caches" if unknown[0] == Kind.CACHE else None
        raise UserError("--kinds", f"{unknown[0]!r} is not one of {', '.join(OF_A_RUN)}", fix)
    return (*map(Kind, names), *shared)


def _demand_run(run_dir: Path) -> None:
    names = {path.name for path in run_dir.iterdir()} if run_dir.is_dir() else set()
    if not names & {*PUBLISHED, *(f".{name}.partial" for name in PUBLISHED)}:
        raise no_run(run_dir)


def _pieces(run_dir: Path) -> list[tuple[Piece, list[Path]]]:
    """Every piece with its files; what links lead to may belong to others."""
    _demand_run(run_dir)
    pieces = []
    for kind, path, pattern, cost in _candidates(run_dir):
        if path.is_symlink():
            console.note(f"clean: {path} is a link, and is left alone")
            continue
        files = [file for file in path.rglob(pattern) if file.is_symlink() or file.is_file()]
        if files:
            pieces.append((Piece(kind, str(path), sum(file.lstat().st_size for file in files), cost), files))
    return pieces


def _candidates(run_dir: Path) -> Iterator[tuple[Kind, Path, str, str]]:
    """Kind, folder, pattern of its files and cost of what may be there."""
    stages = {folder: stage for stage, folder in DIRECTORIES.items()}
    for name in PUBLISHED:
        yield Kind.LEFTOVERS, run_dir / f".{name}.old", "*", "nothing"
        partial = run_dir / f".{name}.partial"
        if (partial / RECORD).is_file():
            continue  # complete: the next command publishes it
        if stages.get(name) in RESUMABLE:
            steps = [int(path.name.rpartition("-")[2]) for path in partial.glob(f"{CHECKPOINTS}/checkpoint-*")]
            reached = f", which has reached step {max(steps)}," if steps else ""
            again = console.command(stages[name], run=run_dir)
            yield Kind.UNFINISHED, partial, "*", f"{again}{reached} starts again from the beginning"
        else:
            yield Kind.LEFTOVERS, partial, "*", "nothing"
    for path in run_dir.glob(".reference-*"):
        yield Kind.LEFTOVERS, path, "*", "nothing"
    if _is_unpacked(run_dir / BASE):
        yield Kind.BASE, run_dir / BASE, "*", "the dense model is unpacked again when it is needed"
    if _is_merged(run_dir):
        pruned = run_dir / DIRECTORIES["prune"]  # its record stays, which reports read
        cost = f"{console.command('prune', '--force', run=run_dir)} before pruned/ is used again"
        yield Kind.WEIGHTS, pruned, "*.safetensors", cost
    root = cache.root()
    for folder in [root / name for name in cache.FOLDERS] if root is not None else []:
        done = "generated" if folder.name == "samples" else "tokenised"
        yield Kind.CACHE, folder, "*.safetensors", f"texts are {done} again, for all runs"


def _is_unpacked(base: Path) -> bool:
    """Whether a directory is sppctl's: a GGUF file that was unpacked."""
    with contextlib.suppress(OSError, ValueError):  # no record, or a damaged one
        return sealed.parse((base / RECORD).read_bytes()).get("stage") == BASE
    return False


def _is_merged(run_dir: Path) -> bool:
    """Whether the pruned weights have been merged, and no training with finished work is to continue on them."""
    if not (run_dir / DIRECTORIES["merge"] / RECORD).is_file():
        return False
    try:
        records.refuse_outdated(run_dir)
    except UserError:  # merged/ is of other weights, or nobody knows
        return False
    return not attempts.holds_work(run_dir / f".{DIRECTORIES['train']}.partial")
