"""What a bench found, in tables and in sentences that say where sparsity gains nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sppctl.inspect.inspect import MatrixSparsity


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
    if sparse:
        said.append(
            "storage: by formula from shapes and zeros; packed weights are unpacked to run, which saves disk only"
        )
    return said


def tables(found: dict[str, Any]) -> list[tuple[str, Sequence[str], list[Sequence[str]]]]:
    """Title, header and rows of the speed and the storage."""
    kinds = list(found["speed"][0]["prefill_tokens_per_s"])
    speed_rows: list[Sequence[str]] = []
    for row in found["speed"]:
        cells = [str(row["batch"])]
        for measured, ratio, form in (
            ("prefill_tokens_per_s", "prefill_speedup", ",.0f"),
            ("decode_ms_per_token", "decode_speedup", ",.2f"),
        ):
            cells += [format(row[measured][kind], form) for kind in kinds]
            cells += [f"{row[ratio]:.2f}x"] if row[ratio] is not None else []
        speed_rows.append(cells)
    more = ("speed-up",) * (len(kinds) - 1)
    prefill = [f"prefill {kind}, tokens/s" for kind in kinds]
    decode = [f"decode {kind}, ms/token" for kind in kinds]
    header = ("batch", *prefill, *more, *decode, *more)
    where = f"{found['device']}, {found['dtype']}, prompt {found['prompt']}, {found['new']} new tokens"
    stored = found["storage"]
    sizes = [
        ("dense safetensors", stored["dense_bytes"]),
        (f"N:M values and indices ({stored['packed_matrices']} matrices)", stored["packed_bytes"]),
        ("values and bitmask", stored["bitmask_bytes"]),
    ]
    storage_rows: list[Sequence[str]] = [
        (name, f"{size / 1e6:,.1f}", f"{size / stored['dense_bytes']:.1%}") for name, size in sizes
    ]
    return [
        (f"{found['checkpoint']}: {where}", header, speed_rows),
        ("storage of all tensors", ("", "MB", "of dense"), storage_rows),
    ]
