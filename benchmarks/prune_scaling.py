"""Time and peak memory of `sppctl prune` for different model sizes, windows and processes, each in a subprocess.

    python benchmarks/prune_scaling.py [--method wanda]

Random LLaMA-shaped bfloat16 checkpoints of three shapes are created in a temporary folder. Peak memory is that of the
largest process. Seconds are those of the stage, from its record, without starting Python and importing torch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import hardware
import torch

SIZES = {
    "hidden 576, 8 blocks": ("--hidden", "576", "--intermediate", "1536", "--heads", "9", "--layers", "8"),
    "hidden 1152, 8 blocks": ("--hidden", "1152", "--intermediate", "3072", "--heads", "9", "--layers", "8"),
    "hidden 1152, 16 blocks": ("--hidden", "1152", "--intermediate", "3072", "--heads", "9", "--layers", "16"),
}
RUNS = ((8, 1), (32, 1), (128, 1), (32, 2))  # windows of 256 tokens, processes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="wanda")
    method = parser.parse_args().method
    cores = len(os.sched_getaffinity(0))
    print(f"{method} 2:4, windows of 256 tokens, {cores} cores; {hardware.describe(torch.device('cpu'))}")
    print(
        "| model | weights, MB | windows | processes | seconds | peak MiB |\n| --- | ---: | ---: | ---: | ---: | ---: |"
    )
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, shape) in enumerate(SIZES.items()):
            model = Path(scratch) / f"model{number}"
            script = Path(__file__).with_name("big_checkpoint.py")
            subprocess.run([sys.executable, str(script), str(model), *shape], check=True, stdout=subprocess.DEVNULL)
            size = sum(path.stat().st_size for path in model.glob("*.safetensors")) / 1e6
            for windows, processes in RUNS:
                seconds, peak = measured(
                    model, Path(scratch) / f"run{number}-{windows}-{processes}", method, windows, processes
                )
                print(f"| {name} | {size:.0f} | {windows} | {processes} | {seconds:.1f} | {peak:.0f} |", flush=True)


def measured(model: Path, run: Path, method: str, windows: int, processes: int) -> tuple[float, float]:
    """Seconds of the stage, and peak resident memory in MiB of the largest process."""
    command = [sys.executable, "-m", "sppctl", "prune", "--model", str(model), "--output", str(run), "--method", method]
    command += [f"prune.calibration.samples={windows}", "prune.calibration.seq_len=256"]
    command += [f"launch.num_processes={processes}"]
    # in a separate child process, so that the peak is that of this run only
    code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=-3, stderr=-3); "
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)"
    # use the same cores for one process and for two
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // processes))}
    done = subprocess.run(
        [sys.executable, "-c", code, *command], check=True, capture_output=True, text=True, env=environment
    )
    return json.loads((run / "pruned" / "stage.json").read_text())["wall_time_s"], float(done.stdout)


if __name__ == "__main__":
    main()
