"""Training in several processes: what one process does, whichever way they share the model; stopped, it goes on."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from accelerate.utils import DistributedType
from conftest import GROUPED, byte_tokenizer
from fitting import figures
from peft import PeftModel
from processes import environment, in_ranks, sppctl_in_ranks
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import sppctl
from sppctl.config.load import load_config
from sppctl.config.settings import ModelConfig
from sppctl.errors import UserError
from sppctl.publish import generate
from sppctl.records import TrainRecord, from_json
from sppctl.report.records import stored_samples
from sppctl.run import pipeline
from sppctl.run.directory import Run
from sppctl.run.stages import PRUNE, TRAIN
from sppctl.train import shards, watch
from sppctl.train.loop import Loop

# responses and prompts of many lengths: no two micro-batches hold the same number of tokens
ROWS = [
    {"instruction": f"Add {i} and 1.{' please' * (i * 7 % 13)}", "output": f"It is {i + 1}.{' yes' * (i * 5 % 11)}"}
    for i in range(24)
]
SPARE = {"DS_ACCELERATOR": "cpu"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Alone = Callable[..., tuple[Path, TrainRecord]]
Several = Callable[..., tuple[list[str], Path]]


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
        for folder in (root / name, root / f"teacher-{name}"):
            model.save_pretrained(folder)
            byte_tokenizer().save_pretrained(folder)
            model.get_output_embeddings().weight.data.mul_(20)  # a random model alone predicts nothing
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
def alone(work: Path) -> Alone:
    """alone("float32", ...) -> the run directory of one process, pruned and trained, and what training reported."""
    made: dict[tuple[str, ...], tuple[Path, TrainRecord]] = {}

    def once(dtype: str, *overrides: str) -> tuple[Path, TrainRecord]:
        if (key := (dtype, *overrides)) not in made:
            directory = work / f"alone-{len(made)}"
            config = [f"model.path={work / dtype}", f"run.dir={directory}", *overrides]
            run = Run(load_config(str(work / "tiny.yaml"), config))
            directory.mkdir()
            run.do(PRUNE)
            made[key] = directory, run.do(TRAIN).metrics
        return made[key]

    return once


@pytest.fixture
def several(work: Path, alone: Alone, tmp_path: Path) -> Several:
    """several(2, "fsdp", "float32", ...) -> arguments of sppctl train on one pruned model, and its run directory."""

    def arguments(number: int, strategy: str, dtype: str, *overrides: str) -> tuple[list[str], Path]:
        directory = tmp_path / "run"
        if not directory.exists():
            directory.mkdir()
            (directory / "pruned").symlink_to(alone(dtype)[0] / "pruned")
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


def assert_same_adapter(directory: Path, other: Path) -> None:
    """To 1e-5: the values reach 0.2, and AdamW magnifies what the order of a float32 sum changes."""
    mine, theirs = adapter(directory), adapter(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-5)


# --- equality ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "strategy", "dtype", "start", "more"),
    [
        (2, "ddp", "float32", "launch", []),
        (4, "ddp", "bfloat16", "ranks", []),
        (2, "fsdp", "float32", "torchrun", []),
        (4, "fsdp", "bfloat16", "ranks", []),
        (2, "zero3", "float32", "ranks", []),
        # a sharded student and a whole teacher
        (2, "fsdp", "float32", "ranks", ["train.distill.hidden=2", "train.data.packing=true"]),
        (2, "fsdp", "bfloat16", "ranks", ["train.distill.weight=0.7"]),
    ],
    ids=str,
)
def test_several_processes_train_what_one_does(
    number: int, strategy: str, dtype: str, start: str, more: list[str], several: Several, alone: Alone, work: Path
) -> None:
    more = [*more, f"train.distill.teacher={work / f'teacher-{dtype}'}"] if more else []
    arguments, directory = several(number, strategy, dtype, "--json", *more)
    if start == "ranks":
        done = sppctl_in_ranks(arguments, number, **SPARE)
    else:
        done = call(arguments, number if start == "torchrun" else 0)
    assert done.returncode == 0, done.stderr
    one, expected = alone(dtype, *more)
    metrics = from_json(TrainRecord, json.loads(done.stdout)["metrics"])
    assert len(figures(metrics, "loss")) == 3 * 3
    assert metrics.tokens == expected.tokens
    assert figures(metrics, "loss") == pytest.approx(figures(expected, "loss"), abs=1e-4)
    tolerance = 1e-4 if dtype == "float32" else 1e-2
    assert figures(metrics, "grad_norm") == pytest.approx(figures(expected, "grad_norm"), rel=tolerance)
    assert metrics.validation_loss == pytest.approx(expected.validation_loss, abs=1e-4)
    if more:
        assert min(figures(expected, "kl")) > 0.1
        assert figures(metrics, "kl") == pytest.approx(figures(expected, "kl"), rel=1e-3)
        means = [record.distillation.kl_mean for record in (metrics, expected) if record.distillation is not None]
        assert means == [pytest.approx(means[-1], rel=1e-3)] * 2
    assert_same_adapter(directory, one)
    stored = {path.name for path in (directory / "adapter").iterdir()}
    assert stored == {path.name for path in (one / "adapter").iterdir()}
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(one / "pruned"), directory / "adapter")
    loaded = {name.replace(".default", ""): p for name, p in model.named_parameters() if "spp_" in name}
    assert loaded.keys() == adapter(directory).keys()
    assert all(torch.equal(parameter, adapter(directory)[name]) for name, parameter in loaded.items())


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero3"])
def test_several_processes_publish_the_best_adapter_that_one_finds(
    strategy: str, several: Several, alone: Alone
) -> None:
    more = ["train.keep_best=eval_loss", "train.eval_steps=1", "train.patience=2", "train.scheduler=constant"]
    one, expected = alone("float32", *more)
    arguments, directory = several(2, strategy, "float32", "--json", *more)
    done = sppctl_in_ranks(arguments, 2, **SPARE)
    assert done.returncode == 0, done.stderr
    metrics = from_json(TrainRecord, json.loads(done.stdout)["metrics"])
    assert (metrics.best_step, metrics.steps) == (expected.best_step, expected.steps)
    assert metrics.validation_loss == pytest.approx(expected.validation_loss, abs=1e-4)
    assert_same_adapter(directory, one)


SHARDED_GRADIENTS = """
from torch.distributed.fsdp import FSDPModule
def refuse(*_, **__):
    raise AssertionError("whole gradients")
FSDPModule.set_requires_gradient_sync = refuse
"""


@pytest.mark.slow
def test_fsdp_shards_the_gradient_of_each_micro_batch(several: Several) -> None:
    arguments, _ = several(2, "fsdp", "float32", "train.max_steps=1")
    done = sppctl_in_ranks(arguments, 2, SHARDED_GRADIENTS)
    assert done.returncode == 0, done.stderr


PERSISTENT_BUFFERS = """
import torch
from sppctl.train import loop, stage
original, prepare = stage._adapted, loop.Loop.__post_init__
def adapted(*args):
    model = original(*args)
    for layer in model.get_base_model().model.layers:
        layer.mlp.register_buffer("e_score_correction_bias", torch.arange(3.0))
    return model
def prepared(self):
    prepare(self)
    stored = [name for name in self.model.state_dict() if name.endswith("e_score_correction_bias")]
    layers = self.peft.get_base_model().model.layers
    assert len(stored) == len(layers), stored
    assert all(layer.mlp.e_score_correction_bias.tolist() == [0, 1, 2] for layer in layers)
stage._adapted, loop.Loop.__post_init__ = adapted, prepared
"""


@pytest.mark.slow
def test_fsdp_trains_models_with_persistent_buffers(several: Several) -> None:
    """As the routers of DeepSeek-V3 have: accelerate sends every tensor of the state_dict as a sharded one."""
    arguments, _ = several(2, "fsdp", "float32", "train.max_steps=1")
    done = sppctl_in_ranks(arguments, 2, PERSISTENT_BUFFERS)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("sharded", [True, False])
def test_accelerate_sees_no_buffer_in_a_sharded_state(sharded: bool) -> None:
    def prepare(model: torch.nn.Module, optimizer: object) -> tuple[torch.nn.Module, object]:
        seen.append(list(model.state_dict()))
        return model, optimizer

    seen: list[list[str]] = []
    kind = DistributedType.FSDP if sharded else DistributedType.NO
    model: Any = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
    model[0].register_buffer("temporary", torch.ones(1), persistent=False)
    training = Loop.__new__(Loop)
    training.train, training.peft, training.resumed = load_config(None, []).train, model, None
    training.feed, training.accelerator = (
        SimpleNamespace(max_steps=1),  # type: ignore[assignment]
        SimpleNamespace(distributed_type=kind, prepare=prepare, unwrap_model=lambda model: model, device="cpu"),
    )
    before = list(model.state_dict())
    training.__post_init__()
    assert len(before) == 5
    assert seen == [["0.weight", "0.bias"] if sharded else before]
    assert list(model.state_dict()) == before


def test_the_strategy_of_accelerate_launch_is_ignored(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    config = load_config(str(work / "tiny.yaml"), [f"model.path={work / 'float32'}"])
    model = AutoModelForCausalLM.from_pretrained(work / "float32")
    accelerator = shards.make_accelerator(config, torch.device("cpu"), model)
    assert accelerator.distributed_type == DistributedType.NO
    shards.forget_accelerator()


@pytest.mark.parametrize("rank", [0, 1])
def test_zero3_keeps_the_whole_adapter_in_the_first_process_only(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(parameter: Tensor) -> Tensor:
        gathered.append(parameter)
        return parameter.detach()

    gathered: list[Tensor] = []
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setitem(sys.modules, "deepspeed.utils", SimpleNamespace(safe_get_full_fp32_param=gather))
    training = Loop.__new__(Loop)
    training.is_deepspeed, training.peft = True, torch.nn.Linear(2, 3)
    adapter = training._adapter()
    assert len(gathered) == 2, "all processes take part"
    assert (None if adapter is None else list(adapter)) == (None if rank else ["weight", "bias"])


def test_the_processes_of_zero3_measure_perplexity_by_the_same_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    def losses(measured: object, windows: Tensor, size: int, whole_windows: bool) -> list[Tensor]:
        calls.append((measured, whole_windows))
        return [torch.ones(len(windows), dtype=torch.float64)]

    calls: list[tuple[object, bool]] = []
    monkeypatch.setattr(watch, "window_losses", losses)
    hook = watch.PerplexityEvery.__new__(watch.PerplexityEvery)
    hook.steps, hook.last, hook.batch_size, hook.name, hook.windows = 1, None, 1, "x", torch.zeros(2, 8)
    model: Any = torch.nn.Linear(2, 3)
    model.get_base_model = lambda: "base"
    hook.after_step(model, 1)
    model.weight.ds_id = 0
    hook.after_step(model, 2)
    assert calls == [("base", False), (model, True)]


@pytest.mark.slow
def test_several_processes_warn_once(several: Several) -> None:
    arguments, _ = several(2, "ddp", "float32", "train.max_steps=1")
    done = call(arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning: train.lr (0.02) is never reached") == 1


@pytest.mark.slow
def test_deepspeed_is_silent(several: Several) -> None:
    arguments, directory = several(2, "zero3", "bfloat16", "train.max_steps=2")
    done = call(arguments)
    assert done.returncode == 0, done.stderr
    printed = done.stdout + done.stderr.replace(str(directory), "RUN")
    assert not re.search(r"deepspeed|\[(INFO|WARNING)\]|\[W\d+|Warning", printed, re.IGNORECASE), printed


@pytest.mark.slow
def test_ddp_on_packed_weights_gives_the_bits_of_dense_ones(several: Several) -> None:
    adapters = {}
    for kind in ("dense", "packed"):
        options = ("--json", "train.dropout=0.1", "train.max_steps=3", f"model.weights={kind}")
        arguments, directory = several(2, "ddp", "bfloat16", *options)
        done = sppctl_in_ranks(arguments, 2, **SPARE)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["metrics"]["weights"] == kind
        adapters[kind] = (directory / "adapter" / "adapter_model.safetensors").read_bytes()
        shutil.rmtree(directory)
    assert adapters["packed"] == adapters["dense"]


# the second process is killed in pruning, in the second of two micro-batches of its first step, or in measuring
KILLED = """
import os, signal
from accelerate import Accelerator
from sppctl.evaluate import perplexity
from sppctl.prune.block_work import BlockWork
calls = []
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
def backward(*args, **kwargs):
    calls.append(args)
    return die() if len(calls) == 2 else original(*args, **kwargs)
if os.environ["RANK"] == "1":
    BlockWork.prune = perplexity.window_sums = die
    original, Accelerator.backward = Accelerator.backward, backward
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["prune", "ddp", "fsdp", "zero3", "eval"])
def test_a_process_that_is_killed_ends_the_others(stage: str, several: Several, tmp_path: Path) -> None:
    is_training = stage in ("ddp", "fsdp", "zero3")
    arguments, directory = several(2, stage if is_training else "ddp", "float32")
    if not is_training:
        more = ["prune.method=wanda", "prune.calibration.seq_len=32", "prune.calibration.samples=4"]
        arguments = [stage, *arguments[1:], *more, "eval.divergence=null"] + ["--model=base"] * (stage == "eval")
        (directory / "pruned").unlink()
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
    ("before", "after", "number", "sent"),
    [
        ("fsdp", "fsdp", 2, signal.SIGTERM),
        ("ddp", "fsdp", 2, signal.SIGINT),
        ("fsdp", "ddp", 1, signal.SIGTERM),
        ("zero3", "zero3", 2, signal.SIGTERM),
    ],
)
def test_stopped_by_a_signal_the_same_command_goes_on(
    before: str, after: str, number: int, sent: signal.Signals, several: Several, alone: Alone
) -> None:
    arguments, directory = several(2, before, "float32", "train.save_steps=1")
    checkpoints = directory / ".adapter.partial" / "checkpoints"
    with started(arguments, checkpoints / "checkpoint-*") as process:
        process.send_signal(sent)
        _, said = process.communicate(timeout=120)
    assert process.returncode == (130 if sent == signal.SIGINT else 143), said
    assert said.count(f"stopped by {'Ctrl-C' if sent == signal.SIGINT else 'SIGTERM'} after step") == 1
    assert "interrupted" not in said
    stored = [{path.name for path in checkpoint.iterdir()} for checkpoint in checkpoints.glob("checkpoint-*")]
    whole = {"adapter_model.safetensors", "scheduler.pt", "state.json", "rng_state_1.pth"}
    whole.add("latest" if before == "zero3" else "optimizer.pt")  # DeepSpeed has a format of its own
    assert stored
    assert all(whole <= names for names in stored), stored
    done = sppctl_in_ranks(several(number, after, "float32")[0], number, **SPARE)
    assert done.returncode == 0, done.stderr
    assert "continuing from step" in done.stderr
    assert_same_adapter(directory, alone("float32")[0])


@pytest.mark.slow
def test_processes_do_not_outlive_a_launcher_that_is_killed(several: Several) -> None:
    arguments, directory = several(2, "ddp", "float32", "train.save_steps=1", "train.epochs=100")
    with started(arguments, directory / ".adapter.partial/checkpoints/checkpoint-*") as process:
        process.kill()
    time.sleep(1)
    before = sorted((directory / ".adapter.partial/checkpoints").iterdir())
    time.sleep(1)
    assert sorted((directory / ".adapter.partial/checkpoints").iterdir()) == before


SECOND_PROCESS_FAILS = """
import os
from transformers import LlamaForCausalLM
calls = []
def forward(*args, **kwargs):
    calls.append(args)
    output = original(*args, **kwargs)
    # two micro-batches in each step of a process: the first of the second step
    if os.environ["RANK"] == "1" and len(calls) == 3:
        output.logits = output.logits * float("nan")
    return output
original, LlamaForCausalLM.forward = LlamaForCausalLM.forward, forward
"""


@pytest.mark.slow
def test_a_loss_that_is_not_finite_in_one_process_stops_all_and_is_told_once(several: Several) -> None:
    arguments, directory = several(2, "ddp", "float32")
    done = sppctl_in_ranks(arguments, 2, SECOND_PROCESS_FAILS)
    assert done.returncode == 1
    assert done.stderr.count("error: the training loss is nan at step 2, in training examples ") == 1, done.stderr
    assert not (directory / "adapter").exists()


FULL_DISK_OF_ONE = """
import os
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
def save(self, state_dict, path):
    raise OSError(28, "No space left on device", path)
if os.environ["RANK"] == "1":
    TorchCheckpointEngine.save = save
"""


@pytest.mark.slow
def test_zero3_ends_when_one_process_cannot_write_its_shard(several: Several) -> None:
    """The others would wait for it in DeepSpeed's barrier, for the two hours of the process group's timeout."""
    arguments, directory = several(2, "zero3", "float32", "train.max_steps=1")
    first, second = in_ranks(arguments, 2, FULL_DISK_OF_ONE, **SPARE)
    assert (first.returncode, second.returncode) == (1, 1), second.stderr
    assert "the checkpoint of step 1 cannot be written to" in first.stderr
    assert "No space left on device" in first.stderr
    assert not (directory / "adapter").exists()


# --- the pipeline -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("torchrun", "strategy"), [(0, "fsdp"), (2, "fsdp"), (2, "zero3")], ids=["launch", "torchrun", "torchrun-zero3"]
)
def test_run_uses_the_processes_where_it_can(torchrun: int, strategy: str, work: Path, tmp_path: Path) -> None:
    overrides = [f"model.path={work / 'float32'}", "launch.num_processes=2", f"launch.strategy={strategy}", "--json"]
    extra = ["train.perplexity_steps=3", f"run.dir={tmp_path / 'run'}"]
    done = call(["run", str(work / "tiny.yaml"), *overrides, *extra], torchrun)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["run"]
    for word in ("prune: done", "train: done", "merge: done", "run: done"):
        assert done.stderr.count(word) == 1, done.stderr
    assert done.stderr.count("step 3: perplexity of") == 1
    assert json.loads((tmp_path / "run/pruned/stage.json").read_text())["metrics"]["processes"] == 2
    samples = stored_samples(tmp_path / "run")
    assert samples is not None
    assert list(samples.weights) == ["base", "pruned", "merged"]
    model = ModelConfig(device="cpu")
    subjects = generate.subjects_of(str(tmp_path / "run"), model)
    assert samples.samples == generate.generate(subjects, generate.PROMPTS, generate.Settings(model=model))
    assert "no samples" not in done.stderr


ONE_FOR_ALL = """
from sppctl.run import measure
measure.needs_all_gpus = lambda *_: True
"""


@pytest.mark.slow
def test_one_process_measures_a_dense_model_that_exceeds_a_gpu(several: Several) -> None:
    arguments, directory = several(2, "ddp", "float32", "--json", "eval.divergence=null")
    first, second = in_ranks(["eval", *arguments[1:], "--model=base"], 2, ONE_FOR_ALL)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "the dense model exceeds one GPU, so one process spreads it over all" in first.stderr
    assert second.stdout == ""
    found = json.loads((directory / "eval/base.json").read_text())["results"]
    assert json.loads(first.stdout)["results"] == found
    assert len(found) == 1


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_processes_of_a_launcher_report_a_common_problem_once(several: Several) -> None:
    arguments, _ = several(2, "ddp", "float32", "train.data.seq_len=9999")
    first, second = in_ranks(arguments, 2)
    assert (first.returncode, second.returncode) == (2, 2)
    assert first.stderr.count("error: train.data.seq_len: ") == 1, first.stderr
    assert "error" not in second.stderr


@pytest.mark.slow
def test_an_impossible_batch_is_refused_before_anything_starts(several: Several) -> None:
    arguments, directory = several(3, "ddp", "float32")
    done = call(arguments)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        "error: train.batch_size: 8 is not a multiple of micro_batch_size x processes (2 x 3); change one of them"
    ]
    assert {path.name for path in directory.iterdir()} == {"pruned"}


def test_zero3_sums_gradients_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the other strategies do; in a bfloat16 model DeepSpeed would add them up in bfloat16."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig

    settings = json.loads(shards.DEEPSPEED.read_text()) | {"train_batch_size": 2, "gradient_accumulation_steps": 1}
    settings |= {"train_micro_batch_size_per_gpu": 2, "gradient_clipping": 1.0, "bf16": {"enabled": True}}
    settings["zero_optimization"] = {"stage": 3}  # without "auto", which accelerate replaces
    read = DeepSpeedConfig(settings)
    assert (read.grad_accum_dtype, read.communication_data_type) == ("fp32", torch.float32)


def test_zero3_needs_deepspeed(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "deepspeed" else find(name, *rest)
    )
    config = load_config(str(work / "tiny.yaml"), [f"model.path={work / 'float32'}", "launch.strategy=zero3"])
    with pytest.raises(UserError, match=r"launch\.strategy: zero3 needs DeepSpeed: pip install 'sppctl\[deepspeed\]'"):
        pipeline.preflight(Run(config), ("train",))
