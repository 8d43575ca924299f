"""A run's files, read anew, against what its records say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sppctl.errors import UserError
from sppctl.evaluate import tasks
from sppctl.evaluate.results import Results
from sppctl.files import integrity, sealed
from sppctl.files.names import RECORD
from sppctl.report.records import no_run

STAGES = {"base": None, "pruned": "prune", "adapter": "train", "merged": "merge"}


@dataclass(frozen=True)
class Checked:
    """One file of a run."""

    artefact: str  # the folder in the run that it belongs to
    file: str  # its path in that folder
    state: str  # ``ok``, ``damaged``, ``missing``, or ``surplus``: not recorded, though it would be loaded
    problem: str | None = None  # what is wrong and what to do; None: nothing


def execute(run_dir: Path) -> list[Checked]:
    """Reads every byte of what the stages of a run have published, and its results.

    Raises:
        UserError: there is no run, or a file cannot be read.
    """
    found = [file for folder, stage in STAGES.items() for file in _artefact(run_dir / folder, stage)]
    for path in sorted((run_dir / "eval").glob("*.json")):
        found += _results(path)
    if not found:
        raise no_run(run_dir)
    return found


def _artefact(directory: Path, stage: str | None) -> list[Checked]:
    if not directory.is_dir():
        return []
    remedy = f"sppctl {stage} --force redoes the stage" if stage else f"delete {directory}, and it is unpacked again"
    path = directory / RECORD
    try:
        record = sealed.read(path, remedy)
        if record["stage"] != (stage or directory.name):
            raise UserError(f"{path} is the record of another stage ({record['stage']}); {remedy}")
    except UserError as error:
        state = integrity.DAMAGED if path.is_file() else integrity.MISSING
        return [Checked(directory.name, RECORD, state, str(error))]
    states = integrity.compare(directory, record["files"], anew=True)
    return [Checked(directory.name, RECORD, integrity.OK)] + [
        Checked(
            directory.name,
            name,
            state,
            None if state == integrity.OK else integrity.explain(directory / name, state, remedy),
        )
        for name, state in sorted(states.items())
    ]


def _results(path: Path) -> list[Checked]:
    try:
        content = Results.load(path)
    except UserError as error:
        return [Checked("eval", path.name, integrity.DAMAGED, str(error))]
    assert content is not None
    found = [Checked("eval", path.name, integrity.OK)]
    samples = path.with_suffix(".samples")
    for result in content.tasks:
        if not tasks.has_samples(result, samples):
            problem = f"{samples} does not hold the samples of {result.measure.task}; sppctl eval measures again"
            found.append(Checked("eval", samples.name, integrity.DAMAGED, problem))
    return found
