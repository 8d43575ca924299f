"""Whether the files of a checkpoint hold the weights of its model: from their headers, before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sppctl.errors import UserError, first_line
from sppctl.files.names import INDEX_NAME, SINGLE_NAME
from sppctl.files.safe_files import TensorFiles, TensorSpec
from sppctl.machine import dtype_name
from sppctl.model.checkpoint import load_config, quiet_libraries
from sppctl.model.targets import EXPERT_PARTS, stored_parts

# causal masks, (1, 1, n, n) and a scalar, in old files of the GPT families, which no model reads
_OLD_MASK = re.compile(r"(^|\.)(attn|attention)\.((masked_)?bias|causal_mask)$")

_RENAMED: WeakKeyDictionary[TensorFiles, dict[str, str]] = WeakKeyDictionary()  # :func:`renamed`, of open checkpoints


def is_old_mask(name: str, spec: TensorSpec) -> bool:
    """Whether a stored tensor is a constant mask, which no model reads, and which is -inf in some float16 files."""
    return _OLD_MASK.search(name) is not None and len(spec.shape) in (0, 4)


def empty_model(config: Any, dtype: torch.dtype | None = None, trust_remote_code: bool = False) -> Any:
    """The causal language model of a configuration on the meta device, in evaluation mode; UserError if it has none."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    try:
        with init_empty_weights(), quiet_libraries():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except Exception as error:  # a wrong value raises wherever the model first uses it
        reason = f"no causal language model can be built from its config ({first_line(error)})"
        raise UserError("model.path", reason) from error
    return model.eval()


def check_directory(directory: Path, trust_remote_code: bool = False) -> None:
    """:func:`check_weights` for the checkpoint in a directory."""
    files = TensorFiles(directory)
    check_weights(files, empty_model(load_config(directory, trust_remote_code), None, trust_remote_code))


def check_weights(files: TensorFiles, model: Any) -> None:
    """Verifies that loading a checkpoint fills every parameter and persistent buffer, and uses every stored tensor.

    transformers itself loads empty tensors with the shapes in the headers, so its renames, ties, fused experts and
    exceptions for old files apply. It resolves the names of a quantised checkpoint only when it loads the weights, so
    those are not checked. The ``model`` comes from :func:`empty_model` and is not changed.

    Raises:
        UserError: tensors are missing, surplus, of another shape or stored twice, or transformers would load other
            files.
    """
    directory, config = files.directory, model.config
    if SINGLE_NAME not in files.files and files.index is None:
        raise UserError(
            f"{directory} holds {next(iter(files.files))}, but neither {INDEX_NAME} nor {SINGLE_NAME}; "
            "download the index too, or rename a file that holds all weights"
        )
    file = getattr(config, "transformers_weights", None)
    if file not in (None, SINGLE_NAME, INDEX_NAME):
        raise UserError(
            str(directory), f"config.json names {file!r} as transformers_weights", f"sppctl reads {SINGLE_NAME}"
        )
    if getattr(config, "quantization_config", None) is not None:
        return
    if not any(files.spec(name).dtype.is_floating_point for name in files):
        raise UserError(f"{directory} holds no floating-point weights; use the checkpoint before it was quantised")
    problems = list(dict.fromkeys(_problems(files, model)))
    if problems:
        more = f" (and {len(problems) - 1} more)" if problems[1:] else ""
        raise UserError(str(directory), f"{problems[0]}{more}", "download it again, or correct its config.json")


def refuse_random(place: str, info: dict[str, Any]) -> None:
    """Raises UserError if transformers' loading info names parameters that did not come from the files."""
    random = sorted(info["missing_keys"] | {name for name, *_ in info["mismatched_keys"]})
    if random:
        reason = f"{place} holds no {random[0]} of the model's shape; transformers would initialise it at random"
        raise UserError(reason)


def misfits(files: TensorFiles, model: Any, names: Iterable[str]) -> Iterator[str]:
    """A message for each parameter that the files lack, or hold in another shape than the model's."""
    for name in names:
        try:
            parts = stored_parts(files, model, name)
        except UserError as error:
            yield str(error).removeprefix(f"{files.directory} ").partition(": ")[0]
            continue
        owner, _, leaf = name.rpartition(".")
        parameter = getattr(model.get_submodule(owner), leaf)
        for part in parts:
            if (shape := files.spec(part.name).shape) != part.of(parameter).shape:
                yield _shapes(part.name, shape, part.of(parameter).shape)


def _shapes(name: str, actual: Sequence[int], expected: Sequence[int]) -> str:
    return f"{name} has shape {tuple(actual)}, the model's is {tuple(expected)}"


def _surplus(files: TensorFiles, name: str) -> str:
    place = f" ({files.home[name]})" if name in files else ""
    return f"{name}{place} is not part of the model that config.json describes"


def _problems_of_experts(files: TensorFiles, model: Any, names: list[str], fused: list[str]) -> list[str]:
    """Problems of fused experts' matrices, by their names in the files; if there are none, the surplus matrices."""
    problems = list(misfits(files, model, names))
    if problems:
        return problems
    used = {part.name for name in fused for part in stored_parts(files, model, name)}
    return [_surplus(files, name) for name in sorted(files) if ".experts." in name and name not in used]


def _problems(files: TensorFiles, model: Any) -> Iterator[str]:
    state, expected = _empty_tensors(files), model.state_dict()
    for name, dtype in ((name, files.spec(name).dtype) for name in files):
        tensor = expected.get(name, expected.get(f"{model.base_model_prefix}.{name}"))
        if tensor is not None and tensor.dtype.is_floating_point and not _is_number(dtype):
            yield f"{name} is stored as {dtype_name(dtype)}, and config.json does not say how it is quantised"
    fused = [name for name, p in model.named_parameters() if p.dim() == 3 and name.rpartition(".")[2] in EXPERT_PARTS]
    try:
        loaded, info = _load(state, model)
    except Exception as error:  # experts whose matrices cannot be fused, or names that conflict
        yield from _problems_of_experts(files, model, fused, fused) or [str(error)]
        return
    for name, actual, shape in sorted(info["mismatched_keys"]):
        problems = _problems_of_experts(files, model, [name], fused) if name in fused else []
        yield from problems or [_shapes(name, actual, shape)]
    for name in sorted(info["missing_keys"]):
        yield f"holds no tensor {name}, which config.json implies"
    for name in sorted(info["unexpected_keys"]):
        if not (name in files and is_old_mask(name, files.spec(name))):
            yield _surplus(files, name)
    first = _sources(loaded, state)
    rest = {name: tensor for name, tensor in state.items() if name not in first.values()}
    second = _sources(_load(rest, model)[0], rest) if rest else {}
    for key in sorted(first.keys() & second.keys()):
        yield f"the same tensor is stored twice, as {first[key]} and {second[key]}"


def renamed(files: TensorFiles, model: Any = None) -> dict[str, str]:
    """The stored tensor of each of the model's that transformers takes from the files as it is, whatever its name.

    Empty if transformers cannot load the files, or they are quantised. ``model``: as in :func:`check_weights`; None:
    that of the config.json beside the files.
    """
    if files not in _RENAMED:
        _RENAMED[files] = {}
        with suppress(Exception):  # the caller raises the error: it names the tensor that it does not find
            model = model or empty_model(load_config(files.directory))
            if getattr(model.config, "quantization_config", None) is None:
                state = _empty_tensors(files)
                _RENAMED[files] = _sources(_load(state, model)[0], state, unchanged=True)
    return _RENAMED[files]


def _is_number(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize > 1


def _empty_tensors(files: TensorFiles) -> dict[str, Tensor]:
    """The stored tensors without memory, by name; in float32, in which they are not converted when they are loaded."""
    specs = {name: files.spec(name) for name in files}
    dtypes = {name: torch.float32 if _is_number(spec.dtype) else spec.dtype for name, spec in specs.items()}
    return {name: torch.empty(spec.shape, dtype=dtypes[name], device="meta") for name, spec in specs.items()}


def _load(state: dict[str, Tensor], model: Any) -> Any:
    """The model with empty tensors, and transformers' loading info."""
    options = {"dtype": torch.float32, "device_map": "meta", "ignore_mismatched_sizes": True}
    with quiet_libraries():
        return type(model).from_pretrained(
            None, config=model.config, state_dict=state, output_loading_info=True, **options
        )


def _sources(loaded: Any, state: dict[str, Tensor], unchanged: bool = False) -> dict[str, str]:
    """For each tensor of the loaded model that shares its storage with one in ``state``: the name of the latter.

    ``unchanged``: only those that are the latter, not a part of it or its transpose.
    """
    names = {tensor.untyped_storage()._cdata: name for name, tensor in state.items()}
    tensors = {key: (tensor, names.get(tensor.untyped_storage()._cdata)) for key, tensor in loaded.state_dict().items()}
    return {
        key: name
        for key, (tensor, name) in tensors.items()
        if name is not None and (not unchanged or _place(tensor) == _place(state[name]))
    }


def _place(tensor: Tensor) -> tuple[object, ...]:
    """Which elements of its storage a tensor has, and in what order."""
    return tensor.storage_offset(), tensor.shape, tensor.stride()
