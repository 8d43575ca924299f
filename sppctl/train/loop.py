"""transformers' Trainer with checkpoints that are whole or absent, the same for any number of processes.

It takes a teacher, and a mask that changes, if they are wanted.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints

from sppctl import distributed
from sppctl.data.instructions import IGNORED
from sppctl.errors import SharedError, UserError
from sppctl.files import strict_json
from sppctl.files.disk import sync, sync_tree
from sppctl.files.safe_files import hides_full_disk, saving
from sppctl.train import checkpoints as resume
from sppctl.train import shards
from sppctl.train.checkpoints import OPTIMIZER, SCHEDULER, seal
from sppctl.train.distill import Distillation
from sppctl.train.feed import Feed
from sppctl.train.refresh import MaskRefresh
from sppctl.train.watch import FiniteLoss, Reporting

SAVING = "saving"  # beside the finished checkpoints: the one that is being written


class SparseTrainer(Trainer):  # type: ignore[misc]
    """A Trainer whose checkpoints are written aside, synced and renamed, and which looks at every loss.

    Args:
        args: of the Trainer.
        finite: looks at the losses.
        feed: how examples reach the model.
        distillation: a teacher.
        refresh: the mask's changes, whose base weights are saved with the adapter.
        kwargs: of the Trainer.
    """

    model: Any
    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        *args: Any,
        finite: FiniteLoss,
        feed: Feed,
        distillation: Distillation | None = None,
        refresh: MaskRefresh | None = None,
        **kwargs: Any,
    ) -> None:
        self.feed = feed
        self.distillation, self.refresh = distillation, refresh
        self.gathered: tuple[dict[str, Tensor] | None, dict[str, Any]] | None = None
        data: dict[str, Any] = {
            "train_dataset": feed.filled(feed.train),
            "eval_dataset": feed.filled(feed.held_out) or None,
        }
        super().__init__(*args, data_collator=feed.collator, **data, **kwargs)
        self.finite = finite
        self.add_callback(finite)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, Reporting):
                callback.log = self.log
        self.checkpoints = Path(str(self.args.output_dir))

    def create_accelerator_and_postprocess(self) -> None:
        """Makes the accelerator; under FSDP among CPU processes too."""
        if self.args.fsdp_plugin_args is not None:
            shards.allow_on_cpu()
        super().create_accelerator_and_postprocess()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's loss; in training it is distilled if wanted, and remembered with the numbers of its examples."""
        examples, responses = inputs.pop("examples", []), inputs.pop("response_mask", None)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            if self.distillation is not None:
                loss = self.distillation.mix(loss, outputs.logits, inputs, responses)
            self.finite.add(loss, examples)
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The micro-batches of an optimizer step; with a teacher their response tokens are counted, too.

        None at all if the checkpoint that was resumed from is that of the last step: the Trainer would do one more.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.distillation is not None:
            self.distillation.start_step(batches, device)
        return batches, num_items

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the divergence from the teacher to each report of the loss; the history is stored as JSON."""
        if self.distillation is not None and "loss" in logs:
            logs["kl"] = self.distillation.report()
        super().log(logs, *args, **kwargs)
        self.state.log_history[-1] = strict_json.finite(self.state.log_history[-1])

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Before the first step: does the model, as it is wrapped and placed now, keep packed examples apart?"""
        self.feed.check(model, None if self.distillation is None else self.distillation.teacher)
        return super().training_step(model, inputs, *args, **kwargs)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm that is reported, known before the optimizer's step (DeepSpeed tells it after its own)."""
        self.finite.gradient_norm = super()._get_grad_norm(model, grad_norm)
        return self.finite.gradient_norm

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Reports before each checkpoint: the Trainer forgets the losses since its last report when it resumes."""
        self.control.should_log |= self.control.should_save
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Padded batches always."""
        self.data_collator = self.feed.padded
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = self.feed.collator

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The validation loss: the mean over all predicted tokens, however they are batched and shared out.

        Raises:
            StageError: it is not finite.
        """
        # DeepSpeed gathers parameters from its first forward on, which may be this one
        model = self.model_wrapped if self.is_deepspeed_enabled else self.model
        model.eval()
        total = [0.0, 0.0]
        for inputs in dataloader:
            inputs = self._prepare_inputs(inputs)
            count = int((inputs["labels"][..., 1:] != IGNORED).sum())
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = float(self.compute_loss(model, inputs))
            if count:  # of fillers alone there is no mean
                total = [total[0] + loss * count, total[1] + count]
        sums = torch.tensor(total, dtype=torch.float64)
        if distributed.world_size() > 1:
            sums = sums.to(self.args.device)
            distributed.add_up(sums)
        mean = float(sums[0] / sums[1])
        if sums[1] and not math.isfinite(mean):
            raise SharedError(f"the validation loss is {mean} at step {self.state.global_step}; lower train.lr")
        return EvalLoopOutput(None, None, {f"{metric_key_prefix}_loss": mean}, self.num_examples(dataloader))  # type: ignore[arg-type]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The order of the examples: the same for any number of processes, with fillers at the end only."""
        return self.feed.sampler(self.args.data_seed or 0) or super()._get_train_sampler(train_dataset)

    # --- saving -------------------------------------------------------------------------------------------------------

    def save_adapter(self, directory: Path) -> None:
        """Stores the adapter as PEFT does, and the base weights that a refresh has changed. All processes must call it.

        Of a sharded model nothing but the adapter is gathered.

        Raises:
            StageError: the adapter is not finite.
        """
        adapter = self._adapter()
        broken = None
        if distributed.is_main():
            trained = adapter or {name: p for name, p in self.model.named_parameters() if p.requires_grad}
            broken = next((name for name, tensor in trained.items() if not tensor.isfinite().all()), None)
        broken = distributed.first(broken)
        if broken is not None:
            raise SharedError(
                f"the adapter is not finite after step {self.state.global_step}: {broken}; lower train.lr"
            )
        if distributed.is_main():
            (directory / "README.md").unlink(missing_ok=True)  # PEFT would keep one that a killed process wrote by half
            with saving(directory):
                self.model.save_pretrained(str(directory), state_dict=adapter)
            if self.refresh is not None:
                self.refresh.save(directory)

    def _adapter(self) -> dict[str, Tensor] | None:
        """The adapter's tensors; None where the model itself has them whole."""
        if self.is_deepspeed_enabled:
            from deepspeed.utils import safe_get_full_fp32_param

            trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
            return {name: safe_get_full_fp32_param(p).cpu() for name, p in trained.items()}
        return shards.gathered(self.model) if self.is_fsdp_enabled else None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The model's part of a checkpoint."""
        if self.gathered is None:
            super().save_model(output_dir, _internal_call)
        elif distributed.is_main():
            self.model.save_pretrained(output_dir, state_dict=self.gathered[0])

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.gathered is None:
            super()._save_optimizer_and_scheduler(output_dir)
        elif distributed.is_main():
            torch.save(self.gathered[1], Path(output_dir) / OPTIMIZER)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.checkpoints / SAVING)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        checkpoints, saving = self.checkpoints, self.checkpoints / SAVING
        if distributed.is_main():
            shutil.rmtree(saving, ignore_errors=True)
        distributed.barrier()
        if self.is_fsdp_enabled:  # before anything is written: a process whose disk is full must not miss the others
            self.gathered = shards.gathered(self.model), shards.gathered_state(self.optimizer)
        name = f"checkpoint-{self.state.global_step}"
        problem = _problem(lambda: self._write_checkpoint(model, trial, saving / name))
        # when all have written their parts
        problem = problem or _problem(lambda: self._complete_checkpoint(saving / name))
        self.gathered = None
        if problem is not None:
            shutil.rmtree(saving, ignore_errors=True)
            raise SharedError(
                f"the checkpoint of step {self.state.global_step} cannot be written to {checkpoints}: {problem}; "
                f"{resume.rest(checkpoints)}"
            )
        if distributed.is_main():
            shutil.rmtree(checkpoints / name, ignore_errors=True)
            os.rename(saving / name, checkpoints / name)
            sync(checkpoints)  # the name is on the disk before an older checkpoint goes
            rotate_checkpoints(output_dir=str(checkpoints), save_total_limit=self.args.save_total_limit)
        distributed.barrier()

    def _write_checkpoint(self, model: nn.Module, trial: Any, directory: Path) -> None:
        super()._save_checkpoint(model, trial)
        if distributed.is_main() and self.refresh is not None:
            self.refresh.save(directory)

    def _complete_checkpoint(self, directory: Path) -> None:
        if distributed.is_main():
            seal(directory)
            sync_tree(directory.parent)

    # --- resuming -----------------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.is_fsdp_enabled:  # a sharded model was given the adapter before it was sharded
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state = torch.load(Path(checkpoint) / OPTIMIZER, map_location="cpu", weights_only=True)
        shards.scatter_state(self.optimizer, state)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER, weights_only=True))


def _problem(write: Callable[[], Any]) -> str | None:
    """Why this process, or the first of the others, cannot write its part of a checkpoint; None: all have."""
    problem = None
    try:
        write()
    except (OSError, RuntimeError, SafetensorError, UserError) as error:
        problem = _reason(error)
    return distributed.first(problem)


def _reason(error: Exception) -> str:
    """What the operating system said; writers of archives and tensors hide a full disk behind words of their own."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"{text} (is the disk full?)" if hides_full_disk(error) and not isinstance(error, OSError) else text
