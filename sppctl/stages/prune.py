"""base -> pruned: block by block, statistics of the dense block, all its layers pruned, the pruned block replayed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sppctl import console
from sppctl.config import Config, PruneConfig
from sppctl.errors import StageError, UserError
from sppctl.lm import calibration, checkpoint, data
from sppctl.lm.blocks import BlockCall, BlockStack, Skeleton
from sppctl.lm.safe_files import TensorFiles
from sppctl.pruning import PRUNERS, check_weight

ERROR_ROWS = 256  # inputs of a layer kept to measure how far its output moves


@dataclass(frozen=True)
class LayerRecord:
    """What pruning did to one layer.

    Attributes:
        name: of the module.
        shape: (out_features, in_features).
        sparsity: share of zeros now.
        relative_output_error: ||X (W - W_pruned)^T|| / ||X W^T|| on the first calibration inputs; None without inputs.
        relative_weight_error: ||W - W_pruned|| / ||W||.
        damp: damping that the Hessian needed; None without one.
        seconds: for scores, mask and update.
    """

    name: str
    shape: tuple[int, int]
    sparsity: float
    relative_output_error: float | None
    relative_weight_error: float
    damp: float | None
    seconds: float


class LayerInputs:
    """Statistics of what one layer (or several that share their input) is given, and a few rows of it."""

    def __init__(self, statistics: Any) -> None:
        self.statistics = statistics
        self.sample: Tensor | None = None

    def update(self, inputs: Tensor) -> None:
        """Adds inputs (..., in_features)."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        self.statistics.update(rows)
        if self.sample is None:
            self.sample = rows[:ERROR_ROWS].float().clone()


def preflight(config: Config, skeleton: Skeleton) -> None:
    """Checks all that can be checked without weights: targets, divisibility, window length, the text's existence.

    Raises:
        UserError: with everything that is wrong.
    """
    prune = config.prune
    problems = []
    try:
        for name, linear in skeleton.targets(prune.targets).items():
            prune.pattern.check_in_features(linear.in_features, name)
    except ValueError as error:
        problems.append(f"prune.pattern: {error}" if not isinstance(error, UserError) else str(error))
    if PRUNERS[prune.method].statistics is not None:
        limit = checkpoint.max_window(skeleton.config)
        if limit is not None and prune.calibration.seq_len > limit:
            problems.append(
                f"prune.calibration.seq_len: {prune.calibration.seq_len} exceeds the model's {limit} positions"
            )
        try:
            _calibration_text(prune)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))


def _calibration_text(prune: PruneConfig) -> data.Text:
    settings = prune.calibration
    column = None if settings.column == "auto" else settings.column
    return data.load_text(settings.dataset, "train", "prune.calibration.dataset", column)


def execute(config: Config, base: Path, out: Path) -> dict[str, Any]:
    """Prunes the checkpoint ``base`` into the directory ``out``.

    Returns:
        Metrics: total sparsity, number of matrices, calibration, one record per layer.

    Raises:
        UserError: too little calibration text.
        StageError: broken weights, or an architecture whose blocks cannot be replayed.
    """
    prune = config.prune
    device = checkpoint.pick_device(config.model.device)
    stack = BlockStack(base, device, config.model.trust_remote_code)
    targets = stack.targets(prune.targets)
    windows: Tensor | None = None
    metrics: dict[str, Any] = {}
    if PRUNERS[prune.method].statistics is not None:
        windows, metrics = _calibrate(config, base)
        stack.load_embeddings()
        with console.Progress("checking that replayed blocks equal the model", len(stack)) as bar:
            stack.check_replay(windows[:1].to(device), lambda _: bar.advance())
    files = checkpoint.copy_for_rewriting(base, out, config.model.dtype)
    records = []
    with console.Progress(f"pruning {prune.method} {prune.pattern}", len(targets)) as bar:
        for record in prune_blocks(stack, list(targets), windows, prune, files):
            records.append(record)
            error = record.relative_output_error
            bar.advance(record.name if error is None else f"{record.name} error {error:.3f}")
    for file in files.files.values():
        file.sync()
    weights = sum(record.shape[0] * record.shape[1] for record in records)
    zeros = sum(record.sparsity * record.shape[0] * record.shape[1] for record in records)
    errors = [record.relative_output_error for record in records if record.relative_output_error is not None]
    return metrics | {
        "method": prune.method,
        "pattern": str(prune.pattern),
        "matrices": len(records),
        "pruned_weights": weights,
        "sparsity": zeros / weights,
        "mean_relative_output_error": sum(errors) / len(errors) if errors else None,
        "layers": [asdict(record) for record in records],
    }


def _calibrate(config: Config, base: Path) -> tuple[Tensor, dict[str, Any]]:
    text, settings = _calibration_text(config.prune), config.prune.calibration
    windows = calibration.calibration_windows(
        checkpoint.load_tokenizer(base, config.model.trust_remote_code),
        text,
        samples=settings.samples,
        seq_len=settings.seq_len,
        seed=config.run.seed,
        windows=settings.windows,
    )
    tokens = windows.tokens
    source = {"dataset": text.name, "windows": windows.made, "documents_hash": data.content_hash(text.documents)}
    shape = {"samples": len(tokens), "seq_len": tokens.shape[1], "windows_hash": windows.hash}
    return tokens, {"calibration": source | shape}


@torch.no_grad()
def prune_blocks(
    stack: BlockStack, targets: list[str], windows: Tensor | None, prune: PruneConfig, out: TensorFiles
) -> Iterator[LayerRecord]:
    """Prunes every block in turn and writes its layers to ``out``.

    Args:
        stack: the checkpoint to prune; its embeddings are loaded if there are windows.
        targets: full names of the linear layers.
        windows: (samples, seq_len) calibration tokens; None for methods that need no inputs.
        prune: the configuration.
        out: files that already hold a copy of the checkpoint.

    Yields:
        One record per layer.
    """
    batches = [] if windows is None else _embed(stack, windows, prune.batch_size)
    for index in range(len(stack)):
        prefix = f"{stack.blocks_name}.{index}."
        names = [name for name in targets if name.startswith(prefix)]
        block = stack.load_block(index) if windows is not None else None
        inputs: dict[str, LayerInputs] = {}
        if block is not None and names:
            layers = {name: block.get_submodule(name.removeprefix(prefix)) for name in names}
            inputs = _gather(block, index, layers, batches, prune.method)
        for name in names:
            stored = stack.weight_name(name)
            weight = stack.files.read(stored).to(stack.device)
            pruned, record = _prune_layer(name, weight, inputs.get(name), prune)
            out.write(stored, pruned)
            if block is not None:
                linear = block.get_submodule(name.removeprefix(prefix))
                assert isinstance(linear.weight, Tensor)
                linear.weight.copy_(pruned)
            yield record
        if block is not None:
            for batch in batches:
                batch.run(block, index)
            stack.release_block(index)


def _embed(stack: BlockStack, windows: Tensor, batch_size: int) -> list[_Batch]:
    calls: dict[torch.Size, list[BlockCall]] = {}
    batches = []
    for input_ids in windows.split(batch_size):
        hidden, recorded = stack.record(input_ids.to(stack.device))
        # windows are never padded, so what a block is told besides its input depends on the shape alone
        batches.append(_Batch(hidden, calls.setdefault(input_ids.shape, recorded)))
    return batches


class _Batch:
    """Hidden states (batch, tokens, width) of some windows, kept in ordinary memory, and how blocks are called."""

    def __init__(self, hidden: Tensor, calls: list[BlockCall]) -> None:
        self.device = hidden.device
        self.hidden = hidden.cpu()
        self.calls = calls

    def run(self, block: nn.Module, index: int, keep: bool = True) -> None:
        """Runs a block on the hidden states; ``keep`` makes its output the next block's input."""
        output = self.calls[index](block, self.hidden.to(self.device))
        if keep:
            self.hidden = output.cpu()


def _gather(
    block: nn.Module, index: int, layers: dict[str, nn.Module], batches: list[_Batch], method: str
) -> dict[str, LayerInputs]:
    """Runs the dense block on every batch and collects what each layer is given; shared inputs are counted once."""
    make = PRUNERS[method].statistics
    assert make is not None
    gathered: dict[str, LayerInputs] = {}
    leaders: dict[str, str] = {}
    seen: list[tuple[Tensor, str]] = []

    def collect(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs = args[0]
        if name not in leaders:
            # q, k and v receive the very same tensor; holding on to it keeps its identity from being reused
            leaders[name] = next((leader for tensor, leader in seen if tensor is inputs), name)
            seen.append((inputs, leaders[name]))
            if leaders[name] == name:
                gathered[name] = LayerInputs(make(inputs.shape[-1], inputs.device))
        if leaders[name] == name:
            gathered[name].update(inputs)

    handles = [layer.register_forward_pre_hook(partial(collect, name)) for name, layer in layers.items()]
    try:
        for batch in batches:
            batch.run(block, index, keep=False)
            seen.clear()
    finally:
        for handle in handles:
            handle.remove()
    unused = [name for name in layers if name not in leaders]
    if unused:
        raise StageError(f"{unused[0]} received no calibration input; leave it out of prune.targets or use magnitude")
    return {name: gathered[leader] for name, leader in leaders.items()}


def _prune_layer(
    name: str, weight: Tensor, inputs: LayerInputs | None, prune: PruneConfig
) -> tuple[Tensor, LayerRecord]:
    started = time.perf_counter()
    options = {"damp": prune.damp, "block_size": prune.block_size} if prune.method == "sparsegpt" else {}
    try:
        check_weight(weight, prune.pattern, name)
        statistics = inputs.statistics if inputs else None
        result = PRUNERS[prune.method].prune(weight, statistics, prune.pattern, **options)
    except ValueError as error:
        raise StageError(f"{name}: {error}") from error
    seconds = time.perf_counter() - started
    zeros = int((result.weight == 0).sum())
    difference = weight.float() - result.weight.float()
    output_error = None
    if inputs is not None and inputs.sample is not None:
        change, output = inputs.sample @ difference.t(), inputs.sample @ weight.float().t()
        output_error = (change.norm() / output.norm().clamp_min(1e-30)).item()
    return result.weight, LayerRecord(
        name=name,
        shape=(weight.shape[0], weight.shape[1]),
        sparsity=zeros / weight.numel(),
        relative_output_error=output_error,
        relative_weight_error=(difference.norm() / weight.float().norm().clamp_min(1e-30)).item(),
        damp=result.damp,
        seconds=round(seconds, 4),
    )
