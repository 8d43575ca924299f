"""What can be said against a pruning before any weight is read or written: from configuration, headers and text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from sppctl import launch, machine
from sppctl.config.settings import Config, PruneConfig
from sppctl.data import vocabulary
from sppctl.errors import UserError
from sppctl.files.disk import demand_space
from sppctl.files.safe_files import TensorFiles
from sppctl.model import checkpoint
from sppctl.model.blocks import Skeleton, refuse_quantised
from sppctl.model.estimate import Work
from sppctl.model.targets import Target, matches
from sppctl.model.weights import misfits
from sppctl.prune import calibrate, given_masks
from sppctl.prune.choose import (
    BLOCK_WIDTHS,
    CPU_TOKENS,
    GPU_SHARE,
    WAITING_WIDTHS,
    check_prunes,
    needs_inputs,
    planned_patterns,
)

# over all windows, as benchmarks/prune.py measures them on a CPU
PASSES = {
    "magnitude": {"block": 1.0, "module": 1.0},
    "wanda": {"block": 2.1, "module": 1.2},
    "dsnot": {"block": 2.2, "module": 1.3},
    "sparsegpt": {"block": 3.1, "module": 2.3},
}
MEAN_TOLERANCE = 0.005  # by which the mean of a list of ratios may differ from the pattern that a run is known by


def preflight(config: Config, skeleton: Skeleton, tokenizer: Any) -> Work:
    """Checks all that needs no weights, and draws the calibration windows.

    Returns:
        What the pruning will do.

    Raises:
        UserError: with everything that is wrong, one problem per line.
    """
    prune = config.prune
    problems: list[str] = []

    def collect(check: Callable[..., Iterator[str]], *arguments: Any) -> None:
        try:
            for problem in check(*arguments):
                problems.append(problem)
        except UserError as error:
            problems.append(str(error))

    targets: dict[str, Target] = {}
    try:
        targets = skeleton.targets(prune.targets, prune.skip)
    except UserError as error:
        problems.append(str(error))
    collect(_patterns, prune, targets, skeleton)
    collect(_allocation, prune, targets, skeleton)
    collect(_processes, config)
    if prune.mask_from is not None:
        collect(_mask, prune, targets, skeleton)
    collect(_files, config, targets, skeleton)
    if needs_inputs(prune):
        collect(_calibration, config, skeleton, tokenizer)
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    text, windows = f"{prune.method} {prune.pattern}, {len(targets)} matrices", prune.calibration
    if not needs_inputs(prune):
        return Work(text, 0)
    passes = PASSES[prune.method][prune.order] + (prune.allocation == "owl") + 3 * prune.reconstruct_epochs
    return Work(
        f"{text}, {windows.samples} windows of {windows.seq_len} tokens", passes * windows.samples * windows.seq_len
    )


# --- configuration ----------------------------------------------------------------------------------------------------


def _patterns(prune: PruneConfig, targets: dict[str, Target], skeleton: Skeleton) -> Iterator[str]:
    if not targets:
        return
    for name, pattern in planned_patterns(prune, targets, skeleton).items():
        try:
            pattern.check_in_features(targets[name].in_features, name)
            check_prunes(prune, targets[name], pattern)
        except ValueError as error:
            overridden = any(matches(name, wanted) for wanted in prune.overrides)
            common = "prune.pattern" if pattern == prune.pattern else "prune.allocation"
            yield f"{'prune.overrides' if overridden else common}: {error}"
            return


def _allocation(prune: PruneConfig, targets: dict[str, Target], skeleton: Skeleton) -> Iterator[str]:
    if prune.allocation == "uniform":
        return
    if prune.pattern.ratio is None:
        yield f"prune.allocation: shares out a ratio, but prune.pattern is {prune.pattern}"
        return
    sizes = [0] * len(skeleton.blocks)  # weights that no override has taken out
    for name, target in targets.items():
        if not any(matches(name, wanted) for wanted in prune.overrides):
            block = name.removeprefix(f"{skeleton.blocks_name}.").partition(".")[0]
            sizes[int(block)] += target.out_features * target.in_features
    if prune.allocation == "owl":
        yield from _owl(prune.owl_lambda, prune.pattern.ratio, [size for size in sizes if size])
    elif len(prune.allocation) == len(sizes) and any(sizes):
        ratios = zip(prune.allocation, sizes, strict=True)
        mean = math.fsum(ratio * size for ratio, size in ratios) / sum(sizes)
        if 0 < mean < 1 and abs(mean - prune.pattern.ratio) > MEAN_TOLERANCE:
            yield (
                f"prune.allocation: the ratios' mean over all weights is {mean:.4g}, but prune.pattern is "
                f"{prune.pattern}; give prune.pattern={mean:.4g}, or other ratios"
            )


def _owl(spread: float, ratio: float, sizes: list[int]) -> Iterator[str]:
    """Whether the ratios must leave (0, 1): whichever blocks have more outliers, they span twice the spread.

    Their mean is the ratio, so at the least the smallest block alone is at one end and all others at the other.
    """
    if len(sizes) < 2:
        return
    least = 2 * spread * min(sizes) / sum(sizes)
    if spread >= 0.5 or ratio + least >= 1 or ratio - least <= 0:
        yield (
            f"prune.allocation: OWL with a spread of {spread:g} round {ratio:g} gives ratios outside (0, 1); "
            "lower the spread (prune.owl_lambda)"
        )


def _processes(config: Config) -> Iterator[str]:
    samples, epochs = config.prune.calibration.samples, config.prune.reconstruct_epochs
    if not needs_inputs(config.prune):
        return
    processes = launch.num_processes(config)
    if samples < processes:
        yield f"prune.calibration.samples: {samples} are fewer than the {processes} processes"
    if epochs and processes > 1:
        yield "prune.reconstruct_epochs: tunes in one process; set launch.num_processes=1"


# --- checkpoints ------------------------------------------------------------------------------------------------------


def _quantised(config: Config, skeleton: Skeleton) -> str | None:
    """What a checkpoint is quantised by; a GGUF file is unpacked before it is pruned."""
    settings = (skeleton.config, skeleton.config.get_text_config())
    found = next(filter(None, (getattr(part, "quantization_config", None) for part in settings)), None)
    if found is None or config.model.gguf_file is not None:
        return None
    method = (found if isinstance(found, dict) else vars(found)).get("quant_method", "by an unknown method")
    return str(getattr(method, "value", method))


def _mask(prune: PruneConfig, targets: dict[str, Target], skeleton: Skeleton) -> Iterator[str]:
    """Whether the zeros of prune.mask_from are a mask of the pattern; reading them is quick beside pruning by them."""
    assert prune.mask_from is not None
    try:
        files = TensorFiles(checkpoint.locate(prune.mask_from, key="prune.mask_from"))
    except UserError as error:
        yield f"prune.mask_from: {str(error).removeprefix('prune.mask_from: ')}"
        return
    parameters = dict.fromkeys(f"{target.owner}.{target.parameter}" for target in targets.values())
    for problem in misfits(files, skeleton.model, parameters):
        yield f"prune.mask_from: {files.directory}: {problem}"
        return
    for name, pattern in planned_patterns(prune, targets, skeleton).items():
        found = given_masks.problem(skeleton.matrix(targets[name], files) != 0, targets[name], pattern)
        if found is not None:
            yield found
            return


def _files(config: Config, targets: dict[str, Target], skeleton: Skeleton) -> Iterator[str]:
    """The checkpoint's kind, the disk for its copy, and memory for an order that needs much."""
    model = config.model
    assert model.path is not None
    method = _quantised(config, skeleton)
    if method is not None:
        yield f"model.path: {model.path} is quantised ({method}), which cannot be pruned; give the unquantised model"
        return
    files: TensorFiles | None = None
    if model.gguf_file is None:
        files = TensorFiles(checkpoint.locate(model.path, revision=model.revision))
        refuse_quantised(files)
    _disk(config, skeleton, files)
    if needs_inputs(config.prune) and config.prune.order == "module":
        yield from _memory(config, skeleton, files)


# --- space ------------------------------------------------------------------------------------------------------------


def _disk(config: Config, skeleton: Skeleton, files: TensorFiles | None) -> None:
    if files is None:  # unpacked, and copied
        itemsize = (torch.bfloat16 if config.model.dtype == "auto" else getattr(torch, config.model.dtype)).itemsize
        needed = 2 * itemsize * sum(parameter.numel() for parameter in skeleton.model.parameters())
    else:
        needed = checkpoint.copy_size(files, config.model.dtype)
    directory = Path(config.run.dir)
    demand_space(directory, needed, "the pruned checkpoint", ".pruned.partial/*.safetensors")


def _memory(config: Config, skeleton: Skeleton, files: TensorFiles | None) -> Iterator[str]:
    """Module order: the pass stops at each layer until all windows are there."""
    prune, device = config.prune, checkpoint.pick_device(config.model.device)
    windows = -(-prune.calibration.samples // launch.num_processes(config))
    free = machine.free_memory(device)
    compute = _compute(config, files, device)
    token = skeleton.config.get_text_config().hidden_size * getattr(torch, compute.dtype).itemsize
    waiting = windows * prune.calibration.seq_len * token * WAITING_WIDTHS
    if isinstance(prune.batch_size, int):
        running = min(windows, prune.batch_size) * prune.calibration.seq_len * token * BLOCK_WIDTHS
    elif device.type == "cuda":
        running = int(free * GPU_SHARE)
    else:
        running = max(CPU_TOKENS, prune.calibration.seq_len) * token * BLOCK_WIDTHS
    if waiting + running > free:
        yield (
            f"prune.order: module holds all windows inside a block, some {(waiting + running) / 2**30:.1f} GiB; "
            f"{free / 2**30:.1f} GiB are free; use order block, or fewer or shorter windows"
            + ", or model.compute_dtype=bfloat16, which needs half"
            * compute.widened
        )


def _compute(config: Config, files: TensorFiles | None, device: torch.device) -> machine.Compute:
    """What the hidden states are computed in."""
    if config.model.dtype != "auto":
        stored = getattr(torch, config.model.dtype)
    else:
        stored = torch.bfloat16 if files is None else checkpoint.stored_dtype(files, None)
    return machine.choose_dtype(config.model.compute_dtype, str(stored).removeprefix("torch."), device)


# --- text -------------------------------------------------------------------------------------------------------------


def _calibration(config: Config, skeleton: Skeleton, tokenizer: Any) -> Iterator[str]:
    settings, limit = config.prune.calibration, checkpoint.max_window(skeleton.config)
    if limit is not None and settings.seq_len > limit:
        yield f"prune.calibration.seq_len: {settings.seq_len} exceeds the model's {limit} positions"
        calibrate.calibration_text(config.prune)
    else:
        windows, _ = calibrate.windows_of(config, tokenizer)
        where = f"prune.calibration.dataset: {settings.dataset}"
        vocabulary.check(windows, tokenizer, vocabulary.embeddings(skeleton.model), where)
