"""What a run has recorded: read, checked for being whole, and without what belongs to weights that are gone.

A stage that is redone leaves the measures of its older weights behind, and the checkpoints that were made from them.
Their numbers would appear under the new stage's name, so they are left out, and a note lists them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sppctl import records as stage_records
from sppctl.errors import UserError
from sppctl.evaluate.results import REMEDY, Results
from sppctl.files.names import DIRECTORIES, RECORD
from sppctl.records import StageRecord

ORDER = ("base", "pruned", "adapter", "merged")
STAGES = {folder: stage for stage, folder in DIRECTORIES.items()}
SPARSITY = ("sparsity", "patterns", "sparse_matrices", "bytes")

Record = StageRecord[Any]  # with the metrics of its stage


def read(run_dir: Path) -> tuple[dict[str, Record], dict[str, Results], list[str]]:
    """The records of a run that belong together.

    Returns:
        ``stage.json`` by stage; results by label, in the order of the pipeline; a note for each that is left out.

    Raises:
        UserError: a record is damaged.
    """
    stages = {stage: record for folder, stage in STAGES.items() if (record := _stage(run_dir / folder, stage))}
    loaded = {path.stem: _results(path) for path in sorted((run_dir / "eval").glob("*.json"))}
    results = {label: loaded[label] for label in sorted(loaded, key=lambda label: (*ORDER, label).index(label))}
    notes = []
    for stage, note in _outdated_stages(run_dir, stages):
        del stages[stage]
        notes.append(note)
    for label, note in _outdated_results(run_dir, stages, results):
        del results[label]
        notes.append(note)
    return stages, results, notes


def _stage(folder: Path, stage: str) -> Record | None:
    path = folder / RECORD
    return stage_records.read(path, stage, f"sppctl {stage} --force redoes it") if path.is_file() else None


def _results(path: Path) -> Results:
    results = Results.load(path)
    assert results is not None
    _check(path, {"sparsity": results.sparsity}, [f"sparsity.{key}" for key in SPARSITY], REMEDY)
    return results


def _check(path: Path, content: Any, keys: list[str], remedy: str) -> None:
    """Raises UserError if a record lacks one of the keys, each written with dots."""
    for key in keys:
        inner = content
        for part in key.split("."):
            if not isinstance(inner, dict) or part not in inner:
                raise UserError(f"{path} is damaged (it has no {key}); {remedy}")
            inner = inner[part]


def demand(run_dir: Path) -> None:
    """Raises UserError if a directory has no records."""
    if not [*run_dir.glob(f"*/{RECORD}"), *run_dir.glob("eval/*.json")]:
        raise no_run(run_dir)


def no_run(run_dir: Path) -> UserError:
    """The error about a directory without records."""
    return UserError(f"{run_dir} is not a run directory (no */stage.json, no eval/*.json); give the run.dir of a run")


# --- of the weights that are there ------------------------------------------------------------------------------------


def _outdated_stages(run_dir: Path, stages: dict[str, Record]) -> Iterator[tuple[str, str]]:
    """The stages that were made from other weights than those beside them, which tables would call theirs."""
    pruned, base, adapter = _output(stages, "prune"), _base(stages), _output(stages, "train")
    gone = set()
    for stage, folder in (("train", "adapter"), ("merge", "merged")):
        used = stages[stage].inputs if stage in stages else {}
        if _differ(used.get("pruned"), pruned):
            gone.add(stage)
            yield stage, f"{run_dir / folder} was made from other weights than pruned/ holds; sppctl {stage} --force"
        elif _differ(used.get("base"), base):
            gone.add(stage)
            yield stage, f"{run_dir / folder} was made with another dense model than pruned/; sppctl {stage} --force"
    if "merge" in stages and "merge" not in gone and _differ(stages["merge"].inputs.get("adapter"), adapter):
        yield "merge", f"{run_dir / 'merged'} was merged with another adapter than adapter/ holds; sppctl merge --force"


def _outdated_results(
    run_dir: Path, stages: dict[str, Record], results: dict[str, Results]
) -> Iterator[tuple[str, str]]:
    pruned, adapter = _output(stages, "prune"), _output(stages, "train")
    held = {
        "base": _base(stages),
        "pruned": pruned,
        "adapter": f"{pruned}+{adapter}" if pruned and adapter else None,
        "merged": _output(stages, "merge"),
    }
    for label in list(results):
        path = run_dir / "eval" / f"{label}.json"
        stage = STAGES.get(label)
        if _differ(results[label].fingerprint, held.get(label)):
            what = "pruned/ was made from" if label == "base" else f"{label}/ holds"
            yield label, f"{path} measures other weights than {what}; sppctl eval --model {label}"
        elif stage is not None and stage not in stages and (run_dir / label / RECORD).is_file():
            yield label, f"{path} measures weights that are left out with their stage"
        elif any(_differ(reference, held["base"]) for reference in _compared_with_base(results[label])):
            yield label, f"{path} compares with another dense model than was pruned; sppctl eval --model {label}"


def _differ(one: str | None, other: str | None) -> bool:
    """Where a stage is missing nothing is known to differ."""
    return None not in (one, other) and one != other


def _base(stages: dict[str, Record]) -> str | None:
    """The dense model that was pruned."""
    return stages["prune"].inputs.get("base") if "prune" in stages else None


def _compared_with_base(results: Results) -> Iterator[str | None]:
    """What the run's dense model was whenever something was compared with it."""
    return (result.measure.reference for result in results.texts if result.numbers.compared_with is None)


def _output(stages: dict[str, Record], stage: str) -> str | None:
    """The fingerprint of what a stage made."""
    return stages[stage].output if stage in stages else None
