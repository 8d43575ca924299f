"""Training on packed weights writes the same files as on dense ones, and continues from one to the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import stage_calls
import torch
from conftest import Prune, cut_after, trained_dtype
from fitting import Configure, problems
from peft import get_peft_model

from sppctl.adapters.ste import SteConfig
from sppctl.model.checkpoint import load_model
from sppctl.packed.linear import packed_layers
from sppctl.records import PruneRecord, TrainRecord
from sppctl.train import distill, shards

PATTERNS = ("2:4", "2:8", "0.5", "0.75")


def train(
    configure: Configure, pruned: tuple[Path, PruneRecord], out: Path, *overrides: str, packed: bool
) -> TrainRecord:
    config = configure(*overrides)
    return stage_calls.train(config, *pruned, out, dtype=trained_dtype(pruned[0]), packed=packed)


def adapter(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("adapter*")}


SHORT = ("train.max_steps=2", "train.data.max_rows=12", "train.data.seq_len=64")


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", ["spp", "masked_lora"])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_adapters_are_byte_identical(
    pattern: str, method: str, dropout: float, configure: Configure, prune: Prune, tmp_path: Path
) -> None:
    made = prune(f"prune.pattern={pattern}", "prune.method=magnitude")
    pruned = made.directory, made.record
    records = {}
    for packed in (False, True):
        overrides = (*SHORT, f"train.method={method}", f"train.dropout={dropout}")
        records[packed] = train(configure, pruned, tmp_path / str(packed), *overrides, packed=packed)
    assert adapter(tmp_path / "True") == adapter(tmp_path / "False") != {}
    dense, packed = records[False], records[True]
    assert (dense.weights, packed.weights) == ("dense", "packed")
    assert (dense.trainable_parameters, dense.trainable_share) == (packed.trainable_parameters, packed.trainable_share)
    assert (dense.train_loss, dense.validation_loss) == (packed.train_loss, packed.validation_loss)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("method", ["spp", "masked_lora"])
def test_it_continues_from_one_to_the_other(
    first: bool, method: str, configure: Configure, prune: Prune, tmp_path: Path
) -> None:
    made = prune("prune.method=magnitude")
    pruned = made.directory, made.record
    overrides = ("train.max_steps=4", "train.save_steps=2", *SHORT[1:], f"train.method={method}")
    train(configure, pruned, tmp_path / "whole", *overrides, packed=False)
    with cut_after(3):
        train(configure, pruned, tmp_path / "cut", *overrides, packed=first)
    train(configure, pruned, tmp_path / "cut", *overrides, packed=not first)
    assert adapter(tmp_path / "cut") == adapter(tmp_path / "whole")


def test_gradient_checkpointing_and_refreshed_masks(
    configure: Configure, prune: Prune, llama: Path, tmp_path: Path
) -> None:
    made = prune("prune.method=magnitude")
    overrides = ("train.max_steps=4", *SHORT[1:], "train.gradient_checkpointing=true", "train.refresh.steps=2")
    for packed in (False, True):
        stage_calls.train(
            configure(*overrides), made.directory, made.record, tmp_path / str(packed), packed=packed, base=llama
        )
    assert adapter(tmp_path / "True") == adapter(tmp_path / "False")
    refreshed = [(tmp_path / name / "refreshed.safetensors").read_bytes() for name in ("True", "False")]
    assert refreshed[0] == refreshed[1]


def test_ddp_does_not_send_packed_weights(prune: Prune) -> None:
    model = load_model(prune("prune.method=magnitude").directory, torch.device("cpu"), "float32", packed=True)
    shards.keep_frozen_weights(model)
    packed = {name for name, _ in model.named_buffers() if name.endswith((".mask", ".values", ".offsets"))}
    assert len(packed) == 3 * 14
    assert packed <= set(model._ddp_params_and_buffers_to_ignore)


def test_ddp_does_not_send_masks(llama: Path) -> None:
    config = SteConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(load_model(llama, torch.device("cpu"), "float32"), config)
    shards.keep_frozen_weights(model)
    masks = {name for name, _ in model.named_buffers() if "ste_mask" in name}
    assert len(masks) == 2
    assert masks <= set(model._ddp_params_and_buffers_to_ignore)


def test_a_teacher_is_packed_if_it_is_sparse(configure: Configure, prune: Prune, llama: Path, tmp_path: Path) -> None:
    made = prune("prune.method=magnitude")
    for teacher, count in ((made.directory, 14), (llama, 0)):
        config = configure(f"train.distill.teacher={teacher}")
        distillation = distill.load(config, None, torch.device("cpu"), "float32", packed=True)
        assert distillation is not None
        assert sum(1 for _ in packed_layers(distillation.teacher)) == count
    overrides = (*SHORT[:2], "train.data.prompt='{instruction}: '", f"train.distill.teacher={made.directory}")
    for packed in (False, True):
        train(configure, (made.directory, made.record), tmp_path / str(packed), *overrides, packed=packed)
    assert adapter(tmp_path / "True") == adapter(tmp_path / "False")


@pytest.mark.parametrize("method", ["lora", "hira", "masked_full", "ste"])
def test_methods_that_need_dense_weights_are_refused(method: str, configure: Configure, llama: Path) -> None:
    config = configure("model.weights=packed", f"train.method={method}")
    text = f"model.weights: {method} needs dense weights; only spp and masked_lora read packed ones; set it to dense"
    assert text in problems(config, llama)
    assert not problems(configure("model.weights=packed"), llama)


@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_sharding_strategies_are_refused(strategy: str, configure: Configure, llama: Path) -> None:
    sharded = "launch.num_processes=2", f"launch.strategy={strategy}", "train.batch_size=4"
    found = problems(configure("model.weights=packed", *sharded), llama)
    assert f"model.weights: launch.strategy={strategy} shards dense weights" in found
