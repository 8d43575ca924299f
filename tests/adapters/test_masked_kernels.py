"""Masked LoRA, masked full tuning and dynamic masks against dense float64 formulas with autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import kept_for_backward
from torch import Tensor, nn

from sppctl import SteConfig
from sppctl.adapters import masked
from sppctl.adapters.masked import round_under_mask
from sppctl.adapters.masked_full import kernel as masked_full
from sppctl.adapters.masked_full.kernel import masked_linear
from sppctl.adapters.masked_lora import kernel as masked_lora
from sppctl.adapters.masked_lora.kernel import masked_lora_linear
from sppctl.adapters.products import dropped_places
from sppctl.adapters.ste import SteLinear
from sppctl.pruners.masks import keep_largest, keep_largest_of_rows

SHAPES = [(12, 8, 4), (13, 8, 1), (7, 6, 9)]  # out, in, r: also a rank above both dimensions
SCALE = 1.5


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Pruned weight, bias, A, B, V and x."""
    out_features, in_features, r = shape
    weight = random((out_features, in_features), 0)
    weight[random(weight.shape, 1) < 0] = 0
    a, b = random((r, in_features), 2).requires_grad_(), random((out_features, r), 3).requires_grad_()
    values = random(weight.shape, 4).requires_grad_()
    x = random((2, 3, in_features), 5).to(dtype).requires_grad_()
    return weight.to(dtype), random((out_features,), 6).to(dtype), a, b, values, x


def literal_delta(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """s (W != 0) * (B A), element by element; differentiable."""
    rows = []
    for i in range(weight.shape[0]):
        row = []
        for j in range(weight.shape[1]):
            product = sum(b[i, k] * a[k, j] for k in range(a.shape[0]))
            row.append(SCALE * product if weight[i, j] != 0 else torch.zeros((), dtype=a.dtype))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def same_gradients(y: Tensor, ours: tuple[Tensor, ...], expected: Tensor, theirs: tuple[Tensor, ...]) -> None:
    upstream = random(y.shape, 7)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(y, ours, upstream)
    wanted = torch.autograd.grad(expected, theirs, upstream.double())
    for gradient, reference in zip(gradients, wanted, strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient.double(), reference, rtol=1e-4, atol=1e-4)


def doubles(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.detach().double().requires_grad_() for tensor in tensors)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk", [5, 40, 1 << 18])
@pytest.mark.parametrize("with_bias", [True, False])
def test_masked_lora_equals_the_triple_loop(
    shape: tuple[int, int, int], chunk: int, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masked, "CPU_CHUNK", chunk)
    weight, bias, a, b, _, x = layer(shape)
    y = masked_lora_linear(x, weight, bias if with_bias else None, [(a, b, SCALE, 0.0)])
    x64, a64, b64 = doubles(x, a, b)
    effective = weight.double() + literal_delta(weight, a64, b64)
    expected = F.linear(x64, effective, bias.double() if with_bias else None)
    same_gradients(y, (x, a, b), expected, (x64, a64, b64))


def test_masked_loras_dropout_is_on_the_adapter_branch_alone() -> None:
    weight, _, a, b, _, x = layer((12, 8, 4))
    p = 0.4
    torch.manual_seed(11)
    y = masked_lora_linear(x, weight, None, [(a, b, SCALE, p)])
    torch.manual_seed(11)
    seed = int(torch.randint(0, 2**62, (1,)))
    mask = torch.ones(x.shape, dtype=torch.float64)
    mask.view(-1)[dropped_places(x, p, seed)] = 0
    x64, a64, b64 = doubles(x, a, b)
    expected = F.linear(x64, weight.double()) + F.linear(x64 * mask / (1 - p), literal_delta(weight, a64, b64))
    same_gradients(y, (x, a, b), expected, (x64, a64, b64))


def test_several_masked_loras_add_up() -> None:
    weight, bias, a, b, _, x = layer((12, 8, 4))
    a2, b2 = random((3, 8), 8), random((12, 3), 9)
    both = masked_lora_linear(x, weight, bias, [(a, b, SCALE, 0.0), (a2, b2, SCALE, 0.0)])
    delta = literal_delta(weight, a, b) + literal_delta(weight, a2, b2)
    torch.testing.assert_close(both, F.linear(x, weight + delta, bias), rtol=1e-4, atol=1e-4)
    merged = masked_lora.effective_weight(weight, [(a, b, SCALE), (a2, b2, SCALE)], torch.float32)
    torch.testing.assert_close(merged, (weight + delta).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk", [5, 1 << 18])
@pytest.mark.parametrize("straight_through", [False, True])
def test_a_trained_weight_under_a_mask_equals_the_dense_formula(
    shape: tuple[int, int, int], chunk: int, straight_through: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masked, "CPU_CHUNK", chunk)
    weight, bias, _, _, values, x = layer(shape)
    y = masked_linear(x, values, weight, weight, bias, straight_through=straight_through)
    x64, v64 = doubles(x, values)
    mask = (weight != 0).double()
    # straight through: as if the mask were added as a constant, so that its factor is in no gradient of V
    effective = v64 + (v64 * mask - v64).detach() if straight_through else v64 * mask
    same_gradients(y, (x, values), F.linear(x64, effective, bias.double()), (x64, v64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_effective_weight_is_rounded_once(dtype: torch.dtype) -> None:
    weight, bias, a, b, values, x = layer((12, 8, 4), dtype)
    exact = (weight.double() + literal_delta(weight, a.double(), b.double())).float().to(dtype)
    ours = masked_lora.effective_weight(weight, [(a, b, SCALE)], dtype)
    torch.testing.assert_close(ours, exact.detach(), rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)
    assert torch.equal(masked_lora_linear(x, weight, bias, [(a, b, SCALE, 0.0)]), F.linear(x, ours, bias))
    assert torch.equal(ours == 0, weight == 0)
    full = masked_full.effective_weight(values, weight, dtype)
    assert torch.equal(full, (values * (weight != 0)).to(dtype))
    assert torch.equal(masked_linear(x, values, weight, weight, bias), F.linear(x, full, bias))


@pytest.mark.parametrize(("dtype", "smallest"), [(torch.bfloat16, 2.0**-126), (torch.float16, 2.0**-24)])
def test_a_kept_weight_that_lands_on_zero_stays_kept(dtype: torch.dtype, smallest: float) -> None:
    values, mask = torch.tensor([[0.0, -0.0, 1e-44, 2.0, 3.0]]), torch.tensor([[1.0, 0.5, -1.0, 2.0, 0.0]])
    rounded = round_under_mask(values, mask, dtype)
    assert rounded[0].tolist() == [smallest, -smallest, smallest, 2.0, 0.0]
    assert values[0].tolist()[3:] == [2.0, 3.0]


@pytest.mark.parametrize("method", ["masked_lora", "masked_lora with dropout", "masked_full", "ste"])
def test_nothing_but_the_input_is_kept_for_backward(method: str) -> None:
    weight, _, a, b, values, x = layer((64, 32, 4))
    mask = weight != 0
    calls: dict[str, Callable[[], Tensor]] = {
        "masked_lora": lambda: masked_lora_linear(x, weight, None, [(a, b, SCALE, 0.0)]),
        "masked_lora with dropout": lambda: masked_lora_linear(x, weight, None, [(a, b, SCALE, 0.2)]),
        "masked_full": lambda: masked_linear(x, values, weight, weight, None),
        "ste": lambda: masked_linear(x, values, mask, weight, None, straight_through=True),
    }
    kept = kept_for_backward(calls[method])
    own = {tensor.data_ptr() for tensor in (weight, a, b, values, mask, x)}
    assert kept
    assert {tensor.data_ptr() for tensor in kept} <= own


def test_autocast_computes_in_bfloat16_and_returns_float32_gradients() -> None:
    weight, bias, a, b, values, x = layer((12, 8, 4))
    with torch.autocast("cpu", torch.bfloat16):
        low_rank = masked_lora_linear(x, weight, bias, [(a, b, SCALE, 0.0)])
        full = masked_linear(x, values, weight, weight, bias)
    assert low_rank.dtype == full.dtype == torch.bfloat16
    gradients = torch.autograd.grad(low_rank.float().sum() + full.float().sum(), (x, a, b, values))
    assert [gradient.dtype for gradient in gradients] == [torch.float32] * 4


def test_adapters_may_be_bfloat16() -> None:
    """As ZeRO-3 makes them for the forward pass."""
    weight, bias, a, b, _, x = layer((12, 8, 4), torch.bfloat16)
    a16, b16 = (tensor.detach().bfloat16().requires_grad_() for tensor in (a, b))
    a32, b32 = (tensor.detach().float().requires_grad_() for tensor in (a16, b16))
    for dropout in (0.0, 0.3):
        results = []
        for factors in ((a16, b16), (a32, b32)):
            torch.manual_seed(1)
            y = masked_lora_linear(x, weight, bias, [(*factors, SCALE, dropout)])
            results.append((y, *torch.autograd.grad(y.float().sum(), factors)))
        (y, *gradients), (wanted, *wanted_gradients) = results
        assert torch.equal(y, wanted)
        for gradient, reference in zip(gradients, wanted_gradients, strict=True):
            assert torch.equal(gradient, reference.bfloat16())


@pytest.mark.parametrize("method", ["masked_lora", "masked_lora with dropout", "masked_full"])
def test_a_bias_can_be_trained_too(method: str) -> None:
    weight, bias, a, b, values, x = layer((12, 8, 4))
    bias.requires_grad_()
    if method == "masked_full":
        y = masked_linear(x, values, weight, weight, bias)
    else:
        y = masked_lora_linear(x, weight, bias, [(a, b, SCALE, 0.2 if "dropout" in method else 0.0)])
    upstream = random(y.shape, 7)
    (gradient,) = torch.autograd.grad(y, (bias,), upstream)
    torch.testing.assert_close(gradient, upstream.sum((0, 1)))


def test_mismatched_dtypes_are_refused() -> None:
    weight, _, a, b, _, x = layer((12, 8, 4))
    with pytest.raises(ValueError, match=r"input is torch.float64, its weight torch.float32"):
        masked_lora_linear(x.double(), weight, None, [(a, b, SCALE, 0.0)])


# --- masks that are chosen again --------------------------------------------------------------------------------------


def test_each_row_keeps_its_own_number() -> None:
    scores = torch.tensor([[5.0, 1.0, 4.0, 2.0], [1.0, 1.0, 1.0, 1.0], [9.0, 8.0, 7.0, 6.0]])
    mask = keep_largest_of_rows(scores, torch.tensor([2, 3, 0]))
    assert mask.tolist() == [[True, False, True, False], [False, False, False, True], [True] * 4]
    many = random((40, 30), 0)
    assert torch.equal(keep_largest_of_rows(many, torch.full((40,), 11)), keep_largest(many, 11))


def ste_layer(weight: Tensor, **options: str) -> SteLinear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    return SteLinear(linear, "default", SteConfig(**options))


def test_a_ratio_starts_with_the_pruned_mask_and_keeps_the_count_of_every_row() -> None:
    weight = layer((12, 8, 4))[0]
    ste = ste_layer(weight)
    assert torch.equal(ste.ste_mask["default"], weight != 0)
    ste.ste_weight["default"].data = random(weight.shape, 9)
    left = ste.select_mask("default")
    mask = ste.ste_mask["default"]
    assert torch.equal(mask.sum(1), (weight != 0).sum(1))
    assert left == int(((weight != 0) & ~mask).sum()) > 0
    scores = ste.ste_weight["default"].abs()
    for row in range(len(weight)):
        if 0 < mask[row].sum() < mask.shape[1]:
            assert scores[row][mask[row]].min() >= scores[row][~mask[row]].max()


def test_n_of_m_is_chosen_in_every_group() -> None:
    weight = random((6, 8), 0)
    weight[:, [0, 3, 5, 6]] = 0
    ste = ste_layer(weight, pattern="2:4")
    assert torch.equal(ste.ste_mask["default"], weight != 0)
    values = ste.ste_weight["default"].data = random(weight.shape, 1)
    ste.select_mask("default")
    for row in range(6):
        for start in (0, 4):
            group = values[row, start : start + 4].abs()
            chosen = set(group.topk(2).indices.tolist())
            assert {i for i in range(4) if ste.ste_mask["default"][row, start + i]} == chosen


def test_it_starts_at_the_pruned_weight_where_groups_have_zeros_of_their_own() -> None:
    weight = torch.tensor([[1.0, 0, 0, 0, 1, -2, 0, 0], [0, 0, 0, 0, 0, 0, 3, 4]])
    ste = ste_layer(weight, pattern="2:4")
    assert torch.equal(ste.ste_mask["default"], weight != 0)
    assert torch.equal(ste.effective_weight(weight, ["default"]), weight)
    ste.ste_weight["default"].data += 0.5
    ste.select_mask("default")
    assert (ste.ste_mask["default"].view(2, 2, 4).sum(-1) == 2).all()


def test_the_decay_pulls_only_what_is_outside_the_mask() -> None:
    ste = ste_layer(layer((12, 8, 4))[0])
    values, mask = ste.ste_weight["default"], ste.ste_mask["default"]
    values.data = random(values.shape, 2)
    values.grad = random(values.shape, 3)
    before = values.grad.clone()
    ste.add_decay("default", 0.1)
    torch.testing.assert_close(values.grad, before + 0.1 * (~mask) * values.data)


def test_bad_patterns() -> None:
    with pytest.raises(ValueError, match=r"0.5 is not N:M"):
        SteConfig(patterns={"model.layers.0.mlp.up_proj": "0.5"})
