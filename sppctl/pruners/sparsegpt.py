"""SparseGPT: pruning that compensates the error with the remaining weights (Frantar, Alistarh 2023, 2301.00774)."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from sppctl.fused import FusedKernels
from sppctl.pattern import Pattern
from sppctl.pruners.masks import keep_largest, keep_largest_in_groups
from sppctl.pruners.stats import Hessian
from sppctl.pruners.wanda import wanda_scores

TILE = 16  # columns solved one by one before the rest of their block is updated by one product
MAX_GROUP = 1024  # the largest M, or common multiple of several, for which a GPU kernel keeps its columns in registers


def prune_sparsegpt(
    weights: list[Tensor],
    statistics: Hessian,
    patterns: list[Pattern],
    masks: list[Tensor] | None = None,
    *,
    damp: float = 0.01,
    block_size: int = 128,
    keep_zeros: bool = False,
    act_order: bool = False,
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
        damp: share of the mean Hessian diagonal added to the diagonal; inputs that never fired are not in the mean.
        block_size: columns updated lazily together; rounded up to a multiple of every M.
        keep_zeros: zeros are pruned first and never kept, so rows and groups that have more of them stay sparser.
        act_order: the columns are solved in the order of :func:`act_order_of`; the result has the given one.

    Returns:
        The pruned weights (same shapes and dtypes), and the damping that the factorisation needed.

    Raises:
        ValueError: the Hessian cannot be factorised, or ``damp`` is not positive and finite.
    """
    if block_size < 1:
        raise ValueError(f"block_size = {block_size} is not a positive number of columns")
    if act_order:
        order = act_order_of(weights, statistics, math.lcm(*(pattern.group or 1 for pattern in patterns)))
        pruned, damp = prune_sparsegpt(
            [weight[:, order] for weight in weights],
            statistics.reordered(order),
            patterns,
            None if masks is None else [mask[:, order] for mask in masks],
            damp=damp,
            block_size=block_size,
            keep_zeros=keep_zeros,
        )
        back = order.argsort()
        return [weight[:, back] for weight in pruned], damp
    factor, dead, damp = statistics.inverse_factor(damp)
    work = torch.cat([weight.float() for weight in weights])
    scale = factor.diagonal().masked_fill(dead, torch.inf)
    fused, block_size, tile = _sizes(work, patterns, block_size)
    layers = _row_slices(weights)
    kept = torch.empty_like(work, dtype=torch.bool) if masks is None else torch.cat(masks)
    choices = list(zip(layers, patterns, strict=True)) if masks is None else []
    zeros = work == 0 if keep_zeros else None
    if zeros is not None and masks is not None:
        kept &= ~zeros
    for start in range(0, work.shape[1], block_size):
        columns = slice(start, min(start + block_size, work.shape[1]))
        part = work[:, columns], factor[columns, columns], scale[columns], kept[:, columns]
        errors = _Block(*part, choices, None if zeros is None else zeros[:, columns], fused).solve(tile)
        work[:, columns.stop :].addmm_(errors, factor[columns, columns.stop :], alpha=-1)
    # the mask decides, not the value: rounding may make a kept weight zero, never a pruned one non-zero
    work.masked_fill_(~kept, 0)
    return [work[rows].to(weight.dtype) for rows, weight in zip(layers, weights, strict=True)], damp


def act_order_of(weights: list[Tensor], statistics: Hessian, group: int) -> Tensor:
    """The columns in groups of ``group``, by falling sums of Wanda's scores squared: (in_features,) int64."""
    costs = torch.stack([wanda_scores(weight, statistics).square().sum(dim=0) for weight in weights]).sum(dim=0)
    groups = costs.view(-1, group).sum(dim=1).argsort(descending=True, stable=True)
    return torch.arange(len(costs), device=costs.device).view(-1, group)[groups].flatten()


def _sizes(work: Tensor, patterns: list[Pattern], block_size: int) -> tuple[ModuleType | None, int, int]:
    """The GPU's kernels, if they are used, and the columns of a block and of a tile, rounded up to every M."""
    group = math.lcm(*(pattern.group or 1 for pattern in patterns))
    fused = KERNELS.usable(work) if group <= MAX_GROUP else None
    tile = fused.COLUMNS if fused else TILE
    return fused, -(-block_size // group) * group, -(-tile // group) * group


def _row_slices(weights: list[Tensor]) -> list[slice]:
    """The rows of each layer, where all are put together."""
    stops = itertools.accumulate(len(weight) for weight in weights)
    return [slice(stop - len(weight), stop) for stop, weight in zip(stops, weights, strict=True)]


@dataclass(frozen=True)
class _Block:
    """Some columns of all layers, solved in place."""

    work: Tensor  # (rows, columns) weights, float32
    upper: Tensor  # (columns, columns) of the factor
    scale: Tensor  # (columns,) its diagonal; infinite for inputs that never fired
    kept: Tensor  # (rows, columns) the mask
    choices: list[tuple[slice, Pattern]]  # rows whose mask is to be chosen, and how
    zeros: Tensor | None  # (rows, columns) weights that must stay zero
    fused: ModuleType | None  # triton_kernels, if they solve the tiles

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
            columns, rest = slice(start, stop), slice(stop, self.work.shape[1])
            if self.fused is None:
                self._solve_tile(columns, errors)
            else:
                tensors = (self.work, self.kept, errors, self.zeros)
                parts = (None if tensor is None else tensor[:, columns] for tensor in tensors)
                self.fused.solve(*parts, self.upper[columns, columns], self.scale[columns], self.choices)
            self.work[:, rest].addmm_(errors[:, columns], self.upper[columns, rest], alpha=-1)
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


def check(kernels: ModuleType, device: torch.device | str) -> None:
    """Raises AssertionError if the kernels' zeros or values differ from those of PyTorch's operations on a CPU.

    Args:
        kernels: ``triton_kernels``.
        device: where they run.
    """
    generator = torch.Generator().manual_seed(0)
    work, upper = (torch.randn(size, 24, generator=generator) for size in (37, 24))
    work[0, :4] = 1  # equal scores
    work[1, 4:7] = 0
    upper = torch.eye(24) + upper.triu(1) / 8
    scale = upper.diagonal().clone().index_fill_(0, torch.tensor([7, 20]), torch.inf)
    choices = [(slice(0, 20), Pattern(keep=2, group=4)), (slice(20, 37), Pattern(ratio=0.5))]
    results = []
    for place, fused in ((torch.device("cpu"), None), (device, kernels)):
        own = work.to(place, copy=True)
        block = _Block(own, upper.to(place), scale.to(place), torch.empty_like(own) > 0, choices, own == 0, fused)
        results.append([tensor.cpu() for tensor in (block.solve(TILE), own, block.kept)])
    (*expected, expected_mask), (*values, mask) = results
    assert torch.equal(mask, expected_mask), "the kernel's zeros differ from those of the CPU"
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-4)


KERNELS = FusedKernels("sppctl.pruners.triton_kernels", check, "SparseGPT prunes without its GPU kernel, more slowly")
