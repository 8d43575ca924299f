"""The C heap of a process that runs block after block: reused from block to block, trimmed when it has grown.

glibc returns freed tensors to the system at once, and the next block's tensors then cost a page fault per 4 KiB: a
tenth of a small model's forward in module order. It also keeps fragments of freed memory, which add up to gigabytes
over the blocks of a large model. Other C libraries have neither function and are left as they are.
"""

from __future__ import annotations

import ctypes

import psutil

KEPT = 512 << 20  # bytes of free memory that the process may keep
LARGEST = 32 << 20  # bytes of the largest tensor on the heap; the maximum that glibc allows
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's numbers for these mallopt settings


class Heap:
    """The heap of this process."""

    def __init__(self) -> None:
        library = ctypes.CDLL(None)
        self._trim = getattr(library, "malloc_trim", None)
        self._process = psutil.Process()
        if self._trim is not None and hasattr(library, "mallopt"):
            library.mallopt(_MMAP_THRESHOLD, LARGEST)
            library.mallopt(_TRIM_THRESHOLD, KEPT)
        self._resident = self._process.memory_info().rss

    def give_back(self) -> None:
        """Returns free memory to the system if the process has grown by more than ``KEPT`` since the last time."""
        if self._trim is not None and self._process.memory_info().rss - self._resident > KEPT:
            self._trim(0)
            self._resident = self._process.memory_info().rss
