"""Calibration windows: the tokens that the pruner sees, drawn by a seed, without padding, and cached.

Tokenising C4 takes longer than pruning a small model; with the cache, a second run with the same text, tokenizer and
settings starts at once.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from sppctl import console
from sppctl.data.texts import Text, content_hash
from sppctl.errors import UserError
from sppctl.files import cache

WindowsKind = Literal["auto", "random-document", "concatenate"]
CACHE_FORMAT = 2  # raised when windows are drawn in another way, so that older cache files are not used


@dataclass(frozen=True)
class Windows:
    """Calibration tokens."""

    tokens: Tensor  # (samples, seq_len) int64
    kind: str  # ``random-document``, ``concatenate`` or ``random-offset``

    @cached_property
    def hash(self) -> str:
        """Identifies the windows by their tokens."""
        digest = hashlib.sha256(str(tuple(self.tokens.shape)).encode())
        digest.update(self.tokens.contiguous().numpy().astype("<i8", copy=False).tobytes())
        return digest.hexdigest()[:16]


def calibration_windows(tokenizer: Any, text: Text, *, samples: int, seq_len: int, **choice: Any) -> Windows:
    """:func:`draw_windows` with the same arguments, or its result from the cache."""
    depends_on = {
        "format": CACHE_FORMAT,
        "documents": content_hash(text.documents),
        "joiner": text.joiner,
        "running": text.running,
        "tokenizer": cache.tokenizer_identity(tokenizer),
        "samples": samples,
        "seq_len": seq_len,
        **choice,
    }
    path = cache.entry("windows", depends_on)
    tensors, metadata = cache.read(path)
    if tensors:
        return Windows(tensors["windows"], metadata["made"])
    with console.working(f"tokenising {text.name} for calibration"):
        windows = draw_windows(tokenizer, text, samples=samples, seq_len=seq_len, **choice)
    cache.write(path, {"windows": windows.tokens}, made=windows.kind)
    return windows


def draw_windows(
    tokenizer: Any, text: Text, *, samples: int, seq_len: int, seed: int, windows: WindowsKind = "auto"
) -> Windows:
    """Windows of calibration text, without padding: every token is from the text.

    ``random-document``, as published: a random offset in each of ``samples`` random documents longer than a window.
    ``concatenate``: documents are joined in random order and cut into windows, of which ``samples`` are drawn without
    replacement. ``auto``: the first, or the second if the source has too few documents longer than a window. A running
    text is instead tokenised as a whole, in its own order, and windows start anywhere in it, as published for
    WikiText-2, unless ``windows`` is ``random-document``.

    Raises:
        UserError: the source has too little text, or too few long documents.
    """
    generator, documents = random.Random(seed), list(text.documents)
    in_order = text.running and windows != "random-document"
    if not in_order:
        generator.shuffle(documents)
    if not in_order and windows != "concatenate":
        pieces = _random_pieces(tokenizer, documents, samples, seq_len, generator)
        if len(pieces) == samples:
            return Windows(torch.tensor(pieces), "random-document")
        if windows == "random-document":
            raise UserError(
                "prune.calibration.windows",
                f"{text.name} has {len(pieces)} documents longer than {seq_len} tokens, random-document needs "
                f"{samples}: use concatenate or auto, fewer samples, a shorter seq_len or more text",
            )
    needed, tokens = samples * seq_len, _tokens(tokenizer, text.joiner.join(documents)) if in_order else []
    for document in filter(str.strip, () if in_order else documents):
        if len(tokens) < needed:
            tokens += _tokens(tokenizer, document + text.joiner)
    if len(tokens) < needed:
        raise UserError(
            "prune.calibration",
            f"{text.name} has {len(tokens)} tokens, {samples} windows of {seq_len} need {needed}; "
            f"{needed - len(tokens)} are missing: use fewer samples, a shorter seq_len or more text",
        )
    if in_order:
        starts = [generator.randint(0, len(tokens) - seq_len) for _ in range(samples)]
    else:
        starts = [number * seq_len for number in sorted(generator.sample(range(len(tokens) // seq_len), samples))]
    kind = "random-offset" if in_order else "concatenate"
    return Windows(torch.tensor([tokens[start : start + seq_len] for start in starts]), kind)


def _random_pieces(
    tokenizer: Any, documents: list[str], samples: int, seq_len: int, generator: random.Random
) -> list[list[int]]:
    pieces: list[list[int]] = []
    for document in documents:
        if len(document.encode()) < seq_len:  # too short without tokenising: a token has at least one byte
            continue
        tokens = _tokens(tokenizer, document)
        if len(tokens) > seq_len:
            offset = generator.randint(0, len(tokens) - seq_len - 1)
            pieces.append(tokens[offset : offset + seq_len])
        if len(pieces) == samples:
            break
    return pieces


def _tokens(tokenizer: Any, document: str) -> list[int]:
    """The tokens of a document without padding or truncation, even if the tokenizer was saved with either."""
    encoding = tokenizer(document, padding=False, truncation=False)
    assert all(encoding.get("attention_mask", ())), "padding in calibration text"
    return list(encoding["input_ids"])
