"""Measures a run's checkpoints, and any others, into its results files."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sppctl import console, distributed, machine, records
from sppctl.errors import UserError, WriteError, did_you_mean
from sppctl.files import paths
from sppctl.files.names import DIRECTORIES
from sppctl.model import find
from sppctl.run import dense
from sppctl.run.directory import Run
from sppctl.run.stages import choose_dtype

if TYPE_CHECKING:
    from sppctl.evaluate.perplexities import DenseModel
    from sppctl.evaluate.results import Json

STAGE_OF = {folder: stage for stage, folder in DIRECTORIES.items()}  # the stage of each of the run's own checkpoints


def results_of(run: Run, label: str) -> Path:
    """The results file of a checkpoint."""
    return run.directory / "eval" / f"{label}.json"


def share_results(source: Run, target: Run, label: str) -> None:
    """Adds one run's results of a checkpoint to another run's results of it."""
    from sppctl.evaluate import stage

    stage.take_over(results_of(source, label), results_of(target, label))


def evaluate(run: Run, checkpoints: dict[str, Path]) -> dict[str, Json]:
    """Measures checkpoints and adapters by label; existing results are not measured again."""
    from sppctl.evaluate import perplexities, stage
    from sppctl.evaluate.results import Results
    from sppctl.evaluate.subjects import Subject

    contents, jobs = {}, []
    reference, texts = _dense_model(run, checkpoints), perplexities.contents(run.config)
    for label, path in checkpoints.items():
        subject, results = Subject.at(label, path), results_of(run, label)
        # from the first process: the others may have read the file while it was written
        valid = distributed.broadcast_object([] if run.force else stage.valid_results(run.config, subject, results), 0)
        missing = stage.missing(run.config, subject, valid, texts, reference)
        compute = distributed.decide(partial(choose_dtype, run.config, subject.directory))
        if missing:
            console.note(f"eval {label}: {compute.text}")
        packed = bool(missing) and distributed.decide(partial(subject.is_packed, run.config.model, compute.dtype))
        jobs.append(stage.Job(subject, results, compute.dtype, valid, missing, reference, packed))
    try:
        distributed.decide(partial(stage.check_memory, run.config, jobs))
        stage.prepare(run.config, jobs)
        for job in jobs:
            content = None if job.measures else Results.load(job.path)
            if content is None:
                content = stage.execute(run.config, job)
            else:
                console.note(f"eval {job.subject.label}: up to date ({job.path})")
            contents[job.subject.label] = content.to_json()
            machine.release_memory()
    except WriteError as error:
        raise WriteError(f"{error}; free some space: earlier results are kept, the same command continues") from error
    finally:
        if reference is not None:
            reference.close()
    return contents


def needs_all_gpus(run: Run, checkpoints: dict[str, Path]) -> bool:
    """Whether the dense model is to be run and exceeds one of several GPUs. All processes must call it."""
    from sppctl.model import checkpoint

    directories = [checkpoints[dense.BASE]] if dense.BASE in checkpoints else []
    if (name := _reference(run, checkpoints)) is not None:
        directories.append(dense.base(run) if name == "base" else find.locate(name, key="eval.divergence"))
    device = checkpoint.pick_device(run.config.model.device)

    def exceed() -> bool:
        return any(checkpoint.exceeds(path, device, choose_dtype(run.config, path).dtype) for path in directories)

    return distributed.decide(exceed)


def _reference(run: Run, checkpoints: dict[str, Path]) -> str | None:
    """The name of the checkpoint that the others are compared with, if the configuration has one.

    The run's dense model is the reference only for the run's own checkpoints; others need an explicit reference.
    """
    name = run.config.eval.divergence
    is_for_none = name == "base" and not checkpoints.keys() & STAGE_OF.keys()
    return None if is_for_none or not run.config.eval.perplexity else name


def _dense_model(run: Run, checkpoints: dict[str, Path]) -> DenseModel | None:
    """The checkpoint of :func:`_reference`, to be run."""
    from sppctl.evaluate.perplexities import DenseModel

    if (name := _reference(run, checkpoints)) is None:
        return None
    directory = dense.same_base(run) if name == "base" else find.locate(name, key="eval.divergence")
    return DenseModel(name, directory, run.config.model.trust_remote_code, run.directory)


def checkpoints_to_measure(run: Run, models: list[str]) -> dict[str, Path | None]:
    """Labels and directories of the checkpoints named on the command line; if none is, of the run's newest.

    The base model has no directory yet, since it may have to be unpacked first.
    """
    if not models:
        records.refuse_outdated(run.directory)
        models = [next((label for label in ("merged", "pruned") if run.record(STAGE_OF[label]) is not None), "base")]
    directories: dict[str, Path | None] = {}
    for model in models:
        label, path = _checkpoint_to_measure(run, model)
        same_label = directories.get(label)
        if path is not None and same_label is not None and same_label.resolve() != path.resolve():
            from sppctl.model import checkpoint

            label = f"{label}-{checkpoint.fingerprint(path)[:6]}"
        directories[label] = path
    return directories


def _checkpoint_to_measure(run: Run, model: str) -> tuple[str, Path | None]:
    if model == "base":
        return model, None
    if model in STAGE_OF and run.record(STAGE_OF[model]) is not None:
        return model, run.path(STAGE_OF[model])
    try:
        directory = find.locate(model, key="--model", adapters=True)
    except UserError as error:
        if model in STAGE_OF:
            problem = f"{run.path(STAGE_OF[model])} does not exist yet"
            raise UserError("--model", problem, f"make it: {run.command(STAGE_OF[model])}") from error
        if "/" not in model and not Path(model).exists() and (hint := did_you_mean(model, (dense.BASE, *STAGE_OF))):
            raise UserError("--model", f"{model} is not a checkpoint{hint}") from error
        raise
    labels = {(run.directory / name).resolve(): name for name in (dense.BASE, *STAGE_OF)}
    return labels.get(directory.resolve()) or _label(model, directory.resolve()), directory


def _label(model: str, directory: Path) -> str:
    """A file name for a checkpoint that is not the run's own: its path below the current folder, else its full path."""
    if Path(model).is_dir():
        current = Path.cwd()
        model = str(directory.relative_to(current) if directory.is_relative_to(current) else directory)
    label = re.sub(r"[^\w.-]+", "-", model.replace("/", "--")).strip("-.")
    reserved = not label or label in (dense.BASE, *STAGE_OF)
    return paths.file_stem(f"{directory.parent.name}--{directory.name}" if reserved else label)
