"""Our adapters besides SPP as stock PEFT methods, and SPP's ablations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from conftest import PROJECTIONS, kept_for_backward, pruned_llama
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sppctl import MaskedFullConfig, MaskedLoraConfig, SppConfig, SteConfig
from sppctl.adapters.linear import SparseLinear
from sppctl.adapters.spp import SppLinear

CONFIGS = {
    "masked_lora": lambda: MaskedLoraConfig(r=3, dropout=0.0, task_type="CAUSAL_LM"),
    "masked_full": lambda: MaskedFullConfig(task_type="CAUSAL_LM"),
    "ste": lambda: SteConfig(pattern="2:4", task_type="CAUSAL_LM"),
    "ste by row": lambda: SteConfig(task_type="CAUSAL_LM"),
    "spp without beta": lambda: SppConfig(r=3, beta=False, dropout=0.0, task_type="CAUSAL_LM"),
    "spp from ones": lambda: SppConfig(r=3, init_weights="ones", dropout=0.0, task_type="CAUSAL_LM"),
}
methods = pytest.mark.parametrize("method", CONFIGS)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def pruned(request: pytest.FixtureRequest, llama: Path) -> nn.Module:
    """The tiny Llama with its projections pruned 2:4."""
    return pruned_llama(llama, request.param)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 250, (2, 12), generator=torch.Generator().manual_seed(0))


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
    fresh = AutoModelForCausalLM.from_config(pruned.config).to(expected.dtype)
    fresh.load_state_dict(base)
    assert not torch.equal(fresh(ids).logits, expected)
    assert torch.equal(PeftModel.from_pretrained(fresh, tmp_path).eval()(ids).logits, expected)
    model.merge_adapter(safe_merge=True)
    assert torch.equal(model(ids).logits, expected)
    model.unmerge_adapter()
    for name, tensor in model.get_base_model().state_dict().items():
        if ".base_layer." in name:
            assert torch.equal(tensor, base[name.replace(".base_layer", "")]), name
    merged = model.merge_and_unload()
    assert torch.equal(merged(ids).logits, expected)
    for name, tensor in merged.state_dict().items():
        if name.split(".")[-2] in PROJECTIONS and not method.startswith("ste"):
            assert torch.equal(tensor == 0, base[name] == 0), name


@methods
def test_without_memory_for_weights_only_shapes_are_made(llama: Path, method: str) -> None:
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(llama).config)
        peft_model = get_peft_model(model, CONFIGS[method]())
    real = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), CONFIGS[method]())
    assert peft_model.get_nb_trainable_parameters() == real.get_nb_trainable_parameters()
    assert all(p.is_meta for p in peft_model.parameters())


@methods
def test_loading_without_a_second_copy(pruned: nn.Module, ids: Tensor, method: str, tmp_path: Path) -> None:
    base = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    model = trained(get_peft_model(pruned, CONFIGS[method]()), ids)
    model.save_pretrained(tmp_path)
    fresh = AutoModelForCausalLM.from_config(pruned.config).to(pruned.dtype)
    fresh.load_state_dict(base)
    loaded = PeftModel.from_pretrained(fresh, tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@methods
def test_checkpointed_gradients_are_the_same(pruned: nn.Module, ids: Tensor, method: str) -> None:
    model = trained(get_peft_model(pruned, CONFIGS[method]()), ids, steps=1).train()

    def gradients() -> list[Tensor]:
        model.zero_grad()
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


@pytest.mark.parametrize("make", [SppConfig, MaskedLoraConfig])
def test_bad_configurations(make: Any) -> None:
    for scale in (float("nan"), float("inf"), 0.0):
        with pytest.raises(ValueError, match="scale = "):
            make(scale=scale)
    with pytest.raises(ValueError, match="r = 0"):
        make(r=0)
    with pytest.raises(ValueError, match=r"not in \[0, 1\)"):
        make(dropout=1.0)


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


@pytest.mark.parametrize(("beta", "count"), [(True, 4 * 8 + 12), (False, 4 * 8)])
def test_parameters_are_m_plus_rn_or_rn_without_beta(beta: bool, count: int) -> None:
    layer, _ = spp(12, 8, r=4, beta=beta)
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == count


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
    torch.testing.assert_close(layer.get_base_layer().weight.data, expected)
    torch.testing.assert_close(layer(x), x @ expected.t())


@pytest.mark.parametrize(
    ("beta", "start", "alpha_is_zero", "beta_value"),
    [
        (True, True, False, 0),
        (True, "ones", True, 1),
        (True, False, False, None),
        (False, True, True, None),
        (False, "ones", True, None),
        (False, False, False, None),
    ],
)
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
    torch.testing.assert_close(layer.get_base_layer().weight.data, target, rtol=1e-3, atol=1e-4)
    fewer, _ = spp(10, 6, r=5, init_weights="ones")
    assert fewer.spp_alpha["default"].shape == (5, 6)
