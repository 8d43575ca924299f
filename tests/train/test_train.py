"""Training: it learns, it resumes exactly, it leaves the pruned checkpoint alone."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import FAMILIES, cut_after
from fitting import Configure, Fit, a_fit, figures, preflight  # noqa: F401  (the fixture fit)
from stage_calls import blank
from transformers import AutoModelForCausalLM, LlamaForCausalLM, set_seed

from sppctl import console
from sppctl.data.instructions import IGNORED
from sppctl.errors import StageError, UserError
from sppctl.model import checkpoint
from sppctl.plan import run as plan
from sppctl.records import LayerRecord, PruneRecord, to_json
from sppctl.train import checkpoints, stage
from sppctl.train.loop import Loop, cross_entropy
from sppctl.train.watch import State

Said = pytest.CaptureFixture[str]


def test_the_loss_falls_and_the_record_says_so(fit: Fit) -> None:
    weights = fit.pruned[0] / "model.safetensors"
    before = weights.read_bytes()
    metrics = fit("adapter", "train.epochs=12", "train.lr=5e-2", "train.log_steps=1", "train.dropout=0.0")
    losses = figures(metrics, "loss")
    assert metrics.steps == len(losses) == 12 * 5
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.05 * 5
    assert (metrics.epochs, metrics.examples, metrics.validation_examples) == (12, 20, 4)
    assert metrics.validation_loss < losses[0]
    assert weights.read_bytes() == before
    assert {path.name for path in (fit.root / "adapter").iterdir()} == {
        "README.md",
        "logs",
        "checkpoints",  # until the stage is published
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    names = json.loads((fit.root / "adapter/adapter_config.json").read_text())["target_modules"]
    assert names == sorted(names)  # so that the same training writes the same file
    assert len(names) > 5


@pytest.mark.parametrize(("seed", "rank", "own"), [(3, 0, 3), (3, 1, 4), (2**32 - 1, 1, 0)])
def test_each_process_has_a_seed_that_numpy_takes(
    seed: int, rank: int, own: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", str(rank))
    assert stage._own_seed(seed) == own
    set_seed(own)


def test_the_validation_loss_is_summed_where_float64_exists() -> None:
    """Not on the device: MPS has no float64, and the meta device of this test no values."""
    batch = {"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([[IGNORED, 2]])}
    training = Loop.__new__(Loop)
    training.accelerator = SimpleNamespace(device=torch.device("meta"))  # type: ignore[assignment]
    training.is_deepspeed = training.is_fsdp = False
    training.peft = torch.nn.Identity()
    training.peft.forward = lambda **_: SimpleNamespace(logits=torch.zeros(1, 2, 8))
    training.feed = SimpleNamespace(validation=lambda: [batch], max_steps=1, epochs=float)  # type: ignore[assignment]
    training.state, training.trackers = State(step=1), []
    assert training.validate() == pytest.approx(math.log(8))


def test_figures_go_to_tensorboard_and_to_the_record(fit: Fit) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = ("train.log_steps=1", "train.perplexity_steps=2", "train.eval_steps=4", "eval.max_tokens=256")
    metrics = fit("adapter", *options)
    events = EventAccumulator(str(fit.root / "adapter" / "logs"))
    events.Reload()
    for name, tag, steps in (
        ("loss", "train/loss", [1, 2, 3, 4, 5]),
        ("grad_norm", "train/grad_norm", [1, 2, 3, 4, 5]),
        ("perplexity", "train/perplexity", [2, 4]),
        ("eval_loss", "eval/loss", [4, 5, 5]),  # the last step, and the result
    ):
        assert [event.step for event in events.Scalars(tag)] == figures(metrics, name, "step")[1::2] == steps
        assert [event.value for event in events.Scalars(tag)] == pytest.approx(figures(metrics, name))
        assert min(figures(metrics, name)) > 0
    first, second = figures(metrics, "perplexity")
    assert second < first


def test_an_infinite_perplexity_is_null_in_checkpoints_and_record(fit: Fit) -> None:
    """A text that the model holds for impossible is no reason to stop; JSON has no infinity."""
    model = AutoModelForCausalLM.from_pretrained(fit.pruned[0])
    model.lm_head.weight.data.mul_(1e5)
    model.save_pretrained(fit.pruned[0])
    options = ("train.max_steps=2", "train.perplexity_steps=1", "train.save_steps=1", "train.lr=1e-9")
    assert figures(fit("adapter", *options, "eval.max_tokens=256"), "perplexity") == [None, None]
    for path in (fit.root / "adapter" / "checkpoints").glob("*/state.json"):
        json.loads(path.read_text(), parse_constant=pytest.fail)


def test_learning_rate_warms_up_and_decays_linearly(fit: Fit) -> None:
    metrics = fit("adapter", "train.epochs=4", "train.lr=1e-3", "train.warmup_ratio=0.25", "train.log_steps=1")
    warm = [1e-3 * step / 5 for step in range(5)]
    decay = [1e-3 * (20 - step) / 15 for step in range(5, 20)]
    assert figures(metrics, "learning_rate") == pytest.approx(warm + decay, abs=1e-9)


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("save_steps", "cut", "keys"),
    [(3, 5, []), (5, 7, []), (3, 5, ["group_by_length"]), (5, 8, ["group_by_length", "packing"])],
    ids=["within an epoch", "at its end", "grouped", "grouped and packed"],
)
def test_a_resumed_training_ends_with_the_same_adapter(save_steps: int, cut: int, keys: list[str], fit: Fit) -> None:
    options = ["train.epochs=2.4", "train.dropout=0.1", *(f"train.data.{key}=true" for key in keys)]
    options.append(f"train.save_steps={save_steps}")
    fit("whole", *options)
    with cut_after(cut):
        fit("cut", *options)
    stored = {path.name for path in (fit.root / "cut" / "checkpoints" / f"checkpoint-{save_steps}").iterdir()}
    assert "adapter_model.safetensors" in stored
    assert "model.safetensors" not in stored
    assert fit("cut", *options).steps == 12
    assert fit.adapter("cut") == fit.adapter("whole")


@pytest.mark.parametrize("steps", [7, 10], ids=["inside an epoch", "end of an epoch"])
def test_resuming_after_the_last_step_adds_nothing(steps: int, fit: Fit) -> None:
    options = ["train.save_steps=4", "train.eval_steps=2", "train.perplexity_steps=3", "train.refresh.steps=3"]
    options += [f"train.max_steps={steps}", "eval.max_tokens=256"]
    whole = fit("adapter", *options)
    weights, kept = fit.adapter("adapter"), fit.checkpoints("adapter")
    # killed before anything but the checkpoints was written
    (fit.root / "adapter" / "adapter_model.safetensors").unlink()
    assert untimed(to_json(fit("adapter", *options))) == untimed(to_json(whole))
    assert whole.steps == steps
    assert fit.adapter("adapter") == weights
    assert fit.checkpoints("adapter") == kept


def untimed(value: Any) -> Any:
    """A record without times."""
    if isinstance(value, list):
        return [untimed(inner) for inner in value]
    if isinstance(value, dict):
        return {key: untimed(inner) for key, inner in value.items() if "second" not in key}
    return value


def test_the_mean_loss_and_the_time_count_all_attempts(fit: Fit) -> None:
    each = fit("each", "train.epochs=2", "train.log_steps=1")
    options = ("train.epochs=2", "train.save_steps=3", "train.log_steps=4")
    with cut_after(8):
        fit("cut", *options)
    state = json.loads((fit.root / "cut/checkpoints/checkpoint-6/state.json").read_text())
    metrics = fit("cut", *options)
    assert metrics.train_loss == pytest.approx(each.train_loss, rel=1e-6)
    assert figures(metrics, "loss", "step")[1::2] == [1, 3, 4, 6, 8, 9, 10]
    assert metrics.tokens == each.tokens > state["tokens"] > 0
    assert metrics.seconds > state["seconds"] > 0
    assert metrics.tokens_per_second == pytest.approx(metrics.tokens / metrics.seconds)


def test_no_resume_starts_again(fit: Fit) -> None:
    for lr in ("1e-2", "3e-2"):
        fit("again", "train.save_steps=2", "train.dropout=0.1", f"train.lr={lr}", resume=False)
    fit("once", "train.save_steps=2", "train.dropout=0.1", "train.lr=3e-2", resume=False)
    assert fit.adapter("once") == fit.adapter("again")


def test_a_date_in_the_text_stays_that_of_the_first_day(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that is interrupted on one day and resumed on another equals one that was not."""
    (fit.pruned[0] / "chat_template.jinja").write_text(
        "{{ strftime_now('%A %d %B %Y') }} {% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    )

    class Day(datetime):
        day_now = 1

        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(2024, 7, cls.day_now)

    monkeypatch.setattr(checkpoints, "datetime", Day)
    options = ("train.max_steps=4", "train.save_steps=2", "train.data.prompt=chat", "train.lr=1e-1")
    fit("whole", *options)
    with cut_after(3):
        fit("cut", *options)
    Day.day_now = 4
    fit("cut", *options)
    fit("later", *options)
    assert fit.adapter("cut") == fit.adapter("whole") != fit.adapter("later")


def test_the_time_left_does_not_count_what_was_done_before(monkeypatch: pytest.MonkeyPatch, capsys: Said) -> None:
    times = iter([0.0, 20.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(times))
    with console.Progress("training", 100, start=80) as bar:
        bar.advance(steps=10)
    assert "training: 90/100, 20 s, 20 s left" in capsys.readouterr().err


# --- what is not finite -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def forwards(number: int, act: Callable[[Any], Any]) -> Iterator[None]:
    """Inside, ``act`` gets the output of one forward pass of the model."""
    original, calls = LlamaForCausalLM.forward, itertools.count(1)

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        if next(calls) == number:
            act(output)
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "forward", forward)
        yield


def spoil(output: Any) -> None:
    output.logits = output.logits * torch.nan


def test_a_loss_that_is_not_finite_names_step_and_examples(fit: Fit) -> None:
    words = r"^the training loss is nan at step 4, in training examples \d+, \d+; lower train\.lr, or check"
    with forwards(8, spoil), pytest.raises(StageError, match=words):
        fit("adapter", "train.save_steps=3", "train.gradient_checkpointing=true")
    assert fit.checkpoints("adapter") == {"checkpoint-3"}


@pytest.mark.parametrize("step", [3, 5], ids=["a step that is saved", "the last step"])
def test_a_gradient_that_is_not_finite_stops_it(step: int, fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, original = iter(range(1, 100)), Accelerator.backward

    def overflow(self: Accelerator, loss: torch.Tensor, **kwargs: Any) -> None:
        original(self, loss, **kwargs)
        if next(calls) == 2 * step:
            next(p for p in self._models[0].parameters() if p.requires_grad).grad.view(-1)[0] = float("inf")

    monkeypatch.setattr(Accelerator, "backward", overflow)
    words = rf"the gradient norm is inf at step {step}, of training examples \d+, \d+, \d+, \d+; lower"
    with pytest.raises(StageError, match=words):
        fit("adapter", "train.save_steps=3")
    assert not list(fit.root.glob(f"adapter/checkpoints/checkpoint-{step}"))
    assert not (fit.root / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("broken", "words"), [("loss", "validation loss is nan at step 5"), ("adapter", "adapter is not finite after")]
)
def test_nothing_that_is_not_finite_is_published(
    broken: str, words: str, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    validate = Loop.validate

    def spoiled(self: Loop) -> float:
        loss = validate(self) if broken == "adapter" else 0.0
        next(p for p in self.model.parameters() if p.requires_grad).data.fill_(torch.nan)
        return loss or validate(self)

    monkeypatch.setattr(Loop, "validate", spoiled)
    with pytest.raises(StageError, match=words):
        fit("adapter")
    assert not (fit.root / "adapter" / "adapter_model.safetensors").exists()


# --- memory -----------------------------------------------------------------------------------------------------------

RAN_OUT = {
    "GPU": torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 8 GiB"
    ),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "CPU": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2500 bytes. Error code 12"),
    "mapped file": RuntimeError("unable to mmap 2500 bytes from file <a.safetensors>: Cannot allocate memory (12)"),
    "Python": MemoryError(),
}


def fail(error: Exception, _: Any) -> None:
    raise error


def test_out_of_memory_says_what_helps_and_a_smaller_micro_batch_continues(fit: Fit) -> None:
    options = ("train.save_steps=3", "train.dropout=0.0", "train.data.val_size=0", "train.lr=1e-4")
    whole = fit("whole", *options, "train.micro_batch_size=4")
    with forwards(5, functools.partial(fail, RAN_OUT["GPU"])), pytest.raises(StageError) as caught:
        fit("cut", *options, "train.micro_batch_size=4")
    planned = plan.execute(fit.configure(*options, "train.micro_batch_size=4")).memory.per_gpu[0].total
    assert str(caught.value) == (
        "out of memory (tried to allocate 2.50 GiB) with train.micro_batch_size=4 and "
        f"train.gradient_checkpointing=false, for which sppctl plan estimates {planned / 2**30:.2f} GiB on each device;"
        " lower train.micro_batch_size, set train.gradient_checkpointing=true or set model.weights=packed, which do "
        "not change the result; "
        f"{fit.root}/cut/checkpoints/checkpoint-3 is intact: the same command continues from there"
    )
    metrics = fit("cut", *options, "train.micro_batch_size=1")
    assert metrics.steps == whole.steps == 6
    assert metrics.tokens == whole.tokens
    assert metrics.train_loss == pytest.approx(whole.train_loss, rel=1e-5)


@pytest.mark.parametrize("kind", [*RAN_OUT, "something else"])
@pytest.mark.parametrize(
    ("method", "fix"),
    [
        ("spp", r"set model\.weights=packed, which does not change the result"),
        ("lora", r"lower train\.data\.seq_len, .*"),
    ],
)
def test_memory_runs_out_in_many_words(kind: str, method: str, fix: str, fit: Fit) -> None:
    words = rf"^out of memory.* train\.micro_batch_size=1 and .*; {fix}; there is no checkpoint"
    known = kind in RAN_OUT
    error = RAN_OUT.get(kind, RuntimeError("shapes differ"))
    expected = pytest.raises(StageError, match=words) if known else pytest.raises(RuntimeError, match=r"^shapes diff")
    with forwards(1, functools.partial(fail, error)), expected:
        fit("adapter", "train.micro_batch_size=1", "train.gradient_checkpointing=true", f"train.method={method}")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_one_that_the_model_computes(family: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    ids = torch.randint(0, 256, (2, 12))
    batch = {"input_ids": ids, "labels": ids.masked_fill(torch.rand(2, 12) < 0.3, IGNORED)}
    logits = model(input_ids=ids).logits
    assert torch.equal(cross_entropy(logits, batch), model(**batch).loss)
    tokens = torch.tensor(40)
    assert torch.equal(cross_entropy(logits, batch, tokens), model(**batch, num_items_in_batch=tokens).loss)


# --- how examples are batched -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", ["null", "base"])
def test_neither_accumulation_nor_packing_nor_checkpointing_changes_a_figure(
    teacher: str, fit: Fit, capsys: Said
) -> None:
    """With labels for the prompts, too: there the responses of a distillation cannot be told by the labels."""
    fixed = ["train.dropout=0.0", "train.log_steps=1", "train.lr=1e-4", "train.data.train_on_inputs=true"]
    fixed += ["train.data.seq_len=300", f"train.distill.teacher={teacher}"]
    fixed += (
        []
        if teacher == "null"
        else ["train.distill.weight=0.8", "train.distill.temperature=1.5", "train.distill.hidden=2"]
    )
    names = ("loss", "grad_norm") if teacher == "null" else ("loss", "grad_norm", "kl")
    variants = {f"by {size}": f"train.micro_batch_size={size}" for size in (4, 2, 1)}
    variants |= {"packed": "train.data.packing=true", "recomputed": "train.gradient_checkpointing=true"}
    metrics = {name: fit(name, *fixed, more) for name, more in variants.items()}
    expected = metrics.pop("by 4")
    for name, found in metrics.items():
        assert figures(found, *names) == pytest.approx(figures(expected, *names), rel=1e-3), name
        assert found.validation_loss == pytest.approx(expected.validation_loss, rel=1e-4), name
        assert found.tokens == expected.tokens, name
    share = metrics["packed"].padding_share
    assert share == metrics["by 2"].padding_share > 0
    assert f"packing: padded batches would be {share:.1%} padding" in capsys.readouterr().err


@pytest.mark.parametrize("who", ["model", "teacher"])
def test_what_mixes_packed_examples_is_not_used_with_packing(
    who: str, fit: Fit, make_checkpoint: Callable[..., Path]
) -> None:
    options, opt = ["train.data.packing=true", "train.data.seq_len=96"], make_checkpoint("opt")
    if who == "model":
        names = [f"model.decoder.layers.{block}.self_attn.q_proj" for block in range(2)]
        fit.pruned = opt, blank(PruneRecord, layers=[blank(LayerRecord, name=name) for name in names])
        options += ["train.targets=[q_proj]", "prune.targets=[q_proj]"]
    else:
        options += ["train.data.prompt='{instruction}'", f"train.distill.teacher={opt}"]
    words = rf"^train\.data\.packing: packed examples attend to each other in this {who} \(leakage \d+\.\d\d%\); set"
    with pytest.raises(UserError, match=words):
        fit("adapter", *options)


def test_padding_that_the_model_does_not_embed_changes_nothing(fit: Fit) -> None:
    before = fit("own", "train.max_steps=2", "train.log_steps=1")
    tokenizer = checkpoint.load_tokenizer(fit.pruned[0])
    tokenizer.add_tokens(["<more>"])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == 260
    tokenizer.save_pretrained(fit.pruned[0])
    assert figures(fit("beyond", "train.max_steps=2", "train.log_steps=1"), "loss") == figures(before, "loss")


# --- data -------------------------------------------------------------------------------------------------------------


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
    held_out: int, more: str, fit: Fit, capsys: Said
) -> None:
    """One example in a step: that of a prompt which fills the window would be 0/0."""
    options = [f"train.data.dataset={long_prompts(fit.root / 'rows.jsonl', held_out, 3)}", "train.data.val_size=2"]
    options += ["train.data.prompt='{instruction} {input}: '", "train.data.train_on_inputs=false", "train.log_steps=1"]
    options += ["train.data.seq_len=64", "train.batch_size=1", "train.micro_batch_size=1", "train.eval_steps=2", more]
    metrics = fit("adapter", *options)
    assert (metrics.examples, metrics.examples_without_labels, metrics.steps) == (4, 3, 4)
    assert metrics.validation_examples == 2 - held_out
    assert metrics.validation_examples_without_labels == held_out
    assert (metrics.validation_loss is None) == (held_out == 2)
    json.dumps(to_json(metrics), allow_nan=False)
    assert len([loss for loss in figures(metrics, "loss") if loss > 1]) == 4
    said = capsys.readouterr().err
    for count, kind in ((3, "training"), (held_out, "validation")):
        words = f"{count} {kind} examples have no response within 64 tokens (train.data.seq_len) and are left out"
        assert words in said


@pytest.mark.parametrize("more", ["train.data.train_on_inputs=false", "train.distill.teacher=base"])
def test_no_response_token_left_is_an_error_before_anything_is_computed(more: str, fit: Fit, llama: Path) -> None:
    words = r"^train\.data\.seq_len: 64 leaves no response token to learn from in any of the 20 examples; raise it$"
    with pytest.raises(UserError, match=words):
        fit("adapter", "train.data.seq_len=64", more)
    with pytest.raises(UserError, match=words):
        preflight(fit.configure("train.data.seq_len=64", more), llama)


def test_the_record_says_which_data_and_what_was_cut(fit: Fit, alpaca_file: Path, capsys: Said) -> None:
    metrics = fit("adapter", f"train.data.dataset={{{alpaca_file}: 1, instructions: 2}}", "train.max_steps=1")
    assert metrics.datasets == {str(alpaca_file): 20, "instructions": 40}
    assert (metrics.examples, metrics.validation_examples) == (60, 4 + 64)
    assert f"60 examples: 20 of {alpaca_file}, 40 of instructions" in capsys.readouterr().err
    alone, again = fit("alone", "train.max_steps=1"), fit("again", "train.max_steps=1", "train.data.seq_len=96")
    assert alone.data_hash == again.data_hash != metrics.data_hash
    assert again.truncated_examples == 20
    assert "20 of 20 examples (100.0%) are truncated to 96 tokens" in capsys.readouterr().err


def test_an_own_prompt_is_trained_on(fit: Fit) -> None:
    metrics = fit("adapter", "train.data.prompt='Q: {instruction} A: '", "train.max_steps=1", "train.data.val_size=0")
    # at most: "Q: Add 22 and 23. A: The sum is 45." and the end of the text
    assert metrics.truncated_examples == 0
    assert metrics.tokens <= 4 * 37


# --- what is trained --------------------------------------------------------------------------------------------------


def test_other_targets(fit: Fit) -> None:
    fit("adapter", "train.targets=[q_proj]", "train.max_steps=1")
    assert {name.split(".")[-2] for name in fit.tensors("adapter")} == {"q_proj"}


def test_another_gpu_than_the_first_is_refused_with_the_fix(configure: Configure, llama: Path) -> None:
    with pytest.raises(UserError, match=r"not on cuda:1; run CUDA_VISIBLE_DEVICES=1 sppctl \.\.\. model\.device=cuda"):
        preflight(configure("model.device=cuda:1"), llama)
