"""Does the runs of a sweep: shared checkpoints are made once and linked into the runs' directories.

Order: the dense model is measured; then each pruned checkpoint is made and measured, and its runs are trained, merged
and measured. Work that is up to date is skipped, so the same command continues a sweep that was stopped.
"""

from __future__ import annotations

import contextlib
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from sppctl import console, distributed, launch
from sppctl.config.load import result_keys
from sppctl.errors import StageError, Stopped, UserError
from sppctl.files.names import DIRECTORIES
from sppctl.run import measure, pipeline
from sppctl.run.directory import Run, keeping
from sppctl.run.stages import PRUNE
from sppctl.sweep.grid import REPORT, Member, Sweep, raise_problems

if TYPE_CHECKING:
    from sppctl.report.study import Study


def check(sweep: Sweep, existing: bool = True) -> None:
    """Makes all checks of all runs before the first stage; ``existing``: also of the settings of existing stages.

    Raises:
        UserError: every problem, one per line, with the runs that have it.
    """
    problems: dict[str, list[str]] = {}
    for member in sweep.runs.values():  # these checks need no library
        with _noting(problems, member):
            if not (member.config.eval.perplexity or member.config.eval.tasks):
                empty = "eval.perplexity and eval.tasks are both empty, there would be nothing to compare"
                raise UserError(f"{empty}; add a text or a task")
            pipeline.check_names(Run(member.config), pipeline.STAGES)
    raise_problems(problems, len(sweep.runs))
    for source in sweep.dense.values():
        outline = Run(source.config).outline()
        for member in sweep.runs_of(source):
            with _noting(problems, member):
                pipeline.preflight(Run(member.config, loaded=outline), pipeline.STAGES)
    if existing:
        problems |= _outdated_stages(sweep)
    raise_problems(problems, len(sweep.runs))


@contextlib.contextmanager
def _noting(problems: dict[str, list[str]], member: Member) -> Iterator[None]:
    """Adds the problems of a member, by line."""
    try:
        yield
    except UserError as error:
        for line in error.lines:
            problems.setdefault(line, []).append(member.name)


def check_existing(sweep: Sweep) -> None:
    """Raises UserError, with a line for each stage, if existing stages were made with other settings."""
    raise_problems(_outdated_stages(sweep), len(sweep.runs))


def _outdated_stages(sweep: Sweep) -> dict[str, list[str]]:
    lines = [line for member in sweep.members() for line in _changed(sweep, member).values()]
    return {line: list(sweep.runs) for line in lines}


def _changed(sweep: Sweep, member: Member) -> dict[str, str]:
    """The stages of a member that were made with other settings, or depend on such a stage, and how to redo them."""
    run = Run(member.config)
    lines: dict[str, str] = {}
    for stage in [] if member.name in sweep.dense else DIRECTORIES:
        record = run.record(stage)
        changed = record and run.changes(record)
        if record is not None and (changed or lines):
            reason = f"was made with {changed}" if changed else "depends on that"
            redo = shlex.join(["sppctl", stage, *member.arguments, "--force"])
            lines[stage] = f"{run.path(stage)} {reason}; {redo} redoes it, {keeping(stage)}"
    return lines


@dataclass(frozen=True)
class Entry:
    """The work in one directory of a sweep."""

    directory: str  # its path
    stages: list[str]  # all stages done in it
    made: list[str]  # those that exist
    other_settings: list[str]  # those that exist, but were made with other settings
    runs: list[str]  # names of the runs that share it


def plan(sweep: Sweep) -> list[Entry]:
    """The work of a sweep."""
    entries = []
    for member in sweep.members():
        stages = ["train", "merge", "eval merged"]
        if member.name not in sweep.runs:
            stages = ["prune", "eval pruned"] if member.name in sweep.pruned else ["eval base"]
        outdated = list(_changed(sweep, member))
        made = [stage for stage in stages if _exists(Run(member.config), stage) and stage not in outdated]
        runs = [run.name for run in sweep.runs_of(member)]
        entries.append(Entry(member.config.run.dir, stages, made, outdated, runs))
    return entries


def totals(entries: list[Entry]) -> dict[str, int]:
    """The number of times that each stage of a plan is done."""
    return dict(Counter(stage for entry in entries for stage in entry.stages))


def _exists(run: Run, stage: str) -> bool:
    name, _, label = stage.partition(" ")
    return measure.results_of(run, label).is_file() if label else run.path(name).is_dir()


# --- work -------------------------------------------------------------------------------------------------------------


def execute(sweep: Sweep, only: str | None = None, debug: bool = False) -> tuple[Study | None, dict[str, str]]:
    """Does a sweep, or ``only`` one of its members or the report, as in a cluster job.

    After an error in one run the others continue, except with ``debug``.

    Returns:
        The report's data (None for a single member), and the reason of each failure by name.

    Raises:
        UserError: the checks found problems; nothing was done.
        Stopped: a signal ended a training, whose work is saved.
    """
    members = {member.name: member for member in sweep.members()}
    if only not in (None, REPORT, *members):
        raise UserError(f"--only {only}", f"not one of {', '.join([*members, REPORT])}")
    if distributed.world_size() > 1:
        raise UserError("sppctl sweep starts the processes of its stages itself; call it without torchrun")
    if only is None:
        check(sweep)
    failed: dict[str, str] = {}
    chosen = [member for name, member in members.items() if only in (None, name)]
    for number, member in enumerate(chosen, 1):
        console.log_to(None)  # until the member's own run directory is locked
        console.note(f"sweep: {member.name} ({number} of {len(chosen)})")
        if member.parent in failed:
            failed[member.name] = f"{member.parent} failed"
            continue
        try:
            _work(sweep, member)
        except Stopped:
            raise
        except Exception as error:
            if debug:
                raise
            kind = "" if isinstance(error, UserError | StageError) else f"{type(error).__name__}: "
            failed[member.name] = kind + str(error).strip()
            console.note(f"sweep: {member.name} failed: {failed[member.name]}")
    return (_report(sweep, failed) if only in (None, REPORT) else None), failed


def _work(sweep: Sweep, member: Member) -> None:
    run = Run(member.config)
    start_stage = partial(_start_stage, member) if launch.needed(member.config) else None
    if member.name in sweep.dense:
        pipeline.evaluate_some(run, ["base"], start_stage)
        for child in [*sweep.children(member), *sweep.runs_of(member)]:
            share(run, Run(child.config), "base")
    elif member.name in sweep.pruned:
        pipeline.preflight(run, ("prune",))
        if start_stage is not None:
            start_stage("prune")
        else:
            with run.lock():
                run.do(PRUNE)
        pipeline.evaluate_some(run, ["pruned"], start_stage)
        for child in sweep.children(member):
            share(run, Run(child.config), "pruned")
    else:
        pipeline.run_all(run, start_stage)


def _start_stage(member: Member, stage: str, *options: str) -> None:
    """Does a stage in separate processes, one per GPU."""
    number, log = launch.num_processes(member.config, stage), Run(member.config).log
    code = launch.start([stage, *member.arguments, *options], number, log, silent=True)
    if code - 128 in launch.SIGNALS:  # SIGKILL, which the system sends when memory runs out, is a failure
        raise Stopped(f"{stage} of {member.name} was stopped by a signal; the same command continues", code - 128)
    if code:
        raise StageError(f"{stage} ended with exit code {code}")


def _report(sweep: Sweep, failed: dict[str, str]) -> Study | None:
    """The report on all complete runs."""
    runs = [Run(member.config) for name, member in sweep.runs.items() if name not in failed]
    measured = [run.directory for run in runs if _exists(run, "eval merged")]
    if not measured:
        console.warn(f"no run of {sweep.directory} is complete, there is nothing to report")
        return None
    return pipeline.report(measured, sweep.directory)


def share(source: Run, target: Run, label: str) -> None:
    """Links a run's checkpoint of this name into another run, unless it has one, and copies its results."""
    if (source.directory / label).is_dir() and not (target.directory / label).is_dir():
        with target.lock():
            target.take_over(source, label)
    if result_keys(source.config.eval) == result_keys(target.config.eval):
        measure.share_results(source, target, label)
