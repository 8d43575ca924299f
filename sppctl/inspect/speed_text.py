"""The results of a bench: types, tables, and notes on where sparsity gains nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sppctl.inspect.inspect import MatrixSparsity
from sppctl.inspect.storage import Storage


@dataclass(frozen=True)
class Kernel:
    """The linear layers that the 2:4 kernel multiplies."""

    layers: int
    not_2_4: int  # linear layers with other weights
    shapes_not_taken: list[str]  # 2:4 layers that the kernel leaves dense
    reason: str | None  # why no layer is sparse; None if one is


@dataclass(frozen=True)
class BatchSpeed:
    """Medians over the rounds of one batch size."""

    batch: int
    prefill_tokens_per_s: dict[str, float]  # by kind of weights: dense, sparse
    prefill_speedup: float | None  # median of dense over sparse within a round; None without a kernel
    decode_ms_per_token: dict[str, float]  # of the whole batch
    decode_speedup: float | None
    max_relative_difference: float | None  # of the logits


@dataclass(frozen=True)
class Bench:
    """What was measured on a checkpoint."""

    checkpoint: str
    fingerprint: str
    device: str
    dtype: str
    threads: int
    torch: str  # version
    prompt: int
    new: int
    repeats: int
    patterns: list[str]
    sparsity: float
    kernel: Kernel
    speed: list[BatchSpeed]
    storage: Storage
    notes: list[str]  # what the numbers do not show


def notes(kernel: Kernel, rows: list[BatchSpeed], sparse: list[MatrixSparsity]) -> Iterator[str]:
    """What the numbers mean, and where sparsity gains nothing."""
    if kernel.reason is not None:
        yield kernel.reason
    else:
        moved = max(row.max_relative_difference or 0.0 for row in rows)
        yield (
            f"sparse: {kernel.layers} linear layers multiplied by the 2:4 kernel; {kernel.not_2_4} that are not "
            f"2:4 stay dense; the logits differ by at most {moved:.1e} of the largest one"
        )
        yield (
            "decode at small batch is bound by reading the weights: in 16 bits the 2:4 format has 9/16 of their bytes, "
            "so the layers that are sparse gain at most 1.8x, and fewer than 8 rows are padded to 8; the time "
            "to launch kernels from Python is part of these numbers, and a small model is bound by it"
        )
    if kernel.shapes_not_taken:
        count, examples = len(kernel.shapes_not_taken), ", ".join(kernel.shapes_not_taken[:3])
        yield f"left dense: {count} 2:4 layers of shapes that the 2:4 kernel does not support ({examples}, ...)"
    if not sparse:
        yield "the checkpoint is dense: no zeros to skip, nothing to pack"
        return
    if not all(matrix.patterns for matrix in sparse):
        yield "unstructured zeros, with no N:M pattern: they save storage but not time, on GPUs and on CPUs"
    elif not all("2:4" in matrix.patterns for matrix in sparse):
        yield "not all sparse matrices are 2:4, and GPUs accelerate no other pattern: the others save no time"
    yield (
        "storage: by formula from shapes and zeros; packed weights (model.weights=packed) are unpacked in every "
        "product, which saves memory, not time"
    )


def tables(bench: Bench) -> list[tuple[str, Sequence[str], list[Sequence[str]]]]:
    """Title, header and rows of the speed and the storage."""
    kinds = list(bench.speed[0].prefill_tokens_per_s)
    speed_rows: list[Sequence[str]] = []
    for row in bench.speed:
        cells = [str(row.batch)]
        for numbers, ratio, form in (
            (row.prefill_tokens_per_s, row.prefill_speedup, ",.0f"),
            (row.decode_ms_per_token, row.decode_speedup, ",.2f"),
        ):
            cells += [format(numbers[kind], form) for kind in kinds]
            cells += [f"{ratio:.2f}x"] if ratio is not None else []
        speed_rows.append(cells)
    gain = ["speed-up"] if "sparse" in kinds else []
    header = ["batch", *(f"prefill {kind}, tokens/s" for kind in kinds), *gain]
    header += [*(f"decode {kind}, ms/token" for kind in kinds), *gain]
    stored = bench.storage
    sizes = [
        ("dense safetensors", stored.dense_bytes),
        (f"N:M values and indices ({stored.packed_matrices} matrices)", stored.packed_bytes),
        ("values and bitmask", stored.bitmask_bytes),
    ]
    storage_rows: list[Sequence[str]] = [
        (name, f"{size / 1e6:,.1f}", f"{size / stored.dense_bytes:.1%}") for name, size in sizes
    ]
    where = f"{bench.device}, {bench.dtype}, prompt {bench.prompt}, {bench.new} new tokens"
    return [
        (f"{bench.checkpoint}: {where}", header, speed_rows),
        ("storage of all tensors", ("", "MB", "of dense"), storage_rows),
    ]
