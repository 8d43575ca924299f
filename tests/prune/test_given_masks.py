"""Masks from another checkpoint (prune.mask_from): what each method makes of them, and which are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import agreement, in_first_block, kept_per_group, stored, weights_of, write_weights
from conftest import Command, Prune
from torch import Tensor

from sppctl.errors import UserError
from sppctl.pruners import PRUNERS

METHODS = ["magnitude", "wanda", "sparsegpt", "dsnot"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen3_moe"])
def test_sparsegpt_repairs_under_a_given_mask(family: str, prune: Prune, make_checkpoint: Callable[..., Path]) -> None:
    base = make_checkpoint(family)
    wanda = prune("prune.targets=all-linear", base=base)
    options = "prune.targets=all-linear", "prune.method=sparsegpt", f"prune.mask_from={wanda.directory}"
    repaired = prune(*options, base=base)
    errors = []
    for old, new in zip(wanda.record.layers, repaired.record.layers, strict=True):
        name = stored(new.name, family)
        assert torch.equal(repaired.weights[name] != 0, wanda.weights[name] != 0), name
        if in_first_block(new.name) and new.fallback is None:  # the first block's inputs are the same for both
            errors.append((new.relative_output_error or 0, old.relative_output_error or 0))
    assert 0 < sum(new for new, _ in errors) < 0.95 * sum(old for _, old in errors)


def test_dsnot_starts_from_a_given_mask(prune: Prune, deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Tensor] = []
    dsnot = PRUNERS["dsnot"]

    def spy(weights: list[Tensor], statistics: Any, patterns: Any, masks: list[Tensor]) -> Any:
        begun.extend(masks)
        return dsnot.prune(weights, statistics, patterns, masks)

    start = prune("prune.method=magnitude", base=deep)
    monkeypatch.setitem(PRUNERS, "dsnot", replace(dsnot, prune=spy))
    _, after, record = prune("prune.method=dsnot", f"prune.mask_from={start.directory}", base=deep)
    names = [f"{layer.name}.weight" for layer in record.layers]
    assert all(torch.equal(mask, start.weights[name] != 0) for mask, name in zip(begun, names, strict=True))
    assert all((kept_per_group(after[name]) == 2).all() for name in names)
    assert 0.5 < agreement(start.weights, after, names) < 1


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_other_methods_take_a_given_mask_as_it_is(method: str, prune: Prune, llama: Path) -> None:
    start = prune("prune.method=sparsegpt")
    _, after, record = prune(f"prune.method={method}", f"prune.mask_from={start.directory}")
    before = weights_of(llama)
    for name in (f"{layer.name}.weight" for layer in record.layers):
        assert torch.equal(after[name], before[name] * (start.weights[name] != 0))


@pytest.mark.parametrize(
    ("mask", "pattern", "message"),
    [
        ("0.5", "2:4", r"layers\.0\..*the mask of prune\.mask_from is not 2:4"),
        ("0.1", "0.5", r"is not 0\.5: its share of zeros is 0\.09375; set prune\.pattern"),  # 3 of 32
    ],
)
def test_a_mask_of_another_pattern_is_refused(mask: str, pattern: str, message: str, prune: Prune) -> None:
    directory = prune(f"prune.pattern={mask}").directory
    with pytest.raises(UserError, match=message):
        prune(f"prune.pattern={pattern}", f"prune.mask_from={directory}")


@pytest.mark.parametrize("method", METHODS)
def test_masks_of_all_methods_match_their_own_pattern(
    method: str, prune: Prune, capsys: pytest.CaptureFixture[str]
) -> None:
    """However each rounds its counts."""
    pattern = "prune.pattern=0.53"
    mask = prune(f"prune.method={method}", pattern, "prune.block_size=16")
    for other in METHODS:
        _, after, record = prune(f"prune.method={other}", pattern, f"prune.mask_from={mask.directory}")
        for name in (f"{layer.name}.weight" for layer in record.layers):
            assert (after[name] == 0).sum() == (mask.weights[name] == 0).sum()
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert not [line for line in warnings if "no effect" not in line]


def test_a_mask_with_more_zeros_than_the_pattern_is_reported(prune: Prune, capsys: pytest.CaptureFixture[str]) -> None:
    mask = prune("prune.pattern=1:4", "prune.skip=['*.0.*']").directory
    record = prune("prune.skip=['*.0.*']", f"prune.mask_from={mask}", "prune.method=sparsegpt").record
    assert record.sparsity == 0.75
    warning = "warning: 7 masks of prune.mask_from have more zeros than prune.pattern: "
    assert f"{warning}model.layers.1.self_attn.q_proj has 0.75, 2:4 asks for 0.5, ..." in capsys.readouterr().err


def test_another_content_of_the_mask_is_another_run(config_file: Path, prune: Prune, command: Command) -> None:
    mask, weights, _ = prune("prune.method=magnitude")
    arguments = ("prune", str(config_file), f"prune.mask_from={mask}")
    assert command(*arguments).code == 0
    assert "up to date" in command(*arguments).err
    name = "model.layers.0.mlp.up_proj.weight"
    write_weights(weights | {name: weights[name].flip(0)}, mask)
    assert "--force redoes it" in command(*arguments).err
