"""Dropout on a branch's input whose mask is drawn again from its seed in the backward pass instead of being kept."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SPARE_DRAWS = 6  # of the gaps, in standard deviations of their number


def dropped_places(x: Tensor, dropout: float, seed: int) -> Tensor:
    """Where a Bernoulli mask zeroes x, seen flat; the same seed gives the same places.

    Returns:
        int64 positions on a CPU, where a draw for each zero is cheaper than one for each element: the gaps between the
        zeros are geometric. On a GPU a boolean mask (elements,).
    """
    size = x.numel()
    generator = torch.Generator(x.device).manual_seed(seed)
    if x.device.type != "cpu":
        return torch.empty(size, dtype=torch.bool, device=x.device).bernoulli_(dropout, generator=generator)
    draws = 16 + int(size * dropout + SPARE_DRAWS * math.sqrt(size * dropout))
    found, last = [], -1
    while last < size:
        uniform = torch.rand(draws, generator=generator)
        gaps = uniform.neg_().log1p_().div_(math.log1p(-dropout)).long().add_(1)
        found.append(gaps.cumsum_(0).add_(last))
        last = int(found[-1][-1])
    places = found[0] if len(found) == 1 else torch.cat(found)
    return places[: int(torch.searchsorted(places, size))]


def zeroed(x: Tensor, places: Tensor) -> Tensor:
    """A contiguous copy of x with zeros at the places."""
    x = x.clone(memory_format=torch.contiguous_format)
    x.view(-1)[places] = 0
    return x
