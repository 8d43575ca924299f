"""Works that wait for each other: who waits where, who goes on, and what becomes of them when one fails."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from sppctl.prune.in_step import in_step, wait_at


@pytest.fixture
def log() -> list[Any]:
    return []


def test_all_arrive_before_any_continues(log: list[Any]) -> None:
    """Also where some micro-batches never reach a layer: the others still wait for one another."""

    def work(name: str, *places: int) -> None:
        for place in places:
            log.append(f"{name} reaches {place}")
            wait_at(place, name)
        log.append(f"{name} ends")

    works = [partial(work, "a", 1), partial(work, "b", 0, 1), partial(work, "c")]
    in_step(works, lambda place, brought: log.append((place, brought)))
    assert log == [
        "a reaches 1",
        "b reaches 0",
        "c ends",
        (0, [("b",)]),
        "b reaches 1",
        (1, [("a",), ("b",)]),
        "a ends",
        "b ends",
    ]


def test_works_take_no_gradients() -> None:
    modes: list[bool] = []
    in_step([lambda: modes.append(torch.is_grad_enabled())], lambda *_: None)
    assert modes == [False]


@pytest.mark.parametrize("culprit", ["work", "serve"])
def test_an_error_ends_all_and_is_raised(culprit: str, log: list[Any]) -> None:
    def work(number: int) -> None:
        try:
            wait_at(0, number)
            if culprit == "work" and number == 1:
                raise ValueError("work")
            wait_at(1, number)
        finally:
            log.append(number)

    def serve(place: int, brought: list[int]) -> None:
        if culprit == "serve":
            raise ValueError("serve")

    with pytest.raises(ValueError, match=culprit):
        in_step([partial(work, number) for number in range(3)], serve)
    assert sorted(log) == [0, 1, 2]
