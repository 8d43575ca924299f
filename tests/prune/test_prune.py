"""Pruning a checkpoint: statistics of the right inputs, what is recorded and written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import assert_repaired_alike, in_first_block, random_windows, shards, weights_of, write_weights
from conftest import Prune
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sppctl.config.settings import Config
from sppctl.errors import StageError
from sppctl.prune import calibrate
from sppctl.prune.layers import ERROR_ROWS
from sppctl.pruners import prune_linear
from sppctl.records import to_json
from sppctl.run import attempts


def test_old_masks_may_be_infinite(prune: Prune, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """-1e9 is -inf in the float16 files of GPT-NeoX; any other tensor must be finite."""
    base = shutil.copytree(make_checkpoint("gpt_neox", torch.float16), tmp_path / "old")
    options = ("prune.method=magnitude", "prune.targets=all-linear")
    infinite = torch.full((2,), float("-inf"), dtype=torch.float16)
    masks = {f"gpt_neox.layers.{index}.attention.masked_bias": infinite[index].clone() for index in range(2)}
    write_weights(weights_of(base) | masks, base)
    after = prune(*options, base=base).weights
    assert all(torch.equal(after[mask], masks[mask]) for mask in masks)
    write_weights(weights_of(base) | {"gpt_neox.final_layer_norm.bias": torch.full((32,), float("-inf"))}, base)
    with pytest.raises(StageError, match=r"final_layer_norm\.bias holds NaN or infinite values"):
        prune(*options, base=base)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_layers_see_the_inputs_of_blocks_pruned_before_them(method: str, prune: Prune, llama: Path) -> None:
    """Against a literal walk: hooks on a plain model, block by block, one window at a time."""
    windows = random_windows(4, 24)
    _, after, _ = prune(f"prune.method={method}", windows=windows)
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    expected: dict[str, Tensor] = {}
    for index, block in enumerate(model.model.layers):
        linears = {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}
        inputs: dict[str, list[Tensor]] = {name: [] for name in linears}
        handles = [
            m.register_forward_pre_hook(lambda _, args, seen=inputs[name]: seen.append(args[0][0]))
            for name, m in linears.items()
        ]
        with torch.no_grad():
            for window in windows:
                model(window.view(1, -1))
        for handle in handles:
            handle.remove()
        for name, linear in linears.items():
            weight = prune_linear(linear.weight.data, torch.cat(inputs[name]), method=method, pattern="2:4")
            linear.weight.data = weight
            stored = f"model.layers.{index}.{name}.weight"
            expected[stored], written = weight, after[stored]
            same = ((written != 0) == (weight != 0)).float().mean().item()
            assert same > 0.995, name  # batching the windows rounds differently, a tie may fall the other way
            assert method != "wanda" or same < 1 or torch.equal(written, weight)
    assert_repaired_alike(after, expected, expected)


def test_magnitude_needs_no_calibration(prune: Prune) -> None:
    record = prune("prune.method=magnitude", "prune.pattern=0.7", "prune.calibration.dataset=/nowhere.txt").record
    assert record.calibration is None
    assert {layer.relative_output_error for layer in record.layers} == {None}
    assert all(layer.sparsity == int(layer.size * 0.7) / layer.size for layer in record.layers)


def test_the_seed_decides_the_windows_and_the_bytes(prune: Prune) -> None:
    options = [[], [], ["run.seed=9"], ["prune.calibration.windows=concatenate"]]
    runs = [prune(*option) for option in options]
    first, again, other, joined = (to_json(run.record.calibration) for run in runs)
    assert first == again  # from the cache
    assert shards(runs[0].directory) == shards(runs[1].directory)
    assert first["windows_hash"] != other["windows_hash"]
    assert shards(runs[0].directory) != shards(runs[2].directory)
    assert joined["windows"] == "concatenate"


def test_calibration_text_of_a_column(configure: Callable[..., Config], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "One.", "story": "1"}\n')
    for column, document in (("story", "1"), ("auto", "One."), ("null", "One.")):
        config = configure(f"prune.calibration.dataset={path}", f"prune.calibration.column={column}")
        assert calibrate.calibration_text(config.prune).documents == [document]


def test_shards_and_side_files_keep_their_names(prune: Prune, make_checkpoint: Callable[..., Path]) -> None:
    base = make_checkpoint("llama", max_shard_size="20KB")
    out = prune(base=base).directory
    attempts.clean(out)
    assert {path.name for path in out.iterdir()} == {path.name for path in base.iterdir()}
    index = json.loads((base / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert json.loads((out / "model.safetensors.index.json").read_text()) == index


def test_another_dtype_is_written_and_recorded(prune: Prune) -> None:
    out, after, _ = prune("model.dtype=bfloat16")
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16


def test_the_recorded_errors_are_those_of_weights_and_of_outputs(prune: Prune, llama: Path) -> None:
    """Of outputs for the first inputs of the layer: the windows have more."""
    windows = random_windows(3, 100)
    _, after, record = prune("prune.batch_size=3", windows=windows)
    model, before = AutoModelForCausalLM.from_pretrained(llama).eval(), weights_of(llama)
    inputs: dict[str, Tensor] = {}
    layers = [layer for layer in record.layers if in_first_block(layer.name)]
    for name in (layer.name for layer in layers):
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: inputs.update({name: args[0].flatten(0, 1)})
        )
    with torch.no_grad():
        model(windows)
    for layer in layers:
        old, new = (weights[f"{layer.name}.weight"] for weights in (before, after))
        assert layer.relative_weight_error == pytest.approx(((old - new).norm() / old.norm()).item(), rel=1e-5)
        rows = inputs[layer.name][:ERROR_ROWS]
        output_error = (rows @ (old - new).t()).norm() / (rows @ old.t()).norm()
        assert layer.relative_output_error == pytest.approx(output_error.item(), rel=1e-4)
    errors = [layer.relative_output_error for layer in record.layers if layer.relative_output_error is not None]
    assert len(errors) == 14
    assert record.mean_relative_output_error == pytest.approx(sum(errors) / 14)


def test_nan_weights_stop_it(prune: Prune, llama: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(llama, tmp_path / "broken")
    weights = weights_of(broken)
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    write_weights(weights, broken)
    for method in ("magnitude", "wanda"):
        with pytest.raises(StageError, match=r"layers\.1\.mlp\.up_proj"):
            prune(f"prune.method={method}", base=broken)
