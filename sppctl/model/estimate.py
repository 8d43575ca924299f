"""What the stages of a run will do, and about how long: their matrix products over the speed of one timed product."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from sppctl.machine import torch_dtype

ROWS, WIDEST = 512, 2048  # shape of the timed product
OVERHEAD = 2.2  # time of a stage over that of its matrix products: norms, softmax, elementwise work, loading
CHARACTERS = 4  # per token, for text that has not been tokenised


@dataclass(frozen=True)
class Work:
    """What a stage is about to do."""

    text: str
    tokens: float  # run forward through the model; for training three times as many, for the backward pass


def lines(work: Mapping[str, Work], seconds_per_token: float | None) -> Iterator[str]:
    """One line per stage: what it will do, and about how long it takes (left out if the speed is None)."""
    for stage, todo in work.items():
        time_needed = "" if seconds_per_token is None else f", about {duration(todo.tokens * seconds_per_token)}"
        yield f"{stage}: {todo.text}{time_needed}"


def seconds_per_token(parameters: int, width: int, dtype: str, device: torch.device) -> float:
    """Seconds per token of a forward pass in which each parameter multiplies every token once.

    ``width`` is the model's hidden size.
    """
    return parameters * OVERHEAD / _multiplications_per_second(min(width, WIDEST), torch_dtype(dtype), device)


def _multiplications_per_second(width: int, dtype: torch.dtype, device: torch.device) -> float:
    """The speed of a product as large as a layer's, the median of three."""
    inputs, weight = (torch.rand(size, width, dtype=dtype, device=device) for size in (ROWS, 2 * width))
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        (inputs @ weight.t())[0, 0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - started)
    return ROWS * 2 * width * width / statistics.median(seconds[1:])  # the first one loads libraries


def duration(seconds: float) -> str:
    """A rough time: 10 s, 40 s, 3 min, 2.5 h."""
    if seconds < 90:
        return f"{max(1, round(seconds / 10)) * 10} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
