"""Starting the processes of a command, or joining those of another launcher; and how they end."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import Command
from processes import Process

from sppctl import cli, distributed, launch
from sppctl.config.load import load_config
from sppctl.errors import SharedError, Stopped, UserError
from sppctl.run import pipeline
from sppctl.run.directory import Run

STILL_BUSY = """
import atexit, threading, time
from sppctl import distributed
threading.Thread(target=time.sleep, args=(60,)).start()
atexit.register(print, "registered for the end")
distributed.is_connected = lambda: True
"""


def test_a_connected_process_ends_whatever_still_runs_in_it() -> None:
    started_at = time.monotonic()
    done = Process(["config", "nosuch.yaml"], STILL_BUSY).wait()
    assert (done.returncode, done.stdout) == (2, "registered for the end\n")
    assert time.monotonic() - started_at < 30


def test_the_exit_code_and_the_words_of_the_processes_come_through(capfd: pytest.CaptureFixture[str]) -> None:
    assert launch.start(["config", "nosuch.yaml"], 2) == 2
    assert capfd.readouterr().err.count("nosuch.yaml") == 1


def test_modules_in_the_current_directory_are_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "statistics.py").write_text("raise SystemExit(7)")  # torch imports that module of Python's
    (tmp_path / "yaml.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(tmp_path)
    assert launch.start(["config", "nosuch.yaml"], 2) == 2
    assert capfd.readouterr().err.count("nosuch.yaml") == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UserError("no memory\nnor disk"), "error: process 1: no memory\nerror: process 1: nor disk\n"),
        (SharedError("the loss is nan"), ""),
        (Stopped("stopped by SIGTERM"), ""),
    ],
)
def test_what_one_process_alone_has_met_it_says_and_after_a_common_end_it_waits(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    def wait() -> None:
        waited.append(True)
        raise RuntimeError("Connection closed by peer")

    waited: list[bool] = []
    monkeypatch.setattr(distributed, "barrier", wait)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(distributed, "is_connected", lambda: True)
    monkeypatch.setattr(distributed, "exit_now", sys.exit)  # the test's own process goes on
    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert capsys.readouterr().err == said
    assert ended.value.code == error.exit_code  # type: ignore[attr-defined]
    assert waited == [True] * (not said)


@pytest.mark.parametrize("theirs", ["the same", "run.dir: is read-only", None])
@pytest.mark.parametrize(
    "check",
    [partial(pipeline.preflight, stages=("prune",)), partial(pipeline.evaluate_some, models=[])],
    ids=["prune", "eval"],
)
def test_a_problem_that_all_processes_find_is_a_common_one(
    check: Callable[[Run], object],
    theirs: str | None,
    config_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gather(text: str | None) -> list[str | None]:
        return [text, text if theirs == "the same" else theirs]

    config = load_config(str(config_file), [f"run.dir={tmp_path / 'model'}"])
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").touch()
    monkeypatch.setattr(distributed, "is_connected", lambda: True)
    monkeypatch.setattr(distributed, "gather_objects", gather)
    with pytest.raises(UserError, match="holds a checkpoint") as raised:
        check(Run(config))
    assert raised.value.shared == (theirs == "the same")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("arguments", [("merge", "{config}"), ("clean", "{run}"), ("config", "{config}")], ids=str)
def test_work_for_one_process_is_done_by_the_first_alone(
    arguments: tuple[str, ...],
    rank: int,
    command: Command,
    config_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    outcome = command(*[argument.format(config=config_file, run=tmp_path) for argument in arguments])
    assert bool(outcome.out + outcome.err) == (rank == 0)
    if rank == 0:
        assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"} & os.environ.keys()
    else:
        assert outcome.code == 0


def test_a_process_that_sees_one_gpu_calls_it_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    joined: list[str] = []
    fake = SimpleNamespace(is_initialized=lambda: False, init_process_group=lambda kind, **_: joined.append(kind))
    monkeypatch.setattr(distributed, "_torch", lambda: fake)
    monkeypatch.setattr(torch.cuda, "set_device", joined.append)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "5")
    distributed.connect(torch.device("cuda", 0))
    assert joined == [torch.device("cuda", 0), "nccl"]
    assert os.environ["LOCAL_RANK"] == "0"


ENDS = """
import os, sys, time
rank = int(os.environ["RANK"])
for part in sys.argv[1].split(";"):
    which, seconds, code, words = part.split(",")
    if int(which) == rank:
        time.sleep(float(seconds))
        if words:
            print("error:", words, file=sys.stderr)
        os.kill(os.getpid(), -int(code)) if int(code) < 0 else os._exit(int(code))
"""


@pytest.mark.parametrize(
    ("ends", "code", "words"),
    [
        ("0,0,1,Connection closed by peer;1,0,2,process 1: no memory", 2, "process 1: no memory"),
        ("0,0,1,;1,0.3,1,process 1: half a shard", 1, "process 1: half a shard"),
        ("0,0.3,1,broken loss;1,0,1,process 1: Connection reset by peer", 1, "broken loss"),
        ("0,0.3,1,[c10d] TCPStore closed;1,0,1,process 1: cannot be restored", 1, "process 1: cannot be restored"),
        ("0,0.3,1,Connection closed by peer;1,0,-9,", 137, "process 1 of 2 was killed by SIGKILL"),
        ("0,0,-10,;1,0,-10,", 143, ""),
    ],
)
def test_the_process_that_knows_why_tells_it(
    ends: str, code: int, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "python"
    script.write_text(f"#!{sys.executable}\nimport sys\nsys.argv[1:4] = []\n{ENDS}")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    log = tmp_path / "sppctl.log"
    assert launch.start([ends], 2, log) == code
    said = capfd.readouterr().err
    assert words in said
    own = [line for line in words.splitlines() if "process 1" in line]  # the first one writes to the log itself
    assert all(line in log.read_text() for line in own)
    assert "reset by peer" not in said


def test_ctrl_c_is_reported_once(
    command: Command, config_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "python"
    script.write_text(f"#!{sys.executable}\nimport os\nos.environ['RANK'] == '0' and print('saved')\nos._exit(130)\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    outcome = command("prune", str(config_file), "launch.num_processes=2", "prune.method=magnitude")
    assert (outcome.code, outcome.err) == (130, "")


def test_a_second_ctrl_c_kills_the_processes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """They ignore the first one, as a process does that waits for another in a collective."""
    script = tmp_path / "python"
    script.write_text(
        f"#!{sys.executable}\nimport os, signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        f"open({str(tmp_path)!r} + '/ready-' + os.environ['RANK'], 'w')\ntime.sleep(100)\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))

    def interrupt() -> None:
        while len(list(tmp_path.glob("ready-*"))) < 2:
            time.sleep(0.01)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert launch.start([], 2) == 130
    thread.join()
    assert capfd.readouterr().err.strip() == "interrupted; the same command continues or starts the stage again"


def test_a_hangup_that_nohup_ignores_stays_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "python"
    ignores = "signal.getsignal(signal.SIGHUP) is signal.SIG_IGN"
    script.write_text(f"#!{sys.executable}\nimport os, signal\nos._exit(0 if {ignores} else 3)\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with launch._forwarding_signals([]) as received:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            assert received == [signal.SIGTERM]
        assert launch.start([], 2) == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_several_machines_need_a_launcher(config_file: Path) -> None:
    config = load_config(str(config_file), ["launch.num_machines=2"])
    with pytest.raises(UserError, match=r"launch\.num_machines: .*torchrun --nnodes 2 .*srun --kill.* --nodes 2"):
        launch.num_processes(config)


def test_the_sharding_of_accelerate_launch_is_ignored() -> None:
    given = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1", "FSDP_OFFLOAD_PARAMS": "true"}
    kept = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "true"}
    shown = "from sppctl import cli, launch\ncli.app = lambda: print(launch.drop_sharding(), len(os.environ))"
    done = Process([], f"import os\n{shown}", given | kept).wait()
    plain = Process([], f"import os\n{shown}", kept).wait()
    assert done.stdout == plain.stdout
    assert done.stderr == (
        "warning: ACCELERATE_USE_FSDP, FSDP_OFFLOAD_PARAMS, ... of accelerate are ignored; launch.strategy shards the "
        "model\n"
    )
    assert plain.stderr == ""


# --- srun -------------------------------------------------------------------------------------------------------------

TASK = {
    "SLURM_JOB_ID": "12345",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
}


PLACE = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "gpu03", "MASTER_PORT": "20345"}
SET = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "variables"),
    [
        (TASK, PLACE),
        (TASK | {"SLURM_STEP_ID": "2"}, PLACE | {"MASTER_PORT": "22339"}),
        (TASK | SET, {name: value for name, value in PLACE.items() if name not in SET}),
        ({}, {}),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, {}),
        (TASK | {"SLURM_STEP_NUM_TASKS": "1"}, {}),
        (TASK | {"WORLD_SIZE": "16", "RANK": "9"}, {}),
    ],
    ids=["task", "second step", "address of the job script", "outside", "batch script", "one task", "torchrun in srun"],
)
def test_a_task_of_srun_knows_its_place(environment: dict[str, str], variables: dict[str, str]) -> None:
    assert launch.from_slurm(environment) == variables


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("login1", "login1"), ("a1,b2", "a1"), ("gpu[03-05,9],b", "gpu03"), ("n[7,9]", "n7"), ("r[1-2]-ib,x", "r1-ib")],
)
def test_the_first_host(nodes: str, host: str) -> None:
    assert launch.first_host(nodes) == host
