"""Sparsity patterns: a ratio of zeros, or N:M with N weights KEPT in every M consecutive input features."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Pattern:
    """A sparsity pattern in one of two forms: a ratio, or N:M."""

    ratio: float | None = None  # share of weights set to zero, 0 < ratio < 1 (unstructured)
    keep: int | None = None  # N of N:M, the weights kept in each group
    group: int | None = None  # M of N:M, the consecutive input features that form a group

    @classmethod
    def parse(cls, value: object) -> Pattern:
        """Reads ``"2:4"``, ``0.5`` or ``"0.5"``.

        Raises:
            ValueError: the value is neither a ratio between 0 and 1 nor N:M with 0 < N < M.
        """
        if isinstance(value, Pattern):
            return value
        if isinstance(value, str) and (match := re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", value)):
            keep, group = int(match[1]), int(match[2])
            if not 0 < keep < group:
                raise ValueError(f"pattern {value!r}: N:M keeps N of every M weights, so 0 < N < M (2:4, 4:8)")
            return cls(keep=keep, group=group)
        invalid = ValueError(f"pattern {value!r} is neither N:M (2:4) nor a ratio of zeros (0.5)")
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise invalid
        try:
            ratio = float(value)
        except ValueError:
            raise invalid from None
        if not 0 < ratio < 1:
            raise ValueError(f"pattern {value!r}: a ratio is the share of zeros, between 0 and 1 (0.5 = half of them)")
        return cls(ratio=ratio)

    @property
    def is_structured(self) -> bool:
        """True for N:M."""
        return self.group is not None

    @property
    def sparsity(self) -> float:
        """The share of zeros this pattern asks for."""
        if self.keep is not None and self.group is not None:
            return 1 - self.keep / self.group
        assert self.ratio is not None
        return self.ratio

    def num_pruned(self, count: int) -> int:
        """How many of ``count`` weights that are compared with each other become zero."""
        return int(count * self.sparsity + 1e-9)  # 100 * 0.29 is 28.999999999999996

    def check_in_features(self, in_features: int, layer: str) -> None:
        """Raises ValueError if ``in_features`` is not a multiple of M; ``layer`` names the layer."""
        if self.group is not None and in_features % self.group:
            raise ValueError(
                f"pattern {self}: {layer} has {in_features} input features, not a multiple of {self.group}; "
                "choose another pattern or leave the layer out of prune.targets"
            )

    def __str__(self) -> str:
        return f"{self.keep}:{self.group}" if self.is_structured else str(self.ratio)
