"""What the tensors of a checkpoint take on a disk, dense and without their zeros."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from sppctl.errors import StageError
from sppctl.files.safe_files import OwnFile, TensorFiles
from sppctl.inspect.inspect import MatrixSparsity, holds
from sppctl.inspect.packed import Packed, bitmask_bytes, pack_bitmask, pack_structured, structured_bytes, unpack
from sppctl.pattern import Pattern


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
        file = OwnFile.create(Path(scratch) / "packed.safetensors", shapes, {})
        for name, tensor in tensors.items():
            file.write(name, tensor)
        return Packed(file.read("values"), file.read("bits"), packed.shape, packed.pattern)
