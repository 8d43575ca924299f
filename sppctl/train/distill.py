"""Distillation: the student also learns what the dense model predicts at every token of the responses, or at all.

With z the logits, T the temperature and w the weight (Hinton et al., 2015, arXiv 1503.02531):

    loss = (1 - w) cross-entropy + w T^2 mean KL(softmax(z_teacher / T) || softmax(z_student / T))

With h, the weight of the hidden states x behind the B blocks (of the last one, behind the final norm), it also has

    h mean 1/B sum_b |x_student,b - x_teacher,b|^2 / |x_teacher,b|^2

as in SquareHead (Kurtic et al., 2023, arXiv 2310.06927), but relative token by token, because a few tokens have hidden
states that are hundreds of times larger than the others'. The cross-entropy is that of a training without a teacher.
Means run over the distilled tokens of the whole optimizer step: of all its micro-batches and all processes, however
many there are in each of them.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sppctl import distributed
from sppctl.config.settings import Config, DistillConfig
from sppctl.errors import UserError
from sppctl.files import integrity
from sppctl.model import channel_order, checkpoint, find, packed_model
from sppctl.model.blocks import Skeleton
from sppctl.model.weights import check_directory
from sppctl.records import DistillationRecord
from sppctl.train import scope
from sppctl.train.watch import State

CHUNK_ELEMENTS = 1 << 24  # logits of a chunk of positions: 64 MiB of float32
BASE = "base"


def preflight(config: Config, skeleton: Skeleton, tokenizer: Any) -> None:
    """Checks that the teacher exists and has the vocabulary of the model and, if they are compared, its hidden states.

    Raises:
        UserError: no such checkpoint, a missing or different vocabulary, hidden states of another shape, or a strategy
            that would shard the teacher.
    """
    teacher = config.train.distill.teacher
    if teacher is None:
        return
    scope.check_teacher(config)
    if teacher == BASE:
        return
    directory, trust = locate(teacher), config.model.trust_remote_code
    theirs, ours = (c.get_text_config() for c in (checkpoint.load_config(directory, trust), skeleton.config))
    if theirs.vocab_size != ours.vocab_size:
        raise UserError(
            "train.distill.teacher",
            f"{teacher} has a vocabulary of {theirs.vocab_size} tokens, the model {ours.vocab_size}",
            "the teacher must be of the same family",
        )
    shapes = [f"{c.num_hidden_layers} blocks of width {c.hidden_size}" for c in (theirs, ours)]
    if config.train.distill.hidden and shapes[0] != shapes[1]:
        raise UserError(
            "train.distill.hidden", f"{teacher} has {shapes[0]}, the model {shapes[1]}", "set it to 0 for this teacher"
        )
    if config.train.distill.hidden and channel_order.order_of(directory) != channel_order.order_of(config.model.path):
        raise UserError(
            "train.distill.hidden",
            f"{teacher} has its channels in another order than the model (prune.permute_channels)",
            "set it to 0 for this teacher",
        )
    check_directory(directory, trust)
    integrity.check_record(directory)
    try:
        teacher_tokenizer = checkpoint.load_tokenizer(directory, trust)
    except UserError as error:
        raise UserError(
            "train.distill.teacher", str(error), "copy the model's tokenizer there if they share it"
        ) from error
    ids, teacher_ids = tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    # added tokens (special ones, mostly) may be missing: instruction-tuned models rename reserved ones
    added = tokenizer.get_added_vocab().keys() | teacher_tokenizer.get_added_vocab().keys()
    different = {token for token, _ in ids.items() ^ teacher_ids.items()} - (added & (ids.keys() ^ teacher_ids.keys()))
    if different:
        raise UserError(
            "train.distill.teacher",
            f"{teacher} assigns different ids to {len(different)} tokens than the model, {min(different)!r} among them",
            "the teacher must have the model's tokenizer",
        )


def locate(teacher: str) -> Path:
    """The directory of a teacher that is not ``base``; UserError if there is none."""
    return find.locate(teacher, key="train.distill.teacher")


def load(
    config: Config, base: Path | None, device: torch.device, dtype: str, *, packed: bool = False
) -> Distillation | None:
    """The configured distillation with its teacher on the device, in the student's dtype; None if none is configured.

    ``base`` is the run's dense checkpoint, needed if that is the teacher. ``packed``: with packed weights, if it is
    sparse.
    """
    settings = config.train.distill
    if settings.teacher is None:
        return None
    directory = base if settings.teacher == BASE else locate(settings.teacher)
    assert directory is not None
    trust = config.model.trust_remote_code
    packed = packed and distributed.decide(partial(packed_model.is_sparse, directory, trust))
    teacher = checkpoint.load_model(directory, device, dtype, trust, packed=packed)
    teacher.config.use_cache = False
    return Distillation(teacher.requires_grad_(False), settings)


class Distillation:
    """A teacher, the divergence from it, and the time spent on both."""

    def __init__(self, teacher: nn.Module, settings: DistillConfig) -> None:
        self.teacher, self.settings = teacher, settings
        self.watch = Stopwatch(next(teacher.parameters()).device)
        self._tokens = 1
        self.asked = {"output_hidden_states": True} if settings.hidden else {}  # of student and teacher
        # since the last report: divergence and difference of hidden states, summed in this process, and the number of
        # distilled tokens of all processes
        self._sums = torch.zeros(2, device=next(teacher.parameters()).device)
        self._reported_tokens = 0

    def start_step(self, batches: list[dict[str, Any]], device: torch.device) -> None:
        """Counts the distilled tokens of an optimizer step, over its micro-batches and all processes."""
        # nothing predicts the first token of a row
        count = torch.tensor(sum(int(batch["distilled"][:, 1:].sum()) for batch in batches), device=device)
        distributed.all_reduce_sum(count)
        self._tokens = max(1, int(count))
        self._reported_tokens += int(count)

    def mix(
        self,
        loss: Tensor,
        logits: Tensor,
        inputs: dict[str, Tensor],
        distilled: Tensor,
        hidden: Sequence[Tensor] = (),
    ) -> Tensor:
        """The distilled loss of a micro-batch, normalised so that it adds up over micro-batches and processes.

        Args:
            loss: its cross-entropy divided by the tokens of the optimizer step, times the number of processes, because
                their gradients are averaged.
            logits: (batch, tokens, vocabulary) of the student.
            inputs: of the student.
            distilled: (batch, tokens) boolean, True for tokens whose predictions count.
            hidden: (batch, tokens, width) of the student before the first block and behind each, if they are compared.
        """
        with self.watch.span():
            predicting = F.pad(distilled[:, 1:], (0, 1))
            positions = predicting.flatten().nonzero().squeeze(1)
            predicted = logits.new_empty(0, logits.shape[-1])
            states: list[Tensor] = []
            if len(positions):
                predicted, states = self._predict(inputs, predicting)
            temperature, weight = self.settings.temperature, self.settings.weight
            share = distributed.world_size() / self._tokens
            scale = weight * temperature**2 * share
            divergence = kl_divergence(logits, predicted.to(logits.dtype), positions, temperature, scale)
            difference = relative_difference(hidden[1:], states, positions)
        self._sums += torch.stack([divergence.detach() / scale, difference.detach()])
        return (1 - weight) * loss + divergence + self.settings.hidden * share * difference

    @torch.no_grad()
    def _predict(self, inputs: dict[str, Tensor], predicting: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The teacher's logits (positions, vocabulary) where ``predicting`` (batch, tokens) is True.

        And, if they are compared, its hidden states (positions, width) there, behind each block. Only these stay in
        memory, and rows without any are not computed.
        """
        rows = predicting.any(dim=1)
        outputs = self.teacher(**{name: value[rows] for name, value in inputs.items()}, **self.asked)
        there = predicting[rows]
        hidden = outputs.hidden_states[1:] if self.asked else ()
        return outputs.logits[there], [states[there] for states in hidden]

    def report(self, state: State) -> dict[str, float]:
        """Mean divergence of a distilled token since the last report, and difference of its hidden states, if asked.

        Empty if no token was distilled. Adds the divergence and the number of tokens to the state.
        """
        tokens = self._reported_tokens
        if not tokens:
            return {}
        distributed.all_reduce_sum(self._sums)
        divergence, hidden = self._sums.tolist()
        self._sums, self._reported_tokens = torch.zeros_like(self._sums), 0
        state.divergence += divergence
        state.distilled_tokens += tokens
        return {"kl": divergence / tokens} | ({"hidden": hidden / tokens} if self.asked else {})

    def record(self, state: State, seconds: float) -> DistillationRecord:
        """The record of a training whose last attempt took ``seconds``.

        The measured share of them leaves out the divergence's part of the backward pass.
        """
        return DistillationRecord(
            teacher=self.settings.teacher or "",
            weight=self.settings.weight,
            temperature=self.settings.temperature,
            kl_last=next((line["kl"] for line in reversed(state.history) if "kl" in line), None),
            kl_mean=state.divergence / state.distilled_tokens if state.distilled_tokens else None,
            seconds_share=self.watch.seconds() / seconds,
        )


def relative_difference(student: Sequence[Tensor], teacher: Sequence[Tensor], positions: Tensor) -> Tensor:
    """The sum over positions, and mean over blocks, of |student - teacher|^2 / |teacher|^2, in float32.

    Args:
        student: (batch, tokens, width) hidden states of each block.
        teacher: (positions, width) hidden states of each block.
        positions: int64 places in the flattened (batch x tokens).
    """
    total = torch.zeros((), device=positions.device)
    for ours, theirs in zip(student, teacher, strict=True) if teacher else ():
        size = theirs.float().square().sum(-1).clamp_min(1e-30)
        errors = (ours.flatten(0, 1)[positions].float() - theirs.float()).square().sum(-1)
        total = total + (errors / size).sum()
    return total / max(1, len(teacher))


def kl_divergence(student: Tensor, teacher: Tensor, positions: Tensor, temperature: float, scale: float) -> Tensor:
    """The scaled sum of KL(teacher || student) over some positions; the gradient flows to the student only.

    Computed in float32, and the gradient rounded once to the dtype of the logits.

    Args:
        student: (batch, tokens, vocabulary) logits.
        teacher: (positions, vocabulary) logits in the same dtype; overwritten.
        positions: int64 places in the flattened (batch x tokens).
        temperature: divides the logits of both.
        scale: of the sum, a float32 scalar.
    """
    return cast(Tensor, _Divergence.apply(student, teacher, positions, temperature, scale))


class _Divergence(torch.autograd.Function):
    """Works on a few positions at a time; the gradient (p_student - p_teacher) s / T overwrites teacher logits."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, positions: Tensor, temperature: float, scale: float
    ) -> Tensor:
        flat = student.flatten(0, 1)
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        step = max(1, CHUNK_ELEMENTS // teacher.shape[1])
        for start in range(0, len(positions), step):
            rows = slice(start, start + step)
            student_logs = F.log_softmax(flat[positions[rows]].float() / temperature, dim=-1)
            teacher_logs = F.log_softmax(teacher[rows].float() / temperature, dim=-1)
            probability = teacher_logs.exp()
            total += (probability * (teacher_logs - student_logs)).sum()
            teacher[rows] = (student_logs.exp() - probability) * (scale / temperature)
        ctx.gradient, ctx.shape = teacher, student.shape
        ctx.save_for_backward(positions)
        return total * scale

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (positions,) = ctx.saved_tensors
        gradient = ctx.gradient.new_zeros(ctx.shape)
        gradient.flatten(0, 1).index_copy_(0, positions, ctx.gradient * grad_output)
        return gradient, None, None, None, None


class Stopwatch:
    """Adds up the time spent in its spans; on a GPU with events, so that nothing waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []  # start and end: events, or seconds

    @contextlib.contextmanager
    def span(self) -> Iterator[None]:
        """Times the body of a ``with`` block."""
        start = self._now()
        yield
        self._spans.append((start, self._now()))

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        """The total time of all spans."""
        if not self._on_gpu:
            return sum(end - start for start, end in self._spans)
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in self._spans) / 1000
