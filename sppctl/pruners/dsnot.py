"""DSnoT: a training-free update of a mask (Zhang et al., ICLR 2024, arXiv 2310.08915).

With mu the mean input, a row's expected output moves by eps = -sum of W_j mu_j over its pruned weights. Each cycle
regrows one pruned weight of every row and prunes a kept one in exchange, where that brings eps nearer to zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sppctl.pattern import Pattern
from sppctl.pruners.stats import InputMoments
from sppctl.pruners.wanda import wanda_scores

MAX_CYCLES = 50
# of |eps| per token; the authors' code compares 0.1 with eps summed over the 2,048 tokens of a window
THRESHOLD = 0.1 / 2048
CHUNK_ELEMENTS = 1 << 22


def expected_change(weight: Tensor, mask: Tensor, mean: Tensor) -> Tensor:
    """How far each row's expected output moves by pruning, (out_features,) float32; ``mean`` is that of the inputs."""
    return -(weight.float() * ~mask) @ mean


def update_mask(
    weight: Tensor,
    mask: Tensor,
    statistics: InputMoments,
    pattern: Pattern,
    *,
    max_cycles: int = MAX_CYCLES,
    threshold: float = THRESHOLD,
) -> Tensor:
    """Swaps kept and pruned weights row by row; the sparsity of every row and a valid N:M never change.

    The weight to regrow is the pruned one with the largest contribution against the sign of eps, divided by its input's
    variance; the one to prune is the kept one with the smallest Wanda score (in the same group of M for N:M) among
    those that leave \\|eps\\| smaller than it was. So \\|eps\\| falls with every swap. A dropped weight, or one
    without a partner to drop, is not regrown; a failed attempt counts as a cycle.

    Args:
        weight: (out_features, in_features) dense weight.
        mask: the mask to start from, of any method; a new one is returned.
        statistics: of the layer's inputs.
        pattern: decides within which weights a swap may happen.
        max_cycles: maximum number of swaps and failed attempts per row.
        threshold: rows whose \\|eps\\| per token does not exceed this are left unchanged.
    """
    step = max(1, CHUNK_ELEMENTS // weight.shape[1])
    parts = zip(weight.split(step), mask.split(step), strict=True)
    return torch.cat([_update_rows(w.float(), m, statistics, pattern, max_cycles, threshold) for w, m in parts])


def _update_rows(
    weight: Tensor, mask: Tensor, statistics: InputMoments, pattern: Pattern, max_cycles: int, threshold: float
) -> Tensor:
    mask = mask.clone()
    contribution = weight * statistics.mean()
    gain = contribution / statistics.variance().clamp_min(1e-12)
    score = wanda_scores(weight, statistics)
    change = expected_change(weight, mask, statistics.mean())
    blocked = torch.zeros_like(mask)  # not to be regrown
    row = torch.arange(len(weight), device=weight.device)
    width = pattern.group or weight.shape[1]
    members = torch.arange(width, device=weight.device)
    for _ in range(max_cycles):
        candidates = (-change.sign().unsqueeze(1) * gain).masked_fill(mask | blocked, -torch.inf)
        best, grown = candidates.max(dim=1)
        active = (change.abs() > threshold) & (best > 0)
        if not active.any():
            break
        group = (grown // width * width).unsqueeze(1) + members
        remaining = (change + contribution[row, grown]).unsqueeze(1) - contribution.gather(1, group)
        allowed = mask.gather(1, group) & (remaining.abs() < change.abs().unsqueeze(1))
        cheapest, place = score.gather(1, group).masked_fill(~allowed, torch.inf).min(dim=1)
        swaps = active & torch.isfinite(cheapest)
        blocked[row[active & ~swaps], grown[active & ~swaps]] = True
        swapped, dropped = row[swaps], group[row, place][swaps]
        mask[swapped, grown[swaps]] = True
        mask[swapped, dropped] = False
        blocked[swapped, dropped] = True  # a dropped weight is not regrown
        change = torch.where(swaps, remaining[row, place], change)
    return mask
