"""Any safetensors checkpoint -> its actual sparsity, matrix by matrix."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sppctl.files.names import DIRECTORIES, RECORD
from sppctl.files.safe_files import TensorFiles
from sppctl.pattern import Pattern
from sppctl.pruners.masks import holds

CERTIFIED = tuple(Pattern.parse(text) for text in ("1:4", "2:4", "2:8", "4:8", "1:8", "8:16", "4:16"))
DENSE_BELOW = 0.05  # a matrix with fewer zeros was not pruned; embeddings and quantised weights have some by chance


@dataclass(frozen=True)
class MatrixSparsity:
    """One weight matrix, or the fused ones of a mixture's experts."""

    name: str  # of the tensor
    shape: tuple[int, ...]  # as stored
    zeros: int
    sparsity: float  # share of zeros
    # the N:M patterns that hold along the input features: at most N non-zero in every M. These are the last dimension,
    # or the first where no pattern holds along the last (Conv1D is stored transposed)
    patterns: tuple[str, ...]

    @property
    def is_sparse(self) -> bool:
        """Whether it was pruned."""
        return self.sparsity >= DENSE_BELOW


def matrices(files: TensorFiles, *extra: Pattern | None) -> Iterator[MatrixSparsity]:
    """Measures every matrix of a checkpoint, one in memory at a time; embeddings and the output head included."""
    patterns = list(dict.fromkeys([*CERTIFIED, *(p for p in extra if p is not None and p.is_structured)]))
    for name in files:
        spec = files.spec(name)
        if len(spec.shape) not in (2, 3) or 0 in spec.shape or not spec.dtype.is_floating_point:
            continue
        weight = files.read(name)
        if weight.dtype.itemsize == 1:
            weight = weight.to(torch.bfloat16)
        zeros = int((weight == 0).sum())
        sparsity = zeros / weight.numel()
        candidates = [p for p in patterns if sparsity >= p.sparsity - 1e-9]
        matching = [str(p) for p in candidates if holds(weight, p)]
        if not matching and weight.dim() == 2:
            # Conv1D of the GPT-2 family is stored (in, out)
            matching = [str(p) for p in candidates if holds(weight.t(), p)]
        yield MatrixSparsity(name, spec.shape, zeros, sparsity, tuple(matching))


def measure(directory: Path, *extra: Pattern | None) -> tuple[list[MatrixSparsity], dict[str, Any]]:
    """Every matrix of a checkpoint directory, and the totals; ``extra``: patterns to check besides the common ones.

    Returns:
        The matrices; and ``matrices``, ``sparse_matrices``, ``weights`` and ``zeros`` of the sparse ones, ``sparsity``
        (their share), ``total_sparsity`` (over every tensor), ``patterns`` that all sparse matrices share,
        ``parameters``, ``bytes``.
    """
    files = TensorFiles(directory)
    measured = list(matrices(files, *extra))
    sparse = [matrix for matrix in measured if matrix.is_sparse]
    weights = sum(math.prod(matrix.shape) for matrix in sparse)
    zeros = sum(matrix.zeros for matrix in sparse)
    parameters = sum(math.prod(files.spec(name).shape) for name in files)
    shared = set.intersection(*(set(matrix.patterns) for matrix in sparse)) if sparse else set()
    return measured, {
        "matrices": len(measured),
        "sparse_matrices": len(sparse),
        "weights": weights,
        "zeros": zeros,
        "sparsity": zeros / weights if weights else 0.0,
        "total_sparsity": sum(matrix.zeros for matrix in measured) / parameters if parameters else 0.0,
        "patterns": _tightest([Pattern.parse(text) for text in shared]),
        "parameters": parameters,
        "bytes": files.num_bytes,
    }


def _tightest(patterns: list[Pattern]) -> list[str]:
    """Without those that a sparser or finer one of the list implies (2:4 implies 4:8)."""
    # both directions hold for no two different patterns, so nothing drops out together
    return sorted(str(p) for p in patterns if not any(_implies(stricter, p) for stricter in patterns))


def _implies(a: Pattern, b: Pattern) -> bool:
    """Whether a matrix with the N:M pattern ``a`` also has another pattern ``b``."""
    if not b.is_structured:
        return a.sparsity >= b.sparsity
    a_keep, a_group, b_keep, b_group = a.keep or 0, a.group or 1, b.keep or 0, b.group or 1
    return a != b and b_group % a_group == 0 and a_keep * (b_group // a_group) <= b_keep


def violations(measured: list[MatrixSparsity], expected: Pattern, layers: Iterable[str] | None = None) -> list[str]:
    """One line for each matrix that does not have a pattern though it should.

    A ratio is met by a matrix with at least that share of zeros, up to one weight per row. ``layers`` are the modules
    that were pruned; if they are not known, a dense matrix should be sparse where those of its name in other blocks
    are.
    """
    sparse = [matrix for matrix in measured if matrix.is_sparse]
    if not sparse:
        return ["no matrix is sparse at all"]
    problems = []
    for matrix in sparse:
        if expected.is_structured:
            if str(expected) not in matrix.patterns:
                problems.append(f"{matrix.name}: not {expected} (sparsity {matrix.sparsity:.4f})")
        elif matrix.zeros < expected.num_pruned(matrix.shape[-1]) * math.prod(matrix.shape[:-1]):
            problems.append(f"{matrix.name}: sparsity {matrix.sparsity:.4f} is below {expected}")
    # a checkpoint of the bare model leaves out the prefix
    pruned = None if layers is None else {name for layer in layers for name in _endings(layer)}
    sparse_names = {_in_any_block(matrix.name): matrix.name for matrix in sparse}
    for name in (matrix.name for matrix in measured if not matrix.is_sparse):
        if pruned is not None:
            if name.removesuffix(".weight") in pruned:
                problems.append(f"{name}: dense, though its record says that it was pruned")
        elif _in_any_block(name) in sparse_names:
            problems.append(f"{name}: dense, though {sparse_names[_in_any_block(name)]} is sparse")
    return problems


def _endings(name: str) -> list[str]:
    """``a.b.c``, ``b.c`` and ``c``."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _in_any_block(name: str) -> str:
    return ".".join(part for part in name.split(".") if not part.isdigit())


def recorded_patterns(directory: Path) -> dict[str, Pattern] | None:
    """The pattern of each pruned module, from the record of a checkpoint or its run; None if there is no record."""
    record = directory / RECORD
    for path in (record, directory.parent / DIRECTORIES["prune"] / RECORD) if record.is_file() else ():
        try:
            layers = json.loads(path.read_text())["metrics"]["layers"]
            return {str(layer["name"]): Pattern.parse(layer["pattern"]) for layer in layers}
        except (OSError, ValueError, LookupError, TypeError):
            continue  # no record, or one of another stage
    return None


def verdict(summary: dict[str, Any], expected: Pattern) -> str:
    """The sentence about a checkpoint whose sparse matrices all have a pattern."""
    number = summary["sparse_matrices"]
    stricter = [text for text in summary["patterns"] if _implies(Pattern.parse(text), expected)]
    reason = f", which {stricter[0]} implies" if stricter else ""
    return f"{number} of {number} sparse matrices match {expected}{reason}"


def sentence(summary: dict[str, Any]) -> str:
    """The totals as a sentence."""
    size = f"{summary['parameters']:,} parameters, {summary['bytes'] / 1e6:.1f} MB"
    if not summary["sparse_matrices"]:
        return f"dense: none of {summary['matrices']} matrices is sparse; {size}"
    pattern = f"pattern {', '.join(summary['patterns'])}" if summary["patterns"] else "no common N:M pattern"
    return (
        f"{summary['sparse_matrices']} of {summary['matrices']} matrices are sparse: {summary['sparsity']:.4%} zeros "
        f"in them, {pattern}; {summary['total_sparsity']:.2%} of all {size}"
        + (f", packed in memory {summary['packed_bytes'] / 1e6:.1f} MB" if "packed_bytes" in summary else "")
    )
