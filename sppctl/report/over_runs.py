"""Several runs side by side: in which configuration keys they differ, what depends on the seed, which is better."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sppctl.config.load import config_keys, flatten, result_keys
from sppctl.config.settings import Config
from sppctl.config.yaml12 import parse_yaml
from sppctl.report import significance
from sppctl.report.measures import Row, rows

IN_ROWS = ("prune.method", "prune.pattern", "train.method")  # have columns of their own
# the keys that a checkpoint depends on; later ones depend on all
DEPENDS = {"base": ("model.",), "pruned": ("model.", "prune.", "run.seed")}
PLAIN = ("base", "pruned")  # what runs may share
SEED, COMPUTED = "run.seed", "model.compute_dtype"


def rows_of_all(runs: list[dict[str, Any]]) -> list[Row]:
    """The rows of several runs with the settings in which the runs differ.

    A dense model that runs share stands there once, and so does a pruned checkpoint, if its numbers are the same. What
    was trained stands there for every run. Where rows were computed in different dtypes, the settings say so.
    """
    configs = [_config(run) for run in runs]
    keys = _differing(configs)
    found: list[Row] = []
    seen = []
    for run, config in zip(runs, configs, strict=True):
        for row in rows(run):
            own = {key: config[key] for key in keys if key in config and _concerns(key, row)}
            identity = (row.checkpoint, row.fingerprint, row.method, row.pattern, own, row.measures)
            if row.fingerprint is None or row.checkpoint not in PLAIN or identity not in seen:
                found.append(replace(row, settings=own))
                seen.append(identity)
    dtypes = [" and ".join(sorted({m.dtype or "unknown" for m in row.measures.values()})) for row in found]
    if len(runs) == 1 or len(set(dtypes)) == 1:  # within a run the names of measures say it
        return found
    return [replace(row, settings=row.settings | {COMPUTED: dtype}) for row, dtype in zip(found, dtypes, strict=True)]


def _config(run: dict[str, Any]) -> dict[str, Any]:
    tree = parse_yaml(run["config"] or "", f"{run['run']}/resolved.yaml")
    return flatten(tree) if isinstance(tree, dict) else {}


def _differing(configs: list[dict[str, Any]]) -> list[str]:
    """Keys with several values, of those that can change weights; what changes a measure is in the measure's name."""
    relevant = {*flatten(result_keys(Config()))} - {*IN_ROWS}
    values = {
        key: [config[key] for config in configs if key in config]
        for key in config_keys()
        if key in relevant - {COMPUTED} and not key.startswith("eval.")  # what was computed in is in the results
    }
    return [key for key, found in values.items() if any(value != found[0] for value in found)]


def _concerns(key: str, row: Row) -> bool:
    return key.startswith(DEPENDS.get(row.checkpoint, ""))


def short_names(found: list[Row]) -> dict[str, str]:
    """The settings in which rows differ, and their short names: rank for train.rank, where only one key ends so."""
    keys = list(dict.fromkeys(key for row in found for key in row.settings))
    leaves = ["model" if key == "model.path" else key.rpartition(".")[2] for key in keys]
    return {key: leaf if leaves.count(leaf) == 1 else key for key, leaf in zip(keys, leaves, strict=True)}


def places(runs: Iterable[str]) -> dict[str, str]:
    """The directories of runs as seen from the folder that they share."""
    runs = list(dict.fromkeys(runs))
    if len(runs) < 2:
        return {run: run for run in runs}
    shared = os.path.commonpath([os.path.dirname(os.path.abspath(run)) for run in runs])
    return {run: os.path.relpath(run, shared) for run in runs}


# --- seeds ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OverSeeds:
    """What checkpoints have in common that differ in nothing but the seed.

    Attributes:
        row: one of them, for what they share; without their run's seed among its settings.
        seeds: how many there are.
        values: by measure, those that all of them have.
    """

    row: Row
    seeds: int
    values: dict[str, list[float]]

    def spread(self, name: str) -> tuple[float, float] | None:
        """Mean and standard deviation (of a sample: n - 1) of a measure."""
        values = self.values.get(name)
        return (statistics.fmean(values), statistics.stdev(values)) if values else None


def over_seeds(found: list[Row]) -> list[OverSeeds]:
    """The rows of :func:`rows_of_all` by all but their seed, those with several seeds."""
    groups: dict[str, list[Row]] = {}
    for row in (row for row in found if SEED in row.settings):
        rest = {key: value for key, value in row.settings.items() if key != SEED}
        groups.setdefault(str((row.checkpoint, row.method, row.pattern, row.training, rest)), []).append(row)
    aggregated = []
    for group in (group for group in groups.values() if len({row.settings[SEED] for row in group}) > 1):
        one = {str(row.settings[SEED]): row for row in group}.values()  # of a seed that stands there twice the last
        values: dict[str, list[float]] = {}
        for name in group[0].measures:
            numbers = [row.measures[name].value for row in one if name in row.measures]
            known = [number for number in numbers if number is not None]
            if len(known) == len(one):
                values[name] = known
        rest = {key: value for key, value in group[0].settings.items() if key != SEED}
        aggregated.append(OverSeeds(replace(group[0], settings=rest), len(one), values))
    return aggregated


# --- on the same samples ----------------------------------------------------------------------------------------------


def comparisons(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The merged checkpoint of every run against that of the first one that has one, as those within a run.

    Of tasks the means are compared, or the tasks where there is no mean; texts if their tokens are the same.
    """
    having = [run for run in runs if "merged" in run["checkpoints"]]
    names = places(run["run"] for run in runs)
    results = [run["checkpoints"]["merged"]["results"] for run in having]
    samples = [
        significance.read_samples(Path(run["run"]) / "eval/merged.samples", own)[0]
        for run, own in zip(having, results, strict=True)
    ]
    found = []
    for at in range(1, len(having)):
        entries = significance.compare_tasks(samples[0], samples[at])
        means = [entry for entry in entries if " mean" in entry["name"]]
        alike = _with_tokenizer(results[at], results[0])
        entries = significance.compare_texts(results[0], alike) + (means or entries)
        if entries:
            found.append({"first": names[having[0]["run"]], "second": names[having[at]["run"]], "entries": entries})
    return found


def _with_tokenizer(results: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results on tokens of a tokenizer that the others have too: windows of other tokens are no pairs."""
    known = [result.get("tokenizer") for result in others]
    return [result for result in results if result.get("tokenizer") in known]
