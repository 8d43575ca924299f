"""Time and memory of pruning, as ratios to a forward pass of the decoder blocks in the same process.

    python benchmarks/prune.py CHECKPOINT [--samples 64 --seq-len 512 --repeats 3]

The baseline is the dense forward pass of pruning itself: every block is loaded and run once on all windows, without the
output head. Each figure is a median. The shares split SparseGPT's own time; "columns" is its loop over columns,
including masks and all updates; on a GPU they are also measured without the Triton kernel. Peak memory is the largest
of the rounds of a case. Each row is printed as soon as it is measured.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import hardware
import torch

from sppctl.config.settings import PruneConfig
from sppctl.machine import peak_memory_mb, reset_peak_memory
from sppctl.model import checkpoint
from sppctl.model.blocks import BlockStack
from sppctl.pattern import Pattern
from sppctl.prune.activations import Activations
from sppctl.prune.layers import PrunePlan
from sppctl.prune.walk import Journal, prune_blocks
from sppctl.pruners import PRUNERS, sparsegpt
from sppctl.pruners.stats import Hessian

EAGER = "sparsegpt without Triton"
CASES = (
    ("magnitude", "block"),
    ("wanda", "block"),
    ("wanda", "module"),
    ("sparsegpt", "block"),
    ("sparsegpt", "module"),
    (EAGER, "block"),
    ("dsnot", "block"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--methods", nargs="+", default=sorted({method for method, _ in CASES}), metavar="METHOD")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    device = checkpoint.pick_device(arguments.device)
    methods = [method for method in arguments.methods if device.type == "cuda" or method != EAGER]
    print(hardware.describe(device))
    windows = torch.randint(0, 250, (arguments.samples, arguments.seq_len), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(arguments.checkpoint, windows, Pattern.parse(arguments.pattern), device, Path(scratch))
        warm_up = timed(bench.forward, device)
        print(
            f"{len(bench.stack)} blocks, {windows.numel()} tokens, {arguments.pattern}; first forward: {warm_up:.1f} s"
        )
        print("| method, order | seconds | forwards | share: Hessian | factorisation | columns | peak MiB |")
        print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
        for method, order in (case for case in CASES if case[0] in methods):
            reset_peak_memory()
            rounds = [measured(bench, method, order, device) for _ in range(arguments.repeats)]
            seconds, forwards, *shares = (statistics.median(column) for column in zip(*rounds, strict=True))
            cells = " | ".join(f"{share:.0%}" if share else "-" for share in shares)
            peak = ", ".join(f"{value:.0f} ({place})" for place, value in peak_memory_mb().items())
            print(f"| {method}, {order} | {seconds:.1f} | {forwards:.2f} | {cells} | {peak} |", flush=True)


def measured(bench: Bench, method: str, order: str, device: torch.device) -> tuple[float, ...]:
    """Seconds of pruning, the same in forward passes, and the shares of Hessian, factorisation and columns.

    A forward pass is run before and after, so that other load on the machine affects the baseline and the case alike.
    """
    before = timed(bench.forward, device)
    with parts(device) as spent:
        seconds = timed(lambda: bench.prune(method, order), device)
    baseline = (before + timed(bench.forward, device)) / 2
    return seconds, seconds / baseline, *(value / seconds for value in spent.values())


class Bench:
    """A checkpoint, windows, and a copy of the checkpoint for the pruned weights."""

    def __init__(
        self, directory: Path, windows: torch.Tensor, pattern: Pattern, device: torch.device, out: Path
    ) -> None:
        self.stack = BlockStack(directory, device, checkpoint.choose_dtype(directory, device, "auto").dtype)
        self.stack.load_embeddings()
        self.windows, self.pattern, self.out = windows, pattern, out
        (out / "copy").mkdir()
        self.files = checkpoint.copy_for_rewriting(directory, out / "copy")

    def embedded(self) -> Activations:
        return Activations(self.stack, self.windows, "auto", "auto", self.out / "activations.bin")

    @torch.no_grad()
    def forward(self) -> None:
        activations = self.embedded()
        for index in range(len(self.stack)):
            self.stack.load_block(index)
            activations.run(index)
            self.stack.release_block(index)

    def prune(self, method: str, order: str) -> None:
        targets = self.stack.targets("all-linear")
        settings = PruneConfig(method=method.partition(" ")[0], order=order)  # type: ignore[arg-type]
        plan = PrunePlan(settings, targets, dict.fromkeys(targets, self.pattern))
        journal = Journal(self.out / "journal.jsonl")
        journal.path.unlink(missing_ok=True)
        journal.blocks.clear()
        activations = None if method == "magnitude" else self.embedded()
        with without_triton() if method == EAGER else nullcontext():
            for _ in prune_blocks(self.stack, plan, activations, self.files, journal):
                pass


def timed(work: Callable[[], None], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - started


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def without_triton() -> Iterator[None]:
    """SparseGPT with PyTorch's operations on a GPU, too."""
    kernels, sparsegpt.KERNELS = sparsegpt.KERNELS, types.SimpleNamespace(usable=lambda _: None)  # type: ignore
    try:
        yield
    finally:
        sparsegpt.KERNELS = kernels


@contextmanager
def parts(device: torch.device) -> Iterator[dict[str, float]]:
    """Seconds for the sums of the Hessian (H), its factorisation (F) and the rest of SparseGPT, the columns (C)."""
    spent = {"H": 0.0, "F": 0.0, "C": 0.0}
    originals = (Hessian.update, Hessian.inverse_factor, PRUNERS["sparsegpt"])

    def watched(key: str, function: Callable[..., object]) -> Callable[..., object]:
        def run(*args: object, **kwargs: object) -> object:
            # wait for earlier work of the GPU before, and for this work after
            result: list[object] = []
            synchronise(device)
            spent[key] += timed(lambda: result.append(function(*args, **kwargs)), device)
            return result[0]

        return run

    Hessian.update = watched("H", originals[0])  # type: ignore[method-assign, assignment]
    Hessian.inverse_factor = watched("F", originals[1])  # type: ignore[method-assign, assignment]
    PRUNERS["sparsegpt"] = replace(originals[2], prune=watched("C", originals[2].prune))  # type: ignore[arg-type]
    try:
        yield spent
    finally:
        spent["C"] -= spent["F"]  # prune_sparsegpt calls the factorisation
        Hessian.update, Hessian.inverse_factor, PRUNERS["sparsegpt"] = originals  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
