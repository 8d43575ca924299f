"""The walk over blocks: every family and method, patterns by layer, orders, experts, resumption, several processes."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, GROUPED, byte_tokenizer
from processes import Ended, Process, environment, sppctl_in_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GptOssConfig

from sppctl import cli, pruners
from sppctl.config.load import load_config
from sppctl.config.settings import Config
from sppctl.errors import StageError, UserError
from sppctl.files import names, sealed
from sppctl.files.safe_files import OwnFiles, TensorFiles
from sppctl.model import checkpoint
from sppctl.model.block_call import BlockCall
from sppctl.model.blocks import Skeleton
from sppctl.pattern import Pattern
from sppctl.prune import block_work, calibrate, walk
from sppctl.prune import stage as prune
from sppctl.prune.activations import Activations
from sppctl.pruners import Hessian, allocate, prune_linear
from sppctl.pruners.sparsegpt import prune_sparsegpt

MIXTRAL_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


@pytest.fixture
def configure(config_file: Path) -> Callable[..., Config]:
    def configured(*overrides: str) -> Config:
        return load_config(str(config_file), overrides)

    return configured


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama of four blocks in several shards, with other outliers in each."""
    directory = tmp_path_factory.mktemp("deep") / "deep"
    config = FAMILIES["llama"]()
    config.num_hidden_layers = 4
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for index, block in enumerate(model.model.layers):
        for linear in (m for m in block.modules() if isinstance(m, nn.Linear)):
            linear.weight.data.view(-1)[:: 200 // (index + 1)] *= 40
    model.save_pretrained(directory, max_shard_size="40KB")
    byte_tokenizer().save_pretrained(directory)
    return directory


def weights_of(directory: Path) -> dict[str, Tensor]:
    return {
        name: tensor for path in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(path).items()
    }


def shards(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.safetensors*"))}


def pruned(config: Config, base: Path, out: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    out.mkdir()
    metrics = prune.execute(config, base, out, dtype="float32")
    return weights_of(out), metrics


def stored(layer: str, family: str) -> str:
    """The tensor that holds a layer's matrix in a checkpoint written by transformers."""
    if family == "mixtral" and ".experts." in layer:
        path, _, leaf = layer.replace(".mlp.", ".block_sparse_moe.").rpartition(".")
        return f"{path}.{MIXTRAL_NAMES[leaf]}.weight"
    return f"{layer}.weight"


def seen(weight: Tensor, family: str) -> Tensor:
    """As (out_features, in_features)."""
    return weight.t() if family == "gpt2" else weight


def in_first_block(name: str) -> bool:
    return ".layers.0." in name or ".h.0." in name


def kept_per_group(weight: Tensor) -> Tensor:
    return (weight != 0).reshape(len(weight), -1, 4).sum(-1)


def agreement(first: dict[str, Tensor], second: dict[str, Tensor], names: list[str]) -> float:
    """Share of weights that both keep or both prune."""
    same = sum(int(((first[name] != 0) == (second[name] != 0)).sum()) for name in names)
    return same / sum(first[name].numel() for name in names)


def fix_windows(monkeypatch: pytest.MonkeyPatch, windows: Tensor) -> Tensor:
    """Calibrates on these windows, whatever is configured."""
    monkeypatch.setattr(calibrate, "windows_of", lambda *_: (windows, {}))
    return windows


def random_windows(samples: int, length: int) -> Tensor:
    return torch.randint(0, 250, (samples, length), generator=torch.Generator().manual_seed(0))


# --- every family and method ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "dsnot"])
def test_every_family_and_method(
    family: str, method: str, configure: Callable[..., Config], make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_checkpoint(family)
    config = configure(f"prune.method={method}", "prune.targets=all-linear", "prune.batch_size=3")
    after, metrics = pruned(config, base, tmp_path / "out")
    before = weights_of(base)
    layers = {stored(layer["name"], family): layer for layer in metrics["layers"]}
    assert len(layers) == len(metrics["layers"]) == metrics["matrices"]
    assert layers.keys() <= before.keys()
    assert metrics["sparsity"] == 0.5
    for name, weight in before.items():
        if name in layers:
            matrix = seen(after[name], family)
            assert layers[name]["shape"] == tuple(matrix.shape)
            assert (kept_per_group(matrix) == 2).all(), name
        else:
            assert torch.equal(after[name], weight), name
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.isfinite(model(torch.arange(10).view(1, -1)).logits).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_means_every_linear_of_the_blocks(family: str, make_checkpoint: Callable[..., Path]) -> None:
    """Against the names of the checkpoint: every stored matrix of a block but routers, whatever the family."""
    base = make_checkpoint(family)
    skeleton = Skeleton(checkpoint.load_config(base))
    expected = {
        name for name, tensor in weights_of(base).items() if tensor.dim() == 2 and (".layers." in name or ".h." in name)
    }
    expected -= {name for name in expected if name.endswith(("mlp.gate.weight", "block_sparse_moe.gate.weight"))}
    assert {stored(name, family) for name in skeleton.targets("all-linear")} == expected


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "dsnot"])
def test_the_bytes_of_kept_weights_do_not_change_unless_repaired(
    method: str, configure: Callable[..., Config], llama: Path, tmp_path: Path
) -> None:
    after, metrics = pruned(configure(f"prune.method={method}"), llama, tmp_path / "out")
    before = weights_of(llama)
    same = []
    for layer in metrics["layers"]:
        name = f"{layer['name']}.weight"
        kept = after[name] != 0
        same.append(torch.equal(after[name][kept], before[name][kept]))
    assert all(same) if method != "sparsegpt" else not any(same)


@pytest.mark.parametrize("order", ["block", "module"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "dsnot"])
def test_inputs_that_are_not_finite_end_the_run(
    method: str,
    order: str,
    configure: Callable[..., Config],
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One token of the last window, which the check of the first does not see, overflows in a block."""
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    weights = weights_of(base)
    weights["model.embed_tokens.weight"][:, 0] = 0.0
    weights["model.embed_tokens.weight"][255] = torch.eye(32)[0]
    weights["model.layers.0.self_attn.v_proj.weight"][:, 0] = 3e38
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    fix_windows(monkeypatch, random_windows(4, 24))[3, 5] = 255
    config = configure(f"prune.method={method}", f"prune.order={order}", "prune.batch_size=2")
    with pytest.raises(StageError, match=r"layers\.0\.self_attn\.o_proj: its calibration inputs are not finite: "):
        pruned(config, base, tmp_path / "out")


# --- which pattern where ----------------------------------------------------------------------------------------------


def patterns_of(metrics: dict[str, Any]) -> dict[str, str]:
    return {layer["name"].removeprefix("model.layers."): layer["pattern"] for layer in metrics["layers"]}


def test_skipped_layers_stay_dense(configure: Callable[..., Config], llama: Path, tmp_path: Path) -> None:
    after, metrics = pruned(configure("prune.skip=['*.0.*', down_proj]"), llama, tmp_path / "out")
    names = {layer["name"] for layer in metrics["layers"]}
    assert names == {f"model.layers.1.self_attn.{kind}_proj" for kind in "qkvo"} | {
        f"model.layers.1.mlp.{kind}_proj" for kind in ("gate", "up")
    }
    for name, weight in weights_of(llama).items():
        assert torch.equal(after[name], weight) == (name.removesuffix(".weight") not in names), name


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
def test_the_last_override_wins(
    method: str,
    overrides: str,
    expected: dict[str, str],
    configure: Callable[..., Config],
    llama: Path,
    tmp_path: Path,
) -> None:
    config = configure(f"prune.method={method}", f"prune.overrides={overrides}")
    after, metrics = pruned(config, llama, tmp_path / "out")
    found = patterns_of(metrics)
    assert found == dict.fromkeys(found, "2:4") | expected
    for layer in metrics["layers"]:
        pattern, weight = Pattern.parse(layer["pattern"]), after[f"{layer['name']}.weight"]
        assert layer["sparsity"] == ((weight == 0).sum() / weight.numel()).item() == pattern.sparsity
        if pattern.keep is not None and pattern.group is not None:
            assert ((weight != 0).view(len(weight), -1, pattern.group).sum(-1) == pattern.keep).all()


def test_a_ratio_for_each_block(configure: Callable[..., Config], deep: Path, tmp_path: Path) -> None:
    config = configure(
        "prune.pattern=0.5", "prune.allocation=[0.25, 0.5, 0.5, 0.75]", "prune.overrides={q_proj: 0.125}"
    )
    _, metrics = pruned(config, deep, tmp_path / "out")
    for layer in metrics["layers"]:
        block = int(layer["name"].split(".")[2])
        assert layer["sparsity"] == (0.125 if layer["name"].endswith("q_proj") else [0.25, 0.5, 0.5, 0.75][block])


@pytest.mark.parametrize("method", ["wanda", "magnitude", "sparsegpt"])
def test_owl_shares_out_the_wanted_ratio(
    method: str, configure: Callable[..., Config], deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[list[float], list[float]]] = []
    owl = allocate.owl

    def spy(shares: list[float], *args: Any) -> list[float]:
        made.append((shares, owl(shares, *args)))
        return made[-1][1]

    monkeypatch.setattr(allocate, "owl", spy)
    config = configure(f"prune.method={method}", "prune.pattern=0.6", "prune.allocation=owl", "prune.owl_lambda=0.1")
    _, metrics = pruned(config, deep, tmp_path / "out")
    ((shares, ratios),) = made
    assert len(set(ratios)) == 4
    assert sorted(range(4), key=shares.__getitem__) == sorted(range(4), key=ratios.__getitem__, reverse=True)
    assert max(ratios) - min(ratios) == pytest.approx(0.2)
    assert sum(ratios) / 4 == pytest.approx(0.6, abs=1e-6)  # blocks of one size
    for layer in metrics["layers"]:
        rows, columns = layer["shape"]
        compared = columns if method == "wanda" else rows * columns  # scores are compared within a row or a matrix
        wanted = ratios[int(layer["name"].split(".")[2])]
        assert layer["sparsity"] == math.floor(compared * wanted) / compared


def test_owl_leaves_overrides_and_blocks_without_targets_alone(
    configure: Callable[..., Config], deep: Path, tmp_path: Path
) -> None:
    config = configure(
        "prune.pattern=0.5", "prune.allocation=owl", "prune.skip=['*.0.*']", "prune.overrides={'*.1.*': 0.25}"
    )
    _, metrics = pruned(config, deep, tmp_path / "out")
    by_block: dict[int, list[dict[str, Any]]] = {}
    for layer in metrics["layers"]:
        by_block.setdefault(int(layer["name"].split(".")[2]), []).append(layer)
    assert by_block.keys() == {1, 2, 3}
    assert {layer["sparsity"] for layer in by_block[1]} == {0.25}
    ratios = [float(by_block[block][0]["pattern"]) for block in (2, 3)]
    assert sorted(ratios) == pytest.approx([0.42, 0.58])


def test_shares_weigh_by_size() -> None:
    ratios = allocate.owl([0.0, 0.1, 0.4], [100, 300, 600], 0.5, 0.1)
    assert sum(ratio * size for ratio, size in zip(ratios, (100, 300, 600), strict=True)) / 1000 == pytest.approx(0.5)
    assert ratios[0] - ratios[2] == pytest.approx(0.2)
    assert ratios[0] - ratios[1] == pytest.approx(0.05)  # in proportion to the shares
    assert allocate.owl([0.1, 0.1], [1, 5], 0.3, 0.2) == [0.3, 0.3]
    with pytest.raises(ValueError, match="outside"):
        allocate.owl([0.0, 1.0], [1, 1], 0.9, 0.2)


def test_outliers_by_hand() -> None:
    scores = torch.ones(10, 10)
    scores[0, :3] = 100.0  # mean 3.97
    assert allocate.outlier_share([scores]) == 0.03
    assert allocate.outlier_share([scores, torch.ones(20, 10)]) == 0.01


# --- order ------------------------------------------------------------------------------------------------------------

GROUPS = {
    "llama": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "opt": [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]],  # k is made before q, but run after it
}


@pytest.mark.parametrize("family", GROUPS)
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@torch.no_grad()
def test_module_order_is_one_forward(
    method: str,
    family: str,
    configure: Callable[..., Config],
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against a literal pass: each layer of a plain model is pruned by what reaches it, groups by their first input."""
    base = make_checkpoint(family)
    windows = fix_windows(monkeypatch, random_windows(4, 24))
    config = configure(f"prune.method={method}", "prune.order=module", "prune.targets=all-linear")
    after, metrics = pruned(config, base, tmp_path / "out")
    assert metrics["order"] == "module"

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

    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in name]
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: prune_group(name, args))
    model(windows)
    assert done == set(names)
    expected = {f"{name}.weight": model.get_submodule(name).weight for name in names}
    for name, weight in expected.items():
        assert agreement(expected, after, [name]) > (0.995 if method == "wanda" else 0.99), name
        if method == "wanda":
            assert (
                torch.equal(weight[after[name] != 0], after[name][after[name] != 0])
                or agreement(expected, after, [name]) < 1
            )


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt2"])
def test_module_order_of_other_forms(
    family: str, configure: Callable[..., Config], make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_checkpoint(family)
    config = configure("prune.order=module", "prune.targets=all-linear")
    after, metrics = pruned(config, base, tmp_path / "out")
    assert metrics["matrices"] == len(Skeleton(checkpoint.load_config(base)).targets("all-linear"))
    for layer in metrics["layers"]:
        assert (kept_per_group(seen(after[stored(layer["name"], family)], family)) == 2).all(), layer["name"]


@pytest.mark.parametrize("options", [["prune.method=wanda"], ["prune.pattern=0.5", "prune.allocation=owl"]], ids=str)
@pytest.mark.parametrize("order", ["block", "module"])
def test_no_block_is_run_for_nothing(
    order: str,
    options: list[str],
    configure: Callable[..., Config],
    deep: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks 0 and 2 of 4 are pruned: block 1 has only to hand on, block 3 and the end of block 2 matter to nobody."""
    runs = [0, 0, 0, 0]
    call = Activations.call

    def count(self: Activations, index: int, rows: slice) -> BlockCall:
        runs[index] += rows.stop - rows.start
        return call(self, index, rows)

    monkeypatch.setattr(Activations, "call", count)
    config = configure(f"prune.order={order}", "prune.skip=['*.1.*', '*.3.*']", "prune.batch_size=1", *options)
    pruned(config, deep, tmp_path / "out")
    # four windows; in module order, one more shows which layers share their inputs
    expected = [8, 4, 4, 0] if order == "block" else [5, 4, 4, 0]
    if "prune.allocation=owl" in options:  # a pass of its own
        expected = [number + 4 for number in expected[:3]] + [0]
    assert runs == expected


# --- mixtures of experts ----------------------------------------------------------------------------------------------


@torch.no_grad()
def tokens_of_experts(base: Path, windows: Tensor) -> list[Tensor]:
    """The hidden states that the first block of a plain model sends to each expert."""
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    experts = model.model.layers[0].mlp.experts
    calls: list[tuple[Tensor, Tensor]] = []
    experts.register_forward_pre_hook(lambda _, args: calls.append((args[0].clone(), args[1].clone())))
    for window in windows:
        model(window.view(1, -1))
    received: list[list[Tensor]] = [[] for _ in range(len(experts.gate_up_proj))]
    for hidden, chosen in calls:
        for token, indices in zip(hidden.view(-1, hidden.shape[-1]), chosen.view(-1, chosen.shape[-1]), strict=True):
            for index in indices.tolist():
                received[index].append(token)
    return [torch.stack(tokens) if tokens else torch.empty(0, 32) for tokens in received]


@torch.no_grad()
def test_an_experts_statistics_are_those_of_its_tokens(
    configure: Callable[..., Config],
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = make_checkpoint("qwen3_moe")
    windows = fix_windows(monkeypatch, random_windows(4, 24))
    found: list[dict[str, tuple[int, Tensor]]] = []
    prune_all = block_work.BlockWork._prune_all

    def spy(self: Any) -> Any:
        found.append({n: (i.statistics.num_tokens, i.statistics.squares.clone()) for n, i in self.inputs.items()})
        return prune_all(self)

    monkeypatch.setattr(block_work.BlockWork, "_prune_all", spy)
    pruned(configure("prune.targets=all-linear", "prune.batch_size=3"), base, tmp_path / "out")

    before = weights_of(base)
    for expert, tokens in enumerate(tokens_of_experts(base, windows)):
        name = f"model.layers.0.mlp.experts.{expert}"
        gate, up = (before[f"{name}.{part}.weight"] for part in ("gate_proj", "up_proj"))
        inner = torch.stack([nn.functional.silu(gate @ token) * (up @ token) for token in tokens])
        for part, inputs in (("gate_proj", tokens), ("up_proj", tokens), ("down_proj", inner)):
            num_tokens, squares = found[0][f"{name}.{part}"]
            assert num_tokens == len(tokens)
            torch.testing.assert_close(squares, inputs.square().sum(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("order", ["block", "module"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "dsnot"])
def test_an_expert_that_saw_too_few_tokens(
    method: str,
    order: str,
    configure: Callable[..., Config],
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = make_checkpoint("qwen3_moe")
    windows = fix_windows(monkeypatch, random_windows(2, 32))
    counts = [len(tokens) for tokens in tokens_of_experts(base, windows)]
    limit = max(counts)  # all but the busiest expert saw too few
    # on the way, pruned attention would send tokens elsewhere than the dense one that was counted
    layers = "mlp." if order == "module" else ""
    monkeypatch.setattr(block_work, "MIN_EXPERT_TOKENS", limit)
    config = configure(f"prune.method={method}", f"prune.order={order}", f"prune.targets=['*layers.0.{layers}*']")
    after, metrics = pruned(config, base, tmp_path / "out")

    before = weights_of(base)
    expected = {}
    for expert, count in enumerate(counts):
        for part in ("gate_proj", "up_proj", "down_proj"):
            words = "magnitude" if part == "down_proj" else "inputs of all experts"
            name = f"model.layers.0.mlp.experts.{expert}.{part}"
            expected[name] = f"{words}: saw {count} tokens" if count < limit else None
            assert (kept_per_group(after[f"{name}.weight"]) == 2).all()
            if count < limit and part == "down_proj":
                weight = prune_linear(before[f"{name}.weight"], method="magnitude", pattern="2:4")
                assert torch.equal(after[f"{name}.weight"], weight)
    found = {layer["name"]: layer["fallback"] for layer in metrics["layers"]}
    assert {name: words for name, words in found.items() if ".experts." in name} == expected
    assert not any(words for name, words in found.items() if ".experts." not in name)
    # a fall-back has an error like all others, where there is an input to measure it on
    errors = {layer["name"]: layer["relative_output_error"] for layer in metrics["layers"]}
    silent = [f"experts.{expert}.down_proj" for expert, count in enumerate(counts) if count == 0]
    assert [name for name, error in errors.items() if error is None] == [f"model.layers.0.mlp.{n}" for n in silent]
    told = [words for words in expected.values() if words]
    assert metrics["fallbacks"] == len(told) > 0
    warning = f"warning: {len(told)} matrices of experts that saw too few tokens had a fall-back: "
    assert warning in capsys.readouterr().err


def test_a_starved_experts_gate_is_pruned_by_what_all_experts_saw(
    configure: Callable[..., Config],
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = make_checkpoint("qwen3_moe")
    windows = fix_windows(monkeypatch, random_windows(2, 32))
    monkeypatch.setattr(block_work, "MIN_EXPERT_TOKENS", 1000)
    after, _ = pruned(configure("prune.targets=[experts.0.gate_proj, experts.0.up_proj]"), base, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    inputs: list[Tensor] = []
    model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    model(windows)
    before = weights_of(base)
    for part in ("gate_proj", "up_proj"):
        name = f"model.layers.0.mlp.experts.0.{part}.weight"
        expected = {name: prune_linear(before[name], inputs[0], method="wanda", pattern="2:4")}
        assert agreement(expected, after, [name]) > 0.995


def test_a_method_without_inputs_needs_no_fall_back(
    configure: Callable[..., Config],
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(block_work, "MIN_EXPERT_TOKENS", 1000)
    config = configure("prune.method=magnitude", "prune.targets=all-linear", "prune.reconstruct_epochs=1")
    _, metrics = pruned(config, make_checkpoint("qwen3_moe"), tmp_path / "out")
    assert metrics["fallbacks"] == 0


def test_experts_that_stay_dense_are_told(
    configure: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(GptOssConfig(**GROUPED, num_local_experts=4)).save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    pruned(configure("prune.method=magnitude", "prune.targets=all-linear"), base, tmp_path / "out")
    warning = "stay dense: model.layers.0.mlp.experts.gate_up_proj, ... (83% of the blocks' matrices)"
    assert warning in capsys.readouterr().err


# --- interruption -----------------------------------------------------------------------------------------------------

# each ends the process as kill -9 does, at the named point
DEATHS = {
    "copy": """
def half(source, target):
    target.write_bytes(source.read_bytes()[:1000])
    die()
checkpoint.shutil.copyfile = half
""",
    "first write": """
def half(self, name, tensor):
    write(self, name, tensor / 3)
    die()
write, safe_files.OwnFile.write = safe_files.OwnFile.write, half
""",
    "write of block 2": """
def half(self, name, tensor):
    write(self, name, tensor if ".2." not in name else tensor / 3)
    if ".2.mlp" in name:
        die()
write, safe_files.OwnFile.write = safe_files.OwnFile.write, half
""",
    "block 0 done": """
def then_die(self, entry):
    append(self, entry)
    die()
append, walk.Journal.append = walk.Journal.append, then_die
""",
    "block 2 done": """
def then_die(self, entry):
    append(self, entry)
    if len(self.blocks) == 3:
        die()
append, walk.Journal.append = walk.Journal.append, then_die
""",
    "all blocks done": """
def then_die(self, entry):
    append(self, entry)
    if len(self.blocks) == 4:
        die()
append, walk.Journal.append = walk.Journal.append, then_die
""",
    "before publication": """
def then_die(*_):
    die()
prune._summary = then_die
""",
}
# the others: none
DONE = {"write of block 2": 2, "block 0 done": 1, "block 2 done": 3, "all blocks done": 4, "before publication": 4}
START = """
import os, signal, sys
from sppctl import cli
from sppctl import pruners as pruning
from sppctl.model import checkpoint
from sppctl.files import safe_files
from sppctl.prune import stage as prune
from sppctl.prune import walk
def die():
    os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(death: str, arguments: list[str]) -> None:
    """Runs ``sppctl prune`` in a process that dies on its way."""
    done = Process(["prune", *arguments], START + DEATHS[death]).wait()
    assert done.returncode == -9, done.stderr


@pytest.fixture
def run_prune(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """Runs ``sppctl prune`` in this process; gives what it said."""

    def call(arguments: list[str]) -> str:
        monkeypatch.setattr(sys, "argv", ["sppctl", "prune", *arguments])
        capsys.readouterr()
        try:
            cli.main()
        except SystemExit as stop:
            if stop.code:
                pytest.fail(capsys.readouterr().err)
        return capsys.readouterr().err

    return call


@pytest.mark.slow
@pytest.mark.parametrize(
    ("death", "options"),
    [(death, ["prune.method=sparsegpt"]) for death in DEATHS]
    + [
        ("write of block 2", ["prune.pattern=0.5", "prune.allocation=owl"]),
        ("block 0 done", ["prune.method=dsnot"]),
        ("block 2 done", ["prune.method=sparsegpt", "prune.order=module"]),
        ("block 2 done", ["prune.memory=disk", "prune.batch_size=3"]),
        ("block 0 done", ["prune.reconstruct_epochs=2", "prune.reconstruct_lr=1e-3", "prune.memory=disk"]),
        ("block 2 done", ["prune.method=sparsegpt", "model.dtype=bfloat16", "model.compute_dtype=float32"]),
        ("block 0 done", ["prune.method=magnitude"]),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else ",".join(value).replace("prune.", ""),
)
def test_a_killed_run_continues_to_the_same_bytes(
    death: str, options: list[str], config_file: Path, deep: Path, tmp_path: Path, run_prune: Callable[[list[str]], str]
) -> None:
    def arguments(name: str) -> list[str]:
        return [str(config_file), f"model.path={deep}", f"run.dir={tmp_path / name}", *options]

    killed(death, arguments("killed"))
    assert not (tmp_path / "killed" / "pruned").exists()
    said = run_prune(arguments("killed"))
    assert "prune: continuing an interrupted attempt" in said
    assert ("blocks are done" in said) == (death in DONE)
    assert death not in DONE or f"prune: {DONE[death]} of 4 blocks are done" in said
    run_prune(arguments("whole"))
    directories = [tmp_path / name / "pruned" for name in ("killed", "whole")]
    assert shards(directories[0]) == shards(directories[1])
    assert {path.name for path in directories[0].iterdir()} == {path.name for path in directories[1].iterdir()}
    assert {path.name for path in directories[0].iterdir()} == {path.name for path in deep.iterdir()} | {"stage.json"}
    records = [json.loads((directory / "stage.json").read_text())["metrics"]["layers"] for directory in directories]
    for layer in [*records[0], *records[1]]:
        del layer["seconds"]
    assert records[0] == records[1]


def test_finished_blocks_are_not_thrown_away(
    config_file: Path,
    deep: Path,
    tmp_path: Path,
    run_prune: Callable[[list[str]], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = [str(config_file), f"model.path={deep}", f"run.dir={tmp_path / 'run'}", "prune.method=wanda"]
    append = walk.Journal.append

    def then_stop(self: walk.Journal, entry: dict[str, Any]) -> None:
        append(self, entry)
        raise OSError("the machine goes down")

    with monkeypatch.context() as patch:
        patch.setattr(walk.Journal, "append", then_stop)
        with pytest.raises(pytest.fail.Exception, match="the machine goes down"):
            run_prune(arguments)
    with pytest.raises(pytest.fail.Exception, match=r"attempt with prune\.pattern = .*, now 4:8; .*prune --force"):
        run_prune([*arguments, "prune.pattern=4:8"])
    assert "prune: 1 of 4 blocks are done" in run_prune([*arguments, "--force"])
    assert "done" not in run_prune(arguments)


def interrupted(config: Config, base: Path, out: Path, monkeypatch: pytest.MonkeyPatch, blocks: int = 2) -> None:
    """Leaves ``out`` as an attempt that ended after some blocks."""
    append = walk.Journal.append

    def then_stop(self: walk.Journal, entry: dict[str, Any]) -> None:
        append(self, entry)
        if len(self.blocks) == blocks:
            raise KeyboardInterrupt

    out.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(walk.Journal, "append", then_stop)
        with pytest.raises(KeyboardInterrupt):
            prune.execute(config, base, out, dtype="float32")


@pytest.mark.parametrize("torn", ['{"block": 2, "lay', '{"block": 2, "layers": [], "reconstruction": null}'])
@pytest.mark.parametrize(
    "options",
    [
        ["prune.method=dsnot"],
        ["prune.pattern=0.5", "prune.allocation=owl"],
        ["prune.method=sparsegpt", "prune.skip=['*.1.*', '*.3.*']"],
        ["prune.method=sparsegpt", "prune.order=module", "prune.skip=['*.1.*', '*.3.*']"],
    ],
)
def test_a_torn_line_of_the_journal_is_no_finished_block(
    torn: str,
    options: list[str],
    configure: Callable[..., Config],
    deep: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, out = configure(*options), tmp_path / "out"
    interrupted(config, deep, out, monkeypatch)
    with (out / prune.JOURNAL).open("a") as file:
        file.write(torn)
    prune.execute(config, deep, out, dtype="float32")
    assert "prune: 2 of 4 blocks are done" in capsys.readouterr().err
    pruned(config, deep, tmp_path / "whole")
    assert shards(out) == shards(tmp_path / "whole")


def test_a_torn_line_is_cut_off_before_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    walk.Journal(path).append({"block": 0})
    first = path.read_text()
    path.write_text(first + '{"block"')
    journal = walk.Journal(path)
    journal.append({"block": 1})
    assert path.read_text() == f"{first}{json.dumps(sealed.seal({'block': 1}))}\n"
    assert walk.Journal(path).blocks == [{"block": 0}, {"block": 1}]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lines: [lines[0][:9], *lines[1:]], "line 1 is damaged"),
        (lambda lines: [lines[0], lines[1].replace("0.5", "0.7"), lines[2]], "line 2 is damaged (its content is not"),
        (lambda lines: [*lines[:2], "[3]"], "line 3 is damaged (it is not a JSON object)"),
        (lambda lines: [lines[0], lines[2]], "line 2 is damaged (it is of block 2, not 1)"),
    ],
    ids=["cut", "a number", "another type", "a line is gone"],
)
def test_a_damaged_line_of_the_journal_is_named(change: Callable[..., list[str]], said: str, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = walk.Journal(path)
    for block in range(3):
        journal.append({"block": block, "layers": [{"sparsity": 0.5}]})
    path.write_text("".join(f"{line}\n" for line in change(path.read_text().splitlines())))
    with pytest.raises(UserError) as caught:
        walk.Journal(path)
    assert str(caught.value).startswith(f"{path}: {said}")
    assert str(caught.value).endswith("; sppctl prune --force starts the stage again")


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_a_finished_block_that_was_changed_since_is_not_continued_from(
    method: str, configure: Callable[..., Config], deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = configure(f"prune.method={method}"), tmp_path / "out"
    interrupted(config, deep, out, monkeypatch)
    name = "model.layers.1.mlp.down_proj"
    OwnFiles(out).write(f"{name}.weight", TensorFiles(out).read(f"{name}.weight") * 2)  # under the same mask
    with pytest.raises(UserError, match=rf"out: {name} is not what was pruned; sppctl prune --force starts"):
        prune.execute(config, deep, out, dtype="float32")


def test_a_damaged_allocation_is_named(
    configure: Callable[..., Config], deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = configure("prune.pattern=0.5", "prune.allocation=owl"), tmp_path / "out"
    interrupted(config, deep, out, monkeypatch)
    path = out / prune.ALLOCATION
    path.write_text(path.read_text().replace("0.", "0.0", 1))
    with pytest.raises(UserError, match=r"allocation\.json is damaged \(its content is not what was written\); sppctl"):
        prune.execute(config, deep, out, dtype="float32")


def test_a_torn_allocation_is_made_again(
    configure: Callable[..., Config], deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends while the file of ratios is written."""
    config, out = configure("prune.pattern=0.5", "prune.allocation=owl"), tmp_path / "out"

    def stop(aside: Path, path: Path) -> None:
        assert path.name == prune.ALLOCATION
        aside.write_text(aside.read_text()[:10])
        raise KeyboardInterrupt

    out.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            prune.execute(config, deep, out, dtype="float32")
    prune.execute(config, deep, out, dtype="float32")
    pruned(config, deep, tmp_path / "whole")
    assert shards(out) == shards(tmp_path / "whole")


def test_half_precision_on_a_cpu_continues_to_the_same_bytes(
    configure: Callable[..., Config],
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Computed in float32, written in float16: the next block must see what was written."""
    base, config, out = (
        make_checkpoint("llama", dtype=torch.float16),
        configure("prune.method=sparsegpt"),
        tmp_path / "out",
    )
    interrupted(config, base, out, monkeypatch, blocks=1)
    prune.execute(config, base, out, dtype="float32")
    pruned(config, base, tmp_path / "whole")
    assert shards(out) == shards(tmp_path / "whole")


# --- memory and micro-batches -----------------------------------------------------------------------------------------


def test_hidden_states_may_wait_on_the_disk(configure: Callable[..., Config], deep: Path, tmp_path: Path) -> None:
    for memory in ("ram", "disk"):
        _, metrics = pruned(configure(f"prune.memory={memory}", "prune.batch_size=3"), deep, tmp_path / memory)
        assert metrics["activations"] == memory
    assert shards(tmp_path / "ram") == shards(tmp_path / "disk")
    left = {path.name for path in (tmp_path / "disk").iterdir()} - set(names.WORKING)
    assert left == {path.name for path in deep.iterdir()}


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "dsnot"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_micro_batches_change_nothing(
    family: str, method: str, configure: Callable[..., Config], make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base, found = make_checkpoint(family), {}
    for size in ("auto", "1", "3"):
        options = f"prune.method={method}", "prune.targets=all-linear", f"prune.batch_size={size}"
        found[size], metrics = pruned(configure(*options), base, tmp_path / size)
    names = [stored(layer["name"], family) for layer in metrics["layers"]]
    for size in ("1", "3"):
        assert agreement(found["auto"], found[size], names) > 0.999


# --- masks from elsewhere ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen3_moe"])
def test_sparsegpt_repairs_under_a_given_mask(
    family: str, configure: Callable[..., Config], make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_checkpoint(family)
    wanda, before = pruned(configure("prune.targets=all-linear"), base, tmp_path / "wanda")
    options = "prune.targets=all-linear", "prune.method=sparsegpt", f"prune.mask_from={tmp_path / 'wanda'}"
    repaired, after = pruned(configure(*options), base, tmp_path / "repaired")
    errors = []
    for old, new in zip(before["layers"], after["layers"], strict=True):
        name = stored(new["name"], family)
        assert torch.equal(repaired[name] != 0, wanda[name] != 0), name
        if in_first_block(new["name"]) and new["fallback"] is None:  # the first block's inputs are the same for both
            errors.append((new["relative_output_error"], old["relative_output_error"]))
    assert sum(new for new, _ in errors) < 0.95 * sum(old for _, old in errors)


def test_dsnot_starts_from_a_given_mask(
    configure: Callable[..., Config], deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Tensor] = []
    update_mask = pruners.update_mask

    def spy(weight: Tensor, mask: Tensor, *args: Any) -> Tensor:
        begun.append(mask)
        return update_mask(weight, mask, *args)

    start, _ = pruned(configure("prune.method=magnitude"), deep, tmp_path / "start")
    monkeypatch.setattr(pruners, "update_mask", spy)
    options = "prune.method=dsnot", f"prune.mask_from={tmp_path / 'start'}"
    after, metrics = pruned(configure(*options), deep, tmp_path / "out")
    names = [f"{layer['name']}.weight" for layer in metrics["layers"]]
    assert all(torch.equal(mask, start[name] != 0) for mask, name in zip(begun, names, strict=True))
    assert all((kept_per_group(after[name]) == 2).all() for name in names)
    assert 0.5 < agreement(start, after, names) < 1


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_other_methods_take_a_given_mask_as_it_is(
    method: str, configure: Callable[..., Config], llama: Path, tmp_path: Path
) -> None:
    start, _ = pruned(configure("prune.method=sparsegpt"), llama, tmp_path / "start")
    options = f"prune.method={method}", f"prune.mask_from={tmp_path / 'start'}"
    after, metrics = pruned(configure(*options), llama, tmp_path / "out")
    before = weights_of(llama)
    for name in (f"{layer['name']}.weight" for layer in metrics["layers"]):
        assert torch.equal(after[name], before[name] * (start[name] != 0))


def test_a_mask_of_another_pattern_is_refused(configure: Callable[..., Config], llama: Path, tmp_path: Path) -> None:
    pruned(configure("prune.pattern=0.5"), llama, tmp_path / "half")
    for method in ("sparsegpt", "wanda", "dsnot"):
        config = configure(f"prune.method={method}", f"prune.mask_from={tmp_path / 'half'}")
        with pytest.raises(StageError, match=r"layers\.0\..*the mask of prune\.mask_from is not 2:4"):
            pruned(config, llama, tmp_path / method)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "dsnot"])
def test_a_mask_with_fewer_zeros_than_the_pattern_is_refused(
    method: str, configure: Callable[..., Config], llama: Path, tmp_path: Path
) -> None:
    pruned(configure("prune.pattern=0.1"), llama, tmp_path / "tenth")
    config = configure(f"prune.method={method}", "prune.pattern=0.5", f"prune.mask_from={tmp_path / 'tenth'}")
    message = r"is not 0\.5: a share of 0\.09375 is zero; set prune\.pattern"  # 3 of 32
    with pytest.raises(StageError, match=message):
        pruned(config, llama, tmp_path / "out")


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "dsnot"])
def test_masks_of_all_methods_fit_their_own_pattern(
    method: str,
    configure: Callable[..., Config],
    llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """However each rounds its counts."""
    pattern = "prune.pattern=0.53"
    mask, _ = pruned(configure(f"prune.method={method}", pattern, "prune.block_size=16"), llama, tmp_path / "mask")
    for other in ("magnitude", "wanda", "sparsegpt", "dsnot"):
        config = configure(f"prune.method={other}", pattern, f"prune.mask_from={tmp_path / 'mask'}")
        after, metrics = pruned(config, llama, tmp_path / other)
        for name in (f"{layer['name']}.weight" for layer in metrics["layers"]):
            assert (after[name] == 0).sum() == (mask[name] == 0).sum()
    assert "warning" not in capsys.readouterr().err


def test_a_mask_with_more_zeros_than_the_pattern_is_told(
    configure: Callable[..., Config], llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pruned(configure("prune.pattern=1:4", "prune.skip=['*.0.*']"), llama, tmp_path / "mask")
    options = "prune.skip=['*.0.*']", f"prune.mask_from={tmp_path / 'mask'}", "prune.method=sparsegpt"
    _, metrics = pruned(configure(*options), llama, tmp_path / "out")
    assert metrics["sparsity"] == 0.75
    warning = "warning: 7 masks of prune.mask_from have more zeros than prune.pattern: "
    assert f"{warning}model.layers.1.self_attn.q_proj has 0.75, 2:4 asks for 0.5, ..." in capsys.readouterr().err


def test_a_mask_of_another_shape_is_refused(configure: Callable[..., Config], llama: Path, tmp_path: Path) -> None:
    weights, _ = pruned(configure(), llama, tmp_path / "other")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name][:40].clone()
    save_file(weights, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    with pytest.raises((UserError, StageError), match=r"mask_from.*40"):
        pruned(configure(f"prune.mask_from={tmp_path / 'other'}"), llama, tmp_path / "out")


def test_another_content_of_the_mask_is_another_run(
    config_file: Path,
    configure: Callable[..., Config],
    llama: Path,
    tmp_path: Path,
    run_prune: Callable[[list[str]], str],
) -> None:
    mask = tmp_path / "mask"
    pruned(configure("prune.method=magnitude"), llama, mask)
    arguments = [str(config_file), f"prune.mask_from={mask}"]
    run_prune(arguments)
    assert "up to date" in run_prune(arguments)
    weights = load_file(mask / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"].flip(0)
    save_file(weights, mask / "model.safetensors", {"format": "pt"})
    with pytest.raises(pytest.fail.Exception, match="--force redoes it"):
        run_prune(arguments)


# --- tuning pruned blocks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_tuning_keeps_zeros_and_lowers_the_blocks_error(
    method: str, family: str, configure: Callable[..., Config], make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_checkpoint(family)
    common = "prune.targets=all-linear", f"prune.method={method}"
    plain, _ = pruned(configure(*common), base, tmp_path / "plain")
    config = configure(*common, "prune.reconstruct_epochs=3", "prune.reconstruct_lr=1e-3", "prune.batch_size=2")
    tuned, metrics = pruned(config, base, tmp_path / "tuned")
    assert metrics["reconstruction"].keys() == {0, 1}
    assert all(0 < errors["after"] < errors["before"] for errors in metrics["reconstruction"].values())
    for layer in metrics["layers"]:
        name = stored(layer["name"], family)
        assert (kept_per_group(seen(tuned[name], family)) == 2).all(), name
        if in_first_block(name):
            assert torch.equal(tuned[name] != 0, plain[name] != 0)
    touched = {stored(layer["name"], family) for layer in metrics["layers"]}
    before = weights_of(base)
    assert all(torch.equal(tuned[name], before[name]) for name in before.keys() - touched)


@pytest.mark.parametrize("options", [["prune.skip=['*.experts.0.*']"], ["prune.targets=[gate_proj, down_proj]"]])
def test_matrices_of_a_mixture_that_are_no_targets_are_not_tuned(
    options: list[str],
    configure: Callable[..., Config],
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = make_checkpoint("mixtral")
    tuning = "prune.reconstruct_epochs=3", "prune.reconstruct_lr=1e-3"
    config = configure("prune.targets=all-linear", *tuning, *options)
    tuned, metrics = pruned(config, base, tmp_path / "tuned")
    assert all(errors["after"] < errors["before"] for errors in metrics["reconstruction"].values())
    touched = {stored(layer["name"], "mixtral") for layer in metrics["layers"]}
    before = weights_of(base)
    assert {name for name in before if not torch.equal(tuned[name], before[name])} == touched
    interrupted(config, base, tmp_path / "out", monkeypatch, blocks=1)
    prune.execute(config, base, tmp_path / "out", dtype="float32")
    assert shards(tmp_path / "out") == shards(tmp_path / "tuned")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tuning_that_does_harm_is_undone(
    dtype: torch.dtype, configure: Callable[..., Config], make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_checkpoint("llama", dtype=dtype)
    pruned(configure(), base, tmp_path / "plain")
    config = configure("prune.reconstruct_epochs=1", "prune.reconstruct_lr=100")
    _, metrics = pruned(config, base, tmp_path / "tuned")
    assert all(errors["after"] == errors["before"] for errors in metrics["reconstruction"].values())
    assert shards(tmp_path / "plain") == shards(tmp_path / "tuned")


def test_tuning_needs_the_dense_block(configure: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match=r"prune\.reconstruct_epochs: .*prune\.order module"):
        configure("prune.order=module", "prune.reconstruct_epochs=1")


# --- several processes ------------------------------------------------------------------------------------------------


def in_processes(arguments: list[str], number: int, start: str = "ranks") -> Ended:
    """``sppctl prune`` in several processes that it starts itself (launch), that torchrun starts, or that are there."""
    arguments = ["prune", *arguments]
    if start == "ranks":
        return sppctl_in_ranks(arguments, number)
    command = [sys.executable, "-m", "sppctl", *arguments, f"launch.num_processes={number}"]
    if start == "torchrun":
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)]
        command = [sys.executable, *torchrun, "-m", "sppctl", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
    return Ended(done.returncode, done.stdout, done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "options", "start"),
    [
        ("llama", ["prune.method=wanda", "prune.memory=disk"], "launch"),
        ("llama", ["prune.method=sparsegpt", "model.dtype=bfloat16", "model.compute_dtype=float32"], "torchrun"),
        ("llama", ["prune.method=dsnot", "prune.order=module"], "ranks"),
        ("llama", ["prune.pattern=0.5", "prune.allocation=owl"], "ranks"),
        ("gpt2", ["prune.method=sparsegpt"], "ranks"),
        ("qwen3_moe", ["prune.method=wanda"], "ranks"),
        ("llama", ["prune.method=magnitude"], "ranks"),
    ],
    ids=lambda value: ",".join(value).replace("prune.", "") if isinstance(value, list) else None,
)
def test_two_processes_make_the_masks_of_one(
    family: str,
    options: list[str],
    start: str,
    config_file: Path,
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    run_prune: Callable[[list[str]], str],
) -> None:
    base = make_checkpoint(family)
    common = [
        str(config_file),
        f"model.path={base}",
        "prune.targets=all-linear",
        "prune.calibration.samples=5",
        *options,
    ]
    run_prune([*common, f"run.dir={tmp_path / 'one'}"])
    done = in_processes([*common, f"run.dir={tmp_path / 'two'}", "--json"], 2, start)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)  # one process talks
    assert record["metrics"]["processes"] == 2
    assert done.stderr.count("prune: done in") == 1
    one, two = (tmp_path / name / "pruned" for name in ("one", "two"))
    alone = json.loads((one / "stage.json").read_text())["metrics"]
    assert record["metrics"]["sparsity"] == alone["sparsity"]
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    assert {path.name for path in two.parent.iterdir()} == {path.name for path in one.parent.iterdir()}
    names = [stored(layer["name"], family) for layer in alone["layers"]]
    assert agreement(weights_of(one), weights_of(two), names) >= 0.999
    for first, second in zip(alone["layers"], record["metrics"]["layers"], strict=True):
        assert (first["name"], first["damp"]) == (second["name"], second["damp"])
    assert "up to date" in run_prune([*common, f"run.dir={tmp_path / 'two'}"])


@pytest.mark.slow
def test_two_killed_processes_continue_to_the_same_bytes(config_file: Path, deep: Path, tmp_path: Path) -> None:
    def arguments(name: str) -> list[str]:
        return [str(config_file), f"model.path={deep}", "prune.method=sparsegpt", f"run.dir={tmp_path / name}"]

    ended = sppctl_in_ranks(["prune", *arguments("killed")], 2, START + DEATHS["block 2 done"])
    assert ended.returncode == -9, ended.stderr
    done = in_processes(arguments("killed"), 2)
    assert "prune: 3 of 4 blocks are done" in done.stderr
    assert in_processes(arguments("whole"), 2).returncode == 0
    killed_run, whole = (shards(tmp_path / name / "pruned") for name in ("killed", "whole"))
    assert killed_run
    assert killed_run == whole


@pytest.mark.slow
def test_several_processes_do_not_tune_each_on_its_own_windows(config_file: Path, tmp_path: Path) -> None:
    options = ["prune.reconstruct_epochs=2", "prune.reconstruct_lr=1e-3"]
    done = in_processes([str(config_file), f"run.dir={tmp_path / 'two'}", *options], 2)
    assert done.returncode != 0
    assert "prune.reconstruct_epochs" in done.stderr


@pytest.mark.slow
def test_what_the_second_process_finds_wrong_is_said(
    config_file: Path, configure: Callable[..., Config], llama: Path, tmp_path: Path
) -> None:
    mask = tmp_path / "mask"
    pruned(configure("prune.skip=[o_proj]"), llama, mask)  # o_proj, the second group, is the second process's turn
    done = in_processes([str(config_file), f"prune.mask_from={mask}"], 2, "launch")
    assert done.returncode != 0
    assert "o_proj: the mask of prune.mask_from is not 2:4" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("start", ["launch", "torchrun"])
def test_fewer_windows_than_processes(start: str, config_file: Path, tmp_path: Path) -> None:
    arguments = [str(config_file), f"run.dir={tmp_path / 'out'}", "prune.calibration.samples=1"]
    done = in_processes(arguments, 2, start)
    assert done.returncode != 0
    assert "prune.calibration.samples: 1 are fewer than the 2 processes" in done.stderr
    assert not (tmp_path / "out" / "pruned").exists()


# --- layers that share their inputs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize("patterns", [["2:4", "2:4", "2:4"], [0.5, 0.5, 0.25], ["2:4", 0.5, "4:8"]], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["chosen", "given"])
def test_sparsegpt_solves_layers_together_as_each_alone(masked: bool, patterns: list[Any], block_size: int) -> None:
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(rows, 64, generator=generator) for rows in (24, 8, 40)]
    masks = [torch.rand(weight.shape, generator=generator) < 0.5 for weight in weights] if masked else None
    hessian = Hessian(64, "cpu")
    hessian.update(torch.randn(256, 64, generator=generator) @ torch.randn(64, 64, generator=generator))
    parsed = [Pattern.parse(pattern) for pattern in patterns]
    together, damp = prune_sparsegpt(weights, hessian, parsed, masks, block_size=block_size)
    for index, (weight, pattern) in enumerate(zip(weights, parsed, strict=True)):
        mask = None if masks is None else [masks[index]]
        (alone,), own_damp = prune_sparsegpt([weight], hessian, [pattern], mask, block_size=block_size)
        assert own_damp == damp
        assert torch.equal(alone != 0, together[index] != 0)
        torch.testing.assert_close(together[index], alone, rtol=1e-5, atol=1e-6)


def test_the_walk_solves_q_k_and_v_together(
    configure: Callable[..., Config], llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[list[str]] = []
    prune_group = block_work.BlockWork._prune_group

    def spy(self: Any, names: list[str], *args: Any, **kwargs: Any) -> Any:
        groups.append([name.rpartition(".")[2] for name in names])
        return prune_group(self, names, *args, **kwargs)

    monkeypatch.setattr(block_work.BlockWork, "_prune_group", spy)
    pruned(configure("prune.method=sparsegpt"), llama, tmp_path / "out")
    assert groups == 2 * [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
