"""Configuration of full tuning under the fixed mask."""

from __future__ import annotations

from dataclasses import dataclass

from sppctl.adapters.config import Method, SparseConfig


@dataclass
class MaskedFullConfig(SparseConfig):
    """Configuration of masked full tuning: only the layers, selected as in :class:`SparseConfig`."""

    method = Method.MASKED_FULL
