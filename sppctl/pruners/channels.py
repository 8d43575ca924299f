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
ROWS = 1024  # that the exchange looks at; the result is compared on all


def lost(losses: Tensor, pattern: Pattern) -> float:
    """The sum of what N:M pruning loses, of the losses (rows, channels) of single weights."""
    keep, groups = _groups(losses, pattern)
    return (losses.sum(dtype=torch.float64) - groups.topk(keep, dim=-1).values.sum(dtype=torch.float64)).item()


def best_order(losses: Tensor, pattern: Pattern) -> Tensor:
    """An order of the channels in which N:M pruning loses less; the one that they have, if no better one is found.

    It starts with channels of every importance in each group. Then the channels in the first place of all groups are
    assigned to the groups anew, then those in the second place, and so on, until a sweep gains no more. With b the Nth
    largest loss in a row of a group's other channels, a channel with loss d raises what the row keeps by
    max(0, d - b) = (\\|d - b\\| + d - b) / 2. In the sum over all channels only the absolute differences depend on the
    assignment, so the best one has the greatest L1 distance in total.

    Args:
        losses: (rows, channels) float32, not negative: what is lost if a single weight is pruned.
        pattern: N:M; M divides the number of channels.

    Returns:
        (channels,) int64 on the CPU: ``losses[:, order]`` has the groups.
    """
    seen = losses[:: -(-len(losses) // ROWS)]
    orders = [torch.arange(losses.shape[1]), _dealt(seen, pattern)]
    order = min(orders, key=lambda order: lost(seen[:, order.to(seen.device)], pattern))
    before = lost(seen[:, order.to(seen.device)], pattern)
    for _ in range(SWEEPS):
        order = _exchange(seen, order, pattern)
        after = lost(seen[:, order.to(seen.device)], pattern)
        if before - after <= GAIN * before:
            break
        before = after
    is_better = lost(losses[:, order.to(losses.device)], pattern) < lost(losses, pattern)
    return order if is_better else orders[0]


def _groups(losses: Tensor, pattern: Pattern) -> tuple[int, Tensor]:
    """N, and the losses (rows, groups, M)."""
    assert pattern.keep is not None
    assert pattern.group is not None
    return pattern.keep, losses.reshape(len(losses), -1, pattern.group)


def _dealt(losses: Tensor, pattern: Pattern) -> Tensor:
    """The channels dealt to the groups like cards, those with the greatest losses first."""
    ranked = losses.sum(dim=0).argsort(descending=True, stable=True).cpu()
    return ranked.view(pattern.group or 0, -1).t().reshape(-1)


def _exchange(losses: Tensor, order: Tensor, pattern: Pattern) -> Tensor:
    """One sweep: in each place in turn, the groups' channels are assigned to the groups anew."""
    places = order.view(-1, pattern.group or 0).clone()  # (groups, M)
    for place in range(places.shape[1]):
        keep, groups = _groups(losses[:, places.reshape(-1).to(losses.device)], pattern)
        others = [other for other in range(places.shape[1]) if other != place]
        thresholds = groups[..., others].topk(keep, dim=-1).values[..., -1]
        distances = torch.cdist(thresholds.t().contiguous(), groups[..., place].t().contiguous(), p=1)
        _, chosen = linear_sum_assignment(distances.cpu().numpy(), maximize=True)
        places[:, place] = places[chosen, place]
    return places.reshape(-1)
