"""Mixtures of experts: each is pruned by the tokens that it received, with a fallback where these are too few."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import agreement, kept_per_group, random_windows, weights_of
from conftest import GROUPED, Prune, byte_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GptOssConfig

from sppctl.prune import block_work
from sppctl.pruners import prune_linear


@pytest.fixture
def base(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("qwen3_moe")


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
def test_an_expert_is_pruned_by_its_tokens(prune: Prune, base: Path) -> None:
    windows = random_windows(8, 24)
    _, after, _ = prune("prune.targets=all-linear", "prune.batch_size=3", base=base, windows=windows)
    before, expected = weights_of(base), {}
    received = tokens_of_experts(base, windows)
    for expert, tokens in enumerate(received):
        name = f"model.layers.0.mlp.experts.{expert}"
        gate, up = (before[f"{name}.{part}.weight"] for part in ("gate_proj", "up_proj"))
        inner = torch.stack([nn.functional.silu(gate @ token) * (up @ token) for token in tokens])
        for part, inputs in (("gate_proj", tokens), ("up_proj", tokens), ("down_proj", inner)):
            weight = f"{name}.{part}.weight"
            expected[weight] = prune_linear(before[weight], inputs, method="wanda", pattern="2:4")
    assert agreement(expected, after, expected) > 0.999
    others = {
        name: prune_linear(before[name], torch.cat(received), method="wanda", pattern="2:4")
        for name in expected
        if "down" not in name
    }
    assert agreement(others, after, others) < 0.99  # by the tokens of all experts


@pytest.mark.parametrize("order", ["block", "module"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "dsnot"])
def test_an_expert_that_saw_too_few_tokens(
    method: str,
    order: str,
    prune: Prune,
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    windows = random_windows(2, 32)
    received = tokens_of_experts(base, windows)
    counts = [len(tokens) for tokens in received]
    limit = max(counts)  # all but the busiest expert saw too few
    # on the way, pruned attention would send tokens elsewhere than the dense one that was counted
    layers = "mlp." if order == "module" else ""
    monkeypatch.setattr(block_work, "MIN_EXPERT_TOKENS", limit)
    options = f"prune.method={method}", f"prune.order={order}", f"prune.targets=['*layers.0.{layers}*']"
    _, after, record = prune(*options, base=base, windows=windows)
    before = weights_of(base)
    expected, by_all = {}, {}
    for expert, count in enumerate(counts):
        for part in ("gate_proj", "up_proj", "down_proj"):
            how = "magnitude" if part == "down_proj" else "inputs of all experts"
            name = f"model.layers.0.mlp.experts.{expert}.{part}"
            expected[name] = f"{how}: saw {count} tokens" if count < limit else None
            assert (kept_per_group(after[f"{name}.weight"]) == 2).all()
            if count < limit and part == "down_proj":
                weight = prune_linear(before[f"{name}.weight"], method="magnitude", pattern="2:4")
                assert torch.equal(after[f"{name}.weight"], weight)
            elif count < limit:
                weight = prune_linear(before[f"{name}.weight"], torch.cat(received), method=method, pattern="2:4")
                by_all[f"{name}.weight"] = weight
    assert agreement(by_all, after, by_all) > 0.995
    found = {layer.name: layer.fallback for layer in record.layers}
    assert found == dict.fromkeys(found) | expected
    # a fallback has an error like all others, where there is an input to measure it on
    silent = [f"model.layers.0.mlp.experts.{e}.down_proj" for e, count in enumerate(counts) if count == 0]
    assert [layer.name for layer in record.layers if layer.relative_output_error is None] == silent
    number = sum(how is not None for how in expected.values())
    assert record.fallbacks == number > 0
    warning = f"warning: {number} matrices of experts that saw too few tokens were pruned by a fallback: "
    assert warning in capsys.readouterr().err


def test_a_method_without_inputs_needs_no_fall_back(prune: Prune, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_work, "MIN_EXPERT_TOKENS", 1000)
    options = "prune.method=magnitude", "prune.targets=all-linear", "prune.reconstruct_epochs=1"
    assert prune(*options, base=base).record.fallbacks == 0


def test_experts_that_stay_dense_are_reported(prune: Prune, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(GptOssConfig(**GROUPED, num_local_experts=4)).save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    prune("prune.method=magnitude", "prune.targets=all-linear", base=base)
    warning = "stay dense: model.layers.0.mlp.experts.gate_up_proj, ... (83% of the blocks' matrices)"
    assert warning in capsys.readouterr().err
