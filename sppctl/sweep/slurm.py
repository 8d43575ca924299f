"""A sweep as Slurm jobs: a script for each stage, and one that submits them in order.

The scripts call the project's own (``scripts/slurm_*.sh``), so a job that is preempted or out of time is requeued in
the same way, and the settings of the site (``scripts/cluster.env``) apply.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sppctl import plugins
from sppctl.errors import UserError
from sppctl.files import disk
from sppctl.sweep.grid import REPORT, Sweep

SUBMIT = "submit.sh"
HEADER = """#!/usr/bin/env bash
# Submits the jobs of SWEEP, each after those it depends on, and prints their ids.
# DRY_RUN=1 prints the sbatch commands instead. NODES, GPUS_PER_NODE and the rest: scripts/cluster.env.example.
# shellcheck disable=SC2154,SC2016  # job and the options come from scripts/cluster.sh, and a prompt may hold a $
set -euo pipefail
jobs=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd CHECKOUT
# shellcheck source=/dev/null
source scripts/cluster.sh
job_options
declare -A id=()
ends=
"""


@dataclass(frozen=True)
class Job:
    """One job."""

    name: str
    script: str  # in scripts/
    arguments: tuple[str, ...]  # of the script
    after: str | None  # name of the job that it waits for
    options: str  # prune, train or eval: whose sbatch options it gets


def jobs(sweep: Sweep, overrides: Sequence[str] = ()) -> list[Job]:
    """The jobs of a sweep (read with these KEY=VALUE), each after the one it waits for; the report is the last."""
    imports = tuple(plugins.flags())
    only = (str(sweep.file), *overrides, *imports, "--only")
    of_members = []
    for member in sweep.members():
        if member.name in sweep.runs:
            train = f"{member.name}.train"
            of_members.append(Job(train, "slurm_train.sh", (*member.arguments, *imports), member.parent, "train"))
            of_members.append(Job(f"{member.name}.eval", "slurm_eval.sh", (*member.arguments, *imports), train, "eval"))
        else:
            options = "prune" if member.name in sweep.pruned else "eval"
            of_members.append(Job(member.name, "slurm_sweep.sh", (*only, member.name), member.parent, options))
    return [*of_members, Job(REPORT, "slurm_sweep.sh", (*only, REPORT), None, "eval")]


def write(sweep: Sweep, folder: Path, overrides: Sequence[str] = ()) -> Path:
    """Writes the scripts of all jobs, and the one that submits them.

    Returns:
        The script that submits the jobs.

    Raises:
        UserError: the current directory is not the root of a checkout, whose scripts the jobs call.
    """
    checkout, all_jobs = Path.cwd(), jobs(sweep, overrides)
    missing = {job.script for job in all_jobs if not (checkout / "scripts" / job.script).is_file()}
    if missing:
        problem = f"scripts/{min(missing)} does not exist"
        raise UserError("--slurm", problem, "run sppctl from the root of its checkout")
    folder.mkdir(parents=True, exist_ok=True)
    for job in all_jobs:
        _save(folder / f"{job.name}.sh", _script(job, checkout))
    header = HEADER.replace("SWEEP", shlex.quote(str(sweep.file))).replace("CHECKOUT", shlex.quote(str(checkout)))
    _save(folder / SUBMIT, header + "".join([*map(_check, all_jobs), *map(_submission, all_jobs)]))
    return folder / SUBMIT


def _script(job: Job, checkout: Path) -> str:
    """A script with the #SBATCH lines of the project's script, the job's name, and the call."""
    text = (checkout / "scripts" / job.script).read_text(encoding="utf-8")
    header = "\n".join(re.findall(r"^#SBATCH.*", text, re.MULTILINE))
    header = re.sub(r"--job-name=.*", f"--job-name={job.name}", header)
    call = shlex.join([f"scripts/{job.script}", *job.arguments])
    literal = "# shellcheck disable=SC2016  # a prompt may hold a $"
    return "\n".join(["#!/usr/bin/env bash", header, "set -euo pipefail", literal, f"exec {call}", ""])


def _check(job: Job) -> str:
    """The line that checks a training before any job is submitted; empty for other jobs."""
    return f"check_config {shlex.join(job.arguments)}\n" if job.script == "slurm_train.sh" else ""


def _submission(job: Job) -> str:
    if job.name == REPORT:
        dependency = '"afterany$ends"'  # completed runs are reported even if others failed
    else:
        dependency = f'"afterok:${{id[{job.after}]}}"' if job.after is not None else "''"
    options = f'"${{{job.options}_options[@]}}"'
    if job.script == "slurm_sweep.sh":  # one task, which starts the processes of each stage itself
        options += " --ntasks-per-node=1"
    call = f'{options} "$jobs/{job.name}.sh"'
    lines = f'submit {job.name} "$jobs/logs" {dependency} {call}\nid[{job.name}]=$job\n'
    return lines + ("ends+=:$job\n" if job.name.endswith(".eval") else "")


def _save(path: Path, text: str) -> None:
    disk.write(path, text)
    path.chmod(0o755)
