"""Mask refresh: the pattern is exact at all times, resuming changes nothing, merging writes what was trained."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import cut_after
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sppctl import pipeline
from sppctl.config import load_config, to_yaml
from sppctl.errors import StageError
from sppctl.lm import batches
from sppctl.pruning import dsnot
from sppctl.run_directory import Run
from sppctl.settings import Config
from sppctl.stages import merge, refresh, train
from sppctl.stages.subjects import Subject

EXACT = "launch.mixed_precision=no"  # the model that is looked at after training is not autocast
EVERY_TWO = ("train.refresh.steps=2", "train.refresh.until=0.8", "train.epochs=2", "train.lr=5e-2")


@pytest.fixture(autouse=True)
def exchange_in_small_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model's outputs are so small that no row would pass DSnoT's threshold."""
    monkeypatch.setattr(dsnot, "update_mask", partial(dsnot.update_mask, threshold=1e-6))


@pytest.fixture(params=["2:4", "0.5"])
def configure(request: pytest.FixtureRequest, config_file: Path) -> Callable[..., Config]:
    return lambda *overrides: load_config(str(config_file), [f"prune.pattern={request.param}", EXACT, *overrides])


def trained(config: Config, pruned: tuple[Path, list[str]], out: Path, base: Path) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    return train.execute(config, *pruned, out, resume=True, base=base)


def zeros_per_row(weight: torch.Tensor) -> list[int]:
    return (weight == 0).sum(1).tolist()


def test_pattern_and_values_after_every_refresh(
    configure: Callable[..., Config],
    pruned: tuple[Path, list[str]],
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = configure(*EVERY_TWO)
    dense, start = load_file(llama / "model.safetensors"), load_file(pruned[0] / "model.safetensors")
    seen: list[int] = []
    original = refresh.MaskRefresh._refresh

    def checked(self: refresh.MaskRefresh) -> dict[str, Any]:
        before = {name: refresh._base_weight(layer).clone() for name, layer in self.layers.items()}
        record = original(self)
        swaps = 0
        for name, layer in self.layers.items():
            key, weight = self.stored[name], refresh._base_weight(layer)
            assert zeros_per_row(weight) == zeros_per_row(start[key])
            if config.prune.pattern.is_structured:
                assert (weight.view(len(weight), -1, 4) != 0).sum(-1).max() <= 2
            survived, regrown = (before[name] != 0) & (weight != 0), (before[name] == 0) & (weight != 0)
            assert torch.equal(weight[survived], before[name][survived])
            assert torch.equal(weight[regrown], dense[key][regrown])
            swaps += int(regrown.sum())
        assert record["swaps"] == swaps
        seen.append(swaps)
        return record

    monkeypatch.setattr(refresh.MaskRefresh, "_refresh", checked)
    metrics = trained(config, pruned, tmp_path / "adapter", llama)["refresh"]
    assert [entry["step"] for entry in metrics["refreshes"]] == [2, 4, 6, 8]
    assert [entry["swaps"] for entry in metrics["refreshes"]] == seen
    assert seen[0] > 0
    total = sum(start[f"{name}.weight"].numel() for name in pruned[1])
    assert metrics["refreshes"][0]["changed_share"] == pytest.approx(2 * seen[0] / total)
    assert 0 < metrics["regrown_share"] < 1


@pytest.mark.parametrize("beta", ["true", "false"])
def test_the_merged_model_is_the_trained_one_bit_for_bit(
    beta: str,
    configure: Callable[..., Config],
    pruned: tuple[Path, list[str]],
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = []
    original = train.get_peft_model
    monkeypatch.setattr(train, "get_peft_model", lambda *args: models.append(original(*args)) or models[0])
    config = configure(*EVERY_TWO, f"train.beta={beta}")
    trained(config, pruned, tmp_path / "adapter", llama)
    (tmp_path / "merged").mkdir()
    metrics = merge.execute(config, pruned[0], tmp_path / "adapter", tmp_path / "merged")
    assert metrics["refreshed_matrices"] > 0
    ids = torch.arange(40).view(2, 20)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(merged(ids).logits, models[0].eval()(ids).logits)
    # the adapter as it lies there, measured without merging
    unmerged = Subject.at("adapter", tmp_path / "adapter").load(torch.device("cpu"), False)
    assert torch.equal(merged(ids).logits, unmerged(ids).logits)
    before, after = load_file(pruned[0] / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    changed = 0
    for name, weight in before.items():
        if weight.dim() == 2:
            assert zeros_per_row(weight) == zeros_per_row(after[name])
            changed += int(((weight == 0) != (after[name] == 0)).sum())
    assert changed > 0


def test_a_resumed_training_ends_with_the_same_weights(
    configure: Callable[..., Config],
    pruned: tuple[Path, list[str]],
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = configure(*EVERY_TWO, "train.save_steps=3", "train.dropout=0.1")
    whole = trained(config, pruned, tmp_path / "whole", llama)

    with cut_after(5):
        trained(config, pruned, tmp_path / "cut", llama)
    assert (tmp_path / "cut" / "checkpoints" / "checkpoint-3" / refresh.REFRESHED).is_file()
    cut = trained(config, pruned, tmp_path / "cut", llama)
    for name in ("adapter_model.safetensors", refresh.REFRESHED):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    swaps = [[entry["swaps"] for entry in metrics["refresh"]["refreshes"]] for metrics in (whole, cut)]
    assert len(swaps[0]) == 4
    assert swaps[0] == swaps[1]


def test_off_by_default(configure: Callable[..., Config], pruned: tuple[Path, list[str]], tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    metrics = train.execute(configure("train.max_steps=2"), *pruned, tmp_path / "adapter", resume=True)
    assert metrics["refresh"] is None
    assert not (tmp_path / "adapter" / refresh.REFRESHED).exists()


def test_nothing_is_exchanged_before_the_first_refresh(
    configure: Callable[..., Config], pruned: tuple[Path, list[str]], llama: Path, tmp_path: Path
) -> None:
    config = configure("train.max_steps=4", "train.refresh.steps=3", "train.refresh.until=0.5")
    metrics = trained(config, pruned, tmp_path / "adapter", llama)
    assert metrics["refresh"]["refreshes"] == []
    assert metrics["refresh"]["changed_matrices"] == 0
    trained(configure("train.max_steps=4"), pruned, tmp_path / "plain", llama)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "plain"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_merging_refuses_another_number_of_zeros(
    configure: Callable[..., Config], pruned: tuple[Path, list[str]], llama: Path, tmp_path: Path
) -> None:
    config = configure(*EVERY_TWO)
    trained(config, pruned, tmp_path / "adapter", llama)
    path = tmp_path / "adapter" / refresh.REFRESHED
    content = load_file(path)
    name = next(iter(content))
    row = content[name][0]
    row[(row == 0).nonzero()[0]] = 1.0
    save_file(content, path, {"format": "pt"})
    (tmp_path / "merged").mkdir()
    with pytest.raises(StageError, match="does not have the zeros per"):
        merge.execute(config, pruned[0], tmp_path / "adapter", tmp_path / "merged")


@pytest.mark.parametrize("packing", ["false", "true"])
def test_nothing_but_the_examples_enters_the_statistics(
    packing: str,
    configure: Callable[..., Config],
    pruned: tuple[Path, list[str]],
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted: list[int] = []
    original = refresh.MaskRefresh._refresh

    def count(self: refresh.MaskRefresh) -> dict[str, Any]:
        counted.extend(statistics.num_tokens for statistics in self._statistics.values())
        return original(self)

    monkeypatch.setattr(refresh.MaskRefresh, "_refresh", count)
    options = ("train.refresh.steps=1", "train.refresh.until=0.5", "train.max_steps=2")
    config = configure(*options, f"train.data.packing={packing}")
    real: list[int] = []
    collator = batches.PackCollator if packing == "true" else batches.PadCollator
    collate = collator.__call__

    def note(self: Any, examples: Any) -> dict[str, Any]:
        real.append(sum(len(example.input_ids) for example in examples))
        return collate(self, examples)

    monkeypatch.setattr(collator, "__call__", note)
    trained(config, pruned, tmp_path / "adapter", llama)
    assert set(counted) == {sum(real[:2])}  # two micro-batches in a step


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.method=hira"], "only spp trains under a mask that is refreshed"),
        (["launch.strategy=fsdp", "launch.num_processes=2"], "launch.strategy=fsdp shares out the weights"),
    ],
)
def test_what_forbids_it(config_file: Path, overrides: list[str], said: str) -> None:
    config = load_config(str(config_file), ["train.refresh.steps=2", *overrides])
    assert said in refresh.problems(config)[0]


def test_one_process_holds_whole_weights_under_any_strategy(config_file: Path) -> None:
    config = load_config(str(config_file), ["train.refresh.steps=2", "launch.strategy=fsdp", "launch.num_processes=1"])
    assert refresh.problems(config) == []


@pytest.mark.slow
def test_two_processes_exchange_and_distil_as_one(config_file: Path, llama: Path, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "from functools import partial\n"
        "from sppctl.cli import main\n"
        "from sppctl.pruning import dsnot\n"
        "dsnot.update_mask = partial(dsnot.update_mask, threshold=1e-6)\n"
        "main()\n"
    )
    distilled = ("train.distill.teacher=base", "train.distill.weight=0.7", "train.log_steps=1", "train.dropout=0.0")
    base = tmp_path / "base"  # with room for a whole prompt and its response
    shutil.copytree(llama, base)
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 256}))
    common = [EXACT, *EVERY_TWO, *distilled, f"model.path={base}", "train.data.seq_len=256"]
    records, adapters, matrices = [], [], []
    for number in (1, 2):
        config = load_config(str(config_file), [*common, f"run.dir={tmp_path / str(number)}"])
        pipeline.prune(Run(config))
        path = tmp_path / f"{number}.yaml"
        path.write_text(to_yaml(config))
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number), str(script)]
        done = subprocess.run([sys.executable, *start, "train", str(path)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        adapter = tmp_path / str(number) / "adapter"
        records.append(json.loads((adapter / "stage.json").read_text())["metrics"])
        adapters.append(load_file(adapter / "adapter_model.safetensors"))
        matrices.append(load_file(adapter / refresh.REFRESHED))
    for key in ("loss", "kl", "grad_norm"):
        one, two = ([entry[key] for entry in record["history"] if "loss" in entry] for record in records)
        assert two == pytest.approx(one, rel=1e-3), key
    for name, matrix in matrices[0].items():
        assert ((matrix == 0) == (matrices[1][name] == 0)).float().mean() > 0.99, name  # a tie may fall the other way
    for name, tensor in adapters[0].items():
        assert (tensor - adapters[1][name]).abs().mean() < 1e-3, name
