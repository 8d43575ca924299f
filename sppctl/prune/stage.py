"""base -> pruned: which matrices, by which pattern, on which text; the loop over blocks is in walk.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sppctl import console, distributed
from sppctl.config.settings import Config, PruneConfig
from sppctl.errors import StageError, UserError
from sppctl.files import cache, sealed
from sppctl.files.names import ALLOCATION, CHANNELS, COPIED, JOURNAL
from sppctl.files.safe_files import OwnFiles, TensorFiles
from sppctl.model import checkpoint, find
from sppctl.model.blocks import BlockStack, Decoder
from sppctl.pattern import Pattern
from sppctl.prune import calibrate, permute
from sppctl.prune.activations import Activations
from sppctl.prune.checks import Prepared
from sppctl.prune.choose import check_prunes, is_overridden, measures_blocks
from sppctl.prune.layers import PrunePlan
from sppctl.prune.walk import Journal, dense_scores, prune_blocks, start_again
from sppctl.pruners import allocate
from sppctl.pruners.registry import find_allocation
from sppctl.records import BlockRecord, LayerRecord, Permuted, PruneRecord

ACTIVATIONS = "activations.bin"
Callback = Callable[[LayerRecord, int, int], object]


def execute(config: Config, prepared: Prepared, base: Path, out: Path, *, dtype: str) -> PruneRecord:
    """Prunes the checkpoint ``base`` into the directory ``out``, resuming an interrupted attempt.

    ``out`` also holds the journal of what is done, which is removed on publication (:func:`sppctl.run.attempts.clean`).
    ``dtype`` is the name of the compute dtype.

    Raises:
        StageError: broken weights, or an architecture whose blocks cannot be replayed.
    """
    device = checkpoint.pick_device(config.model.device)
    distributed.connect(device)
    stack, drawn = BlockStack(base, device, dtype, config.model.trust_remote_code), prepared.drawn
    if drawn is not None:
        tokenizer = checkpoint.load_tokenizer(base, config.model.trust_remote_code)
        drawn = drawn if cache.same_tokenizer(drawn.tokenizer, tokenizer) else calibrate.draw(config, tokenizer)
    check_blocks(stack, drawn, config.prune)
    distributed.decide(lambda: _copy(config, stack, prepared, out))
    return prune_decoder(config.prune, prepared, stack, drawn, out, OwnFiles(out))


def check_blocks(stack: Decoder, drawn: calibrate.Drawn | None, prune: PruneConfig) -> None:
    """Loads the embeddings, and checks that replayed blocks equal the model; nothing if no inputs are needed.

    Raises:
        StageError: they differ, or give values that are not finite.
        UserError: attention and MLP of a block cannot be tuned apart, but ``prune`` asks for it.
    """
    if unsupported := stack.unsupported_experts():
        console.warn(f"prune.targets: experts in a form that cannot be pruned stay dense: {unsupported}")
    if drawn is not None:
        stack.load_embeddings()
        first = drawn.tokens[distributed.rank()].unsqueeze(0).to(stack.device)
        with console.Progress("checking that replayed blocks equal the model", len(stack)) as bar:
            stack.check_replay(first, lambda _: bar.advance())
    if prune.reconstruct_epochs and prune.reconstruct_unit == "sublayer" and len(stack.borders) < len(stack):
        index = min(set(range(len(stack))) - stack.borders.keys())
        problem = f"in block {index} of {type(stack.model).__name__}, no MLP follows after attention and its residual"
        raise UserError("prune.reconstruct_unit", problem, "set prune.reconstruct_unit=block")


def prune_decoder(
    prune: PruneConfig,
    prepared: Prepared,
    stack: Decoder,
    drawn: calibrate.Drawn | None,
    folder: Path,
    out: OwnFiles | None,
    callback: Callback | None = None,
) -> PruneRecord:
    """Prunes block by block.

    Args:
        prune: the settings.
        prepared: the matrices and their patterns.
        stack: the model, with its embeddings loaded.
        drawn: the calibration windows of all processes.
        folder: for hidden states that do not fit into memory and, if there is ``out``, the journal.
        out: files of a copy of the checkpoint; None: only the model in memory is pruned.
        callback: called after each matrix with its record, the number of pruned matrices, and that of all.
    """
    masks = None if prune.mask_from is None else TensorFiles(find.locate(prune.mask_from))
    plan = PrunePlan(prune, prepared.targets, prepared.patterns, masks)
    windows = None if drawn is None else drawn.tokens[distributed.rank() :: distributed.world_size()]
    if measures_blocks(prune):
        assert windows is not None
        plan = replace(plan, patterns=_allocated(stack, plan, windows, folder))
    permuted = []
    if prune.permute_channels:
        assert windows is not None
        permuted = _permuted(stack, plan, windows, folder, out)
    activations = None if windows is None else _embed(stack, windows, prune, folder)
    if activations is not None and prune.reconstruct_epochs and prune.reconstruct_target == "dense":
        activations.keep_dense()
    journal = Journal(None if out is None else folder / JOURNAL)
    if journal.blocks:
        console.note(f"prune: {len(journal.blocks)} of {len(stack)} blocks are done")
    blocks = []
    with console.Progress(f"pruning {prune.method} {prune.pattern}", len(plan.targets)) as bar:
        for entry in prune_blocks(stack, plan, activations, out, journal):
            blocks.append(entry)
            for layer in entry.layers:
                error = layer.relative_output_error
                bar.advance(layer.name if error is None else f"{layer.name} error {error:.3f}")
                if callback is not None:
                    callback(layer, bar.done, bar.total)
    if distributed.is_main():
        for path in folder.glob(f"{ACTIVATIONS}.*"):
            path.unlink(missing_ok=True)
    return replace(_summary(prune, blocks, activations, drawn), permuted=permuted)


def _copy(config: Config, stack: BlockStack, prepared: Prepared, out: Path) -> None:
    """Copies the checkpoint, after checking that the tensors that pruning never loads are finite.

    An interrupted copy is started again.
    """
    if not (out / COPIED).exists():
        stack.check_rest(prepared.targets.values())
        for name in (JOURNAL, CHANNELS):
            (out / name).unlink(missing_ok=True)
        base = stack.files.directory
        with console.working(f"copying {base}"):
            checkpoint.copy_for_rewriting(base, out, config.model.dtype).sync()
        (out / COPIED).touch()


def _embed(stack: Decoder, windows: Tensor, prune: PruneConfig, folder: Path) -> Activations:
    return Activations(stack, windows, prune.batch_size, prune.memory, folder / f"{ACTIVATIONS}.{distributed.rank()}")


def _summary(
    prune: PruneConfig, blocks: list[BlockRecord], activations: Activations | None, drawn: calibrate.Drawn | None
) -> PruneRecord:
    layers = [layer for block in blocks for layer in block.layers]
    weights = sum(layer.size for layer in layers)
    errors = [layer.relative_output_error for layer in layers if layer.relative_output_error is not None]
    fallbacks = [f"{layer.name} by {layer.fallback}" for layer in layers if layer.fallback]
    if fallbacks:
        first = fallbacks[0] + (", ..." if len(fallbacks) > 1 else "")
        console.warn(f"{len(fallbacks)} matrices of experts that saw too few tokens were pruned by a fallback: {first}")
    return PruneRecord(
        method=prune.method,
        pattern=_pattern_text(prune, layers),
        order=prune.order if activations else None,
        activations=activations.place if activations else None,
        processes=distributed.world_size(),
        matrices=len(layers),
        fallbacks=len(fallbacks),
        pruned_weights=weights,
        sparsity=sum(layer.sparsity * layer.size for layer in layers) / weights,
        mean_relative_output_error=sum(errors) / len(errors) if errors else None,
        reconstruction={block.block: block.reconstruction for block in blocks if block.reconstruction} or None,
        layers=layers,
        calibration=None if drawn is None else drawn.record,
        zeros_before=sum(layer.zeros_before for layer in layers),
    )


def _pattern_text(prune: PruneConfig, layers: list[LayerRecord]) -> str:
    """The patterns of the matrices, the most frequent first: ``2:4, 4:8 in 12 matrices``.

    Ratios that differ by block count as one pattern, their mean, which is ``prune.pattern``.
    """
    suffix = {"uniform": "", "owl": " by outliers"}.get(str(prune.allocation), " by block")
    counts = Counter(
        str(layer.pattern) if is_overridden(prune, layer.name) else f"{prune.pattern}{suffix}" for layer in layers
    ).most_common()
    return ", ".join([counts[0][0], *(f"{pattern} in {count} matrices" for pattern, count in counts[1:])])


def _for_scores(plan: PrunePlan, names: Collection[str]) -> PrunePlan:
    """The plan for the scores of some targets, which are Wanda's, whatever the method."""
    targets = {name: target for name, target in plan.targets.items() if name in names}
    return replace(plan, settings=replace(plan.settings, method="wanda"), targets=targets)


def _permuted(stack: Decoder, plan: PrunePlan, windows: Tensor, folder: Path, out: OwnFiles | None) -> list[Permuted]:
    """Reorders the channels of the model, and of its copy ``out``; returns what the orders gain."""
    prune, path = plan.settings, folder / CHANNELS
    found = permute.find(stack, plan.targets, plan.patterns)
    reading = any(name.rpartition(".")[2] in permute.READING for name in plan.targets)
    if reading and not any(channels.name == permute.HIDDEN for channels in found):
        console.warn(
            "prune.permute_channels: only inside of blocks: the order of the hidden states stays, because some layers "
            "are none of those that are known to read or write them"
        )
    if path.exists():
        content = sealed.read(path, start_again(folder))
        by_head = {name: [torch.tensor(head) for head in heads] for name, heads in content["orders"].items()}
        stack.reorder(permute.orders_of_parameters(found, by_head))
        return [Permuted(name, *shares) for name, shares in content["shares"].items()]
    scored = _for_scores(plan, permute.readers(found).keys())
    dense = _embed(stack, windows, prune, folder)
    with console.working("finding the order of the channels"):
        by_head, permuted = permute.best_orders(stack, scored, found, dense)
    expected = dense.hidden[0].clone()  # the next ones may use the same file
    del dense
    orders = permute.orders_of_parameters(found, by_head)
    stack.reorder(orders)
    first, num_blocks = _embed(stack, windows[:1], prune, folder), scored.last_block(stack) + 1
    try:
        permute.check_same(stack, num_blocks, first, expected, orders, by_head.get(permute.HIDDEN, [None])[0])
    except StageError:
        stack.reorder(permute.inverse(orders))  # a model in memory is the caller's
        raise
    if out is not None and distributed.is_main():
        assert isinstance(stack, BlockStack)
        stack.write_reordered(out, {f"{target.owner}.{target.parameter}" for target in plan.targets.values()})
        out.sync()
        shares = {one.name: [one.before, one.after] for one in permuted}
        lists = {name: [head.tolist() for head in heads] for name, heads in by_head.items()}
        sealed.write(path, {"orders": lists, "shares": shares})
    distributed.barrier()
    return permuted


def _allocated(stack: Decoder, plan: PrunePlan, windows: Tensor, folder: Path) -> dict[str, Pattern]:
    """Ratios by what an allocation measures in each dense block: one more pass over the windows; overrides stay."""
    prune, patterns = plan.settings, dict(plan.patterns)
    adjustable = {name: target for name, target in plan.targets.items() if not is_overridden(prune, name)}
    if not adjustable:
        return patterns
    plan = _for_scores(plan, adjustable)
    path = folder / ALLOCATION
    if path.exists():
        ratios = sealed.read(path, start_again(folder))
    else:
        ratios = _ratios(stack, plan, _embed(stack, windows, prune, folder))
        if distributed.is_main():
            sealed.write(path, ratios)
        distributed.barrier()
    blocks = plan.by_block(stack)
    for index, ratio in ratios.items():
        patterns |= dict.fromkeys(blocks[int(index)], Pattern(ratio=ratio))
    for name, target in adjustable.items():
        try:
            check_prunes(prune, target, patterns[name])
        except ValueError as error:
            raise StageError(f"prune.allocation: {error}") from error
    return patterns


def _ratios(stack: Decoder, plan: PrunePlan, activations: Activations) -> dict[str, float]:
    """The ratio of each block that has something to prune, by its index."""
    prune = plan.settings
    assert prune.pattern.ratio is not None
    allocation = find_allocation(str(prune.allocation))
    blocks, values, sizes = [], [], []
    with console.Progress(f"measuring blocks ({prune.allocation})", len(stack)) as bar:
        for index, scores in enumerate(dense_scores(stack, plan, activations)):
            if scores:
                blocks.append(str(index))
                values.append(allocation.measure(scores))
                sizes.append(sum(score.numel() for score in scores))
            bar.advance(f"{values[-1]:.4f}" if scores else "")
    options = {name: getattr(prune, name) for name in allocation.options}
    try:
        ratios = allocation.ratios(values, sizes, prune.pattern.ratio, **options)
        allocate.check_ratios(ratios, sizes, prune.pattern.ratio)
    except ValueError as error:
        raise StageError(f"prune.allocation: {error}") from error
    return dict(zip(blocks, ratios, strict=True))
