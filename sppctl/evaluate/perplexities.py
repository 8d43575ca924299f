"""Perplexity of a checkpoint on the configured texts, and its distance to the dense model on the same windows."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sppctl import console, distributed, machine
from sppctl.config.settings import Config
from sppctl.data import texts
from sppctl.errors import StageError, UserError
from sppctl.evaluate import perplexity
from sppctl.evaluate.divergence import Reference
from sppctl.evaluate.results import TextMeasure, TextNumbers
from sppctl.evaluate.subjects import fingerprint
from sppctl.machine import dtype_name
from sppctl.model import checkpoint

CPU_BATCH, GPU_BATCH = 4, 16  # windows of text


def contents(config: Config) -> dict[str, str]:
    """Hashes of the configured texts: of a local file its bytes, of any other text its documents."""
    return {
        name: texts.file_hash(name) or texts.content_hash(texts.load_text(name, "test", "eval.perplexity").documents)
        for name in config.eval.perplexity
    }


@dataclass(frozen=True, eq=False)
class Windows:
    """A text in windows, and those that this process computes."""

    tokens: Tensor  # (windows, seq_len) int64, all of them
    # of this process; whole batches, so that each window is computed in the same batch as in a single process
    indices: Tensor
    batch_size: int  # windows at a time
    documents_hash: str  # of the text
    tokens_hash: str  # of ``tokens``


def windows_of(config: Config, tokenizer: Any, measure: TextMeasure, device: torch.device) -> Windows:
    """The windows of a text for a model on a device, in batches as configured or of a size that suits the device."""
    text = texts.load_text(measure.text, "test", "eval.perplexity")
    tokens = perplexity.windows_of_text(tokenizer, text, measure.seq_len, measure.max_tokens, measure.stride)
    share = math.ceil(len(tokens) / distributed.world_size())  # so that every process has a batch
    automatic = min(GPU_BATCH if device.type == "cuda" else CPU_BATCH, share)
    batch_size = automatic if config.eval.batch_size == "auto" else config.eval.batch_size
    batches = torch.arange(len(tokens)).split(batch_size)[distributed.rank() :: distributed.world_size()]
    indices = torch.cat(batches) if batches else torch.arange(0)
    tokens_hash = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16]
    return Windows(tokens, indices, batch_size, texts.content_hash(text.documents), tokens_hash)


class DenseModel:
    """The checkpoint that others are compared with: run once per text, and freed before another model is loaded."""

    def __init__(self, name: str, directory: Path, trust_remote_code: bool, scratch: Path) -> None:
        """Loads nothing. ``name``: as configured; ``scratch``: an existing directory for its hidden states."""
        self.name, self.directory, self.trust = name, directory, trust_remote_code
        self.fingerprint = fingerprint(directory)
        self._folder = scratch / f".reference-{distributed.rank()}"
        self._references: dict[tuple[str, Windows], Reference] = {}

    def predict(self, texts: Iterable[tuple[str, Windows]], device: torch.device) -> None:
        """Runs the model on the windows of this process, each text in its dtype, and keeps its predictions.

        It is loaded once for all texts of a dtype.
        """
        unique_texts = list(dict.fromkeys(texts))
        self._folder.mkdir()
        console.note(f"eval: running {self.directory}, with which the others are compared")
        for dtype in dict.fromkeys(dtype for dtype, _ in unique_texts):
            model = checkpoint.load_model(self.directory, device, dtype, self.trust, spread=True)
            for number, (text_dtype, text) in enumerate(unique_texts, start=1):
                if text_dtype != dtype:
                    continue
                file = self._folder / f"{number}.bin"
                title = f"dense model: text {number} of {len(unique_texts)}"
                with console.Progress(title, len(text.indices)) as bar:
                    windows, advance = text.tokens[text.indices], partial(bar.advance, "")
                    self._references[dtype, text] = Reference(model, windows, text.batch_size, file, advance)
            del model
            machine.release_memory()

    def reference_for(self, text: Windows, model: Any) -> Reference | None:
        """Its predictions on the windows of this process, in the dtype of another model, if they have been computed.

        Raises:
            UserError: the vocabulary of the other model is of another size.
        """
        reference = self._references.get((dtype_name(model.dtype), text))
        size = model.get_output_embeddings().weight.shape[0]
        if reference is not None and reference.vocab_size != size:
            raise UserError(
                "eval.divergence",
                f"{self.directory} has {reference.vocab_size} logits, this model {size}",
                "compare models of the same family, or set it to null",
            )
        return reference

    def close(self) -> None:
        """Removes the predictions."""
        self._references.clear()
        shutil.rmtree(self._folder, ignore_errors=True)


def measure(model: Any, text: Windows, measure: TextMeasure, *, label: str, dense: DenseModel | None) -> TextNumbers:
    """Perplexity on one text; several processes take batches in turn.

    If the measure names a reference, ``dense`` has predicted these windows. If not, this model may itself be the dense
    one, and its hidden states are not computed again.

    Raises:
        UserError: the vocabulary of the dense model is of another size.
        StageError: the loss is NaN: the weights are broken. An infinite loss is a result, of a bad model.
    """
    windows, indices = text.tokens, text.indices
    scored = perplexity.scored_tokens(len(windows), measure.seq_len, measure.stride)
    predicted = None if dense is None else dense.reference_for(text, model)
    reference = hidden = compared_with = None
    if measure.reference is not None:
        assert dense is not None
        assert predicted is not None
        reference, compared_with = predicted, None if dense.name == "base" else dense.name
    elif predicted is not None:
        hidden = predicted.hidden
    sums = torch.zeros(len(windows), 3, dtype=torch.float64)
    done = 0
    with console.Progress(f"{label}: perplexity of {measure.text}", len(indices)) as bar:
        counts, size = scored[indices], text.batch_size
        for batch in perplexity.window_sums(model, windows[indices], size, counts, reference, hidden=hidden):
            sums[indices[done : done + len(batch)]] = batch
            done += len(batch)
            nll = sums[indices[:done], 0].sum() / scored[indices[:done]].sum()
            bar.advance(f"{nll.exp().item():.2f}", steps=len(batch))
    sums = distributed.summed(sums, model.device)
    broken = sums.isnan().any(dim=1).nonzero().flatten().tolist()
    if broken:
        dtype = dtype_name(model.dtype)
        raise StageError(
            f"{label}: logits are not finite in window {broken[0] + 1} of {len(sums)} (dtype {dtype}); the weights are "
            f"damaged, or too large for {dtype}"
        )
    # sums over thousands of tokens: precise enough to pair windows
    losses = [round(loss, 4) for loss in sums[:, 0].tolist()]
    numbers = perplexity.summarise(sums, windows.shape[1], measure.stride, reference is not None)
    return replace(
        numbers,
        documents_hash=text.documents_hash,
        tokens_hash=text.tokens_hash,
        window_nll=losses,
        compared_with=compared_with,
    )
