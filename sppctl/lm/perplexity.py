"""Token perplexity as the pruning literature measures it (the protocol of SparseGPT and Wanda)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sppctl.errors import UserError

LOGIT_ROWS = 512  # logits are made for this many positions at a time, never for a whole batch of windows


@dataclass(frozen=True)
class Perplexity:
    """A measured perplexity.

    Attributes:
        value: exp of the mean negative log-likelihood per predicted token.
        nll: that mean, in nats.
        stderr: standard error of ``nll`` over windows; None for a single one.
        tokens: predicted tokens.
        windows: windows of ``seq_len`` tokens.
        seq_len: tokens in a window.
    """

    value: float
    nll: float
    stderr: float | None
    tokens: int
    windows: int
    seq_len: int


def text_windows(tokenizer: Any, text: str, seq_len: int, max_tokens: int | None, name: str) -> Tensor:
    """One tokenisation of the whole text, cut into windows that do not overlap; the last partial one is dropped.

    Returns:
        (windows, seq_len) int64.

    Raises:
        UserError: not even one window.
    """
    tokens = torch.tensor(tokenizer(text).input_ids)
    if max_tokens is not None:
        tokens = tokens[:max_tokens]
    count = len(tokens) // seq_len
    if count == 0:
        raise UserError(
            f"eval.perplexity: {name} has {len(tokens)} tokens, less than one window of {seq_len}; "
            "set a shorter eval.seq_len"
        )
    return tokens[: count * seq_len].view(count, seq_len)


@torch.no_grad()
def window_losses(model: Any, windows: Tensor, batch_size: int, whole: bool = False) -> Iterator[Tensor]:
    """Summed negative log-likelihood of every window.

    The output head runs on ``LOGIT_ROWS`` positions at a time in the model's dtype, the loss is taken in float32. A
    model that does more to its logits than the head and a soft cap is asked for whole windows of them instead.

    Args:
        model: a causal language model of transformers.
        windows: (windows, seq_len).
        batch_size: windows at a time.
        whole: take the logits of whole windows in any case; a sharded model must be called as a whole.

    Yields:
        (batch,) float64, for every batch.
    """
    chunked = not whole and _head_is_last_step(model, windows[:1, :8].to(model.device))
    for batch in windows.split(batch_size):
        batch = batch.to(model.device)
        output = model.base_model(input_ids=batch, use_cache=False)[0] if chunked else model(batch).logits
        losses = torch.zeros(len(batch), dtype=torch.float64)
        for row in range(len(batch)):
            for start in range(0, batch.shape[1] - 1, LOGIT_ROWS):
                stop = min(start + LOGIT_ROWS, batch.shape[1] - 1)
                logits = _logits(model, output[row, start:stop]) if chunked else output[row, start:stop].float()
                losses[row] += F.cross_entropy(logits, batch[row, start + 1 : stop + 1], reduction="sum").item()
        yield losses


def _logits(model: Any, hidden: Tensor) -> Tensor:
    logits: Tensor = model.get_output_embeddings()(hidden).float()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _head_is_last_step(model: Any, tokens: Tensor) -> bool:
    own = model(tokens, use_cache=False).logits.float()
    ours = _logits(model, model.base_model(input_ids=tokens, use_cache=False)[0])
    tolerance = 1e-2 if model.dtype in (torch.bfloat16, torch.float16) else 1e-4
    return own.shape == ours.shape and torch.allclose(own, ours, rtol=tolerance, atol=tolerance)


def summarise(losses: Tensor, seq_len: int) -> Perplexity:
    """The perplexity from the windows' summed losses (windows,)."""
    count = len(losses)
    means = losses / (seq_len - 1)
    nll = means.mean().item()
    spread = means.std().item() / math.sqrt(count) if count > 1 else None
    value = math.exp(nll) if nll < 700 else math.inf
    return Perplexity(value, nll, spread, count * (seq_len - 1), count, seq_len)
