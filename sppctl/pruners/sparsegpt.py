"""SparseGPT: pruning that compensates the error with the remaining weights (Frantar, Alistarh 2023, 2301.00774)."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sppctl.pattern import Pattern
from sppctl.pruners.masks import keep_largest, keep_largest_in_groups
from sppctl.pruners.stats import Hessian

TILE = 16  # columns solved one by one before the rest of their block is updated by one product


def prune_sparsegpt(
    weights: list[Tensor],
    statistics: Hessian,
    patterns: list[Pattern],
    masks: list[Tensor] | None = None,
    *,
    damp: float = 0.01,
    block_size: int = 128,
    keep_zeros: bool = False,
) -> tuple[list[Tensor], float]:
    """Solves layers that share their inputs, column by column (Algorithm 1 of the paper), their rows together.

    Each layer's mask is chosen by itself, per block of ``block_size`` columns over all its rows (ratio) or per group of
    M (N:M), by w^2 / [U_jj]^2 on the weights as updated so far; the error of each column is spread over the columns to
    its right. Weights of inputs that never fired are pruned first, and cost nothing if kept.

    Args:
        weights: (out_features, in_features) of each layer, any float dtype; computed in float32.
        statistics: second moment of their shared inputs.
        patterns: of each layer; a ratio is that of zeros in every block of columns.
        masks: of each layer, True = kept; None chooses them.
        damp: share of the mean Hessian diagonal added to the diagonal.
        block_size: columns updated lazily together; rounded up to a multiple of every M.
        keep_zeros: weights that are zero are pruned first and never kept, so a row or group that has more of them than
            the pattern asks for stays sparser.

    Returns:
        The pruned weights (same shapes and dtypes), and the damping that the factorisation needed.

    Raises:
        ValueError: the Hessian cannot be factorised.
    """
    factor, dead, damp = statistics.inverse_factor(damp)
    work = torch.cat([weight.float() for weight in weights])
    scale = factor.diagonal().masked_fill(dead, torch.inf)
    group = math.lcm(*(pattern.group or 1 for pattern in patterns))
    block_size, tile = (-(-size // group) * group for size in (block_size, TILE))
    stops = itertools.accumulate(len(weight) for weight in weights)
    layers = [slice(stop - len(weight), stop) for stop, weight in zip(stops, weights, strict=True)]
    kept = torch.empty_like(work, dtype=torch.bool) if masks is None else torch.cat(masks)
    choices = list(zip(layers, patterns, strict=True)) if masks is None else []
    zeros = work == 0 if keep_zeros else None
    if zeros is not None and masks is not None:
        kept &= ~zeros
    for start in range(0, work.shape[1], block_size):
        columns = slice(start, min(start + block_size, work.shape[1]))
        part = work[:, columns], factor[columns, columns], scale[columns], kept[:, columns]
        errors = _Block(*part, choices, None if zeros is None else zeros[:, columns]).solve(tile)
        work[:, columns.stop :].addmm_(errors, factor[columns, columns.stop :], alpha=-1)
    # the mask decides, not the value: rounding may make a kept weight zero, never a pruned one non-zero
    work.masked_fill_(~kept, 0)
    return [work[rows].to(weight.dtype) for rows, weight in zip(layers, weights, strict=True)], damp


@dataclass(frozen=True)
class _Block:
    """Some columns of all layers, solved in place."""

    work: Tensor  # (rows, columns) weights, float32
    upper: Tensor  # (columns, columns) of the factor
    scale: Tensor  # (columns,) its diagonal; infinite for inputs that never fired
    kept: Tensor  # (rows, columns) the mask
    choices: list[tuple[slice, Pattern]]  # rows whose mask is to be chosen, and how
    zeros: Tensor | None  # (rows, columns) weights that must stay zero

    def solve(self, tile: int) -> Tensor:
        """Prunes the columns; returns their scaled errors (rows, columns)."""
        for rows, pattern in self.choices:
            if not pattern.is_structured:
                scores = self._without_zeros((self.work[rows] / self.scale).square(), rows, slice(None))
                mask = keep_largest(scores.reshape(1, -1), pattern.num_pruned(scores.numel()))
                self.kept[rows] = mask.view(scores.shape) & (scores >= 0)
        errors = torch.empty_like(self.work)
        for start in range(0, self.work.shape[1], tile):
            stop = min(start + tile, self.work.shape[1])
            self._solve_tile(slice(start, stop), errors)
            rest = slice(stop, self.work.shape[1])
            self.work[:, rest].addmm_(errors[:, start:stop], self.upper[start:stop, rest], alpha=-1)
        return errors

    def _without_zeros(self, scores: Tensor, rows: slice, columns: slice) -> Tensor:
        """The scores (rows, columns), none of which is negative, with -1 for weights that must stay zero."""
        return scores if self.zeros is None else scores.masked_fill_(self.zeros[rows, columns], -1)

    def _solve_tile(self, columns: slice, errors: Tensor) -> None:
        # a column-major copy: every column is contiguous
        tile = self.work[:, columns].t().contiguous()
        tile_errors = torch.empty_like(tile)
        for column in range(columns.start, columns.stop):
            place = column - columns.start
            for rows, pattern in self.choices:
                if pattern.keep is not None and pattern.group is not None and column % pattern.group == 0:
                    group = slice(place, place + pattern.group)
                    places = slice(column, column + pattern.group)
                    scores = (tile[group, rows].t() / self.scale[places]).square().contiguous()
                    scores = self._without_zeros(scores, rows, places)
                    mask = keep_largest_in_groups(scores, pattern.keep, pattern.group)
                    self.kept[rows, places] = mask & (scores >= 0)
            error = torch.div(tile[place], self.upper[column, column], out=tile_errors[place])
            error.masked_fill_(self.kept[:, column], 0)
            tile[place:].addr_(self.upper[column, column : columns.stop], error, alpha=-1)
        errors[:, columns] = tile_errors.t()
        self.work[:, columns] = tile.t()
