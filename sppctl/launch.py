"""Starting the processes of one command on this machine, or joining those that torchrun, accelerate or srun started.

The processes learn their rank from the variables that torchrun sets. They are not started by torchrun itself: its
agent turns every exit code into 1, is ended by SIGUSR1, and kills processes that are still writing after 30 seconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from sppctl import console, distributed, plugins
from sppctl.config.settings import Config, TrainConfig
from sppctl.console import Verbosity
from sppctl.errors import UserError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
GRACE_SECONDS = 5  # after one process has failed, until the others are killed
STEP_PORTS = 997  # between the ports of two steps of a Slurm job, so that they rarely are those of the next jobs
_PARENT = "SPPCTL_LAUNCHER"  # process id of the command that started this one
_is_started = False  # by another sppctl command
_PR_SET_PDEATHSIG = 1
# errors of gloo, NCCL and their store when another process is gone
_LOST = re.compile(
    r"connection (closed|reset|refused)|broken pipe|gloo|nccl|TCPStore|Dist(Backend|Network|Store)Error", re.IGNORECASE
)
# variables of `accelerate launch`, which accelerate also sets itself: how to shard the model and scale its gradients
_SHARDING = re.compile(
    r"ACCELERATE_(USE_(FSDP|DEEPSPEED|MEGATRON_LM|PARALLELISM_CONFIG)|CONFIG_DS_FIELDS|(DEEPSPEED|GRADIENT)_\w+)"
    r"|(FSDP|MEGATRON_LM|PARALLELISM_CONFIG)_\w+"
)


# --- joining ----------------------------------------------------------------------------------------------------------


def adopt() -> None:
    """Adopts the variables of a launcher for this process; called before anything else.

    SIGUSR1, with which Slurm announces a job's time limit, ends the process as SIGTERM does unless something else
    handles it: its default exit code would look like a failure.
    """
    global _is_started
    signal.signal(signal.SIGUSR1, lambda *_: os._exit(128 + signal.SIGTERM))
    os.environ.update(from_slurm(os.environ))
    if dropped := drop_sharding():
        more = ", ..." * (len(dropped) > 2)
        console.warn(f"{', '.join(dropped[:2])}{more} of accelerate are ignored; launch.strategy shards the model")
    parent = os.environ.pop(_PARENT, None)
    _is_started = parent is not None
    if parent is not None and sys.platform == "linux":
        # a launcher that is killed cannot end its processes; they would continue and hold the run directory
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(parent):
            os.kill(os.getpid(), signal.SIGKILL)


def drop_sharding() -> list[str]:
    """Removes the variables by which accelerate would shard the model differently from ``launch.strategy``."""
    names = sorted(filter(_SHARDING.fullmatch, os.environ))
    for name in names:
        del os.environ[name]
    return names


def is_started_by_sppctl() -> bool:
    """Whether another sppctl command, which has printed its notices, started this process."""
    return _is_started


def from_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables for a task of ``srun``; empty outside of one, or where they are set already.

    Only srun sets SLURM_STEP_NUM_TASKS for its tasks; SLURM_NTASKS and SLURM_PROCID are also set in a batch script,
    which is a single process.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks == "1" or "SLURM_PROCID" not in environment or "WORLD_SIZE" in environment:
        return {}
    job, step = int(environment.get("SLURM_JOB_ID", "0")), int(environment.get("SLURM_STEP_ID", "0"))
    variables = {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": tasks,
        "MASTER_ADDR": first_host(environment["SLURM_STEP_NODELIST"]),
        # the same in all tasks, different for other jobs and for the steps of one job, which may run at the same time;
        # below the ports that Linux gives to outgoing connections
        "MASTER_PORT": str(20000 + (job + STEP_PORTS * step) % 12000),
    }
    return {name: value for name, value in variables.items() if name not in environment}


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: ``gpu[03-05,9],login1`` -> ``gpu03``."""
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\])?([^,\[]*)", nodes)
    assert match is not None
    return "".join(part or "" for part in match.groups())


# --- starting ---------------------------------------------------------------------------------------------------------


def num_processes(config: Config, stage: str | None = None) -> int:
    """The number of processes that share the work: the existing ones, else those that :func:`start` would start.

    Pruning with reconstruction, which tunes all weights of a block on all windows, is done by one.

    Raises:
        UserError: the configuration wants several machines, which only a launcher can start.
    """
    if "WORLD_SIZE" in os.environ:
        return distributed.world_size()
    if stage == "prune" and config.prune.reconstruct_epochs:
        return 1
    machines = config.launch.num_machines
    if machines > 1:
        again = shlex.join(sys.argv[1:])
        raise UserError(
            "launch.num_machines",
            f"{machines} machines need a launcher",
            f"on each of them: torchrun --nnodes {machines} --nproc-per-node GPUS --rdzv-backend c10d "
            f"--rdzv-endpoint FIRST_HOST:29500 -m sppctl {again}, or in a Slurm job: "
            f"srun --kill-on-bad-exit=1 --nodes {machines} --ntasks-per-node GPUS sppctl {again}",
        )
    return configured_processes(config)


def configured_processes(config: Config) -> int:
    """The number of processes of a job on all its machines; ``auto`` is one for each visible GPU."""
    launch = config.launch
    if launch.num_processes != "auto":
        return launch.num_processes * launch.num_machines
    if config.model.device not in ("auto", "cuda"):
        return launch.num_machines
    import torch

    return max(1, torch.cuda.device_count()) * launch.num_machines


def accumulation(train: TrainConfig, processes: int) -> int:
    """Micro-batches of each process in a step, so that ``train.batch_size`` holds for any number of processes.

    Raises:
        UserError: it is not a multiple of micro-batch size x processes.
    """
    step = train.micro_batch_size * processes
    if train.batch_size % step:
        raise UserError(
            "train.batch_size",
            f"{train.batch_size} is not a multiple of micro_batch_size x processes ({train.micro_batch_size} x "
            f"{processes})",
            "change one of them",
        )
    return train.batch_size // step


def needed(config: Config, stage: str | None = None) -> bool:
    """Whether this process has to start others to do the work."""
    return "WORLD_SIZE" not in os.environ and num_processes(config, stage) > 1


def start(arguments: list[str], number: int, log: Path | None = None, silent: bool = False) -> int:
    """Runs ``sppctl ARGUMENTS`` in several processes of this machine and waits for them.

    SIGTERM, SIGUSR1, SIGINT and SIGHUP are forwarded to all of them; a second SIGINT (Ctrl-C) kills them. If one fails,
    the others have GRACE_SECONDS to end by themselves. ``silent`` discards their stdout. ``log`` is the file to which
    the first one appends its messages; those of another that failed are added.

    Returns:
        The exit code of the process that failed first, 128 + the number of the signal that ended it; 0 if none failed.
    """
    shared = os.environ | {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1"}
    shared[_PARENT] = str(os.getpid())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shared.setdefault("OMP_NUM_THREADS", str(max(1, cores // number)))
    switch = f"--{console.verbosity.value}"
    if console.verbosity is not Verbosity.NORMAL and switch not in arguments:
        arguments = [*arguments, switch]
    command = [sys.executable, "-P", "-m", "sppctl", *arguments, *plugins.flags()]
    with contextlib.ExitStack() as stack:
        shared["MASTER_PORT"] = str(stack.enter_context(held_port()))
        # stderr of the other ranks is shown only for one that fails first
        errors: list[IO[bytes] | None] = [None]
        errors += [stack.enter_context(tempfile.TemporaryFile()) for _ in range(number - 1)]
        processes: list[subprocess.Popen[bytes]] = []
        with _forwarding_signals(processes) as received:
            for rank, stderr in enumerate(errors):
                variables = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                stdout = subprocess.DEVNULL if silent else None
                # each in its own session, so that Ctrl-C on a terminal reaches them once, through this process
                process = subprocess.Popen(command, env=variables, stdout=stdout, stderr=stderr, start_new_session=True)  # noqa: S603
                processes.append(process)
            failures = _failures(processes)
        if not failures:
            return 0
        if received.count(signal.SIGINT) > 1:
            console.note_interrupt()
            return 128 + signal.SIGINT
        texts = [_content(stderr) for stderr in errors]
    failed = _cause(failures, processes, texts)
    code = processes[failed].returncode
    sys.stderr.write(texts[failed])
    if log is not None:
        console.log_to(log)
    if texts[failed]:
        console.log(texts[failed].rstrip("\n"))
    if code < 0 and -code not in SIGNALS:
        console.note(f"error: process {failed} of {number} was killed by {signal.Signals(-code).name}")
    if code == -signal.SIGUSR1:  # before the process could handle it
        return 128 + signal.SIGTERM
    return code if code > 0 else 128 - code


def _content(file: IO[bytes] | None) -> str:
    if file is None:
        return ""
    file.seek(0)
    return file.read().decode(errors="replace")


@contextlib.contextmanager
def _forwarding_signals(processes: list[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Forwards signals to the processes instead of ending this one; yields the list of those received.

    SIGHUP is not forwarded if this process ignores it.
    """
    received: list[int] = []

    def forward(number: int, frame: object) -> None:
        received.append(number)
        # after Ctrl-C each process waits for the others at the next collective, where no handler runs
        is_second = received.count(signal.SIGINT) > 1
        for process in processes:
            process.send_signal(signal.SIGKILL if is_second else number)

    # ignored under nohup, it stays ignored, here and in the processes, which inherit that
    is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    handled = [number for number in SIGNALS if not (number == signal.SIGHUP and is_ignored)]
    previous = {number: signal.signal(number, forward) for number in handled}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _failures(processes: list[subprocess.Popen[bytes]]) -> list[int]:
    """Waits for all processes; returns the ranks that failed by themselves, the first to fail first."""
    failed: list[int] = []
    deadline = float("inf")
    while True:
        running = [process for process in processes if process.poll() is None]
        failed += [rank for rank, process in enumerate(processes) if process.returncode and rank not in failed]
        if not running:
            return failed
        if failed:
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if time.monotonic() > deadline:
            for process in running:
                process.kill()
            return failed
        time.sleep(0.05)


def _cause(failed: list[int], processes: list[subprocess.Popen[bytes]], texts: list[str]) -> int:
    """The rank that failed first in fact: processes that only lost their connection to it may end sooner."""
    for rank in failed:
        code = processes[rank].returncode
        if code > 1 or (code < 0 and -code not in SIGNALS):
            return rank  # it reported a problem itself, or was killed
        errors = re.findall(r"^error: .*", texts[rank], re.MULTILINE)
        if errors and not _LOST.search(errors[-1]):
            return rank
    return 0 if 0 in failed else failed[0]  # stderr of rank 0 has been shown already


@contextlib.contextmanager
def held_port() -> Iterator[int]:
    """A port for the store of the processes, reserved until they use it.

    This socket does not listen, and both allow the address to be reused, so the store can listen on it.
    """
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        yield reserved.getsockname()[1]
