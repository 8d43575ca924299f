"""Calibration windows: which tokens the pruner sees, chosen by a seed, without padding, cached by what they depend on.

Tokenising C4 takes longer than pruning a small model; the cache makes the second run with the same text, tokenizer and
settings start at once. It only saves time: a cache that cannot be read or written is as good as none.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import uuid
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sppctl.errors import UserError
from sppctl.lm.data import Text, content_hash

WindowsKind = Literal["auto", "random-document", "concatenate"]
CACHE_FORMAT = 1  # raised when windows are drawn in another way, so that no older file is taken for the same


@dataclass(frozen=True)
class Windows:
    """Calibration tokens.

    Attributes:
        tokens: (samples, seq_len) int64.
        made: ``random-document`` or ``concatenate``, the way they were made.
    """

    tokens: Tensor
    made: str

    @cached_property
    def hash(self) -> str:
        """Identifies the windows by their tokens."""
        digest = hashlib.sha256(str(tuple(self.tokens.shape)).encode())
        digest.update(self.tokens.contiguous().numpy().astype("<i8", copy=False).tobytes())
        return digest.hexdigest()[:16]


def calibration_windows(tokenizer: Any, text: Text, *, samples: int, seq_len: int, **choice: Any) -> Windows:
    """Windows as of :func:`draw_windows`, whose arguments these are, from the cache if they were drawn before."""
    path = None
    identity = tokenizer_identity(tokenizer)
    if identity is not None:
        depends_on = {
            "format": CACHE_FORMAT,
            "documents": content_hash(text.documents),
            "joiner": text.joiner,
            "tokenizer": identity,
            "samples": samples,
            "seq_len": seq_len,
            **choice,
        }
        name = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:32]
        path = _cache_file(f"{name}.safetensors")
    found = _read(path, samples, seq_len) if path else None
    if found is None:
        found = draw_windows(tokenizer, text, samples=samples, seq_len=seq_len, **choice)
        if path:
            _write(path, found)
    return found


# --- drawing ----------------------------------------------------------------------------------------------------------


def draw_windows(
    tokenizer: Any,
    text: Text,
    *,
    samples: int,
    seq_len: int,
    seed: int,
    windows: WindowsKind = "auto",
) -> Windows:
    """Windows of calibration text, every token of which was in the text: there is no padding.

    Args:
        tokenizer: of the model.
        text: the source.
        samples: number of windows.
        seq_len: tokens in a window.
        seed: of the choice.
        windows: ``random-document``, as published: a random document longer than a window, a random offset in it.
            ``concatenate``: documents are joined in random order and cut into windows, of which some are chosen, none
            twice. ``auto``: the first, or the second where a source has too few documents longer than a window.

    Raises:
        UserError: too little text, or too few long documents.
    """
    order = list(text.documents)
    chooser = random.Random(seed)
    chooser.shuffle(order)
    if windows != "concatenate":
        pieces = _random_pieces(tokenizer, order, samples, seq_len, chooser)
        if len(pieces) == samples:
            return Windows(_stacked(pieces, seq_len), "random-document")
        if windows == "random-document":
            raise UserError(
                f"prune.calibration.windows: {text.name} has {len(pieces)} documents longer than {seq_len} tokens, "
                f"random-document needs {samples}: "
                "use concatenate or auto, fewer samples, a shorter seq_len or more text"
            )
    needed = samples * seq_len
    joined: list[int] = []
    for document in order:
        if len(joined) >= needed:
            break
        if document.strip():
            joined += _tokens(tokenizer, document + text.joiner)
    if len(joined) < needed:
        raise UserError(
            f"prune.calibration: {text.name} has {len(joined)} tokens, {samples} windows of {seq_len} need {needed}; "
            f"{needed - len(joined)} are missing: use fewer samples, a shorter seq_len or more text"
        )
    starts = [number * seq_len for number in sorted(chooser.sample(range(len(joined) // seq_len), samples))]
    return Windows(_stacked([joined[start : start + seq_len] for start in starts], seq_len), "concatenate")


def _random_pieces(
    tokenizer: Any, documents: list[str], samples: int, seq_len: int, chooser: random.Random
) -> list[list[int]]:
    pieces: list[list[int]] = []
    for document in documents:
        if len(document.encode()) < seq_len:  # no token is shorter than a byte: spare the tokeniser
            continue
        tokens = _tokens(tokenizer, document)
        if len(tokens) > seq_len:
            offset = chooser.randint(0, len(tokens) - seq_len - 1)
            pieces.append(tokens[offset : offset + seq_len])
        if len(pieces) == samples:
            break
    return pieces


def _tokens(tokenizer: Any, document: str) -> list[int]:
    """All tokens of a document and no others, whatever padding or truncation the tokenizer was saved with."""
    encoding = tokenizer(document, padding=False, truncation=False)
    assert all(encoding.get("attention_mask", ())), "padding in calibration text"
    return list(encoding["input_ids"])


def _stacked(pieces: list[list[int]], seq_len: int) -> Tensor:
    assert all(len(piece) == seq_len for piece in pieces), "a window that is not full"
    return torch.tensor(pieces, dtype=torch.int64)


# --- the cache --------------------------------------------------------------------------------------------------------


def tokenizer_identity(tokenizer: Any) -> str | None:
    """Identifies a tokenizer by what it makes of a text; None if that cannot be told, so nothing is cached.

    Fast tokenizers write out all they do. Of others, class, vocabulary, special tokens and plain settings are taken.
    """
    kind = type(tokenizer)
    parts: list[Any] = [kind.__module__, kind.__qualname__]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        try:
            serialised = json.loads(backend.to_str())
        except Exception:  # what tokenizers raises when a part is written in Python
            return None
        # both depend on how the tokenizer was last called, and windows are made without them
        serialised.pop("padding", None)
        serialised.pop("truncation", None)
        parts += [serialised, getattr(tokenizer, "split_special_tokens", None)]
    elif callable(getattr(tokenizer, "get_vocab", None)):
        plain = {
            name: value
            for name, value in vars(tokenizer).items()
            if isinstance(value, bool | int | float | str) and name != "name_or_path"
        }
        special = {name: str(token) for name, token in getattr(tokenizer, "special_tokens_map", {}).items()}
        try:
            vocabulary = sorted((str(token), index) for token, index in tokenizer.get_vocab().items())
        except NotImplementedError:
            return None
        parts += [vocabulary, special, plain]
    else:
        return None
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _cache_file(name: str) -> Path | None:
    """Where a file of the cache lies: ``$SPPCTL_CACHE/windows`` or ``~/.cache/sppctl/windows``."""
    try:
        root = Path(os.environ.get("SPPCTL_CACHE") or "~/.cache/sppctl").expanduser()
    except RuntimeError:  # no home directory
        return None
    return root / "windows" / name


def _read(path: Path, samples: int, seq_len: int) -> Windows | None:
    """The windows of a cache file; None if it is not there, or not whole."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            windows = Windows(file.get_tensor("windows").clone(), metadata.get("made", ""))
    except (OSError, SafetensorError):
        return None
    whole = windows.tokens.dtype == torch.int64 and windows.tokens.shape == (samples, seq_len)
    return windows if whole and windows.made and windows.hash == metadata.get("hash") else None


def _write(path: Path, windows: Windows) -> None:
    """Puts a whole file in place, or none: a disk that is full or read-only costs no run."""
    partial = path.with_name(f".{path.stem}-{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(save({"windows": windows.tokens}, {"made": windows.made, "hash": windows.hash}))
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError:
        return
