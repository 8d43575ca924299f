"""Mask refresh: the pattern is exact at all times, resuming changes nothing, merging writes what was trained."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import stage_calls
import torch
from checkpoints import kept_per_group
from conftest import cut_after
from fitting import Configure, Fit, a_fit, problems  # noqa: F401  (the fixture fit)
from peft import get_peft_model
from processes import sppctl_in_ranks
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sppctl import SppConfig
from sppctl.adapters.spp.kernel import effective_weight
from sppctl.config.load import load_config, to_yaml
from sppctl.data.batches import FILLER, PackCollator, PadCollator
from sppctl.data.instructions import IGNORED, Example
from sppctl.errors import StageError
from sppctl.evaluate.subjects import Subject
from sppctl.model.refreshed import REFRESHED
from sppctl.pruners import dsnot
from sppctl.run.directory import Run
from sppctl.run.stages import PRUNE
from sppctl.train import stage as train
from sppctl.train.feed import Collator, Feed
from sppctl.train.refresh import MaskRefresh

pytestmark = pytest.mark.slow

EVERY_TWO = ("train.refresh.steps=2", "train.refresh.until=0.8", "train.epochs=2", "train.lr=5e-2")


@pytest.fixture(autouse=True)
def exchange_in_small_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model's outputs are so small that no row would pass DSnoT's threshold."""
    monkeypatch.setattr(dsnot, "update_mask", partial(dsnot.update_mask, threshold=1e-6))


@pytest.fixture(params=["2:4", "0.5"])
def configure(request: pytest.FixtureRequest, config_file: Path) -> Configure:
    return lambda *overrides: load_config(str(config_file), [f"prune.pattern={request.param}", *overrides])


def zeros_per_row(weight: torch.Tensor) -> list[int]:
    return (weight == 0).sum(1).tolist()


def test_pattern_and_values_after_every_refresh(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, start = load_file(fit.dense / "model.safetensors"), load_file(fit.pruned[0] / "model.safetensors")
    structured = fit.configure().prune.pattern.is_structured
    seen: list[int] = []
    original = MaskRefresh.after_step

    def checked(self: MaskRefresh, *args: Any) -> dict[str, Any]:
        before = {name: self.base_weight(name).clone() for name in self.layers}
        figures = original(self, *args)
        if not figures:
            return figures
        swaps = 0
        for name, layer in self.layers.items():
            key, weight = self.stored[name], self.base_weight(name)
            assert zeros_per_row(weight) == zeros_per_row(start[key])
            assert not structured or kept_per_group(weight).max() <= 2
            survived, regrown = (before[name] != 0) & (weight != 0), (before[name] == 0) & (weight != 0)
            assert torch.equal(weight[survived], before[name][survived])
            effective = effective_weight(weight, *layer.factors("default"), 2.0, torch.float32)
            torch.testing.assert_close(effective[regrown], dense[key][regrown], rtol=1e-6, atol=0)
            swaps += int(regrown.sum())
        assert figures["swaps"] == swaps
        seen.append(swaps)
        return figures

    monkeypatch.setattr(MaskRefresh, "after_step", checked)
    metrics = fit("adapter", *EVERY_TWO).refresh
    assert [entry["step"] for entry in metrics.refreshes] == [2, 4, 6, 8]
    assert [entry["swaps"] for entry in metrics.refreshes] == seen
    assert seen[0] > 0
    total = sum(start[f"{layer.name}.weight"].numel() for layer in fit.pruned[1].layers)
    assert metrics.refreshes[0]["changed_share"] == pytest.approx(2 * seen[0] / total)
    assert 0 < metrics.regrown_share < 1


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def rounded(request: pytest.FixtureRequest, configure: Configure, make_checkpoint: Any, tmp_path: Path) -> Fit:
    """Of a dense and a pruned checkpoint that are not float32; float16 is trained in another dtype."""
    base, out = make_checkpoint("llama", request.param), tmp_path / "stored"
    return Fit(configure, (out, stage_calls.prune(configure(), base, out)), base, tmp_path)


def test_kept_weights_stay_as_stored_and_regrown_ones_merge_to_their_dense_value(rounded: Fit) -> None:
    # an adapter away from zero that hardly moves, and a single refresh
    options = ("train.init=random", "train.lr=1e-12", "train.refresh.steps=2", "train.refresh.until=0.4")
    rounded("adapter", *options)
    rounded.merge(*options)
    folders = (rounded.dense, rounded.pruned[0], rounded.root / "merged")
    dense, before, merged = (load_file(path / "model.safetensors") for path in folders)
    regrown_places = 0
    for name, weight in load_file(rounded.root / "adapter" / REFRESHED).items():
        assert weight.dtype == before[name].dtype
        survived, regrown = (before[name] != 0) & (weight != 0), (before[name] == 0) & (weight != 0)
        assert torch.equal(weight[survived], before[name][survived])
        rounding = torch.finfo(weight.dtype).eps
        torch.testing.assert_close(merged[name][regrown], dense[name][regrown], rtol=rounding, atol=1e-7)
        assert not torch.equal(weight[regrown], dense[name][regrown])
        regrown_places += int(regrown.sum())
    assert regrown_places > 0


@pytest.mark.parametrize(("factor", "changes"), [(0.05, False), (0.5, True), (-0.5, True)])
def test_a_weight_of_which_the_adapter_leaves_nothing_is_not_taken_back(factor: float, changes: bool, fit: Fit) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(fit.pruned[0]), SppConfig(r=4, scale=2.0))
    config = fit.configure("train.refresh.steps=2")
    refreshing = MaskRefresh(config, model, fit.pruned[0], fit.dense, fit.pruned[1].patterns, 10, None)
    for layer in refreshing.layers.values():
        layer.spp_alpha["default"].data.fill_(1)
        layer.spp_beta["default"].data.fill_((factor - 1) / 2)
    refreshing.before_step(2)
    model(torch.arange(100).view(4, 25))
    assert bool(refreshing.after_step(model, 2)["swaps"]) == changes


@pytest.mark.parametrize("beta", ["true", "false"])
def test_the_merged_model_is_the_trained_one_bit_for_bit(
    beta: str, fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = []
    original = train.get_peft_model
    monkeypatch.setattr(train, "get_peft_model", lambda *args: models.append(original(*args)) or models[0])
    fit("adapter", *EVERY_TWO, f"train.beta={beta}")
    assert fit.merge(*EVERY_TWO, f"train.beta={beta}").refreshed_matrices > 0
    ids = torch.arange(40).view(2, 20)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(merged(ids).logits, models[0].eval()(ids).logits)
    # the adapter as it is, measured without merging
    unmerged = Subject.at("adapter", tmp_path / "adapter").load(torch.device("cpu"), "float32", False)
    assert torch.equal(merged(ids).logits, unmerged(ids).logits)
    before, after = (load_file(path / "model.safetensors") for path in (fit.pruned[0], tmp_path / "merged"))
    changed = 0
    for name, weight in before.items():
        if weight.dim() == 2:
            assert zeros_per_row(weight) == zeros_per_row(after[name])
            changed += int(((weight == 0) != (after[name] == 0)).sum())
    assert changed > 0


def test_a_resumed_training_ends_with_the_same_weights(rounded: Fit) -> None:
    options = (*EVERY_TWO, "train.save_steps=3", "train.dropout=0.1")
    whole = rounded("whole", *options)
    with cut_after(5):
        rounded("cut", *options)
    assert (rounded.root / "cut" / "checkpoints" / "checkpoint-3" / REFRESHED).is_file()
    cut = rounded("cut", *options)
    assert rounded.adapter("cut") == rounded.adapter("whole")
    assert (rounded.root / "cut" / REFRESHED).read_bytes() == (rounded.root / "whole" / REFRESHED).read_bytes()
    swaps = [[entry["swaps"] for entry in metrics.refresh.refreshes] for metrics in (whole, cut)]
    assert len(swaps[0]) == 4
    assert swaps[0] == swaps[1]


def test_nothing_is_exchanged_before_the_first_refresh(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = fit("adapter", "train.max_steps=4", "train.refresh.steps=3", "train.refresh.until=0.5")
    assert metrics.refresh.refreshes == []
    assert metrics.refresh.changed_matrices == 0
    assert "no refresh falls into the first 50% of 4 steps; lower train.refresh.steps" in capsys.readouterr().err
    assert fit("plain", "train.max_steps=4").refresh is None  # off by default
    assert not (fit.root / "plain" / REFRESHED).exists()
    assert fit.adapter("plain") == fit.adapter("adapter")


def test_merging_refuses_another_number_of_zeros(fit: Fit) -> None:
    fit("adapter", *EVERY_TWO)
    path = fit.root / "adapter" / REFRESHED
    content = load_file(path)
    row = next(iter(content.values()))[0]
    row[(row == 0).nonzero()[0]] = 1.0
    save_file(content, path, {"format": "pt"})
    with pytest.raises(StageError, match="does not have the zeros per"):
        fit.merge(*EVERY_TWO)


@pytest.mark.parametrize("packing", ["false", "true"])
def test_nothing_but_the_examples_enters_the_statistics(
    packing: str, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted, original = set(), dsnot.update_mask

    def count(values: Any, kept: Any, statistics: Any, *args: Any, **options: Any) -> Any:
        counted.add(statistics.num_tokens)
        return original(values, kept, statistics, *args, **options)

    monkeypatch.setattr(dsnot, "update_mask", count)
    options = ["train.refresh.steps=1", "train.refresh.until=0.5", "train.max_steps=2", f"train.data.packing={packing}"]
    fit("adapter", *options)
    feed = Feed(fit.configure(*options), stage_calls.outline(fit.pruned[0])[1], 260)
    examples = [number for batch in next(feed.steps(0)) for number in batch["examples"]]
    assert counted == {sum(feed.train.lengths[number] for number in examples)}


@pytest.mark.parametrize("collator", [PadCollator(pad_token_id=9), PackCollator()], ids=["padded", "packed"])
def test_fillers_do_not_enter_the_statistics(collator: Collator, fit: Fit) -> None:
    """They level the micro-batches of several processes, whose masks should be those of one."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(fit.pruned[0]), SppConfig(r=4, scale=2.0))
    model.config.use_cache = False  # with a cache, packed examples would attend to each other
    config = fit.configure("train.refresh.steps=2")
    examples = [Example([number] * 5, [number] * 5, False, number, [True] * 5) for number in (1, 2)]
    filler = Example([9], [IGNORED], False, FILLER, [False])
    means = []
    for given in ([examples], [[examples[0], filler], [examples[1], filler], [filler, filler]]):
        refreshing = MaskRefresh(config, model, fit.pruned[0], fit.dense, fit.pruned[1].patterns, 10, None)
        refreshing.before_step(2)
        for part in given:
            names = ("input_ids", "attention_mask", "position_ids")
            model(**{name: value for name, value in collator(part).items() if name in names})
        assert {statistics.num_tokens for statistics in refreshing._statistics.values()} == {10}
        means.append([statistics.mean() for statistics in refreshing._statistics.values()])
        for hook in refreshing._hooks:
            hook.remove()
    for alone, shared in zip(*means, strict=True):
        torch.testing.assert_close(shared, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.method=hira"], "only spp can refresh its mask, not hira"),
        (["launch.strategy=fsdp", "launch.num_processes=2"], "launch.strategy=fsdp shards the weights"),
        (["launch.strategy=fsdp", "launch.num_processes=1"], ""),  # one process holds whole weights
        (["prune.targets=[k_proj]", "train.targets=[q_proj]"], "none of the layers that train.targets selects is"),
        (["prune.skip=[q_proj]", "train.targets=[self_attn.q_proj]"], "is pruned, so no mask can be refreshed"),
        (["prune.targets=[k_proj]", "train.targets=[q_proj,k_proj]"], ""),
    ],
)
def test_what_forbids_it(config_file: Path, llama: Path, overrides: list[str], message: str) -> None:
    found = problems(load_config(str(config_file), ["train.refresh.steps=2", *overrides]), llama)
    assert message in found
    assert bool(message) == bool(found)


def test_two_processes_exchange_and_distil_as_one(config_file: Path, llama: Path, tmp_path: Path) -> None:
    patch = "from functools import partial\nfrom sppctl.pruners import dsnot\n"
    patch += "dsnot.update_mask = partial(dsnot.update_mask, threshold=1e-6)\n"
    distilled = ("train.distill.teacher=base", "train.distill.weight=0.7", "train.log_steps=1", "train.dropout=0.0")
    base = tmp_path / "base"  # with room for a whole prompt and its response
    shutil.copytree(llama, base)
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 256}))
    common = [*EVERY_TWO, *distilled, f"model.path={base}", "train.data.seq_len=256"]
    records, adapters, matrices = [], [], []
    for number in (1, 2):
        config = load_config(str(config_file), [*common, f"run.dir={tmp_path / str(number)}"])
        Run(config).do(PRUNE)
        path = tmp_path / f"{number}.yaml"
        path.write_text(to_yaml(config))
        done = sppctl_in_ranks(["train", str(path)], number, patch)
        assert done.returncode == 0, done.stderr
        adapter = tmp_path / str(number) / "adapter"
        records.append(json.loads((adapter / "stage.json").read_text())["metrics"])
        adapters.append(load_file(adapter / "adapter_model.safetensors"))
        matrices.append(load_file(adapter / REFRESHED))
    for key in ("loss", "kl", "grad_norm"):
        one, two = ([entry[key] for entry in record["history"] if "loss" in entry] for record in records)
        assert two == pytest.approx(one, rel=1e-3), key
    for name, matrix in matrices[0].items():
        assert ((matrix == 0) == (matrices[1][name] == 0)).float().mean() > 0.99, name  # a tie may fall the other way
    for name, tensor in adapters[0].items():
        assert (tensor - adapters[1][name]).abs().mean() < 1e-3, name
