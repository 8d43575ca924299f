"""Token perplexity as the pruning literature measures it (the protocol of SparseGPT and Wanda)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sppctl import machine
from sppctl.data.texts import Text
from sppctl.errors import UserError
from sppctl.evaluate.results import TextNumbers

if TYPE_CHECKING:
    from sppctl.evaluate.divergence import Reference

DEFAULT_WINDOW = 2048  # tokens
LOGIT_ROWS = 512  # logits are computed for this many positions at a time, never for a whole batch of windows
# fewer on a CPU: malloc reuses blocks of up to 16 MiB, but maps and clears larger ones anew every time, which costs
# more than the loss; and the loss is computed on 4 MiB at a time, which stay in the cache
CPU_LOGITS = 1 << 24  # bytes in the model's dtype
CPU_LOSS = 1 << 20  # elements in float32
MEMORY_SHARE = 0.5  # of the free memory, for the logits of whole windows


def window_length(configured: int | None, limit: int | None) -> int:
    """Tokens in a window: as configured, else DEFAULT_WINDOW or the model's ``limit``, whichever is less."""
    return configured or min(DEFAULT_WINDOW, limit or DEFAULT_WINDOW)


def text_windows(
    tokenizer: Any, text: str, seq_len: int, max_tokens: int | None, name: str, stride: int | None = None
) -> Tensor:
    """Tokenises the whole text at once and cuts it into windows; the last partial one is dropped.

    Returns:
        (windows, seq_len) int64, of the first ``max_tokens`` if set, a window every ``stride`` tokens; None: every
        ``seq_len``, without overlap.

    Raises:
        UserError: the text, called ``name`` in the message, is shorter than one window.
    """
    tokens = torch.tensor(tokenizer(text).input_ids)[:max_tokens]
    if max_tokens is not None and max_tokens < seq_len:
        raise UserError(
            "eval.max_tokens",
            f"{max_tokens} is less than one window of {seq_len}",
            "raise it, or set a smaller eval.seq_len",
        )
    if len(tokens) < seq_len:
        problem = f"{name} has {len(tokens)} tokens, less than one window of {seq_len}"
        raise UserError("eval.perplexity", problem, "set a smaller eval.seq_len")
    return tokens.unfold(0, seq_len, stride or seq_len)


def windows_of_text(
    tokenizer: Any, text: Text, seq_len: int, max_tokens: int | None, stride: int | None = None
) -> Tensor:
    """:func:`text_windows` of the joined documents, at most :func:`used_tokens` of them."""
    limit = used_tokens(text, seq_len, max_tokens)
    return text_windows(tokenizer, text.joiner.join(text.documents), seq_len, limit, text.name, stride)


def used_tokens(text: Text, seq_len: int, max_tokens: int | None) -> int | None:
    """The largest number of tokens that are used of a text, whose protocol may limit the windows; None: all."""
    limits = [count for count in (max_tokens, text.windows and text.windows * seq_len) if count]
    return min(limits, default=None)


def scored_tokens(count: int, seq_len: int, stride: int | None = None) -> Tensor:
    """(windows,) int64: the number of tokens that are scored in each window, its last ones.

    The first token of a window has no context. Where windows overlap, only tokens that no earlier window has scored
    are scored.
    """
    scored = torch.full((count,), min(stride or seq_len, seq_len - 1))
    scored[:1] = seq_len - 1
    return scored


def window_losses(model: Any, windows: Tensor, batch_size: int, whole_windows: bool = False) -> Iterator[Tensor]:
    """Summed negative log-likelihood of every window, (batch,) float64 for every batch; no overlap, no reference."""
    for sums in window_sums(model, windows, batch_size, whole_windows=whole_windows):
        yield sums[:, 0]


@torch.no_grad()
def window_sums(
    model: Any,
    windows: Tensor,
    batch_size: int,
    scored: Tensor | None = None,
    reference: Reference | None = None,
    whole_windows: bool = False,
    hidden: Tensor | None = None,
) -> Iterator[Tensor]:
    """Sums over the scored tokens of every window.

    The output head runs on :func:`logit_rows` positions at a time in the model's dtype, the loss in float32. A model
    that changes its logits in ways that :func:`capped` does not cover computes whole windows of them instead, as many
    as fit. A batch that does not fit on a GPU is halved.

    Args:
        model: a causal language model of transformers.
        windows: (windows, seq_len) int64.
        batch_size: windows at a time.
        scored: (windows,) how many of a window's last tokens are scored; None: all but the first.
        reference: predictions on the same windows, with which the model is compared.
        whole_windows: compute the logits of whole windows in any case; a sharded model needs calls of the full model.
        hidden: (windows, seq_len, hidden_size), the model's final hidden states if they have been computed.

    Yields:
        (batch, 3) float64 for every batch: negative log-likelihood, KL divergence, agreements.
    """
    if not len(windows):
        return
    chunked = not whole_windows and head_is_last_step(model, windows[:1, :8].to(model.device))
    if not (chunked or whole_windows):  # their logits, and one copy of these, must fit into memory
        window_bytes = 2 * windows.shape[1] * _vocab_size(model) * model.dtype.itemsize
        batch_size = min(batch_size, max(1, int(machine.free_memory(model.device) * MEMORY_SHARE / window_bytes)))
    counts = scored_tokens(*windows.shape) if scored is None else scored
    sums_of = partial(_sums, model, windows, counts.tolist(), reference, chunked, hidden)
    for first in range(0, len(windows), batch_size):
        batch = range(first, min(first + batch_size, len(windows)))
        # the processes of a sharded model must make the same calls, so none of them may halve a batch alone
        yield torch.stack(sums_of(batch) if whole_windows else machine.in_halves(sums_of, batch))


def _sums(
    model: Any,
    windows: Tensor,
    counts: list[int],
    reference: Reference | None,
    chunked: bool,
    hidden: Tensor | None,
    batch: range,
) -> list[Tensor]:
    """The sums (3,) of each window of a batch."""
    tokens = windows[batch.start : batch.stop].to(model.device)
    if not chunked:
        output, head, finish = model(tokens).logits, torch.nn.Identity(), Tensor.float
    else:
        head, finish = model.get_output_embeddings(), partial(capped, config=model.config)
        if hidden is not None:
            output = hidden[batch.start : batch.stop].to(model.device)
        else:
            output = model.base_model(input_ids=tokens, use_cache=False)[0]
    rows = logit_rows(model, model.dtype if reference is None else torch.float32)
    last = tokens.shape[1] - 1
    sums = torch.zeros(len(batch), 3, dtype=torch.float64)
    for row, window in enumerate(batch):
        for start in range(last - counts[window], last, rows):
            stop = min(start + rows, last)
            logits = head(output[row, start:stop])
            sums[row, 0] += _summed_loss(logits, tokens[row, start + 1 : stop + 1], finish)
            if reference is not None:
                compared = reference.compare(window, start, stop, finish(logits))
                sums[row, 1:] += torch.tensor(compared, dtype=torch.float64)
    return list(sums)


def _vocab_size(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)


def logit_rows(model: Any, dtype: torch.dtype) -> int:
    """The number of positions whose logits, in a dtype, are computed at a time."""
    if model.device.type != "cpu":
        return LOGIT_ROWS
    return max(1, min(LOGIT_ROWS, CPU_LOGITS // (_vocab_size(model) * dtype.itemsize)))


def _summed_loss(logits: Tensor, following: Tensor, finish: Callable[[Tensor], Tensor]) -> float:
    """Summed negative log-likelihood in float32 of the tokens (positions,) under logits (positions, vocabulary)."""
    rows = len(logits) if logits.device.type != "cpu" else max(1, CPU_LOSS // logits.shape[1])
    # in a model that is spread over GPUs the head and the embedding are on different ones
    parts = zip(logits.split(rows), following.to(logits.device).split(rows), strict=True)
    return sum(F.cross_entropy(finish(part), tokens, reduction="sum").item() for part, tokens in parts)


def capped(logits: Tensor, config: Any) -> Tensor:
    """The output of the head in float32, scaled (Cohere, Falcon-H1, Granite) and capped (Gemma 2) as by the model."""
    logits, text_config = logits.float(), config.get_text_config()
    for name in ("logit_scale", "lm_head_multiplier", "logits_scaling"):
        factor = getattr(text_config, name, None)
        if not isinstance(factor, float | int):
            continue
        # HyperCLOVA X multiplies by the key by which Granite divides
        divides = name == "logits_scaling" and not str(text_config.model_type).startswith("hyperclovax")
        logits = logits / factor if divides else logits * factor
    cap = getattr(text_config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


@torch.no_grad()
def head_is_last_step(model: Any, tokens: Tensor) -> bool:
    """Whether the output head and :func:`capped` reproduce the model's logits from its final hidden states."""
    hidden: list[Tensor] = []
    handle = model.base_model.register_forward_hook(lambda *call: hidden.append(call[-1][0]))
    try:
        logits = model(tokens, use_cache=False).logits.float()
    finally:
        handle.remove()
    if not hidden:  # OPT calls only a part of its base model
        hidden.append(model.base_model(input_ids=tokens, use_cache=False)[0])
    recomputed = capped(model.get_output_embeddings()(hidden[0]), model.config).to(logits.device)
    tolerance = 1e-2 if model.dtype in (torch.bfloat16, torch.float16) else 1e-4
    return logits.shape == recomputed.shape and torch.allclose(logits, recomputed, rtol=tolerance, atol=tolerance)


def summarise(sums: Tensor, seq_len: int, stride: int | None = None, compared: bool = False) -> TextNumbers:
    """The perplexity from the windows' sums: (windows,) losses, or (windows, 3) as :func:`window_sums` yields.

    ``compared``: whether there was a reference model.
    """
    sums = sums.view(len(sums), -1)
    scored = scored_tokens(len(sums), seq_len, stride)
    nll, stderr = _mean(sums[:, 0], scored)
    value = math.exp(nll) if nll < 700 else math.inf
    tokens = int(scored.sum())
    numbers = TextNumbers(value, nll, stderr, tokens, len(sums), seq_len, stride or seq_len)
    if not compared:
        return numbers
    kl, kl_stderr = _mean(sums[:, 1], scored)
    return replace(numbers, kl=kl, kl_stderr=kl_stderr, top1_agreement=sums[:, 2].sum().item() / tokens)


def _mean(sums: Tensor, scored: Tensor) -> tuple[float, float | None]:
    """Mean per token over all windows, and its standard error over windows of (nearly) equal weight."""
    mean = sums.sum().item() / int(scored.sum())
    return mean, (sums / scored).std().item() / math.sqrt(len(sums)) if len(sums) > 1 else None
