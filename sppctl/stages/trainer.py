"""transformers' Trainer with checkpoints that are whole or absent, and a teacher or a changing mask if wanted."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from sppctl import distributed
from sppctl.errors import StageError
from sppctl.lm.safe_files import sync_tree
from sppctl.stages.distill import Distillation
from sppctl.stages.refresh import MaskRefresh
from sppctl.stages.watch import FiniteLoss

SAVING = "saving"  # beside the finished checkpoints: the one that is being written


class SparseTrainer(Trainer):  # type: ignore[misc]
    """A Trainer whose checkpoints are written aside, synced and renamed, and which looks at every loss."""

    def __init__(
        self,
        *args: Any,
        finite: FiniteLoss,
        distillation: Distillation | None = None,
        refresh: MaskRefresh | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.finite, self.distillation, self.refresh = finite, distillation, refresh
        self.add_callback(finite)
        self.checkpoints = Path(str(self.args.output_dir))

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
                with self.accelerator.autocast():  # the teacher is not wrapped in it as the student is
                    loss = self.distillation.mix(loss, outputs.logits, inputs, responses)
            self.finite.add(loss, examples)
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The micro-batches of an optimizer step; with a teacher their response tokens are counted, too."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.distillation is not None:
            self.distillation.start_step(batches, device)
        return batches, num_items

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the divergence from the teacher to each report of the loss."""
        if self.distillation is not None and "loss" in logs:
            logs["kl"] = self.distillation.report()
        super().log(logs, *args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.checkpoints / SAVING)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        checkpoints, saving = self.checkpoints, self.checkpoints / SAVING
        if distributed.is_main():
            shutil.rmtree(saving, ignore_errors=True)
        distributed.barrier()
        try:
            super()._save_checkpoint(model, trial)
            if distributed.is_main():
                if self.refresh is not None:
                    self.refresh.save(saving / f"checkpoint-{self.state.global_step}")
                sync_tree(saving)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(saving, ignore_errors=True)
            newest = get_last_checkpoint(str(checkpoints))
            rest = f"{newest} is intact: the same command continues from there" if newest else "there is none before it"
            raise StageError(
                f"the checkpoint of step {self.state.global_step} cannot be written to {checkpoints}: "
                f"{_reason(error)}; {rest}"
            ) from error
        distributed.barrier()
        if distributed.is_main():
            name = f"checkpoint-{self.state.global_step}"
            shutil.rmtree(checkpoints / name, ignore_errors=True)
            os.rename(saving / name, checkpoints / name)
            rotate_checkpoints(output_dir=str(checkpoints), save_total_limit=self.args.save_total_limit)
        distributed.barrier()


def _reason(error: Exception) -> str:
    """What the operating system said; torch.save hides a full disk behind a failed write of its archive."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return text if isinstance(error, OSError) else f"{text} (is the disk full?)"
