"""Compares a run's files, read in full, with the hashes in its records."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sppctl import console, records
from sppctl.errors import UserError
from sppctl.evaluate import tasks
from sppctl.evaluate.results import Results
from sppctl.files.integrity import DAMAGED, MISSING, OK, compare, explain
from sppctl.files.names import DIRECTORIES, RECORD, SAMPLES
from sppctl.report.records import no_run, stored_samples


@dataclass(frozen=True)
class Checked:
    """One file of a run."""

    artefact: str  # its folder in the run, or . for the run itself
    file: str  # its path in that folder
    state: str  # ``ok``, ``damaged``, ``missing``, or ``surplus``: not recorded, but would be loaded
    problem: str | None = None  # problem and fix; None: the file is ok


def execute(run_dir: Path) -> list[Checked]:
    """Reads every byte of a run's published stages and results.

    Raises:
        UserError: there is no run, or a file cannot be read.
    """
    stages = {"base": ("base", f"delete {run_dir / 'base'} to unpack it again")}
    stages |= {folder: (stage, records.remedy(stage, run_dir / folder)) for stage, folder in DIRECTORIES.items()}
    checked = [file for folder, stage in stages.items() for file in _artefact(run_dir / folder, *stage)]
    checked += [file for path in sorted((run_dir / "eval").glob("*.json")) for file in _results(path)]
    if not checked:
        raise no_run(run_dir)
    return checked + _samples(run_dir)


def _artefact(directory: Path, stage: str, remedy: str) -> list[Checked]:
    if not directory.is_dir():
        return []
    name, path = directory.name, directory / RECORD
    try:
        record = records.read_content(path, stage, remedy)
    except UserError as error:
        return [Checked(name, RECORD, DAMAGED if path.is_file() else MISSING, str(error))]
    states = compare(directory, record["files"], reread=True)
    problems = {file: explain(directory / file, state, remedy) for file, state in states.items() if state != OK}
    files = [Checked(name, file, state, problems.get(file)) for file, state in sorted(states.items())]
    return [Checked(name, RECORD, OK), *files]


def _results(path: Path) -> list[Checked]:
    try:
        content = Results.load(path)
    except UserError as error:
        return [Checked("eval", path.name, DAMAGED, str(error))]
    assert content is not None
    samples = path.with_suffix(".samples")
    incomplete = [result.measure.task for result in content.tasks if not tasks.has_samples(result, samples)]
    fix = f"{console.command('eval', f'--model={path.stem}', run=path.parents[1])} measures them again"
    problem = f"{samples} does not hold the samples of"
    damaged = [Checked("eval", samples.name, DAMAGED, f"{problem} {task}; {fix}") for task in incomplete]
    return [Checked("eval", path.name, OK), *damaged]


def _samples(run_dir: Path) -> list[Checked]:
    try:
        return [] if stored_samples(run_dir) is None else [Checked(".", SAMPLES, OK)]
    except UserError as error:
        return [Checked(".", SAMPLES, DAMAGED, str(error))]
