"""Orders of a layer's inputs in which N:M pruning loses less: channel permutation.

The idea is that of Pool and Yu (NeurIPS 2021, "Channel Permutations for N:M Sparsity"); that one channel of every
group can be exchanged optimally by linear assignment, that of RIA (Zhang et al., ICLR 2024).
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sppctl.pattern import Pattern

SWEEPS = 8  # at most, over the M places of every group
GAIN = 1e-3  # of what is lost: a sweep that gains less is the last one
LAYER_ROWS = 1024  # of a layer, by which its order is found


def lost(losses: Tensor, pattern: Pattern) -> float:
    """The sum of what N:M pruning loses, of the losses (rows, channels) of single weights."""
    keep, groups = _groups(losses, pattern)
    return (losses.sum(dtype=torch.float64) - groups.topk(keep, dim=-1).values.sum(dtype=torch.float64)).item()


def best_order(losses: Tensor, pattern: Pattern, num_rows: int = LAYER_ROWS) -> Tensor:
    """An order of the channels in which N:M pruning loses less, or at least not more.

    It starts with channels of every importance in each group. Then the channels in the first place of all groups are
    assigned to the groups anew, then those in the second place, and so on, until a sweep gains no more. With b the Nth
    largest loss in a row of a group's other channels, a channel with loss d raises what the row keeps by
    max(0, d - b) = (|d - b| + d - b) / 2. In the sum over all channels only the absolute differences depend on the
    assignment, so the best one has the greatest L1 distance in total.

    At last the groups are sorted, those with the greatest losses first: SparseGPT goes from left to right, and can
    spread the error of a column only over those to its right.

    Args:
        losses: (rows, channels) float32, not negative: what is lost if a single weight is pruned.
        pattern: N:M; M divides the number of channels.
        num_rows: of about how many rows the order is found; it is compared on all.

    Returns:
        (channels,) int64 on the CPU: ``losses[:, order]`` has the groups.
    """
    seen, identity = losses[:: -(-len(losses) // num_rows)], torch.arange(losses.shape[1], device=losses.device)
    order = min((identity, _dealt(seen, pattern)), key=lambda order: lost(seen[:, order], pattern))
    before = lost(seen[:, order], pattern)
    for _ in range(SWEEPS):
        order = _exchange(seen, order, pattern)
        after = lost(seen[:, order], pattern)
        if before - after <= GAIN * before:
            break
        before = after
    if lost(losses[:, order], pattern) >= lost(losses, pattern):
        order = identity
    _, groups = _groups(losses[:, order], pattern)
    falling = groups.sum(dim=(0, 2)).argsort(descending=True, stable=True)
    return order.view(len(falling), -1)[falling].reshape(-1).cpu()


def _groups(losses: Tensor, pattern: Pattern) -> tuple[int, Tensor]:
    """N, and the losses (rows, groups, M)."""
    assert pattern.keep is not None
    assert pattern.group is not None
    return pattern.keep, losses.reshape(len(losses), -1, pattern.group)


def _dealt(losses: Tensor, pattern: Pattern) -> Tensor:
    """The channels dealt to the groups like cards, those with the greatest losses first."""
    ranked = losses.sum(dim=0).argsort(descending=True, stable=True)
    return ranked.view(pattern.group or 0, -1).t().reshape(-1)


def _exchange(losses: Tensor, order: Tensor, pattern: Pattern) -> Tensor:
    """One sweep: in each place in turn, the groups' channels are assigned to the groups anew."""
    places = order.view(-1, pattern.group or 0).clone()  # (groups, M)
    for place in range(places.shape[1]):
        keep, groups = _groups(losses[:, places.reshape(-1)], pattern)
        others = [other for other in range(places.shape[1]) if other != place]
        thresholds = groups[..., others].topk(keep, dim=-1).values[..., -1]
        distances = torch.cdist(thresholds.t().contiguous(), groups[..., place].t().contiguous(), p=1)
        _, chosen = linear_sum_assignment(distances.cpu().numpy(), maximize=True)
        places[:, place] = places[torch.from_numpy(chosen).to(places.device), place]
    return places.reshape(-1)
