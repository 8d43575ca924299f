"""The calibration windows of a run: the checks before it load the text and draw them, the pruning takes them over."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sppctl.config.settings import Config, PruneConfig
from sppctl.data import texts
from sppctl.data.calibration import calibration_windows
from sppctl.files import cache, sources

# of the last call alone: loading a text again may mean another download
_last: dict[tuple[Any, ...], tuple[Tensor, dict[str, Any]]] = {}


def calibration_text(prune: PruneConfig) -> texts.Text:
    """The text that the configuration names, or its beginning where that will do.

    Raises:
        UserError: it cannot be had.
    """
    settings = prune.calibration
    column = None if settings.column == "auto" else settings.column
    texts.check_split(settings.dataset, settings.split, "prune.calibration.split")
    return texts.load_text(settings.dataset, settings.split, "prune.calibration.dataset", column, part=True)


def windows_of(config: Config, tokenizer: Any) -> tuple[Tensor, dict[str, Any]]:
    """Calibration windows (samples, seq_len), and what is recorded of them.

    Raises:
        UserError: the text cannot be had, or is too short.
    """
    settings, seed = config.prune.calibration, config.run.seed
    key = (settings, seed, texts.file_hash(settings.dataset), cache.tokenizer_identity(tokenizer) or object())
    if key not in _last:
        with sources.noting() as seen:
            text = calibration_text(config.prune)
        windows = calibration_windows(
            tokenizer,
            text,
            samples=settings.samples,
            seq_len=settings.seq_len,
            seed=seed,
            windows=settings.windows,
        )
        source = {"dataset": text.name, "windows": windows.made, "documents_hash": texts.content_hash(text.documents)}
        shape = {"samples": settings.samples, "seq_len": settings.seq_len, "windows_hash": windows.hash}
        _last.clear()
        _last[key] = windows.tokens, source | shape | {"versions": seen.versions}
    return _last[key]
