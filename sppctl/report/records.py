"""The records of a run, checked for damage, without those of weights that have since been replaced.

When a stage is redone, the results of its older weights remain, and the checkpoints that were made from them. Their
numbers would appear under the name of the new stage, so they are left out, with a note for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from sppctl import console
from sppctl import records as stage_records
from sppctl.errors import UserError
from sppctl.evaluate.results import Results, remedy
from sppctl.files import sealed
from sppctl.files.names import DIRECTORIES, FOREIGN, RECORD, SAMPLES
from sppctl.records import Sample, SamplesRecord, StageRecord

STAGES = {folder: stage for stage, folder in DIRECTORIES.items()}
ORDER = ("base", *STAGES)
SPARSITY = ("sparsity", "patterns", "sparse_matrices", "bytes")

Record = StageRecord[Any]  # the type of its metrics depends on the stage


def read(run_dir: Path) -> tuple[dict[str, Record], dict[str, Results], list[str]]:
    """The records of a run that belong together; UserError if one is damaged.

    Returns:
        ``stage.json`` by stage; results by label, in the order of the pipeline; a note for each that is left out.
    """
    stages = {}
    for stage, folder in DIRECTORIES.items():
        path = run_dir / folder / RECORD
        if path.is_file():
            stages[stage] = stage_records.read(path, stage)
    results = {}
    paths = sorted((run_dir / "eval").glob("*.json"))
    for path in sorted(paths, key=lambda path: (*ORDER, path.stem).index(path.stem)):
        loaded = Results.load(path)
        assert loaded is not None
        for key in SPARSITY:
            if key not in loaded.sparsity:
                raise UserError(f"{path} is damaged (it has no sparsity.{key}); {remedy(path)}")
        results[path.stem] = loaded
    notes = _leave_out_stages(run_dir, stages)
    return stages, results, notes + _leave_out_results(run_dir, stages, results)


def seconds(record: Record) -> float:
    """The time of a stage, interrupted attempts included.

    Earlier versions recorded that of the last attempt alone, but of training also the time of all steps.
    """
    trained: float = record.metrics.seconds if record.stage == "train" else 0.0
    return max(record.wall_time_s, trained)


def stored_samples(run_dir: Path) -> SamplesRecord | None:
    """The file of samples of a run; None without one, UserError if it is damaged."""
    path = run_dir / SAMPLES
    if not path.is_file():
        return None
    fix = f"delete it and run {console.command('eval', run=run_dir)} again"
    try:
        return stage_records.from_json(SamplesRecord, sealed.read(path, fix))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); {fix}") from error


def read_samples(run_dir: Path, stages: Mapping[str, Record]) -> tuple[list[Sample], list[str]]:
    """What the checkpoints of a run wrote, and a note for each whose weights have since been replaced."""
    stored = stored_samples(run_dir)
    if stored is None:
        return [], []
    current = stage_records.fingerprints(stages)
    kept = {label for label, weights in stored.weights.items() if weights == current.get(label)}
    again = console.command("eval", run=run_dir)
    notes = [
        f"{run_dir / SAMPLES}: what {label} wrote is of weights that the run does not hold any more; {again}"
        for label in stored.weights
        if label not in kept
    ]
    samples = [
        replace(sample, completions=[one for one in sample.completions if one.checkpoint in kept])
        for sample in stored.samples
    ]
    return [sample for sample in samples if sample.completions], notes


def no_run(run_dir: Path) -> UserError:
    """The error about a directory without records."""
    return UserError(f"{run_dir} is not a run directory (no */stage.json, no eval/*.json); give the run.dir of a run")


# --- records of replaced weights --------------------------------------------------------------------------------------


def _leave_out_stages(run_dir: Path, stages: dict[str, Record]) -> list[str]:
    """Removes stages that were made from other weights than the run holds now; returns a note for each."""
    problems = {stage: stage_records.outdated(stages, stage) for stage in ("train", "merge")}
    notes = []
    for stage, problem in problems.items():
        if problem is not None:
            del stages[stage]
            notes.append(f"{run_dir / DIRECTORIES[stage]} {problem}; {console.command(stage, '--force', run=run_dir)}")
    if "merge" in stages and FOREIGN in stages["merge"].inputs:
        notes.append(f"{run_dir / DIRECTORIES['merge']} was merged with an adapter that was trained elsewhere")
    return notes


def _leave_out_results(run_dir: Path, stages: dict[str, Record], results: dict[str, Results]) -> list[str]:
    current, notes = stage_records.fingerprints(stages), []
    again = partial(console.command, "eval", run=run_dir)
    if current["adapter"] is not None:  # an adapter is measured on the pruned weights
        current["adapter"] = current["pruned"] and f"{current['pruned']}+{current['adapter']}"
    for label, content in list(results.items()):
        compared = [result.measure.reference for result in content.texts if result.numbers.compared_with is None]
        if stage_records.differ(content.fingerprint, current.get(label)):
            weights = "from which pruned/ was made" if label == "base" else f"in {label}/"
            problem = f"measures weights that differ from those {weights}; {again(f'--model={label}')}"
        elif label in STAGES and STAGES[label] not in stages and (run_dir / label / RECORD).is_file():
            problem = "measures weights that are left out with their stage"
        elif any(stage_records.differ(reference, current["base"]) for reference in compared):
            problem = f"compares with a different dense model than pruned/; {again(f'--model={label}')}"
        else:
            continue
        del results[label]
        notes.append(f"{run_dir / 'eval' / label}.json {problem}")
    return notes
