"""Watching a training: progress, what is not finite, and the signals that ask it to stop."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback

from sppctl import console, distributed
from sppctl.errors import SharedError
from sppctl.evaluate.perplexity import summarise, window_losses

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
NAMED_EXAMPLES = 16  # of those in which a gradient may have gone wrong


class Watch(TrainerCallback):  # type: ignore[misc]
    """Shows loss, learning rate, gradient norm, tokens per second and the time left."""

    def __init__(self) -> None:
        self.bar: console.Progress | None = None
        self.words = ""
        self.started, self.seconds_before, self.tokens_before = 0.0, 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the bar."""
        self.started, self.tokens_before = time.perf_counter(), state.num_input_tokens_seen
        self.seconds_before = max((e.get("seconds", 0.0) for e in state.log_history if "loss" in e), default=0.0)
        self.bar = console.Progress("training", state.max_steps, state.global_step).__enter__()

    def seconds(self) -> float:
        """Seconds of training, with those of the attempts that led to the checkpoint that was resumed from."""
        return self.seconds_before + time.perf_counter() - self.started

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves the bar."""
        assert self.bar is not None
        self.bar.advance(self.words)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Takes the figures that the Trainer reports."""
        logs = logs or {}
        if "loss" in logs:
            speed = (state.num_input_tokens_seen - self.tokens_before) / (time.perf_counter() - self.started)
            norm = f", gradient norm {float(logs['grad_norm']):.2g}" if "grad_norm" in logs else ""
            state.log_history[-1]["seconds"] = round(self.seconds(), 2)
            self.words = f"loss {logs['loss']:.3f}{norm}, lr {logs['learning_rate']:.1e}, {speed:.0f} tokens/s"
        if "eval_loss" in logs:
            self.words = f"validation loss {logs['eval_loss']:.3f}"
            if self.bar is None or self.bar.done < self.bar.total:
                console.note(f"step {state.global_step}: {self.words}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes the bar away."""
        assert self.bar is not None
        self.bar.__exit__()


class Reporting(TrainerCallback):  # type: ignore[misc]
    """A callback whose figures go where the Trainer's own go, who fills in ``log``: history, TensorBoard, W&B."""

    log: Callable[[dict[str, float]], None]


class PerplexityEvery(Reporting):
    """The perplexity of a text every so many optimizer steps, written to the log."""

    def __init__(self, steps: int, name: str, windows: Tensor) -> None:
        self.steps, self.name, self.windows = steps, name, windows

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Measures on all processes alike: under FSDP each forward needs all of them."""
        if state.global_step % self.steps:
            return
        training = model.training
        model.eval()
        sharded = isinstance(model, FSDPModule)
        called = model if sharded else model.get_base_model()
        batches = window_losses(called, self.windows, args.per_device_eval_batch_size, whole=sharded)
        losses = torch.cat(list(batches))
        model.train(training)
        measured = summarise(losses, self.windows.shape[1])
        self.log({"perplexity": measured.value})
        state.log_history[-1]["text"] = self.name
        console.note(f"step {state.global_step}: perplexity of {self.name} {measured.value:.2f}")


class FiniteLoss(TrainerCallback):  # type: ignore[misc]
    """Stops at a loss or gradient that is not finite, naming step and examples; looks once per optimizer step."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, list[int]]] = []
        self.gradient_norm: Tensor | float | None = None  # of all processes together, once it is known

    def add(self, loss: Tensor, examples: list[int]) -> None:
        """Takes the loss of a micro-batch, still on its device, and the numbers of its examples."""
        self.seen.append((loss.detach(), examples))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Looks at all micro-batches of the step, in all processes, before the optimizer spoils the weights.

        Raises:
            StageError: one of the losses is not finite, or the gradient.
        """
        losses = torch.stack([loss for loss, _ in self.seen])
        broken = (~losses.isfinite()).any().int()
        distributed.largest(broken)
        problem = distributed.first(self._problem(losses.tolist())) if broken else None
        if problem is not None:
            raise SharedError(
                f"the training loss is {problem[0]} at step {state.global_step + 1}, in {problem[1]}; lower train.lr, "
                "or look at these examples"
            )
        norm = 0.0 if self.gradient_norm is None else float(self.gradient_norm)
        broken = torch.tensor(not math.isfinite(norm), device=losses.device).int()
        distributed.largest(broken)
        if broken:
            numbers = sorted({number for part in distributed.collect(self._examples()) for number in part})
            shown = ", ".join(map(str, numbers[:NAMED_EXAMPLES])) + ", ..." * (len(numbers) > NAMED_EXAMPLES)
            raise SharedError(
                f"the norm of the gradient is {norm} at step {state.global_step + 1}, of training examples {shown}; "
                "lower train.lr, or look at these examples"
            )
        self.seen.clear()

    def _examples(self) -> list[int]:
        return [number for _, examples in self.seen for number in examples]

    def _problem(self, losses: list[float]) -> tuple[float, str] | None:
        for value, (_, examples) in zip(losses, self.seen, strict=True):
            if not math.isfinite(value):
                return value, f"training examples {', '.join(map(str, examples))}"
        return None


class StopSignals(TrainerCallback):  # type: ignore[misc]
    """SIGTERM or SIGUSR1 (preemption by Slurm): a checkpoint after the running step, then the end of the training."""

    def __init__(self) -> None:
        self.caught: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self.caught = number

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Of several processes all stop at the same step, whichever was told."""
        flag = torch.tensor(self.caught or 0, device=args.device)
        distributed.largest(flag)
        self.caught = int(flag) or None
        if self.caught and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True
