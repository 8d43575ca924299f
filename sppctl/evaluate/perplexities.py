"""Perplexity of a checkpoint on the configured texts, and its distance to the dense model on the same windows."""

from __future__ import annotations

import gc
import hashlib
import math
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sppctl import console, distributed
from sppctl.config.settings import Config
from sppctl.data import texts
from sppctl.errors import StageError, UserError
from sppctl.evaluate import perplexity
from sppctl.evaluate.divergence import Reference, divergence
from sppctl.evaluate.results import TextMeasure, TextNumbers
from sppctl.evaluate.subjects import fingerprint
from sppctl.model import checkpoint

CPU_BATCH, GPU_BATCH = 4, 16  # windows of text


def contents(config: Config) -> dict[str, str]:
    """Identifies the configured texts: a local file by its bytes, any other text by its content."""
    found = {}
    for name in config.eval.perplexity:
        text = texts.file_hash(name)
        found[name] = text or texts.content_hash(texts.load_text(name, "test", "eval.perplexity").documents)
    return found


def wanted(config: Config, window: int, reference: str | None, texts: dict[str, str]) -> list[TextMeasure]:
    """The configured texts, one measure per text.

    Args:
        config: the configuration.
        window: tokens in a window.
        reference: fingerprint of the dense model; None: no comparison.
        texts: of :func:`contents`.
    """
    stride, limit = config.eval.stride, config.eval.max_tokens
    return [TextMeasure(name, window, stride, limit, reference, texts[name]) for name in config.eval.perplexity]


# --- windows ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Windows:
    """A text in windows, and which of them this process computes.

    Attributes:
        tokens: (windows, seq_len), all of them.
        own: (own windows,) their indices; whole batches, so that every window is computed in the company that it has
            in a single process.
        batch_size: windows at a time.
        documents_hash: of the text.
    """

    tokens: Tensor
    own: Tensor
    batch_size: int
    documents_hash: str

    @property
    def key(self) -> str:
        """Identifies the windows and how they are batched."""
        count, seq_len = self.tokens.shape
        step = self.tokens.stride(0)
        text = self.tokens.as_strided(((count - 1) * step + seq_len,), (1,))  # windows may overlap
        digest = hashlib.sha256(text.numpy().tobytes()).hexdigest()
        return f"{digest} {count} {step} {seq_len} {self.batch_size}"


def windows_of(config: Config, tokenizer: Any, measure: TextMeasure, device: torch.device) -> Windows:
    """The windows of a text.

    Args:
        config: the configuration, for the batch size.
        tokenizer: of the model.
        measure: one of :func:`wanted`.
        device: that the model is on.
    """
    text = texts.load_text(measure.text, "test", "eval.perplexity")
    most = [count for count in (measure.max_tokens, text.windows and text.windows * measure.seq_len) if count]
    whole = text.joiner.join(text.documents)
    tokens = perplexity.text_windows(
        tokenizer, whole, measure.seq_len, min(most, default=None), measure.text, measure.stride
    )
    batch_size = _batch_size(config, device, len(tokens))
    batches = torch.arange(len(tokens)).split(batch_size)[distributed.rank() :: distributed.world_size()]
    own = torch.cat(batches) if batches else torch.arange(0)
    return Windows(tokens, own, batch_size, texts.content_hash(text.documents))


def _batch_size(config: Config, device: torch.device, count: int) -> int:
    """As configured; else at most so many that every process has a batch."""
    if config.eval.batch_size != "auto":
        return config.eval.batch_size
    return min(GPU_BATCH if device.type == "cuda" else CPU_BATCH, math.ceil(count / distributed.world_size()))


# --- the dense model --------------------------------------------------------------------------------------------------


class DenseModel:
    """The checkpoint that others are compared with: run once per text, and gone before another model is loaded."""

    def __init__(self, name: str, directory: Path, trust_remote_code: bool, scratch: Path) -> None:
        """Names it; nothing is loaded.

        Args:
            name: as configured.
            directory: of the checkpoint.
            trust_remote_code: whether its own code may run.
            scratch: an existing folder for its hidden states.
        """
        self.name, self.directory, self.trust = name, directory, trust_remote_code
        self.fingerprint = fingerprint(directory)
        self._folder = scratch / f".reference-{distributed.rank()}"
        self._references: dict[tuple[str, str], Reference] = {}

    def predict(self, texts: Iterable[tuple[Windows, str]], device: torch.device) -> None:
        """Runs the model on the windows of this process, each in its dtype, and keeps what it predicts.

        It is loaded once for all texts of a dtype.
        """
        todo = {(dtype, text.key): text for text, dtype in texts}
        if not todo:
            return
        self._folder.mkdir()
        console.note(f"eval: what {self.directory} predicts, to compare others with it")
        for wanted in dict.fromkeys(dtype for dtype, _ in todo):
            model = checkpoint.load_model(self.directory, device, wanted, self.trust, spread=True)
            for number, (key, text) in enumerate(todo.items()):
                if key[0] != wanted:
                    continue
                file = self._folder / f"{number}.bin"
                with console.Progress(f"dense model: text {number + 1} of {len(todo)}", len(text.own)) as bar:
                    own, advance = text.tokens[text.own], partial(bar.advance, "")
                    self._references[key] = Reference(model, own, text.batch_size, file, advance)
            del model
            release()

    def on(self, text: Windows, dtype: torch.dtype) -> Reference | None:
        """Its predictions on the windows of this process, computed in a dtype, if it has made them."""
        return self._references.get((str(dtype).removeprefix("torch."), text.key))

    def close(self) -> None:
        """Removes what was kept."""
        self._references.clear()
        shutil.rmtree(self._folder, ignore_errors=True)


def release() -> None:
    """Frees the memory of models that nobody holds any longer."""
    gc.collect()
    torch.cuda.empty_cache()


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


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(
    config: Config, model: Any, tokenizer: Any, measure: TextMeasure, *, label: str, dense: DenseModel | None
) -> TextNumbers:
    """Perplexity on one text; several processes take batches in turn.

    Args:
        config: the configuration, for what does not change the numbers.
        model: the loaded model.
        tokenizer: its tokenizer.
        measure: one of :func:`wanted`.
        label: of the checkpoint, for progress.
        dense: the model to compare with, which has predicted these windows. Where the measure names no reference, this
            model is itself the dense one, and what it has predicted is not computed again.

    Raises:
        UserError: the dense model has another vocabulary.
        StageError: the model gives no finite logits.
    """
    text = windows_of(config, tokenizer, measure, model.device)
    windows, own, stride = text.tokens, text.own, measure.stride
    scored = perplexity.scored_tokens(len(windows), windows.shape[1], stride)
    known = None if dense is None else dense.on(text, model.dtype)
    compare = hidden = None
    compared_with = None
    if measure.reference is not None:
        assert dense is not None
        assert known is not None
        compare = _comparison(dense, known, model)
        compared_with = None if dense.name == "base" else dense.name
    elif known is not None:
        hidden = known.hidden
    sums = torch.zeros(len(windows), 3, dtype=torch.float64)
    done = 0
    with console.Progress(f"{label}: perplexity of {measure.text}", len(own)) as bar:
        for batch in perplexity.window_sums(model, windows[own], text.batch_size, scored[own], compare, hidden=hidden):
            sums[own[done : done + len(batch)]] = batch
            done += len(batch)
            nll = sums[own[:done], 0].sum() / scored[own[:done]].sum()
            bar.advance(f"{nll.exp().item():.2f}", steps=len(batch))
    if distributed.world_size() > 1:
        shared = sums.to(model.device)  # NCCL adds up on GPUs only
        distributed.all_reduce_sum(shared)
        sums = shared.cpu()
    _check_finite(sums, model, label)
    losses = [round(loss, 4) for loss in sums[:, 0].tolist()]  # of thousands of tokens: enough to pair windows by
    numbers = asdict(perplexity.summarise(sums, windows.shape[1], stride, compare is not None))
    return TextNumbers(**numbers, documents_hash=text.documents_hash, window_nll=losses, compared_with=compared_with)


def _check_finite(sums: Tensor, model: Any, label: str) -> None:
    """An infinite loss is a result, of a bad model; NaN means a broken one."""
    broken = sums.isnan().any(dim=1).nonzero().flatten().tolist()
    if broken:
        dtype = str(model.dtype).removeprefix("torch.")
        raise StageError(
            f"{label}: logits are not finite in window {broken[0] + 1} of {len(sums)} (dtype {dtype}); the weights are "
            f"damaged, or too large for {dtype}"
        )
