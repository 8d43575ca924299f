"""Around the steps of a training: progress, hooks, the check for non-finite values, and stop signals."""

from __future__ import annotations

import math
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from sppctl import console, distributed
from sppctl.config.settings import Config
from sppctl.data import texts
from sppctl.data.batches import Batch
from sppctl.errors import SharedError
from sppctl.evaluate.perplexity import summarise, window_losses, windows_of_text
from sppctl.evaluate.stage import window_of

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
NAMED_EXAMPLES = 16  # listed at most in an error

Metrics = dict[str, float | str]


@dataclass
class State:
    """The progress of a training, as its checkpoints store it."""

    step: int = 0  # completed optimizer steps
    tokens: int = 0  # seen so far, without padding
    seconds: float = 0.0  # of all attempts
    distilled_tokens: int = 0  # up to the last report
    divergence: float = 0.0  # from the teacher, summed over them
    history: list[dict[str, Any]] = field(default_factory=list)  # a line for each report, with its ``step``
    # of ``train.keep_best``: step, value and validation loss of the best adapter so far, measurements since
    best_step: int | None = None
    best_value: float | None = None
    best_loss: float | None = None
    since_best: int = 0

    def compare(self, value: float) -> bool:
        """Counts a measurement of ``train.keep_best`` after the current step; returns whether it is the best so far."""
        is_best = math.isfinite(value) and (self.best_value is None or value < self.best_value)
        self.since_best = 0 if is_best else self.since_best + 1
        if is_best:
            self.best_step, self.best_value, self.best_loss = self.step, value, None
        return is_best

    def mean(self, name: str) -> float | None:
        """Mean of a metric over all steps; each line covers the steps since the line before, checkpoint or not."""
        total, last = 0.0, 0
        for line in self.history:
            if name in line:
                total += line[name] * (line["step"] - last)
                last = line["step"]
        return total / last if last else None


class Hook:
    """What a method or an option does around each optimizer step; by default nothing. All processes call it."""

    def before_step(self, step: int) -> None:
        """Before the first micro-batch of a step, numbered from 1."""

    def before_update(self, model: PeftModel) -> None:
        """When the gradient is complete and clipped, before the optimizer uses it."""

    def after_step(self, model: PeftModel, step: int) -> Metrics:
        """After the optimizer's update, before anything is measured or saved; returns metrics for the history."""
        return {}

    def changes_later(self, step: int) -> bool:
        """Whether weights that training does not update change after a step, so that no adapter is the best yet."""
        return False

    def save(self, directory: Path) -> None:
        """Writes the files that belong to the adapter next to it; only the first process calls it."""


class PerplexityEvery(Hook):
    """Measures perplexity on the first text of ``eval.perplexity`` every ``train.perplexity_steps`` steps.

    If it selects the adapter (``train.keep_best``), also after the last step.
    """

    def __init__(self, config: Config, pruned: Path, tokenizer: Any, max_steps: int) -> None:
        self.steps, self.batch_size = config.train.perplexity_steps, config.train.micro_batch_size
        self.last = max_steps if config.train.keep_best == "perplexity" else None
        self.name = config.eval.perplexity[0]
        text, window = texts.load_text(self.name, "test", "eval.perplexity"), window_of(config, pruned)
        self.windows = windows_of_text(tokenizer, text, window, config.eval.max_tokens)

    def after_step(self, model: PeftModel, step: int) -> Metrics:
        """Measures on all processes alike: each forward of a sharded model needs all of them."""
        if step != self.last and (self.steps is None or step % self.steps):
            return {}
        model.eval()
        sharded = isinstance(model, FSDPModule) or any(hasattr(p, "ds_id") for p in model.parameters())  # ZeRO-3
        measured = model if sharded else model.get_base_model()
        losses = torch.cat(list(window_losses(measured, self.windows, self.batch_size, whole_windows=sharded)))
        value = summarise(losses, self.windows.shape[1]).value
        console.note(f"step {step}: perplexity of {self.name} {value:.2f}")
        return {"perplexity": value, "text": self.name}


def demand_finite(losses: Sequence[Tensor], batches: Sequence[Batch], norm: float, step: int) -> None:
    """Checks a step before its update can spoil the weights. All processes must call it.

    ``losses`` are those of this process's micro-batches, ``norm`` is the gradient norm over all processes.

    Raises:
        StageError: a loss or the gradient is not finite; it names step and examples.
    """
    stacked = torch.stack([*losses])
    broken = torch.stack([(~stacked.isfinite()).any(), torch.tensor(not math.isfinite(norm), device=stacked.device)])
    broken = broken.int()
    distributed.all_reduce_max(broken)
    loss_broken, norm_broken = broken.tolist()
    if loss_broken:
        values = zip(stacked.tolist(), batches, strict=True)
        first = next(((value, batch["examples"]) for value, batch in values if not math.isfinite(value)), None)
        value, numbers = distributed.first_known(first) or (math.nan, [])
        problem = f"the training loss is {value} at step {step}, in training examples "
    elif norm_broken:
        collected = distributed.gather_objects([number for batch in batches for number in batch["examples"]])
        numbers = sorted({number for part in collected for number in part})
        problem = f"the gradient norm is {norm} at step {step}, of training examples "
    else:
        return
    named = ", ".join(map(str, numbers[:NAMED_EXAMPLES])) + ", ..." * (len(numbers) > NAMED_EXAMPLES)
    raise SharedError(f"{problem}{named}; lower train.lr, or check these examples")


class StopSignals:
    """Ctrl-C, SIGTERM or SIGUSR1 (preemption by Slurm): a checkpoint after the current step, then the training ends.

    A second Ctrl-C raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self.caught: int | None = None

    def __enter__(self) -> StopSignals:
        def catch(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGINT:
                if self.caught == number:
                    raise KeyboardInterrupt
                console.note_in_handler("Ctrl-C: saving a checkpoint after this step; Ctrl-C again stops at once")
            self.caught = number

        self._previous = {number: signal.signal(number, catch) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agreed(self, device: torch.device) -> int | None:
        """The signal that any process has caught, in all processes, so that all stop after the same step."""
        flag = torch.tensor(self.caught or 0, device=device)
        distributed.all_reduce_max(flag)
        return int(flag) or None
