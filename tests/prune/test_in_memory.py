"""Pruning a model in memory: the zeros of the command, its options, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GROUPED, PROJECTIONS, SMALL, Prune
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3Config

from sppctl import prune_model
from sppctl.errors import StageError, UserError

WINDOWS = torch.randint(0, 250, (4, 32), generator=torch.Generator().manual_seed(0))


def load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


SETTINGS = {
    "wanda": {},
    "wanda in module order": {"order": "module"},
    "sparsegpt": {"method": "sparsegpt"},
    "sparsegpt in act order": {"method": "sparsegpt", "pattern": 0.6, "act_order": True},
    "magnitude": {"method": "magnitude"},
    "owl": {"pattern": 0.6, "allocation": "owl"},
    "overrides": {"overrides": {"down_proj": "1:4"}, "skip": ["k_proj"]},
    "tuned": {"reconstruct_epochs": 1},
    "tuned on the dense model": {"reconstruct_epochs": 1, "reconstruct_target": "dense"},
    "tuned in two parts": {"reconstruct_epochs": 1, "reconstruct_unit": "sublayer"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_gives_the_weights_of_the_command(prune: Prune, llama: Path, name: str) -> None:
    settings: dict[str, Any] = {"method": "wanda", "pattern": "2:4"} | SETTINGS[name]
    keys = [f"prune.{key}={value}" for key, value in settings.items()]
    sizes = ["prune.calibration.samples=4", "prune.calibration.seq_len=32"]
    expected = prune(*keys, *sizes, windows=None if name == "magnitude" else WINDOWS)
    model = load(llama)
    record = prune_model(model, WINDOWS, **settings)
    for key, weight in model.state_dict().items():
        assert key not in expected.weights or torch.equal(weight, expected.weights[key].to(weight.dtype)), key
    assert record.masks == expected.record.masks
    assert record.pattern == expected.record.pattern


def test_draws_the_windows_of_the_command(prune: Prune, llama: Path, text_file: Path) -> None:
    sizes = {"samples": 3, "seq_len": 32}
    keys = [f"prune.calibration.{key}={value}" for key, value in sizes.items()]
    expected = prune("prune.method=wanda", "prune.pattern=2:4", f"prune.calibration.dataset={text_file}", *keys)
    tokenizer, model = AutoTokenizer.from_pretrained(llama), load(llama)
    record = prune_model(model, tokenizer, seed=1, calibration={"dataset": str(text_file), **sizes})
    assert record.calibration == expected.record.calibration
    assert record.masks == expected.record.masks


def test_takes_batches_as_a_loader_gives_them(llama: Path) -> None:
    batches = ({"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in WINDOWS.split(3))
    models = load(llama), load(llama)
    masks = [prune_model(model, data).masks for model, data in zip(models, (batches, WINDOWS), strict=True)]
    assert masks[0] == masks[1]


def test_the_callback_sees_every_matrix_and_the_model_its_mode(llama: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    model = load(llama).train()
    prune_model(model, WINDOWS, callback=lambda layer, done, total: seen.append((layer.name, done, total)))
    assert [done for _, done, _ in seen] == list(range(1, 15))
    assert {total for _, _, total in seen} == {14}
    assert {name.rpartition(".")[2] for name, _, _ in seen} == set(PROJECTIONS)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    model(WINDOWS[:1], labels=WINDOWS[:1]).loss.backward()


def test_a_pruned_model_is_pruned_further(llama: Path) -> None:
    model = load(llama)
    first = prune_model(model, WINDOWS, method="sparsegpt", pattern="2:4")
    zeros = {name: weight == 0 for name, weight in model.state_dict().items() if name.split(".")[-2] in PROJECTIONS}
    second = prune_model(model, WINDOWS, method="sparsegpt", pattern="2:8", keep_zeros=True)
    for name, weight in model.state_dict().items():
        assert name not in zeros or (weight[zeros[name]] == 0).all(), name
    assert first.zeros_before == 0
    assert second.zeros_before == sum(int(zero.sum()) for zero in zeros.values())
    assert second.sparsity == 0.75


def test_a_model_with_a_merged_adapter_is_pruned(llama: Path) -> None:
    merged = with_adapter(load(llama)).merge_and_unload()
    assert prune_model(merged, method="magnitude").masks == prune_model(load(llama), method="magnitude").masks


def test_float64_is_pruned_too(llama: Path) -> None:
    assert prune_model(load(llama).double(), WINDOWS).masks == prune_model(load(llama), WINDOWS).masks


def test_only_the_text_model_of_a_multimodal_model_is_pruned() -> None:
    """Although its vision tower is as deep."""
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    vision = {key: SMALL[key] for key in sizes}
    config = Gemma3Config(
        text_config=GROUPED | {"sliding_window": 16},
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=259,
    )
    record = prune_model(AutoModelForCausalLM.from_config(config), WINDOWS, targets="all-linear")
    assert record.matrices == 2 * len(PROJECTIONS)
    assert all(layer.name.startswith("model.language_model.layers.") for layer in record.layers)


def with_nan(model: Any) -> Any:
    model.lm_head.weight.data[0, 0] = torch.nan
    return model


def with_adapter(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"]))


BAD: dict[str, tuple[Callable[[Any], Any], Any, dict[str, Any], str]] = {
    "adapter": (with_adapter, WINDOWS, {}, "has an adapter; merge it first"),
    "no inputs": (lambda model: model, None, {}, "wanda needs inputs"),
    "padding": (lambda m: m, {"input_ids": WINDOWS, "attention_mask": torch.zeros(4, 32)}, {}, "is padded"),
    "lengths": (lambda model: model, [WINDOWS, WINDOWS[:, :8]], {}, "the same length"),
    "vocabulary": (lambda model: model, WINDOWS + 10**6, {}, "the model has .* embeddings"),
    "floats": (lambda model: model, WINDOWS.float(), {}, "not token ids"),
    "text": (lambda model: model, "a text", {}, "expected a tokenizer or batches"),
    "calibration": (lambda model: model, WINDOWS, {"calibration": {"samples": 2}}, "calibration needs a tokenizer"),
    "method": (lambda model: model, WINDOWS, {"method": "wandas"}, "prune.method: .* did you mean wanda"),
    "key": (lambda model: model, WINDOWS, {"dampen": 1}, "prune.dampen: unknown key"),
    "pattern": (lambda model: model, WINDOWS, {"pattern": "4:2"}, "N:M keeps N of every M"),
    "target": (lambda model: model, WINDOWS, {"targets": ["query"]}, "'query' matches no linear layer"),
}


@pytest.mark.parametrize("name", BAD)
def test_refusals_leave_the_model_alone(llama: Path, name: str) -> None:
    change, data, options, message = BAD[name]
    model = change(load(llama))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=message):
        prune_model(model, data, **options)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def skipping(module: Any) -> Callable[[Tensor], Tensor]:
    return lambda hidden: hidden


def without_tokens(module: Any) -> Callable[[Tensor], Tensor]:
    forward = module.forward
    return lambda hidden: hidden + forward(hidden[:, :0]).sum()


@pytest.mark.parametrize("order", ["block", "module"])
@pytest.mark.parametrize("changed", [skipping, without_tokens])
def test_a_layer_of_a_later_block_that_no_token_reaches_is_named(
    changed: Callable[[Any], Callable[[Tensor], Tensor]], order: str, llama: Path
) -> None:
    model = load(llama)
    mlp = model.model.layers[1].mlp
    mlp.forward = changed(mlp)
    message = r"layers\.1\.mlp\.gate_proj received no calibration input; leave it out \(prune\.skip\)"
    with pytest.raises(StageError, match=message):
        prune_model(model, WINDOWS, order=order)
    model = load(llama)
    model.model.layers[1].mlp.forward = changed(model.model.layers[1].mlp)
    prune_model(model, WINDOWS, order=order, skip=["*.1.mlp.*"])


@pytest.mark.parametrize("order", ["block", "module"])
def test_a_mixture_that_no_token_reaches_is_named(order: str, make_checkpoint: Callable[..., Path]) -> None:
    model = load(make_checkpoint("mixtral"))
    model.model.layers[1].mlp.forward = lambda hidden: hidden
    with pytest.raises(StageError, match=r"layers\.1\.mlp\.experts.* received no calibration input"):
        prune_model(model, WINDOWS, order=order, targets="all-linear")


def test_a_broken_model_is_not_pruned(llama: Path) -> None:
    with pytest.raises(StageError, match=r"lm_head.weight holds NaN"):
        prune_model(with_nan(load(llama)), WINDOWS)


def test_a_model_without_weights_is_refused(llama: Path) -> None:
    model: Tensor = load(llama).to("meta")
    with pytest.raises(UserError, match="its weights are on meta"):
        prune_model(model, WINDOWS)
