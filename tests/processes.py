"""The command line in processes of their own, forked from the test's, which spares them the imports."""

from __future__ import annotations

import atexit
import faulthandler
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from sppctl import launch

OF_SEVERAL = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
DEADLINE = 150  # seconds


@dataclass(frozen=True)
class Ended:
    """How a process ended (minus the number of the signal that killed it), and what it said."""

    returncode: int
    stdout: str
    stderr: str


def environment(**more: str) -> dict[str, str]:
    """Of a fresh process that is not one of several; sums in another number of threads differ by roundings."""
    kept = {key: value for key, value in os.environ.items() if key not in OF_SEVERAL}
    return kept | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "TOKENIZERS_PARALLELISM": "false"} | more


class Process:
    """``sppctl ARGUMENTS``, changed by ``patch``, which is executed first.

    A process that has used a GPU, or OpenMP in several threads, cannot be forked; there a new one is started.
    """

    def __init__(self, arguments: list[str], patch: str = "", variables: Mapping[str, str] | None = None) -> None:
        self._said = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115
        script = f"{patch}\nfrom sppctl import cli\ncli.main()"
        variables = environment(**(variables or {}))
        if torch.cuda.is_initialized() or torch.get_num_threads() > 1:
            command = [sys.executable, "-c", script, *arguments]
            self.pid = subprocess.Popen(command, env=variables, stdout=self._said[0], stderr=self._said[1]).pid
            return
        self.pid = os.fork()
        if self.pid == 0:
            self._become(script, arguments, variables)

    def _become(self, script: str, arguments: list[str], variables: Mapping[str, str]) -> None:
        code = 70
        atexit._clear()  # what the tests' own process has registered for its end
        try:
            for number, file in enumerate(self._said, 1):
                os.dup2(file.fileno(), number)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            faulthandler.dump_traceback_later(DEADLINE - 5, file=sys.stderr)
            os.environ.clear()
            # with its launcher, this process ends when that is killed: no test is left waiting for its neighbours
            os.environ.update({**variables, launch._PARENT: str(os.getppid())})
            sys.argv = ["sppctl", *arguments]
            exec(script, {"__name__": "patched"})
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait(self, deadline: float = DEADLINE) -> Ended:
        """Its end; if that does not come within the seconds, it is killed, and the test says so.

        Raises:
            TimeoutError: with what it said, and where it was shortly before.
        """
        until, late = time.monotonic() + deadline, False
        while (ended := os.waitpid(self.pid, os.WNOHANG)) == (0, 0):
            if time.monotonic() > until:
                late = True
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.01)
        for file in self._said:
            file.seek(0)
        said = [file.read() for file in self._said]
        if late:
            raise TimeoutError(f"the test killed a process that took more than {deadline} s; it said: {said[1]}")
        return Ended(os.waitstatus_to_exitcode(ended[1]), *said)


def sppctl(arguments: list[str], patch: str = "") -> Ended:
    """The command line in one process."""
    return Process(arguments, patch).wait()


def in_ranks(arguments: list[str], number: int, patch: str = "", **variables: str) -> list[Ended]:
    """The command line in several processes as a launcher starts them."""
    with launch.held_port() as port:
        shared = {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | variables
        processes = [
            Process(arguments, patch, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(number)
        ]
        return [process.wait() for process in processes]


def sppctl_in_ranks(arguments: list[str], number: int, patch: str = "", **variables: str) -> Ended:
    """The command line in several processes as a launcher starts them; the first return code that is not 0."""
    ended = in_ranks(arguments, number, patch, **variables)
    code = next((one.returncode for one in ended if one.returncode), 0)
    return Ended(code, "".join(one.stdout for one in ended), "".join(one.stderr for one in ended))


def without_interpreter(code: str, cache: Path) -> str:
    """What a Python program prints that compiles Triton's kernels, which tests of this process may interpret."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
