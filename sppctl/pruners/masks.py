"""From scores to boolean masks of the same shape, with exact counts. In every mask True means kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sppctl.pattern import Pattern

CHUNK_ELEMENTS = 1 << 24
CPU_CHUNK = 1 << 18


def keep_largest(scores: Tensor, num_pruned: int) -> Tensor:
    """Prunes the ``num_pruned`` smallest scores of each row (rows, columns); among equal scores, the first ones."""
    if num_pruned == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    mask = torch.empty_like(scores, dtype=torch.bool)
    step = max(1, CHUNK_ELEMENTS // scores.shape[-1])
    for start in range(0, scores.shape[0], step):
        part = scores[start : start + step]
        threshold = part.kthvalue(num_pruned, dim=-1, keepdim=True).values
        smaller, equal = part < threshold, part == threshold
        missing = num_pruned - smaller.sum(-1, keepdim=True)
        mask[start : start + step] = ~(smaller | (equal & (equal.cumsum(-1) <= missing)))
    # NaN is neither smaller nor equal
    assert int(mask.sum()) == mask.numel() - num_pruned * scores.shape[0], "scores that are not finite"
    return mask


def keep_largest_of_rows(scores: Tensor, num_pruned: Tensor) -> Tensor:
    """As :func:`keep_largest`, with a number per row, (rows,) int64."""
    mask = torch.empty_like(scores, dtype=torch.bool)
    places = torch.arange(scores.shape[-1], device=scores.device)
    step = max(1, CHUNK_ELEMENTS // scores.shape[-1])
    for start in range(0, scores.shape[0], step):
        order = scores[start : start + step].argsort(dim=-1, stable=True)
        mask[start : start + step].scatter_(-1, order, places >= num_pruned[start : start + step, None])
    return mask


def keep_largest_in_groups(scores: Tensor, keep: int, group: int) -> Tensor:
    """Keeps the ``keep`` largest of every ``group`` consecutive scores of a row (N:M = keep:group).

    A score's rank is counted against the others of its group, for all groups at once; among equal scores the later
    is kept. (rows, columns), columns a multiple of ``group``.
    """
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    # one plane per position in the group: contiguous to compare, and few enough at a time for a CPU's cache
    chunk = CPU_CHUNK if scores.device.type == "cpu" else CHUNK_ELEMENTS // group
    step = max(1, chunk // scores.shape[1])
    for start in range(0, scores.shape[0], step):
        part = scores[start : start + step]
        planes = part.reshape(-1, group).t().contiguous()
        ranks = _ranks_in_pairs(planes) if scores.device.type == "cpu" else _ranks_at_once(planes)
        mask[start : start + step] = (ranks >= group - keep).t().reshape(part.shape)
    return mask


def _ranks_in_pairs(planes: Tensor) -> Tensor:
    """The number of scores of its group below each of (group, columns), one pair of planes after the other."""
    # the smallest dtype that holds every rank: each pass reads and writes as few bytes as possible
    dtype = torch.uint8 if len(planes) <= 1 << 8 else torch.int16 if len(planes) <= 1 << 15 else torch.int32
    ranks = torch.zeros(planes.shape, dtype=dtype, device=planes.device)
    for place in range(len(planes)):
        for later in range(place + 1, len(planes)):
            below = planes[later] < planes[place]
            ranks[place] += below
            ranks[later] += below.logical_not_()
    return ranks


def _ranks_at_once(planes: Tensor) -> Tensor:
    """As :func:`_ranks_in_pairs`, in a few operations: for a GPU their number counts, not their size."""
    below = planes < planes.unsqueeze(1)  # of each (first) those (second) that are below it
    later = torch.ones(below.shape[:2], dtype=torch.bool, device=planes.device).triu_().unsqueeze(2)
    return torch.where(later, below, ~below.transpose(0, 1)).sum(1)


def mask_by_row(scores: Tensor, pattern: Pattern) -> Tensor:
    """The mask of a pattern; a ratio prunes ``floor(in_features * ratio)`` of each row (out_features, in_features)."""
    if pattern.keep is not None and pattern.group is not None:
        return keep_largest_in_groups(scores, pattern.keep, pattern.group)
    return keep_largest(scores, pattern.num_pruned(scores.shape[1]))


def shortfall(weight: Tensor, pattern: Pattern) -> str:
    """How a weight, or a mask, fails to have the zeros of a pattern; empty if it has them, or more."""
    if pattern.is_structured and not holds(weight, pattern):
        return f"is not {pattern}"
    zeros = weight.numel() - int(weight.count_nonzero())
    if zeros < weight.numel() * pattern.sparsity - rounding(weight.shape):
        return f"is not {pattern}: its share of zeros is {zeros / weight.numel():.4g}"
    return ""


def rounding(shape: Sequence[int]) -> int:
    """Tolerated difference in zeros: methods round the count down in every row, or every block of columns."""
    return max(shape)


def holds(weight: Tensor, pattern: Pattern) -> bool:
    """Whether every M consecutive weights of a row, or kept ones of a mask, have at most N that are not zero."""
    assert pattern.keep is not None
    assert pattern.group is not None
    if weight.shape[-1] % pattern.group:
        return False
    chunk = CPU_CHUNK if weight.device.type == "cpu" else CHUNK_ELEMENTS
    rows = weight.reshape(-1, weight.shape[-1]).split(max(1, chunk // weight.shape[-1]))
    groups = ((part != 0).unflatten(-1, (-1, pattern.group)) for part in rows)
    return all(bool((group.sum(-1) <= pattern.keep).all()) for group in groups)
