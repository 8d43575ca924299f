"""The records of cells: small JSON files, with what a page about them needs and no weights."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
from cells import SHARED, TEST, Cell, Record, num_rows

from sppctl import machine
from sppctl.evaluate.results import TaskResult, TextResult
from sppctl.records import StageRecord, to_json
from sppctl.report import records

# of the layers, matrices and logged steps in the records of stages only their numbers are kept
PRUNE = ("method", "pattern", "matrices", "sparsity", "mean_relative_output_error", "calibration")
TRAIN = ("method", "trainable_parameters", "steps", "tokens", "examples", "data_hash", "validation_loss", "train_loss")
MERGE = ("mask", "matrices", "zeros", "filled_zeros", "lost_weights", "pattern_unchanged")
TEXT = ("nll", "tokens", "windows", "seq_len", "documents_hash", "window_nll")
KEPT = {"prune": PRUNE, "train": TRAIN, "merge": MERGE}
VERSIONS = ("torch", "transformers", "sppctl")
BOOT = Path("/proc/sys/kernel/random/boot_id")  # of Linux


class Watch:
    """The time since it was made, and what other processes did meanwhile: whether it can be compared with others."""

    def __init__(self) -> None:
        self._start = self._now()

    def seen(self) -> Record:
        """The time until now, what others did in it, and where this was."""
        others, seconds = round(self.others(), 3), round(self._now()[0] - self._start[0], 1)
        return {"hardware": machine.describe(), "boot": boot(), "others": others, "seconds": seconds}

    def others(self) -> float:
        """The share of the machine's CPU time that processes other than this one and its children took until now."""
        elapsed, busy, own = (end - start for end, start in zip(self._now(), self._start, strict=True))
        return max(0.0, busy - own) / (elapsed * (os.cpu_count() or 1))

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """The clock, the busy seconds of all CPUs, and those of this process and its finished children."""
        machine, own = psutil.cpu_times(), os.times()
        busy = sum(machine) - machine.idle - getattr(machine, "iowait", 0.0) - getattr(machine, "guest", 0.0)
        return time.monotonic(), busy, sum(own[:4])


def load(folder: Path) -> dict[str, Record]:
    """The records in a folder, by the names of their cells."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def of_run(cell: Cell, run: Path, label: str) -> Record:
    """What a run says about a cell: its stages, its texts of prose and its tasks.

    Args:
        cell: the cell.
        run: its run directory.
        label: the measured checkpoint: base, pruned or merged.
    """
    stages, checkpoints, _ = records.read(run)
    measured = checkpoints[label]
    record: Record = {"cell": cell.settings, "stages": {}, "texts": {}, "tasks": {}}
    for name, stage in stages.items():
        record["stages"][name] = _stage(stage)
    for text in measured.texts:
        record["texts"][Path(text.measure.text).stem] = _text(text)
    for tasks in measured.tasks:
        record["tasks"] |= scores_of(tasks)
    found = measured.results[0].versions
    versions = {name: found[name] for name in VERSIONS if name in found}
    return record | {"versions": versions, "dtype": measured.results[0].dtype, "sparsity": measured.sparsity}


def of_diverged(cell: Cell, problem: str) -> Record:
    """The record of a cell whose training diverged: no loss on any window of its texts."""
    prose = "wikitext2" if cell.texts == TEST else "wikitext2-validation"
    windows = {prose: cell.max_tokens // SHARED["eval"]["seq_len"], "instructions": num_rows(cell.max_tokens)}
    texts = {
        name: {"nll": None, "tokens": number, "windows": number, "window_nll": [None] * number}
        for name, number in windows.items()
    }
    content = {"cell": cell.settings, "diverged": problem, "stages": {}, "texts": texts, "tasks": {}}
    return content | {"versions": machine.versions(*VERSIONS)}


def commit() -> str:
    """The commit of the project's code, with a mark if files were changed since; empty outside of a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def boot() -> str:
    """Something that differs between machines, and between two starts of one, if that is known."""
    return hashlib.sha256(BOOT.read_bytes()).hexdigest()[:12] if BOOT.is_file() else ""


def _stage(stage: StageRecord[Any]) -> Record:
    metrics = {name: to_json(getattr(stage.metrics, name)) for name in KEPT[stage.stage]}
    memory = max(stage.peak_memory_mb.values(), default=0.0)
    return metrics | {"seconds": stage.wall_time_s, "peak_memory_mb": memory}


def _text(result: TextResult) -> Record:
    numbers = {name: getattr(result.numbers, name) for name in TEXT}
    losses = result.numbers.window_nll
    return numbers | {"window_nll": [None if loss is None else round(loss, 4) for loss in losses]}


def scores_of(result: TaskResult) -> Record:
    """The score of every task, and the group that it belongs to."""
    found = {}
    for name, scores in result.numbers.tasks.items():
        metric = scores.metric or "acc"
        group = result.measure.group or result.measure.task
        error = scores.scores.get(f"{metric}_stderr")
        found[name] = {"group": group, "score": scores.scores[metric], "stderr": error, "n": scores.samples}
    return found
