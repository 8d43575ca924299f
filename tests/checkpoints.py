"""Looking into the tiny checkpoints: their tensors and bytes, names that families use, masks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

MIXTRAL_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def weights_of(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    return {
        name: tensor for path in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(path).items()
    }


def write_weights(weights: dict[str, Tensor], directory: Path) -> None:
    """Into a checkpoint of a single file."""
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


def shards(directory: Path) -> dict[str, bytes]:
    """The files that hold or list weights."""
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.safetensors*"))}


def stored(layer: str, family: str) -> str:
    """The tensor that holds a layer's matrix in a checkpoint written by transformers."""
    if family == "mixtral" and ".experts." in layer:
        path, _, leaf = layer.replace(".mlp.", ".block_sparse_moe.").rpartition(".")
        return f"{path}.{MIXTRAL_NAMES[leaf]}.weight"
    return f"{layer}.weight"


def as_matrix(weight: Tensor, family: str) -> Tensor:
    """A stored tensor as (out_features, in_features)."""
    return weight.t() if family == "gpt2" else weight


def in_first_block(name: str) -> bool:
    """Of a layer or a tensor."""
    return ".layers.0." in name or ".h.0." in name


def kept_per_group(weight: Tensor, group: int = 4) -> Tensor:
    """Weights that are not zero in each group of consecutive inputs."""
    return (weight != 0).reshape(len(weight), -1, group).sum(-1)


def agreement(first: dict[str, Tensor], second: dict[str, Tensor], names: Iterable[str]) -> float:
    """Share of weights that both keep or both prune."""
    pairs = [(first[name] != 0, second[name] != 0) for name in names]
    return sum(int((one == other).sum()) for one, other in pairs) / sum(one.numel() for one, _ in pairs)


def assert_repaired_alike(first: dict[str, Tensor], second: dict[str, Tensor], names: Iterable[str]) -> None:
    """Equal values of matrices (out_features, in_features), given in the order in which they were pruned.

    What is removed from a row changes the rest of it, and the inputs of later layers: rows whose masks differ are left
    out, and all layers after the first that has one.
    """
    for name in names:
        one, other = first[name], second[name]
        same = ((one != 0) == (other != 0)).all(dim=1)
        assert same.any()
        torch.testing.assert_close(one[same], other[same], rtol=1e-3, atol=1e-5)
        if not same.all():
            return


def random_windows(samples: int, length: int) -> Tensor:
    """Tokens that every tiny model knows, always the same."""
    return torch.randint(0, 250, (samples, length), generator=torch.Generator().manual_seed(0))
