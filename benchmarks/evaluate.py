"""Time and memory of measuring perplexity, as ratios to the model's own forward on the same windows.

    python benchmarks/evaluate.py CHECKPOINT [--windows 8 --seq-len 2048 --repeats 5]

The baseline is ``model(window)`` with all its logits and without a loss, as in the code of the literature. It is
compared with perplexity computed from chunked logits, the same with the distance to a reference model, and the plain
way (all logits in float32, one cross-entropy). Every round runs all of them, and a ratio is the median over rounds of
the ratios within a round, so a machine that becomes slower affects both sides alike. Memory is the peak above the
loaded model, each in a separate process. On a CPU the resident set is sampled every 2 ms during the work, because the
peak that the system reports is that of loading.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from hardware import add_clock, describe, name_of

from sppctl.evaluate.divergence import Reference
from sppctl.evaluate.perplexity import window_losses, window_sums
from sppctl.model import checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    add_clock(parser)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = checkpoint.pick_device(arguments.device)
    dtype = checkpoint.choose_dtype(arguments.checkpoint, device, "auto").dtype
    model = checkpoint.load_model(arguments.checkpoint, device, dtype)
    shape = (arguments.windows, arguments.seq_len)
    windows = torch.randint(0, min(1000, model.config.vocab_size), shape, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as scratch:
        cases = ways(model, windows, Path(scratch, "hidden.bin"))
        if arguments.memory_of:
            with torch.no_grad():
                model(windows[:1, :8].to(device))  # reads the weights that are memory-mapped from files
            print(peak(cases[arguments.memory_of], device))
            return
        rounds: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(arguments.repeats + 1):
            for name, work in cases.items():
                rounds[name].append(timed(work, device, arguments.clock))
    rounds = {name: times[1:] for name, times in rounds.items()}  # the first round warms up
    forward = rounds["forward"]
    print(f"{describe(device)}, {model.dtype}; {name_of(arguments.clock)}, {arguments.repeats} rounds")
    print(f"{arguments.windows} windows x {arguments.seq_len} tokens; forward {statistics.median(forward):.2f} s")
    print("| | forwards | peak above the model, MiB |\n| --- | ---: | ---: |", flush=True)
    for case, times in rounds.items():
        ratio = statistics.median(own / bare for own, bare in zip(times, forward, strict=True))
        done = subprocess.run([sys.executable, *sys.argv, "--memory-of", case], stdout=subprocess.PIPE, check=True)
        print(f"| {case} | {ratio:.2f} | {float(done.stdout):,.0f} |", flush=True)


def ways(model: Any, windows: torch.Tensor, file: Path) -> dict[str, Callable[[], Any]]:
    reference: list[Reference] = []

    @torch.no_grad()
    def forward() -> None:
        for window in windows:
            _ = model(window[None].to(model.device), use_cache=False).logits

    @torch.no_grad()
    def plain() -> None:
        for window in windows:
            window = window.to(model.device)
            logits = model(window[None], use_cache=False).logits[0, :-1].float()
            F.cross_entropy(logits, window[1:]).item()

    def compared() -> None:
        if not reference:
            reference.append(Reference(model, windows, 1, file))
        list(window_sums(model, windows, 1, reference=reference[0]))

    return {
        "forward": forward,
        "plain cross-entropy": plain,
        "perplexity": lambda: list(window_losses(model, windows, 1)),
        "perplexity and divergence": compared,
    }


def timed(work: Callable[[], Any], device: torch.device, clock: Callable[[], float]) -> float:
    started = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - started


def peak(work: Callable[[], Any], device: torch.device) -> float:
    """Peak MiB above the memory in use before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    process, stop = psutil.Process(), threading.Event()
    before = highest = process.memory_info().rss

    def sample() -> None:
        nonlocal highest
        while not stop.wait(0.002):
            highest = max(highest, process.memory_info().rss)

    sampler = threading.Thread(target=sample)
    sampler.start()
    work()
    stop.set()
    sampler.join()
    return (highest - before) / 2**20


if __name__ == "__main__":
    main()
