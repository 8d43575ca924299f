"""The dense model's predictions on the same windows, with which a sparse model is compared."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sppctl import distributed
from sppctl.errors import StageError, UserError
from sppctl.evaluate.perplexity import capped, head_is_last_step
from sppctl.files.safe_files import reserve


class Reference:
    """A model's final hidden states on windows, in a memory-mapped file; its output head turns them into logits.

    A hidden state is about a hundred times smaller than a row of logits, so a long text fits on disk, and the dense
    model itself need not be in memory together with the model that is compared with it.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: Any,
        windows: Tensor,
        batch_size: int,
        file: Path,
        advance: Callable[[int], object] = lambda _: None,
    ) -> None:
        """Runs a causal language model on all windows, (windows, seq_len) int64, and keeps only its head.

        ``file`` receives the hidden states, (windows, seq_len, hidden_size) in the model's dtype; ``advance`` is called
        after every batch with its number of windows.

        Raises:
            UserError: the model's logits cannot be recomputed from its hidden states.
            StageError: the disk is too small.
        """
        probe = windows[:1, :8] if len(windows) else torch.arange(8)[None]
        if not head_is_last_step(model, probe.to(model.device)):
            kind = model.config.model_type
            raise UserError("eval.divergence", f"{kind} changes its logits after the output head", "set it to null")
        self.head, self.config = model.get_output_embeddings(), model.config
        self.vocab_size = int(self.head.weight.shape[0])  # of the logits
        shape = (*windows.shape, self.head.weight.shape[1])
        size = windows.numel() * shape[-1]
        _reserve(file, size * model.dtype.itemsize)
        mapped = torch.from_file(str(file), shared=True, size=size, dtype=model.dtype) if size else torch.empty(0)
        self.hidden = mapped.view(shape)
        for start in range(0, len(windows), batch_size):
            batch = windows[start : start + batch_size].to(model.device)
            self.hidden[start : start + len(batch)] = model.base_model(input_ids=batch, use_cache=False)[0].cpu()
            advance(len(batch))

    def compare(self, window: int, start: int, stop: int, logits: Tensor) -> tuple[float, int]:
        """Sum of KL(reference || model) in nats, and the number of positions where both predict the same token.

        ``logits``: (stop - start, vocabulary) float32 of the compared model, for some positions of a window.
        """
        hidden = self.hidden[window, start:stop].to(self.head.weight.device)
        reference = F.log_softmax(capped(self.head(hidden), self.config), dim=-1).to(logits.device)
        compared = F.log_softmax(logits, dim=-1)
        kl = F.kl_div(compared, reference, reduction="sum", log_target=True).item()
        return kl, int((reference.argmax(-1) == compared.argmax(-1)).sum())


def _reserve(file: Path, size: int) -> None:
    problem = None
    try:
        reserve(file, size)
    except OSError as error:
        free = shutil.disk_usage(file.parent).free
        problem = (
            f"the hidden states of the dense model need {size:,} bytes in {file.parent}, where {free:,} are free "
            f"({error.strerror}); free some space, or set eval.divergence to null"
        )
    problem = distributed.first_known(problem)  # so that all processes stop together
    if problem is not None:
        file.unlink(missing_ok=True)
        raise StageError(problem)
