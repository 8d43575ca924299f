"""Pruning a transformers model in memory, block by block as ``sppctl prune`` does."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from sppctl import distributed
from sppctl.config.load import config_of
from sppctl.config.settings import Config
from sppctl.data import vocabulary
from sppctl.errors import StageError, UserError
from sppctl.model.blocks import Decoder
from sppctl.model.checkpoint import max_window
from sppctl.pattern import Pattern
from sppctl.prune import checks
from sppctl.prune.calibrate import Drawn
from sppctl.prune.choose import needs_inputs
from sppctl.prune.stage import Callback, check_blocks, prune_decoder
from sppctl.records import Calibration, PruneRecord

GIVEN = "given"  # the name of windows that were not drawn from a text


@torch.no_grad()
def prune_model(
    model: Any,
    tokenizer_or_batches: Any = None,
    *,
    method: str = "wanda",
    pattern: Pattern | str | float = "2:4",
    seed: int = 0,
    callback: Callback | None = None,
    **options: Any,
) -> PruneRecord:
    """Prunes a causal language model of transformers in place, on the device where it is.

    The blocks are pruned one after the other, each on the outputs of the pruned ones before it, so a model in the
    dtype of its checkpoint gets the zeros that ``sppctl prune`` gives it.

    Args:
        model: in memory, on one device; without adapters, and not quantised.
        tokenizer_or_batches: a tokenizer, with which windows are drawn from ``calibration``; or the windows themselves,
            token ids without padding, all of one length: a tensor (samples, seq_len), or an iterable of such tensors,
            or of mappings with ``input_ids`` as a DataLoader gives them. magnitude needs neither.
        method: magnitude, wanda, sparsegpt, dsnot, or a registered pruner.
        pattern: N:M with N kept in every M (``"2:4"``), or the ratio of zeros (``0.5``).
        seed: of the windows.
        callback: called after each matrix with its :class:`sppctl.records.LayerRecord`, its number, and that of all.
        options: further keys of ``prune`` in the configuration, by their names: ``targets``, ``skip``, ``overrides``,
            ``order``, ``damp``, ``keep_zeros``, ``calibration={"dataset": "c4", "samples": 128, "seq_len": 2048}``, ...

    Returns:
        What was pruned, matrix by matrix.

    Raises:
        UserError: (a ValueError) a wrong option, a model that cannot be pruned, or missing or unsuitable windows. The
            model is unchanged.
        StageError: weights or activations are not finite, or the model's blocks cannot be replayed.
    """
    config = _config(model, {"method": method, "pattern": pattern} | options, seed)
    if distributed.world_size() > 1:
        raise UserError("prune_model", "runs in one process", "use sppctl prune for several")
    was_training, trainable = model.training, [weight for weight in model.parameters() if weight.requires_grad]
    model.eval().requires_grad_(False)  # tuning a block would leave gradients in the rest of it
    try:
        stack = Decoder(model)
        prepared = _prepared(config, stack, tokenizer_or_batches, "calibration" in options)
        check_blocks(stack, prepared.drawn, config.prune)
        with tempfile.TemporaryDirectory(prefix="sppctl-") as folder:
            return prune_decoder(config.prune, prepared, stack, prepared.drawn, Path(folder), None, callback)
    finally:
        model.train(was_training)
        for weight in trainable:
            weight.requires_grad_()


def _config(model: Any, prune: dict[str, Any], seed: int) -> Config:
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise UserError("prune_model", "the model has an adapter", "merge it first (merge_and_unload)")
    settings = {key: list(value) if isinstance(value, tuple) else value for key, value in prune.items()}
    tree = {"prune": settings, "run": {"seed": seed}, "launch": {"num_processes": 1}}
    return config_of(tree | {"model": {"path": getattr(model, "name_or_path", "") or GIVEN}}, "prune_model")


def _prepared(config: Config, stack: Decoder, tokenizer_or_batches: Any, draws: bool) -> checks.Prepared:
    """The checked pruning; ``draws``: the options say how windows are to be drawn."""
    drawn, is_tokenizer = None, hasattr(tokenizer_or_batches, "convert_ids_to_tokens")
    if needs_inputs(config.prune):
        if tokenizer_or_batches is None:
            method = config.prune.method
            raise UserError("prune_model", f"{method} needs inputs", "pass a tokenizer, or batches of token ids")
        if not is_tokenizer:
            if draws:
                raise UserError("prune_model", "calibration needs a tokenizer", "pass batches or calibration")
            drawn = _given(tokenizer_or_batches, stack)
    prepared = checks.prepare(config, stack, tokenizer_or_batches if is_tokenizer else None, drawn=drawn)
    for name, parameter in stack.model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise StageError(f"{name} holds NaN or infinite values; the model is broken")
    return prepared


def _given(batches: Any, stack: Decoder) -> Drawn:
    """Windows that the caller has made, checked against the model."""
    tokens = _windows(batches)
    limit = max_window(stack.config)
    if limit is not None and tokens.shape[1] > limit:
        raise UserError("prune_model", f"windows of {tokens.shape[1]} tokens exceed the model's {limit} positions")
    rows = vocabulary.embeddings(stack.model)
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < rows:
        raise UserError(
            "prune_model", f"token ids from {tokens.min()} to {tokens.max()}", f"the model has {rows} embeddings"
        )
    digest = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16]
    sizes = {"samples": tokens.shape[0], "seq_len": tokens.shape[1]}
    return Drawn(tokens, Calibration(GIVEN, GIVEN, "", windows_hash=digest, versions={}, **sizes), None)


def _windows(batches: Any) -> Tensor:
    """Token ids (samples, seq_len) int64 on the CPU."""
    if isinstance(batches, Tensor | Mapping):
        batches = [batches]
    if not isinstance(batches, Iterable) or isinstance(batches, str):
        kind = type(batches).__name__
        raise UserError("prune_model", f"expected a tokenizer or batches of token ids, found a {kind}")
    parts = []
    for batch in batches:
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if mask is not None and not torch.as_tensor(mask).all():
            raise UserError("prune_model", "a batch is padded", "calibrate on windows of equal length, without padding")
        if isinstance(batch, Mapping) and "input_ids" not in batch:
            raise UserError("prune_model", f"a batch has {', '.join(map(str, batch))}, but no input_ids")
        ids = torch.as_tensor(batch["input_ids"] if isinstance(batch, Mapping) else batch)
        if ids.dim() not in (1, 2) or ids.is_floating_point() or not ids.numel():
            raise UserError(
                "prune_model", f"a batch is {ids.dtype} {tuple(ids.shape)}, not token ids (samples, seq_len)"
            )
        parts.append(ids.reshape(-1, ids.shape[-1]).to("cpu", torch.int64))
    lengths = sorted({part.shape[1] for part in parts})
    if len(lengths) != 1:
        raise UserError("prune_model", f"windows of {lengths or 'no'} tokens", "all must have the same length")
    return torch.cat(parts)
