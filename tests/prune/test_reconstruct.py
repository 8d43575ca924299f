"""Tuning pruned blocks: zeros stay, the block's error falls, a tuning that does harm is undone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import as_matrix, in_first_block, kept_per_group, shards, stored, weights_of
from conftest import Prune

Make = Callable[..., Path]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_tuning_keeps_zeros_and_lowers_the_blocks_error(
    method: str, family: str, prune: Prune, make_checkpoint: Make
) -> None:
    base = make_checkpoint(family)
    common = "prune.targets=all-linear", f"prune.method={method}"
    tuning = "prune.reconstruct_epochs=3", "prune.reconstruct_lr=1e-3", "prune.batch_size=2"
    _, plain, _ = prune(*common, base=base)
    _, tuned, record = prune(*common, *tuning, base=base)
    assert record.reconstruction is not None
    assert record.reconstruction.keys() == {0, 1}
    assert all(0 < errors.after < errors.before for errors in record.reconstruction.values())
    touched = {stored(layer.name, family) for layer in record.layers}
    for name in touched:
        assert (kept_per_group(as_matrix(tuned[name], family)) == 2).all(), name
        if in_first_block(name):
            assert torch.equal(tuned[name] != 0, plain[name] != 0)
    before = weights_of(base)
    assert all(torch.equal(tuned[name], before[name]) for name in before.keys() - touched)


@pytest.mark.parametrize("options", [["prune.skip=['*.experts.0.*']"], ["prune.targets=[gate_proj, down_proj]"]])
def test_matrices_of_a_mixture_that_are_not_targets_are_not_tuned(
    options: list[str], prune: Prune, interrupt: Callable[..., Path], make_checkpoint: Make
) -> None:
    base = make_checkpoint("mixtral")
    options = ["prune.targets=all-linear", "prune.reconstruct_epochs=3", "prune.reconstruct_lr=1e-3", *options]
    directory, tuned, record = prune(*options, base=base)
    assert record.reconstruction is not None
    assert all(errors.after < errors.before for errors in record.reconstruction.values())
    touched = {stored(layer.name, "mixtral") for layer in record.layers}
    before = weights_of(base)
    assert {name for name in before if not torch.equal(tuned[name], before[name])} == touched
    out = interrupt(*options, base=base, blocks=1)
    prune(*options, base=base, out=out)
    assert shards(out) == shards(directory)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tuning_that_does_harm_is_undone(dtype: torch.dtype, prune: Prune, make_checkpoint: Make) -> None:
    base = make_checkpoint("llama", dtype=dtype)
    plain = prune(base=base)
    tuned = prune("prune.reconstruct_epochs=1", "prune.reconstruct_lr=100", base=base)
    assert tuned.record.reconstruction is not None
    assert all(errors.after == errors.before for errors in tuned.record.reconstruction.values())
    assert shards(plain.directory) == shards(tuned.directory)
