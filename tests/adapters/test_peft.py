"""Our adapters as stock PEFT methods: wrapping, saving, loading, several of them, merging; SPP's ablations."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from accelerate import init_empty_weights
from conftest import PROJECTIONS, kept_for_backward, pruned_llama
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sppctl import MaskedFullConfig, MaskedLoraConfig, SppConfig, SteConfig
from sppctl.adapters.linear import SparseLinear
from sppctl.adapters.spp import SppLinear

CONFIGS = {
    "spp": lambda: SppConfig(r=4, dropout=0.1),
    "spp without beta": lambda: SppConfig(r=3, beta=False, dropout=0.1),
    "spp from ones": lambda: SppConfig(r=3, init_weights="ones", dropout=0.0),
    "masked_lora": lambda: MaskedLoraConfig(r=3, dropout=0.1),
    "masked_full": lambda: MaskedFullConfig(),
    "ste": lambda: SteConfig(pattern="2:4"),
    "ste by row": lambda: SteConfig(),
}
methods = pytest.mark.parametrize("method", CONFIGS)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def pruned(request: pytest.FixtureRequest, llama: Path) -> nn.Module:
    """The tiny Llama with its projections pruned 2:4."""
    return pruned_llama(llama, request.param)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 250, (2, 12), generator=torch.Generator().manual_seed(0))


def random_spp(**changes: Any) -> SppConfig:
    """Of an adapter that is not at the pruned model."""
    return SppConfig(**{"r": 4, "dropout": 0.0, "init_weights": False} | changes)


def trained(model: Any, ids: Tensor, steps: int = 3) -> Any:
    """A few steps of Adam, large enough to move every weight."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    model.train()
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@methods
def test_a_new_adapter_leaves_the_output_bit_identical(pruned: nn.Module, ids: Tensor, method: str) -> None:
    before = pruned(ids).logits
    model = get_peft_model(pruned, CONFIGS[method]())
    assert torch.equal(model(ids).logits, before)
    assert torch.equal(model.train()(ids).logits, before), "with dropout, too"
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert sum(isinstance(module, SparseLinear) for module in model.modules()) == 2 * 7
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(model.base_model.prefix in name for name in trainable)


@methods
def test_round_trip_and_merging_are_bit_identical(pruned: nn.Module, ids: Tensor, method: str, tmp_path: Path) -> None:
    base = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    model = trained(get_peft_model(pruned, CONFIGS[method]()), ids)
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    for without_a_second_copy in (False, True):
        fresh = AutoModelForCausalLM.from_config(pruned.config).to(expected.dtype)
        fresh.load_state_dict(base)
        assert not torch.equal(fresh(ids).logits, expected)
        loaded = PeftModel.from_pretrained(fresh, tmp_path, low_cpu_mem_usage=without_a_second_copy)
        assert torch.equal(loaded.eval()(ids).logits, expected)
    model.merge_adapter(safe_merge=True)
    assert torch.equal(model(ids).logits, expected)
    model.unmerge_adapter()
    for name, tensor in model.get_base_model().state_dict().items():
        if ".base_layer." in name:
            assert torch.equal(tensor, base[name.replace(".base_layer", "")]), name
    merged = model.merge_and_unload()
    assert not any(isinstance(module, SparseLinear) for module in merged.modules())
    assert torch.equal(merged(ids).logits, expected)
    for name, tensor in merged.state_dict().items():
        if name.split(".")[-2] in PROJECTIONS and not method.startswith("ste"):
            assert torch.equal(tensor == 0, base[name] == 0), name


def test_a_saved_configuration_is_read_back(pruned: nn.Module, tmp_path: Path) -> None:
    config = SppConfig(r=4, scale=1.5, target_modules=["q_proj", "down_proj"])
    get_peft_model(pruned, config).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, SppConfig)
    assert (loaded.r, loaded.scale, loaded.target_modules) == (4, 1.5, {"q_proj", "down_proj"})


@methods
def test_without_memory_for_weights_only_shapes_are_made(llama: Path, method: str) -> None:
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(llama).config)
        peft_model = get_peft_model(model, CONFIGS[method]())
    real = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), CONFIGS[method]())
    assert peft_model.get_nb_trainable_parameters() == real.get_nb_trainable_parameters()
    assert all(p.is_meta for p in peft_model.parameters())


@methods
def test_checkpointed_gradients_are_the_same(pruned: nn.Module, ids: Tensor, method: str) -> None:
    model = trained(get_peft_model(pruned, CONFIGS[method]()), ids, steps=1).train()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(1)  # of the dropout
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))


def test_weights_that_replace_each_other_have_no_sum(pruned: nn.Module, ids: Tensor) -> None:
    model = get_peft_model(pruned, MaskedFullConfig(), adapter_name="first")
    model.add_adapter("second", MaskedFullConfig())
    assert torch.isfinite(model(ids).logits).all()
    model.base_model.set_adapter(["first", "second"])
    with pytest.raises(ValueError, match="first, second each replace the whole weight"):
        model(ids)


def test_a_layers_own_pattern_wins(pruned: nn.Module) -> None:
    patterns = {"model.layers.0.mlp.up_proj": "1:4"}
    model = get_peft_model(pruned, SteConfig(pattern="2:4", patterns=patterns))
    mlp = model.get_base_model().model.layers[0].mlp
    assert mlp.up_proj.ste_mask["default"].float().mean() == 0.25
    assert mlp.gate_proj.ste_mask["default"].float().mean() == 0.5


@pytest.mark.parametrize("config", [SppConfig(r=2), MaskedLoraConfig(r=2), MaskedFullConfig(), SteConfig()])
def test_rows_with_adapters_of_their_own_are_refused(pruned: nn.Module, ids: Tensor, config: Any) -> None:
    model = get_peft_model(pruned, config)
    with pytest.raises(ValueError, match=r"adapter_names: .* the same adapters for all rows"):
        model(ids, adapter_names=["default", "__base__"])


def test_safe_merge_refuses_a_broken_adapter(pruned: nn.Module) -> None:
    model = get_peft_model(pruned, random_spp())
    next(p for n, p in model.named_parameters() if "spp_beta" in n).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        model.merge_and_unload(safe_merge=True)


def test_a_merged_model_may_be_converted(llama: Path, ids: Tensor) -> None:
    model = get_peft_model(pruned_llama(llama), random_spp(), adapter_name="first").eval()
    model.add_adapter("second", random_spp(r=2))
    before = {name: parameter.clone() for name, parameter in model.named_parameters() if "base_layer" in name}
    model.merge_adapter(["first"])
    model.bfloat16()
    model.merge_adapter(["second"])
    assert model(ids).logits.dtype == torch.bfloat16
    model.unmerge_adapter()
    after = {name: parameter for name, parameter in model.named_parameters() if "base_layer" in name}
    assert all(torch.equal(parameter, before[name].bfloat16()) for name, parameter in after.items())


def test_two_adapters_switch_and_disable(pruned: nn.Module, ids: Tensor) -> None:
    plain = pruned(ids).logits
    torch.manual_seed(0)
    model = get_peft_model(pruned, random_spp(), adapter_name="first").eval()
    first = model(ids).logits
    model.add_adapter("second", random_spp(r=2))
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


def test_two_active_adapters_merge_into_their_sum(llama: Path, ids: Tensor) -> None:
    pruned = pruned_llama(llama)
    before = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    model = get_peft_model(pruned, random_spp(), adapter_name="first").eval()
    model.add_adapter("second", random_spp(r=2))
    model.base_model.set_adapter(["first", "second"])
    expected = model(ids).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(tensor == 0, before[name] == 0) for name, tensor in merged.state_dict().items())


@pytest.mark.parametrize(
    ("shape", "heads", "count"),
    [
        ((4096, 11008, 32), (32, 32), 19_578_880),
        ((5120, 13824, 40), (40, 40), 30_638_080),
        ((6656, 17920, 60), (52, 52), 59_688_960),
        ((8192, 22016, 80), (64, 64), 97_894_400),
        ((8192, 28672, 80), (64, 8), 106_332_160),
    ],
    ids=["7B", "13B", "30B", "65B", "2-70B"],
)
def test_published_parameter_counts(shape: tuple[int, int, int], heads: tuple[int, int], count: int) -> None:
    hidden, intermediate, depth = shape
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=1,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
    )
    with init_empty_weights():
        model = get_peft_model(AutoModelForCausalLM.from_config(config), SppConfig(r=16))
    assert model.get_nb_trainable_parameters()[0] * depth == count


@pytest.mark.parametrize("make", [SppConfig, MaskedLoraConfig])
def test_bad_configurations(make: Any) -> None:
    for scale in (float("nan"), float("inf"), 0.0):
        with pytest.raises(ValueError, match="scale = "):
            make(scale=scale)
    with pytest.raises(ValueError, match="r = 0"):
        make(r=0)
    with pytest.raises(ValueError, match=r"not in \[0, 1\)"):
        make(dropout=1.0)


def test_bad_targets(pruned: nn.Module) -> None:
    with pytest.raises(ValueError, match="r = 64 exceeds the 16 output features"):
        get_peft_model(pruned, SppConfig(r=64, target_modules=["k_proj"]))
    with pytest.raises(ValueError, match=r"adapts nn.Linear layers; target model.embed_tokens"):
        get_peft_model(pruned, SppConfig(target_modules=["embed_tokens"]))


@pytest.mark.slow
@pytest.mark.parametrize("statement", ["import sppctl, peft", "import peft, sppctl", "import sppctl, peft.mapping"])
def test_importing_sppctl_registers_spp_whatever_the_order(statement: str) -> None:
    code = f"{statement}; from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as m; assert 'SPP' in m"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_peft_itself_is_untouched() -> None:
    assert "SPP" not in [kind.value for kind in peft.PeftType]


# --- ablations of SPP -------------------------------------------------------------------------------------------------


def spp(out_features: int, in_features: int, **options: Any) -> tuple[SppLinear, Tensor]:
    """A layer with a random pruned weight, and that weight."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(in_features, out_features, bias=False).requires_grad_(False)
    weight = torch.randn(out_features, in_features, generator=generator)
    weight = weight + 0.3 * weight.sign()  # away from zero, or the target below would need endless factors
    linear.weight.data = weight * (torch.rand(weight.shape, generator=generator) < 0.5)
    torch.manual_seed(0)
    return SppLinear(linear, "default", SppConfig(dropout=0.0, **options)), linear.weight.data.clone()


def test_without_beta_the_merged_weight_is_w_plus_s_w_alpha() -> None:
    layer, weight = spp(13, 8, r=4, beta=False, scale=3.0, init_weights=False)
    alpha = layer.spp_alpha["default"].detach()
    assert alpha.abs().sum() > 0
    x = torch.randn(5, 8)
    expected = torch.stack(
        [weight[i] + 3.0 * weight[i] * alpha[i * 4 // 13] for i in range(13)]
    )  # row by row, whatever r divides
    layer(x).sum().backward()
    assert layer.spp_alpha["default"].grad is not None
    layer.merge()
    torch.testing.assert_close(layer.weight.data, expected)
    torch.testing.assert_close(layer(x), x @ expected.t())


STARTS = [(True, True, False, 0), (True, "ones", True, 1), (True, False, False, None)]
STARTS += [(False, True, True, None), (False, "ones", True, None), (False, False, False, None)]


@pytest.mark.parametrize(("beta", "start", "alpha_is_zero", "beta_value"), STARTS)
def test_where_training_starts(beta: bool, start: Any, alpha_is_zero: bool, beta_value: int | None) -> None:
    layer, weight = spp(12, 8, r=4, beta=beta, init_weights=start)
    alpha = layer.spp_alpha["default"]
    assert bool((alpha == 0).all()) == alpha_is_zero
    assert alpha.abs().max() <= 8**-0.5
    if beta_value is not None:
        assert (layer.spp_beta["default"] == beta_value).all()
    assert torch.equal(layer.effective_weight(weight, ["default"]), weight) == (start is not False)


def test_without_beta_nothing_is_made_anew_in_a_forward_pass() -> None:
    layer, _ = spp(12, 8, r=4, beta=False, init_weights=False)
    own = {tensor.data_ptr() for tensor in (*layer.parameters(), *layer.buffers())}
    kept = kept_for_backward(lambda: layer(torch.ones(2, 8)))
    assert {tensor.data_ptr() for tensor in kept if tensor.shape != (2, 8)} <= own
    assert not any("ones" in name for name in layer.state_dict())


def test_the_start_is_named_as_in_the_configuration() -> None:
    starts = {name: SppConfig(init_weights=name).init_weights for name in ("zero_beta", "random", "ones")}
    assert starts == {"zero_beta": True, "random": False, "ones": "ones"}
    numbers: Any = (1, 0)  # equal to True and False
    assert [SppConfig(init_weights=number).init_weights is bool(number) for number in numbers] == [True, True]
    with pytest.raises(ValueError, match="init_weights = 'gaussian' is not one of"):
        SppConfig(init_weights="gaussian")


def test_with_a_group_for_each_row_any_weight_of_the_same_pattern_is_reached() -> None:
    layer, weight = spp(10, 6, r=10, init_weights="ones")
    target = torch.randn(10, 6, generator=torch.Generator().manual_seed(5)) * (weight != 0)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")
    x = torch.eye(6)

    def loss() -> Tensor:
        optimizer.zero_grad()
        distance = (layer(x) - target.t()).square().sum()
        distance.backward()
        return distance

    first = loss().item()
    optimizer.step(loss)
    assert first > 1
    assert loss().item() < 1e-8
    layer.merge()
    torch.testing.assert_close(layer.weight.data, target, rtol=1e-3, atol=1e-4)
