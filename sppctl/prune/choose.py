"""Patterns, need for inputs, and memory of a pruning, from the configuration and shapes alone."""

from __future__ import annotations

from sppctl.config.settings import PruneConfig, Unused, changed_in_vain
from sppctl.errors import UserError
from sppctl.model.blocks import Skeleton
from sppctl.model.targets import Target, matches
from sppctl.pattern import Pattern
from sppctl.pruners import PRUNERS
from sppctl.pruners.allocate import ALLOCATIONS
from sppctl.pruners.registry import find_pruner

CPU_TOKENS = 4096  # of a micro-batch on the CPU, where larger ones gain nothing
GPU_SHARE = 0.25  # of the free GPU memory, for hidden states and for a micro-batch each
BLOCK_WIDTHS = 40  # activations alive inside a block, in hidden states: attention, gate, up and their products
WAITING_WIDTHS = 12  # held by a window that waits inside a block, in hidden states: 8 to 11 measured


def needs_inputs(prune: PruneConfig) -> bool:
    """Whether calibration text has to be run through the model."""
    return find_pruner(prune.method).statistics is not None or measures_blocks(prune) or prune.reconstruct_epochs > 0


def measures_blocks(prune: PruneConfig) -> bool:
    """Whether the ratios of the blocks depend on their weights and inputs (OWL, or an allocation from outside)."""
    return isinstance(prune.allocation, str) and prune.allocation != "uniform"


def tuning_passes(prune: PruneConfig) -> int:
    """Cost of tuning the blocks, in forward passes over all windows: a backward pass is two."""
    epochs = prune.reconstruct_epochs
    return 3 * epochs + (epochs > 0 and prune.reconstruct_target == "dense")


def hidden_states_per_token(prune: PruneConfig) -> int:
    """Hidden states that are kept of each token: those of the pruned model, and what its blocks are tuned on."""
    outputs = 2 if prune.reconstruct_unit == "sublayer" else 1
    return 1 + (outputs if prune.reconstruct_epochs else 0)


def windows_at_a_time(batch_size: int | str, samples: int, seq_len: int) -> int:
    """Windows that run through a block together; ``auto`` gives the number for a CPU, a GPU may use more."""
    return min(samples, batch_size if isinstance(batch_size, int) else max(1, CPU_TOKENS // seq_len))


def inside_a_block(prune: PruneConfig, samples: int, hidden: int, running: int | None = None) -> int:
    """Bytes of the activations inside a block, in module order also of the windows that wait there.

    Args:
        prune: order, batch size and window length.
        samples: windows in this process.
        hidden: bytes of the hidden state of a token.
        running: bytes of the windows that run, if they are not those of :func:`windows_at_a_time`.
    """
    window = prune.calibration.seq_len * hidden
    if running is None:
        running = windows_at_a_time(prune.batch_size, samples, prune.calibration.seq_len) * window * BLOCK_WIDTHS
    return running + (samples * window * WAITING_WIDTHS if prune.order == "module" else 0)


def planned_patterns(prune: PruneConfig, targets: dict[str, Target], skeleton: Skeleton) -> dict[str, Pattern]:
    """The pattern of every target: its override, else its block's ratio where a list gives one, else the common one."""
    blocks = [f"{skeleton.blocks_name}.{index}." for index in range(len(skeleton.blocks))]
    patterns = dict.fromkeys(targets, prune.pattern)
    if isinstance(prune.allocation, list):
        if len(prune.allocation) != len(blocks):
            raise UserError(
                "prune.allocation", f"{len(prune.allocation)} ratios for {len(blocks)} blocks", "give one per block"
            )
        for prefix, ratio in zip(blocks, prune.allocation, strict=True):
            try:
                pattern = Pattern.parse(ratio)
            except ValueError as error:
                raise UserError("prune.allocation", str(error)) from error
            patterns |= {name: pattern for name in targets if name.startswith(prefix)}
    for name, pattern in prune.overrides.items():
        matching = [target for target in targets if matches(target, name)]
        if not matching:
            raise UserError("prune.overrides", f"{name!r} matches none of the {len(targets)} targets")
        patterns |= dict.fromkeys(matching, pattern)
    return patterns


def is_overridden(prune: PruneConfig, name: str) -> bool:
    """Whether a target has a pattern of its own (``prune.overrides``)."""
    return any(matches(name, override) for override in prune.overrides)


def ignored(prune: PruneConfig) -> list[str]:
    """Changed keys that have no effect, one line per reason."""
    others = {key for pruner in PRUNERS.values() for key in pruner.options} - {"keep_zeros"}
    unused = others - set(find_pruner(prune.method).options)
    found = [Unused(prune, "prune", unused, f"with prune.method={prune.method}")]
    if prune.allocation != "owl":
        found.append(Unused(prune, "prune", set(ALLOCATIONS["owl"].options), "without prune.allocation=owl"))
    if not prune.reconstruct_epochs:
        keys = {f"reconstruct_{key}" for key in ("lr", "batch_size", "loss", "scheduler", "target", "unit")}
        found.append(Unused(prune, "prune", keys, "without prune.reconstruct_epochs"))
    return changed_in_vain(found)


def check_prunes(prune: PruneConfig, target: Target, pattern: Pattern) -> None:
    """Raises ValueError if a ratio is so small that no weight of a matrix becomes zero."""
    columns = {"magnitude": target.in_features, "sparsegpt": min(prune.block_size, target.in_features)}
    compared = columns[prune.method] * target.out_features if prune.method in columns else target.in_features
    if not pattern.num_pruned(compared):
        raise ValueError(
            f"{pattern} prunes nothing in {target.name}: {prune.method} compares {compared} weights with each other, "
            "and that share of them is less than one; raise the ratio, or leave the layer out (prune.skip)"
        )
