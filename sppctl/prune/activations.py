"""Hidden states of the calibration windows between two blocks: on the device, in memory, or in a mapped file."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from sppctl import distributed, machine
from sppctl.errors import StageError
from sppctl.files.safe_files import reserve
from sppctl.model.block_call import BlockCall
from sppctl.model.blocks import BlockStack
from sppctl.prune.choose import BLOCK_WIDTHS, CPU_TOKENS, GPU_SHARE

RAM_SHARE = 0.5  # of the available memory


def windows_at_a_time(stack: BlockStack, samples: int, seq_len: int) -> int:
    """How many windows fit through a block together."""
    if stack.device.type != "cuda":
        return max(1, min(samples, CPU_TOKENS // seq_len))
    free = machine.free_memory(stack.device)
    one = seq_len * stack.width * stack.dtype.itemsize * BLOCK_WIDTHS
    return max(1, min(samples, int(free * GPU_SHARE / one)))


class Activations:
    """The hidden states (samples, tokens, width) of all windows, in micro-batches, advanced block by block."""

    def __init__(self, stack: BlockStack, windows: Tensor, batch_size: int | str, memory: str, path: Path) -> None:
        """Embeds the windows.

        Args:
            stack: whose embeddings are loaded.
            windows: (samples, seq_len) tokens.
            batch_size: windows at a time, or ``auto``.
            memory: where to keep the hidden states: ``device``, ``ram``, ``disk``, or ``auto``: the first that fits.
            path: of the mapped file.
        """
        self.stack = stack
        samples, seq_len = windows.shape
        size = batch_size if isinstance(batch_size, int) else windows_at_a_time(stack, samples, seq_len)
        self._memory, self._path = memory, path
        self.place, self._hidden = self._allocate((samples, seq_len, stack.width), path)
        self._second: Tensor | None = None
        self._slices = [slice(start, min(start + size, samples)) for start in range(0, samples, size)]
        self._calls: dict[int, list[BlockCall]] = {}
        for rows in self._slices:
            hidden, calls = stack.record(windows[rows].to(stack.device))
            # windows are never padded, so what a block is told besides its input depends on the shape alone
            self._calls.setdefault(len(hidden), calls)
            self._hidden[rows] = hidden.to(self._hidden.device)

    def _allocate(self, shape: tuple[int, ...], path: Path) -> tuple[str, Tensor]:
        count = math.prod(shape)
        place = _place(self.stack, count * self.stack.dtype.itemsize, self._memory)
        if place == "disk":
            _reserve(path, count * self.stack.dtype.itemsize)
            return place, torch.from_file(str(path), shared=True, size=count, dtype=self.stack.dtype).view(shape)
        device = self.stack.device if place == "device" else torch.device("cpu")
        return place, torch.empty(shape, dtype=self.stack.dtype, device=device)

    def second_buffer(self) -> Tensor:
        """Room for the hidden states of another point of the model, (samples, tokens, width): always the same."""
        if self._second is None:
            _, self._second = self._allocate(
                tuple(self._hidden.shape), self._path.with_name(f"{self._path.name}.beside")
            )
        return self._second

    @property
    def batch_size(self) -> int:
        """Windows in a micro-batch."""
        return self._slices[0].stop

    def run(self, index: int) -> None:
        """Runs the loaded block ``index`` on every micro-batch; its output becomes the next block's input."""
        for rows in self._slices:
            self.advance(index, rows)

    def advance(self, index: int, rows: slice) -> None:
        """As :meth:`run`, for some windows."""
        self.store(rows, self.call(index, rows)(self.stack.blocks[index], self.inputs(rows)))

    def store(self, rows: slice, hidden: Tensor) -> None:
        """Makes some windows' hidden states the next block's input."""
        self._hidden[rows] = hidden.to(self._hidden.device)

    def inputs(self, rows: slice) -> Tensor:
        """The hidden states of some windows, on the device."""
        return self._hidden[rows].to(self.stack.device)

    @property
    def batches(self) -> list[slice]:
        """The windows of each micro-batch."""
        return self._slices

    def call(self, index: int, rows: slice) -> BlockCall:
        """How block ``index`` is called for some windows."""
        return self._calls[rows.stop - rows.start][index]


def _place(stack: BlockStack, needed: int, memory: str) -> str:
    if memory != "auto":
        return "ram" if memory == "device" and stack.device.type == "cpu" else memory
    if stack.device.type == "cuda" and needed < GPU_SHARE * machine.free_memory(stack.device):
        return "device"
    share = RAM_SHARE / distributed.local_world_size()
    return "ram" if needed < share * machine.free_memory(torch.device("cpu")) else "disk"


def _reserve(path: Path, size: int) -> None:
    try:
        reserve(path, size)
    except OSError as error:
        raise StageError(
            f"prune.memory: no room for the hidden states, {size / 2**20:.0f} MiB, in {path} ({error.strerror}); "
            "free some, set prune.memory=ram, or lower prune.calibration.samples"
        ) from error
