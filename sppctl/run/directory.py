"""A run: what is up to date, what is an unfinished attempt, and doing a stage.

The record of a stage says what it was made from; the same again is skipped, anything else is refused until ``--force``.
An attempt at the same is continued, one at something else is refused if it holds work.
"""

from __future__ import annotations

import contextlib
import datetime
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sppctl import console, distributed, machine, records
from sppctl.errors import StageError, UserError, WriteError
from sppctl.files import disk
from sppctl.files.names import DIRECTORIES, NOTE, RECORD
from sppctl.records import Attempt, StageRecord
from sppctl.run import attempts, dense
from sppctl.run.attempts import differences, settings_of
from sppctl.run.publish import RESUMABLE, RunDirectory

if TYPE_CHECKING:
    from sppctl.run.stages import M_co, P, Prepared, Stage

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets")
DISCARDING = {"prune": "sppctl prune --force", "train": "sppctl train --no-resume"}


@dataclass
class Run(RunDirectory):
    """One run directory under one configuration."""

    force: bool = False  # redo stages that exist with other settings or inputs
    resume: bool = True  # continue an interrupted training
    base: Path | None = None  # the dense checkpoint, once it has been found, and unpacked if need be
    loaded: dense.Outline | None = None  # the dense model without weights, where it has been loaded already
    # the stages that have been checked, by name, until they are done
    prepared: dict[str, Prepared] = field(default_factory=dict)

    def outline(self) -> dense.Outline:
        """The dense model without weights, loaded once."""
        if self.loaded is None:
            self.loaded = dense.outline(self)
        return self.loaded

    # --- what is there ------------------------------------------------------------------------------------------------

    def record(self, stage: str) -> StageRecord[Any] | None:
        """The stage.json of a published stage; UserError if it is damaged."""
        path = self.path(stage)
        return records.read(path / RECORD, stage) if path.is_dir() else None

    def verify(self, record: StageRecord[Any]) -> None:
        """Raises UserError if the files of a published stage are not those of its record; each is named."""
        from sppctl.files import integrity

        path = self.path(record.stage)
        with console.working(f"checking the files of {path}"):
            integrity.check(path, record.files, records.remedy(record.stage))

    def changes(self, record: StageRecord[Any]) -> str:
        """The keys in which a published stage differs from the configuration; empty if it does not."""
        return differences(record.attempt, settings_of(self.config, record.stage))

    def needed(self, stage: str) -> StageRecord[Any]:
        """The record of a stage that must be there, intact, and what the configuration describes; else UserError."""
        record = self.record(stage)
        if record is None:
            raise UserError(f"{self.path(stage)} does not exist; make it first: sppctl {stage} (or sppctl run)")
        if changed := self.changes(record):
            fix = f"redo it (sppctl {stage} --force), or use its settings or another run.dir"
            raise UserError(f"{self.path(stage)} was made with {changed}; {fix}")
        distributed.decide(partial(self.verify, record))
        return record

    def will_do(self, stage: str) -> bool:
        """Whether a command would work on a stage, as far as its settings tell."""
        before = None if self.force else self.record(stage)
        if before is None or not self.changes(before):
            return before is None
        unfinished = attempts.read(self.partial(DIRECTORIES[stage]))
        return unfinished is not None and not differences(unfinished, settings_of(self.config, stage))

    def check_attempt(self, stage: str, inputs: dict[str, str] | None = None) -> None:
        """Raises UserError if doing a stage would destroy unfinished work with other settings, and nobody asked for it.

        Its inputs count where they are known.
        """
        directory = self.partial(DIRECTORIES[stage])
        asked = self.force if stage == "prune" else not self.resume
        if asked or not attempts.holds_work(directory):
            return
        before = attempts.read(directory)
        if before is None:
            whose = f"whose settings are unknown ({NOTE} is damaged)"
        elif changed := differences(before, settings_of(self.config, stage), inputs):
            whose = f"with {changed}"
        else:
            return
        raise UserError(
            f"{directory} holds the unfinished work of an attempt {whose}; its own settings continue it, another "
            f"run.dir keeps it, {DISCARDING[stage]} discards it"
        )

    # --- work ---------------------------------------------------------------------------------------------------------

    def prepare(self, stage: Stage[P, M_co]) -> P:
        """Checks a stage; what its checks have loaded is kept until it is done."""
        prepared = stage.prepare(self)
        self.prepared[stage.name] = prepared
        return prepared

    def do(self, stage: Stage[P, M_co]) -> StageRecord[M_co]:
        """Does a stage unless it is up to date, and publishes it with its record.

        Raises:
            UserError: the stage exists with other settings or inputs, and force is off; or there is unfinished work
                with other ones, which the command does not discard; or its checks find something.
            WriteError: the disk is full.
        """
        name, out = stage.name, self.partial(DIRECTORIES[stage.name])
        attempt = Attempt(settings_of(self.config, name), stage.inputs(self))
        # one process looks: the others might see what it has changed since
        before, continued = distributed.decide(partial(self._find, name, attempt))
        prepared: Any = self.prepared.pop(name, None)
        if before is not None:
            console.note(f"{name}: up to date ({self.path(name)})")
            return before
        outdated = prepared is None or not prepared.sources.items() <= attempt.inputs.items()
        compute = _as_before(attempt, continued) if continued else distributed.decide(partial(stage.compute, self))
        dtype = "" if compute is None else compute.dtype
        if compute is not None:
            attempt = attempt.computing_in(dtype)
            console.note(f"{name}: {compute.text}")
        if outdated:
            prepared = stage.prepare(self)
        if continued:
            console.note(f"{name}: continuing an interrupted attempt")
        elif distributed.is_main():
            attempts.write(self.fresh_partial(DIRECTORIES[name]), attempt)
        distributed.barrier()
        machine.reset_peak_memory()
        started = time.perf_counter()
        with (
            _keeping(name, out, continued is not None),
            contextlib.redirect_stdout(sys.stderr),  # what libraries print is not a result
            disk.writing(out, reasons=disk.FULL),
        ):
            metrics = stage.do(self, prepared, out, dtype)
        distributed.barrier()
        record = self._published(name, attempt, dtype, round(time.perf_counter() - started, 2), metrics)
        console.note(f"{name}: done in {record.wall_time_s:.0f} s ({self.path(name)})")
        return record

    def _find(self, stage: str, attempt: Attempt) -> tuple[StageRecord[Any] | None, Attempt | None]:
        """The record of the stage if there is nothing to do; else none, and the attempt that is continued, if any."""
        directory = DIRECTORIES[stage]
        before = None if self.force and directory not in self.finished else self.record(stage)
        changed = before and differences(before.attempt, attempt.settings, attempt.inputs)
        if before is not None and not changed:
            self.verify(before)
            return before, None
        unfinished = attempts.read(self.partial(directory)) if stage in RESUMABLE and self.resume else None
        if unfinished is not None and not differences(unfinished, attempt.settings, attempt.inputs):
            return None, unfinished
        if before is not None and not self.force:
            fix = "--force redoes it, another run.dir keeps it"
            raise UserError(f"{self.path(stage)} was made with {changed}; {fix}")
        self.check_attempt(stage, attempt.inputs)
        return None, None

    def _published(self, stage: str, attempt: Attempt, dtype: str, seconds: float, metrics: M_co) -> StageRecord[M_co]:
        record: Callable[..., StageRecord[M_co]] = partial(
            StageRecord,
            stage=stage,
            fingerprint=attempt.fingerprint,
            settings=attempt.settings,
            inputs=attempt.inputs,
            compute_dtype=dtype or None,
            seed=self.config.run.seed,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            wall_time_s=seconds,
            peak_memory_mb=machine.peak_memory_mb(),
            hardware=machine.describe(),
            versions={"python": platform.python_version()} | machine.versions(*LIBRARIES),
            command=console.command_line(),
            metrics=metrics,
        )
        if not (distributed.is_main() or distributed.is_connected()):
            return record(output="", files={})
        return distributed.decide(partial(self.complete, DIRECTORIES[stage], record))


def _as_before(attempt: Attempt, before: Attempt) -> machine.Compute:
    """The dtype of an attempt, which is continued in it on any machine."""
    dtype = before.settings["model"]["compute_dtype"]
    why = "configured" if attempt.settings["model"]["compute_dtype"] != "auto" else "the interrupted attempt did"
    return machine.Compute(dtype, f"computing in {dtype} as {why}")


@contextlib.contextmanager
def _keeping(stage: str, partial: Path, continued: bool) -> Iterator[None]:
    """Decides, where the stage inside ends with an error, whether its attempt is left for another command."""
    try:
        yield
    except BaseException as error:
        full = isinstance(error, WriteError)
        if stage not in RESUMABLE:
            kept = False
        elif full:
            kept = attempts.holds_work(partial)
        elif isinstance(error, UserError | StageError):  # its own; what can be continued is not lost
            kept = continued or (stage == "train" and attempts.holds_work(partial))
        else:
            kept = True
        if distributed.is_main() and not kept:
            shutil.rmtree(partial, ignore_errors=True)
        if not full:
            raise
        rest = "what is finished is kept, the same command continues" if kept else "nothing is left of it"
        raise WriteError(f"{error}; make room, or name another run.dir; {rest}") from error
