"""Bytes of a checkpoint's tensors on disk: dense, and with the zeros left out, by formula.

- N:M keeps N values of every M and, for each, its index in the group: ceil(log2(M)) bits. For 2:4 these are the values
  and 2-bit indices that NVIDIA's sparse tensor cores read.
- A bitmask keeps the non-zero values and one bit per weight; it needs no pattern.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sppctl.files.safe_files import TensorFiles
from sppctl.inspect.inspect import MatrixSparsity
from sppctl.pattern import Pattern


def index_bits(group: int) -> int:
    """Bits of an index into a group of M."""
    return (group - 1).bit_length()


def structured_bytes(shape: tuple[int, ...], itemsize: int, pattern: Pattern) -> int:
    """Bytes of an N:M matrix without its zeros; groups with more zeros than M - N take no less."""
    assert pattern.keep is not None
    assert pattern.group is not None
    kept = math.prod(shape) // pattern.group * pattern.keep
    return kept * itemsize + math.ceil(kept * index_bits(pattern.group) / 8)


def bitmask_bytes(shape: tuple[int, ...], itemsize: int, zeros: int) -> int:
    """Bytes of a matrix with zeros anywhere, stored as its non-zero values and a bitmask."""
    return (math.prod(shape) - zeros) * itemsize + math.ceil(math.prod(shape) / 8)


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
    """What the tensors of a checkpoint take on disk, of which the sparse matrices are given."""
    dense = sum(spec.stop - spec.start for spec in map(files.spec, files))
    itemsize = {matrix.name: files.spec(matrix.name).dtype.itemsize for matrix in sparse}
    before = {matrix.name: math.prod(matrix.shape) * itemsize[matrix.name] for matrix in sparse}
    structured = {
        matrix.name: min(
            structured_bytes(matrix.shape, itemsize[matrix.name], Pattern.parse(text)) for text in matrix.patterns
        )
        for matrix in sparse
        if matrix.patterns
    }
    bitmask = {matrix.name: bitmask_bytes(matrix.shape, itemsize[matrix.name], matrix.zeros) for matrix in sparse}
    return Storage(
        file_bytes=files.num_bytes,
        dense_bytes=dense,
        sparse_matrices_bytes=sum(before.values()),
        packed_bytes=dense - sum(before[name] - packed for name, packed in structured.items()),
        packed_matrices=len(structured),
        bitmask_bytes=dense - sum(before[name] - packed for name, packed in bitmask.items()),
    )
