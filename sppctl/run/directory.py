"""A run: skips stages that are up to date, continues unfinished ones, and does the others.

A stage is up to date if its record has the same settings and inputs; with others it is refused until ``--force``. An
unfinished attempt with the same settings and inputs is continued; one with others is refused if it holds work.
"""

from __future__ import annotations

import contextlib
import datetime
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sppctl import console, distributed, machine, records
from sppctl.errors import StageError, UserError, WriteError
from sppctl.files import disk
from sppctl.files.names import DIRECTORIES, NOTE, RECORD, WORKING
from sppctl.records import Attempt, StageRecord
from sppctl.run import attempts, dense
from sppctl.run.attempts import differences, settings_of
from sppctl.run.publish import RESUMABLE, RunDirectory

if TYPE_CHECKING:
    from sppctl.run.stages import M_co, P, Prepared, Stage

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets")
DISCARDING = {"prune": "--force", "train": "--no-resume"}


@dataclass
class Run(RunDirectory):
    """One run directory under one configuration."""

    force: bool = False  # redo stages that exist with other settings or inputs
    resume: bool = True  # continue an interrupted training
    base: Path | None = None  # the dense checkpoint, once located and unpacked
    loaded: dense.Outline | None = None  # the dense model without weights, once loaded
    # checked stages by name, until they are done
    prepared: dict[str, Prepared] = field(default_factory=dict)

    def command(self, name: str, *options: str) -> str:
        """A sppctl command on this run, to suggest."""
        return console.command(name, *options, run=self.directory)

    def outline(self) -> dense.Outline:
        """The dense model without weights, loaded once."""
        if self.loaded is None:
            self.loaded = dense.outline(self)
        return self.loaded

    # --- published stages and attempts --------------------------------------------------------------------------------

    def record(self, stage: str) -> StageRecord[Any] | None:
        """The stage.json of a published stage; UserError if it is damaged."""
        path = self.path(stage)
        return records.read(path / RECORD, stage) if path.is_dir() else None

    def verify(self, record: StageRecord[Any]) -> None:
        """Raises UserError, with a line for each file, if files of a published stage do not match its record."""
        from sppctl.files import integrity

        path = self.path(record.stage)
        with console.working(f"checking the files of {path}"):
            integrity.check(path, record.files, records.remedy(record.stage, path))

    def changes(self, record: StageRecord[Any]) -> str:
        """The keys in which a published stage differs from the configuration; empty if it does not."""
        return differences(record.attempt, settings_of(self.config, record.stage))

    def needed(self, stage: str) -> StageRecord[Any]:
        """The record of a required stage; UserError if it is missing, damaged or made with another configuration."""
        record = self.record(stage)
        if record is None:
            raise UserError(f"{self.path(stage)} does not exist; {self._fix_missing(stage)}")
        if changed := self.changes(record):
            fix = f"redo it ({self.command(stage, '--force')}), or use its settings or another run.dir"
            raise UserError(f"{self.path(stage)} was made with {changed}; {fix}")
        distributed.decide(partial(self.verify, record))
        return record

    def _fix_missing(self, stage: str) -> str:
        """What to do about a missing stage; if the configuration is that of another run, its stage can be copied."""
        command, target = self.command(stage), shlex.quote(str(self.directory))
        source = Path(console.configuration(self.directory) or self.directory)
        record = source / DIRECTORIES[stage] / RECORD
        if not record.is_file() or self.changes(records.read(record, stage)):
            return f"run {command} first"
        copied = f"mkdir -p {target} && cp -r {shlex.quote(str(record.parent))} {target}/"
        return f"copy that of {source} ({copied}), or make it again ({command})"

    def will_do(self, stage: str) -> bool:
        """Whether a command would work on a stage, judging by its settings alone."""
        record = None if self.force else self.record(stage)
        if record is None or not self.changes(record):
            return record is None
        unfinished = attempts.read(self.partial(DIRECTORIES[stage]))
        return unfinished is not None and not differences(unfinished, settings_of(self.config, stage))

    def check_attempt(self, stage: str, inputs: dict[str, str] | None = None) -> None:
        """Raises UserError if doing a stage would destroy unfinished work with other settings, unless requested.

        ``inputs`` are compared, too, if given.
        """
        directory = self.partial(DIRECTORIES[stage])
        discards = self.force if stage == "prune" else not self.resume
        if discards or not attempts.holds_work(directory):
            return
        attempt = attempts.read(directory)
        if attempt is None:
            description = f"whose settings are unknown ({NOTE} is damaged)"
        elif changed := differences(attempt, settings_of(self.config, stage), inputs):
            description = f"with {changed}"
        else:
            return
        raise UserError(
            f"{directory} holds the unfinished work of an attempt {description}; continue it with its own settings, "
            f"keep it by using another run.dir, or discard it with {self.command(stage, DISCARDING[stage])}"
        )

    # --- work ---------------------------------------------------------------------------------------------------------

    def prepare(self, stage: Stage[P, M_co]) -> P:
        """Checks a stage; the data loaded by its checks is kept until the stage is done."""
        prepared = stage.prepare(self)
        self.prepared[stage.name] = prepared
        return prepared

    def do(self, stage: Stage[P, M_co]) -> StageRecord[M_co]:
        """Does a stage unless it is up to date, and publishes it with its record.

        Raises:
            UserError: the stage exists with other settings or inputs and force is off; there is unfinished work with
                others, which the command does not discard; or its checks find problems.
            WriteError: the disk is full.
        """
        name, out = stage.name, self.partial(DIRECTORIES[stage.name])
        attempt = Attempt(settings_of(self.config, name), stage.inputs(self))
        # decided by one process: the others might already see its changes
        published, unfinished = distributed.decide(partial(self._existing_work, name, attempt))
        prepared: Any = self.prepared.pop(name, None)
        if published is not None:
            console.note(f"{name}: up to date ({self.path(name)})")
            return published
        outdated = prepared is None or not prepared.sources.items() <= attempt.inputs.items()
        compute = _compute_of(unfinished, attempt) if unfinished else distributed.decide(partial(stage.compute, self))
        dtype = "" if compute is None else compute.dtype
        if compute is not None:
            attempt = attempt.computing_in(dtype)
            console.note(f"{name}: {compute.text}")
        if outdated:
            prepared = stage.prepare(self)
        if unfinished:
            console.note(f"{name}: continuing an interrupted attempt")
        if distributed.is_main():  # also of a continued one: its time counts from this note
            attempts.write(out if unfinished else self.fresh_partial(DIRECTORIES[name]), unfinished or attempt)
        distributed.barrier()
        machine.reset_peak_memory()
        started = time.perf_counter()
        with (
            _discarding_on_error(name, out, unfinished is not None),
            contextlib.redirect_stdout(sys.stderr),  # stdout is for results, not for messages of libraries
            disk.writing(out, reasons=disk.FULL),
        ):
            metrics = stage.do(self, prepared, out, dtype)
        machine.release_memory()  # what the next stage finds free decides how it loads its model
        distributed.barrier()
        seconds = time.perf_counter() - started + (unfinished.seconds if unfinished else 0.0)
        record = self._publish_with_record(name, attempt, dtype, round(seconds, 2), metrics)
        attempted = " over all attempts" if unfinished else ""
        console.note(f"{name}: done in {seconds:.0f} s{attempted} ({self.path(name)})")
        return record

    def _existing_work(self, stage: str, attempt: Attempt) -> tuple[StageRecord[Any] | None, Attempt | None]:
        """The record of the stage if it is up to date, else None; and the unfinished attempt to continue, if any."""
        directory = DIRECTORIES[stage]
        record = None if self.force and directory not in self.finished else self.record(stage)
        changed = record and differences(record.attempt, attempt.settings, attempt.inputs)
        if record is not None and not changed:
            self.verify(record)
            return record, None
        unfinished = attempts.read(self.partial(directory)) if stage in RESUMABLE and self.resume else None
        if unfinished is not None and not differences(unfinished, attempt.settings, attempt.inputs):
            return None, replace(unfinished, seconds=unfinished.seconds + _seconds_kept(self.partial(directory)))
        if record is not None and not self.force:
            fix = f"{self.command(stage, '--force')} redoes it, {keeping(stage)}"
            raise UserError(f"{self.path(stage)} was made with {changed}; {fix}")
        self.check_attempt(stage, attempt.inputs)
        return None, None

    def _publish_with_record(
        self, stage: str, attempt: Attempt, dtype: str, seconds: float, metrics: M_co
    ) -> StageRecord[M_co]:
        make_record: Callable[..., StageRecord[M_co]] = partial(
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
            return make_record(output="", files={})
        record = distributed.decide(partial(self.complete, DIRECTORIES[stage], make_record))
        distributed.barrier()  # the first process may end next, but must not before all have its record
        return record


def keeping(stage: str) -> str:
    """How to keep an existing stage, for errors: another run directory lacks what the stage reads."""
    needed = [f"{folder}/" for folder in list(DIRECTORIES.values())[: list(DIRECTORIES).index(stage)]]
    return "another run.dir keeps it" + (f", and needs {' and '.join(needed)} of its own" if needed else "")


def _seconds_kept(partial: Path) -> float:
    """The time from the note of an interrupted attempt to its last work that was kept, however the process ended."""
    times = [(partial / name).stat().st_mtime for name in WORKING if name != NOTE and (partial / name).exists()]
    return max([0.0, *(time - (partial / NOTE).stat().st_mtime for time in times)])  # a copy may have other times


def _compute_of(unfinished: Attempt, attempt: Attempt) -> machine.Compute:
    """The dtype of an unfinished attempt, in which it is continued on any machine."""
    dtype = unfinished.settings["model"]["compute_dtype"]
    why = "configured" if attempt.settings["model"]["compute_dtype"] != "auto" else "the interrupted attempt did"
    return machine.Compute(dtype, f"computing in {dtype} as {why}")


@contextlib.contextmanager
def _discarding_on_error(stage: str, partial: Path, continued: bool) -> Iterator[None]:
    """Deletes the attempt if the stage fails, unless another command can continue it."""
    try:
        yield
    except BaseException as error:
        full = isinstance(error, WriteError)
        if stage not in RESUMABLE:
            kept = False
        elif full:
            kept = attempts.holds_work(partial)
        elif isinstance(error, UserError | StageError):  # the stage's own error; finished work is kept
            kept = continued or attempts.holds_work(partial)
        else:  # an interrupt, or an error that is not the stage's own
            kept = True
        if distributed.is_main() and not kept:
            shutil.rmtree(partial, ignore_errors=True)
        if not full:
            raise
        kept_work = "finished work is kept, the same command continues" if kept else "the partial output was deleted"
        raise WriteError(f"{error}; free some space, or choose another run.dir; {kept_work}") from error
