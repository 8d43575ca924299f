"""SPP as a stock PEFT method: wrapping, saving, loading, several adapters, merging."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from accelerate import init_empty_weights
from conftest import pruned_llama
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sppctl import SppConfig
from sppctl.adapters.spp import SppLinear


@pytest.fixture
def pruned(llama: Path) -> nn.Module:
    """The tiny Llama with its projections pruned 2:4."""
    return pruned_llama(llama)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 250, (2, 12), generator=torch.Generator().manual_seed(0))


def config(**changes: object) -> SppConfig:
    return SppConfig(**{"r": 4, "dropout": 0.0, "init_weights": False, "task_type": "CAUSAL_LM"} | changes)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.replace(".base_layer", "").removeprefix("base_model.model."): module.weight.data.clone()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


def test_a_new_adapter_leaves_the_output_bit_identical(pruned: nn.Module, ids: Tensor) -> None:
    before = pruned(ids).logits
    model = get_peft_model(pruned, config(init_weights=True, dropout=0.1))
    assert torch.equal(model(ids).logits, before)
    model.train()
    assert torch.equal(model(ids).logits, before)


def test_default_targets_are_the_seven_projections_and_only_the_adapter_trains(pruned: nn.Module) -> None:
    model = get_peft_model(pruned, SppConfig(r=4))
    layers = [name for name, module in model.named_modules() if isinstance(module, SppLinear)]
    assert len(layers) == 2 * 7
    trainable = {name.split(".")[-2] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {"spp_alpha", "spp_beta"}
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_adapters_stay_float32_on_a_bfloat16_model(pruned: nn.Module, ids: Tensor) -> None:
    model = get_peft_model(pruned.to(torch.bfloat16), config())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model(ids).logits.dtype == torch.bfloat16


def test_round_trip_through_save_pretrained(pruned: nn.Module, ids: Tensor, tmp_path: Path) -> None:
    base = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    model = get_peft_model(pruned, config(scale=1.5, target_modules=["q_proj", "down_proj"])).eval()
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, SppConfig)
    assert (loaded.r, loaded.scale, loaded.target_modules) == (4, 1.5, {"q_proj", "down_proj"})
    fresh = AutoModelForCausalLM.from_config(pruned.config)
    fresh.load_state_dict(base)
    assert torch.equal(PeftModel.from_pretrained(fresh, tmp_path).eval()(ids).logits, expected)


def test_merge_and_unload_keeps_every_zero_and_gives_the_same_output(pruned: nn.Module, ids: Tensor) -> None:
    before = weights(pruned)
    model = get_peft_model(pruned, config()).eval()
    expected = model(ids).logits
    merged = model.merge_and_unload(safe_merge=True)
    assert not any(isinstance(module, SppLinear) for module in merged.modules())
    assert torch.equal(merged(ids).logits, expected)
    after = weights(merged)
    for name, weight in before.items():
        assert torch.equal(after[name] == 0, weight == 0), name
    assert any(not torch.equal(after[name], weight) for name, weight in before.items())


def test_unmerging_restores_every_bit(pruned: nn.Module) -> None:
    before = weights(pruned)
    model = get_peft_model(pruned, config())
    model.merge_adapter()
    assert not all(torch.equal(weights(model)[name], weight) for name, weight in before.items())
    model.unmerge_adapter()
    assert all(torch.equal(weights(model)[name], weight) for name, weight in before.items())


def test_safe_merge_refuses_a_broken_adapter(pruned: nn.Module) -> None:
    model = get_peft_model(pruned, config())
    next(p for n, p in model.named_parameters() if "spp_beta" in n).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        model.merge_and_unload(safe_merge=True)


def test_two_adapters_switch_and_disable(pruned: nn.Module, ids: Tensor) -> None:
    plain = pruned(ids).logits
    torch.manual_seed(0)
    model = get_peft_model(pruned, config(), adapter_name="first").eval()
    first = model(ids).logits
    model.add_adapter("second", config(r=2))
    assert torch.equal(model(ids).logits, first)
    model.set_adapter("second")
    second = model(ids).logits
    assert not torch.equal(first, second)
    model.set_adapter("first")
    assert torch.equal(model(ids).logits, first)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, plain)
    model.delete_adapter("second")
    assert torch.equal(model(ids).logits, first)


def test_two_active_adapters_merge_into_their_sum(pruned: nn.Module, ids: Tensor) -> None:
    before = weights(pruned)
    model = get_peft_model(pruned, config(), adapter_name="first").eval()
    model.add_adapter("second", config(r=2))
    model.base_model.set_adapter(["first", "second"])
    expected = model(ids).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
    after = weights(merged)
    assert all(torch.equal(after[name] == 0, weight == 0) for name, weight in before.items())


def test_training_with_gradient_checkpointing_gives_the_same_gradients(pruned: nn.Module, ids: Tensor) -> None:
    model = get_peft_model(pruned, config(dropout=0.2)).train()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(1)
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    for before, after in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(before, after)


@pytest.mark.parametrize(
    ("build", "count"),
    [
        (lambda: transformers.LlamaConfig(), 19_578_880),
        (lambda: transformers.LlamaConfig(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40), 30_638_080),
        (lambda: transformers.LlamaConfig(hidden_size=6656, intermediate_size=17920, num_hidden_layers=60), 59_688_960),
        (lambda: transformers.LlamaConfig(hidden_size=8192, intermediate_size=22016, num_hidden_layers=80), 97_894_400),
        (
            lambda: transformers.LlamaConfig(
                hidden_size=8192,
                intermediate_size=28672,
                num_hidden_layers=80,
                num_attention_heads=64,
                num_key_value_heads=8,
            ),
            106_332_160,
        ),
    ],
    ids=["7B", "13B", "30B", "65B", "2-70B"],
)
def test_published_parameter_counts(build: object, count: int) -> None:
    llama_config = build()  # type: ignore[operator]
    for heads in (32, 40, 52, 64):
        if llama_config.hidden_size == heads * 128:
            llama_config.num_attention_heads = heads
            llama_config.head_dim = 128
            if llama_config.num_key_value_heads != 8:
                llama_config.num_key_value_heads = heads
    llama_config.num_hidden_layers, depth = 1, llama_config.num_hidden_layers
    with init_empty_weights():
        model = get_peft_model(AutoModelForCausalLM.from_config(llama_config), SppConfig(r=16))
    assert model.get_nb_trainable_parameters()[0] * depth == count


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"r": 0}, "r = 0"), ({"dropout": 1.0}, "not in \\[0, 1\\)")],
)
def test_bad_configurations(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_bad_targets(pruned: nn.Module) -> None:
    with pytest.raises(ValueError, match="r = 64 exceeds the 16 output features"):
        get_peft_model(pruned, config(r=64, target_modules=["k_proj"]))
    with pytest.raises(ValueError, match=r"adapts nn.Linear layers; target model.embed_tokens"):
        get_peft_model(pruned, config(target_modules=["embed_tokens"]))


@pytest.mark.slow
@pytest.mark.parametrize("statement", ["import sppctl, peft", "import peft, sppctl", "import sppctl, peft.mapping"])
def test_importing_sppctl_registers_spp_whatever_the_order(statement: str) -> None:
    code = f"{statement}; from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as m; assert 'SPP' in m"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_peft_itself_is_untouched() -> None:
    assert "SPP" not in [kind.value for kind in peft.PeftType]
