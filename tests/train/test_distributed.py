"""Training in several processes: what one process does, whichever way they share the model; stopped, it goes on."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import GROUPED, byte_tokenizer
from peft import PeftModel
from processes import Process, environment, in_ranks, sppctl_in_ranks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import sppctl
from sppctl import cli, distributed, launch
from sppctl.config.load import load_config
from sppctl.errors import SharedError, UserError
from sppctl.records import to_json
from sppctl.run import pipeline
from sppctl.run.directory import Run
from sppctl.run.stages import PRUNE, TRAIN

# responses and prompts of many lengths: no two micro-batches hold the same number of tokens
ROWS = [
    {"instruction": f"Add {i} and 1.{' please' * (i * 7 % 13)}", "output": f"It is {i + 1}.{' yes' * (i * 5 % 11)}"}
    for i in range(24)
]
SPARE = {"DS_ACCELERATOR": "cpu"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a float32 model, a bfloat16 model with tied embeddings, data and a configuration.

    21 examples in steps of 8: the last step of an epoch is not whole, and not divisible by 2 or 4 processes.
    """
    root = tmp_path_factory.mktemp("several")
    for name, dtype in DTYPES.items():
        shape = GROUPED | {"max_position_embeddings": 512, "tie_word_embeddings": name == "bfloat16"}
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**shape)).to(dtype)
        model.save_pretrained(root / name)
        byte_tokenizer().save_pretrained(root / name)
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (root / "text.txt").write_text("\n\n".join(f"Sentence {i} says that {i * 7} follows." for i in range(90)))
    (root / "tiny.yaml").write_text(
        f"""
run: {{seed: 1}}
model: {{device: cpu}}
prune: {{method: magnitude, pattern: 2:4, calibration: {{dataset: {root / "text.txt"}}}}}
train:
  rank: 4
  dropout: 0
  data: {{dataset: {root / "rows.jsonl"}, seq_len: 384, val_size: 3}}
  epochs: 3
  batch_size: 8
  micro_batch_size: 2
  log_steps: 1
  lr: 2e-2
  report_to: []
eval: {{perplexity: [{root / "text.txt"}], seq_len: 64, max_tokens: 512}}
"""
    )
    return root


@pytest.fixture(scope="module")
def alone(work: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """By dtype: the run directory of one process, pruned and trained, and the record of the training."""
    made = {}
    for name in DTYPES:
        directory = work / f"alone-{name}"
        config = load_config(str(work / "tiny.yaml"), [f"model.path={work / name}", f"run.dir={directory}"])
        run = Run(config)
        directory.mkdir()
        run.do(PRUNE)
        made[name] = directory, to_json(run.do(TRAIN))
    return made


@pytest.fixture
def several(work: Path, alone: Any, tmp_path: Path) -> Callable[..., tuple[list[str], Path]]:
    """several(2, "fsdp", "float32", ...) -> arguments of sppctl train on one pruned model, and its run directory."""

    def arguments(number: int, strategy: str, dtype: str, *overrides: str) -> tuple[list[str], Path]:
        directory = tmp_path / "run"
        if not directory.exists():
            directory.mkdir()
            (directory / "pruned").symlink_to(alone[dtype][0] / "pruned")
        given = [f"model.path={work / dtype}", f"run.dir={directory}", f"launch.strategy={strategy}"]
        return ["train", str(work / "tiny.yaml"), *given, f"launch.num_processes={number}", *overrides], directory

    return arguments


def sppctl_command(arguments: list[str], torchrun: int = 0) -> list[str]:
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(torchrun)] if torchrun else []
    return [sys.executable, *start, "-m", "sppctl", *arguments]


def outside() -> dict[str, str]:
    """Variables of a process that is started and not forked."""
    path = os.pathsep.join([str(Path(sppctl.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return environment(PYTHONPATH=path, **SPARE)


def call(arguments: list[str], torchrun: int = 0) -> subprocess.CompletedProcess[str]:
    command = sppctl_command(arguments, torchrun)
    return subprocess.run(command, capture_output=True, text=True, env=outside(), timeout=300)


def adapter(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter" / "adapter_model.safetensors")


def losses(record: dict[str, Any]) -> list[float]:
    return [entry["loss"] for entry in record["metrics"]["history"] if "loss" in entry]


def assert_same_adapter(directory: Path, other: Path) -> None:
    """To 1e-5: the values reach 0.2, and AdamW magnifies what the order of a float32 sum changes."""
    mine, theirs = adapter(directory), adapter(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-5)


# --- equality ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "strategy", "dtype", "start"),
    [
        (2, "ddp", "float32", "launch"),
        (4, "ddp", "bfloat16", "ranks"),
        (2, "fsdp", "float32", "torchrun"),
        (4, "fsdp", "bfloat16", "ranks"),
        (2, "zero3", "float32", "ranks"),
    ],
    ids=lambda value: str(value),
)
def test_several_processes_train_what_one_does(
    number: int,
    strategy: str,
    dtype: str,
    start: str,
    several: Callable[..., tuple[list[str], Path]],
    alone: dict[str, tuple[Path, dict[str, Any]]],
) -> None:
    arguments, directory = several(number, strategy, dtype, "--json")
    if start == "ranks":
        done = sppctl_in_ranks(arguments, number, **SPARE)
    else:
        done = call(arguments, number if start == "torchrun" else 0)
    assert done.returncode == 0, done.stderr
    record, (one, expected) = json.loads(done.stdout), alone[dtype]
    assert len(losses(expected)) == 3 * 3
    assert losses(record) == pytest.approx(losses(expected), abs=1e-4)
    assert record["metrics"]["validation_loss"] == pytest.approx(expected["metrics"]["validation_loss"], abs=1e-4)
    assert_same_adapter(directory, one)
    stored = {path.name for path in (directory / "adapter").iterdir()}
    assert stored == {path.name for path in (one / "adapter").iterdir()}
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(one / "pruned"), directory / "adapter")
    loaded = {name: p for name, p in model.named_parameters() if "spp_" in name}
    assert {name.replace(".default", "") for name in loaded} == adapter(directory).keys()
    assert all(torch.equal(p, adapter(directory)[name.replace(".default", "")]) for name, p in loaded.items())


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "packing"), [("float32", "true"), ("bfloat16", "false")])
def test_sharded_students_learn_from_whole_teachers_what_one_does(
    dtype: str,
    packing: str,
    work: Path,
    several: Callable[..., tuple[list[str], Path]],
    alone: dict[str, tuple[Path, dict[str, Any]]],
    tmp_path: Path,
) -> None:
    teacher = AutoModelForCausalLM.from_pretrained(work / dtype)
    teacher.get_output_embeddings().weight.data.mul_(20)  # a random model alone predicts nothing
    teacher.save_pretrained(tmp_path / "teacher")
    byte_tokenizer().save_pretrained(tmp_path / "teacher")
    distilled = (f"train.distill.teacher={tmp_path / 'teacher'}", "train.distill.weight=0.7")
    options = (*distilled, f"train.data.packing={packing}")
    one = tmp_path / "one"
    one.mkdir()
    (one / "pruned").symlink_to(alone[dtype][0] / "pruned")
    given = [f"model.path={work / dtype}", f"run.dir={one}", *options]
    expected = to_json(Run(load_config(str(work / "tiny.yaml"), given)).do(TRAIN))
    arguments, directory = several(2, "fsdp", dtype, "--json", *options)
    done = sppctl_in_ranks(arguments, 2)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    kl = [[entry["kl"] for entry in each["metrics"]["history"] if "kl" in entry] for each in (record, expected)]
    assert len(kl[0]) == 3 * 3
    assert min(kl[1]) > 0.1
    assert kl[0] == pytest.approx(kl[1], rel=1e-3)
    assert losses(record) == pytest.approx(losses(expected), abs=1e-4)
    assert_same_adapter(directory, one)


KILLED = """
import os, signal
from sppctl.evaluate import perplexity
from sppctl.train import loop as trainer
from sppctl.prune import walk

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

if os.environ["RANK"] == "1":
    walk.BlockWork.prune = perplexity.window_sums = die
    first = trainer.SparseTrainer.training_step
    def step(self, *args, **kwargs):
        return die() if self.state.global_step == 1 else first(self, *args, **kwargs)
    trainer.SparseTrainer.training_step = step
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["prune", "ddp", "fsdp", "zero3", "eval"])
def test_a_process_that_is_killed_ends_the_others(
    stage: str, work: Path, several: Callable[..., tuple[list[str], Path]], tmp_path: Path
) -> None:
    arguments, directory = several(2, stage if stage in ("ddp", "fsdp", "zero3") else "ddp", "float32")
    if stage in ("prune", "eval"):
        arguments = [
            stage,
            *arguments[1:],
            "prune.method=wanda",
            "prune.calibration.seq_len=32",
            "eval.divergence=null",
        ]
        arguments += ["prune.calibration.samples=4"]
        (directory / "pruned").unlink()
        arguments += ["--model=base"] * (stage == "eval")
    compiled = tmp_path / "compiled"
    first, second = in_ranks(arguments, 2, KILLED, **SPARE, TORCH_EXTENSIONS_DIR=str(compiled))
    assert second.returncode == -signal.SIGKILL, second.stderr
    assert first.returncode == 1
    assert "error: " in first.stderr
    assert not compiled.exists(), "nothing is compiled"


# --- stopping and going on --------------------------------------------------------------------------------------------


@contextmanager
def started(arguments: list[str], ready: Path) -> Iterator[subprocess.Popen[str]]:
    """A command that runs until a file matches ``ready``; killed if it is still there at the end."""
    with subprocess.Popen(
        sppctl_command(arguments), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=outside()
    ) as process:
        try:
            deadline = time.monotonic() + 120
            while not any(ready.parent.glob(ready.name)):
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.005)
            yield process
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "number"),
    [("fsdp", "fsdp", 2), ("ddp", "fsdp", 2), ("fsdp", "ddp", 1), ("zero3", "zero3", 2)],
)
def test_stopped_by_a_signal_the_same_command_goes_on(
    before: str,
    after: str,
    number: int,
    several: Callable[..., tuple[list[str], Path]],
    alone: dict[str, tuple[Path, dict[str, Any]]],
) -> None:
    arguments, directory = several(2, before, "float32", "train.save_steps=1")
    checkpoints = directory / ".adapter.partial" / "checkpoints"
    with started(arguments, checkpoints / "checkpoint-*") as process:
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 143, said
    assert said.count("stopped by SIGTERM after step") == 1
    stored = [{path.name for path in checkpoint.iterdir()} for checkpoint in checkpoints.glob("checkpoint-*")]
    whole = {"adapter_model.safetensors", "scheduler.pt", "trainer_state.json", "rng_state_1.pth"}
    whole.add("latest" if before == "zero3" else "optimizer.pt")  # DeepSpeed has a format of its own
    assert stored
    assert all(whole <= names and "pytorch_model_fsdp.bin" not in names for names in stored)
    done = sppctl_in_ranks(several(number, after, "float32")[0], number, **SPARE)
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stderr
    assert_same_adapter(directory, alone["float32"][0])


@pytest.mark.slow
def test_processes_do_not_outlive_a_launcher_that_is_killed(several: Callable[..., tuple[list[str], Path]]) -> None:
    arguments, directory = several(2, "ddp", "float32", "train.save_steps=1", "train.epochs=100")
    with started(arguments, directory / ".adapter.partial/checkpoints/checkpoint-*") as process:
        process.kill()
    time.sleep(1)
    before = sorted((directory / ".adapter.partial/checkpoints").iterdir())
    time.sleep(1)
    assert sorted((directory / ".adapter.partial/checkpoints").iterdir()) == before


SECOND_PROCESS_FAILS = """
import os, sys
import torch
from sppctl import cli
from sppctl.train.watch import FiniteLoss
def add(self, loss, examples):
    self.calls = getattr(self, "calls", 0) + 1
    # two micro-batches in each step of a process: the first of the second step
    original(self, loss * float("nan") if os.environ["RANK"] == "1" and self.calls == 3 else loss, examples)
original, FiniteLoss.add = FiniteLoss.add, add
cli.main()
"""


@pytest.mark.slow
def test_a_loss_that_is_not_finite_in_one_process_stops_all_and_is_told_once(
    several: Callable[..., tuple[list[str], Path]], tmp_path: Path
) -> None:
    script = tmp_path / "fails.py"
    script.write_text(SECOND_PROCESS_FAILS)
    arguments, directory = several(2, "ddp", "float32")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run([*start, *arguments], capture_output=True, text=True, env=outside(), timeout=300)
    assert done.returncode == 1
    assert done.stderr.count("error: the training loss is nan at step 2, in training examples ") == 1, done.stderr
    assert not (directory / "adapter").exists()


# --- the pipeline -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("torchrun", [0, 2], ids=["launch", "torchrun"])
def test_run_uses_the_processes_where_it_can(torchrun: int, work: Path, tmp_path: Path) -> None:
    overrides = [f"model.path={work / 'float32'}", "launch.num_processes=2", "launch.strategy=fsdp", "--json"]
    extra = ["train.perplexity_steps=3", f"run.dir={tmp_path / 'run'}"]
    done = call(["run", str(work / "tiny.yaml"), *overrides, *extra], torchrun)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["run"]
    for word in ("prune: done", "train: done", "merge: done", "run: done"):
        assert done.stderr.count(word) == 1, done.stderr
    assert done.stderr.count("step 3: perplexity of") == 1
    assert json.loads((tmp_path / "run/pruned/stage.json").read_text())["metrics"]["processes"] == 2


# --- errors -----------------------------------------------------------------------------------------------------------


def test_an_impossible_batch_is_refused_before_anything_starts(several: Callable[..., tuple[list[str], Path]]) -> None:
    arguments, directory = several(3, "ddp", "float32")
    done = call(arguments)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        "error: train.batch_size: 8 is not a multiple of micro_batch_size x processes (2 x 3); change one of them"
    ]
    assert {path.name for path in directory.iterdir()} == {"pruned"}


def test_zero3_needs_deepspeed(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "deepspeed" else find(name, *rest)
    )
    config = load_config(str(work / "tiny.yaml"), [f"model.path={work / 'float32'}", "launch.strategy=zero3"])
    with pytest.raises(UserError, match=r"launch\.strategy: zero3 needs DeepSpeed: pip install 'sppctl\[deepspeed\]'"):
        pipeline.preflight(Run(config), ("train",))


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
        ("0,0.3,1,Connection closed by peer;1,0,-9,", 137, "process 1 of 2 was ended by SIGKILL"),
        ("0,0,-10,;1,0,-10,", 143, ""),
    ],
)
def test_the_process_that_knows_why_tells_it(
    ends: str, code: int, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "python"
    script.write_text(f"#!{sys.executable}\nimport sys\nsys.argv[1:3] = []\n{ENDS}")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    assert launch.start([ends], 2) == code
    said = capfd.readouterr().err
    assert words in said
    assert "reset by peer" not in said


def test_several_machines_need_a_launcher(work: Path) -> None:
    config = load_config(str(work / "tiny.yaml"), ["launch.num_machines=2", f"model.path={work / 'float32'}"])
    with pytest.raises(UserError, match=r"launch\.num_machines: .*torchrun --nnodes 2 .*srun --nodes 2"):
        launch.num_processes(config)


# --- srun -------------------------------------------------------------------------------------------------------------

TASK = {
    "SLURM_JOB_ID": "12345",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
}


def test_a_task_of_srun_knows_its_place() -> None:
    wanted = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "gpu03", "MASTER_PORT": "32345"}
    assert launch.from_slurm(TASK) == wanted


def test_what_the_job_script_sets_stays() -> None:
    found = launch.from_slurm(TASK | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"})
    assert found.keys() == {"RANK", "LOCAL_RANK", "WORLD_SIZE"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        TASK | {"SLURM_STEP_NUM_TASKS": "1"},
        TASK | {"WORLD_SIZE": "16", "RANK": "9"},
    ],
    ids=["outside", "batch script", "one task", "torchrun in srun"],
)
def test_no_task_of_srun(environment: dict[str, str]) -> None:
    assert launch.from_slurm(environment) == {}


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("login1", "login1"), ("a1,b2", "a1"), ("gpu[03-05,9],b", "gpu03"), ("n[7,9]", "n7"), ("r[1-2]-ib,x", "r1-ib")],
)
def test_the_first_host(nodes: str, host: str) -> None:
    assert launch.first_host(nodes) == host
