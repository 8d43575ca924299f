"""The loop over blocks: load, prune, write, record, run again for the next block's inputs."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sppctl import distributed
from sppctl.errors import UserError
from sppctl.files import integrity, sealed, strict_json
from sppctl.files.safe_files import OwnFiles
from sppctl.model.blocks import BlockStack, Decoder
from sppctl.model.targets import Target
from sppctl.prune.activations import Activations
from sppctl.prune.block_work import BlockWork, Groups
from sppctl.prune.given_masks import warn_of_sparser
from sppctl.prune.layers import PrunePlan
from sppctl.pruners.wanda import wanda_scores
from sppctl.records import BlockRecord, from_json, to_json


def start_again(partial: Path) -> str:
    """The fix, for an error, of a damaged attempt in a directory."""
    discard = shlex.join(["sppctl", "clean", str(partial.parent), "--kinds", "unfinished", "--yes"])
    return f"{discard} discards the attempt, so that the same command starts again"


class Journal:
    """The finished blocks with their records: one line of JSON each, written after the block's weights."""

    def __init__(self, path: Path | None = None) -> None:
        """Reads the journal of an interrupted run; an incomplete last line is not a finished block.

        Without a path, which is for a model in memory, nothing is written.

        Raises:
            UserError: another line is damaged.
        """
        self.path = path
        self.blocks: list[BlockRecord] = []
        if path is not None and path.is_file():
            lines = path.read_bytes().split(b"\n")
            for number, line in enumerate(lines[:-1]):
                try:
                    entry = from_json(BlockRecord, sealed.parse(line))
                    if entry.block != number:
                        raise ValueError(f"it records block {entry.block}, not {number}")
                except ValueError as error:
                    fix = start_again(path.parent)
                    raise UserError(str(path), f"line {number + 1} is damaged ({error})", fix) from error
                self.blocks.append(entry)
            # an incomplete line would corrupt the next one
            if lines[-1]:
                with path.open("r+b") as file:
                    file.truncate(sum(len(line) + 1 for line in lines[:-1]))

    def append(self, entry: BlockRecord) -> None:
        """Records a finished block; it is on the disk when this returns."""
        self.blocks.append(entry)
        if self.path is not None and distributed.is_main():
            with self.path.open("a") as file:
                file.write(strict_json.dumps(sealed.seal(to_json(entry))) + "\n")
                file.flush()
                os.fsync(file.fileno())


@torch.no_grad()
def prune_blocks(
    stack: Decoder, plan: PrunePlan, activations: Activations | None, out: OwnFiles | None, journal: Journal
) -> Iterator[BlockRecord]:
    """Prunes every block in turn and writes its layers to ``out``.

    Args:
        stack: the model to prune, a :class:`BlockStack` if there are files to write to.
        plan: patterns and settings.
        activations: the embedded calibration windows; None for methods that need no inputs.
        out: files of a copy of the checkpoint, in which the journal's blocks are pruned; None: the model in memory is
            all there is.
        journal: of the finished blocks, which are run but not pruned.

    Yields:
        The record of each block; only the first process's records have digests of masks and weights.

    Raises:
        UserError: the copy does not match the journal.
    """
    groups: Groups = {}
    blocks = plan.by_block(stack)
    last = plan.last_block(stack)
    if len(journal.blocks) > last:
        activations = None  # nothing is left that needs them
    for index, targets in enumerate(blocks):
        feeding = activations if index < last else None
        if index < len(journal.blocks):
            assert isinstance(stack, BlockStack)
            assert out is not None
            _replay(stack, journal.blocks[index], targets, feeding, out)
            yield journal.blocks[index]
            continue
        if targets or feeding is not None:
            stack.load_block(index)
        entry = BlockRecord(index, [], None, {})
        if targets:
            entry = _prune(BlockWork(stack, index, targets, plan, activations, groups, out), out)
        elif feeding is not None:
            feeding.run_dense(index)
        distributed.barrier()
        journal.append(entry)
        # in module order the pass that pruned the block has computed the next one's inputs
        if feeding is not None and (plan.settings.order == "block" or not targets):
            feeding.run(index)
        stack.release_block(index)
        yield entry
    if plan.masks is not None:
        warn_of_sparser([layer for entry in journal.blocks for layer in entry.layers])


def _replay(
    stack: BlockStack, entry: BlockRecord, targets: dict[str, Target], feeding: Activations | None, out: OwnFiles
) -> None:
    """Compares a finished, pruned block with the journal, and runs it if the next one needs its output."""
    if feeding is not None:
        stack.load_block(entry.block)
        feeding.run_dense(entry.block)
    for name, target in targets.items():
        weight = stack.matrix(target, out)
        if integrity.tensor_digest(weight) != entry.weights[name]:
            raise UserError(str(out.directory), f"{name} does not match the journal", start_again(out.directory))
        if feeding is not None:
            target.view(stack.model).copy_(weight)
    if feeding is not None:
        feeding.run(entry.block)
        stack.release_block(entry.block)


def _prune(work: BlockWork, out: OwnFiles | None) -> BlockRecord:
    """Prunes a loaded block and writes it to ``out``, if there is such a copy; returns its record."""
    stack, layers = work.stack, work.prune()
    entry = BlockRecord(work.index, layers, work.reconstruction, {})
    if out is None:
        masks = {name: integrity.mask_digest(target.view(stack.model)) for name, target in work.targets.items()}
        return replace(entry, layers=[replace(layer, mask=masks[layer.name]) for layer in entry.layers])
    if not distributed.is_main():
        return entry
    assert isinstance(stack, BlockStack)
    return _write(stack, entry, work.targets, out)


def _write(stack: BlockStack, entry: BlockRecord, targets: dict[str, Target], out: OwnFiles) -> BlockRecord:
    """Writes a pruned block to the disk; returns its record with the digests of what was written."""
    for target in {(t.owner, t.parameter): t for t in targets.values()}.values():
        stack.write(target, out)
    out.sync({name for target in targets.values() for name in stack.homes(target)})
    layers, weights = [], {}
    for layer in entry.layers:
        weight = stack.matrix(targets[layer.name], out)  # as it will be read again
        layers.append(replace(layer, mask=integrity.mask_digest(weight)))
        weights[layer.name] = integrity.tensor_digest(weight)
    return replace(entry, layers=layers, weights=weights)


@torch.no_grad()
def dense_scores(stack: Decoder, plan: PrunePlan, activations: Activations) -> Iterator[list[Tensor]]:
    """Runs the dense model once and yields, per block, the Wanda scores of its targets (out_features, in_features).

    It ends with the last block that has targets.
    """
    groups: Groups = {}
    blocks = plan.by_block(stack)
    for index, targets in enumerate(blocks[: plan.last_block(stack) + 1]):
        stack.load_block(index)
        work = BlockWork(stack, index, targets, plan, activations, groups)
        work.gather(keep=True)
        yield [wanda_scores(target.view(stack.model), work.inputs[name].statistics) for name, target in targets.items()]
        stack.release_block(index)
