"""Computes cells: each stage in a process of its own, the records as soon as a cell is measured."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cells
import record
import rows
from cells import Cell, Scale

from sppctl.config.load import load_config
from sppctl.config.settings import ModelConfig
from sppctl.data import texts
from sppctl.files import strict_json
from sppctl.model import find
from sppctl.run.publish import exclusive

CONFIG = Path(__file__).resolve().parent / "study.yaml"
SPPCTL = [sys.executable, "-m", "sppctl"]
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # saves 8 % of a step; glibc reads it when a process starts
DIVERGED = "lower train.lr"  # what `sppctl train` advises when a loss, a gradient or the adapter is not finite
# seconds on two cores with AVX512: for a pruned model, a window in an epoch of its reconstruction, a step of training,
# a token of prose that is measured, the tasks
PRUNING, WINDOW, STEP, TOKEN, TASKS = 100.0, 3.5, 6.0, 0.005, 300.0


class Diverged(Exception):  # noqa: N818
    """A training whose loss or weights are not finite: a result, of a rate that is too high."""


class Study:
    """The cells of a scale, their records and their runs."""

    def __init__(self, scale: Scale, records: Path, work: Path, only: str = "", config: Path = CONFIG) -> None:
        self.scale, self.records, self.work, self.only, self.config = scale, records, work, only, config

    def missing(self) -> list[Cell]:
        """The cells that can be computed now."""
        return [cell for cell in cells.missing(self.scale, record.load(self.records)) if self.only in cell.name]

    def remaining(self) -> str:
        """How many cells remain and how long they take, judged by those that were computed."""
        done, todo = record.load(self.records), self.missing()
        unknown = max(0, cells.count(self.scale) - len(todo) - len(done)) if not self.only else 0
        usual = Cell("", 0, training=(f"train.max_steps={self.scale.steps}",), max_tokens=self.scale.max_tokens)
        expected = sum(_expected(cell.settings) for cell in [*todo, *[usual] * unknown])
        slower = [content["seconds"] / _expected(content["cell"]) for content in done.values()] or [1.0]
        hours = expected * sum(slower) / len(slower) / 3600
        count, measured = len(todo) + unknown, sum(self.only in name for name in done)
        return f"{count} of {count + measured} cells remain, about {hours:.1f} hours"

    def compute(self) -> None:
        """Computes the cells that are missing, one after the other."""
        self.work.mkdir(parents=True, exist_ok=True)
        with exclusive(self.work):
            self._compute()

    def _compute(self) -> None:
        while todo := self.missing():
            cell, watch = todo[0], record.Watch()
            print(f"{cell.name} ({len(todo)} to do)", flush=True)
            run = self.work / "cell"
            shutil.rmtree(run, ignore_errors=True)
            try:
                label = self.prepare(cell, run)
                self.measure(cell, run, label)
                content = record.of_run(cell, run, label)
                content["texts"] |= self.instructions(cell, run, label)
            except Diverged as error:
                content = record.of_diverged(cell, str(error))
            if cell.pruning:
                watched = self.watched(cell)
                content["pruning"] = json.loads(watched.read_text()) if watched.is_file() else {"interrupted": True}
            content |= watch.seen() | {"commit": record.commit()}
            strict_json.write(self.records / f"{cell.name}.json", content)  # a loss that is not finite becomes null
            shutil.rmtree(run)

    def prepare(self, cell: Cell, run: Path) -> str:
        """Makes the checkpoint of a cell in a run directory, and returns its label."""
        if not cell.pruning:
            return "base"
        link(self.pruned(cell) / "pruned", run / "pruned")
        if not cell.training:
            return "pruned"
        for stage in ("train", "merge"):
            self.sppctl(stage, run, cell, *cell.pruning, *cell.training)
        return "merged"

    def pruned(self, cell: Cell) -> Path:
        """The run directory with the pruned checkpoint of a cell, which is made once."""
        mask = []
        if cell.mask_of:
            first = Cell("", cell.seed, cell.mask_of)
            mask = [f"prune.mask_from={self.pruned(first) / 'pruned'}"]
        run, watch = self.run_of(cell), record.Watch()
        is_made, is_continued = not (run / "pruned").exists(), (run / ".pruned.partial").exists()
        self.sppctl("prune", run, cell, *cell.pruning, *mask)
        if is_made:
            strict_json.write(self.watched(cell), watch.seen() | {"interrupted": is_continued})
        return run

    def run_of(self, cell: Cell) -> Path:
        """The run directory of a cell's pruning."""
        return self.work / "pruned" / cells.run_name(cell)

    def watched(self, cell: Cell) -> Path:
        """The file that says what else the machine did while the cell's model was pruned."""
        run = self.run_of(cell)
        return run.with_name(f"{run.name}.json")

    def instructions(self, cell: Cell, run: Path, label: str) -> dict[str, cells.Record]:
        """The losses on held-out rows, by the name of the text."""
        directory = self.base() if label == "base" else run / label
        found = {"instructions": rows.measure(directory, cell.texts, cell.max_tokens)}
        if cell.also_unseen:
            found["instructions-validation"] = rows.measure(directory, cells.VALIDATION, cell.max_tokens)
        return found

    def measure(self, cell: Cell, run: Path, label: str) -> None:
        """Measures a checkpoint on its texts of prose and its tasks."""
        settings = [*cell.pruning, *cell.training, f"--model={label}", f"eval.max_tokens={cell.max_tokens}"]
        texts_of_cell = ["wikitext2"] if cell.texts == cells.TEST else []
        if cell.texts == cells.VALIDATION or cell.also_unseen:
            texts_of_cell.append(str(self.validation_text()))
        settings.append(f"eval.perplexity=[{','.join(texts_of_cell)}]")
        self.sppctl("eval", run, cell, *settings, "--tasks=ppl")
        for task, limit in zip(("zeroshot", "mmlu"), cell.tasks or (), strict=False):
            self.sppctl("eval", run, cell, *settings, f"--tasks={task}", f"--limit={limit}")

    def validation_text(self) -> Path:
        """The file with the validation split of WikiText-2, which is made once."""
        path = self.work / "wikitext2-validation.txt"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            text = texts.load_text("wikitext2", "validation", "eval.perplexity")
            partial = path.with_suffix(".partial")
            partial.write_text(text.joiner.join(text.documents))
            partial.replace(path)
        return path

    def sppctl(self, stage: str, run: Path, cell: Cell, *settings: str) -> None:
        """Runs a stage in a process of its own."""
        options = [setting for setting in settings if not (stage == "prune" and setting.startswith("train."))]
        command = [*SPPCTL, stage, str(self.config), f"run.dir={run}", f"run.seed={cell.seed}", *self.model()]
        command += [*options, "--quiet"]
        done = subprocess.run(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env=os.environ | HUGE_PAGES,
        )
        sys.stderr.write(done.stderr)
        if done.returncode and stage == "train" and DIVERGED in done.stderr:
            raise Diverged(done.stderr.strip().splitlines()[-1])
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed with exit code {done.returncode}")

    def base(self) -> Path:
        """The directory of the dense model."""
        model = self._dense()
        return find.locate(model.path or "") if model.gguf_file is None else self._converted()

    def _dense(self) -> ModelConfig:
        return load_config(str(self.config), []).model

    def _converted(self) -> Path:
        """The folder of the converted model; two studies that share one by a link share the models pruned from it."""
        return (self.work / "base").resolve()

    def model(self) -> list[str]:
        """The dense model, if it is in a GGUF file: converted once, then a directory."""
        base = self.base()
        if base != self._converted():
            return []
        model, source = self._dense(), base.with_suffix(".json")
        wanted = {"path": model.path, "gguf_file": model.gguf_file}
        if not base.is_dir():
            run = self.work / "dense"
            command = [*SPPCTL, "prune", str(self.config), f"run.dir={run}", "prune.method=magnitude"]
            subprocess.run([*command, "--quiet"], stdout=subprocess.DEVNULL, check=True)
            strict_json.write(source, wanted)
            (run / "base").replace(base)
            shutil.rmtree(run)
        elif (found := json.loads(source.read_text()) if source.is_file() else None) != wanted:
            sys.exit(f"{base} was made from {found}, not from {wanted}; delete it, or use another --work")
        return [f"model.path={base}", "model.gguf_file=null"]


def link(source: Path, target: Path) -> None:
    """Hard-links the files of a folder into another one; stages only read them."""
    shutil.copytree(source, target, copy_function=os.link)


def _expected(cell: dict[str, Any]) -> float:
    """Seconds that a cell takes; the pruned model is made for the cell that measures it."""
    settings = dict(setting.split("=", 1) for setting in (*cell["pruning"], *cell["training"]))
    windows = settings.get("prune.calibration.samples", cells.SHARED["prune"]["calibration"]["samples"])
    reconstruction = int(windows) * int(settings.get("prune.reconstruct_epochs", 0)) * WINDOW
    pruning = PRUNING + reconstruction if cell["pruning"] and not cell["training"] else 0.0
    steps = int(settings.get("train.max_steps", 0))
    return pruning + steps * STEP + cell["max_tokens"] * TOKEN + (TASKS if cell["tasks"] else 0.0)
