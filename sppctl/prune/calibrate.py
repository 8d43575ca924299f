"""The calibration windows of a run, drawn once by the checks and used by the pruning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sppctl.config.settings import Config, PruneConfig
from sppctl.data import texts
from sppctl.data.calibration import calibration_windows
from sppctl.files import sources
from sppctl.records import Calibration


@dataclass(frozen=True)
class Drawn:
    """Calibration windows."""

    tokens: Tensor  # (samples, seq_len) int64
    record: Calibration  # of these windows
    tokenizer: Any  # that produced their tokens


def calibration_text(prune: PruneConfig) -> texts.Text:
    """The configured text, or only its beginning where that is enough."""
    settings = prune.calibration
    column = None if settings.column == "auto" else settings.column
    texts.check_split("prune.calibration.split", settings.split, settings.dataset)
    return texts.load_text(settings.dataset, settings.split, "prune.calibration.dataset", column, part=True)


def draw(config: Config, tokenizer: Any) -> Drawn:
    """Calibration windows as configured.

    Raises:
        UserError: the text could not be loaded, or is too short.
    """
    settings = config.prune.calibration
    with sources.noting() as noted:
        text = calibration_text(config.prune)
    sizes = {"samples": settings.samples, "seq_len": settings.seq_len}
    windows = calibration_windows(tokenizer, text, seed=config.run.seed, windows=settings.windows, **sizes)
    record = Calibration(
        dataset=text.name,
        windows=windows.kind,
        documents_hash=texts.content_hash(text.documents),
        windows_hash=windows.hash,
        versions=noted.versions,
        **sizes,
    )
    return Drawn(windows.tokens, record, tokenizer)
