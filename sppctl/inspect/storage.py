"""Bytes of a checkpoint's tensors on disk: dense, and with the zeros left out, by formula.

- N:M keeps N values of every M and, for each, its index in the group: ceil(log2(M)) bits. For 2:4 these are the values
  and 2-bit indices that NVIDIA's sparse tensor cores read.
- A bitmask keeps the non-zero values, one bit per weight, and offsets; it needs no pattern, and is what
  ``model.weights=packed`` keeps in memory (:mod:`sppctl.packed.format`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sppctl.files.safe_files import TensorFiles
from sppctl.inspect.inspect import MatrixSparsity
from sppctl.packed.format import packed_bytes
from sppctl.pattern import Pattern


@dataclass(frozen=True)
class Storage:
    """Bytes of a checkpoint as it is, and with its sparse matrices packed."""

    file_bytes: int
    dense_bytes: int  # of all tensors
    sparse_matrices_bytes: int  # of the sparse matrices among them, stored dense
    packed_bytes: int  # of all tensors, the sparse matrices as N:M where they have a pattern
    packed_matrices: int  # that have one
    bitmask_bytes: int  # of all tensors, the sparse matrices with bitmasks


def storage(files: TensorFiles, sparse: list[MatrixSparsity]) -> Storage:
    """The size on disk of a checkpoint's tensors, given its sparse matrices."""
    stored = packed = masked = 0
    for matrix in sparse:
        itemsize, count = files.spec(matrix.name).dtype.itemsize, math.prod(matrix.shape)
        stored += count * itemsize
        columns = matrix.shape[-1]
        masked += packed_bytes(count // columns, columns, count - matrix.zeros, itemsize)
        patterns = map(Pattern.parse, matrix.patterns)
        packed += min((_structured_bytes(count, itemsize, p) for p in patterns), default=count * itemsize)
    dense = sum(spec.stop - spec.start for spec in map(files.spec, files))
    return Storage(
        file_bytes=files.num_bytes,
        dense_bytes=dense,
        sparse_matrices_bytes=stored,
        packed_bytes=dense - stored + packed,
        packed_matrices=sum(bool(matrix.patterns) for matrix in sparse),
        bitmask_bytes=dense - stored + masked,
    )


def _structured_bytes(count: int, itemsize: int, pattern: Pattern) -> int:
    """Bytes of an N:M matrix without its zeros; groups with more zeros than M - N are not smaller."""
    assert pattern.keep is not None
    assert pattern.group is not None
    kept = count // pattern.group * pattern.keep
    return kept * itemsize + math.ceil(kept * (pattern.group - 1).bit_length() / 8)
