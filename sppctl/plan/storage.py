"""Memory of pruning, and disk space of a run directory, from the model's shapes alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sppctl.config.settings import Config, EvalConfig, PruneConfig
from sppctl.data import texts
from sppctl.machine import torch_dtype
from sppctl.model import checkpoint
from sppctl.model.blocks import Skeleton
from sppctl.model.targets import Target
from sppctl.plan import footprint
from sppctl.plan.footprint import FLOAT
from sppctl.prune.choose import hidden_states_per_token, inside_a_block, needs_inputs, windows_at_a_time
from sppctl.pruners import Hessian, InputMoments
from sppctl.pruners.registry import find_pruner

DEFAULT_WINDOW = 2048  # tokens; that of sppctl.evaluate.perplexity, which the plan does not import


@dataclass(frozen=True)
class Pruning:
    """Bytes of the pruning stage, part by part, and the most at a time."""

    method: str
    windows_at_a_time: int
    embeddings: int
    block: int
    statistics: int
    solving: int
    hidden_states: int
    running: int
    tuning: int
    peak: int


def pruning(config: Config, skeleton: Skeleton, dtype: str) -> Pruning:
    """Bytes of the pruning stage in one process that computes in a dtype: one block at a time.

    - embeddings and norms outside the blocks, and the largest block
    - hidden states of all windows, which ``prune.memory`` may keep off the device; tuning blocks needs further ones
    - activations inside a block (``BLOCK_WIDTHS`` hidden states) for the windows that run together; batch_size ``auto``
      is counted as ``CPU_TOKENS`` tokens, on a GPU it takes up to a quarter of what is free; in module order all
      windows also wait inside a block (``WAITING_WIDTHS`` hidden states)
    - statistics of every distinct input (n features): wanda 4 n, dsnot 8 n, sparsegpt 4 n^2 and the inputs in float32
    - solving: the layers that share an input, before and after; their scores in float32 and mask; for sparsegpt the
      weights in float32 and four matrices (n, n) of the factorisation instead, and with act_order a reordered copy of
      the weights and of the statistics; with permute_channels at least the largest block in float32
    """
    prune, d = config.prune, torch_dtype(dtype).itemsize
    statistics: Any = find_pruner(prune.method).statistics
    samples, seq_len = prune.calibration.samples, prune.calibration.seq_len
    targets = skeleton.targets(prune.targets, prune.skip)
    first_block = {name: target for name, target in targets.items() if name.startswith(f"{skeleton.blocks_name}.0.")}
    groups = [
        (targets[group[0]].in_features, sum(targets[name].out_features for name in group))
        for inputs, out in footprint.projections(first_block or targets)
        for group in filter(None, (inputs, [out]))
    ]
    # statistics from outside the package are counted as norms
    counted = [FLOAT * {None: 0, InputMoments: 2 * n, Hessian: n * n}.get(statistics, n) for n, _ in groups]
    factors = [FLOAT * (4 + prune.act_order) * n * n if statistics is Hessian else 0 for n, _ in groups]
    copies = 2 + prune.act_order
    solving = max((copies * d + FLOAT + 1) * n * m + factor for (n, m), factor in zip(groups, factors, strict=True))
    windows = windows_at_a_time(prune.batch_size, samples, seq_len)
    hidden_states = running = tuning = 0
    if needs_inputs(prune):
        hidden = skeleton.config.get_text_config().hidden_size * d
        hidden_states = samples * seq_len * hidden * hidden_states_per_token(prune)
        running = inside_a_block(prune, samples, hidden)
        if statistics is Hessian:
            running += windows * seq_len * max(n for n, _ in groups) * FLOAT
    if prune.reconstruct_epochs:  # float32 copies of the weights, their gradients and Adam's moments; the dense weights
        matrices = first_block or targets
        size = sum(target.out_features * target.in_features for target in matrices.values())
        tuning = 4 * FLOAT * _tuned_together(prune, matrices) + size * d
    largest = max(sum(p.numel() for p in block.parameters()) for block in skeleton.blocks)
    if prune.permute_channels:  # a block in float32
        solving = max(solving, largest * FLOAT)
    parts = {
        "embeddings": _outside(skeleton) * d,
        "block": largest * d,
        "statistics": max(counted) if prune.order == "module" else sum(counted),
        "solving": solving,
        "hidden_states": hidden_states,
        "running": running,
        "tuning": tuning,
    }
    # inputs are gathered and layers solved at different times
    return Pruning(prune.method, windows, **parts, peak=sum(parts.values()) - min(running, solving))


def _tuned_together(prune: PruneConfig, targets: dict[str, Target]) -> int:
    """Weights of a block that are tuned together, of its targets; the first module of these is taken for attention."""
    modules = [[*inputs, out] for inputs, out in footprint.projections(targets)]
    sizes = [sum(targets[name].out_features * targets[name].in_features for name in names) for names in modules]
    return max(sizes[0], sum(sizes[1:])) if prune.reconstruct_unit == "sublayer" else sum(sizes)


def _outside(skeleton: Skeleton) -> int:
    """Parameters that pruning holds throughout: all outside the blocks but the output head."""
    head, embeddings = skeleton.model.get_output_embeddings(), skeleton.model.get_input_embeddings()
    modules = [skeleton.blocks] if head is None or head is embeddings else [skeleton.blocks, head]
    left_out = {id(parameter) for module in modules for parameter in module.parameters()}
    return sum(parameter.numel() for parameter in skeleton.model.parameters() if id(parameter) not in left_out)


def scratch(config: Config, skeleton: Skeleton, hidden_states: int, dtypes: Iterable[str]) -> int:
    """Bytes of the hidden states that pruning (with ``prune.memory=disk``) or the evaluation keeps on disk for a while.

    Args:
        config: of the run.
        skeleton: of its model.
        hidden_states: bytes of those that pruning keeps.
        dtypes: different ones that checkpoints are evaluated in; the dense model's hidden states are kept in each.
    """
    measure, width = config.eval, skeleton.config.get_text_config().hidden_size
    window = measure.seq_len or min(DEFAULT_WINDOW, checkpoint.max_window(skeleton.config) or DEFAULT_WINDOW)
    rows = 0 if measure.divergence is None else sum(_rows(measure, text, window) for text in measure.perplexity)
    kept = rows * width * sum(torch_dtype(dtype).itemsize for dtype in dtypes)
    return max(hidden_states if config.prune.memory == "disk" else 0, kept)


def _rows(measure: EvalConfig, text: str, window: int) -> int:
    """Tokens in all windows of a text, which overlap if ``eval.stride`` is shorter; 0 if its length is unknown.

    It is known, at most, if ``eval.max_tokens`` or the text's protocol limits it.
    """
    limits = [measure.max_tokens, texts.C4_WINDOWS * window if text == "c4" else None]
    tokens = min((limit for limit in limits if limit is not None), default=0)
    # the last window that is not full is left out
    return max(0, (tokens - window) // (measure.stride or window) + 1) * window


def adapter(config: Config, skeleton: Skeleton, targets: Mapping[str, Target], trainable: int, stored: str) -> int:
    """Bytes of a saved adapter of the trained ``targets``, with the files that belong to it.

    Parameters in float32 and the masks of ste. A refresh of the mask adds the pruned matrices that it changes, all of
    them at most, in the dtype ``stored`` of the pruned checkpoint.
    """
    size = FLOAT * trainable + footprint.mask_bytes(config.train.method, trainable)
    if config.train.refresh.steps is None:
        return size
    pruned = skeleton.targets(config.prune.targets, config.prune.skip)
    refreshed = [target for name, target in targets.items() if name in pruned]
    weights = sum(target.out_features * target.in_features for target in refreshed)
    return size + weights * torch_dtype(stored).itemsize


def merged_dtype(config: Config, stored: str) -> str:
    """The dtype of the merged checkpoint."""
    return stored if config.merge.dtype == "auto" else config.merge.dtype


def disk(config: Config, parameters: int, stored: str, adapter: int, optimizer: int, temporary: int) -> dict[str, int]:
    """Bytes of the run directory, from those of a saved :func:`adapter` and of the optimizer's state.

    A checkpoint holds both. One more exists while saving, and another with the best adapter (``train.keep_best``).
    ``temporary``: the bytes of :func:`scratch`.
    """
    checkpoints = config.train.keep_checkpoints + 1 + (config.train.keep_best is not None)
    weights = parameters * torch_dtype(stored).itemsize
    parts = {
        "base": weights if config.model.gguf_file is not None else 0,
        "pruned": weights,
        "adapter": adapter,
        "checkpoints": checkpoints * (adapter + optimizer),
        "merged": parameters * torch_dtype(merged_dtype(config, stored)).itemsize,
        "scratch": temporary,
    }
    return parts | {"total": sum(parts.values())}
