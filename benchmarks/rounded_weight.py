"""Training on the rounded effective weight versus the residual sum: loss in training and of the merged model.

    python benchmarks/rounded_weight.py PRUNED [--lrs 3e-2,3e-3 --device auto]

PRUNED is the output of `sppctl prune`. Both forms train the same adapter on the same batches (configs/quickstart.yaml),
without dropout, in the model's dtype, and are merged in the same way. They differ in the weights that a step uses:

    rounded:   y = x W_eff^T, W_eff = W * (1 + s alpha[g] beta) rounded to the dtype of W, as merging writes it
    residual:  y = x W^T + x (s W')^T, each rounded separately: updates too small for W have an effect until merging
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hardware import describe
from torch import Tensor

from sppctl import records
from sppctl.adapters.products import product
from sppctl.adapters.spp import kernel
from sppctl.adapters.spp import layer as spp_layer
from sppctl.config.load import load_config
from sppctl.config.settings import Config
from sppctl.data import texts, vocabulary
from sppctl.data.instructions import IGNORED
from sppctl.evaluate import perplexity
from sppctl.merge import stage as merge
from sppctl.model import checkpoint
from sppctl.model.blocks import Skeleton
from sppctl.train import stage as train
from sppctl.train.feed import Feed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pruned", type=Path)
    parser.add_argument("--lrs", default="3e-2,3e-3")
    parser.add_argument("--forms", default="rounded,residual")
    parser.add_argument("--device", default="auto")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of the configuration")
    options = parser.parse_intermixed_args()
    print(describe(checkpoint.pick_device(options.device)))
    print(
        "| lr | form | validation loss in training | merged | difference | merged perplexity | weights moved |\n"
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |"
    )
    for lr in options.lrs.split(","):
        given = [f"model.device={options.device}", f"train.lr={lr}", "train.report_to=[]", *options.overrides]
        config = load_config("quickstart", given)
        for form in options.forms.split(","):
            with tempfile.TemporaryDirectory() as scratch, computing(form):
                print(f"| {lr} | {form} | {compare(config, options.pruned, Path(scratch))} |", flush=True)


@contextmanager
def computing(form: str) -> Iterator[None]:
    """Makes SPP layers use one of the two forms."""
    original = spp_layer.spp_linear
    spp_layer.spp_linear = original if form == "rounded" else residual
    try:
        yield
    finally:
        spp_layer.spp_linear = original


def residual(
    x: Tensor, weight: Tensor, bias: Tensor | None, adapters: list[tuple[Tensor, Tensor, float, float]]
) -> Tensor:
    """The sum of the two branches for a single adapter without dropout."""
    ((alpha, beta, scale, dropout),) = adapters
    return F.linear(x, weight, bias) + product(
        kernel.SppBranch(scale, dropout, base=False), x, None, weight, alpha, beta
    )


def compare(config: Config, pruned: Path, scratch: Path) -> str:
    """Trains, merges and measures; returns a row of the table."""
    record = records.read(pruned / "stage.json", "prune").metrics
    adapter, merged = scratch / "adapter", scratch / "merged"
    merged.mkdir()
    device = checkpoint.pick_device(config.model.device)
    dtype = checkpoint.choose_dtype(pruned, device, "auto", training=True).dtype
    skeleton = Skeleton(checkpoint.load_config(pruned))
    prepared = train.prepare(config, skeleton, checkpoint.load_tokenizer(pruned))
    trained = train.execute(config, prepared, pruned, record, adapter, dtype=dtype, resume=False)
    moved = merge.execute(config, merge.prepare(config, pruned, adapter, record, trained, merged), merged).moved_share
    model = checkpoint.load_model(merged, device, dtype)
    tokenizer = checkpoint.load_tokenizer(merged)
    before, after = trained.validation_loss or 0.0, validation_loss(config, model, tokenizer)
    text = texts.load_text("instructions", "test", "eval.perplexity")
    whole = text.joiner.join(text.documents)
    windows = perplexity.text_windows(tokenizer, whole, config.eval.seq_len or 512, None, "instructions")
    losses = torch.cat(list(perplexity.window_losses(model, windows, 8)))
    value = perplexity.summarise(losses, windows.shape[1]).value
    return f"{before:.5f} | {after:.5f} | {after - before:+.5f} | {value:.3f} | {moved:.1%}"


@torch.no_grad()
def validation_loss(config: Config, model: Any, tokenizer: Any) -> float:
    """The validation loss as in training: the mean over all predicted tokens."""
    feed = Feed(config, tokenizer, vocabulary.embeddings(model))
    size, total, tokens = config.train.micro_batch_size, 0.0, 0
    for first in range(0, len(feed.held_out), size):
        rows = range(first, min(first + size, len(feed.held_out)))
        batch = feed.padded([feed.held_out[row] for row in rows])
        inputs = {key: value.to(model.device) for key, value in batch.items() if isinstance(value, torch.Tensor)}
        predicted = int((inputs["labels"][:, 1:] != IGNORED).sum())
        total, tokens = total + predicted * float(model(**inputs).loss), tokens + predicted
    return total / tokens


if __name__ == "__main__":
    main()
