"""Hidden states of the calibration windows between two blocks: on the device, in memory, or in a mapped file."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sppctl import distributed, machine
from sppctl.errors import StageError
from sppctl.files.safe_files import reserve
from sppctl.model.block_call import BlockCall
from sppctl.model.blocks import Decoder
from sppctl.prune.choose import BLOCK_WIDTHS, GPU_SHARE, windows_at_a_time

RAM_SHARE = 0.5  # of the available memory


class Activations:
    """The hidden states (samples, tokens, width) of all windows, in micro-batches, advanced block by block."""

    def __init__(self, stack: Decoder, windows: Tensor, batch_size: int | str, memory: str, path: Path) -> None:
        """Embeds windows (samples, seq_len).

        ``memory`` is where to keep the hidden states: ``device``, ``ram``, ``disk`` (in a mapped file at ``path``), or
        ``auto``, the first that is large enough.
        """
        self.stack, self._windows = stack, windows
        samples, seq_len = windows.shape
        size = windows_at_a_time(batch_size, samples, seq_len)
        if batch_size == "auto" and stack.device.type == "cuda":
            window = seq_len * stack.width * stack.dtype.itemsize * BLOCK_WIDTHS
            size = max(1, min(samples, int(machine.free_memory(stack.device) * GPU_SHARE / window)))
        self.batches = _slices(0, samples, size)
        self._memory, self._path = memory, path
        self.place, self._hidden = self._allocate((samples, seq_len, stack.width), path)
        self._buffers: dict[str, Tensor] = {}
        self.dense: Tensor | None = None  # the hidden states of the dense model, advanced by :meth:`run_dense`
        self._calls: dict[int, list[BlockCall]] = {}
        for rows in self.batches:
            hidden, calls = stack.record(windows[rows].to(stack.device))
            # windows are never padded, so a block's other arguments depend on the shape alone
            self._calls.setdefault(len(hidden), calls)
            self.store(rows, hidden)

    def _allocate(self, shape: tuple[int, ...], path: Path) -> tuple[str, Tensor]:
        count, stack = math.prod(shape), self.stack
        size = count * stack.dtype.itemsize
        place = _place(stack, size, self._memory)
        if place != "disk":
            device = stack.device if place == "device" else torch.device("cpu")
            return place, torch.empty(shape, dtype=stack.dtype, device=device)
        try:
            reserve(path, size)
        except OSError as error:
            raise StageError(
                f"prune.memory: no room for the hidden states, {size / 2**20:.0f} MiB, in {path} ({error.strerror}); "
                "free disk space, set prune.memory=ram, or lower prune.calibration.samples"
            ) from error
        return place, torch.from_file(str(path), shared=True, size=count, dtype=stack.dtype).view(shape)

    @property
    def hidden(self) -> Tensor:
        """The inputs of the next block, (samples, tokens, width), in the memory where they are kept."""
        return self._hidden

    def buffer(self, name: str) -> Tensor:
        """A further buffer for hidden states (samples, tokens, width), allocated once for each name."""
        if name not in self._buffers:
            path = self._path.with_name(f"{self._path.name}.{name}")
            _, self._buffers[name] = self._allocate(tuple(self._hidden.shape), path)
        return self._buffers[name]

    def steps(self, size: int) -> list[list[slice]]:
        """All windows, ``size`` of them for each optimizer step, in micro-batches that are no larger than usual."""
        most = self.batches[0].stop
        return [_slices(step.start, step.stop, most) for step in _slices(0, len(self._windows), size)]

    def keep_dense(self) -> None:
        """From here on, also keeps the hidden states of the dense model, for before the first block."""
        self.dense = self.buffer("dense").copy_(self._hidden)

    def run_dense(self, index: int) -> None:
        """Runs the block ``index``, loaded and not pruned yet, on the hidden states of the dense model, if kept."""
        if self.dense is not None:
            for rows in self.batches:
                self.dense[rows] = self.output(index, rows, hidden=self.dense).to(self.dense.device)

    def run(self, index: int) -> None:
        """Runs the loaded block ``index`` on every micro-batch; its output becomes the next block's input."""
        for rows in self.batches:
            self.advance(index, rows)

    def advance(self, index: int, rows: slice) -> None:
        """As :meth:`run`, for some windows."""
        self.store(rows, self.output(index, rows))

    def output(
        self, index: int, rows: slice, block: Callable[..., Any] | None = None, hidden: Tensor | None = None
    ) -> Tensor:
        """The output for some windows of the loaded block ``index``, or of ``block`` called with the same arguments.

        ``hidden``: other hidden states of all windows.
        """
        inputs = self._hidden if hidden is None else hidden
        return self.call(index, rows)(block or self.stack.blocks[index], inputs[rows].to(self.stack.device))

    def call(self, index: int, rows: slice) -> BlockCall:
        """How the model calls the block ``index`` for some windows."""
        size = rows.stop - rows.start
        if size not in self._calls:
            self._calls[size] = self.stack.record(self._windows[rows].to(self.stack.device))[1]
        return self._calls[size][index]

    def store(self, rows: slice, hidden: Tensor) -> None:
        """Makes some windows' hidden states the next block's input."""
        self._hidden[rows] = hidden.to(self._hidden.device)


def _slices(start: int, stop: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


def _place(stack: Decoder, needed: int, memory: str) -> str:
    if memory != "auto":
        return "ram" if memory == "device" and stack.device.type == "cpu" else memory
    if stack.device.type == "cuda" and needed < GPU_SHARE * machine.free_memory(stack.device):
        return "device"
    share = RAM_SHARE / distributed.local_world_size()
    return "ram" if needed < share * machine.free_memory(torch.device("cpu")) else "disk"
