"""Starting the processes of a command, or joining those of another launcher; and how they end."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import Command
from processes import Process

from sppctl import cli, distributed, launch
from sppctl.config.load import load_config
from sppctl.errors import SharedError, UserError

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
    ],
)
def test_what_one_process_alone_has_met_it_says(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(distributed, "is_connected", lambda: True)
    monkeypatch.setattr(distributed, "exit_now", sys.exit)  # the test's own process goes on
    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err == said


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
        (TASK | SET, {name: value for name, value in PLACE.items() if name not in SET}),
        ({}, {}),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, {}),
        (TASK | {"SLURM_STEP_NUM_TASKS": "1"}, {}),
        (TASK | {"WORLD_SIZE": "16", "RANK": "9"}, {}),
    ],
    ids=["task", "address set by the job script", "outside", "batch script", "one task", "torchrun in srun"],
)
def test_a_task_of_srun_knows_its_place(environment: dict[str, str], variables: dict[str, str]) -> None:
    assert launch.from_slurm(environment) == variables


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("login1", "login1"), ("a1,b2", "a1"), ("gpu[03-05,9],b", "gpu03"), ("n[7,9]", "n7"), ("r[1-2]-ib,x", "r1-ib")],
)
def test_the_first_host(nodes: str, host: str) -> None:
    assert launch.first_host(nodes) == host
