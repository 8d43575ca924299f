"""Any checkpoint -> how fast it runs and what it takes to store, dense and sparse, and where sparsity gains nothing."""

from __future__ import annotations

import inspect as signatures
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sppctl import console
from sppctl.errors import StageError, UserError
from sppctl.lm import checkpoint
from sppctl.lm.packed import Packed, bitmask_bytes, pack_bitmask, pack_structured, structured_bytes, unpack
from sppctl.lm.safe_files import TensorFile, TensorFiles
from sppctl.lm.semi_structured import TwoWeights, no_kernel, relative_difference, takes
from sppctl.pattern import Pattern
from sppctl.stages.inspect import MatrixSparsity, holds, measure

TWO_FOUR = Pattern(keep=2, group=4)


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        batches: sequences at a time, each in turn.
        prompt: tokens of each prompt.
        new: tokens decoded after it.
        repeats: rounds that count; one more before them warms up.
        device: auto, cpu, cuda.
    """

    batches: tuple[int, ...] = (1, 8, 32)
    prompt: int = 512
    new: int = 32
    repeats: int = 5
    device: str = "auto"

    def __post_init__(self) -> None:
        """Raises UserError for what cannot be measured."""
        for name, value in (("batch", min(self.batches, default=0)), ("prompt", self.prompt), ("new", self.new)):
            if value < 1:
                raise UserError(f"--{name}: {value} is not a positive number; try the default (--help)")
        if self.repeats < 1:
            raise UserError(f"--repeats: {self.repeats} is not a positive number; medians need 3 or more")


def execute(path: str, settings: Settings) -> dict[str, Any]:
    """Measures a checkpoint.

    Args:
        path: directory, hub id or ``package:NAME``.
        settings: what is measured.

    Returns:
        ``checkpoint``, ``fingerprint``, ``device``, ``dtype``, ``threads``, ``torch``, ``prompt``, ``new``,
        ``repeats``; ``kernel`` (which layers it multiplies), ``speed`` (a row for every
        batch), ``storage``, and ``notes``: sentences that say what the numbers do not show.

    Raises:
        UserError: no checkpoint, no such device, or windows longer than the model allows.
        StageError: the packed weights are not the same weights.
    """
    directory = checkpoint.locate(path)
    limit = checkpoint.max_window(checkpoint.load_config(directory))
    if limit is not None and settings.prompt + settings.new > limit:
        raise UserError(
            f"--prompt {settings.prompt} and --new {settings.new}: together longer than the model's limit of {limit} "
            "tokens; give shorter ones"
        )
    device = checkpoint.pick_device(settings.device)
    measured, summary = measure(directory)
    sparse = [matrix for matrix in measured if matrix.is_sparse]
    stored = storage(TensorFiles(directory), sparse)
    model = checkpoint.load_model(directory, device)
    weights, kernel = two_weights(model)
    rows = speed(model, weights, settings)
    return {
        "checkpoint": path,
        "fingerprint": checkpoint.fingerprint(directory),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "prompt": settings.prompt,
        "new": settings.new,
        "repeats": settings.repeats,
        "patterns": summary["patterns"],
        "sparsity": summary["sparsity"],
        "kernel": kernel,
        "speed": rows,
        "storage": stored,
        "notes": notes(kernel, rows, sparse, stored),
    }


# --- speed ------------------------------------------------------------------------------------------------------------


def two_weights(model: Any) -> tuple[TwoWeights, dict[str, Any]]:
    """The 2:4 layers of a model with both kinds of weights, as far as there is a kernel for them.

    Returns:
        The layers, and ``layers`` (how many), ``not_2_4`` (how many linear layers are not), ``shapes_not_taken``
        (which 2:4 ones the kernel leaves dense) and ``reason`` (why none is sparse; None if one is).
    """
    weights = TwoWeights()
    capability = torch.cuda.get_device_capability(model.device) if model.device.type == "cuda" else (0, 0)
    linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    semi = {name: layer for name, layer in linears.items() if holds(layer.weight.detach(), TWO_FOUR)}
    reason = no_kernel(model.device.type, capability, model.dtype)
    refused: list[str] = []
    if reason is None and not semi:
        reason = "no linear layer of the checkpoint is 2:4, the one pattern that GPUs accelerate; dense timings only"
    if reason is None:
        fitting = [layer for layer in semi.values() if takes(tuple(layer.weight.shape), model.dtype)]
        refused = [name for name, layer in semi.items() if layer not in fitting]
        try:
            for layer in fitting:
                weights.add(layer)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            weights = TwoWeights()
            reason = f"the 2:4 kernel refuses this GPU or model ({str(error).splitlines()[0]}); dense timings only"
        if reason is None and not fitting:
            reason = "the 2:4 kernel takes none of the 2:4 layers' shapes; dense timings only"
    return weights, {
        "layers": len(weights.layers),
        "not_2_4": len(linears) - len(semi),
        "shapes_not_taken": refused,
        "reason": reason,
    }


@torch.no_grad()
def speed(model: Any, weights: TwoWeights, settings: Settings) -> list[dict[str, Any]]:
    """Medians of interleaved rounds for every batch.

    Returns:
        For every batch ``batch``, ``prefill_tokens_per_s`` and ``decode_ms_per_token`` (of the whole batch) by kind of
        weights; ``prefill_speedup`` and ``decode_speedup``, medians of dense over sparse within a round, and
        ``max_relative_difference`` of their logits (None without a kernel).
    """
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
                    *seconds, logits[kind] = run(model, tokens, settings.prompt)
                    rounds[kind].append((seconds[0], seconds[1]))
                progress.advance(f"batch {batch}")
            row = _row(batch, settings, {kind: times[1:] for kind, times in rounds.items()})
            both = (logits["dense"], logits[kinds[-1]])
            rows.append(row | {"max_relative_difference": relative_difference(*both) if weights.layers else None})
    weights.use("dense")
    return rows


def run(model: Any, tokens: Tensor, prompt: int) -> tuple[float, float, Tensor]:
    """Prefills a prompt and decodes what follows it, one token at a time with the KV cache.

    The likeliest token is taken as greedy decoding would, but the next one of ``tokens`` is fed, so that every run does
    the same work and its logits can be compared.

    Args:
        model: a causal language model of transformers.
        tokens: (batch, prompt + new).
        prompt: tokens of the prompt.

    Returns:
        Seconds of the prefill, seconds of all decoding, and logits (batch, new + 1, vocabulary): those that follow the
        prompt and every new token.
    """
    # as generation does: the prefill needs the logits of its last position alone
    last = {"logits_to_keep": 1} if "logits_to_keep" in signatures.signature(model.forward).parameters else {}
    started = _now(model.device)
    output = model(input_ids=tokens[:, :prompt], use_cache=True, **last)
    logits = [output.logits[:, -1]]
    logits[-1].argmax(-1)
    filled = _now(model.device)
    for place in range(prompt, tokens.shape[1]):
        cache = output.past_key_values
        output = model(input_ids=tokens[:, place : place + 1], past_key_values=cache, use_cache=True)
        logits.append(output.logits[:, -1])
        logits[-1].argmax(-1)
    return filled - started, _now(model.device) - filled, torch.stack(logits, dim=1)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _row(batch: int, settings: Settings, rounds: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    def median(kind: str, part: int) -> float:
        return statistics.median(times[part] for times in rounds[kind])

    def ratio(part: int) -> float | None:
        if "sparse" not in rounds:
            return None
        pairs = zip(rounds["dense"], rounds["sparse"], strict=True)
        return statistics.median(dense[part] / sparse[part] for dense, sparse in pairs)

    return {
        "batch": batch,
        "prefill_tokens_per_s": {kind: batch * settings.prompt / median(kind, 0) for kind in rounds},
        "prefill_speedup": ratio(0),
        "decode_ms_per_token": {kind: 1000 * median(kind, 1) / settings.new for kind in rounds},
        "decode_speedup": ratio(1),
    }


# --- storage ----------------------------------------------------------------------------------------------------------


def storage(files: TensorFiles, sparse: list[MatrixSparsity]) -> dict[str, Any]:
    """Bytes of a checkpoint as it is and with its sparse matrices packed; one of them is packed to prove it.

    Returns:
        ``file_bytes``; ``dense_bytes`` of all tensors and ``sparse_matrices_bytes`` of the sparse ones among them;
        ``packed_bytes`` and ``bitmask_bytes`` of all tensors if the sparse ones are packed as N:M (``packed_matrices``
        of them, the others stay dense) or with bitmasks; ``proof``: the matrix that was packed into a file, its bytes
        that way (None if no matrix is sparse).
    """
    dense = sum(file.stop - file.start for file in map(files.spec, files))
    size = {m.name: (m.shape, files.spec(m.name).dtype.itemsize) for m in sparse}
    before = {m.name: torch.Size(m.shape).numel() * size[m.name][1] for m in sparse}
    best = {m.name: _smallest(m) for m in sparse if m.patterns}
    structured = {name: structured_bytes(*size[name], pattern) for name, pattern in best.items()}
    bitmask = {m.name: bitmask_bytes(*size[m.name], m.zeros) for m in sparse}
    return {
        "file_bytes": files.num_bytes,
        "dense_bytes": dense,
        "sparse_matrices_bytes": sum(before.values()),
        "packed_bytes": dense - sum(before[name] - packed for name, packed in structured.items()),
        "packed_matrices": len(structured),
        "bitmask_bytes": dense - sum(before[name] - packed for name, packed in bitmask.items()),
        "proof": _prove(files, sparse[0], best.get(sparse[0].name)) if sparse else None,
    }


def _smallest(matrix: MatrixSparsity) -> Pattern:
    """Of the patterns that hold, the one that packs smallest."""
    return min(map(Pattern.parse, matrix.patterns), key=lambda pattern: structured_bytes((1 << 10,), 2, pattern))


def _prove(files: TensorFiles, matrix: MatrixSparsity, pattern: Pattern | None) -> dict[str, Any]:
    """Packs a matrix into files, reads them and unpacks it; the tensors' bytes are what the storage counts."""
    weight = files.read(matrix.name)
    proof: dict[str, Any] = {"matrix": matrix.name, "dense_bytes": weight.numel() * weight.element_size()}
    ways = {"bitmask": pack_bitmask(weight)}
    if pattern is not None:
        along = weight if holds(weight, pattern) else weight.t()  # Conv1D is stored (in, out)
        proof["pattern"] = str(pattern)
        ways["packed"] = pack_structured(along, pattern)
    for name, packed in ways.items():
        again = unpack(_through_a_file(packed))
        same = torch.equal(again, weight if again.shape == weight.shape else weight.t())
        expected = (
            bitmask_bytes(matrix.shape, weight.element_size(), matrix.zeros)
            if packed.pattern is None
            else structured_bytes(matrix.shape, weight.element_size(), packed.pattern)
        )
        if not same or packed.num_bytes != expected:
            raise StageError(f"{matrix.name}: packing ({name}) does not give the same weights in {expected} bytes")
        proof[f"{name}_bytes"] = packed.num_bytes
    return proof


def _through_a_file(packed: Packed) -> Packed:
    tensors = {"values": packed.values, "bits": packed.bits}
    with tempfile.TemporaryDirectory() as scratch:
        shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        file = TensorFile.create(Path(scratch) / "packed.safetensors", shapes, {})
        for name, tensor in tensors.items():
            file.write(name, tensor)
        return Packed(file.read("values"), file.read("bits"), packed.shape, packed.pattern)


# --- in words ---------------------------------------------------------------------------------------------------------


def notes(
    kernel: dict[str, Any], rows: list[dict[str, Any]], sparse: list[MatrixSparsity], stored: dict[str, Any]
) -> list[str]:
    """What the numbers mean, and where sparsity gains nothing."""
    said = []
    if kernel["reason"] is not None:
        said.append(kernel["reason"])
    else:
        moved = max(row["max_relative_difference"] for row in rows)
        said.append(
            f"sparse: {kernel['layers']} linear layers multiplied by the 2:4 kernel; {kernel['not_2_4']} that are not "
            f"2:4 stay dense; the logits differ by at most {moved:.1e} of the largest one"
        )
        said.append(
            "decode at small batch is bound by reading the weights: in 16 bits the 2:4 format has 9/16 of their bytes, "
            "so the layers that are sparse gain 1.8x at the very most, and fewer than 8 rows are padded to 8; the time "
            "to launch kernels from Python is part of these numbers, and a small model is bound by it"
        )
    if kernel["shapes_not_taken"]:
        count, some = len(kernel["shapes_not_taken"]), ", ".join(kernel["shapes_not_taken"][:3])
        said.append(f"left dense, of shapes that the 2:4 kernel does not take: {count} 2:4 layers ({some}, ...)")
    if not sparse:
        said.append("the checkpoint is dense: no zeros to skip, nothing to pack")
    elif not all(matrix.patterns for matrix in sparse):
        said.append("unstructured zeros, with no N:M pattern: they save storage, not time, on a GPU as on a CPU")
    elif not all("2:4" in matrix.patterns for matrix in sparse):
        said.append(
            "not all sparse matrices are 2:4, and GPUs accelerate no other pattern: the others save storage alone"
        )
    if stored["proof"] is not None:
        said.append(
            f"storage: {stored['proof']['matrix']} was packed into a file and unpacked to the same weights; the other "
            "sizes follow from shapes and zeros. What is packed must be unpacked to run: it saves disk, not memory"
        )
    return said


def tables(found: dict[str, Any]) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """Title, header and rows of the speed and the storage."""
    kinds = list(found["speed"][0]["prefill_tokens_per_s"])
    speed_rows = []
    for row in found["speed"]:
        cells = [str(row["batch"])]
        for measure_name, ratio, form in (
            ("prefill_tokens_per_s", "prefill_speedup", ",.0f"),
            ("decode_ms_per_token", "decode_speedup", ",.2f"),
        ):
            cells += [format(row[measure_name][kind], form) for kind in kinds]
            cells += [f"{row[ratio]:.2f}x"] if row[ratio] is not None else []
        speed_rows.append(tuple(cells))
    more = ("speed-up",) * (len(kinds) - 1)
    header = ("batch", *(f"prefill {kind}, tokens/s" for kind in kinds), *more)
    header += (*(f"decode {kind}, ms/token" for kind in kinds), *more)
    where = f"{found['device']}, {found['dtype']}, prompt {found['prompt']}, {found['new']} new tokens"
    stored = found["storage"]
    sizes = [
        ("dense safetensors", stored["dense_bytes"]),
        (f"N:M values and indices ({stored['packed_matrices']} matrices)", stored["packed_bytes"]),
        ("values and bitmask", stored["bitmask_bytes"]),
    ]
    storage_rows = [(name, f"{size / 1e6:,.1f}", f"{size / stored['dense_bytes']:.1%}") for name, size in sizes]
    return [
        (f"{found['checkpoint']}: {where}", header, speed_rows),
        ("storage of all tensors", ("", "MB", "of dense"), storage_rows),
    ]
