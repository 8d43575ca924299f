"""The quality table of docs/pruning.md: WikiText-2 perplexity after each method at each pattern, on real data.

    python benchmarks/pruning_table.py CHECKPOINT OUT.md [--samples 64 --seq-len 1024]

Needs C4 and WikiText-2 (hub or cache). Cells that are already in OUT.json are not measured again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from sppctl.config.load import load_config
from sppctl.data import texts
from sppctl.evaluate import perplexity
from sppctl.model import checkpoint
from sppctl.model.blocks import Skeleton
from sppctl.prune import checks
from sppctl.prune import stage as prune

PATTERNS = ("0.5", "0.6", "0.75", "2:4", "4:8", "2:8")
METHODS = {
    "magnitude": ["prune.method=magnitude"],
    "wanda": ["prune.method=wanda"],
    "sparsegpt": ["prune.method=sparsegpt"],
    "dsnot (from wanda)": ["prune.method=dsnot"],
    "wanda + owl": ["prune.method=wanda", "prune.allocation=owl"],
    "wanda, module order": ["prune.method=wanda", "prune.order=module"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD")
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS), choices=PATTERNS, metavar="PATTERN")
    parser.add_argument("--max-tokens", type=int, help="tokens of WikiText-2; default: all")
    arguments = parser.parse_args()
    store = arguments.out.with_suffix(".json")
    cells = json.loads(store.read_text()) if store.is_file() else {}
    settings = {"checkpoint": str(arguments.checkpoint.resolve()), "max_tokens": arguments.max_tokens}
    settings |= {"samples": arguments.samples, "seq_len": arguments.seq_len}
    if cells.setdefault("settings", settings) != settings:
        parser.error(f"{store} has cells of {cells['settings']}, not of {settings}; write to another OUT.md")
    if "dense" not in cells:
        cells["dense"] = {"perplexity": measured(arguments.checkpoint, arguments.max_tokens)}
        store.write_text(json.dumps(cells, indent=1))
    for pattern in arguments.patterns:
        for name in arguments.methods:
            if f"{name} {pattern}" in cells or ("owl" in name and ":" in pattern):
                continue
            cells[f"{name} {pattern}"] = cell(arguments, METHODS[name], pattern)
            print(name, pattern, cells[f"{name} {pattern}"], flush=True)
            store.write_text(json.dumps(cells, indent=1))
    arguments.out.write_text(table(cells))


def cell(arguments: argparse.Namespace, overrides: list[str], pattern: str) -> dict[str, float]:
    config = load_config(
        "smollm2-135m",
        [
            *overrides,
            f"prune.pattern={pattern}",
            f"prune.calibration.samples={arguments.samples}",
            f"prune.calibration.seq_len={arguments.seq_len}",
            "prune.batch_size=auto",
        ],
    )
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        started = time.perf_counter()
        dtype = checkpoint.choose_dtype(arguments.checkpoint, checkpoint.pick_device("auto"), "auto").dtype
        skeleton = Skeleton(checkpoint.load_config(arguments.checkpoint))
        prepared = checks.prepare(config, skeleton, checkpoint.load_tokenizer(arguments.checkpoint))
        record = prune.execute(config, prepared, arguments.checkpoint, out, dtype=dtype)
        seconds = time.perf_counter() - started
        value = measured(out, arguments.max_tokens)
    return {"perplexity": value, "seconds": round(seconds, 1), "sparsity": record.sparsity}


def measured(directory: Path, max_tokens: int | None) -> float:
    device = checkpoint.pick_device("auto")
    model = checkpoint.load_model(directory, device, checkpoint.choose_dtype(directory, device, "auto").dtype)
    text = texts.load_text("wikitext2", "test", "eval.perplexity")
    windows = perplexity.text_windows(
        checkpoint.load_tokenizer(directory), text.joiner.join(text.documents), 2048, max_tokens, "wikitext2"
    )
    losses = torch.cat(list(perplexity.window_losses(model, windows, 2)))
    return perplexity.summarise(losses, 2048).value


def table(cells: dict[str, Any]) -> str:
    lines = [f"| method | {' | '.join(PATTERNS)} | seconds |", "| --- |" + " ---: |" * (len(PATTERNS) + 1)]
    for name in METHODS:
        found = [cells.get(f"{name} {pattern}") for pattern in PATTERNS]
        if not any(found):
            continue
        values = [f"{one['perplexity']:.4g}" if one else "-" for one in found]
        spent = sorted(one["seconds"] for one in found if one)
        lines.append(f"| {name} | {' | '.join(values)} | {spent[len(spent) // 2]:.0f} |")
    return f"dense: {cells['dense']['perplexity']:.2f}\n\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
