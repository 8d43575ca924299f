"""The walk over blocks: every family and method, both orders, micro-batches, where hidden states wait."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    agreement,
    as_matrix,
    assert_repaired_alike,
    kept_per_group,
    random_windows,
    shards,
    stored,
    weights_of,
    write_weights,
)
from conftest import FAMILIES, Prune
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sppctl.errors import StageError
from sppctl.files import names
from sppctl.prune.activations import Activations
from sppctl.pruners import PRUNERS, prune_linear

Make = Callable[..., Path]
NEED_INPUTS = ["wanda", "sparsegpt", "dsnot"]


# --- every family and method ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "order", "family"),
    [
        *((method, "block", family) for method in ("magnitude", *NEED_INPUTS) for family in FAMILIES),
        *(("wanda", "module", family) for family in ("mixtral", "qwen3_moe", "gpt2")),
    ],
)
def test_every_family_and_method(method: str, order: str, family: str, prune: Prune, make_checkpoint: Make) -> None:
    base = make_checkpoint(family)
    options = f"prune.method={method}", f"prune.order={order}", "prune.targets=all-linear", "prune.batch_size=3"
    directory, after, record = prune(*options, base=base)
    before = weights_of(base)
    layers = {stored(layer.name, family): layer for layer in record.layers}
    assert len(layers) == len(record.layers) == record.matrices
    # every stored matrix of a block but routers
    in_blocks = {name for name, weight in before.items() if weight.dim() == 2 and (".layers." in name or ".h." in name)}
    assert layers.keys() == {name for name in in_blocks if not name.endswith(".gate.weight")}
    assert record.sparsity == 0.5
    for name, weight in before.items():
        if name in layers:
            matrix = as_matrix(after[name], family)
            assert layers[name].shape == tuple(matrix.shape)
            assert (kept_per_group(matrix) == 2).all(), name
        else:
            assert torch.equal(after[name], weight), name
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert torch.isfinite(model(torch.arange(10).view(1, -1)).logits).all()


@pytest.mark.parametrize("method", NEED_INPUTS)
def test_the_bytes_of_kept_weights_do_not_change_unless_repaired(method: str, prune: Prune, llama: Path) -> None:
    _, after, record = prune(f"prune.method={method}")
    before, same = weights_of(llama), []
    for name in (f"{layer.name}.weight" for layer in record.layers):
        kept = after[name] != 0
        same.append(torch.equal(after[name][kept], before[name][kept]))
    assert all(same) if method != "sparsegpt" else not any(same)


@pytest.mark.parametrize("order", ["block", "module"])
@pytest.mark.parametrize("method", NEED_INPUTS)
def test_inputs_that_are_not_finite_end_the_run(
    method: str, order: str, prune: Prune, llama: Path, tmp_path: Path
) -> None:
    """One token of the last window, which the check of the first does not see, overflows in a block."""
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    weights = weights_of(base)
    weights["model.embed_tokens.weight"][:, 0] = 0.0
    weights["model.embed_tokens.weight"][255] = torch.eye(32)[0]
    weights["model.layers.0.self_attn.v_proj.weight"][:, 0] = 3e38
    write_weights(weights, base)
    windows = random_windows(4, 24)
    windows[3, 5] = 255
    with pytest.raises(StageError, match=r"layers\.0\.self_attn\.o_proj: its calibration inputs are not finite: "):
        prune(f"prune.method={method}", f"prune.order={order}", "prune.batch_size=2", base=base, windows=windows)


# --- order ------------------------------------------------------------------------------------------------------------

GROUPS = {
    "llama": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "opt": [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]],  # k is made before q, but run after it
}


@pytest.mark.parametrize("family", GROUPS)
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@torch.no_grad()
def test_module_order_is_one_forward(method: str, family: str, prune: Prune, make_checkpoint: Make) -> None:
    """Against a literal pass: each layer of a plain model is pruned by what reaches it, groups by their first input."""
    base, windows = make_checkpoint(family), random_windows(4, 24)
    options = f"prune.method={method}", "prune.order=module", "prune.targets=all-linear"
    _, after, record = prune(*options, base=base, windows=windows)
    assert record.order == "module"

    model = AutoModelForCausalLM.from_pretrained(base).eval()
    done: set[str] = set()

    def prune_group(name: str, args: Any) -> None:
        path, _, leaf = name.rpartition(".")
        (group,) = (group for group in GROUPS[family] if leaf in group)
        for member in (f"{path}.{other}" for other in group):
            if member not in done:
                linear = model.get_submodule(member)
                inputs = args[0].reshape(-1, args[0].shape[-1])
                linear.weight.data = prune_linear(linear.weight.data, inputs, method=method, pattern="2:4")
                done.add(member)

    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in name]
    for name in linears:
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: prune_group(name, args))
    model(windows)
    assert done == set(linears)
    expected = {f"{name}.weight": model.get_submodule(name).weight for name in linears}
    for name, weight in expected.items():
        same = agreement(expected, after, [name])
        assert same > (0.995 if method == "wanda" else 0.99), name
        kept = after[name] != 0
        assert method != "wanda" or same < 1 or torch.equal(weight[kept], after[name][kept])
    assert_repaired_alike(after, expected, expected)


@pytest.mark.parametrize("options", [["prune.method=wanda"], ["prune.pattern=0.5", "prune.allocation=owl"]], ids=str)
@pytest.mark.parametrize("order", ["block", "module"])
def test_no_block_is_run_for_nothing(
    order: str, options: list[str], prune: Prune, deep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks 0 and 2 of 4 are pruned: block 1 has only to hand on, block 3 and the end of block 2 matter to nobody."""
    runs = [0, 0, 0, 0]
    output = Activations.output

    def count(self: Activations, index: int, rows: slice) -> Tensor:
        runs[index] += rows.stop - rows.start
        return output(self, index, rows)

    monkeypatch.setattr(Activations, "output", count)
    prune(f"prune.order={order}", "prune.skip=['*.1.*', '*.3.*']", "prune.batch_size=1", *options, base=deep)
    # four windows; in module order, one more shows which layers share their inputs
    expected = [8, 4, 4, 0] if order == "block" else [5, 4, 4, 0]
    if "prune.allocation=owl" in options:  # a pass of its own
        expected = [number + 4 for number in expected[:3]] + [0]
    assert runs == expected


def test_the_walk_solves_q_k_and_v_together(prune: Prune, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers: list[int] = []
    sparsegpt = PRUNERS["sparsegpt"]

    def spy(weights: list[Tensor], *args: Any, **options: Any) -> Any:
        numbers.append(len(weights))
        return sparsegpt.prune(weights, *args, **options)

    monkeypatch.setitem(PRUNERS, "sparsegpt", replace(sparsegpt, prune=spy))
    prune("prune.method=sparsegpt")
    assert numbers == 2 * [len(group) for group in GROUPS["llama"]]


# --- memory and micro-batches -----------------------------------------------------------------------------------------


def test_hidden_states_may_wait_on_the_disk(prune: Prune, deep: Path) -> None:
    ram, disk = (prune(f"prune.memory={memory}", "prune.batch_size=3", base=deep) for memory in ("ram", "disk"))
    assert (ram.record.activations, disk.record.activations) == ("ram", "disk")
    assert shards(ram.directory) == shards(disk.directory)
    left = {path.name for path in disk.directory.iterdir()} - set(names.WORKING)
    assert left == {path.name for path in deep.iterdir()}


@pytest.mark.parametrize("method", NEED_INPUTS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_micro_batches_change_nothing(family: str, method: str, prune: Prune, make_checkpoint: Make) -> None:
    options = f"prune.method={method}", "prune.targets=all-linear"
    auto, *others = (prune(*options, f"prune.batch_size={n}", base=make_checkpoint(family)) for n in ("auto", 1, 3))
    tensors = [stored(layer.name, family) for layer in auto.record.layers]
    expected, *found = ({name: as_matrix(one.weights[name], family) for name in tensors} for one in (auto, *others))
    for matrices in found:
        assert agreement(expected, matrices, tensors) > 0.999
        assert_repaired_alike(matrices, expected, tensors)
