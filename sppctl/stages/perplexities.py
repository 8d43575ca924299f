"""Perplexity of a checkpoint on the configured texts, and its distance to the dense model on the same windows."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sppctl import console, distributed
from sppctl.errors import UserError
from sppctl.lm import checkpoint, data, perplexity
from sppctl.lm.divergence import Reference, divergence


class DenseModel:
    """The checkpoint that others are compared with; loaded when first needed, run once per text."""

    def __init__(self, directory: Path, trust_remote_code: bool) -> None:
        self.directory, self.trust = directory, trust_remote_code
        self.fingerprint = checkpoint.fingerprint(directory)
        self._scratch = tempfile.TemporaryDirectory(prefix="sppctl-reference-")
        self._references: dict[str, Reference] = {}

    def on(self, key: str, windows: Tensor, batch_size: int, device: torch.device) -> Reference:
        """Its predictions on windows, which ``key`` identifies."""
        if key not in self._references:
            model = checkpoint.load_model(self.directory, device, trust_remote_code=self.trust)
            file = Path(self._scratch.name, f"{len(self._references)}.bin")
            self._references[key] = Reference(model, windows, batch_size, file)
        return self._references[key]


def _comparison(dense: DenseModel, reference: Reference, model: Any) -> Callable[..., tuple[float, int]]:
    own = model.get_output_embeddings().weight.shape[0]
    if reference.vocab_size != own:
        raise UserError(
            f"eval.divergence: {dense.directory} has {reference.vocab_size} logits, this model {own}; "
            "compare models of one family, or set it to null"
        )

    def compare(window: int, start: int, stop: int, logits: Tensor) -> tuple[float, int]:
        return divergence(reference.log_probs(window, start, stop), logits)

    return compare


def measure(
    model: Any,
    tokenizer: Any,
    settings: dict[str, Any],
    *,
    batch_size: int,
    label: str,
    dense: DenseModel | None,
) -> dict[str, Any]:
    """Perplexity on one text; of several processes each takes every so many batches.

    Args:
        model: the loaded model.
        tokenizer: its tokenizer.
        settings: text, seq_len, stride, max_tokens.
        batch_size: windows at a time.
        label: of the checkpoint, for progress.
        dense: the model to compare with; None: no comparison.

    Returns:
        The fields of :class:`sppctl.lm.perplexity.Perplexity`, ``documents_hash`` of the text, and ``window_nll``, the
        summed loss of every window in nats, by which two checkpoints can be compared window by window.

    Raises:
        UserError: the dense model has another vocabulary.
    """
    text = data.load_text(settings["text"], "test", "eval.perplexity")
    seq_len, stride = settings["seq_len"], settings["stride"]
    whole = text.joiner.join(text.documents)
    windows = perplexity.text_windows(tokenizer, whole, seq_len, settings["max_tokens"], settings["text"], stride)
    scored = perplexity.scored_tokens(len(windows), seq_len, stride)
    # whole batches, so that every window is computed in the company it has in a single process
    batches = torch.arange(len(windows)).split(batch_size)[distributed.rank() :: distributed.world_size()]
    own = torch.cat(batches) if batches else torch.arange(0)
    identity = data.content_hash(text.documents)
    compare = None
    if dense is not None and len(own):
        key = f"{identity} {seq_len} {stride} {settings['max_tokens']}"
        compare = _comparison(dense, dense.on(key, windows[own], batch_size, model.device), model)
    sums = torch.zeros(len(windows), 3, dtype=torch.float64)
    done = 0
    with console.Progress(f"{label}: perplexity of {settings['text']}", len(own)) as bar:
        for batch in perplexity.window_sums(model, windows[own], batch_size, scored[own], compare):
            sums[own[done : done + len(batch)]] = batch
            done += len(batch)
            nll = sums[own[:done], 0].sum() / scored[own[:done]].sum()
            bar.advance(f"{nll.exp().item():.2f}", steps=len(batch))
    if distributed.world_size() > 1:
        shared = sums.to(model.device)  # NCCL adds up on GPUs only
        distributed.add_up(shared)
        sums = shared.cpu()
    losses = [round(loss, 4) for loss in sums[:, 0].tolist()]  # of thousands of tokens: enough to pair windows by
    measured = asdict(perplexity.summarise(sums, seq_len, stride, dense is not None))
    return measured | {"documents_hash": identity, "window_nll": losses}
