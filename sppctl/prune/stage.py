"""base -> pruned: which matrices, by which pattern, on which text; the loop over blocks is in walk.py."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor

from sppctl import console, distributed
from sppctl.config.settings import Config, PruneConfig
from sppctl.errors import StageError
from sppctl.files import sealed
from sppctl.files.names import ALLOCATION, COPIED, JOURNAL
from sppctl.files.safe_files import OwnFiles, TensorFiles
from sppctl.model import checkpoint
from sppctl.model.blocks import BlockStack
from sppctl.model.targets import Target, matches
from sppctl.pattern import Pattern
from sppctl.prune import calibrate
from sppctl.prune.activations import Activations
from sppctl.prune.choose import check_prunes, needs_inputs, planned_patterns
from sppctl.prune.layers import Plan
from sppctl.prune.walk import START_AGAIN, Journal, dense_pass, prune_blocks
from sppctl.pruners import InputNorms, allocate

ACTIVATIONS = "activations.bin"


def execute(config: Config, base: Path, out: Path, *, dtype: str) -> dict[str, Any]:
    """Prunes the checkpoint ``base`` into the directory ``out``, continuing what an interrupted attempt left there.

    Args:
        config: the configuration.
        base: the dense checkpoint, only read.
        out: directory for the pruned one, and for the notes by which the next call would find what is done; who
            publishes it removes them (:func:`sppctl.run.attempts.clean`).
        dtype: name of the dtype to compute in.

    Returns:
        Metrics: total sparsity, number of matrices, calibration, one record per layer.

    Raises:
        UserError: too little calibration text.
        StageError: broken weights, or an architecture whose blocks cannot be replayed.
    """
    prune = config.prune
    device = checkpoint.pick_device(config.model.device)
    distributed.connect(device)
    stack = BlockStack(base, device, dtype, config.model.trust_remote_code)
    targets = stack.targets(prune.targets, prune.skip)
    if unseen := stack.unseen():
        console.warn(f"prune.targets: experts in a form that cannot be pruned stay dense: {unseen}")
    windows: Tensor | None = None
    metrics: dict[str, Any] = {}
    if needs_inputs(prune):
        tokenizer = checkpoint.load_tokenizer(base, config.model.trust_remote_code)
        every, metrics["calibration"] = calibrate.windows_of(config, tokenizer)
        windows = every[distributed.rank() :: distributed.world_size()]
        stack.load_embeddings()
        with console.Progress("checking that replayed blocks equal the model", len(stack)) as bar:
            stack.check_replay(windows[:1].to(device), lambda _: bar.advance())
    distributed.decide(lambda: stack.check_rest(targets.values()))
    copy = _copy(config, base, out)
    plan = _plan(config, stack, targets, windows, out)
    activations = None if windows is None else _embed(stack, windows, prune, out)
    journal = Journal(out / JOURNAL)
    if journal.blocks:
        console.note(f"prune: {len(journal.blocks)} of {len(stack)} blocks are done")
    blocks = []
    with console.Progress(f"pruning {prune.method} {prune.pattern}", len(targets)) as bar:
        for entry in prune_blocks(stack, plan, activations, copy, journal):
            blocks.append(entry)
            for layer in entry["layers"]:
                error = layer["relative_output_error"]
                bar.advance(layer["name"] if error is None else f"{layer['name']} error {error:.3f}")
    if distributed.is_main():
        for path in out.glob(f"{ACTIVATIONS}.*"):
            path.unlink(missing_ok=True)
    return metrics | _summary(prune, blocks, activations)


def _summary(prune: PruneConfig, blocks: list[dict[str, Any]], activations: Activations | None) -> dict[str, Any]:
    layers = [layer for block in blocks for layer in block["layers"]]
    weights = sum(layer["shape"][0] * layer["shape"][1] for layer in layers)
    zeros = sum(layer["sparsity"] * layer["shape"][0] * layer["shape"][1] for layer in layers)
    errors = [layer["relative_output_error"] for layer in layers if layer["relative_output_error"] is not None]
    fallbacks = [f"{layer['name']} by {layer['fallback']}" for layer in layers if layer["fallback"]]
    if fallbacks:
        first = fallbacks[0] + (", ..." if len(fallbacks) > 1 else "")
        console.warn(f"{len(fallbacks)} matrices of experts that saw too few tokens had a fall-back: {first}")
    tuned = {block["block"]: block["reconstruction"] for block in blocks if block["reconstruction"]}
    return {
        "method": prune.method,
        "pattern": _pattern_words(prune, layers),
        "order": prune.order if activations else None,
        "activations": activations.place if activations else None,
        "processes": distributed.world_size(),
        "matrices": len(layers),
        "fallbacks": len(fallbacks),
        "pruned_weights": weights,
        "sparsity": zeros / weights,
        "mean_relative_output_error": sum(errors) / len(errors) if errors else None,
        "reconstruction": tuned or None,
        "layers": layers,
    }


def _pattern_words(prune: PruneConfig, layers: list[dict[str, Any]]) -> str:
    """The patterns that matrices were given, most of them first: ``2:4, 4:8 in 12 matrices``.

    Ratios that differ by block are one pattern, their mean, which is what ``prune.pattern`` says.
    """
    spread = {"uniform": "", "owl": " by outliers"}.get(str(prune.allocation), " by block")
    common = f"{prune.pattern}{spread}"
    counts = Counter(
        layer["pattern"] if any(matches(layer["name"], wanted) for wanted in prune.overrides) else common
        for layer in layers
    ).most_common()
    return ", ".join([counts[0][0], *(f"{pattern} in {count} matrices" for pattern, count in counts[1:])])


def _copy(config: Config, base: Path, out: Path) -> OwnFiles:
    """A copy of the checkpoint in ``out``; a copy that was interrupted is made again."""
    if distributed.is_main() and not (out / COPIED).exists():
        (out / JOURNAL).unlink(missing_ok=True)
        with console.working(f"copying {base}"):
            checkpoint.copy_for_rewriting(base, out, config.model.dtype).sync()
        (out / COPIED).touch()
    distributed.barrier()
    return OwnFiles(out)


def _embed(stack: BlockStack, windows: Tensor, prune: PruneConfig, out: Path) -> Activations:
    return Activations(stack, windows, prune.batch_size, prune.memory, out / f"{ACTIVATIONS}.{distributed.rank()}")


def _plan(config: Config, stack: BlockStack, targets: dict[str, Target], windows: Tensor | None, out: Path) -> Plan:
    prune = config.prune
    patterns = planned_patterns(prune, targets, stack)
    if prune.allocation == "owl":
        assert windows is not None
        patterns = _owl(config, stack, targets, patterns, windows, out)
    masks = None if prune.mask_from is None else TensorFiles(checkpoint.locate(prune.mask_from))
    return Plan(
        method=prune.method,
        targets=targets,
        patterns=patterns,
        options={"damp": prune.damp, "block_size": prune.block_size},
        order=prune.order,
        masks=masks,
        reconstruct_epochs=prune.reconstruct_epochs,
        reconstruct_lr=prune.reconstruct_lr,
    )


def _owl(
    config: Config,
    stack: BlockStack,
    targets: dict[str, Target],
    patterns: dict[str, Pattern],
    windows: Tensor,
    out: Path,
) -> dict[str, Pattern]:
    """Ratios by the share of outliers in each dense block: one more pass over the windows; overrides stay."""
    prune = config.prune
    assert prune.pattern.ratio is not None
    overridden = {name for name in targets if any(matches(name, wanted) for wanted in prune.overrides)}
    free = {name: target for name, target in targets.items() if name not in overridden}
    if not free:
        return patterns
    saved = out / ALLOCATION
    if saved.exists():
        ratios = {int(block): ratio for block, ratio in sealed.read(saved, START_AGAIN).items()}
    else:
        activations = _embed(stack, windows, prune, out)
        blocks, shares, sizes = [], [], []  # of the blocks that have something to prune
        with console.Progress("weighing outliers (OWL)", len(stack)) as bar:
            passed = dense_pass(stack, Plan("wanda", free, patterns), activations, InputNorms)
            for index, scores in enumerate(passed):
                if scores:
                    blocks.append(index)
                    shares.append(allocate.outlier_share(scores))
                    sizes.append(sum(score.numel() for score in scores))
                bar.advance(f"{shares[-1]:.4f}" if scores else "")
        try:
            found = allocate.owl(shares, sizes, prune.pattern.ratio, prune.owl_lambda)
        except ValueError as error:
            raise StageError(f"prune.allocation: {error}") from error
        ratios = dict(zip(blocks, found, strict=True))
        if distributed.is_main():
            sealed.write(saved, {str(block): ratio for block, ratio in ratios.items()})
        distributed.barrier()
    for index, ratio in ratios.items():
        prefix = f"{stack.blocks_name}.{index}."
        patterns |= {name: Pattern(ratio=ratio) for name in free if name.startswith(prefix)}
    for name, target in free.items():
        try:
            check_prunes(prune, target, patterns[name])
        except ValueError as error:
            raise StageError(f"prune.allocation: {error}") from error
    return patterns
