"""Measuring a transformers model in memory with the measures of ``sppctl eval``."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from sppctl import distributed
from sppctl.config.load import config_of
from sppctl.config.settings import Config
from sppctl.data import vocabulary
from sppctl.errors import UserError
from sppctl.evaluate import perplexities, stage
from sppctl.evaluate import tasks as benchmarks
from sppctl.evaluate.perplexity import window_length
from sppctl.evaluate.results import AnyResult, TaskResult, TextMeasure, TextResult
from sppctl.evaluate.values import values_of
from sppctl.model import checkpoint


@torch.no_grad()
def evaluate_model(
    model: Any,
    tokenizer: Any,
    *,
    perplexity: Sequence[str] = ("wikitext2",),
    tasks: Sequence[str] = (),
    seed: int = 0,
    label: str = "model",
    **options: Any,
) -> dict[str, float | None]:
    """Measures a causal language model of transformers where it is; a PEFT model is measured with its adapter.

    Args:
        model: in memory, on one device or spread over several.
        tokenizer: of the model.
        perplexity: texts: wikitext2, c4, instructions, prose, a hub id, or a local text file.
        tasks: zeroshot, mmlu, wikitext, or any lm-eval task or group.
        seed: of few-shot examples.
        label: name of the model in messages.
        options: further keys of ``eval`` in the configuration: ``seq_len``, ``stride``, ``max_tokens``, ``limit``,
            ``num_fewshot``, ``batch_size``, ...

    Returns:
        Each number by its name, as in reports: ``{"ppl wikitext2 @2048": 7.1}``; None if it is not finite.

    Raises:
        UserError: (a ValueError) a wrong option, a text or a task that could not be loaded.
        StageError: logits are not finite.
    """
    if distributed.world_size() > 1:
        raise UserError("evaluate_model", "runs in one process", "use sppctl eval for several")
    settings = {"divergence": None} | options | {"perplexity": list(perplexity), "tasks": list(tasks)}
    if settings["divergence"] is not None:
        raise UserError("eval.divergence", "needs the checkpoints of both models", "use sppctl eval")
    name = getattr(model, "name_or_path", "") or label
    tree = {"eval": settings, "run": {"seed": seed}, "model": {"path": name}}
    config = config_of(tree, "evaluate_model")
    limit = checkpoint.max_window(model.config)
    window = window_length(config.eval.seq_len, limit)
    checkpoint.check_window("eval.seq_len", window, model.config)
    stage.check_stride(config.eval.stride, window)
    was_training = model.training
    model.eval()
    try:
        results = _results(config, _without_wrapper(model), tokenizer, window, label)
    finally:
        model.train(was_training)
    return {value.quantity.label: value.number for value in values_of(results)}


def _without_wrapper(model: Any) -> Any:
    """The transformers model in a PEFT model; adapters of its layers stay in them."""
    if not isinstance(model, PeftModel):
        return model
    if model.active_peft_config.is_prompt_learning:
        kind = model.active_peft_config.peft_type
        raise UserError("evaluate_model", f"a prompt of {kind} cannot be measured", "use an adapter of the layers")
    return model.get_base_model()


def _results(config: Config, model: Any, tokenizer: Any, window: int, label: str) -> list[AnyResult]:
    results: list[AnyResult] = []
    for text in config.eval.perplexity:
        measure = TextMeasure(text, window, config.eval.stride, config.eval.max_tokens)
        windows = perplexities.windows_of(config, tokenizer, measure, model.device)
        vocabulary.check(windows.tokens, tokenizer, vocabulary.embeddings(model), f"eval.perplexity: {text}")
        numbers = perplexities.measure(model, windows, measure, label=label, dense=None)
        results.append(TextResult(measure, numbers))
    with tempfile.TemporaryDirectory(prefix="sppctl-") as folder:
        for task in benchmarks.configured(config):
            scores = benchmarks.measure(config, model, tokenizer, task, label=label, samples=Path(folder))
            results.append(TaskResult(task, scores))
    return results
