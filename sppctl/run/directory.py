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
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sppctl import console, distributed, machine, records
from sppctl.errors import StageError, UserError, WriteError
from sppctl.files import disk
from sppctl.files.names import DIRECTORIES, RECORD
from sppctl.records import Attempt, StageRecord
from sppctl.run import attempts, dense
from sppctl.run.publish import RESUMABLE, RunDirectory
from sppctl.run.stage import M_co, P, Prepared, Stage, settings_of

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets")


@dataclass
class Run(RunDirectory):
    """One run directory under one configuration."""

    force: bool = False  # redo stages that exist with other settings or inputs
    resume: bool = True  # continue an interrupted training
    base: Path | None = None  # the dense checkpoint, once it has been found, and unpacked if need be
    loaded: dense.Outline | None = None  # the dense model without weights, where it has been loaded already
    # the stages that have been checked, by name, until they are done
    prepared: dict[str, Prepared] = field(default_factory=dict)

    def record(self, stage: str) -> StageRecord[Any] | None:
        """The stage.json of a published stage.

        Raises:
            UserError: it is damaged.
        """
        path = self.path(stage)
        return records.read(path / RECORD, stage, _remedy(stage)) if path.is_dir() else None

    def verify(self, stage: str, record: StageRecord[Any]) -> None:
        """Raises UserError if the files of a published stage are not those of its record; each is named."""
        from sppctl.files import integrity

        with console.working(f"checking the files of {self.path(stage)}"):
            integrity.check(self.path(stage), record.files, _remedy(stage))

    def outline(self) -> dense.Outline:
        """The dense model without weights, loaded once."""
        if self.loaded is None:
            self.loaded = dense.outline(self)
        return self.loaded

    # --- stages -------------------------------------------------------------------------------------------------------

    def prepare(self, stage: Stage[P, M_co]) -> P:
        """Checks a stage; what its checks have loaded is kept until it is done."""
        prepared = stage.prepare(self)
        self.prepared[stage.name] = prepared
        return prepared

    def do(self, stage: Stage[P, M_co]) -> StageRecord[M_co]:
        """Does a stage unless it is up to date, and publishes it.

        Returns:
            Its record.

        Raises:
            UserError: the stage exists with other settings or inputs, and force is off; or there is unfinished work
                with other ones, which the command does not discard; or its checks find something.
            WriteError: the disk is full.
        """
        name = stage.name
        attempt = Attempt(settings_of(self.config, name), stage.inputs(self))
        # one process looks: the others might see what it has changed since
        before, continued = distributed.decide(lambda: self._choice(name, attempt))
        prepared: Any = self.prepared.pop(name, None)
        if before is not None:
            console.note(f"{name}: up to date ({self.path(name)})")
            return before
        outdated = prepared is None or not prepared.sources.items() <= attempt.inputs.items()
        compute = _as_before(attempt, continued) if continued else distributed.decide(lambda: stage.compute(self))
        if compute is not None:
            attempt = attempt.computing_in(compute.dtype)
            console.note(f"{name}: {compute.text}")
        if outdated:
            prepared = stage.prepare(self)
        dtype = "" if compute is None else compute.dtype
        partial = self._start(name, attempt, continued is not None)
        started = time.perf_counter()
        with (
            self._keeping(name, continued is not None),
            contextlib.redirect_stdout(sys.stderr),  # what libraries print is not a result
            disk.writing(partial, reasons=disk.FULL),
        ):
            metrics = stage.do(self, prepared, partial, dtype)
        distributed.barrier()
        seconds = round(time.perf_counter() - started, 2)
        record = self._published(name, attempt, dtype, seconds, metrics)
        console.note(f"{name}: done in {seconds:.0f} s ({self.path(name)})")
        return record

    def _start(self, stage: str, attempt: Attempt, continued: bool) -> Path:
        """The directory that a stage works in: that of the attempt that is continued, or a new one."""
        name = DIRECTORIES[stage]
        if continued:
            console.note(f"{stage}: continuing an interrupted attempt")
        elif distributed.is_main():
            attempts.write(self.fresh_partial(name), attempt)
        distributed.barrier()
        machine.reset_peak_memory()
        return self.partial(name)

    @contextlib.contextmanager
    def _keeping(self, stage: str, continued: bool) -> Iterator[None]:
        """Decides, where the stage inside ends with an error, whether its attempt is left for another command."""
        partial = self.partial(DIRECTORIES[stage])
        try:
            yield
        except BaseException as error:
            kept = _kept(stage, partial, error, continued)
            if distributed.is_main() and not kept:
                shutil.rmtree(partial, ignore_errors=True)
            if not isinstance(error, WriteError):
                raise
            rest = "what is finished is kept, the same command continues" if kept else "nothing is left of it"
            raise WriteError(f"{error}; make room, or name another run.dir; {rest}") from error

    def _published(self, stage: str, attempt: Attempt, dtype: str, seconds: float, metrics: M_co) -> StageRecord[M_co]:
        def record(output: str, files: dict[str, str]) -> StageRecord[M_co]:
            return StageRecord(
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
                output=output,
                files=files,
            )

        if not (distributed.is_main() or distributed.is_connected()):
            return record("", {})
        return distributed.decide(lambda: self.complete(DIRECTORIES[stage], record))

    def _choice(self, stage: str, attempt: Attempt) -> tuple[StageRecord[Any] | None, Attempt | None]:
        """The record of the stage if there is nothing to do; else none, and the attempt that is continued, if any."""
        before = None if self.force and DIRECTORIES[stage] not in self.finished else self.record(stage)
        if before is not None and before.fingerprint == attempt.as_in(before.attempt).fingerprint:
            self.verify(stage, before)
            return before, None
        unfinished = attempts.read(self.partial(DIRECTORIES[stage])) if stage in RESUMABLE and self.resume else None
        if unfinished is not None and unfinished == attempt.as_in(unfinished):
            return None, unfinished
        if before is not None and not self.force:
            raise UserError(
                f"{self.path(stage)} was made with {attempts.differences(before.attempt, attempt)}; "
                f"--force redoes it, another run.dir keeps it"
            )
        self.check_attempt(stage, attempt)
        return None, None

    def check_attempt(self, stage: str, attempt: Attempt | None = None) -> None:
        """Raises UserError if doing a stage would destroy unfinished work with other settings, and nobody asked for it.

        Args:
            stage: prune, train or merge.
            attempt: what would be made; None: as far as the configuration tells, with inputs that are not known yet.
        """
        asked = self.force if stage == "prune" else not self.resume
        if not asked:
            wanted = attempt or Attempt(settings_of(self.config, stage), {})
            attempts.check(self.partial(DIRECTORIES[stage]), stage, wanted, inputs_known=attempt is not None)

    def will_do(self, stage: str) -> bool:
        """Whether a command would work on a stage, as far as its settings tell."""
        wanted = Attempt(settings_of(self.config, stage), {})
        before = None if self.force else self.record(stage)
        if before is None or before.settings == wanted.as_in(before.attempt).settings:
            return before is None
        unfinished = attempts.read(self.partial(DIRECTORIES[stage]))
        return unfinished is not None and unfinished.settings == wanted.as_in(unfinished).settings

    def needed(self, stage: str) -> StageRecord[Any]:
        """The record of a stage that must be there, intact, and what the configuration describes.

        Raises:
            UserError: it is not.
        """
        record = self.record(stage)
        if record is None:
            raise UserError(f"{self.path(stage)} does not exist; make it first: sppctl {stage} (or sppctl run)")
        wanted = Attempt(settings_of(self.config, stage), record.inputs).as_in(record.attempt)
        if record.attempt != wanted:
            raise UserError(
                f"{self.path(stage)} was made with {attempts.differences(record.attempt, wanted)}; "
                f"redo it (sppctl {stage} --force), or use its settings or another run.dir"
            )
        distributed.decide(lambda: self.verify(stage, record))
        return record


def _kept(stage: str, partial: Path, error: BaseException, continued: bool) -> bool:
    """Whether an attempt that ended with an error is left for another command."""
    if stage not in RESUMABLE:
        return False
    if isinstance(error, WriteError):
        return attempts.holds_work(partial)
    if isinstance(error, UserError | StageError):  # of its own; what it was given, or can be continued, is not lost
        return continued or (stage == "train" and attempts.holds_work(partial))
    return True


def _as_before(attempt: Attempt, before: Attempt) -> machine.Compute:
    """The dtype of an attempt, which is continued in it on any machine."""
    dtype = before.settings["model"]["compute_dtype"]
    why = "configured" if attempt.settings["model"]["compute_dtype"] != "auto" else "the interrupted attempt did"
    return machine.Compute(dtype, f"computing in {dtype} as {why}")


def _remedy(stage: str) -> str:
    return f"sppctl {stage} --force redoes the stage"
