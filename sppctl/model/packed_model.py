"""Loading a checkpoint with its sparse matrices packed: one of them is dense in memory at a time, never the model.

transformers loads everything else as it always does. In place of a matrix that may be packed it is given a tensor
without memory of its own; then these matrices are read one after the other, and packed where that makes them smaller.
"""

from __future__ import annotations

import math
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sppctl import console, distributed, machine
from sppctl.errors import StageError, UserError
from sppctl.files.safe_files import TensorFiles
from sppctl.model.blocks import Skeleton
from sppctl.model.checkpoint import load_config, quiet_libraries
from sppctl.model.targets import tensor_names
from sppctl.packed.format import PackedWeight, pack
from sppctl.packed.linear import TENSORS, PackedLinear, packed_in

CPU = torch.device("cpu")
GIB = 2**30
SAMPLED = 8  # matrices


def load(directory: Path, device: torch.device, dtype: str, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """The model in evaluation mode on a device, packed, and transformers' loading info, as ``load_model`` needs them.

    The checkpoint's names and shapes have been checked. Experts, Conv1D, embeddings and the output head stay dense.
    In several processes the first one packs and sends the result, so all must call this.

    Raises:
        UserError: packing would not make the model smaller, or it is quantised.
        StageError: it does not fit into memory, packed as it is.
    """
    files, config = TensorFiles(directory), load_config(directory, trust_remote_code)
    if is_quantised(config):
        raise UserError("model.weights", f"{directory} is quantised, and cannot be packed", "set it to dense")
    skeleton = Skeleton(config, machine.torch_dtype(dtype), trust_remote_code)
    matrices = packable(files, skeleton)
    model, info = _without(matrices, files, type(skeleton.model), dtype, trust_remote_code)
    packed = dense = 0  # bytes
    specs, started = [files.spec(tensor) for tensor in matrices.values()], time.perf_counter()
    # one for all: memory freed after each would be too small for the next, and filled with small packed tensors
    buffer = torch.empty(max((spec.stop - spec.start for spec in specs), default=0), dtype=torch.uint8)
    with console.Progress(f"packing {directory}", len(matrices)) as bar:
        for name, tensor in matrices.items():
            layer = model.get_submodule(name)
            size = math.prod(layer.weight.shape) * layer.weight.itemsize
            _demand(directory, device, size, packed, dense)
            weight = _packed(files, tensor, layer.weight.dtype, buffer)
            dense, packed = dense + size, packed + weight.num_bytes
            if weight.num_bytes < size:
                owner, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(owner), leaf, PackedLinear(weight, layer.bias).to(device).eval())
            else:
                layer.weight = nn.Parameter(weight.to(layer.weight.dtype).to(device))
            bar.advance()
    if packed >= dense:
        sizes = f"its matrices take {packed / GIB:.2f} GiB packed and {dense / GIB:.2f} GiB dense"
        raise UserError("model.weights", f"{directory} is not sparse enough to pack: {sizes}", "set it to dense")
    model.to(device)
    seconds = time.perf_counter() - started
    rest = sum(parameter.nbytes for parameter in model.parameters())
    console.note(
        f"{directory}: {dense / GIB:.2f} GiB of matrices packed to {packed / GIB:.2f} GiB in {seconds:.1f} s "
        f"({seconds / (dense / 1e9):.1f} s/GB); {rest / GIB:.2f} GiB stay dense"
    )
    return model, info


def is_quantised(config: Any) -> bool:
    """Whether a configuration is that of a quantised checkpoint."""
    return getattr(config, "quantization_config", None) is not None


def packable(files: TensorFiles, skeleton: Skeleton) -> dict[str, str]:
    """The linear layers of the blocks by name, and the tensor that holds each one's matrix."""
    linears = (target for target in skeleton.targets("all-linear").values() if target.is_linear)
    # without those that are stored in another form, from which transformers makes them
    names = tensor_names(files, skeleton.model, linears)
    return {name: tensor for name, tensor in names.items() if files.spec(tensor).dtype.itemsize > 1}


def is_sparse(directory: Path, trust_remote_code: bool = False) -> bool:
    """Whether some matrices of a checkpoint, spread over its blocks, are smaller packed; the others are not read."""
    files, config = TensorFiles(directory), load_config(directory, trust_remote_code)
    if is_quantised(config):
        return False
    tensors = list(packable(files, Skeleton(config, None, trust_remote_code)).values())
    weights = (files.read(name) for name in tensors[:: max(1, len(tensors) // SAMPLED)])
    return any(pack(weight).num_bytes < weight.nbytes for weight in weights)


class _Stored:
    """A tensor of the files that is read when transformers takes ``[...]`` of it, as of safetensors' own slices."""

    def __init__(self, files: TensorFiles, name: str) -> None:
        self._files, self._name = files, name

    def __getitem__(self, _: object) -> Tensor:
        return self._files.read(self._name)


def _without(
    matrices: dict[str, str], files: TensorFiles, kind: Any, dtype: str, trust_remote_code: bool
) -> tuple[Any, Any]:
    """The model on the CPU with tensors without memory in place of the matrices, and the loading info."""
    from transformers import GenerationConfig

    state: dict[str, Any] = {name: _Stored(files, name) for name in files}
    nothing = torch.full((), math.nan, dtype=machine.torch_dtype(dtype))
    state |= {tensor: nothing.expand(files.spec(tensor).shape) for tensor in matrices.values()}
    options: dict[str, Any] = {"dtype": machine.torch_dtype(dtype), "output_loading_info": True}
    with quiet_libraries():
        with suppress(OSError):
            options["generation_config"] = GenerationConfig.from_pretrained(files.directory)
        config = load_config(files.directory, trust_remote_code)
        model, info = kind.from_pretrained(None, config=config, state_dict=state, **options)
    for name in matrices:
        weight = model.get_submodule(name).weight
        if weight.dtype == nothing.dtype and any(weight.stride()):
            problem = f"transformers changes {name} when it loads {files.directory}, so it cannot be packed"
            raise UserError("model.weights", problem, "set it to dense")
    return model, info


def _demand(directory: Path, device: torch.device, size: int, packed: int, dense: int) -> None:
    """Raises StageError if a matrix of so many bytes does not fit beside what has been packed."""
    free = min(machine.free_memory(CPU), machine.free_memory(device))
    if size > free:
        raise StageError(
            f"{directory} does not fit into memory: {dense / GIB:.2f} GiB of its matrices take {packed / GIB:.2f} GiB "
            f"packed, and {free / GIB:.2f} GiB are left, less than the next one needs; sppctl plan estimates what fits"
        )


def _packed(files: TensorFiles, tensor: str, dtype: torch.dtype, buffer: Tensor) -> PackedWeight:
    """A matrix of the files on the CPU; in several processes the first one packs it for all."""
    weights: list[PackedWeight] = []

    def pack_it() -> list[tuple[Any, torch.dtype]]:
        weights.append(packed_in(files.read(tensor, buffer=buffer), dtype, CPU))
        return [(getattr(weights[0], name).shape, getattr(weights[0], name).dtype) for name in TENSORS]

    layout = distributed.decide(pack_it)
    if not distributed.is_connected():
        return weights[0]
    tensors = [getattr(weights[0], name) for name in TENSORS] if weights else None
    tensors = tensors or [torch.empty(shape, dtype=kind) for shape, kind in layout]
    for part in tensors:
        distributed.broadcast_from_cpu(part.view(-1).view(torch.uint8), 0)
    stored = files.spec(tensor).dtype
    stored = stored if torch.promote_types(stored, dtype) == dtype else dtype
    return PackedWeight(*tensors, in_features=files.spec(tensor).shape[1], stored=stored, dtype=dtype)
