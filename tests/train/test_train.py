"""Training: it learns, it resumes exactly, it leaves the pruned checkpoint alone."""

from __future__ import annotations

import contextlib
import functools
import json
import random
import shutil
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import stage_calls
import torch
from conftest import cut_after
from safetensors.torch import load_file
from stage_calls import blank
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from sppctl import console
from sppctl.config.load import load_config
from sppctl.config.settings import Config
from sppctl.errors import StageError, UserError
from sppctl.model import checkpoint
from sppctl.model.blocks import Skeleton
from sppctl.plan import run as plan
from sppctl.records import LayerRecord, PruneRecord, TrainRecord, to_json
from sppctl.train import checkpoints as resuming
from sppctl.train import stage as train
from sppctl.train.checkpoints import demand_files
from sppctl.train.loop import SparseTrainer
from sppctl.train.watch import FiniteLoss


@pytest.fixture
def configure(config_file: Path) -> Callable[..., Config]:
    return lambda *overrides: load_config(str(config_file), overrides)


def trained(config: Config, pruned: tuple[Path, PruneRecord], out: Path, resume: bool = True) -> TrainRecord:
    out.mkdir(exist_ok=True)
    return stage_calls.train(config, *pruned, out, resume=resume)


def test_the_loss_falls_and_the_record_says_so(
    configure: Callable[..., Config], pruned: tuple[Path, PruneRecord], tmp_path: Path
) -> None:
    before = (pruned[0] / "model.safetensors").read_bytes()
    config = configure("train.epochs=12", "train.lr=5e-2", "train.log_steps=1", "train.dropout=0.0")
    metrics = trained(config, pruned, tmp_path / "adapter")
    losses = [entry["loss"] for entry in metrics.history if "loss" in entry]
    assert metrics.steps == len(losses) == 12 * 5
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.05 * 5
    assert metrics.examples == 20
    assert metrics.validation_examples == 4
    assert metrics.validation_loss < losses[0]
    assert (pruned[0] / "model.safetensors").read_bytes() == before
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "README.md",
        "logs",
        "checkpoints",  # until the stage is published
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_figures_go_to_tensorboard_and_perplexity_to_the_record(
    configure: Callable[..., Config], pruned: tuple[Path, PruneRecord], tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = configure("train.log_steps=1", "train.perplexity_steps=2", "eval.seq_len=64", "eval.max_tokens=256")
    history = trained(config, pruned, tmp_path / "adapter").history
    events = EventAccumulator(str(tmp_path / "adapter" / "logs"))
    events.Reload()
    logged = [entry for entry in history if "loss" in entry]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx([e["loss"] for e in logged])
    assert all(event.value > 0 for event in events.Scalars("train/grad_norm"))
    measured = [entry for entry in history if "perplexity" in entry]
    assert [event.step for event in events.Scalars("train/perplexity")] == [2, 4]
    assert [entry["step"] for entry in measured] == [2, 4]
    assert measured[1]["perplexity"] < measured[0]["perplexity"]


def test_an_infinite_perplexity_is_null_in_checkpoints_and_record(
    configure: Callable[..., Config], pruned: tuple[Path, PruneRecord], tmp_path: Path
) -> None:
    """A text that the model holds for impossible is no reason to stop; JSON has no infinity."""
    model = AutoModelForCausalLM.from_pretrained(pruned[0])
    model.lm_head.weight.data.mul_(1e5)
    model.save_pretrained(pruned[0])
    options = ("train.max_steps=2", "train.perplexity_steps=1", "train.save_steps=1", "train.lr=1e-9")
    metrics = trained(configure(*options, "eval.max_tokens=256"), pruned, tmp_path / "adapter")
    assert [entry["perplexity"] for entry in metrics.history if "perplexity" in entry] == [None, None]
    for path in (tmp_path / "adapter" / "checkpoints").glob("*/trainer_state.json"):
        json.loads(path.read_text(), parse_constant=pytest.fail)


def test_learning_rate_warms_up_and_decays_linearly(
    configure: Callable[..., Config], pruned: tuple[Path, PruneRecord], tmp_path: Path
) -> None:
    config = configure("train.epochs=4", "train.lr=1e-3", "train.warmup_ratio=0.25", "train.log_steps=1")
    rates = [
        entry["learning_rate"]
        for entry in trained(config, pruned, tmp_path / "adapter").history
        if "learning_rate" in entry
    ]
    warm = [1e-3 * step / 5 for step in range(5)]
    decay = [1e-3 * (20 - step) / 15 for step in range(5, 20)]
    assert rates == pytest.approx(warm + decay, abs=1e-9)


def test_a_resumed_training_ends_with_the_same_adapter(
    configure: Callable[..., Config], pruned: tuple[Path, PruneRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure("train.epochs=2", "train.save_steps=3", "train.dropout=0.1")
    trained(config, pruned, tmp_path / "whole")

    with cut_after(5):
        trained(config, pruned, tmp_path / "cut")
    checkpoint = tmp_path / "cut" / "checkpoints" / "checkpoint-3"
    stored = {path.name for path in checkpoint.iterdir()}
    assert "adapter_model.safetensors" in stored
    assert "model.safetensors" not in stored
    metrics = trained(config, pruned, tmp_path / "cut")
    assert metrics.steps == 10
    whole, cut = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut"))
    for name, tensor in whole.items():
        assert torch.equal(tensor, cut[name]), name


@pytest.mark.parametrize("steps", [7, 10], ids=["inside an epoch", "end of an epoch"])
def test_resuming_after_the_last_step_adds_nothing(
    steps: int, configure: Callable[..., Config], pruned: tuple[Path, PruneRecord], tmp_path: Path
) -> None:
    out = tmp_path / "adapter"
    options = ("train.save_steps=4", "train.eval_steps=2", "train.perplexity_steps=3", "train.refresh.steps=3")
    config = configure(f"train.max_steps={steps}", *options, "eval.max_tokens=256")
    dense = Path(str(config.model.path))
    whole = stage_calls.train(config, *pruned, out, base=dense)
    weights = (out / "adapter_model.safetensors").read_bytes()
    kept = {path.name for path in (out / "checkpoints").iterdir()}
    # killed before anything but the checkpoints was written
    (out / "adapter_model.safetensors").unlink()
    resumed = stage_calls.train(config, *pruned, out, base=dense)
    assert whole.steps == steps
    assert untimed(to_json(resumed)) == untimed(to_json(whole))
    assert (out / "adapter_model.safetensors").read_bytes() == weights
    assert {path.name for path in (out / "checkpoints").iterdir()} == kept


def untimed(value: Any) -> Any:
    """A record without times."""
    if isinstance(value, list):
        return [untimed(inner) for inner in value]
    timed = ("second", "runtime")
    return (
        {key: untimed(inner) for key, inner in value.items() if not any(word in key for word in timed)}
        if isinstance(value, dict)
        else value
    )


def test_the_mean_loss_and_the_time_count_all_attempts(
    configure: Callable[..., Config], pruned: tuple[Path, PruneRecord], tmp_path: Path
) -> None:
    config = configure("train.epochs=2", "train.save_steps=3", "train.log_steps=4")
    every = trained(configure("train.epochs=2", "train.log_steps=1"), pruned, tmp_path / "every")
    with cut_after(8):
        trained(config, pruned, tmp_path / "cut")
    state = json.loads((tmp_path / "cut/checkpoints/checkpoint-6/trainer_state.json").read_text())
    metrics = trained(config, pruned, tmp_path / "cut")
    assert metrics.train_loss == pytest.approx(every.train_loss, rel=1e-6)
    assert [entry["step"] for entry in metrics.history if "loss" in entry] == [1, 3, 4, 6, 8, 9, 10]
    before = max(entry["seconds"] for entry in state["log_history"])
    assert metrics.seconds > before > 0
    assert metrics.tokens_per_second == pytest.approx(metrics.tokens / metrics.seconds)


def test_a_checkpoint_that_lacks_the_optimizer_is_not_continued_with_a_new_one(
    configure: Callable[..., Config], pruned: tuple[Path, PruneRecord], tmp_path: Path
) -> None:
    config, out = configure("train.epochs=2", "train.save_steps=3"), tmp_path / "cut"
    with cut_after(5):
        trained(config, pruned, out)
    saved = out / "checkpoints" / "checkpoint-3"
    (saved / "scheduler.pt").rename(saved / "away")
    with pytest.raises(UserError, match=r"checkpoint-3 is damaged \(scheduler\.pt is missing\)"):
        trained(config, pruned, out)
    (saved / "away").rename(saved / "scheduler.pt")
    with pytest.raises(UserError, match=r"checkpoint-3 lacks latest, which training under zero3 continues from"):
        demand_files(saved, "zero3")
    (saved / "optimizer.pt").unlink()
    (saved / "global_step3").mkdir()
    with pytest.raises(UserError, match=r"under ddp continues from: it was written under launch\.strategy=zero3"):
        demand_files(saved, "ddp")


@pytest.mark.parametrize("step", [3, 5], ids=["a step that is saved", "the last step"])
def test_a_gradient_that_is_not_finite_stops_it(
    step: int,
    configure: Callable[..., Config],
    pruned: tuple[Path, PruneRecord],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = SparseTrainer.training_step

    def overflow(self: SparseTrainer, model: Any, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, model, *args, **kwargs)
        if self.state.global_step == step - 1:
            next(p for p in model.parameters() if p.requires_grad).grad.view(-1)[0] = float("inf")
        return loss

    monkeypatch.setattr(SparseTrainer, "training_step", overflow)
    with pytest.raises(StageError, match=rf"norm of the gradient is inf at step {step}, of training examples \d+, "):
        trained(configure("train.save_steps=3"), pruned, tmp_path / "adapter")
    assert not list(tmp_path.glob("adapter/checkpoints/checkpoint-3")) or step == 5
    assert not (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("broken", "words"), [("loss", "validation loss is nan at step 5"), ("adapter", "adapter is not finite after")]
)
def test_nothing_that_is_not_finite_is_published(
    broken: str,
    words: str,
    configure: Callable[..., Config],
    pruned: tuple[Path, PruneRecord],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evaluate = SparseTrainer.evaluate

    def spoil(self: SparseTrainer) -> Any:
        if broken == "adapter":
            found = evaluate(self)
        next(p for p in self.model.parameters() if p.requires_grad).data.fill_(float("nan"))
        return found if broken == "adapter" else evaluate(self)

    monkeypatch.setattr(SparseTrainer, "evaluate", spoil)
    with pytest.raises(StageError, match=words):
        trained(configure(), pruned, tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_the_time_left_does_not_count_what_was_done_before(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = iter([0.0, 20.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(times))
    with console.Progress("training", 100, start=80) as bar:
        bar.advance(steps=10)
    assert "training: 90/100, 20 s, 20 s left" in capsys.readouterr().err


def test_a_single_process_uses_one_gpu_however_many_it_sees(
    configure: Callable[..., Config],
    pruned: tuple[Path, PruneRecord],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = []

    original = train.TrainingArguments

    def of_four_gpus(**given: Any) -> Any:
        arguments = original(**given)
        assert arguments.device.type == "cpu"
        arguments._n_gpu = 4
        made.append(arguments)
        return arguments

    monkeypatch.setattr(train, "TrainingArguments", of_four_gpus)
    metrics = trained(configure("train.max_steps=1"), pruned, tmp_path / "adapter")
    assert metrics.steps == 1
    assert made[0].n_gpu == 1
    assert made[0].train_batch_size == made[0].per_device_train_batch_size


def test_another_gpu_than_the_first_is_refused_with_the_fix(configure: Callable[..., Config], llama: Path) -> None:
    config = configure("model.device=cuda:1")
    with pytest.raises(UserError, match=r"not on cuda:1; call CUDA_VISIBLE_DEVICES=1 sppctl \.\.\. model\.device=cuda"):
        train.prepare(config, Skeleton(checkpoint.load_config(llama)), checkpoint.load_tokenizer(llama))


def test_no_resume_starts_again(
    configure: Callable[..., Config], pruned: tuple[Path, PruneRecord], tmp_path: Path
) -> None:
    config = configure("train.save_steps=2", "train.dropout=0.1")
    trained(config, pruned, tmp_path / "one", resume=False)
    trained(config, pruned, tmp_path / "two", resume=False)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_accumulation_gives_the_loss_and_gradient_of_the_whole_batch(
    configure: Callable[..., Config], pruned: tuple[Path, PruneRecord], tmp_path: Path
) -> None:
    figures = []
    for micro in (1, 2, 4):
        overrides = (f"train.micro_batch_size={micro}", "train.dropout=0.0", "train.log_steps=1", "train.lr=1e-4")
        history = trained(configure(*overrides), pruned, tmp_path / f"micro{micro}").history
        figures.append(
            [figure for entry in history if "loss" in entry for figure in (entry["loss"], entry["grad_norm"])]
        )
    assert figures[1] == pytest.approx(figures[0], rel=1e-3)
    assert figures[2] == pytest.approx(figures[0], rel=1e-3)


def test_truncation_is_counted(
    configure: Callable[..., Config],
    pruned: tuple[Path, PruneRecord],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    metrics = trained(configure("train.data.seq_len=96", "train.max_steps=1"), pruned, tmp_path / "adapter")
    assert metrics.truncated_examples == 20
    assert "20 of 20 examples (100.0%) are longer than 96 tokens and were cut" in capsys.readouterr().err


def test_padding_that_the_model_does_not_embed_changes_nothing(
    configure: Callable[..., Config], pruned: tuple[Path, PruneRecord], tmp_path: Path
) -> None:
    config = configure("train.max_steps=2", "train.log_steps=1")
    before = trained(config, pruned, tmp_path / "own")
    tokenizer = checkpoint.load_tokenizer(pruned[0])
    tokenizer.add_tokens(["<more>"])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == 260
    tokenizer.save_pretrained(pruned[0])
    after = trained(config, pruned, tmp_path / "beyond")
    assert figures(after, "loss") == figures(before, "loss")


def long_prompts(path: Path, held_out: int, trained: int) -> Path:
    """Nine rows, of which two will be held out; so many of these and of the others have a prompt of 80 characters."""
    order = list(range(9))
    random.Random(1).shuffle(order)  # as run.seed does
    long = {*order[:held_out], *order[2 : 2 + trained]}
    rows = [{"instruction": "long " * 16 if i in long else "Say", "input": str(i), "output": "It."} for i in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("more", ["train.lr=1e-3", "train.distill.teacher=base", "train.data.packing=true"])
@pytest.mark.parametrize("held_out", [1, 2])
def test_examples_without_labels_are_left_out_counted_and_reported(
    held_out: int,
    more: str,
    configure: Callable[..., Config],
    pruned: tuple[Path, PruneRecord],
    llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One example in a step: that of a prompt which fills the window would be 0/0."""
    options = [f"train.data.dataset={long_prompts(tmp_path / 'rows.jsonl', held_out, 3)}", "train.data.val_size=2"]
    options += ["train.data.prompt='{instruction} {input}: '", "train.data.train_on_inputs=false", "train.log_steps=1"]
    options += ["train.data.seq_len=64", "train.batch_size=1", "train.micro_batch_size=1", "train.eval_steps=2", more]
    metrics = stage_calls.train(configure(*options), *pruned, tmp_path / "new", base=llama)
    assert (metrics.examples, metrics.examples_without_labels, metrics.steps) == (4, 3, 4)
    assert metrics.validation_examples == 2 - held_out
    assert metrics.validation_examples_without_labels == held_out
    assert (metrics.validation_loss is None) == (held_out == 2)
    json.dumps(to_json(metrics), allow_nan=False)
    assert len([entry for entry in metrics.history if entry.get("loss", 0) > 1]) == 4
    said = capsys.readouterr().err
    for count, kind in ((3, "training"), (held_out, "validation")):
        assert (
            f"{count} {kind} examples have no response within 64 tokens (train.data.seq_len) and are left out" in said
        )


def test_no_response_token_left_is_an_error_before_anything_is_computed(
    configure: Callable[..., Config], pruned: tuple[Path, PruneRecord], llama: Path, tmp_path: Path
) -> None:
    config = configure("train.data.seq_len=64", "train.data.train_on_inputs=false")
    words = r"^train\.data\.seq_len: 64 leaves no response token to learn from in any of the 20 examples; raise it$"
    with pytest.raises(UserError, match=words):
        trained(config, pruned, tmp_path / "adapter")
    with pytest.raises(UserError, match=words):
        train.prepare(config, Skeleton(checkpoint.load_config(llama)), checkpoint.load_tokenizer(llama))


def test_a_date_in_the_text_stays_that_of_the_first_day(
    configure: Callable[..., Config], pruned: tuple[Path, PruneRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training that is interrupted on one day and resumed on another equals one that was not."""
    (pruned[0] / "chat_template.jinja").write_text(
        "{{ strftime_now('%A %d %B %Y') }} {% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    )

    class Day(datetime):
        day_now = 1

        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(2024, 7, cls.day_now)

    monkeypatch.setattr(resuming, "datetime", Day)
    config = configure("train.max_steps=4", "train.save_steps=2", "train.data.prompt=chat", "train.lr=1e-1")
    trained(config, pruned, tmp_path / "whole")
    with cut_after(3):
        trained(config, pruned, tmp_path / "cut")
    Day.day_now = 4
    trained(config, pruned, tmp_path / "cut")
    trained(config, pruned, tmp_path / "later")
    whole, cut, later = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut", "later")
    )
    assert cut == whole
    assert later != whole


def test_a_loss_that_is_not_finite_stops_it(
    configure: Callable[..., Config], pruned: tuple[Path, PruneRecord], tmp_path: Path
) -> None:
    config = configure("train.lr=1e18", "train.max_grad_norm=0", "train.log_steps=1", "train.epochs=3")
    with pytest.raises(StageError, match=r"loss is (nan|inf) at step"):
        trained(config, pruned, tmp_path / "adapter")


RAN_OUT = {
    "GPU": torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 8 GiB"
    ),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "CPU": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2500 bytes. Error code 12"),
    "Python": MemoryError(),
}


@contextlib.contextmanager
def forwards(number: int, error: Exception) -> Iterator[None]:
    """Inside, one forward pass of the model raises an error."""
    original, passed = LlamaForCausalLM.forward, iter(range(1, 1000))

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if next(passed) == number:
            raise error
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "forward", forward)
        yield


def test_out_of_memory_says_what_helps_and_a_smaller_micro_batch_continues(
    configure: Callable[..., Config], pruned: tuple[Path, PruneRecord], tmp_path: Path
) -> None:
    options = ("train.save_steps=3", "train.dropout=0.0", "train.data.val_size=0", "train.lr=1e-4")
    whole = trained(configure(*options, "train.micro_batch_size=4"), pruned, tmp_path / "whole")
    config, out = configure(*options, "train.micro_batch_size=4"), tmp_path / "cut"
    with forwards(5, RAN_OUT["GPU"]), pytest.raises(StageError) as caught:
        trained(config, pruned, out)
    planned = plan.execute(config).memory.per_gpu[0].total / 2**30
    assert str(caught.value) == (
        "out of memory (tried to allocate 2.50 GiB) with train.micro_batch_size=4 and "
        f"train.gradient_checkpointing=false, for which sppctl plan estimates {planned:.2f} GiB on each device; "
        "lower train.micro_batch_size or set train.gradient_checkpointing=true, which change no result; "
        f"{out}/checkpoints/checkpoint-3 is intact: the same command continues from there"
    )
    metrics = trained(configure(*options, "train.micro_batch_size=1"), pruned, out)
    assert metrics.steps == whole.steps == 6
    assert metrics.tokens == whole.tokens
    assert metrics.train_loss == pytest.approx(whole.train_loss, rel=1e-5)


@pytest.mark.parametrize("kind", RAN_OUT)
def test_memory_runs_out_in_many_words(
    kind: str, configure: Callable[..., Config], pruned: tuple[Path, PruneRecord], tmp_path: Path
) -> None:
    config = configure("train.micro_batch_size=1", "train.gradient_checkpointing=true")
    words = r"^out of memory.* train\.micro_batch_size=1 and .*; lower train\.data\.seq_len, .*; there is no checkpoint"
    with forwards(1, RAN_OUT[kind]), pytest.raises(StageError, match=words):
        trained(config, pruned, tmp_path / "adapter")


def test_other_errors_are_not_taken_for_it(
    configure: Callable[..., Config], pruned: tuple[Path, PruneRecord], tmp_path: Path
) -> None:
    with forwards(1, RuntimeError("shapes differ")), pytest.raises(RuntimeError, match=r"^shapes differ$"):
        trained(configure(), pruned, tmp_path / "adapter")


def test_gradient_checkpointing_changes_nothing(
    configure: Callable[..., Config], pruned: tuple[Path, PruneRecord], tmp_path: Path
) -> None:
    adapters = []
    for value in ("false", "true"):
        trained(configure(f"train.gradient_checkpointing={value}"), pruned, tmp_path / value)
        adapters.append(load_file(tmp_path / value / "adapter_model.safetensors"))
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(tensor, adapters[1][name], rtol=1e-4, atol=1e-5)


def test_other_targets(configure: Callable[..., Config], pruned: tuple[Path, PruneRecord], tmp_path: Path) -> None:
    trained(configure("train.targets=[q_proj]", "train.max_steps=1"), pruned, tmp_path / "adapter")
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name.split(".")[-2] for name in names} == {"q_proj"}


def figures(metrics: TrainRecord, *names: str) -> list[float]:
    return [entry[name] for entry in metrics.history if "loss" in entry for name in names]


def test_packing_changes_no_figure(
    configure: Callable[..., Config],
    pruned: tuple[Path, PruneRecord],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = []
    for value in ("false", "true"):
        overrides = (f"train.data.packing={value}", "train.dropout=0.0", "train.log_steps=1", "train.epochs=2")
        found.append(trained(configure(*overrides, "train.data.seq_len=300"), pruned, tmp_path / value))
    padded, packed = found
    assert figures(packed, "loss", "grad_norm") == pytest.approx(figures(padded, "loss", "grad_norm"), rel=1e-3)
    assert packed.validation_loss == pytest.approx(padded.validation_loss, rel=1e-4)
    assert packed.tokens == padded.tokens
    assert packed.padding_share == padded.padding_share > 0
    assert f"packing: {packed.padding_share:.1%} of the positions of padded batches" in capsys.readouterr().err


def test_a_model_that_does_not_heed_borders_is_not_trained_packed(
    configure: Callable[..., Config], make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    names = [f"model.decoder.layers.{block}.self_attn.q_proj" for block in range(2)]
    layers = [blank(LayerRecord, name=name) for name in names]
    config = configure("train.data.packing=true", "train.targets=[q_proj]", "prune.targets=[q_proj]")
    with pytest.raises(UserError, match=r"^train\.data\.packing: .* set train\.data\.packing to false"):
        trained(config, (make_checkpoint("opt"), blank(PruneRecord, layers=layers)), tmp_path / "adapter")


@pytest.mark.parametrize("packing", ["false", "true"])
def test_a_resumed_training_takes_up_the_grouped_order(
    configure: Callable[..., Config],
    pruned: tuple[Path, PruneRecord],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    packing: str,
) -> None:
    config = configure(
        "train.epochs=3",
        "train.save_steps=7",
        "train.dropout=0.1",
        "train.data.group_by_length=true",
        f"train.data.packing={packing}",
    )
    seen: list[list[int]] = []
    original = FiniteLoss.add

    def note(self: Any, loss: Any, examples: list[int]) -> None:
        seen.append(examples)
        original(self, loss, examples)

    monkeypatch.setattr(FiniteLoss, "add", note)
    trained(config, pruned, tmp_path / "whole")
    whole, seen[:] = list(seen), []
    for epoch in range(3):
        assert sorted(number for batch in whole[10 * epoch : 10 * epoch + 10] for number in batch) == list(range(20))
    assert whole[:10] != whole[10:20]

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 9:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train.Watch, "on_step_end", stop)
        with pytest.raises(KeyboardInterrupt):
            trained(config, pruned, tmp_path / "cut")
    seen.clear()
    trained(config, pruned, tmp_path / "cut")
    assert seen == whole[14:]  # two micro-batches per step
    adapters = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(tensor, adapters[1][name]) for name, tensor in adapters[0].items())


def test_the_record_says_which_data(
    configure: Callable[..., Config],
    pruned: tuple[Path, PruneRecord],
    tmp_path: Path,
    alpaca_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mixture = f"train.data.dataset={{{alpaca_file}: 1, instructions: 2}}"
    metrics = trained(configure(mixture, "train.max_steps=1"), pruned, tmp_path / "adapter")
    assert metrics.datasets == {str(alpaca_file): 20, "instructions": 40}
    assert (metrics.examples, metrics.validation_examples) == (60, 4 + 64)
    assert f"60 examples: 20 of {alpaca_file}, 40 of instructions" in capsys.readouterr().err
    alone = trained(configure("train.max_steps=1"), pruned, tmp_path / "alone")
    again = trained(configure("train.max_steps=1", "train.data.seq_len=100"), pruned, tmp_path / "again")
    assert alone.data_hash == again.data_hash != metrics.data_hash


def test_an_own_prompt_is_trained_on(
    configure: Callable[..., Config], pruned: tuple[Path, PruneRecord], tmp_path: Path
) -> None:
    config = configure("train.data.prompt='Q: {instruction} A: '", "train.max_steps=1", "train.data.val_size=0")
    metrics = trained(config, pruned, tmp_path / "adapter")
    # at most: "Q: Add 22 and 23. A: The sum is 45." and the end of the text
    assert metrics.truncated_examples == 0
    assert metrics.tokens <= 4 * 37


@pytest.mark.slow
def test_float16_checkpoints_are_trained_in_another_dtype(
    configure: Callable[..., Config], make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_checkpoint("llama", torch.float16)
    (tmp_path / "half").mkdir()
    record = stage_calls.prune(configure(), base, tmp_path / "half")
    metrics = trained(configure(), (tmp_path / "half", record), tmp_path / "adapter")
    assert metrics.dtype in ("bfloat16", "float32")
    shutil.rmtree(tmp_path / "adapter")
