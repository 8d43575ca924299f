"""What was measured on the checkpoints of runs, in one shape: a row per checkpoint, and how it stands to the dense one.

The share of the gap recovered is (merged - pruned) / (base - pruned), of accuracies as they are, of perplexities after
taking logarithms: 0 is the pruned model, 1 the dense one. Where pruning did no harm there is no gap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from sppctl.report.readings import ACCURACY, AGREEMENT, DIVERGENCE, PERPLEXITY, Measure, measured, seed_of

GAP_FORMULA = (
    "gap recovered = (x - pruned) / (base - pruned), where x is the checkpoint's value; of perplexities the logarithms "
    "are compared"
)


@dataclass(frozen=True)
class Row:
    """One checkpoint of one run.

    Attributes:
        run: directory of the run.
        checkpoint: base, pruned, adapter, merged, or another label.
        method, pattern: of the pruning; None for the dense model.
        training: method of the training; None before it.
        seed: of the run, where a stage recorded it.
        fingerprint: of the weights.
        sparsity: summary of the checkpoint's zeros.
        measures: by name.
        difference: value - base by name, for what both have.
        recovered: share of the gap by name, for what base, pruned and this one have.
        settings: beside other runs, the configuration keys in which they differ, those that made this checkpoint.
    """

    run: str
    checkpoint: str
    method: str | None
    pattern: str | None
    training: str | None
    seed: int | None
    fingerprint: str | None
    sparsity: dict[str, Any]
    measures: dict[str, Measure]
    difference: dict[str, float]
    recovered: dict[str, float]
    settings: dict[str, Any] = field(default_factory=dict)


def gap_recovered(kind: str, base: float | None, pruned: float | None, value: float | None) -> float | None:
    """(value - pruned) / (base - pruned), of logarithms for perplexities; None where pruning did no harm."""
    if kind not in (PERPLEXITY, ACCURACY) or base is None or pruned is None or value is None:
        return None
    if kind == PERPLEXITY:
        if not all(0 < number < math.inf for number in (base, pruned, value)):
            return None
        base, pruned, value = -math.log(base), -math.log(pruned), -math.log(value)
    return (value - pruned) / (base - pruned) if base > pruned else None


def rows(run: dict[str, Any]) -> list[Row]:
    """A row per checkpoint of a collected run."""
    found_by_label, _ = measured(run)
    base, pruned = found_by_label.get("base", {}), found_by_label.get("pruned", {})
    stages = run["stages"]
    prune, train, merge = (stages.get(stage, {}).get("metrics", {}) for stage in ("prune", "train", "merge"))
    seed = seed_of(run)
    found = []
    for label, own in found_by_label.items():
        content = run["checkpoints"][label]
        sparse = label in ("pruned", "adapter", "merged")
        as_pruned = sparse and (label != "merged" or merge.get("pattern_unchanged", True))
        recovered = {
            name: gap_recovered(measure.kind, _value(base, name), _value(pruned, name), measure.value)
            for name, measure in own.items()
            if label in ("adapter", "merged")  # the gap of this run is no other checkpoint's
        }
        found.append(
            Row(
                run=run["run"],
                checkpoint=label,
                method=prune.get("method") if sparse else None,
                pattern=(prune.get("pattern") if as_pruned else None) or pattern_words(content["sparsity"]),
                training=train.get("method") if label in ("adapter", "merged") else None,
                seed=seed,
                fingerprint=content.get("fingerprint"),
                sparsity=content["sparsity"],
                measures=own,
                difference=_differences(base, own) if label != "base" else {},
                recovered={name: share for name, share in recovered.items() if share is not None},
            )
        )
    return found


def _value(measures: dict[str, Measure], name: str) -> float | None:
    return measures[name].value if name in measures else None


def _differences(base: dict[str, Measure], own: dict[str, Measure]) -> dict[str, float]:
    found = {}
    for name, measure in own.items():
        dense = _value(base, name)
        if dense is not None and measure.value is not None:
            found[name] = measure.value - dense
    return found


def pattern_words(sparsity: dict[str, Any]) -> str:
    """The N:M patterns that a checkpoint holds, or unstructured, or dense."""
    if sparsity["patterns"]:
        return ", ".join(sparsity["patterns"])
    return "unstructured" if sparsity["sparse_matrices"] else "dense"


def names(found: list[Row]) -> list[str]:
    """Every measure that a row has: perplexities, divergences, agreements, then tasks in order of appearance."""
    kinds = {name: measure.kind for row in found for name, measure in row.measures.items()}
    first = (PERPLEXITY, DIVERGENCE, AGREEMENT)
    return sorted(kinds, key=lambda name: first.index(kinds[name]) if kinds[name] in first else len(first))


def headlines(found: list[Row]) -> list[str]:
    """The measures a paper quotes: perplexities, and means over tasks, or the tasks where there is no mean."""
    kinds = {name: measure.kind for row in found for name, measure in row.measures.items()}
    accuracies = [name for name, kind in kinds.items() if kind == ACCURACY]
    means = [name for name in accuracies if " mean" in name]  # or a mean of some of its tasks
    return [name for name, kind in kinds.items() if kind == PERPLEXITY] + (means or accuracies)
