"""A checkout in front of whose PATH are stand-ins for sbatch, srun and scontrol that record how they are called."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import sppctl

ROOT = Path(sppctl.__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"

STUB = """#!/usr/bin/env bash
printf '%s\\n' "$(basename "$0")" "$@" | "$REAL_PYTHON" -c '
import json, sys
with open(sys.argv[1], "a") as file:
    file.write(json.dumps(sys.stdin.read().splitlines()) + "\\n")
' "$CALLS"
"""
SBATCH = STUB + 'echo "$((100 + $(wc -l < "$CALLS")));cluster"\n'
# as Slurm does when a task of several fails: the others are ended, and theirs is the highest exit code
SRUN = STUB + 'while [[ $1 == --* ]]; do shift; done\n"$@" || exit "${SRUN_EXIT:-$?}"\n'
PYTHON = STUB + '[ "$3" = config ] || exit "${TASK_EXIT:-0}"\n'


class Cluster:
    """A checkout with the scripts, in front of whose PATH are the stand-ins."""

    def __init__(self, directory: Path) -> None:
        self.checkout, self.calls_file = directory / "checkout", directory / "calls"
        shutil.copytree(SCRIPTS, self.checkout / "scripts", ignore=shutil.ignore_patterns("cluster.env"))
        bin_directory = directory / "bin"
        bin_directory.mkdir()
        for name, text in {"sbatch": SBATCH, "srun": SRUN, "scontrol": STUB, "fake-python": PYTHON}.items():
            (bin_directory / name).write_text(text)
            (bin_directory / name).chmod(0o755)
        self.environment = {
            "PATH": f"{bin_directory}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "REAL_PYTHON": sys.executable,
            "CALLS": str(self.calls_file),
            "SPPCTL_PYTHON": "fake-python",
            "HOME": str(directory),
        }

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        variables = self.environment | environment
        return subprocess.run(command, cwd=self.checkout, env=variables, capture_output=True, text=True)

    def calls(self, program: str) -> list[list[str]]:
        """The arguments of all calls of a program, in their order."""
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        return [call[1:] for call in map(json.loads, lines) if call[0] == program]
