"""How a checkpoint stores its matrices: which are transposed, and which ones a pruning record lists."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from sppctl.errors import UserError
from sppctl.files.safe_files import TensorFiles
from sppctl.model.blocks import Skeleton
from sppctl.model.checkpoint import load_config
from sppctl.model.targets import tensor_names


@dataclass(frozen=True)
class Layout:
    """What the shapes of a checkpoint's tensors do not show."""

    transposed: set[str]  # tensors that are stored as (in_features, out_features): Conv1D of the GPT-2 family
    listed: set[str] | None  # tensors that hold pruned matrices; None if this is not known


def layout(files: TensorFiles, layers: Iterable[str] | None) -> Layout:
    """The layout of a checkpoint, from the model of its config.json, which is built without weights.

    If no model can be built (there is no config.json, or it needs code of its own), no matrix counts as transposed.

    Args:
        files: the checkpoint.
        layers: the modules that were pruned, from a record; None if there is none.
    """
    transposed: set[str] = set()
    holders: dict[str, str] = {}
    with suppress(UserError):  # it is not a decoder that transformers knows
        skeleton = Skeleton(load_config(files.directory))
        targets = skeleton.targets("all-linear")
        holders = tensor_names(files, skeleton.model, targets.values())
        transposed = {tensor for name, tensor in holders.items() if targets[name].transposed}
    return Layout(transposed, None if layers is None else _listed(files, holders, layers))


def _listed(files: TensorFiles, holders: dict[str, str], layers: Iterable[str]) -> set[str] | None:
    """The tensors that hold some modules; None if one of the modules is not found."""
    found = set()
    for layer in layers:
        # a checkpoint of the bare model leaves out the prefix
        spelled = (f"{name}.weight" for name in _endings(layer))
        tensor = holders.get(layer) or next((name for name in spelled if name in files), None)
        if tensor is None:
            return None
        found.add(tensor)
    return found


def _endings(name: str) -> list[str]:
    """``a.b.c``, ``b.c`` and ``c``."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]
