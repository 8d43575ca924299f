"""The records of runs and what is computed from them once: rows, differences, means over seeds, comparisons.

The share of the gap recovered is (merged - pruned) / (base - pruned), for perplexities with their logarithms: 0 is the
pruned model, 1 the dense one. Where pruning did no harm there is no gap.
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path

from sppctl.config import recorded
from sppctl.config.load import config_keys, flatten, result_keys
from sppctl.config.settings import Config
from sppctl.config.yaml12 import dump_yaml, inline, parse_yaml, read_text
from sppctl.evaluate.results import Json, Results
from sppctl.evaluate.values import OF_CONTENT, Kind, Quantity, Value, distinguish, values_of
from sppctl.files.names import RESOLVED
from sppctl.records import LayerRecord, Sample, to_json
from sppctl.report import records, significance
from sppctl.report.records import Record
from sppctl.report.significance import Comparison, Measured, TaskSamples

IN_ROWS = ("prune.method", "prune.pattern", "train.method")  # have their own columns
# prefixes of the keys that a checkpoint depends on; later checkpoints depend on all keys
DEPENDS = {"base": ("model.",), "pruned": ("model.", "prune.", "run.seed")}
# each stage, and the checkpoints that depend on its record
MADE_BY = {"prune": ("pruned", "adapter", "merged"), "train": ("adapter", "merged"), "merge": ("merged",)}
SHAREABLE = ("base", "pruned")  # checkpoints that runs may share
SEED, COMPUTED = "run.seed", "model.compute_dtype"
APART = (*OF_CONTENT, "batch", "seed")  # circumstances in which numbers of several runs have other names


# --- rows -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One checkpoint of one run."""

    run: str  # its directory
    checkpoint: str  # base, pruned, adapter, merged, or another label
    method: str | None  # of the pruning; None for the dense model
    pattern: str | None
    training: str | None  # its method; None without training
    seed: int | None  # of the run, if a stage recorded it
    fingerprint: str | None
    sparsity: Json  # summary of the checkpoint's zeros
    values: dict[Quantity, Value]
    difference: dict[Quantity, float]  # value - base, for quantities that both have
    recovered: dict[Quantity, float]  # share of the gap, for quantities that base, pruned and this one have
    # among several runs: the configuration keys in which they differ, if this checkpoint depends on them
    settings: Json = field(default_factory=dict)

    def to_json(self) -> Json:
        """The content of reports, with the names of quantities."""
        content = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "values"}
        for key in ("difference", "recovered"):
            content[key] = {quantity.label: number for quantity, number in content[key].items()}
        return content | {"measures": {quantity.label: value.to_json() for quantity, value in self.values.items()}}


def gap_recovered(kind: Kind, base: float, pruned: float, value: float) -> float | None:
    """(value - pruned) / (base - pruned), of logarithms for perplexities; None where pruning did no harm."""
    if kind == Kind.PERPLEXITY:
        base, pruned, value = -math.log(base), -math.log(pruned), -math.log(value)
    elif kind != Kind.ACCURACY:
        return None
    return (value - pruned) / (base - pruned) if base > pruned else None


def pattern_text(sparsity: Json) -> str:
    """The N:M patterns that a checkpoint holds, or unstructured, or dense."""
    return ", ".join(sparsity["patterns"]) or ("unstructured" if sparsity["sparse_matrices"] else "dense")


def settings_of(stages: Mapping[str, Record]) -> Json:
    """The configuration with which the stages were made."""
    return recorded.merged(record.settings for record in stages.values())


def quantities(rows: Iterable[Row]) -> list[Quantity]:
    """The quantities of rows: perplexities, divergences, agreements, then tasks in order of appearance."""
    first = (Kind.PERPLEXITY, Kind.DIVERGENCE, Kind.AGREEMENT)
    unique = dict.fromkeys(quantity for row in rows for quantity in row.values)
    return sorted(unique, key=lambda quantity: (*first, quantity.metric.kind).index(quantity.metric.kind))


def headlines(rows: Iterable[Row]) -> list[Quantity]:
    """The quantities that a paper quotes: perplexities, and means over tasks, or the tasks if there is no mean."""
    unique = quantities(rows)
    accuracies = [quantity for quantity in unique if quantity.metric.kind == Kind.ACCURACY]
    means = [quantity for quantity in accuracies if quantity.mean is not None]
    return [quantity for quantity in unique if quantity.metric.kind == Kind.PERPLEXITY] + (means or accuracies)


# --- one run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class RunStudy:
    """The records of a run, in the order of the pipeline, and what is computed from them."""

    directory: str
    config: str | None  # YAML; None if unknown
    stages: dict[str, Record]
    checkpoints: dict[str, Results]
    comparisons: Sequence[Comparison] = ()  # of every checkpoint with the dense and the pruned one
    left_out: Sequence[str] = ()  # a note for each record and file of samples that is left out
    # of the tasks of the merged checkpoint, to compare runs
    task_samples: Mapping[Measured, TaskSamples] = field(default_factory=dict)
    samples: Sequence[Sample] = ()  # what the checkpoints wrote

    @classmethod
    def of(cls, run_dir: Path) -> RunStudy:
        """Reads a run; UserError if a record is damaged.

        Its configuration is that of its stages; of a run without stages that of its last command.
        """
        stages, checkpoints, notes = records.read(run_dir)
        samples = {}
        for label, content in checkpoints.items():
            samples[label], unused_files = significance.read_samples(run_dir / f"eval/{label}.samples", content.tasks)
            notes += unused_files
        config = None
        if settings := settings_of(stages):
            config = dump_yaml(settings)
        elif (run_dir / RESOLVED).is_file():
            config = read_text(run_dir / RESOLVED)
        comparisons = []
        for first, second in itertools.product(SHAREABLE, checkpoints):
            if first in checkpoints and second not in ("base", first):
                entries = significance.compare_texts(checkpoints[first].texts, checkpoints[second].texts)
                entries += significance.compare_tasks(samples[first], samples[second])
                comparisons += [Comparison(first, second, entries)] if entries else []
        written, outdated = records.read_samples(run_dir, stages)
        of_tasks = samples.get("merged", {})
        return cls(str(run_dir), config, stages, checkpoints, comparisons, notes + outdated, of_tasks, written)

    @property
    def layers(self) -> list[LayerRecord]:
        """The records of all pruned layers; empty without pruning."""
        return self.stages["prune"].metrics.layers if "prune" in self.stages else []

    @property
    def seconds(self) -> dict[str, float]:
        """The time of every stage and evaluation that took any."""
        seconds = {stage: records.seconds(record) for stage, record in self.stages.items()}
        for label, content in self.checkpoints.items():
            seconds[f"eval {label}"] = sum(result.seconds for result in content.results)
        return {name: value for name, value in seconds.items() if value}

    @property
    def seed(self) -> int | None:
        """The seed of the run, if a stage recorded it."""
        return next((record.seed for record in self.stages.values()), None)

    @cached_property
    def notes(self) -> list[str]:
        """Notes on what is left out and what cannot be compared."""
        pairs = [(f"{pair.first} and {pair.second}", entry) for pair in self.comparisons for entry in pair.entries]
        comparison_notes = [f"{names}, {entry.name}: {entry.note}" for names, entry in pairs if entry.note]
        return [*self.left_out, *self._values[1], *comparison_notes]

    @cached_property
    def _values(self) -> tuple[dict[str, dict[Quantity, Value]], list[str]]:
        """The numbers of each checkpoint, and a note for each quantity that was measured differently."""
        values = {label: values_of(content.results) for label, content in self.checkpoints.items()}
        return distinguish(values, self.seed)

    @cached_property
    def rows(self) -> list[Row]:
        """One row per checkpoint."""
        numbers = {
            label: {quantity: value.number for quantity, value in values.items() if value.number is not None}
            for label, values in self._values[0].items()
        }
        base, pruned = numbers.get("base", {}), numbers.get("pruned", {})
        rows = []
        for label, current in numbers.items():
            prune, train, merge = (
                self.stages[stage].metrics if stage in self.stages and label in labels else None
                for stage, labels in MADE_BY.items()
            )
            is_changed = merge is not None and not merge.pattern_unchanged
            sparsity = self.checkpoints[label].sparsity
            row = Row(
                run=self.directory,
                checkpoint=label,
                method=prune and prune.method,
                pattern=pattern_text(sparsity) if is_changed or prune is None else prune.pattern,
                training=train and train.method,
                seed=self.seed,
                fingerprint=self.checkpoints[label].fingerprint,
                sparsity=sparsity,
                values=self._values[0][label],
                difference={key: current[key] - base[key] for key in current if key in base and label != "base"},
                recovered={
                    key: share
                    for key in current
                    if label in MADE_BY["train"]  # checkpoints from elsewhere do not recover the gap of this run
                    if key in base and key in pruned
                    if (share := gap_recovered(key.metric.kind, base[key], pruned[key], current[key])) is not None
                },
            )
            rows.append(row)
        return rows

    def to_json(self) -> Json:
        """The content of ``report.json``."""
        return {
            "run": self.directory,
            "config": self.config,
            "stages": to_json(self.stages),
            "checkpoints": {label: content.to_json() for label, content in self.checkpoints.items()},
            "comparisons": [asdict(pair) for pair in self.comparisons],
            "notes": self.notes,
            "samples": to_json(self.samples),
            "table": [row.to_json() for row in self.rows],
        }


# --- several runs -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OverSeeds:
    """Statistics of checkpoints that differ only in the seed."""

    row: Row  # of one of them, without run.seed in its settings
    seeds: int
    numbers: dict[Quantity, tuple[float, float]]  # mean and standard deviation (n - 1) of quantities that all have


def _apart(rows: Sequence[Row], keys: Iterable[str]) -> list[Row]:
    """The rows of several runs; numbers that differ in one of these circumstances have other names."""
    values = {str(place): own for place, own in enumerate(_with_odd_seeds(rows))}
    named, _ = distinguish(values, None, list(keys))
    result = []
    for row, renamed in zip(rows, named.values(), strict=True):
        names = dict(zip(row.values, renamed, strict=True))
        own = {names[quantity]: replace(value, quantity=names[quantity]) for quantity, value in row.values.items()}
        difference = {names[quantity]: number for quantity, number in row.difference.items()}
        recovered = {names[quantity]: share for quantity, share in row.recovered.items()}
        result.append(replace(row, values=own, difference=difference, recovered=recovered))
    return result


def _with_odd_seeds(rows: Sequence[Row]) -> Iterator[list[Value]]:
    """The values of rows; where seeds of few-shot examples differ, without those that are the seed of the run.

    Runs that differ in their seed have the same quantities, so that these can be averaged.
    """
    seeds: dict[Quantity, set[str | None]] = {}
    for quantity, value in (item for row in rows for item in row.values.items()):
        seeds.setdefault(quantity, set()).add(value.circumstances.get("seed"))
    for row in rows:
        usual = {str(row.seed), str(row.settings.get(SEED))}
        yield [
            replace(value, circumstances={key: text for key, text in value.circumstances.items() if key != "seed"})
            if len(seeds[quantity]) > 1 and value.circumstances.get("seed") in usual
            else value
            for quantity, value in row.values.items()
        ]


def _dtypes(row: Row) -> list[str]:
    return sorted({value.dtype or "unknown" for value in row.values.values()})


@dataclass(frozen=True, eq=False)
class Study:
    """One or more runs; a single one has only its own rows and comparisons."""

    runs: Sequence[RunStudy]

    @classmethod
    def of(cls, run_dirs: Iterable[Path]) -> Study:
        """Reads runs; UserError if a record is damaged."""
        return cls([RunStudy.of(path) for path in run_dirs])

    @cached_property
    def rows(self) -> list[Row]:
        """The rows of all runs, with the settings in which the runs differ.

        A dense or pruned checkpoint that runs share has one row if its numbers are the same; trained checkpoints have
        one per run. If rows were computed in different dtypes, the settings include the dtype; if a row has several,
        the names of quantities say in which they differ.
        """
        if len(self.runs) == 1:
            return self.runs[0].rows
        trees = [parse_yaml(run.config or "", f"{run.directory}/{RESOLVED}") for run in self.runs]
        configs = [
            flatten(recorded.completed(tree), keys=config_keys()) if isinstance(tree, dict) else {} for tree in trees
        ]
        # only keys that can change weights: results record their dtype and their settings
        relevant = {*flatten(result_keys(Config()))} - {*IN_ROWS, COMPUTED}
        settings_of = {k: [config[k] for config in configs if k in config] for k in config_keys() if k in relevant}
        keys = [
            key
            for key, values in settings_of.items()
            if not key.startswith("eval.") and any(value != values[0] for value in values)
        ]
        rows: list[Row] = []
        seen = []
        for run, config in zip(self.runs, configs, strict=True):
            for row in run.rows:
                depends = DEPENDS.get(row.checkpoint, "")
                settings = {key: inline(config[key]) for key in keys if key in config and key.startswith(depends)}
                identity = (row.checkpoint, row.fingerprint, row.method, row.pattern, settings, row.values)
                if row.fingerprint is None or row.checkpoint not in SHAREABLE or identity not in seen:
                    rows.append(replace(row, settings=settings))
                    seen.append(identity)
        if any(len(_dtypes(row)) > 1 for row in rows):
            return _apart(rows, [*APART, "dtype"])
        dtypes = ["".join(_dtypes(row)) for row in rows]
        if len(set(dtypes)) > 1:
            rows = [
                replace(row, settings=row.settings | {COMPUTED: dtype}) for row, dtype in zip(rows, dtypes, strict=True)
            ]
        return _apart(rows, APART)

    @cached_property
    def seeds(self) -> list[OverSeeds]:
        """Means over rows that differ only in the seed, if there are several."""
        groups: dict[str, dict[str, Row]] = {}
        for row in (row for row in self.rows if SEED in row.settings):
            settings = {key: value for key, value in row.settings.items() if key != SEED}
            identity = str((row.checkpoint, row.method, row.pattern, row.training, settings))
            # of several runs with the same seed the last counts
            groups.setdefault(identity, {})[str(row.settings[SEED])] = replace(row, settings=settings)
        aggregated = []
        for group in (list(by_seed.values()) for by_seed in groups.values() if len(by_seed) > 1):
            numbers = {}
            for quantity in group[0].values:
                numbers_of_rows = [row.values[quantity].number for row in group if quantity in row.values]
                finite = [number for number in numbers_of_rows if number is not None]
                if len(finite) == len(group):
                    numbers[quantity] = (statistics.fmean(finite), statistics.stdev(finite))
            aggregated.append(OverSeeds(group[0], len(group), numbers))
        return aggregated

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """The merged checkpoint of every run against that of the first run that has one.

        For tasks the means are compared, or the tasks if there is no mean; texts only with the same tokenizer.
        """
        names = relative_paths(run.directory for run in self.runs)
        merged = [run for run in self.runs if "merged" in run.checkpoints]
        comparisons = []
        for second in merged[1:]:
            first, first_texts = merged[0], merged[0].checkpoints["merged"].texts
            tokenizers = {result.tokenizer for result in first_texts}  # windows of other tokens cannot be paired
            second_texts = [text for text in second.checkpoints["merged"].texts if text.tokenizer in tokenizers]
            tasks = significance.compare_tasks(first.task_samples, second.task_samples)
            entries = significance.compare_texts(first_texts, second_texts)
            entries += [entry for entry in tasks if entry.is_mean] or tasks
            if entries:
                comparisons.append(Comparison(names[first.directory], names[second.directory], entries))
        return comparisons

    def to_json(self) -> Json:
        """The content of ``report.json``; for a single run, that of the run."""
        if len(self.runs) == 1:
            return self.runs[0].to_json()
        return {
            "table": [row.to_json() for row in self.rows],
            "comparisons": [asdict(pair) for pair in self.comparisons],
            "runs": [run.to_json() for run in self.runs],
        }


def short_names(rows: Iterable[Row]) -> dict[str, str]:
    """The settings in which rows differ, and their short names: rank for train.rank, if no other key ends in rank."""
    keys = list(dict.fromkeys(key for row in rows for key in row.settings))
    leaves = ["model" if key == "model.path" else key.rpartition(".")[2] for key in keys]
    return {key: leaf if leaves.count(leaf) == 1 else key for key, leaf in zip(keys, leaves, strict=True)}


def relative_paths(runs: Iterable[str]) -> dict[str, str]:
    """The directories of runs relative to the directory that contains them all."""
    runs = list(dict.fromkeys(runs))
    if len(runs) < 2:
        return {run: run for run in runs}
    common = os.path.commonpath([os.path.dirname(os.path.abspath(run)) for run in runs])
    return {run: os.path.relpath(run, common) for run in runs}
