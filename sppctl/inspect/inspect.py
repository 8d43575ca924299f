"""Any safetensors checkpoint -> its actual sparsity, matrix by matrix."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sppctl.files.safe_files import TensorFiles
from sppctl.inspect.layout import layout
from sppctl.model import find
from sppctl.pattern import Pattern
from sppctl.pruners import masks
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
    patterns: tuple[str, ...]  # N:M that hold along the input features: at most N non-zero in every M
    along_outputs: tuple[str, ...] = ()  # if none does: those that hold along the other dimension of a 2-D matrix
    transposed: bool = False  # the input features are the first dimension (Conv1D), not the last
    listed: bool | None = None  # in the record of pruning; None if there is none

    @property
    def is_sparse(self) -> bool:
        """Whether it was pruned: the record says so, or without one, its share of zeros."""
        return self.sparsity >= DENSE_BELOW if self.listed is None else self.listed

    @property
    def in_features(self) -> int:
        """Number of input features."""
        return self.shape[0 if self.transposed else -1]


def matrices(files: TensorFiles, *extra: Pattern | None) -> Iterator[MatrixSparsity]:
    """Measures every matrix of a checkpoint, one in memory at a time.

    Embeddings and the output head are included, biases of experts (2-D) are not.
    """
    patterns = list(dict.fromkeys([*CERTIFIED, *(p for p in extra if p is not None and p.is_structured)]))
    stored = layout(files, recorded_patterns(files.directory))
    for name in files:
        spec = files.spec(name)
        is_matrix = len(spec.shape) in (2, 3) and 0 not in spec.shape and not name.endswith("bias")
        if not is_matrix or not spec.dtype.is_floating_point:
            continue
        weight = files.read(name)
        if weight.dtype.itemsize == 1:
            weight = weight.to(torch.bfloat16)
        zeros = int((weight == 0).sum())
        sparsity = zeros / weight.numel()
        candidates = [p for p in patterns if sparsity >= p.sparsity - 1e-9]
        transposed = name in stored.transposed
        matching = _holding(weight.t() if transposed else weight, candidates)
        others = () if matching or weight.dim() != 2 else _holding(weight if transposed else weight.t(), candidates)
        listed = None if stored.listed is None else name in stored.listed
        yield MatrixSparsity(name, spec.shape, zeros, sparsity, matching, others, transposed, listed)


def _holding(weight: Tensor, candidates: list[Pattern]) -> tuple[str, ...]:
    """The N:M patterns that hold along the last dimension of a weight."""
    weight = weight.contiguous() if candidates else weight
    return tuple(str(pattern) for pattern in candidates if holds(weight, pattern))


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


def violations(measured: list[MatrixSparsity], expected: Pattern) -> list[str]:
    """One line for each matrix that does not have a pattern though it should.

    A ratio is met by a matrix with at least that share of zeros, up to what methods round down. If no record
    lists the pruned matrices, a dense one should be sparse where those of its name in other blocks are.
    """
    sparse = [matrix for matrix in measured if matrix.is_sparse]
    if not sparse:
        return ["no matrix is sparse at all"]
    problems = [f"{matrix.name}: {_problem(matrix, expected)}" for matrix in sparse if not _meets(matrix, expected)]
    sparse_names = {_in_any_block(matrix.name): matrix.name for matrix in sparse}
    for name in (matrix.name for matrix in measured if matrix.listed is None and not matrix.is_sparse):
        if _in_any_block(name) in sparse_names:
            problems.append(f"{name}: dense, though {sparse_names[_in_any_block(name)]} is sparse")
    return problems


def _meets(matrix: MatrixSparsity, expected: Pattern) -> bool:
    if expected.is_structured:
        return str(expected) in matrix.patterns
    weights = math.prod(matrix.shape)
    by_row = expected.num_pruned(matrix.in_features) * (weights // matrix.in_features)
    # SparseGPT rounds down in every block of columns; in a small matrix that would excuse too much
    rounding = min(masks.rounding(matrix.shape), weights // 1000)
    return matrix.zeros >= min(by_row, expected.num_pruned(weights) - rounding)


def _problem(matrix: MatrixSparsity, expected: Pattern) -> str:
    """Why a matrix that was pruned does not meet an expectation."""
    if not matrix.zeros:
        return "dense, though its record says that it was pruned"
    if str(expected) in matrix.along_outputs:
        return f"{expected} {_wrong_dimension(matrix)}, which no kernel uses"
    if expected.is_structured:
        return f"not {expected} (sparsity {matrix.sparsity:.4f})"
    return f"sparsity {matrix.sparsity:.4f} is below {expected}"


def _in_any_block(name: str) -> str:
    return ".".join(part for part in name.split(".") if not part.isdigit())


def recorded_patterns(directory: Path) -> dict[str, Pattern] | None:
    """The pattern of each pruned module, from the record of a checkpoint or its run; None if there is no record."""
    for path in find.pruning_records(directory):
        try:
            layers = json.loads(path.read_text())["metrics"]["layers"]
            return {str(layer["name"]): Pattern.parse(layer["pattern"]) for layer in layers}
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            continue  # no record, or one of another stage
    return None


def patterns_text(matrix: MatrixSparsity) -> str:
    """The N:M patterns of a matrix; where only the outputs have some, the tightest ones, with their dimension."""
    if matrix.patterns or not matrix.along_outputs:
        return " ".join(matrix.patterns) or "-"
    tightest = " ".join(_tightest([Pattern.parse(text) for text in matrix.along_outputs]))
    return f"({tightest} {_wrong_dimension(matrix)})"


def _wrong_dimension(matrix: MatrixSparsity) -> str:
    return f"along the {'last' if matrix.transposed else 'first'} dimension"


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
