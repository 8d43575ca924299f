"""Every method through training and merging: the merged model is the trained one, and its zeros are as promised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import stage_calls
import torch
from conftest import byte_tokenizer, cut_after, trained_dtype
from peft import PeftModel
from safetensors.torch import load_file, save_file
from stage_calls import blank
from torch import Tensor
from transformers import AutoModelForCausalLM

from sppctl.config.load import load_config
from sppctl.config.settings import Config
from sppctl.errors import StageError, UserError
from sppctl.inspect.inspect import holds
from sppctl.merge.rules import merged_weight
from sppctl.model.blocks import Skeleton
from sppctl.model.checkpoint import load_config as model_config
from sppctl.plan import run as plan
from sppctl.prune import stage as prune
from sppctl.prune.choose import planned_patterns
from sppctl.records import LayerRecord, MergeRecord, PruneRecord, TrainRecord
from sppctl.train import stage as train

pytestmark = pytest.mark.slow

METHODS = ["spp", "lora", "hira", "masked_lora", "masked_full", "ste"]
ROUNDED_IN_TRAINING = ["spp", "masked_lora", "masked_full", "ste"]  # without dropout
Configure = Callable[..., Config]


@pytest.fixture
def configure(config_file: Path) -> Configure:
    fixed = ("train.dropout=0", "train.epochs=2", "train.log_steps=1")
    return lambda *overrides: load_config(str(config_file), [*fixed, *overrides])


@pytest.fixture
def prepare(configure: Configure, make_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """prepare(dtype, overrides) -> a pruned checkpoint."""

    def pruned(dtype: torch.dtype = torch.float32, *overrides: str) -> Path:
        out = tmp_path / "pruned"
        out.mkdir()
        stage_calls.prune(configure(*overrides), make_checkpoint("llama", dtype), out)
        return out

    return pruned


def run_train(config: Config, pruned: Path, out: Path) -> TrainRecord:
    names = Skeleton(model_config(pruned)).targets(config.prune.targets)
    patterns = planned_patterns(config.prune, names, Skeleton(model_config(pruned)))
    layers = [blank(LayerRecord, name=name, pattern=patterns[name]) for name in names]
    return stage_calls.train(config, pruned, blank(PruneRecord, layers=layers), out, dtype=trained_dtype(pruned))


def run_merge(config: Config, pruned: Path, adapter: Path, out: Path) -> MergeRecord:
    return stage_calls.merge(config, pruned, adapter, out)


def tensors(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def adapted(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors(directory).items() if name.endswith("_proj.weight")}


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
@pytest.mark.parametrize("method", METHODS)
def test_the_merged_model_is_the_trained_one(
    method: str, dtype: torch.dtype, configure: Configure, prepare: Callable[..., Path], tmp_path: Path
) -> None:
    rule = "dense" if method == "lora" else "keep"
    lr = 5e-2 if method in ("spp", "hira") else 1e-2  # factors on small random weights move the loss slowly
    config = configure(
        f"train.method={method}", f"merge.mask={rule}", f"train.lr={lr}", "train.mask_steps=2", "train.epochs=4"
    )
    pruned, adapter = prepare(dtype), tmp_path / "adapter"
    before = (pruned / "model.safetensors").read_bytes()
    metrics = run_train(config, pruned, adapter)
    losses = [entry["loss"] for entry in metrics.history if "loss" in entry]
    assert metrics.method == method
    assert sum(losses[-5:]) < sum(losses[:5])  # the last epoch and the first
    assert (pruned / "model.safetensors").read_bytes() == before
    stored = load_file(adapter / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} <= {torch.float32, torch.bool}

    record = run_merge(config, pruned, adapter, tmp_path / "merged")
    assert (record.method, record.mask, record.matrices) == (method, rule, 14)
    assert record.moved_share > 0.1
    ids = torch.arange(40).view(2, -1)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pruned), adapter).eval()
    merged_logits, trained_logits = plain(ids).logits, wrapped(ids).logits
    if method in ROUNDED_IN_TRAINING:
        assert torch.equal(merged_logits, trained_logits)
    else:
        tolerance = 1e-4 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(merged_logits, trained_logits, rtol=tolerance, atol=tolerance)
    with wrapped.disable_adapter():
        assert not torch.allclose(merged_logits, wrapped(ids).logits, atol=1e-3)
    untouched = tensors(pruned)
    for name, tensor in tensors(tmp_path / "merged").items():
        if not name.endswith("_proj.weight"):
            assert torch.equal(tensor, untouched[name]), name


@pytest.mark.parametrize("method", ["spp", "hira", "masked_lora", "masked_full"])
def test_every_zero_stays_zero(method: str, configure: Configure, prepare: Callable[..., Path], tmp_path: Path) -> None:
    config = configure(f"train.method={method}", "train.dropout=0.1")
    pruned = prepare(torch.bfloat16)
    run_train(config, pruned, tmp_path / "adapter")
    record = run_merge(config, pruned, tmp_path / "adapter", tmp_path / "merged")
    assert record.pattern_unchanged is True
    assert (record.filled_zeros, record.lost_weights) == (0, 0)
    assert record.sparsity == 0.5
    after = adapted(tmp_path / "merged")
    assert all(torch.equal(weight == 0, after[name] == 0) for name, weight in adapted(pruned).items())


@pytest.mark.parametrize("method", ["spp", "hira", "masked_lora", "masked_full", "ste"])
def test_a_training_that_learns_nothing_moves_nothing(
    method: str, configure: Configure, prepare: Callable[..., Path], tmp_path: Path
) -> None:
    """Although float16 is trained as another dtype."""
    config = configure(f"train.method={method}", "train.lr=1e-12", "train.max_steps=1")
    pruned = prepare(torch.float16)
    assert run_train(config, pruned, tmp_path / "adapter").dtype == "bfloat16"
    assert run_merge(config, pruned, tmp_path / "adapter", tmp_path / "merged").moved_share == 0


def test_hira_keeps_a_weight_that_would_vanish() -> None:
    weight = torch.tensor([[1.0, -2.0, 0.0, 6e-8]]).half()
    tensors = {"hira_A": torch.tensor([[-1.0, -1, 3, -0.9]]), "hira_B": torch.ones(1, 1)}
    merged = merged_weight("HIRA", "keep", weight, tensors, {}, torch.float16)
    assert merged.abs().tolist() == [[2.0**-24, 2.0**-24, 0, 2.0**-24]]


# --- LoRA fills zeros -------------------------------------------------------------------------------------------------


@pytest.fixture
def lora(configure: Configure, prepare: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """A pruned checkpoint and a LoRA trained on it."""
    pruned = prepare(torch.bfloat16)
    run_train(configure("train.method=lora"), pruned, tmp_path / "adapter")
    return pruned, tmp_path / "adapter"


def test_lora_is_refused_unless_told_what_to_do_with_the_zeros(
    lora: tuple[Path, Path], configure: Configure, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"fills the zeros; merge.mask=reapply.*LoRA\*.*merge.mask=dense"):
        run_merge(configure("train.method=lora"), *lora, tmp_path / "merged")
    assert not list((tmp_path / "merged").iterdir())


def test_reapply_restores_the_exact_pattern(lora: tuple[Path, Path], configure: Configure, tmp_path: Path) -> None:
    record = run_merge(configure("merge.mask=reapply"), *lora, tmp_path / "merged")
    assert record.pattern_unchanged is True
    before, after = adapted(lora[0]), adapted(tmp_path / "merged")
    stored = load_file(lora[1] / "adapter_model.safetensors")
    for name, weight in before.items():
        assert torch.equal(weight == 0, after[name] == 0), name
        module = f"base_model.model.{name.removesuffix('.weight')}"
        b, a = stored[f"{module}.lora_B.weight"].double(), stored[f"{module}.lora_A.weight"].double()
        expected = (weight.double() + 2.0 * b @ a) * (weight != 0)
        torch.testing.assert_close(after[name].double(), expected, rtol=2**-8, atol=1e-7)


def test_dense_says_that_the_sparsity_is_gone(lora: tuple[Path, Path], configure: Configure, tmp_path: Path) -> None:
    record = run_merge(configure("merge.mask=dense"), *lora, tmp_path / "merged")
    after = adapted(tmp_path / "merged")
    zeros = sum(int((weight == 0).sum()) for weight in after.values())
    total = sum(weight.numel() for weight in after.values())
    assert record.pattern_unchanged is False
    assert record.sparsity == zeros / total < 0.01
    assert record.filled_zeros == total // 2 - zeros + record.lost_weights
    assert (record.zeros, record.kept_weights) == (zeros, total - zeros)


def test_a_broken_low_rank_adapter_is_refused(lora: tuple[Path, Path], configure: Configure, tmp_path: Path) -> None:
    path = lora[1] / "adapter_model.safetensors"
    content = load_file(path)
    name = next(name for name in content if name.endswith("q_proj.lora_A.weight"))
    save_file(content | {name: content[name] * float("nan")}, path, {"format": "pt"})
    with pytest.raises(StageError, match=r"q_proj.weight gives values that are not finite"):
        run_merge(configure("merge.mask=reapply"), *lora, tmp_path / "merged")
    save_file(content | {name: torch.zeros(16, 40)}, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"lora_A.weight 16x40.*does not fit the 32x32 weight.*another model's"):
        run_merge(configure("merge.mask=reapply"), *lora, tmp_path / "other")


# --- dynamic masks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["2:4", "0.6"])
def test_a_mask_that_changed_is_proved(
    pattern: str, configure: Configure, prepare: Callable[..., Path], tmp_path: Path
) -> None:
    wanted = (f"prune.pattern={pattern}", "prune.overrides={down_proj: 1:4}")
    config = configure("train.method=ste", "train.mask_steps=3", "train.lr=3e-2", *wanted)
    pruned = prepare(torch.bfloat16, *wanted)
    metrics = run_train(config, pruned, tmp_path / "adapter")
    changes = {entry["step"]: entry["mask_changes"] for entry in metrics.history if "mask_changes" in entry}
    assert set(changes) == {3, 6, 9}  # not after the tenth and last step
    assert all(changes.values())
    record = run_merge(config, pruned, tmp_path / "adapter", tmp_path / "merged")
    assert record.pattern_unchanged is False
    assert record.filled_zeros == record.lost_weights > 0
    after = adapted(tmp_path / "merged")
    for name, weight in adapted(pruned).items():
        if "down_proj" in name:
            assert holds(after[name], prune.Pattern.parse("1:4"))
        elif pattern == "2:4":
            assert holds(after[name], prune.Pattern.parse("2:4"))
        else:
            assert torch.equal((after[name] == 0).sum(1), (weight == 0).sum(1)), name


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_a_broken_mask_is_refused(
    pattern: str, configure: Configure, prepare: Callable[..., Path], tmp_path: Path
) -> None:
    config = configure("train.method=ste", "train.max_steps=2", f"prune.pattern={pattern}")
    pruned = prepare(torch.float32, f"prune.pattern={pattern}")
    run_train(config, pruned, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    content = load_file(path)
    name = next(name for name in content if name.endswith("up_proj.ste_mask"))
    content[name][5] = True
    save_file(content, path, {"format": "pt"})
    message = "would not give 2:4" if pattern == "2:4" else "change the number of zeros in 1 of its rows"
    with pytest.raises(StageError, match=message):
        run_merge(config, pruned, tmp_path / "adapter", tmp_path / "merged")


@pytest.mark.parametrize("method", METHODS[1:])
def test_an_interrupted_training_ends_with_the_same_bits(
    method: str, configure: Configure, prepare: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # checkpoints lie between two selections: the mask in use is not the one that the weights would give
    options = ("train.mask_steps=3", "train.lr=3e-2", "train.save_steps=5", "train.dropout=0.1")
    config = configure(f"train.method={method}", *options)
    pruned = prepare(torch.bfloat16)
    run_train(config, pruned, tmp_path / "whole")

    with cut_after(7):
        run_train(config, pruned, tmp_path / "cut")
    run_train(config, pruned, tmp_path / "cut")
    whole, cut = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(tensor, cut[name]) for name, tensor in whole.items())


def test_the_decay_counts_once_per_step_whatever_the_micro_batch(
    configure: Configure, prepare: Callable[..., Path], tmp_path: Path
) -> None:
    pruned, results = prepare(), []
    for micro in (1, 4):
        options = (f"train.micro_batch_size={micro}", "train.mask_decay=0.5", "train.mask_steps=2", "train.max_steps=4")
        run_train(configure("train.method=ste", "train.lr=1e-3", *options), pruned, tmp_path / f"micro{micro}")
        results.append(load_file(tmp_path / f"micro{micro}" / "adapter_model.safetensors"))
    # Adam turns rounding of gradients near zero into steps of lr: compare where most of the weights went
    for name, values in results[0].items():
        if name.endswith("ste_weight"):
            assert ((values - results[1][name]).abs() < 1e-4).float().mean() > 0.98, name


# --- preflight --------------------------------------------------------------------------------------------------------


def problems(config: Config, llama: Path) -> str:
    try:
        train.prepare(config, Skeleton(model_config(llama)), byte_tokenizer())
    except UserError as error:
        return str(error)
    return ""


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
        (["train.refresh.until=0.3"], "train.refresh.until: no effect without train.refresh.steps"),
    ],
)
def test_keys_without_effect_are_warned_of(
    overrides: list[str], said: str, configure: Configure, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert problems(configure(*overrides), llama) == ""
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert warnings == ([f"warning: {said}"] if said else [])


def test_a_model_without_linear_layers(configure: Configure, make_checkpoint: Callable[..., Path], llama: Path) -> None:
    skeleton = Skeleton(model_config(make_checkpoint("gpt2")))
    with pytest.raises(UserError, match=r"sppctl trains nn.Linear layers only, and none of these is one"):
        train.prepare(configure("prune.targets=all-linear", "train.method=lora"), skeleton, byte_tokenizer())


def test_dynamic_masks_need_whole_matrices(configure: Configure, llama: Path) -> None:
    message = problems(configure("train.method=ste", "launch.strategy=fsdp"), llama)
    assert "ste chooses masks from whole matrices, launch.strategy fsdp" in message


def test_a_peft_without_hira_is_named(configure: Configure, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(peft, "HiraConfig")
    message = problems(configure("train.method=hira"), llama)
    assert message.startswith("train.method: hira needs peft 0.20 or newer, installed is ")


def test_ablations_reach_the_adapter(configure: Configure, prepare: Callable[..., Path], tmp_path: Path) -> None:
    pruned = prepare()
    counts = {}
    for name, options in {"beta": (), "no-beta": ("train.beta=false",), "ones": ("train.init=ones",)}.items():
        config = configure("train.max_steps=2", *options)
        counts[name] = run_train(config, pruned, tmp_path / name).trainable_parameters
        assert run_merge(config, pruned, tmp_path / name, tmp_path / f"{name}-merged").pattern_unchanged is True
    rows = sum(weight.shape[0] for weight in adapted(pruned).values())
    columns = sum(weight.shape[1] for weight in adapted(pruned).values())
    assert counts == {"beta": 4 * columns + rows, "no-beta": 4 * columns, "ones": 4 * columns + rows}
