"""transformers' Trainer with checkpoints that are whole or absent."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from sppctl import distributed
from sppctl.errors import StageError
from sppctl.lm.safe_files import sync_tree
from sppctl.stages.feed import Feed
from sppctl.stages.watch import FiniteLoss

SAVING = "saving"  # beside the finished checkpoints: the one that is being written


class SparseTrainer(Trainer):  # type: ignore[misc]
    """A Trainer whose checkpoints are written aside, synced and renamed, and which looks at every loss.

    Args:
        args: of the Trainer.
        finite: looks at the losses.
        feed: how examples reach the model.
        kwargs: of the Trainer.
    """

    def __init__(self, *args: Any, finite: FiniteLoss, feed: Feed, **kwargs: Any) -> None:
        super().__init__(*args, data_collator=feed.collator, **kwargs)
        self.feed = feed
        self.finite = finite
        self.add_callback(finite)
        self.checkpoints = Path(str(self.args.output_dir))

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The model's loss; in training it is remembered with the numbers of its examples."""
        examples = inputs.pop("examples", [])
        result = super().compute_loss(model, inputs, *args, **kwargs)
        if model.training:
            loss: Tensor = result[0] if isinstance(result, tuple) else result
            self.finite.add(loss, examples)
        return result

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Before the first step: does the model, as it is wrapped and placed now, keep packed examples apart?"""
        self.feed.check(model)
        return super().training_step(model, inputs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return super()._get_train_sampler(train_dataset) if self.feed.order is None else self.feed.order

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Padded batches always: the Trainer weighs validation losses by the rows of their batches."""
        self.data_collator = self.feed.padded
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = self.feed.collator

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
