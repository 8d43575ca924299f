"""Distillation: the loss is the formula's, whatever the accumulation, and only the responses count."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, cut_after
from fitting import Configure, Fit, a_fit, figures, preflight  # noqa: F401  (the fixture fit)
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from sppctl.config.load import load_config
from sppctl.data.batches import PadCollator
from sppctl.data.instructions import Example
from sppctl.errors import UserError
from sppctl.files import integrity, sealed
from sppctl.model.checkpoint import load_tokenizer
from sppctl.train import distill
from sppctl.train.feed import Feed
from sppctl.train.watch import State


@pytest.fixture
def configure(config_file: Path) -> Configure:
    common = ["train.data.seq_len=256"]  # the prompt alone has more than 128 bytes
    return lambda *overrides: load_config(str(config_file), [*common, *overrides])


FITTING = ("train.data.seq_len=128", "train.data.prompt='{instruction}: '")  # into the 128 positions of the model


def literal_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Sum over positions and tokens of p log(p / q), in float64."""
    p = torch.softmax(teacher.double() / temperature, -1)
    q = torch.softmax(student.double() / temperature, -1)
    return (p * (p / q).log()).sum()


def compared(models: list[Any], ids: list[int], first: int, temperature: float) -> tuple[Tensor, Tensor, int]:
    """Divergence and relative difference of hidden states of a student and its teacher, from a position on.

    Both are sums over the positions, whose number comes last; the difference is a mean over the blocks.
    """
    with torch.no_grad():
        outputs = [model(torch.tensor([ids]), output_hidden_states=True) for model in models]
    ours, theirs = (output.logits[0, first:-1] for output in outputs)
    difference = torch.zeros((), dtype=torch.float64)
    for one, other in zip(*(output.hidden_states[1:] for output in outputs), strict=True):
        moved = (one - other)[0, first:-1].double().norm(dim=-1) / other[0, first:-1].double().norm(dim=-1)
        difference = difference + moved.square().sum() / SMALL["num_hidden_layers"]
    return literal_kl(ours, theirs, temperature), difference, len(ours)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [1, 40, 1 << 24])
def test_divergence_and_gradient_equal_the_formula(
    temperature: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distill, "CHUNK_ELEMENTS", chunk)
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 13, requires_grad=True), torch.randn(2, 5, 13)
    positions = torch.tensor([1, 2, 7, 9])
    found = distill.kl_divergence(student, teacher.flatten(0, 1)[positions], positions, temperature, 0.7)
    (gradient,) = torch.autograd.grad(found * 3, student)
    reference = student.detach().double().requires_grad_()
    wanted = 0.7 * literal_kl(reference.flatten(0, 1)[positions], teacher.flatten(0, 1)[positions], temperature)
    (wanted_gradient,) = torch.autograd.grad(wanted * 3, reference)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=1e-5, atol=1e-6)
    untouched = [place for place in range(10) if place not in positions]
    assert not gradient.flatten(0, 1)[untouched].any()


@pytest.fixture
def sure(llama: Path, tmp_path: Path) -> Path:
    """A teacher whose predictions are far from uniform, unlike a random model's."""
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.lm_head.weight.data.mul_(20)
    model.save_pretrained(tmp_path / "sure")
    return tmp_path / "sure"


@pytest.mark.parametrize(
    ("on_inputs", "covered", "packing", "hidden", "checkpointing"),
    [
        ("true", "responses", "false", 0.0, "false"),
        ("false", "responses", "false", 3.0, "false"),
        ("false", "all", "false", 0.0, "false"),
        ("true", "all", "true", 3.0, "true"),
        ("true", "text", "false", 3.0, "true"),
        ("false", "text", "true", 0.0, "false"),
    ],
)
def test_the_first_loss_equals_a_literal_computation(
    on_inputs: str,
    covered: str,
    packing: str,
    hidden: float,
    checkpointing: str,
    fit: Fit,
    sure: Path,
    tmp_path: Path,
) -> None:
    """At step 1 the student is the pruned model, so loss and divergence can be worked out from plain models."""
    options = ["train.data.val_size=0", "train.batch_size=24", "train.micro_batch_size=8", "train.dropout=0.0"]
    options += [f"train.data.train_on_inputs={on_inputs}", "train.max_steps=1"]
    options += [f"train.distill.teacher={sure}", "train.distill.weight=0.3", "train.distill.temperature=2.0"]
    options += [f"train.distill.tokens={covered}", f"train.data.packing={packing}", f"train.distill.hidden={hidden}"]
    options += [f"train.gradient_checkpointing={checkpointing}"]
    if covered == "text":
        (tmp_path / "plain.txt").write_text("The cat sat on the mat. " * 90)
        options.append(f"train.data.dataset={{instructions: 1, {tmp_path / 'plain.txt'}: 1}}")
    metrics = fit("adapter", *options)
    loss, kl = figures(metrics, "loss", "kl")
    tokenizer = load_tokenizer(fit.pruned[0])
    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in (fit.pruned[0], sure)]
    entropy = divergence = difference = torch.zeros((), dtype=torch.float64)
    tokens = distilled = 0
    with torch.no_grad():
        for example in Feed(fit.configure(*options), tokenizer, SMALL["vocab_size"]).train:
            ids, labels = torch.tensor([example.input_ids]), torch.tensor(example.labels[1:])
            counted, logs = labels != -100, models[0](ids).logits[0, :-1].double().log_softmax(-1)
            entropy = entropy - logs[counted].gather(1, labels[counted].unsqueeze(1)).sum()
            tokens += int(counted.sum())
            if covered == "text" and not example.is_plain:
                continue
            # predicts the response's first token
            first = 0 if covered == "all" or example.is_plain else example.response.index(True) - 1
            sums = compared(models, example.input_ids, first, 2.0)
            divergence, difference, distilled = divergence + sums[0], difference + sums[1], distilled + sums[2]
    assert kl == pytest.approx((divergence / distilled).item(), rel=1e-5)
    wanted = 0.7 * entropy / tokens + 0.3 * 2.0**2 * divergence / distilled + hidden * difference / distilled
    if hidden:
        assert figures(metrics, "hidden") == [pytest.approx((difference / distilled).item(), rel=1e-5)]
    assert loss == pytest.approx(wanted.item(), rel=1e-5)


@pytest.fixture
def mixed(sure: Path, alpaca_file: Path, tmp_path: Path) -> list[str]:
    """Options of a training that leaves the weights as they are, on 6 instructions and 6 windows of plain text."""
    (tmp_path / "plain.txt").write_text("The cat sat on the mat. " * 28)
    datasets = f"train.data.dataset={{{alpaca_file}: 1, {tmp_path / 'plain.txt'}: 1}}"
    common = [datasets, "train.data.val_size=0", "train.micro_batch_size=1", "train.lr=1e-12", "train.dropout=0.0"]
    return [*FITTING, *common, f"train.distill.teacher={sure}", "train.distill.tokens=text", "train.distill.hidden=1"]


@pytest.mark.parametrize(("batch_size", "log_steps"), [(1, 1), (1, 5), (8, 1)])
def test_reported_means_run_over_distilled_tokens_however_steps_hold_them(
    batch_size: int, log_steps: int, fit: Fit, sure: Path, mixed: list[str]
) -> None:
    """Many steps of one example have none."""
    options = [*mixed, f"train.batch_size={batch_size}", f"train.log_steps={log_steps}"]
    metrics = fit("adapter", *options)
    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in (fit.pruned[0], sure)]
    train = Feed(fit.configure(*options), load_tokenizer(fit.pruned[0]), SMALL["vocab_size"]).train
    windows = [compared(models, example.input_ids, 0, 1.0) for example in train if example.is_plain]
    assert (len(train), len(windows), metrics.steps) == (12, 6, math.ceil(12 / batch_size))
    assert len({count for _, _, count in windows}) == 2  # the last window is shorter
    divergence, _, count = map(sum, zip(*windows, strict=True))
    assert metrics.distillation.kl_mean == pytest.approx(float(divergence) / count, rel=1e-5)
    lines = [line for line in metrics.history if "kl" in line]
    assert metrics.distillation.kl_last == lines[-1]["kl"]
    assert len([line for line in metrics.history if "hidden" in line]) == len(lines)
    if (batch_size, log_steps) == (1, 1):
        for name, place in (("kl", 0), ("hidden", 1)):
            wanted = sorted(float(sums[place]) / sums[2] for sums in windows)
            assert sorted(line[name] for line in lines) == pytest.approx(wanted, rel=1e-5)
    if batch_size == 8:  # both steps have text
        assert len(lines) == 2


def test_an_interruption_does_not_change_the_mean_divergence(fit: Fit, mixed: list[str]) -> None:
    options = [*mixed, "train.batch_size=1", "train.log_steps=2", "train.save_steps=3"]
    whole = fit("whole", *options)
    with cut_after(5):
        fit("cut", *options)
    assert fit("cut", *options).distillation.kl_mean == whole.distillation.kl_mean > 0


def test_only_plain_text_is_to_be_distilled_and_there_is_none(fit: Fit) -> None:
    with pytest.raises(
        UserError, match=r"^train\.distill\.tokens: text, but train\.data\.dataset has no plain text; add"
    ):
        preflight(fit.configure(*FITTING, "train.distill.teacher=base", "train.distill.tokens=text"), fit.pruned[0])


def test_a_teacher_that_is_the_student_leaves_the_cross_entropy(fit: Fit) -> None:
    common = ("train.max_steps=1", "train.dropout=0.0")
    plain = fit("plain", *common)
    distilled = fit("distilled", *common, f"train.distill.teacher={fit.pruned[0]}", "train.distill.weight=0.25")
    loss, kl = figures(distilled, "loss", "kl")
    assert kl == pytest.approx(0, abs=1e-7)
    assert loss == pytest.approx(0.75 * figures(plain, "loss")[0], rel=1e-6)
    assert plain.distillation is None


def test_only_logits_that_predict_responses_count(llama: Path) -> None:
    teacher = AutoModelForCausalLM.from_pretrained(llama).eval().requires_grad_(False)
    first = Example(list(range(10)), list(range(10)), False, 0, [False] * 4 + [True] * 6)
    examples = [first, Example([5] * 7, [5] * 7, False, 1, [False] * 6 + [True])]
    batch = PadCollator(pad_token_id=9, distilled="responses")(examples)
    assert batch["distilled"].int().tolist() == [[0] * 4 + [1] * 6 + [0] * 6, [0] * 6 + [1] + [0] * 9]
    responses = batch.pop("distilled")
    batch.pop("examples")
    torch.manual_seed(0)
    logits = torch.randn(2, 16, teacher.config.vocab_size)

    def divergence(logits: Tensor) -> float:
        distillation = distill.Distillation(teacher, distill.DistillConfig(teacher="base", weight=1.0))
        distillation.start_step([{"distilled": responses}], torch.device("cpu"))
        return distillation.mix(torch.zeros(()), logits, batch, responses).item()

    whole = divergence(logits)
    elsewhere = torch.ones(2, 16, dtype=torch.bool)
    elsewhere[0, 3:9] = elsewhere[1, 5] = False
    changed = logits.clone()
    changed[elsewhere] = 7.0 * torch.randn(int(elsewhere.sum()), logits.shape[2])
    assert divergence(changed) == whole
    changed[0, 3] += torch.randn(logits.shape[2])
    assert divergence(changed) != whole


def test_without_distilled_tokens_the_cross_entropy_remains_and_the_teacher_is_not_asked() -> None:
    asked = torch.nn.Linear(1, 1)  # would raise
    distillation = distill.Distillation(asked, distill.DistillConfig(teacher="base", weight=0.25))
    nothing = torch.zeros(2, 6, dtype=torch.bool)
    distillation.start_step([{"distilled": nothing}], torch.device("cpu"))
    assert distillation.report(State()) == {}
    logits = torch.randn(2, 6, 11, requires_grad=True)
    loss = distillation.mix(torch.tensor(2.0) + 0 * logits.sum(), logits, {}, nothing)
    loss.backward()
    assert loss.item() == 1.5
    assert not logits.grad.any()


def test_it_brings_the_student_nearer_to_the_teacher(fit: Fit) -> None:
    options = ["train.epochs=8", "train.lr=2e-2", "train.log_steps=4", "train.dropout=0.0"]
    metrics = fit("adapter", *options, "train.distill.teacher=base", "train.distill.weight=1.0")
    record = metrics.distillation
    assert record.teacher == "base"
    first = figures(metrics, "kl")[0]
    assert record.kl_last < 0.9 * first
    assert record.kl_last < record.kl_mean < first
    assert 0 < record.seconds_share < 1


@pytest.mark.parametrize(
    ("teacher", "more", "words"),
    [
        ("other", [], r"distill.teacher: .* vocabulary of 300 tokens, the model 260"),
        ("deeper", ["train.distill.hidden=1"], r"distill.hidden: .*/deeper has 3 blocks of width 32, the model 2 bl"),
        ("deeper", [], None),
        ("none", [], r"distill.teacher: .*/none does not exist"),
        ("base", ["launch.strategy=zero3"], "launch.strategy=zero3 would shard the teacher"),
        ("base", [], None),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused(
    teacher: str, more: list[str], words: str | None, configure: Configure, llama: Path, tmp_path: Path
) -> None:
    shutil.copytree(llama, tmp_path / "other")
    LlamaConfig(**SMALL | {"vocab_size": 300}).save_pretrained(tmp_path / "other")
    deeper = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL | {"num_hidden_layers": 3}))
    deeper.save_pretrained(tmp_path / "deeper")
    for path in llama.glob("tokenizer*"):
        shutil.copy(path, tmp_path / "deeper")
    place = teacher if teacher == "base" else tmp_path / teacher
    with contextlib.nullcontext() if words is None else pytest.raises(UserError, match=words):
        preflight(configure(*FITTING, f"train.distill.teacher={place}", *more), llama)


def test_a_teacher_with_another_tokenizer_is_refused(configure: Configure, llama: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(llama, teacher)
    config = configure(*FITTING, f"train.distill.teacher={teacher}")
    content = json.loads((teacher / "tokenizer.json").read_text())
    for token in content["added_tokens"]:  # a token in reserve that the teacher has given another name
        if token["content"] == "<s>":
            token["content"] = "<start>"
    (teacher / "tokenizer.json").write_text(json.dumps(content).replace('"<s>"', '"<start>"'))
    settings = (teacher / "tokenizer_config.json").read_text()
    (teacher / "tokenizer_config.json").write_text(settings.replace('"<s>"', '"<start>"'))
    preflight(config, llama)
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (teacher / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"assigns different ids to 2 tokens than the model, 'a' among them"):
        preflight(config, llama)
    for path in teacher.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match=r"distill.teacher: .*no usable tokenizer.*; copy the model's own"):
        preflight(config, llama)


def test_a_teacher_that_is_not_what_its_record_says_is_refused(
    configure: Configure, llama: Path, tmp_path: Path
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(llama, teacher)
    sealed.write(
        teacher / "stage.json", {"stage": "prune", "files": integrity.hashes(teacher, integrity.listing(teacher))}
    )
    config = configure(*FITTING, f"train.distill.teacher={teacher}")
    preflight(config, llama)
    with (teacher / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"!")
    with pytest.raises(UserError, match=r"teacher/model.safetensors is damaged"):
        preflight(config, llama)
