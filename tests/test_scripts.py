"""The cluster scripts, with stand-ins for sbatch, srun and scontrol that record how they are called."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from cluster import ROOT, SCRIPTS, Cluster
from packaging.requirements import Requirement
from packaging.version import Version

from sppctl.config.load import load_config
from sppctl.config.settings import PROJECTIONS

PAPER_MODELS = ("llama7b", "llama13b", "llama30b", "llama65b", "llama2-70b")


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


# --- the pipeline -----------------------------------------------------------------------------------------------------


def test_the_pipeline_submits_three_jobs_that_wait_for_each_other(cluster: Cluster) -> None:
    overrides = ["llama7b", "train.epochs=1", "run.dir=runs/a name"]
    done = cluster.run("scripts/slurm_pipeline.sh", *overrides, NODES="2", GPUS_PER_NODE="4", PRUNE_OPTIONS="--mem=9G")
    assert done.returncode == 0, done.stderr
    prune, train, evaluate = cluster.calls("sbatch")
    ids = [line.split() for line in done.stdout.splitlines()]
    assert [stage for stage, _ in ids] == ["prune", "train", "eval"]
    for call, script in zip((prune, train, evaluate), ("prune", "train", "eval"), strict=True):
        assert call[-4:] == [f"scripts/slurm_{script}.sh", *overrides]
        assert f"--chdir={cluster.checkout}" in call
    assert "--mem=9G" in prune
    assert not any(argument.startswith("--dependency") for argument in prune)
    assert {"--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", f"--dependency=afterok:{ids[0][1]}"} <= set(train)
    assert {f"--dependency=afterok:{ids[1][1]}", "--kill-on-invalid-dep=yes"} <= set(evaluate)
    assert (cluster.checkout / "runs" / "logs").is_dir()  # Slurm does not make it


def test_a_dry_run_prints_the_commands_and_does_nothing(cluster: Cluster) -> None:
    done = cluster.run("scripts/slurm_pipeline.sh", "llama7b", "run.dir=runs/a name", DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    assert [command[-3] for command in commands] == [f"scripts/slurm_{s}.sh" for s in ("prune", "train", "eval")]
    assert all(command[0] == "sbatch" and command[-1] == "run.dir=runs/a name" for command in commands)
    assert cluster.calls("sbatch") == []
    assert not (cluster.checkout / "runs").exists()


def test_a_wrong_key_is_told_before_anything_is_submitted(cluster: Cluster) -> None:
    done = cluster.run("scripts/slurm_pipeline.sh", "llama7b", "train.epoch=1", SPPCTL_PYTHON=sys.executable)
    assert done.returncode == 2
    assert "train.epoch: unknown key; did you mean train.epochs?" in done.stderr
    assert cluster.calls("sbatch") == []


def test_a_batch_that_the_gpus_cannot_divide_is_told_before_anything_is_submitted(cluster: Cluster) -> None:
    done = cluster.run("scripts/slurm_pipeline.sh", "llama65b", NODES="4", SPPCTL_PYTHON=sys.executable)
    assert done.returncode == 2
    assert "train.batch_size: 128 is not a multiple of micro_batch_size x processes (8 x 32)" in done.stderr
    assert cluster.calls("sbatch") == []


def test_settings_of_the_site_are_read_and_the_environment_wins(cluster: Cluster) -> None:
    shutil.copy(SCRIPTS / "cluster.env.example", cluster.checkout / "scripts" / "cluster.env")
    done = cluster.run("scripts/slurm_pipeline.sh", "llama7b", NODES="3")
    assert done.returncode == 0, done.stderr
    prune, train, _ = cluster.calls("sbatch")
    assert {"--nodes=3", "--gpus-per-node=8", "--time=24:00:00"} <= set(train)
    assert "--time=08:00:00" in prune


# --- in the job -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "command", "processes"),
    [("prune", "prune", "auto"), ("train", "train", None), ("eval", "run", "1"), ("sweep", "sweep", "auto")],
)
def test_a_job_runs_its_stage_in_the_tasks_of_srun(
    cluster: Cluster, stage: str, command: str, processes: str | None
) -> None:
    """On its one machine, with the processes that it has: the configuration's are those of the training."""
    done = cluster.run("bash", f"scripts/slurm_{stage}.sh", "llama7b", "run.dir=runs/a name", SLURM_JOB_ID="7")
    assert done.returncode == 0, done.stderr
    (call,) = cluster.calls("fake-python")
    own = [] if processes is None else ["launch.num_machines=1", f"launch.num_processes={processes}"]
    assert call == ["-m", "sppctl", command, "llama7b", "run.dir=runs/a name", *own]
    assert len(cluster.calls("srun")) == 1
    assert cluster.calls("scontrol") == []


@pytest.mark.parametrize("stage", ["prune", "train", "eval"])
def test_work_that_was_saved_at_a_signal_is_queued_again(cluster: Cluster, stage: str) -> None:
    done = cluster.run("bash", f"scripts/slurm_{stage}.sh", "llama7b", SLURM_JOB_ID="7", TASK_EXIT="143")
    assert done.returncode == 143
    assert cluster.calls("scontrol") == [["requeue", "7"]]


@pytest.mark.parametrize("code", [1, 2, 137, 139])
def test_a_failure_is_not_queued_again_even_where_srun_reports_the_tasks_it_ended(cluster: Cluster, code: int) -> None:
    for srun_exit in (str(code), "143"):
        done = cluster.run(
            "bash",
            "scripts/slurm_train.sh",
            "llama7b",
            SLURM_JOB_ID="7",
            TASK_EXIT=str(code),
            SRUN_EXIT=srun_exit,
        )
        assert done.returncode == code
    assert cluster.calls("scontrol") == []
    assert not list(cluster.checkout.glob(".failed-*"))


def test_a_signal_before_the_command_could_answer_is_no_failure(cluster: Cluster) -> None:
    (cluster.checkout / ".failed-7").write_text("1\n")  # left by a start of the job that was killed
    done = cluster.run("bash", "scripts/slurm_train.sh", "llama7b", SLURM_JOB_ID="7", TASK_EXIT="138")
    assert done.returncode == 143
    assert cluster.calls("scontrol") == [["requeue", "7"]]


def test_restarts_come_to_an_end(cluster: Cluster) -> None:
    job = {"SLURM_JOB_ID": "7", "TASK_EXIT": "143", "SLURM_RESTART_COUNT": "3", "MAX_RESTARTS": "3"}
    done = cluster.run("bash", "scripts/slurm_train.sh", "llama7b", **job)
    assert done.returncode == 143
    assert "MAX_RESTARTS" in done.stderr
    assert cluster.calls("scontrol") == []


def test_a_task_waits_for_its_command_when_a_signal_reaches_both(tmp_path: Path) -> None:
    command = "trap 'sleep 0.2; exit 143' USR1; kill -USR1 $PPID; kill -USR1 $$; while :; do sleep 0.05; done"
    failed = tmp_path / "failed"
    done = subprocess.run([SCRIPTS / "slurm_task.sh", failed, "bash", "-c", command], timeout=30)
    assert done.returncode == 143
    assert not failed.exists()


# --- the paper's runs -------------------------------------------------------------------------------------------------


def test_every_name_of_the_paper_means_a_configuration(cluster: Cluster) -> None:
    names = cluster.run("scripts/paper_runs.sh", "--list").stdout.split()
    assert len(names) == len(set(names)) == len(PAPER_MODELS) * 2 * 3
    for name in names:
        done = cluster.run("scripts/paper_runs.sh", "--local", "--dry-run", name)
        assert done.returncode == 0, done.stderr
        program, *_, command, model, method, pattern, directory = shlex.split(done.stdout)
        assert (program, command, directory) == ("fake-python", "run", f"run.dir=runs/{name}")
        config = load_config(model, [method, pattern, directory])
        assert model in PAPER_MODELS
        wanted = f"{model}-{config.prune.method}-{str(config.prune.pattern).replace(':', 'of')}"
        assert name == wanted
        assert (config.train.method, config.train.rank) == ("spp", 16)
        assert tuple(config.prune.targets) == PROJECTIONS


def test_a_paper_run_is_submitted_with_its_overrides(cluster: Cluster) -> None:
    done = cluster.run("scripts/paper_runs.sh", "llama65b-sparsegpt-2of8", "train.lr=1e-3")
    assert done.returncode == 0, done.stderr
    own = ["prune.method=sparsegpt", "prune.pattern=2:8", "run.dir=runs/llama65b-sparsegpt-2of8"]
    calls = cluster.calls("sbatch")
    assert len(calls) == 3
    assert all(call[-5:] == ["llama65b", *own, "train.lr=1e-3"] for call in calls)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["llama7b-wanda-3of4"], "llama7b-wanda-3of4 is no run of the paper"),
        ([], "which run?"),
        (["--here", "llama7b-wanda-2of4"], "--here is none of --list, --dry-run, --local"),
    ],
)
def test_a_wrong_name_is_told(cluster: Cluster, arguments: list[str], problem: str) -> None:
    done = cluster.run("scripts/paper_runs.sh", *arguments)
    assert done.returncode == 2
    assert problem in done.stderr
    assert cluster.calls("sbatch") == []


# --- prefetch ---------------------------------------------------------------------------------------------------------


def test_prefetch_opens_everything_once_with_and_once_without_the_network(cluster: Cluster) -> None:
    done = cluster.run("scripts/prefetch.sh", "llama7b")
    assert done.returncode == 0, done.stderr
    assert [call[0] for call in cluster.calls("fake-python")] == ["-m", "scripts/prefetch.py", "scripts/prefetch.py"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "code", "problem"),
    [
        ([], 0, ""),
        (["prune.calibration.dataset=some/corpus"], 2, "dataset some/corpus (train) could not be loaded"),
    ],
)
def test_prefetch_tells_what_a_node_without_network_would_lack(
    cluster: Cluster, llama: Path, overrides: list[str], code: int, problem: str
) -> None:
    built_in = [
        "prune.calibration={dataset: instructions, seq_len: 16}",
        "train.data.seq_len=64",
        "eval={perplexity: [instructions], seq_len: 16}",
    ]
    command = ["scripts/prefetch.sh", "quickstart", f"model.path={llama}", *built_in, *overrides]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(cluster.checkout / "hf")}
    done = cluster.run(*command, SPPCTL_PYTHON=sys.executable, **offline)
    assert done.returncode == code, done.stderr
    assert problem in done.stderr
    assert not (cluster.checkout / "runs").exists()


def test_the_lowest_versions_are_those_that_the_package_allows() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    tried = {name: Version(version) for name, _, version in (line.partition("==") for line in lines) if version}
    for needed in map(Requirement, project["dependencies"]):
        (lowest,) = [bound.version for bound in needed.specifier if bound.operator == ">="]
        assert tried[needed.name] == Version(lowest), needed
