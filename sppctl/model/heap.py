"""The C heap of a process that runs block after block: kept from one block to the next, given back once it grows.

glibc returns freed tensors to the system at once, and the next block's tensors cost a page fault for every 4 KiB: in
module order a tenth of a forward of a small model. It also keeps freed memory in pieces between others, which grow into
gigabytes over the blocks of a large one. Other C libraries have neither function and are left as they are.
"""

from __future__ import annotations

import ctypes

import psutil

KEPT = 512 << 20  # bytes that may stay with the process though they are free
LARGEST = 32 << 20  # bytes of a tensor that is taken from the heap; the most that glibc allows
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's numbers of these settings


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
        """Returns what is free to the system if the process has grown by more than ``KEPT`` since it last did."""
        if self._trim is not None and self._process.memory_info().rss - self._resident > KEPT:
            self._trim(0)
            self._resident = self._process.memory_info().rss
