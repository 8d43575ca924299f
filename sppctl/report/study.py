"""What runs have recorded and what follows from it: rows, differences, means over seeds, comparisons; computed once.

The share of the gap recovered is (merged - pruned) / (base - pruned), of accuracies as they are, of perplexities after
taking logarithms: 0 is the pruned model, 1 the dense one. Where pruning did no harm there is no gap.
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from sppctl.config.load import config_keys, flatten, result_keys
from sppctl.config.settings import Config
from sppctl.config.yaml12 import dump_yaml, parse_yaml, read_text
from sppctl.evaluate.results import Json, Results, TextResult
from sppctl.evaluate.values import Kind, Quantity, TaskQuantity, Value, distinguish, values_of
from sppctl.files.names import DIRECTORIES
from sppctl.records import LayerRecord, to_json
from sppctl.report import records, significance
from sppctl.report.records import Record
from sppctl.report.significance import Comparison, Measured, TaskSamples

IN_ROWS = ("prune.method", "prune.pattern", "train.method")  # have columns of their own
# the keys that a checkpoint depends on; later ones depend on all
DEPENDS = {"base": ("model.",), "pruned": ("model.", "prune.", "run.seed")}
PLAIN = ("base", "pruned")  # what runs may share
SEED, COMPUTED = "run.seed", "model.compute_dtype"


# --- rows -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One checkpoint of one run."""

    run: str  # its directory
    checkpoint: str  # base, pruned, adapter, merged, or another label
    method: str | None  # of the pruning; None for the dense model
    pattern: str | None
    training: str | None  # its method; None before it
    seed: int | None  # of the run, where a stage recorded it
    fingerprint: str | None
    sparsity: Json  # summary of the checkpoint's zeros
    values: dict[Quantity, Value]
    difference: dict[Quantity, float]  # value - base, for what both have
    recovered: dict[Quantity, float]  # share of the gap, for what base, pruned and this one have
    # beside other runs: the configuration keys in which they differ, of those that made this checkpoint
    settings: Json = field(default_factory=dict)

    def to_json(self) -> Json:
        """For reports, with the names of quantities."""
        content = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "values"}
        content["measures"] = {quantity.label: value.to_json() for quantity, value in self.values.items()}
        named = {
            key: {one.label: number for one, number in content[key].items()} for key in ("difference", "recovered")
        }
        return content | named


def gap_recovered(kind: Kind, base: float | None, pruned: float | None, value: float | None) -> float | None:
    """(value - pruned) / (base - pruned), of logarithms for perplexities; None where pruning did no harm."""
    if kind not in (Kind.PERPLEXITY, Kind.ACCURACY) or base is None or pruned is None or value is None:
        return None
    if kind == Kind.PERPLEXITY:
        if not all(0 < number < math.inf for number in (base, pruned, value)):
            return None
        base, pruned, value = -math.log(base), -math.log(pruned), -math.log(value)
    return (value - pruned) / (base - pruned) if base > pruned else None


def pattern_text(sparsity: Json) -> str:
    """The N:M patterns that a checkpoint holds, or unstructured, or dense."""
    if sparsity["patterns"]:
        return ", ".join(sparsity["patterns"])
    return "unstructured" if sparsity["sparse_matrices"] else "dense"


def quantities(rows: Iterable[Row]) -> list[Quantity]:
    """Everything that rows have: perplexities, divergences, agreements, then tasks in order of appearance."""
    first = (Kind.PERPLEXITY, Kind.DIVERGENCE, Kind.AGREEMENT)
    unique = dict.fromkeys(quantity for row in rows for quantity in row.values)
    return sorted(unique, key=lambda one: first.index(one.metric.kind) if one.metric.kind in first else len(first))


def headlines(rows: Iterable[Row]) -> list[Quantity]:
    """What a paper quotes: perplexities, and means over tasks, or the tasks where there is no mean."""
    unique = dict.fromkeys(quantity for row in rows for quantity in row.values)
    accuracies = [one for one in unique if one.metric.kind == Kind.ACCURACY]
    means = [one for one in accuracies if isinstance(one, TaskQuantity) and one.task is None]
    return [one for one in unique if one.metric.kind == Kind.PERPLEXITY] + (means or accuracies)


def rows_of(
    run: str, stages: dict[str, Record], checkpoints: dict[str, Results], values: dict[str, dict[Quantity, Value]]
) -> list[Row]:
    """A row per checkpoint of a run."""
    numbers = {label: {key: value.number for key, value in own.items()} for label, own in values.items()}
    base, pruned = numbers.get("base", {}), numbers.get("pruned", {})
    prune, train, merge = (stages[stage].metrics if stage in stages else None for stage in DIRECTORIES)
    rows = []
    for label, own in values.items():
        sparsity = checkpoints[label].sparsity
        is_sparse, is_trained = label in ("pruned", "adapter", "merged"), label in ("adapter", "merged")
        as_pruned = is_sparse and (label != "merged" or merge is None or merge.pattern_unchanged)
        recovered = {
            key: gap_recovered(key.metric.kind, base.get(key), pruned.get(key), number)
            for key, number in numbers[label].items()
            if is_trained  # the gap of this run is no other checkpoint's
        }
        rows.append(
            Row(
                run=run,
                checkpoint=label,
                method=prune.method if is_sparse and prune is not None else None,
                pattern=prune.pattern if as_pruned and prune is not None else pattern_text(sparsity),
                training=train.method if is_trained and train is not None else None,
                seed=seed_of(stages),
                fingerprint=checkpoints[label].fingerprint,
                sparsity=sparsity,
                values=own,
                difference=_differences(base, numbers[label]) if label != "base" else {},
                recovered={key: share for key, share in recovered.items() if share is not None},
            )
        )
    return rows


def _differences(
    base: Mapping[Quantity, float | None], numbers: Mapping[Quantity, float | None]
) -> dict[Quantity, float]:
    found = {}
    for key, number in numbers.items():
        dense = base.get(key)
        if dense is not None and number is not None:
            found[key] = number - dense
    return found


def seed_of(stages: dict[str, Record]) -> int | None:
    """The seed of a run, where a stage recorded it."""
    return next((record.seed for record in stages.values()), None)


# --- one run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class RunStudy:
    """Everything a run has recorded, in the order of the pipeline, and what follows from it."""

    directory: str
    config: str | None  # YAML; None if it is unknown
    stages: dict[str, Record]
    checkpoints: dict[str, Results]
    rows: list[Row]  # one for each checkpoint
    comparisons: list[Comparison]  # of every two checkpoints that were measured on the same samples or windows
    notes: list[str]  # what is left out
    samples: dict[Measured, TaskSamples]  # of the merged checkpoint, to compare it with those of other runs

    @classmethod
    def of(cls, run_dir: Path) -> RunStudy:
        """Reads a run; UserError if a record is damaged."""
        stages, checkpoints, notes = records.read(run_dir)
        samples = {}
        for label, content in checkpoints.items():
            samples[label], strange = significance.read_samples(run_dir / f"eval/{label}.samples", content.tasks)
            notes += strange
        return cls.over(str(run_dir), _configuration(run_dir, stages), stages, checkpoints, samples, notes)

    @classmethod
    def over(
        cls,
        directory: str,
        config: str | None,
        stages: dict[str, Record],
        checkpoints: dict[str, Results],
        samples: Mapping[str, dict[Measured, TaskSamples]],
        notes: list[str],
    ) -> RunStudy:
        """What follows from records that have been read, and samples of tasks by label."""
        values = {label: values_of(content.results) for label, content in checkpoints.items()}
        by_quantity, unequal = distinguish(values, seed_of(stages))
        rows = rows_of(directory, stages, checkpoints, by_quantity)
        comparisons, left_out = _within(checkpoints, samples)
        merged = samples.get("merged", {})
        return cls(directory, config, stages, checkpoints, rows, comparisons, notes + unequal + left_out, merged)

    @property
    def layers(self) -> list[LayerRecord]:
        """The records of all layers that were pruned; none without pruning."""
        return self.stages["prune"].metrics.layers if "prune" in self.stages else []

    def to_json(self) -> Json:
        """For ``report.json``."""
        return {
            "run": self.directory,
            "config": self.config,
            "stages": to_json(self.stages),
            "checkpoints": {label: content.to_json() for label, content in self.checkpoints.items()},
            "comparisons": [asdict(pair) for pair in self.comparisons],
            "notes": self.notes,
            "table": [row.to_json() for row in self.rows],
        }


def _configuration(run_dir: Path, stages: dict[str, Record]) -> str | None:
    """The configuration that the stages were made with; of a run without stages what its last command was given."""
    settings: Json = {}
    for record in stages.values():
        settings |= record.settings
    if settings:
        seed = settings.pop("seed", None)
        return dump_yaml(({} if seed is None else {"run": {"seed": seed}}) | settings)
    resolved = run_dir / "resolved.yaml"
    return read_text(resolved) if resolved.is_file() else None


def _within(
    checkpoints: dict[str, Results], samples: Mapping[str, dict[Measured, TaskSamples]]
) -> tuple[list[Comparison], list[str]]:
    """Every checkpoint against the dense and the pruned one, and what that leaves out."""
    comparisons, notes = [], []
    for first, second in itertools.product(PLAIN, checkpoints):
        if first not in checkpoints or second in ("base", first):
            continue
        entries = significance.compare_texts(checkpoints[first].texts, checkpoints[second].texts)
        entries += significance.compare_tasks(samples.get(first, {}), samples.get(second, {}))
        notes += [f"{first} and {second}, {entry.name}: {entry.note}" for entry in entries if entry.note]
        if entries:
            comparisons.append(Comparison(first, second, entries))
    return comparisons, notes


# --- several runs -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OverSeeds:
    """What checkpoints have in common that differ in nothing but the seed."""

    row: Row  # one of them, for what they share; without their run's seed among its settings
    seeds: int
    numbers: dict[Quantity, list[float]]  # those that all of them have

    def spread(self, quantity: Quantity) -> tuple[float, float] | None:
        """Mean and standard deviation (of a sample: n - 1)."""
        numbers = self.numbers.get(quantity)
        return (statistics.fmean(numbers), statistics.stdev(numbers)) if numbers else None


@dataclass(frozen=True, eq=False)
class Study:
    """One or more runs side by side."""

    runs: list[RunStudy]
    rows: list[Row]  # of all runs, with the settings in which the runs differ; what runs share is there once
    seeds: list[OverSeeds]  # means over the rows that differ in nothing but the seed
    comparisons: list[Comparison]  # the merged checkpoint of every run against that of the first one that has one

    @classmethod
    def of(cls, run_dirs: Iterable[Path]) -> Study:
        """Reads runs and computes everything that their reports show; UserError if a record is damaged."""
        return cls.over([RunStudy.of(path) for path in run_dirs])

    @classmethod
    def over(cls, runs: Sequence[RunStudy]) -> Study:
        """Runs that have been read; a single one has nothing beside its own rows and comparisons."""
        if len(runs) == 1:
            return cls(list(runs), runs[0].rows, [], [])
        rows = _rows_of_all(runs)
        return cls(list(runs), rows, over_seeds(rows), _between(runs))

    def to_json(self) -> Json:
        """For ``report.json``: of a single run what it recorded."""
        if len(self.runs) == 1:
            return self.runs[0].to_json()
        return {
            "table": [row.to_json() for row in self.rows],
            "comparisons": [asdict(pair) for pair in self.comparisons],
            "runs": [run.to_json() for run in self.runs],
        }


def _rows_of_all(runs: Sequence[RunStudy]) -> list[Row]:
    """The rows of several runs with the settings in which the runs differ.

    A dense model that runs share is there once, and so is a pruned checkpoint, if its numbers are the same. What was
    trained is there for every run. Where rows were computed in different dtypes, the settings say so.
    """
    configs = [_config(run) for run in runs]
    keys = _differing(configs)
    rows: list[Row] = []
    seen = []
    for run, config in zip(runs, configs, strict=True):
        for row in run.rows:
            own = {
                key: config[key] for key in keys if key in config and key.startswith(DEPENDS.get(row.checkpoint, ""))
            }
            identity = (row.checkpoint, row.fingerprint, row.method, row.pattern, own, row.values)
            if row.fingerprint is None or row.checkpoint not in PLAIN or identity not in seen:
                rows.append(replace(row, settings=own))
                seen.append(identity)
    dtypes = [" and ".join(sorted({value.dtype or "unknown" for value in row.values.values()})) for row in rows]
    if len(set(dtypes)) == 1:  # within a run the names of quantities say it
        return rows
    return [replace(row, settings=row.settings | {COMPUTED: dtype}) for row, dtype in zip(rows, dtypes, strict=True)]


def _config(run: RunStudy) -> Json:
    tree = parse_yaml(run.config or "", f"{run.directory}/resolved.yaml")
    return flatten(tree) if isinstance(tree, dict) else {}


def _differing(configs: list[Json]) -> list[str]:
    """Keys with several values, of those that can change weights; what changes a number is in its name."""
    relevant = {*flatten(result_keys(Config()))} - {*IN_ROWS}
    values = {
        key: [config[key] for config in configs if key in config]
        for key in config_keys()
        if key in relevant - {COMPUTED} and not key.startswith("eval.")  # what was computed in is in the results
    }
    return [key for key, own in values.items() if any(value != own[0] for value in own)]


def short_names(rows: Iterable[Row]) -> dict[str, str]:
    """The settings in which rows differ, and their short names: rank for train.rank, where only one key ends so."""
    keys = list(dict.fromkeys(key for row in rows for key in row.settings))
    leaves = ["model" if key == "model.path" else key.rpartition(".")[2] for key in keys]
    return {key: leaf if leaves.count(leaf) == 1 else key for key, leaf in zip(keys, leaves, strict=True)}


def places(runs: Iterable[str]) -> dict[str, str]:
    """The directories of runs as seen from the folder that they share."""
    runs = list(dict.fromkeys(runs))
    if len(runs) < 2:
        return {run: run for run in runs}
    shared = os.path.commonpath([os.path.dirname(os.path.abspath(run)) for run in runs])
    return {run: os.path.relpath(run, shared) for run in runs}


def over_seeds(rows: list[Row]) -> list[OverSeeds]:
    """Rows by all but their seed, those with several seeds."""
    groups: dict[str, list[Row]] = {}
    for row in (row for row in rows if SEED in row.settings):
        rest = {key: value for key, value in row.settings.items() if key != SEED}
        groups.setdefault(str((row.checkpoint, row.method, row.pattern, row.training, rest)), []).append(row)
    aggregated = []
    for group in groups.values():
        of_seed = {str(row.settings[SEED]): row for row in group}.values()  # of a seed that is there twice the last
        if len(of_seed) < 2:
            continue
        numbers: dict[Quantity, list[float]] = {}
        for quantity in group[0].values:
            known = [row.values[quantity].number for row in of_seed if quantity in row.values]
            finite = [number for number in known if number is not None]
            if len(finite) == len(of_seed):
                numbers[quantity] = finite
        rest = {key: value for key, value in group[0].settings.items() if key != SEED}
        aggregated.append(OverSeeds(replace(group[0], settings=rest), len(of_seed), numbers))
    return aggregated


def _between(runs: Sequence[RunStudy]) -> list[Comparison]:
    """The merged checkpoint of every run against that of the first one that has one, as those within a run.

    Of tasks the means are compared, or the tasks where there is no mean; texts if their tokens are the same.
    """
    having = [run for run in runs if "merged" in run.checkpoints]
    if not having:
        return []
    first, *others = having
    names = places(run.directory for run in runs)
    texts = first.checkpoints["merged"].texts
    comparisons = []
    for other in others:
        tasks = significance.compare_tasks(first.samples, other.samples)
        means = [entry for entry in tasks if entry.is_mean]
        entries = significance.compare_texts(texts, _of_tokenizers(texts, other.checkpoints["merged"].texts))
        entries += means or tasks
        if entries:
            comparisons.append(Comparison(names[first.directory], names[other.directory], entries))
    return comparisons


def _of_tokenizers(known: list[TextResult], results: list[TextResult]) -> list[TextResult]:
    """The results on tokens of a tokenizer that the known ones have too: windows of other tokens are no pairs."""
    tokenizers = {result.tokenizer for result in known}
    return [result for result in results if result.tokenizer in tokenizers]
