"""The dense model of a run: where it is, unpacked from a GGUF file if need be, and without weights for the checks."""

from __future__ import annotations

import contextlib
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sppctl import console, distributed
from sppctl.config.settings import Config
from sppctl.errors import UserError
from sppctl.files import sealed
from sppctl.files.names import RECORD
from sppctl.records import UnpackedRecord, from_json

if TYPE_CHECKING:
    from sppctl.model.blocks import Skeleton
    from sppctl.run.directory import Run

BASE = "base"  # the directory in the run


@dataclass(frozen=True)
class Outline:
    """A model without weights, and its tokenizer (of transformers)."""

    skeleton: Skeleton
    tokenizer: Any


def located(config: Config) -> Path:
    """The directory that model.path means (in it, perhaps, a GGUF file)."""
    from sppctl.model import checkpoint

    model = config.model
    assert model.path is not None
    return checkpoint.locate(model.path, model.gguf_file, model.revision)


def base(run: Run) -> Path:
    """The dense checkpoint as safetensors; a GGUF file is unpacked into the run directory once.

    All processes call this, the first time in a run.
    """
    if run.base is None:
        source = located(run.config)
        if run.config.model.gguf_file is None:
            run.base = source
        else:
            target = run.directory / BASE
            with distributed.first_process_first():
                if distributed.is_main():
                    _unpack(run, source, target)
            run.base = target
    return run.base


def _unpack(run: Run, source: Path, target: Path) -> None:
    from sppctl.files import integrity
    from sppctl.files.safe_files import saving
    from sppctl.machine import torch_dtype
    from sppctl.model import checkpoint

    model = run.config.model
    assert model.gguf_file is not None
    inputs = {"file": integrity.hashes(source, [model.gguf_file]), "dtype": model.dtype}
    record: UnpackedRecord | None = None
    with contextlib.suppress(OSError, ValueError):  # no record, or a damaged one: once more
        record = from_json(UnpackedRecord, sealed.parse((target / RECORD).read_bytes()))
    if record is not None and record.inputs == inputs:
        integrity.check(target, record.files, f"delete {target}, and it is unpacked again")
        return
    console.note(f"base: unpacking {model.gguf_file} into {target}")
    started = time.perf_counter()
    partial = run.fresh_partial(BASE)
    try:
        with saving(partial):
            dtype = None if model.dtype == "auto" else torch_dtype(model.dtype)
            checkpoint.convert_gguf(source, model.gguf_file, dtype, partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    seconds = time.perf_counter() - started
    run.complete(BASE, lambda output, files: UnpackedRecord(BASE, inputs, seconds, output, files))


def outline(run: Run, directory: Path | None = None) -> Outline:
    """The configured model, or the one in a directory, for checks; nothing is unpacked or written."""
    from sppctl.files.safe_files import TensorFiles
    from sppctl.model import blocks, checkpoint, weights

    model = run.config.model
    trust, gguf_file = model.trust_remote_code, model.gguf_file
    unpacked = run.directory / BASE
    if directory is None and gguf_file is not None and not unpacked.is_dir():
        source = located(run.config)
        skeleton = blocks.Skeleton(checkpoint.load_gguf_config(source, gguf_file), trust_remote_code=trust)
        return Outline(skeleton, checkpoint.load_tokenizer(source, trust, gguf_file))
    source = directory or (unpacked if gguf_file is not None else located(run.config))
    files = TensorFiles(source)
    skeleton = blocks.Skeleton(checkpoint.load_config(source, trust), trust_remote_code=trust)
    weights.check_weights(files, skeleton.model)
    return Outline(skeleton, checkpoint.load_tokenizer(source, trust))


def same_base(run: Run) -> Path:
    """The dense checkpoint; UserError if the run has a pruned one that was made from another or from other weights."""
    from sppctl.evaluate import subjects

    directory, pruned = base(run), run.record("prune")
    if pruned is not None and pruned.inputs["base"] != subjects.fingerprint(directory):
        raise UserError(
            "model.path",
            f"{directory} does not hold the weights that {run.path('prune')} was made from (it changed, or is another "
            "model)",
            "restore it, or prune again (sppctl prune --force)",
        )
    return directory
