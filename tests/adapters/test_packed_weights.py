"""Adapters on packed weights: the same bits as on dense ones, forward and backward, and refusals of what cannot be."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROJECTIONS, kept_for_backward, pruned_llama
from peft import get_peft_model
from torch import Tensor, nn

from sppctl import MaskedFullConfig, MaskedLoraConfig, SppConfig, SteConfig
from sppctl.adapters import masked
from sppctl.adapters.masked_lora.kernel import masked_lora_linear
from sppctl.adapters.spp import kernel
from sppctl.adapters.spp.kernel import spp_linear
from sppctl.packed.format import RAW, PackedWeight, pack
from sppctl.packed.linear import PackedLinear, Weight

LINEARS = {"spp": spp_linear, "masked_lora": masked_lora_linear}
SHAPES = {"spp": lambda m, n, r: ((r, n), (m, 1)), "masked_lora": lambda m, n, r: ((r, n), (m, r))}
methods = pytest.mark.parametrize("method", LINEARS)
dropouts = pytest.mark.parametrize("dropout", [0.0, 0.2])


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight_of(m: int, n: int, pattern: str, dtype: torch.dtype) -> Tensor:
    weight, scores = random(m, n, seed=0), random(m, n, seed=1)
    if ":" in pattern:
        keep, group = map(int, pattern.split(":"))
        dropped = scores.view(m, -1, group).argsort(-1)[..., keep:]
        weight.view(m, -1, group).scatter_(-1, dropped, 0)
    else:
        weight[scores < torch.quantile(scores, float(pattern))] = 0
    weight[0, :2] = torch.tensor([-0.0, 1e-41])  # subnormal
    return weight.to(dtype)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(RAW[tensor.dtype.itemsize])


def results(
    method: str,
    weight: Weight,
    x: Tensor,
    factors: list[tuple[Tensor, ...]],
    dropout: float,
    autocast: bool = False,
) -> list[Tensor]:
    """y and the gradients of x, the bias and all factors."""
    x, bias = x.clone().requires_grad_(), random(weight.shape[0], seed=3).to(x.dtype).requires_grad_()
    trained = [tuple(factor.clone().requires_grad_() for factor in pair) for pair in factors]
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = LINEARS[method](x, weight, bias, [(*pair, 2.0, dropout) for pair in trained])
    wanted = (x, bias, *(factor for pair in trained for factor in pair))
    return [y, *torch.autograd.grad(y, wanted, random(*y.shape, seed=4).to(y.dtype))]


@methods
@dropouts
@pytest.mark.parametrize("pattern", ["2:4", "2:8", "0.5", "0.75"])
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16", "bfloat16 in float32"])
@pytest.mark.parametrize("chunk", [100, 1 << 18])
def test_every_bit_is_that_of_the_dense_weight(
    method: str, dropout: float, pattern: str, dtypes: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (kernel, masked):
        monkeypatch.setattr(module, "CPU_CHUNK", chunk)
    stored, dtype = (getattr(torch, name) for name in (dtypes.split()[0], dtypes.split()[-1]))
    weight = weight_of(13, 40, pattern, stored)
    x = random(2, 5, 40, seed=2).to(dtype)
    factors = [tuple(random(*shape, seed=5 + i) for shape in SHAPES[method](13, 40, 3 + i)) for i in range(2)]
    for adapters in (factors[:1], factors):
        dense = results(method, weight.to(dtype), x, adapters, dropout)
        packed = results(method, pack(weight, dtype), x, adapters, dropout)
        for one, other in zip(dense, packed, strict=True):
            assert torch.equal(bits(one), bits(other))


@methods
@dropouts
def test_under_autocast(method: str, dropout: float) -> None:
    """Where W is not unpacked in the dtype of the product without rounding."""
    weight = weight_of(13, 40, "0.75", torch.float32)
    factors = [tuple(random(*shape, seed=5) for shape in SHAPES[method](13, 40, 3))]
    x = random(5, 40, seed=2)
    dense = results(method, weight, x, factors, dropout, autocast=True)
    packed = results(method, pack(weight), x, factors, dropout, autocast=True)
    for one, other in zip(dense, packed, strict=True):
        assert torch.equal(bits(one), bits(other))


@methods
@dropouts
def test_nothing_but_the_input_is_kept_for_backward(method: str, dropout: float) -> None:
    packed = pack(weight_of(64, 32, "2:8", torch.float32))
    x = random(5, 32, seed=2).requires_grad_()
    factors = [random(*shape, seed=5).requires_grad_() for shape in SHAPES[method](64, 32, 3)]
    kept = kept_for_backward(lambda: LINEARS[method](x, packed, None, [(*factors, 2.0, dropout)]))
    assert {tensor.data_ptr() for tensor in kept} <= {tensor.data_ptr() for tensor in (x, *factors)}


def peak_of_tensors(call: Callable[[], object]) -> int:
    """Bytes of the tensors that exist at the same time at most, without those from before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_packed_layer_needs_one_matrix_of_the_weights_size(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16: the effective weight, and in its place dy^T x, the branch's weight and W in turn."""
    m, n = 2048, 512
    monkeypatch.setattr(kernel, "CPU_CHUNK", 1 << 12)
    weight = weight_of(m, n, "2:8", torch.bfloat16)
    x = random(4, n, seed=2).bfloat16().requires_grad_()
    factors = [random(*shape, seed=5).requires_grad_() for shape in SHAPES["spp"](m, n, 3)]
    peaks = {}
    for name, frozen in (("dense", weight), ("packed", pack(weight))):

        def step(frozen: Weight = frozen) -> None:
            y = spp_linear(x, frozen, None, [(*factors, 2.0, dropout)])
            torch.autograd.grad(y.float().sum(), (x, *factors))

        peaks[name] = peak_of_tensors(step)
    assert 2 * m * n <= peaks["packed"] < 1.2 * 2 * m * n
    assert peaks["packed"] < peaks["dense"] + 0.1 * 2 * m * n


# --- models -----------------------------------------------------------------------------------------------------------


def pack_model(model: nn.Module) -> nn.Module:
    """The model with its pruned projections packed."""
    for name, module in list(model.named_modules()):
        if name.split(".")[-1] in PROJECTIONS:
            owner = model.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.split(".")[-1], PackedLinear(pack(module.weight), module.bias))
    return model


CONFIGS: dict[str, Callable[[], Any]] = {
    "spp": lambda: SppConfig(r=4, dropout=0.1, init_weights=False),
    "spp without beta": lambda: SppConfig(r=3, beta=False, dropout=0.0, init_weights=False),
    "masked_lora": lambda: MaskedLoraConfig(r=3, dropout=0.1, init_weights=False),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_trains_to_the_same_bits(llama: Path, name: str, checkpointing: bool, dtype: torch.dtype) -> None:
    ids = torch.randint(0, 250, (2, 12), generator=torch.Generator().manual_seed(0))
    states = []
    for prepare in (lambda model: model, pack_model):
        torch.manual_seed(3)
        model = get_peft_model(prepare(pruned_llama(llama, dtype)), CONFIGS[name]())
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
        model.train()
        for _ in range(3):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        state = {key: p.detach() for key, p in model.named_parameters() if p.requires_grad}
        states.append(state | {"logits": model.eval()(ids).logits.detach()})
    assert states[0].keys() == states[1].keys()
    for key, dense in states[0].items():
        assert torch.equal(bits(dense), bits(states[1][key])), key


def test_merging_in_memory_is_refused(llama: Path) -> None:
    model = get_peft_model(pack_model(pruned_llama(llama, torch.float32)), SppConfig(r=4))
    with pytest.raises(ValueError, match="a packed weight cannot be merged in memory; sppctl merge works on the files"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="a packed weight cannot be merged in memory"):
        model.merge_and_unload()


@pytest.mark.parametrize("config", [MaskedFullConfig, SteConfig])
def test_methods_that_need_dense_weights_are_refused(llama: Path, config: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"Model needs dense weights, but model.layers.0.\w+.\w+ is packed"):
        get_peft_model(pack_model(pruned_llama(llama, torch.float32)), config())


def test_a_packed_weight_is_read_like_a_tensor() -> None:
    layer = PackedLinear(pack(weight_of(13, 40, "0.5", torch.bfloat16), torch.float32))
    assert isinstance(layer.weight, PackedWeight)
    assert (layer.weight.shape, layer.weight.dtype, layer.weight.device.type) == ((13, 40), torch.float32, "cpu")
