"""The table of docs/training.md: every training method on the same pruned checkpoint, for the same number of steps.

    python benchmarks/training_table.py CHECKPOINT FOLDER [--steps 120 --rows 4000 --only spp --only lora]

Prunes CHECKPOINT once (Wanda 2:4, C4), trains every method on the same rows of Alpaca in the same order, merges, and
evaluates the merged checkpoints as ordinary transformers models: the loss on held-out rows (prompt and response, mean
over tokens) and the perplexity of the first tokens of WikiText-2. All results stay in FOLDER and are not computed
again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from sppctl.data import texts
from sppctl.evaluate import perplexity
from sppctl.inspect import inspect
from sppctl.model import checkpoint
from sppctl.pattern import Pattern

RUNS = {  # name: overrides; learning rates are typical for each method
    "spp": ["train.method=spp", "train.rank=16", "train.lr=1e-2"],
    "lora, mask reapplied": ["train.method=lora", "train.rank=8", "train.lr=1e-3", "merge.mask=reapply"],
    "lora, dense": ["train.method=lora", "train.rank=8", "train.lr=1e-3", "merge.mask=dense"],
    "hira": ["train.method=hira", "train.rank=16", "train.lr=1e-2"],
    "masked_lora": ["train.method=masked_lora", "train.rank=8", "train.lr=1e-3"],
    "masked_full": ["train.method=masked_full", "train.lr=1e-4"],
    "ste": ["train.method=ste", "train.lr=1e-4"],
}
PATTERN = Pattern.parse("2:4")
HELD_OUT = 200
PERPLEXITY_TOKENS = 40_960


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--only", action="append", help="names of runs; default: all")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    store = arguments.folder / "table.json"
    cells = json.loads(store.read_text()) if store.is_file() else {}
    shared = arguments.folder / "shared"
    sppctl("prune", shared, arguments)
    for label, directory in (("dense", arguments.checkpoint), ("pruned", shared / "pruned")):
        if label not in cells:
            cells[label] = measured(directory)
    for name, overrides in RUNS.items():
        if name in cells or (arguments.only and name not in arguments.only):
            continue
        run = arguments.folder / name.replace(", ", "-").replace(" ", "-")
        link(shared / "pruned", run / "pruned")
        trained = RUNS_OF_SAME_TRAINING.get(name)
        if trained:
            link(arguments.folder / trained.replace(", ", "-").replace(" ", "-") / "adapter", run / "adapter")
        record = sppctl("train", run, arguments, *overrides)
        merged = sppctl("merge", run, arguments, *overrides)
        cells[name] = measured(run / "merged") | {
            "lr": record["settings"]["train"]["lr"],
            "parameters": record["metrics"]["trainable_parameters"],
            "loss in training": record["metrics"]["validation_loss"],
            "seconds": record["wall_time_s"],
            "peak MiB": record["peak_memory_mb"].get("cuda", record["peak_memory_mb"]["process"]),
            "pattern": pattern_of(run / "merged", merged["metrics"]),
        }
        print(name, cells[name], flush=True)
        store.write_text(json.dumps(cells, indent=1))
    print(table(cells))


RUNS_OF_SAME_TRAINING = {"lora, dense": "lora, mask reapplied"}


def sppctl(stage: str, run: Path, arguments: argparse.Namespace, *overrides: str) -> dict:
    """Runs a stage in a separate process, so that its peak memory is separate, and returns its record."""
    command = [sys.executable, "-m", "sppctl", stage, "smollm2-135m", f"run.dir={run}", "--json"]
    command += [f"model.path={arguments.checkpoint}", "prune.pattern=2:4"]
    command += ["prune.calibration.samples=64", "prune.calibration.seq_len=1024"]
    command += [f"train.data.split=train[:{arguments.rows}]", f"train.data.val_size={HELD_OUT}"]
    command += [f"train.max_steps={arguments.steps}", "train.batch_size=8", "train.micro_batch_size=8"]
    command += ["train.dropout=0.0", "train.data.group_by_length=true", "train.log_steps=10", *overrides]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed with exit code {done.returncode}")
    return json.loads(done.stdout)


def link(source: Path, target: Path) -> None:
    """Hard-links the files into another folder; stages only read them."""
    if not target.exists():
        target.mkdir(parents=True)
        for file in source.rglob("*"):
            place = target / file.relative_to(source)
            place.mkdir(parents=True) if file.is_dir() else os.link(file, place)


def pattern_of(directory: Path, merging: dict) -> str:
    """Whether the merged weights are 2:4, and whether their zeros are those of the pruned weights."""
    matrices, summary = inspect.measure(directory, PATTERN)
    if summary["sparse_matrices"] < merging["matrices"] or inspect.violations(matrices, PATTERN):
        return "lost"
    return "2:4" if merging["pattern_unchanged"] else "2:4, other zeros"


@torch.no_grad()
def measured(directory: Path) -> dict[str, float]:
    device = checkpoint.pick_device("auto")
    model = checkpoint.load_model(directory, device, checkpoint.choose_dtype(directory, device, "auto").dtype)
    tokenizer = checkpoint.load_tokenizer(directory)
    rows = held_out_rows()
    total = tokens = 0
    for row in rows:
        ids = torch.tensor([[*tokenizer(texts.formatted(row)).input_ids, tokenizer.eos_token_id]])[:, :512]
        total += model(ids.to(model.device), labels=ids.to(model.device)).loss.item() * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    text = texts.load_text("wikitext2", "test", "eval.perplexity")
    whole = text.joiner.join(text.documents)
    windows = perplexity.text_windows(tokenizer, whole, 2048, PERPLEXITY_TOKENS, "wikitext2")
    losses = torch.cat(list(perplexity.window_losses(model, windows, 2)))
    return {"held-out loss": total / tokens, "wikitext2": perplexity.summarise(losses, 2048).value}


def held_out_rows() -> list[dict]:
    """Rows that neither training nor validation can use."""
    return list(texts.load_hub("tatsu-lab/alpaca", "train"))[13_354 - HELD_OUT : 13_354]


def table(cells: dict[str, dict]) -> str:
    header = ["", "lr", "parameters", "held-out loss", "WikiText-2", "seconds", "peak MiB", "pattern"]
    lines = [f"| {' | '.join(header)} |", "| --- |" + " ---: |" * (len(header) - 1)]
    for name, one in cells.items():
        trained = "lr" in one
        cells_of = [name, f"{one['lr']:g}" if trained else "", f"{one['parameters']:,}" if trained else ""]
        cells_of += [f"{one['held-out loss']:.4f}", f"{one['wikitext2']:.2f}"]
        cells_of += [f"{one['seconds']:.0f}", f"{one['peak MiB']:,.0f}"] if trained else ["", ""]
        cells_of.append(one["pattern"] if trained else "")
        lines.append(f"| {' | '.join(cells_of)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
