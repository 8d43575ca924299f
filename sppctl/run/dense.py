"""The dense model of a run: its directory, unpacked from a GGUF file if necessary, and its outline for checks."""

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
from sppctl.model import find
from sppctl.records import UnpackedRecord, from_json

if TYPE_CHECKING:
    from sppctl.model.blocks import Skeleton
    from sppctl.run.directory import Run

BASE = "base"  # directory of an unpacked model in the run


@dataclass(frozen=True)
class Outline:
    """A model without weights, and its tokenizer."""

    skeleton: Skeleton
    tokenizer: Any


def locate(config: Config) -> Path:
    """The directory of model.path, which may hold the model as a GGUF file."""
    model = config.model
    assert model.path is not None
    return find.locate(model.path, model.gguf_file, model.revision)


def base(run: Run) -> Path:
    """The dense checkpoint as safetensors; a GGUF file is unpacked into the run directory once.

    All processes must make the first call in a run.
    """
    if run.base is None:
        source = locate(run.config)
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
    with contextlib.suppress(OSError, ValueError):  # no record, or a damaged one: unpack again
        record = from_json(UnpackedRecord, sealed.parse((target / RECORD).read_bytes()))
    if record is not None and record.inputs == inputs:
        integrity.check(target, record.files, f"delete {target} to unpack it again")
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
    """The configured model, or the model in a directory, without weights, for checks; unpacks and writes nothing."""
    model = run.config.model
    trust, gguf_file = model.trust_remote_code, model.gguf_file
    unpacked = run.directory / BASE
    packed = directory is None and gguf_file is not None and not unpacked.is_dir()
    source = directory or (unpacked if gguf_file is not None and not packed else locate(run.config))
    # after a model that does not exist has been reported
    from sppctl.files.safe_files import TensorFiles
    from sppctl.model import blocks, checkpoint, weights

    if packed:
        assert gguf_file is not None
        skeleton = blocks.Skeleton(checkpoint.load_gguf_config(source, gguf_file), trust_remote_code=trust)
        return Outline(skeleton, checkpoint.load_tokenizer(source, trust, gguf_file))
    files = TensorFiles(source)
    skeleton = blocks.Skeleton(checkpoint.load_config(source, trust), trust_remote_code=trust)
    weights.check_weights(files, skeleton.model)
    return Outline(skeleton, checkpoint.load_tokenizer(source, trust))


def same_base(run: Run) -> Path:
    """The dense checkpoint; UserError if the run has a pruned checkpoint that was made from other weights."""
    from sppctl.evaluate import subjects

    directory, pruned = base(run), run.record("prune")
    if pruned is not None and pruned.inputs["base"] != subjects.fingerprint(directory):
        raise UserError(
            "model.path",
            f"{directory} does not hold the weights that {run.path('prune')} was made from (it changed, or is another "
            "model)",
            f"restore it, or prune again ({run.command('prune', '--force')})",
        )
    return directory
