"""Which matrix gets which pattern: skipped layers, overrides, ratios by block, OWL."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import kept_per_group, weights_of
from conftest import Prune

from sppctl.pruners import allocate
from sppctl.records import LayerRecord


def block_of(layer: LayerRecord) -> int:
    return int(layer.name.split(".")[2])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["prune.skip=['*.0.*', down_proj]"],
            {f"1.self_attn.{k}_proj" for k in "qkvo"} | {"1.mlp.gate_proj", "1.mlp.up_proj"},
        ),
        (
            ["prune.targets=[mlp.down_proj, '*.0.self_attn.q_proj']"],
            {"0.self_attn.q_proj", "0.mlp.down_proj", "1.mlp.down_proj"},
        ),
    ],
)
def test_only_targets_that_are_not_skipped_are_pruned(
    options: list[str], expected: set[str], prune: Prune, llama: Path
) -> None:
    _, after, record = prune(*options)
    assert {layer.name.removeprefix("model.layers.") for layer in record.layers} == expected
    for name, weight in weights_of(llama).items():
        pruned = name.removeprefix("model.layers.").removesuffix(".weight") in expected
        assert torch.equal(after[name], weight) != pruned, name


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ([], "2:4"),
        (["prune.overrides={q_proj: 2:4}"], "2:4"),
        (["prune.overrides={q_proj: 4:8, '*.1.*up_proj': 0.3}"], "2:4, 4:8 in 2 matrices, 0.3 in 1 matrices"),
        (["prune.overrides={'*_proj': 4:8}"], "4:8"),
        (
            ["prune.pattern=0.5", "prune.allocation=owl", "prune.overrides={q_proj: 4:8}"],
            "0.5 by outliers, 4:8 in 2 matrices",
        ),
        (["prune.pattern=0.5", "prune.allocation=[0.4,0.6]"], "0.5 by block"),
    ],
)
def test_the_recorded_pattern_is_the_one_that_is_there(overrides: list[str], text: str, prune: Prune) -> None:
    assert prune("prune.method=magnitude", *overrides).record.pattern == text


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("{down_proj: 0.25}", {"0.mlp.down_proj": "0.25", "1.mlp.down_proj": "0.25"}),
        ("{'*.1.mlp.*': 1:4}", {f"1.mlp.{kind}_proj": "1:4" for kind in ("gate", "up", "down")}),
        (
            "{'*.0.mlp.*': 0.75, mlp.down_proj: 4:8}",
            {"0.mlp.gate_proj": "0.75", "0.mlp.up_proj": "0.75", "0.mlp.down_proj": "4:8", "1.mlp.down_proj": "4:8"},
        ),
        ("{mlp.down_proj: 4:8, '*.0.mlp.down_proj': 0.75}", {"0.mlp.down_proj": "0.75", "1.mlp.down_proj": "4:8"}),
    ],
)
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_the_last_override_wins(method: str, overrides: str, expected: dict[str, str], prune: Prune) -> None:
    _, after, record = prune(f"prune.method={method}", f"prune.overrides={overrides}")
    found = {layer.name.removeprefix("model.layers."): str(layer.pattern) for layer in record.layers}
    assert found == dict.fromkeys(found, "2:4") | expected
    for layer in record.layers:
        pattern, weight = layer.pattern, after[f"{layer.name}.weight"]
        assert layer.sparsity == ((weight == 0).sum() / weight.numel()).item() == pattern.sparsity
        assert pattern.group is None or (kept_per_group(weight, pattern.group) == pattern.keep).all()


def test_a_ratio_for_each_block(prune: Prune, deep: Path) -> None:
    ratios = [0.25, 0.5, 0.5, 0.75]
    options = "prune.pattern=0.5", f"prune.allocation={ratios}", "prune.overrides={q_proj: 0.125}"
    for layer in prune(*options, base=deep).record.layers:
        assert layer.sparsity == (0.125 if layer.name.endswith("q_proj") else ratios[block_of(layer)])


@pytest.mark.parametrize("method", ["wanda", "magnitude", "sparsegpt"])
def test_owl_gives_the_ratios_of_the_outliers(
    method: str, prune: Prune, deep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[list[float], list[float]]] = []
    owl = allocate.owl

    def spy(shares: list[float], *args: Any, **options: Any) -> list[float]:
        made.append((shares, owl(shares, *args, **options)))
        return made[-1][1]

    monkeypatch.setitem(allocate.ALLOCATIONS, "owl", replace(allocate.ALLOCATIONS["owl"], ratios=spy))
    options = f"prune.method={method}", "prune.pattern=0.6", "prune.allocation=owl", "prune.owl_lambda=0.1"
    record = prune(*options, base=deep).record
    ((shares, ratios),) = made
    assert len(set(ratios)) == 4
    assert sorted(range(4), key=shares.__getitem__) == sorted(range(4), key=ratios.__getitem__, reverse=True)
    assert max(ratios) - min(ratios) == pytest.approx(0.2)
    assert sum(ratios) / 4 == pytest.approx(0.6, abs=1e-6)  # blocks of one size
    for layer in record.layers:
        # scores are compared within a row or a matrix
        compared = layer.shape[1] if method == "wanda" else layer.size
        assert layer.sparsity == math.floor(compared * ratios[block_of(layer)]) / compared


def test_owl_leaves_overrides_and_blocks_without_targets_alone(prune: Prune, deep: Path) -> None:
    options = "prune.pattern=0.5", "prune.allocation=owl", "prune.skip=['*.0.*']", "prune.overrides={'*.1.*': 0.25}"
    by_block: dict[int, list[LayerRecord]] = {}
    for layer in prune(*options, base=deep).record.layers:
        by_block.setdefault(block_of(layer), []).append(layer)
    assert by_block.keys() == {1, 2, 3}
    assert {layer.sparsity for layer in by_block[1]} == {0.25}
    assert sorted(by_block[block][0].pattern.sparsity for block in (2, 3)) == pytest.approx([0.42, 0.58])
