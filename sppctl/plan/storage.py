"""What pruning holds in memory, and what a run directory takes on the disk, from the model's shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from sppctl.config.settings import Config
from sppctl.machine import torch_dtype
from sppctl.model.blocks import Skeleton
from sppctl.plan import footprint
from sppctl.plan.footprint import FLOAT
from sppctl.prune.choose import BLOCK_WIDTHS, CPU_TOKENS, WAITING_WIDTHS, needs_inputs
from sppctl.pruners import PRUNERS, Hessian, InputMoments, InputNorms


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
    - hidden states of all windows, which ``prune.memory`` may keep elsewhere than on the device
    - activations inside a block (``BLOCK_WIDTHS`` hidden states) for the windows that run together; batch_size ``auto``
      is counted as ``CPU_TOKENS`` tokens, on a GPU it takes up to a quarter of what is free; in module order all
      windows wait inside a block besides (``WAITING_WIDTHS`` hidden states)
    - statistics of every distinct input (n features): wanda 4 n, dsnot 8 n, sparsegpt 4 n^2 and the inputs in float32
    - solving: the layers that share an input, before and after; their scores in float32 and mask; for sparsegpt the
      weights in float32 and four matrices (n, n) of the factorisation instead
    """
    prune = config.prune
    settings, d = prune.calibration, torch_dtype(dtype).itemsize
    targets = skeleton.targets(prune.targets, prune.skip)
    statistics = PRUNERS[prune.method].statistics
    solve, distinct = 0, []
    prefix = f"{skeleton.blocks_name}.0."
    first = {name: target for name, target in targets.items() if name.startswith(prefix)} or targets
    for inputs, out in footprint.projections(first):
        for group in filter(None, (inputs, [out])):
            n = first[group[0]].in_features
            elements = sum(first[name].out_features for name in group) * n
            working = 16 * n * n if statistics is Hessian else 0
            solve = max(solve, (2 * d + FLOAT + 1) * elements + working)
            distinct.append(n)
    windows = prune.batch_size
    if windows == "auto":
        windows = max(1, CPU_TOKENS // settings.seq_len)
    running = min(settings.samples, int(windows)) * settings.seq_len
    width = skeleton.config.get_text_config().hidden_size
    counted = [_statistics(statistics, n) for n in distinct]
    head = skeleton.model.get_output_embeddings()
    outside = _outside(skeleton, head)
    parts = {
        "embeddings": outside * d,
        "block": max(sum(p.numel() for p in block.parameters()) for block in skeleton.blocks) * d,
        "statistics": max(counted) if prune.order == "module" else sum(counted),
        "solving": solve,
        "hidden_states": 0,
        "running": 0,
        "tuning": 0,
    }
    if needs_inputs(prune):
        parts["hidden_states"] = settings.samples * settings.seq_len * width * d
        parts["running"] = running * width * d * BLOCK_WIDTHS
        if prune.order == "module":
            parts["running"] += parts["hidden_states"] * WAITING_WIDTHS
        if statistics is Hessian:
            parts["running"] += running * max(distinct) * FLOAT
    if prune.reconstruct_epochs:  # float32 copies of the weights, their gradients and Adam's moments
        parts["tuning"] = 4 * FLOAT * sum(target.out_features * target.in_features for target in first.values())
    # gathering and solving are different times of a block
    peak = sum(parts.values()) - min(parts["running"], parts["solving"])
    return Pruning(prune.method, running // settings.seq_len, **parts, peak=peak)


def _outside(skeleton: Skeleton, head: nn.Module | None) -> int:
    """Parameters that pruning holds throughout: all outside the blocks but the output head."""
    inside = {id(parameter) for parameter in skeleton.blocks.parameters()}
    if head is not None and head is not skeleton.model.get_input_embeddings():
        inside |= {id(parameter) for parameter in head.parameters()}
    return sum(parameter.numel() for parameter in skeleton.model.parameters() if id(parameter) not in inside)


def _statistics(kind: type[InputNorms] | type[Hessian] | None, n: int) -> int:
    if kind is None:
        return 0
    return FLOAT * (n * n if kind is Hessian else 2 * n if kind is InputMoments else n)


def disk(config: Config, parameters: int, stored: str, adapter: int) -> dict[str, int]:
    """Bytes of the run directory; a checkpoint is the adapter and AdamW's moments, and one more exists while saving."""
    weights = parameters * torch_dtype(stored).itemsize
    merged = stored if config.merge.dtype == "auto" else config.merge.dtype
    parts = {
        "base": weights if config.model.gguf_file is not None else 0,
        "pruned": weights,
        "adapter": adapter,
        "checkpoints": (config.train.keep_checkpoints + 1) * 3 * adapter,
        "merged": parameters * torch_dtype(merged).itemsize,
    }
    return parts | {"total": sum(parts.values())}
