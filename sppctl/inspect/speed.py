"""Any checkpoint -> how fast it runs, with dense weights and with 2:4 kernels, and its size on disk."""

from __future__ import annotations

import inspect as signatures
import operator
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sppctl import console
from sppctl.errors import UserError, first_line
from sppctl.files.safe_files import TensorFiles
from sppctl.inspect.inspect import measure
from sppctl.inspect.semi_structured import TwoWeights, no_kernel, supports_shape
from sppctl.inspect.speed_text import BatchSpeed, Bench, Kernel, notes
from sppctl.inspect.storage import storage
from sppctl.machine import cpu_name
from sppctl.model import checkpoint, find
from sppctl.pattern import Pattern
from sppctl.pruners.masks import holds

TWO_FOUR = Pattern(keep=2, group=4)


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    batches: tuple[int, ...] = (1, 8, 32)  # sequences at a time, each in turn
    prompt: int = 512  # tokens of each prompt
    new: int = 32  # tokens decoded after it
    repeats: int = 5  # rounds that count; one more before them warms up
    device: str = "auto"  # or cpu, cuda
    shorten: bool = False  # prompts that are too long for the model
    trust_remote_code: bool = False  # run code that comes with the model

    def __post_init__(self) -> None:
        """Raises UserError for what cannot be measured."""
        for name, value in (("batch", min(self.batches, default=0)), ("prompt", self.prompt), ("new", self.new)):
            if value < 1:
                raise UserError(f"--{name}", f"{value} is not a positive number", "try the default (--help)")
        if self.repeats < 1:
            raise UserError("--repeats", f"{self.repeats} is not a positive number", "medians need 3 or more")


def execute(path: str, settings: Settings) -> Bench:
    """Measures a checkpoint: a directory, hub id or ``package:NAME``.

    Raises:
        UserError: no checkpoint, no such device, or windows longer than the model allows.
    """
    directory, trust = find.locate(path), settings.trust_remote_code
    limit = checkpoint.max_window(checkpoint.load_config(directory, trust))
    if limit is not None and settings.prompt + settings.new > limit:
        if not settings.shorten or settings.new >= limit:
            raise UserError(
                f"--prompt {settings.prompt} and --new {settings.new}",
                f"together longer than the model's limit of {limit} tokens",
                "give shorter ones",
            )
        settings = replace(settings, prompt=limit - settings.new)
        console.note(f"bench: prompts of {settings.prompt} tokens, as the model has {limit} positions (--prompt)")
    device = checkpoint.pick_device(settings.device)
    fingerprint = checkpoint.fingerprint(directory)  # finds damage before anything is measured
    measured, summary = measure(directory)
    sparse = [matrix for matrix in measured if matrix.is_sparse]
    compute = checkpoint.choose_dtype(directory, device, "auto", trust)
    console.note(f"bench: {compute.text}")
    model = checkpoint.load_model(directory, device, compute.dtype, trust)
    weights, kernel = two_weights(model)
    rows = speed(model, weights, settings)
    return Bench(
        checkpoint=path,
        fingerprint=fingerprint,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        dtype=compute.dtype,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        prompt=settings.prompt,
        new=settings.new,
        repeats=settings.repeats,
        patterns=summary["patterns"],
        sparsity=summary["sparsity"],
        kernel=kernel,
        speed=rows,
        storage=storage(TensorFiles(directory), sparse),
        notes=list(notes(kernel, rows, sparse)),
    )


def two_weights(model: Any) -> tuple[TwoWeights, Kernel]:
    """The 2:4 layers of a model with both kinds of weights, where a kernel supports them."""
    weights = TwoWeights()
    capability = torch.cuda.get_device_capability(model.device) if model.device.type == "cuda" else (0, 0)
    linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    semi = {name: layer for name, layer in linears.items() if holds(layer.weight.detach(), TWO_FOUR)}
    reason = no_kernel(model.device.type, capability, model.dtype)
    refused: list[str] = []
    if reason is None and not semi:
        reason = "no linear layer of the checkpoint is 2:4, the one pattern that GPUs accelerate; dense timings only"
        # transformers' Conv1D stores (in, out)
        conv1ds = [layer.get_parameter("weight") for layer in model.modules() if type(layer).__name__ == "Conv1D"]
        if any(holds(weight.detach().t(), TWO_FOUR) for weight in conv1ds):
            reason = "the 2:4 layers are Conv1D (GPT-2), whose stored layout no 2:4 kernel supports; dense timings only"
    if reason is None:
        refused = [name for name, layer in semi.items() if not supports_shape(layer.weight.shape, model.dtype)]
        try:
            for name in [name for name in semi if name not in refused]:
                weights.add(semi[name])
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            weights = TwoWeights()
            reason = f"the 2:4 kernel refuses this GPU or model ({first_line(error)}); dense timings only"
        if reason is None and not weights.layers:
            reason = "the 2:4 kernel supports none of the 2:4 layers' shapes; dense timings only"
    return weights, Kernel(len(weights.layers), len(linears) - len(semi), refused, reason)


@torch.no_grad()
def speed(model: Any, weights: TwoWeights, settings: Settings) -> list[BatchSpeed]:
    """Medians of interleaved rounds for every batch."""
    kinds = ["dense", "sparse"] if weights.layers else ["dense"]
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    rows = []
    with console.Progress("bench", len(settings.batches) * (settings.repeats + 1)) as progress:
        for batch in settings.batches:
            tokens = torch.randint(vocabulary, (batch, settings.prompt + settings.new), generator=generator)
            tokens = tokens.to(model.device)
            rounds: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
            for _ in range(settings.repeats + 1):
                logits = {}
                for kind in kinds:
                    weights.use(kind)
                    prefill, decode, logits[kind] = run(model, tokens, settings.prompt)
                    rounds[kind].append((prefill, decode))
                progress.advance(f"batch {batch}")
            difference = None
            if weights.layers:  # the largest one, over the largest magnitude
                dense, sparse = (logits[kind].float() for kind in kinds)
                difference = ((sparse - dense).abs().max() / dense.abs().max()).item()
            measured = {kind: times[1:] for kind, times in rounds.items()}  # the first round warms up
            rows.append(_row(batch, settings, measured, difference))
    weights.use("dense")
    return rows


def _row(
    batch: int, settings: Settings, rounds: dict[str, list[tuple[float, float]]], difference: float | None
) -> BatchSpeed:
    (prefill, decode) = ({kind: [r[part] for r in times] for kind, times in rounds.items()} for part in (0, 1))

    def ratio(seconds: dict[str, list[float]]) -> float | None:
        if "sparse" not in seconds:
            return None
        return statistics.median(map(operator.truediv, seconds["dense"], seconds["sparse"]))

    return BatchSpeed(
        batch=batch,
        prefill_tokens_per_s={kind: batch * settings.prompt / statistics.median(s) for kind, s in prefill.items()},
        prefill_speedup=ratio(prefill),
        decode_ms_per_token={kind: 1000 * statistics.median(s) / settings.new for kind, s in decode.items()},
        decode_speedup=ratio(decode),
        max_relative_difference=difference,
    )


def run(model: Any, tokens: Tensor, prompt: int) -> tuple[float, float, Tensor]:
    """Prefills a prompt and decodes what follows it, one token at a time with the KV cache.

    The likeliest token is computed as in greedy decoding, but the next one of ``tokens`` is fed, so that every run does
    the same work and its logits can be compared. ``tokens`` are (batch, prompt + new).

    Returns:
        Seconds of the prefill, seconds of all decoding, and logits (batch, new + 1, vocabulary): those that follow the
        prompt and every new token.
    """
    # as generation does: the prefill needs the logits of its last position alone
    parameters = signatures.signature(model.forward).parameters
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
    cache = "cache" if "cache" in parameters else "past_key_values"  # renamed in transformers 5.24
    started = _now(model.device)
    output = model(input_ids=tokens[:, :prompt], use_cache=True, **last_only)
    logits = [output.logits[:, -1]]
    logits[-1].argmax(-1)
    prefilled = _now(model.device)
    for place in range(prompt, tokens.shape[1]):
        output = model(input_ids=tokens[:, place : place + 1], use_cache=True, **{cache: output[cache]})
        logits.append(output.logits[:, -1])
        logits[-1].argmax(-1)
    return prefilled - started, _now(model.device) - prefilled, torch.stack(logits, dim=1)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
