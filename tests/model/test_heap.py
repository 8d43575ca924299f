"""Freed memory that stays with the process, up to a bound."""

from __future__ import annotations

import ctypes

import psutil
import pytest
import torch

from sppctl.model import heap

MEBIBYTE = 1 << 20

pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")


def resident() -> float:
    return psutil.Process().memory_info().rss / MEBIBYTE


def leave_pieces(mebibytes: int) -> list[torch.Tensor]:
    """Allocates tensors of 1 MiB and frees all but every twentieth, so that what is free lies between what is not."""
    tensors = [torch.ones(MEBIBYTE, dtype=torch.uint8) for _ in range(mebibytes)]
    return tensors[::20]


@pytest.mark.parametrize(("freed", "returned"), [(60, False), (300, True)])
def test_only_much_freed_memory_is_returned(freed: int, returned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "KEPT", 150 * MEBIBYTE)
    subject = heap.Heap()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier tests left would be used again
    before = resident()
    kept = leave_pieces(freed)
    assert resident() - before > 0.8 * freed  # nothing goes back by itself
    subject.give_back()
    assert (resident() - before < 0.3 * freed) == returned
    assert all(bool((tensor == 1).all()) for tensor in kept)
