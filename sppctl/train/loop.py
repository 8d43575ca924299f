"""The training loop: micro-batches, backward, clipping, update, schedule; logging, validation and checkpoints.

accelerate wraps model and optimizer for one process, DDP, FSDP2 or ZeRO-3. Everything else is written out here, so
that the steps do not depend on the number of processes or on interruptions.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from accelerate.utils import DistributedType
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss

from sppctl import console, distributed
from sppctl.config.settings import TrainConfig
from sppctl.data.batches import Batch, num_tokens
from sppctl.data.instructions import IGNORED
from sppctl.errors import SharedError, Stopped
from sppctl.files import strict_json
from sppctl.files.safe_files import saving
from sppctl.train import checkpoints, optimizers, shards
from sppctl.train.distill import Distillation
from sppctl.train.feed import Feed
from sppctl.train.watch import Hook, Metrics, State, StopSignals, demand_finite


class Figures(NamedTuple):
    """What a step shows."""

    loss: float  # per token, over all processes
    norm: float  # of the gradient before clipping
    rate: float  # learning rate


@dataclass
class Loop:
    """One training: its model and optimizer under accelerate, and its progress."""

    train: TrainConfig
    accelerator: Accelerator
    peft: Any  # the model with its adapter, in the state of the checkpoint that is resumed from
    feed: Feed
    folder: Path  # of the checkpoints
    resumed: Path | None  # the one to resume from
    distillation: Distillation | None
    hooks: Sequence[Hook]
    trackers: Sequence[GeneralTracker]  # where metrics are also logged

    def __post_init__(self) -> None:
        train, max_steps = self.train, self.feed.max_steps
        optimizer = optimizers.make_optimizer(train, self._trainable_parameters().values())
        self.is_deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        self.is_fsdp = self.accelerator.distributed_type == DistributedType.FSDP
        with shards.own_buffers(self.peft) if self.is_fsdp else contextlib.nullcontext():
            self.model, self.optimizer = self.accelerator.prepare(self.peft, optimizer)
        self.peft = self.accelerator.unwrap_model(self.model)
        self.scheduler = optimizers.make_schedule(train, self.optimizer, max_steps)
        self.state = State() if self.resumed is None else self._load(self.resumed)
        self.bar = console.Progress("training", max_steps, self.state.step)
        self._started, self.before = time.perf_counter(), replace(self.state)  # this attempt, and the state before it
        # summed in this process since the last report
        self._loss, self._reported_step = torch.zeros((), device=self.accelerator.device), self.state.step

    # --- steps --------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Runs the remaining steps.

        Raises:
            UserError: the model mixes packed examples.
            StageError: a loss or gradient is not finite, or a checkpoint cannot be written.
            Stopped: a signal ended it before the last step.
        """
        state, train = self.state, self.train
        self.feed.check_packing(self.model, None if self.distillation is None else self.distillation.teacher)
        steps = self.feed.steps(state.step)
        if self.resumed:
            # torch's DataLoader draws a random number when an epoch starts: within an epoch, that was before the save
            if state.step % self.feed.steps_per_epoch:
                steps = itertools.chain([next(steps)], steps)
            checkpoints.load_random_state(self.resumed)
        stop = None
        with StopSignals() as signals, self.bar:
            while not self._is_finished() and not stop:
                figures = self._step(next(steps))
                state.step += 1
                self.bar.advance(self._text(figures))
                metrics: Metrics = {}
                for hook in self.hooks:
                    if measured := hook.after_step(self.peft, state.step):
                        self._log(measured)
                        metrics |= measured
                is_last = state.step == self.feed.max_steps
                save = is_last or state.step % train.save_steps == 0
                # also before each checkpoint, which does not store the losses since the last report
                if save or state.step == 1 or state.step % train.log_steps == 0:
                    self._report(figures)
                if train.eval_steps and self.feed.held_out and (is_last or state.step % train.eval_steps == 0):
                    metrics["eval_loss"] = self.validate()
                is_best = self._is_best(metrics)
                stop = None if self._is_finished() else signals.agreed(self.accelerator.device)
                if save or is_best or stop or self._is_finished():
                    self._report(figures)
                    self._save()
        state.seconds = self.before.seconds + self._seconds()
        if stop:
            name = "Ctrl-C" if stop == signal.SIGINT else signal.Signals(stop).name
            requeued = ", as does requeuing the job" if "SLURM_JOB_ID" in os.environ and stop != signal.SIGINT else ""
            raise Stopped(
                f"stopped by {name} after step {state.step} of {self.feed.max_steps}; a checkpoint is written; the "
                f"same command continues{requeued}",
                stop,
            )

    def _is_finished(self) -> bool:
        """Whether no step is left, or ``train.patience`` is exhausted."""
        patience = self.train.patience
        return self.state.step >= self.feed.max_steps or (patience is not None and self.state.since_best >= patience)

    def _is_best(self, metrics: Metrics) -> bool:
        """Whether the step measured the best value of ``train.keep_best`` so far; its adapter is then saved."""
        name, step = self.train.keep_best, self.state.step
        if name is None or name not in metrics or any(hook.changes_later(step) for hook in self.hooks):
            return False
        # processes may round differently, but must decide alike
        is_best = self.state.compare(distributed.broadcast_object(float(metrics[name]), 0))
        if is_best and self.feed.held_out:
            self.state.best_loss = float(metrics["eval_loss"]) if "eval_loss" in metrics else self.validate()
        if self._is_finished() and step < self.feed.max_steps:
            console.note(f"step {step}: no better {name} in {self.state.since_best} measurements, training ends early")
        return is_best

    def _step(self, batches: list[Batch]) -> Figures:
        """One optimizer step."""
        tokens = self._count(batches)
        for hook in self.hooks:
            hook.before_step(self.state.step + 1)
        self.model.train()
        losses = []
        for number, batch in enumerate(batches, 1):
            self.accelerator.sync_gradients = number == len(batches)  # DeepSpeed updates in the last backward
            # FSDP would keep whole gradients until then
            synced = self.accelerator.sync_gradients or self.is_deepspeed or self.is_fsdp
            with contextlib.nullcontext() if synced else self.accelerator.no_sync(self.model):
                loss = self._loss_of(batch, tokens)
                self.accelerator.backward(loss, **({"scale_wrt_gas": False} if self.is_deepspeed else {}))
            losses.append(loss.detach())
            self._loss += losses[-1]
        norm = float(self.accelerator.clip_grad_norm_(self.model.parameters(), self.train.max_grad_norm or math.inf))
        demand_finite(losses, batches, norm, self.state.step + 1)
        for hook in self.hooks:
            hook.before_update(self.peft)
        self.optimizer.step()
        rate = float(self.scheduler.get_last_lr()[0])
        self.scheduler.step()
        self.optimizer.zero_grad()
        loss = torch.stack(losses).sum()
        distributed.all_reduce_sum(loss)
        return Figures(loss.item() / distributed.world_size(), norm, rate)

    def _count(self, batches: list[Batch]) -> Tensor:
        """Predicted tokens of a step over all micro-batches and processes; adds the tokens seen to the state."""
        predicted = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches)
        counts = torch.tensor([predicted, sum(map(num_tokens, batches))], device=self.accelerator.device)
        distributed.all_reduce_sum(counts)
        self.state.tokens += int(counts[1])
        if self.distillation is not None:
            self.distillation.start_step(batches, self.accelerator.device)
        return counts[0]

    def _loss_of(self, batch: Batch, tokens: Tensor) -> Tensor:
        """A micro-batch's part of the loss per token of the whole step, distilled if there is a teacher."""
        inputs = self._inputs(batch)
        asked = {} if self.distillation is None else self.distillation.asked
        outputs = self.model(**inputs, **asked)
        logits = outputs.logits
        # times the number of processes: their gradients are averaged, but should be summed
        loss = cross_entropy(logits, batch, tokens) * distributed.world_size()
        if self.distillation is None:
            return loss
        hidden = outputs.hidden_states if asked else ()
        return self.distillation.mix(loss, logits, inputs, batch["distilled"].to(logits.device), hidden)

    def _inputs(self, batch: Batch) -> dict[str, Tensor]:
        names = ("input_ids", "attention_mask", "position_ids")
        return {name: batch[name].to(self.accelerator.device) for name in names if name in batch}

    # --- metrics ------------------------------------------------------------------------------------------------------

    def _log(self, metrics: Metrics) -> None:
        """Adds a line to the history, which is stored as JSON, and logs it to the trackers."""
        step = self.state.step
        line = metrics | {"epoch": self.feed.epochs(step), "num_input_tokens_seen": self.state.tokens}
        self.state.history.append(strict_json.finite(line | {"step": step}))
        # grouped as by transformers' own callbacks
        named = {f"train/{name}".replace("train/eval_", "eval/"): value for name, value in line.items()}
        for tracker in self.trackers:
            tracker.log({name: value for name, value in named.items() if not isinstance(value, str)}, step=step)

    def _text(self, figures: Figures) -> str:
        """The figures of a step for the progress bar."""
        speed = (self.state.tokens - self.before.tokens) / self._seconds()
        return f"loss {figures.loss:.3f}, gradient norm {figures.norm:.2g}, lr {figures.rate:.1e}, {speed:.0f} tokens/s"

    def _report(self, figures: Figures) -> None:
        """Logs the mean loss since the last report, unless the step has been reported."""
        if self._reported_step == self.state.step:
            return
        distributed.all_reduce_sum(self._loss)
        loss = self._loss.item() / distributed.world_size() / (self.state.step - self._reported_step)
        self._loss.zero_()
        self._reported_step = self.state.step
        divergence = {} if self.distillation is None else self.distillation.report(self.state)
        metrics: Metrics = {"loss": loss, "grad_norm": figures.norm, "learning_rate": figures.rate, **divergence}
        self._log(metrics | {"seconds": round(self.before.seconds + self._seconds(), 2)})

    def _seconds(self) -> float:
        """The time of this attempt."""
        return time.perf_counter() - self._started

    @torch.no_grad()
    def validate(self) -> float:
        """The mean loss of all predicted held-out tokens, however they are batched; StageError if it is not finite."""
        # DDP's wrapper would synchronise; DeepSpeed's must run, because it gathers parameters from its first forward on
        model = self.model if self.is_deepspeed or self.is_fsdp else self.peft
        model.eval()
        total = torch.zeros(2, dtype=torch.float64)
        for batch in self.feed.validation():
            count = int((batch["labels"][:, 1:] != IGNORED).sum())
            loss = float(cross_entropy(model(**self._inputs(batch)).logits, batch))
            if count:  # a batch of fillers has no mean
                total += torch.tensor([loss * count, count], dtype=torch.float64)
        total = distributed.summed(total, self.accelerator.device)
        mean = float(total[0] / total[1])
        if not math.isfinite(mean):
            raise SharedError(f"the validation loss is {mean} at step {self.state.step}; lower train.lr")
        self._log({"eval_loss": mean})
        if self.state.step < self.feed.max_steps:  # the one after the last step is in the record
            console.note(f"step {self.state.step}: validation loss {mean:.3f}")
        return mean

    # --- files --------------------------------------------------------------------------------------------------------

    def _load(self, checkpoint: Path) -> State:
        """Restores optimizer and schedule, and returns the progress."""
        if self.is_deepspeed:
            self.model.load_checkpoint(str(checkpoint), load_module_strict=False)
        else:
            stored = torch.load(checkpoint / checkpoints.OPTIMIZER, map_location="cpu", weights_only=True)
            shards.scatter_state(self.optimizer, stored)
        self.scheduler.load_state_dict(torch.load(checkpoint / checkpoints.SCHEDULER, weights_only=True))
        return State(**json.loads((checkpoint / checkpoints.STATE).read_text()))

    def _save(self) -> None:
        """Writes a checkpoint: in DeepSpeed's format under ZeRO-3, else in one that does not depend on the strategy."""
        self.state.seconds = self.before.seconds + self._seconds()
        # gathered before anything is written: a process whose disk is full must still take part in the collectives
        adapter = self._adapter()
        optimizer = None if self.is_deepspeed else shards.gathered_state(self.optimizer)

        def write(directory: Path) -> None:
            if self.is_deepspeed:
                checkpoints.save_engine(self.model, directory)
            checkpoints.save_random_state(directory)
            if not distributed.is_main():
                return
            self._write_adapter(directory, adapter)
            if optimizer is not None:
                torch.save(optimizer, directory / checkpoints.OPTIMIZER)
            torch.save(self.scheduler.state_dict(), directory / checkpoints.SCHEDULER)
            strict_json.write(directory / checkpoints.STATE, asdict(self.state))

        checkpoints.save(self.folder, self.state.step, write, self.train.keep_checkpoints)

    def finish(self, directory: Path) -> float | None:
        """Saves the last or the best adapter as PEFT does, with the hooks' files. All processes must call it.

        Returns:
            Its validation loss; None if nothing is held out.

        Raises:
            StageError: the adapter is not finite, or the checkpoint of the best one is damaged.
        """
        if self.state.best_step is not None:
            return self._finish_with_best(directory, self.state.best_step)
        with console.working(f"validation loss of {len(self.feed.held_out)} examples"):
            validation = self.validate() if self.feed.held_out else None
        adapter, broken = self._adapter(), None
        if distributed.is_main():
            trained = adapter or self._trainable_parameters()
            broken = next((name for name, tensor in trained.items() if not tensor.isfinite().all()), None)
        broken = distributed.first_known(broken)
        if broken is not None:
            raise SharedError(f"the adapter is not finite after step {self.state.step}: {broken}; lower train.lr")
        if distributed.is_main():
            (directory / "README.md").unlink(missing_ok=True)  # PEFT would keep one half written by a killed process
            with saving(directory):
                self._write_adapter(directory, adapter)
        return validation

    def _finish_with_best(self, directory: Path, step: int) -> float | None:
        distributed.decide(partial(checkpoints.copy_adapter, checkpoints.at_step(self.folder, step), directory))
        if distributed.is_main():
            for hook in self.hooks:
                hook.save(directory)
        name, value = self.train.keep_best, self.state.best_value
        console.note(f"the adapter of step {step} of {self.state.step} is the best: {name} {value:.4g}")
        return self.state.best_loss

    def _adapter(self) -> dict[str, Tensor] | None:
        """The adapter's tensors, gathered in the first process; None where the model holds them unsharded."""
        if self.is_deepspeed:
            from deepspeed.utils import safe_get_full_fp32_param

            return shards.gathered(self._trainable_parameters(), safe_get_full_fp32_param)
        return shards.gathered(self._trainable_parameters()) if self.is_fsdp else None

    def _trainable_parameters(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.peft.named_parameters() if p.requires_grad}

    def _write_adapter(self, directory: Path, adapter: dict[str, Tensor] | None) -> None:
        for config in self.peft.peft_config.values():
            if isinstance(config.target_modules, set):  # which PEFT would write in an order that changes between runs
                config.target_modules = sorted(config.target_modules)  # type: ignore[assignment]
        self.peft.save_pretrained(str(directory), state_dict=adapter)
        for hook in self.hooks:
            hook.save(directory)


def cross_entropy(logits: Tensor, batch: Batch, tokens: Tensor | None = None) -> Tensor:
    """The sum over a batch divided by ``tokens``; by default the mean over its predicted tokens.

    Not the model's own loss: some models always average over the micro-batch, and mixtures of experts add a term for
    each micro-batch, so that steps would depend on the accumulation.
    """
    loss: Tensor = ForCausalLMLoss(logits, batch["labels"].to(logits.device), logits.shape[-1], tokens)
    return loss


@contextlib.contextmanager
def reporting_to(train: TrainConfig, out: Path) -> Iterator[list[GeneralTracker]]:
    """The trackers of ``train.report_to``: TensorBoard (files in OUT/logs), W&B (named after the run directory)."""
    project = os.environ.get("WANDB_PROJECT", "sppctl")
    makers: dict[str, Callable[[], GeneralTracker]] = {
        "tensorboard": lambda: TensorBoardTracker("logs", out),
        "wandb": lambda: WandBTracker(project, name=out.parent.name, config=asdict(train)),
    }
    trackers = [makers[name]() for name in train.report_to]
    for tracker in trackers:
        tracker.start()
    try:
        yield trackers
    finally:
        for tracker in trackers:
            tracker.finish()
