"""How a ratio of zeros is distributed over blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

OWL_OUTLIER = 5.0  # M of the paper: an outlier's score exceeds M times the mean score of its block
MEAN_TOLERANCE = 0.005  # between the common ratio and the mean of those of the blocks
OWL_RANGE = 0.08  # lambda of the paper: a block's ratio is within +- lambda of the requested one


def outlier_share(scores: list[Tensor], outlier: float = OWL_OUTLIER) -> float:
    """Share of a block's weights whose Wanda score exceeds ``outlier`` times the mean score of the block.

    The paper's "layer" is a transformer block: its matrices (out_features, in_features) are compared with one mean,
    over all their weights.
    """
    size = sum(score.numel() for score in scores)
    mean = sum(score.sum(dtype=torch.float64).item() for score in scores) / size
    return sum(int((score > outlier * mean).sum()) for score in scores) / size


@dataclass(frozen=True)
class Allocation:
    """A way of distributing a ratio of zeros over the blocks of a model."""

    # the Wanda scores (out_features, in_features) of the matrices of a dense block -> a number for the block
    measure: Callable[[list[Tensor]], float]
    # these numbers, the blocks' numbers of weights, the common ratio, and options -> a ratio in (0, 1) for each block
    ratios: Callable[..., list[float]]
    options: tuple[str, ...] = ()  # names of keys of ``prune``, which are passed by name


def check_ratios(ratios: list[float], sizes: list[int], ratio: float) -> None:
    """Raises ValueError unless there is a ratio in (0, 1) for each block, and their mean over all weights is right."""
    if len(ratios) != len(sizes) or not all(0 < value < 1 for value in ratios):
        raise ValueError(f"the allocation gives {ratios} for {len(sizes)} blocks; each needs a ratio in (0, 1)")
    mean = sum(value * size for value, size in zip(ratios, sizes, strict=True)) / sum(sizes)
    if abs(mean - ratio) > MEAN_TOLERANCE:
        raise ValueError(f"the mean of the allocation's ratios over all weights is {mean:.4g}, expected {ratio:g}")


def owl(shares: list[float], weights: list[int], ratio: float, owl_lambda: float = OWL_RANGE) -> list[float]:
    """Outlier-weighed layer-wise ratios, one for each block (OWL, Yin et al., ICML 2024, arXiv 2310.05175).

    Blocks with more outliers (``shares``) are pruned less; the ratios span ``2 owl_lambda``; their
    mean over all ``weights``, the number in each block, is ``ratio``.

    Raises:
        ValueError: a ratio would leave the open interval (0, 1).
    """
    share, size = torch.tensor(shares, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)
    width = (share.max() - share.min()).item()
    scaled = (share - share.min()) / width * 2 * owl_lambda if width > 0 else torch.zeros_like(share)
    ratios: list[float] = (ratio - (scaled - (scaled * size).sum() / size.sum())).tolist()
    if not all(0 < value < 1 for value in ratios):
        raise ValueError(
            f"OWL with a spread of {owl_lambda:g} round {ratio:g} gives ratios outside (0, 1); lower the spread"
        )
    return ratios


ALLOCATIONS = {"owl": Allocation(outlier_share, owl, ("owl_lambda",))}
