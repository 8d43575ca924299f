"""What a run has recorded: read, checked for being whole, and without what belongs to weights that are gone.

A stage that is redone leaves the measures of its older weights behind, and the checkpoints that were made from them.
Their numbers would appear under the new stage's name, so they are left out, and a note lists them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sppctl import records as stage_records
from sppctl.errors import UserError
from sppctl.evaluate.results import REMEDY, Results
from sppctl.files.names import DIRECTORIES, RECORD
from sppctl.records import StageRecord

STAGES = {folder: stage for stage, folder in DIRECTORIES.items()}
ORDER = ("base", *STAGES)
SPARSITY = ("sparsity", "patterns", "sparse_matrices", "bytes")
# what is wrong with a stage whose input of this name has since been replaced
OUTDATED = {
    "pruned": "was made from other weights than pruned/ holds",
    "base": "was made with another dense model than pruned/",
    "adapter": "was merged with another adapter than adapter/ holds",
}

Record = StageRecord[Any]  # with the metrics of its stage


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
                raise UserError(f"{path} is damaged (it has no sparsity.{key}); {REMEDY}")
        results[path.stem] = loaded
    notes = _leave_out_stages(run_dir, stages)
    return stages, results, notes + _leave_out_results(run_dir, stages, results)


def no_run(run_dir: Path) -> UserError:
    """The error about a directory without records."""
    return UserError(f"{run_dir} is not a run directory (no */stage.json, no eval/*.json); give the run.dir of a run")


# --- of the weights that are there ------------------------------------------------------------------------------------


def _leave_out_stages(run_dir: Path, stages: dict[str, Record]) -> list[str]:
    """Removes stages that were made from other weights than those beside them, which tables would call theirs."""
    held, notes = _fingerprints(stages), []
    for stage in ("train", "merge"):
        used = stages[stage].inputs if stage in stages else {}
        problem = next((text for name, text in OUTDATED.items() if _differ(used.get(name), held[name])), None)
        if problem is not None:
            del stages[stage]
            notes.append(f"{run_dir / DIRECTORIES[stage]} {problem}; sppctl {stage} --force")
    return notes


def _leave_out_results(run_dir: Path, stages: dict[str, Record], results: dict[str, Results]) -> list[str]:
    held, notes = _fingerprints(stages), []
    if held["adapter"] is not None:  # is measured on the pruned weights
        held["adapter"] = held["pruned"] and f"{held['pruned']}+{held['adapter']}"
    for label, content in list(results.items()):
        compared = [result.measure.reference for result in content.texts if result.numbers.compared_with is None]
        if _differ(content.fingerprint, held.get(label)):
            what = "pruned/ was made from" if label == "base" else f"{label}/ holds"
            problem = f"measures other weights than {what}; sppctl eval --model {label}"
        elif label in STAGES and STAGES[label] not in stages and (run_dir / label / RECORD).is_file():
            problem = "measures weights that are left out with their stage"
        elif any(_differ(reference, held["base"]) for reference in compared):
            problem = f"compares with another dense model than was pruned; sppctl eval --model {label}"
        else:
            continue
        del results[label]
        notes.append(f"{run_dir / 'eval' / label}.json {problem}")
    return notes


def _fingerprints(stages: dict[str, Record]) -> dict[str, str | None]:
    """Of the dense model that was pruned, and of what each stage made; None where a stage is missing."""
    held = {folder: stages[stage].output if stage in stages else None for folder, stage in STAGES.items()}
    return held | {"base": stages["prune"].inputs.get("base") if "prune" in stages else None}


def _differ(one: str | None, other: str | None) -> bool:
    """Where a stage is missing nothing is known to differ."""
    return None not in (one, other) and one != other
