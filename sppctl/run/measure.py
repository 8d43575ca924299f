"""Measuring a run's checkpoints, and any others, into its results files."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sppctl import console, distributed
from sppctl.errors import WriteError
from sppctl.files import paths
from sppctl.files.names import DIRECTORIES
from sppctl.run import dense
from sppctl.run.directory import Run
from sppctl.run.stages import choose_dtype

if TYPE_CHECKING:
    from sppctl.evaluate.perplexities import DenseModel

MADE = {folder: stage for stage, folder in DIRECTORIES.items()}  # the run's checkpoints but base, and their stages


def results_of(run: Run, label: str) -> Path:
    """The results file of a checkpoint."""
    return run.directory / "eval" / f"{label}.json"


def share_results(source: Run, target: Run, label: str) -> None:
    """Adds the results of a checkpoint in one run to those that another run has of it."""
    from sppctl.evaluate import stage

    stage.take_over(results_of(source, label), results_of(target, label))


def evaluate(run: Run, checkpoints: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Measures checkpoints and adapters by label; what has been measured before is not measured again."""
    from sppctl.evaluate import perplexities, stage
    from sppctl.evaluate.results import Results
    from sppctl.evaluate.subjects import Subject

    contents, jobs = {}, []
    reference, texts = _dense_model(run, checkpoints), perplexities.contents(run.config)
    for label, path in checkpoints.items():
        subject, results = Subject.at(label, path), results_of(run, label)
        # from the first process: the others may have read the file while it was written
        known = distributed.broadcast_object([] if run.force else stage.known(run.config, subject, results), 0)
        missing = stage.missing(run.config, subject, known, texts, reference)
        compute = distributed.decide(partial(choose_dtype, run.config, subject.directory))
        if missing:
            console.note(f"eval {label}: {compute.text}")
        jobs.append(stage.Job(subject, results, compute.dtype, known, missing, reference))
    try:
        stage.prepare(run.config, jobs)
        for job in jobs:
            content = None if job.measures else Results.load(job.path)
            if content is None:
                content = stage.execute(run.config, job)
            else:
                console.note(f"eval {job.subject.label}: up to date ({job.path})")
            contents[job.subject.label] = content.to_json()
            perplexities.release()
    except WriteError as error:
        raise WriteError(f"{error}; make room: what was measured before is kept, the same command continues") from error
    finally:
        if reference is not None:
            reference.close()
    return contents


def _dense_model(run: Run, checkpoints: dict[str, Path]) -> DenseModel | None:
    """The checkpoint whose predictions the others are compared with, if the configuration names one.

    The run's dense model is the measure of what belongs to the run; a foreign checkpoint is compared only if asked.
    """
    from sppctl.evaluate.perplexities import DenseModel
    from sppctl.model import checkpoint

    name = run.config.eval.divergence
    if name is None or not run.config.eval.perplexity or (name == "base" and not checkpoints.keys() & MADE.keys()):
        return None
    directory = dense.same_base(run) if name == "base" else checkpoint.locate(name, key="eval.divergence")
    return DenseModel(name, directory, run.config.model.trust_remote_code, run.directory)


def checkpoints_to_measure(run: Run, models: list[str]) -> dict[str, Path | None]:
    """Labels and directories of checkpoints that are named on the command line; none named: the run's newest.

    The base model has no directory here, since it may have to be unpacked first.
    """
    from sppctl.model import checkpoint

    if not models:
        models = [next((label for label in ("merged", "pruned") if run.record(MADE[label]) is not None), "base")]
    places: dict[str, Path | None] = {}
    for model in models:
        label, path = _checkpoint_to_measure(run, model)
        taken = places.get(label)
        if path is not None and taken is not None and taken.resolve() != path.resolve():
            label = f"{label}-{checkpoint.fingerprint(path)[:6]}"
        places[label] = path
    return places


def _checkpoint_to_measure(run: Run, model: str) -> tuple[str, Path | None]:
    from sppctl.model import checkpoint

    if model == "base":
        return model, None
    if model in MADE and run.record(MADE[model]) is not None:
        return model, run.path(MADE[model])
    directory = checkpoint.locate(model, key="--model", adapters=True)
    known = {(run.directory / name).resolve(): name for name in (dense.BASE, *MADE)}
    return known.get(directory.resolve()) or _label(model, directory.resolve()), directory


def _label(model: str, directory: Path) -> str:
    """A file name for a checkpoint that is not the run's own: its path below this folder, else its whole path."""
    if Path(model).is_dir():
        here = Path.cwd()
        model = str(directory.relative_to(here) if directory.is_relative_to(here) else directory)
    label = re.sub(r"[^\w.-]+", "-", model.replace("/", "--")).strip("-.")
    reserved = not label or label in (dense.BASE, *MADE)
    return paths.file_stem(f"{directory.parent.name}--{directory.name}" if reserved else label)
