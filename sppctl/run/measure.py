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

OWN = {folder: stage for stage, folder in DIRECTORIES.items()}  # the run's checkpoints besides base, and their stages


def evaluate(run: Run, checkpoints: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Measures checkpoints and adapters by label; what has been measured before is not measured again."""
    from sppctl.evaluate import perplexities, stage
    from sppctl.evaluate.results import Results
    from sppctl.evaluate.subjects import Subject

    found = {}
    reference = _dense_model(run, checkpoints)
    jobs = []
    known = {}
    texts = perplexities.contents(run.config)
    for label, path in checkpoints.items():
        subject = Subject.at(label, path)
        results = results_of(run, label)
        compared = reference if reference is not None and reference.fingerprint != subject.fingerprint else None
        # from the first process: the others may have read the file while it was written
        known[label] = distributed.broadcast_object([] if run.force else stage.known(run.config, subject, results), 0)
        wanted = stage.missing(run.config, subject, known[label], texts, compared)
        compute = distributed.decide(partial(choose_dtype, run.config, subject.directory))
        if wanted:
            console.note(f"eval {label}: {compute.text}")
        jobs.append((subject, compute.dtype, wanted, compared))
    try:
        stage.predict(run.config, jobs)
        for subject, dtype, wanted, _ in jobs:
            results = results_of(run, subject.label)
            before = None if wanted else Results.load(results)
            if before is not None:
                console.note(f"eval {subject.label}: up to date ({results})")
            content = before or stage.execute(
                run.config, subject, dtype, results, wanted, known[subject.label], reference
            )
            found[subject.label] = content.to_json()
            perplexities.release()
    except WriteError as error:
        raise WriteError(f"{error}; make room: what was measured before is kept, the same command continues") from error
    finally:
        if reference is not None:
            reference.close()
    return found


def share_results(source: Run, target: Run, label: str) -> None:
    """Adds the results of a checkpoint in one run to those that another run has of it."""
    from sppctl.evaluate import stage

    stage.take_over(results_of(source, label), results_of(target, label))


def _dense_model(run: Run, checkpoints: dict[str, Path]) -> DenseModel | None:
    """The checkpoint whose predictions the others are compared with, if the configuration names one.

    The run's dense model is the measure of what belongs to the run; a foreign checkpoint is compared only if asked.
    """
    from sppctl.evaluate.perplexities import DenseModel
    from sppctl.model import checkpoint

    name = run.config.eval.divergence
    if name is None or not run.config.eval.perplexity:
        return None
    if name == "base" and not set(checkpoints) & {"pruned", "merged", "adapter"}:
        return None
    directory = dense.same_base(run) if name == "base" else checkpoint.locate(name, key="eval.divergence")
    return DenseModel(name, directory, run.config.model.trust_remote_code, run.directory)


def results_of(run: Run, label: str) -> Path:
    """The results file of a checkpoint."""
    return run.directory / "eval" / f"{label}.json"


def checkpoints_to_measure(run: Run, models: list[str]) -> dict[str, Path | None]:
    """Labels and directories of checkpoints that are named on the command line; none named: the run's newest.

    The base model has no directory here, since it may have to be unpacked first.
    """
    from sppctl.model import checkpoint

    wanted: list[str | None] = [*models] or [None]
    places: dict[str, Path | None] = {}
    for label, path in (_checkpoint_to_measure(run, model) for model in wanted):
        taken = places.get(label)
        if path is not None and taken is not None and taken.resolve() != path.resolve():
            label = f"{label}-{checkpoint.fingerprint(path)[:6]}"
        places[label] = path
    return places


def _checkpoint_to_measure(run: Run, model: str | None) -> tuple[str, Path | None]:
    from sppctl.model import checkpoint

    if model is None:
        model = next((label for label in ("merged", "pruned") if run.record(OWN[label]) is not None), "base")
    if model == "base":
        return model, None
    if model in OWN and run.record(OWN[model]) is not None:
        return model, run.path(OWN[model])
    directory = checkpoint.locate(model, key="--model", adapters=True)
    known = {(run.directory / name).resolve(): name for name in (dense.BASE, *OWN)}
    return known.get(directory.resolve()) or _label(model, directory.resolve(), {dense.BASE, *OWN}), directory


def _label(model: str, directory: Path, reserved: set[str]) -> str:
    """A file name for a checkpoint that is not the run's own: its path below this folder, else its whole path."""
    name = model
    if Path(model).is_dir():
        here = Path.cwd()
        name = str(directory.relative_to(here) if directory.is_relative_to(here) else directory)
    label = re.sub(r"[^\w.-]+", "-", name.replace("/", "--")).strip("-.")
    return paths.file_stem(label if label and label not in reserved else f"{directory.parent.name}--{directory.name}")
