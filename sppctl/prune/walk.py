"""The loop over blocks: load, prune, write, note as finished, run again to feed the next."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sppctl import distributed
from sppctl.errors import UserError
from sppctl.files import integrity, sealed, strict_json
from sppctl.files.safe_files import OwnFiles
from sppctl.model.blocks import BlockStack
from sppctl.prune.activations import Activations
from sppctl.prune.block_work import BlockWork
from sppctl.prune.given_masks import warn_of_sparser
from sppctl.prune.layers import Plan, SharedInputs

START_AGAIN = "sppctl prune --force starts the stage again"


class Journal:
    """Which blocks are finished, with their records: one line of JSON each, written after the block's weights."""

    def __init__(self, path: Path) -> None:
        """Reads what an interrupted run left; a torn last line is not a finished block.

        Raises:
            UserError: another line is damaged.
        """
        self.path = path
        self.blocks: list[dict[str, Any]] = []
        if path.is_file():
            lines = path.read_bytes().split(b"\n")
            for number, line in enumerate(lines[:-1]):
                try:
                    entry = sealed.parse(line)
                    if entry["block"] != number:
                        raise ValueError(f"it is of block {entry['block']}, not {number}")
                except ValueError as error:
                    raise UserError(f"{path}: line {number + 1} is damaged ({error}); {START_AGAIN}") from error
                self.blocks.append(entry)
            # what follows the last whole line would spoil the next one
            if lines[-1]:
                with path.open("r+b") as file:
                    file.truncate(sum(len(line) + 1 for line in lines[:-1]))

    def append(self, entry: dict[str, Any]) -> None:
        """Notes a finished block, on the disk before this returns."""
        self.blocks.append(entry)
        if distributed.is_main():
            with self.path.open("a") as file:
                file.write(strict_json.dumps(sealed.seal(entry)) + "\n")
                file.flush()
                os.fsync(file.fileno())


@torch.no_grad()
def prune_blocks(
    stack: BlockStack, plan: Plan, activations: Activations | None, out: OwnFiles, journal: Journal
) -> Iterator[dict[str, Any]]:
    """Prunes every block in turn and writes its layers to ``out``.

    Args:
        stack: the checkpoint to prune.
        plan: how.
        activations: the embedded calibration windows; None for methods that need no inputs.
        out: files that hold a copy of the checkpoint, pruned as far as the journal says.
        journal: of finished blocks; those are only run, not pruned.

    Yields:
        Per block: ``{"block", "layers": [LayerRecord as dict, in the first process with the digest of its mask],
        "reconstruction": errors before and after or None, "weights": digest of each matrix by name}``.

    Raises:
        UserError: the copy does not hold what the journal says.
    """
    groups = SharedInputs()
    last = _last_with_targets(stack, plan)
    if len(journal.blocks) > last:
        activations = None  # nothing is left that needs them
    for index in range(len(stack)):
        targets = plan.in_block(f"{stack.blocks_name}.{index}.")
        feeding = activations if index < last else None
        if index < len(journal.blocks):
            if feeding is not None:
                stack.load_block(index)
            for name, target in targets.items():
                weight = stack.matrix(target, out)
                if integrity.tensor_digest(weight) != journal.blocks[index]["weights"][name]:
                    raise UserError(f"{out.directory}: {name} is not what was pruned; {START_AGAIN}")
                if feeding is not None:
                    target.view(stack.model).copy_(weight)
            if feeding is not None:
                feeding.run(index)
                stack.release_block(index)
            yield journal.blocks[index]
            continue
        entry: dict[str, Any] = {"block": index, "layers": [], "reconstruction": None, "weights": {}}
        if targets or feeding is not None:
            stack.load_block(index)
        if targets:
            work = BlockWork(stack, index, targets, plan, activations, groups, out)
            records = work.prune()
            entry["layers"] = [asdict(record) for record in records]
            entry["reconstruction"] = work.reconstruction
            if distributed.is_main():
                for target in {(t.owner, t.parameter): t for t in targets.values()}.values():
                    stack.write(target, out)
                out.sync({name for target in targets.values() for name in stack.homes(target)})
                for layer in entry["layers"]:
                    weight = stack.matrix(targets[layer["name"]], out)  # as it will be read again
                    layer["mask"] = integrity.mask_digest(weight)
                    entry["weights"][layer["name"]] = integrity.tensor_digest(weight)
        distributed.barrier()
        journal.append(entry)
        # in module order the pass that pruned the block has fed the next
        if feeding is not None and (plan.order == "block" or not targets):
            feeding.run(index)
        stack.release_block(index)
        yield entry
    if plan.masks is not None:
        warn_of_sparser([layer for entry in journal.blocks for layer in entry["layers"]])


@torch.no_grad()
def dense_pass(
    stack: BlockStack, plan: Plan, activations: Activations, make: Callable[..., Any]
) -> Iterator[list[Tensor]]:
    """Runs the dense model once and yields, per block, the Wanda scores of its targets (out_features, in_features).

    It ends with the last block that has targets.
    """
    shared = SharedInputs()
    for index in range(_last_with_targets(stack, plan) + 1):
        targets = plan.in_block(f"{stack.blocks_name}.{index}.")
        stack.load_block(index)
        work = BlockWork(stack, index, targets, plan, activations, shared)
        work.gather(make, keep=True)
        yield [
            target.view(stack.model).float().abs() * work.inputs[name].statistics.norms()
            for name, target in targets.items()
        ]
        stack.release_block(index)


def _last_with_targets(stack: BlockStack, plan: Plan) -> int:
    """The last block that is pruned: nobody reads what it and later ones give."""
    return max(index for index in range(len(stack)) if plan.in_block(f"{stack.blocks_name}.{index}."))
