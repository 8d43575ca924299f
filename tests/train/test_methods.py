"""Every method through training and merging: the merged model is the trained one, and its zeros are as promised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import stage_calls
import torch
from checkpoints import weights_of
from conftest import cut_after
from fitting import Configure, Fit, figures, problems
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from sppctl.config.load import load_config
from sppctl.errors import StageError, UserError
from sppctl.merge.rules import merged_weight
from sppctl.pattern import Pattern
from sppctl.plan import run as plan
from sppctl.pruners.masks import holds

pytestmark = pytest.mark.slow

METHODS = ["spp", "lora", "hira", "masked_lora", "masked_full", "ste"]
ROUNDED_IN_TRAINING = ["spp", "masked_lora", "masked_full", "ste"]  # without dropout
Prepare = Callable[..., Fit]


@pytest.fixture
def configure(config_file: Path) -> Configure:
    fixed = ("train.dropout=0", "train.epochs=2", "train.log_steps=1")
    return lambda *overrides: load_config(str(config_file), [*fixed, *overrides])


@pytest.fixture
def prepare(configure: Configure, make_checkpoint: Callable[..., Path], tmp_path: Path) -> Prepare:
    """prepare(dtype, overrides) -> trainings of a pruned checkpoint."""

    def pruned(dtype: torch.dtype = torch.float32, *overrides: str) -> Fit:
        base, out = make_checkpoint("llama", dtype), tmp_path / "pruned"
        return Fit(configure, (out, stage_calls.prune(configure(*overrides), base, out)), base, tmp_path)

    return pruned


def adapted(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights_of(directory).items() if name.endswith("_proj.weight")}


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
@pytest.mark.parametrize("method", METHODS)
def test_the_merged_model_is_the_trained_one(method: str, dtype: torch.dtype, prepare: Prepare) -> None:
    rule = "dense" if method == "lora" else "keep"
    lr = 5e-2 if method in ("spp", "hira") else 1e-2  # factors on small random weights move the loss slowly
    options = (f"train.method={method}", f"merge.mask={rule}", f"train.lr={lr}", "train.mask_steps=2", "train.epochs=4")
    fit = prepare(dtype)
    pruned = fit.pruned[0]
    before = (pruned / "model.safetensors").read_bytes()
    metrics = fit("adapter", *options)
    losses = figures(metrics, "loss")
    assert metrics.method == method
    assert sum(losses[-5:]) < sum(losses[:5])  # the last epoch and the first
    assert (pruned / "model.safetensors").read_bytes() == before
    assert {tensor.dtype for tensor in fit.tensors("adapter").values()} <= {torch.float32, torch.bool}

    record = fit.merge(*options)
    assert (record.method, record.mask, record.matrices) == (method, rule, 14)
    assert record.moved_share > 0.1
    ids = torch.arange(40).view(2, -1)
    plain = AutoModelForCausalLM.from_pretrained(fit.root / "merged").eval()
    wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pruned), fit.root / "adapter").eval()
    merged_logits, trained_logits = plain(ids).logits, wrapped(ids).logits
    if method in ROUNDED_IN_TRAINING:
        assert torch.equal(merged_logits, trained_logits)
    else:
        tolerance = 1e-4 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(merged_logits, trained_logits, rtol=tolerance, atol=tolerance)
    with wrapped.disable_adapter():
        moved = trained_logits - wrapped(ids).logits
    assert moved.abs().max() > 1e-3
    assert (merged_logits - trained_logits).norm() < 0.1 * moved.norm()
    zeros_stay = method not in ("lora", "ste")
    assert record.pattern_unchanged is zeros_stay
    if zeros_stay:
        assert (record.filled_zeros, record.lost_weights, record.sparsity) == (0, 0, 0.5)
    untouched = weights_of(pruned)
    for name, tensor in weights_of(fit.root / "merged").items():
        if not name.endswith("_proj.weight"):
            assert torch.equal(tensor, untouched[name]), name
        elif zeros_stay:
            assert torch.equal(tensor == 0, untouched[name] == 0), name


@pytest.mark.parametrize("method", ["spp", "hira", "masked_lora", "masked_full", "ste"])
def test_a_training_that_learns_nothing_moves_nothing(method: str, prepare: Prepare) -> None:
    """Although float16 is trained as another dtype."""
    fit = prepare(torch.float16)
    metrics = fit("adapter", f"train.method={method}", "train.lr=1e-12", "train.max_steps=2")
    assert metrics.dtype == "bfloat16"
    assert fit.merge(f"train.method={method}").moved_share == 0


def test_hira_keeps_a_weight_that_would_vanish() -> None:
    weight = torch.tensor([[1.0, -2.0, 0.0, 6e-8]]).half()
    tensors = {"hira_A": torch.tensor([[-1.0, -1, 3, -0.9]]), "hira_B": torch.ones(1, 1)}
    merged = merged_weight("HIRA", "keep", weight, tensors, {}, torch.float16)
    assert merged.abs().tolist() == [[2.0**-24, 2.0**-24, 0, 2.0**-24]]


# --- LoRA fills zeros -------------------------------------------------------------------------------------------------


@pytest.fixture
def lora(prepare: Prepare) -> Fit:
    """A pruned checkpoint and a LoRA trained on it."""
    fit = prepare(torch.bfloat16)
    fit("adapter", "train.method=lora")
    return fit


def test_reapply_restores_the_exact_pattern(lora: Fit) -> None:
    assert lora.merge("merge.mask=reapply").pattern_unchanged is True
    after, stored = adapted(lora.root / "merged"), lora.tensors("adapter")
    for name, weight in adapted(lora.pruned[0]).items():
        assert torch.equal(weight == 0, after[name] == 0), name
        module = f"base_model.model.{name.removesuffix('.weight')}"
        b, a = stored[f"{module}.lora_B.weight"].double(), stored[f"{module}.lora_A.weight"].double()
        expected = (weight.double() + 2.0 * b @ a) * (weight != 0)
        torch.testing.assert_close(after[name].double(), expected, rtol=2**-8, atol=1e-7)


def test_dense_says_that_the_sparsity_is_gone(lora: Fit) -> None:
    record = lora.merge("merge.mask=dense")
    after = adapted(lora.root / "merged")
    zeros = sum(int((weight == 0).sum()) for weight in after.values())
    total = sum(weight.numel() for weight in after.values())
    assert record.pattern_unchanged is False
    assert record.sparsity == zeros / total < 0.01
    assert record.filled_zeros == total // 2 - zeros + record.lost_weights
    assert (record.zeros, record.kept_weights) == (zeros, total - zeros)


def test_a_broken_low_rank_adapter_is_refused(lora: Fit) -> None:
    path, content = lora.root / "adapter" / "adapter_model.safetensors", lora.tensors("adapter")
    name = next(name for name in content if name.endswith("q_proj.lora_A.weight"))
    save_file(content | {name: content[name] * float("nan")}, path, {"format": "pt"})
    with pytest.raises(StageError, match=r"q_proj.weight gives values that are not finite"):
        lora.merge("merge.mask=reapply")
    save_file(content | {name: torch.zeros(16, 40)}, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"lora_A.weight 16x40.*does not match the 32x32 weight.*another model's"):
        lora.merge("merge.mask=reapply", into="other")


# --- dynamic masks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["2:4", "0.6"])
def test_a_mask_that_changed_is_proved(pattern: str, prepare: Prepare) -> None:
    patterns = (f"prune.pattern={pattern}", "prune.overrides={down_proj: 1:4}")
    fit = prepare(torch.bfloat16, *patterns)
    metrics = fit("adapter", "train.method=ste", "train.mask_steps=3", "train.lr=3e-2", *patterns)
    assert figures(metrics, "mask_changes", "step")[1::2] == [3, 6, 9]  # not after the tenth and last step
    assert all(figures(metrics, "mask_changes"))
    record = fit.merge("train.method=ste", *patterns)
    assert record.pattern_unchanged is False
    assert record.filled_zeros == record.lost_weights > 0
    after = adapted(fit.root / "merged")
    for name, weight in adapted(fit.pruned[0]).items():
        if "down_proj" in name:
            assert holds(after[name], Pattern.parse("1:4"))
        elif pattern == "2:4":
            assert holds(after[name], Pattern.parse("2:4"))
        else:
            assert torch.equal((after[name] == 0).sum(1), (weight == 0).sum(1)), name


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_a_broken_mask_is_refused(pattern: str, prepare: Prepare) -> None:
    options, fit = ("train.method=ste", f"prune.pattern={pattern}"), prepare(torch.float32, f"prune.pattern={pattern}")
    fit("adapter", *options, "train.max_steps=2")
    content = fit.tensors("adapter")
    name = next(name for name in content if name.endswith("up_proj.ste_mask"))
    content[name][5] = True
    save_file(content, fit.root / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    message = "would not give 2:4" if pattern == "2:4" else "change the number of zeros in 1 of its rows"
    with pytest.raises(StageError, match=message):
        fit.merge(*options)


@pytest.mark.parametrize("method", METHODS[1:])
def test_an_interrupted_training_ends_with_the_same_bits(method: str, prepare: Prepare) -> None:
    # the checkpoint is between two selections: the mask in use is not the one that the weights would give
    options = (f"train.method={method}", "train.mask_steps=3", "train.lr=3e-2", "train.save_steps=5")
    fit = prepare(torch.bfloat16)
    fit("whole", *options, "train.dropout=0.1")
    with cut_after(7):
        fit("cut", *options, "train.dropout=0.1")
    fit("cut", *options, "train.dropout=0.1")
    assert fit.adapter("cut") == fit.adapter("whole")


def test_the_decay_counts_once_per_step_whatever_the_micro_batch(prepare: Prepare) -> None:
    options = ("train.method=ste", "train.lr=1e-3", "train.mask_decay=0.5", "train.mask_steps=2", "train.max_steps=4")
    fit = prepare()
    for size in ("1", "4"):
        fit(size, *options, f"train.micro_batch_size={size}")
    whole = fit.tensors("4")
    # Adam turns rounding of gradients near zero into steps of lr: compare where most of the weights went
    for name, values in fit.tensors("1").items():
        if name.endswith("ste_weight"):
            assert ((values - whole[name]).abs() < 1e-4).float().mean() > 0.98, name


# --- preflight --------------------------------------------------------------------------------------------------------


def test_the_rank_is_limited_for_spp_alone(configure: Configure, llama: Path) -> None:
    assert "exceeds the 32 output features" in problems(configure("train.rank=33"), llama)
    for method in METHODS[1:]:
        config = configure("train.rank=33", f"train.method={method}")
        assert problems(config, llama) == ""
        assert plan.execute(config).trainable.method == method, "plan and train have one rule"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.method=spp", "train.init=ones", "train.beta=false"], ""),
        (["train.method=masked_full"], "train.dropout, train.rank: no effect with train.method=masked_full"),
        (["train.method=lora", "train.init=random"], "train.init: no effect with train.method=lora"),
        (["train.method=hira", "train.scale=5"], "train.scale: no effect with train.method=hira"),
        (["train.mask_steps=7"], "train.mask_steps: no effect with train.method=spp"),
        (["train.distill.weight=0.7"], "train.distill.weight: no effect without train.distill.teacher"),
        (
            ["train.optimizer=adafactor", "train.adam_beta2=0.95"],
            "train.adam_beta2: no effect with train.optimizer=adafactor",
        ),
        (["train.refresh.until=0.3"], "train.refresh.until: no effect without train.refresh.steps"),
    ],
)
def test_keys_without_effect_are_warned_of(
    overrides: list[str], said: str, configure: Configure, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert problems(configure(*overrides), llama) == ""
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert warnings == ([f"warning: {said}"] if said else [])


def test_a_model_without_linear_layers(configure: Configure, make_checkpoint: Callable[..., Path]) -> None:
    config = configure("prune.targets=all-linear", "train.method=lora")
    message = problems(config, make_checkpoint("gpt2"))
    assert "none of these is an nn.Linear layer, the only kind that sppctl trains" in message


def test_ablations_reach_the_adapter(prepare: Prepare) -> None:
    fit, counts = prepare(), {}
    for name, options in {"beta": (), "no-beta": ("train.beta=false",), "ones": ("train.init=ones",)}.items():
        counts[name] = fit(name, "train.max_steps=2", *options).trainable_parameters
        assert fit.merge(*options, adapter=name, into=f"{name}-merged").pattern_unchanged is True
    rows, columns = (sum(weight.shape[axis] for weight in adapted(fit.pruned[0]).values()) for axis in (0, 1))
    assert counts == {"beta": 4 * columns + rows, "no-beta": 4 * columns, "ones": 4 * columns + rows}
