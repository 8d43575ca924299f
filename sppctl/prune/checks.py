"""Checks before any weight is written: configuration, file headers, disk, memory, calibration text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sppctl import console, launch, machine
from sppctl.config.settings import Config, PruneConfig
from sppctl.data import vocabulary
from sppctl.errors import Problems, UserError
from sppctl.files.disk import demand_space
from sppctl.files.safe_files import TensorFiles
from sppctl.model import channel_order, checkpoint, find
from sppctl.model.blocks import Decoder, Skeleton, refuse_quantised
from sppctl.model.estimate import Work
from sppctl.model.targets import Target
from sppctl.model.weights import misfits
from sppctl.pattern import Pattern
from sppctl.prune import calibrate, given_masks, permute
from sppctl.prune.choose import (
    GPU_SHARE,
    check_prunes,
    ignored,
    inside_a_block,
    is_overridden,
    measures_blocks,
    needs_inputs,
    planned_patterns,
    tuning_passes,
)
from sppctl.pruners.allocate import MEAN_TOLERANCE
from sppctl.pruners.registry import find_allocation, find_pruner

# cost of a pruning in forward passes over all windows, measured on a CPU by benchmarks/prune.py
PASSES = {
    "magnitude": {"block": 1.0, "module": 1.0},
    "wanda": {"block": 2.1, "module": 1.2},
    "dsnot": {"block": 2.2, "module": 1.3},
    "sparsegpt": {"block": 3.1, "module": 2.3},
}


@dataclass(frozen=True)
class Prepared:
    """A checked pruning."""

    targets: dict[str, Target]  # the matrices, by name
    patterns: dict[str, Pattern]  # of each; OWL changes them once it has measured the outliers
    drawn: calibrate.Drawn | None  # the calibration windows; None: no inputs are needed
    work: Work  # how much there is to do
    sources: dict[str, str]  # hashes of the local files that the windows are from


def prepare(
    config: Config,
    skeleton: Skeleton,
    tokenizer: Any,
    sources: dict[str, str] | None = None,
    drawn: calibrate.Drawn | None = None,
) -> Prepared:
    """Checks everything that needs no weights of the dense model, and draws the calibration windows.

    Args:
        config: the configuration.
        skeleton: the dense model; a :class:`Decoder` is in memory, so there are no files to check.
        tokenizer: of the dense model.
        sources: hashes of the local files that the windows are from.
        drawn: windows to use instead of drawing them.

    Raises:
        UserError: with all problems, one per line.
    """
    prune, problems = config.prune, Problems()
    targets: dict[str, Target] = {}
    patterns: dict[str, Pattern] = {}
    with problems:
        _check_options(prune)
    with problems:
        targets = skeleton.targets(prune.targets, prune.skip)
        with problems:
            patterns = planned_patterns(prune, targets, skeleton)
            _check_patterns(prune, targets, patterns)
    with problems:
        _check_allocation(prune, targets, skeleton)
    with problems:
        _check_channels(prune, targets, patterns, skeleton)
    with problems:
        _check_processes(config, problems)
    with problems:
        _check_mask(config, targets, patterns, skeleton)
    if not isinstance(skeleton, Decoder):
        with problems:
            _check_files(config, skeleton)
    if drawn is None:
        with problems:
            drawn = _calibration(config, skeleton, tokenizer)
    problems.raise_all()
    for line in ignored(prune):
        console.warn(line)
    work = Work(f"{prune.method} {prune.pattern}, {len(targets)} matrices", 0)
    if drawn is not None:
        method = prune.method if prune.method in PASSES else "wanda"  # of a pruner from outside, only its inputs
        passes = PASSES[method][prune.order] + measures_blocks(prune) + prune.permute_channels + tuning_passes(prune)
        samples, length = drawn.tokens.shape
        work = Work(f"{work.text}, {samples} windows of {length} tokens", passes * samples * length)
    return Prepared(targets, patterns, drawn, work, sources or {})


# --- configuration ----------------------------------------------------------------------------------------------------


def _check_options(prune: PruneConfig) -> None:
    """Checks that the options of a pruner or an allocation from outside are keys of ``prune``, and one of SparseGPT."""
    chosen: list[tuple[str, tuple[str, ...]]] = [("prune.method", find_pruner(prune.method).options)]
    if measures_blocks(prune):
        chosen.append(("prune.allocation", find_allocation(str(prune.allocation)).options))
    for key, options in chosen:
        if unknown := [option for option in options if not hasattr(prune, option)]:
            raise UserError(key, f"its option {unknown[0]} is not a key of prune", "leave it out of its options")
    if prune.act_order and "act_order" not in chosen[0][1]:
        raise UserError("prune.act_order", f"{prune.method} does not go column by column", "use sparsegpt")


def _check_patterns(prune: PruneConfig, targets: dict[str, Target], patterns: dict[str, Pattern]) -> None:
    for name, pattern in patterns.items():
        try:
            pattern.check_in_features(targets[name].in_features, name)
            check_prunes(prune, targets[name], pattern)
        except ValueError as error:
            common = "prune.pattern" if pattern == prune.pattern else "prune.allocation"
            raise UserError("prune.overrides" if is_overridden(prune, name) else common, str(error)) from error


def _check_allocation(prune: PruneConfig, targets: dict[str, Target], skeleton: Skeleton) -> None:
    if prune.allocation == "uniform":
        return
    if prune.pattern.ratio is None:
        raise UserError("prune.allocation", f"splits a ratio over the blocks, but prune.pattern is {prune.pattern}")
    sizes = [0] * len(skeleton.blocks)  # of each block, without overridden matrices
    for name, target in targets.items():
        if not is_overridden(prune, name):
            block = name.removeprefix(f"{skeleton.blocks_name}.").partition(".")[0]
            sizes[int(block)] += target.out_features * target.in_features
    if prune.allocation == "owl":
        _check_owl(prune.owl_lambda, prune.pattern.ratio, [size for size in sizes if size])
    elif isinstance(prune.allocation, list) and len(prune.allocation) == len(sizes) and any(sizes):
        ratios = zip(prune.allocation, sizes, strict=True)
        mean = math.fsum(ratio * size for ratio, size in ratios) / sum(sizes)
        if 0 < mean < 1 and abs(mean - prune.pattern.ratio) > MEAN_TOLERANCE:
            raise UserError(
                "prune.allocation",
                f"the ratios' mean over all weights is {mean:.4g}, but prune.pattern is {prune.pattern}",
                f"set prune.pattern={mean:.4g}, or other ratios",
            )


def _check_channels(
    prune: PruneConfig, targets: dict[str, Target], patterns: dict[str, Pattern], skeleton: Skeleton
) -> None:
    """Checks that there are channels to reorder, inputs to do it by, and no zeros that belong to their order."""
    if not prune.permute_channels:
        return
    key, leave_out = "prune.permute_channels", "leave out prune.permute_channels"
    for other in ("mask_from", "keep_zeros"):
        if getattr(prune, other):
            raise UserError(key, f"prune.{other} has zeros in the order that the channels have now", leave_out)
    if not needs_inputs(prune):
        raise UserError(key, f"needs calibration inputs, which {prune.method} does not read", "use wanda or sparsegpt")
    if patterns and not any(pattern.is_structured for pattern in patterns.values()):
        raise UserError(key, f"reorders the groups of N:M, but prune.pattern is {prune.pattern}", leave_out)
    if patterns and not permute.find(skeleton, targets, patterns):
        problem = (
            "reorders the hidden states, or the inputs of down_proj, o_proj, out_proj or fc2 that get an N:M pattern"
        )
        raise UserError(key, f"{problem}; there are none here", leave_out)


def _check_owl(spread: float, ratio: float, sizes: list[int]) -> None:
    """Raises UserError if ratios must leave (0, 1), wherever the outliers are: they span twice the spread.

    Their mean is fixed, so they deviate least if the smallest block is at one end and all others at the other.
    """
    if len(sizes) < 2:
        return
    least = 2 * spread * min(sizes) / sum(sizes)
    if spread >= 0.5 or ratio + least >= 1 or ratio - least <= 0:
        raise UserError(
            "prune.allocation",
            f"OWL with a spread of {spread:g} around {ratio:g} gives ratios outside (0, 1)",
            "lower the spread (prune.owl_lambda)",
        )


def _check_processes(config: Config, problems: Problems) -> None:
    if not needs_inputs(config.prune):
        return
    samples, processes = config.prune.calibration.samples, launch.num_processes(config, "prune")
    if samples < processes:
        problems.add("prune.calibration.samples", f"{samples} windows are too few for {processes} processes")
    if config.prune.reconstruct_epochs and processes > 1:
        problems.add("prune.reconstruct_epochs", "needs a single process", "prune before, without a launcher")


# --- checkpoints ------------------------------------------------------------------------------------------------------


def _check_mask(config: Config, targets: dict[str, Target], patterns: dict[str, Pattern], skeleton: Skeleton) -> None:
    """Checks that the zeros of prune.mask_from have the pattern; reading them is fast compared with pruning."""
    prune = config.prune
    if prune.mask_from is None:
        return
    try:
        files = TensorFiles(find.locate(prune.mask_from, key="prune.mask_from"))
    except UserError as error:
        raise error.under("prune.mask_from") from error
    if channel_order.order_of(files.directory) != channel_order.order_of(config.model.path):
        problem = f"{files.directory} has its channels in another order than the model (prune.permute_channels)"
        raise UserError("prune.mask_from", problem, "prune it without, and take that mask")
    parameters = dict.fromkeys(f"{target.owner}.{target.parameter}" for target in targets.values())
    for misfit in misfits(files, skeleton.model, parameters):
        raise UserError("prune.mask_from", f"{files.directory}: {misfit}")
    for name, pattern in patterns.items():
        given_masks.check(skeleton.matrix(targets[name], files) != 0, targets[name], pattern)


def _check_files(config: Config, skeleton: Skeleton) -> None:
    """Checks that the checkpoint is not quantised, disk space for its copy, and the memory of module order."""
    model, files = config.model, None
    if model.gguf_file is None:
        parts = (skeleton.config, skeleton.config.get_text_config())
        quantised = next(filter(None, (getattr(part, "quantization_config", None) for part in parts)), None)
        if quantised is not None:
            settings = quantised if isinstance(quantised, dict) else vars(quantised)
            method = settings.get("quant_method", "by an unknown method")
            problem = f"{model.path} is quantised ({getattr(method, 'value', method)}), which cannot be pruned"
            raise UserError("model.path", problem, "use the unquantised model")
        assert model.path is not None
        files = TensorFiles(find.locate(model.path, revision=model.revision))
        refuse_quantised(files)
        needed = checkpoint.weight_bytes(files.directory, model.dtype)
    else:  # GGUF: unpacked, then copied
        itemsize = machine.torch_dtype(checkpoint.dtype_of(model.dtype, None)).itemsize
        needed = 2 * itemsize * sum(parameter.numel() for parameter in skeleton.model.parameters())
    demand_space(Path(config.run.dir), needed, "the pruned checkpoint", ".pruned.partial/*.safetensors")
    if needs_inputs(config.prune) and config.prune.order == "module":
        _check_memory(config, skeleton, files)


def _check_memory(config: Config, skeleton: Skeleton, files: TensorFiles | None) -> None:
    """Module order needs memory for all windows at once: they wait at each layer for the others."""
    prune, device = config.prune, checkpoint.pick_device(config.model.device)
    samples = -(-prune.calibration.samples // launch.num_processes(config, "prune"))
    free = machine.free_memory(device)
    stored = checkpoint.dtype_of(config.model.dtype, None if files is None else checkpoint.stored_dtype(files, None))
    compute = machine.choose_dtype(config.model.compute_dtype, stored, device)
    hidden = skeleton.config.get_text_config().hidden_size * machine.torch_dtype(compute.dtype).itemsize
    on_gpu = int(free * GPU_SHARE) if prune.batch_size == "auto" and device.type == "cuda" else None
    needed = inside_a_block(prune, samples, hidden, on_gpu)
    if needed > free:
        narrower = ", or model.compute_dtype=bfloat16, which needs half" if compute.widened else ""
        raise UserError(
            "prune.order",
            f"module holds all windows inside a block, some {needed / 2**30:.1f} GiB; {free / 2**30:.1f} GiB are free",
            f"set prune.order=block, or fewer or shorter windows{narrower}",
        )


# --- text -------------------------------------------------------------------------------------------------------------


def _calibration(config: Config, skeleton: Skeleton, tokenizer: Any) -> calibrate.Drawn | None:
    if not needs_inputs(config.prune):
        return None
    settings = config.prune.calibration
    checkpoint.check_window("prune.calibration.seq_len", settings.seq_len, skeleton.config)
    drawn = calibrate.draw(config, tokenizer)
    where = f"prune.calibration.dataset: {settings.dataset}"
    vocabulary.check(drawn.tokens, tokenizer, vocabulary.embeddings(skeleton.model), where)
    return drawn
