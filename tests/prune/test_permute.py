"""Channels in another order: the model computes the same, and is pruned as if it had been stored in that order."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import kept_per_group, random_windows, shards, weights_of, write_weights
from conftest import Command, Prune, stored_dtype
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3NextConfig,
    XGLMConfig,
)

import sppctl
from sppctl.errors import StageError, UserError
from sppctl.files import sealed
from sppctl.files.safe_files import OwnFiles
from sppctl.model import channel_order
from sppctl.model.blocks import Skeleton
from sppctl.pattern import Pattern
from sppctl.prune import permute
from sppctl.records import PruneRecord
from sppctl.report import provenance

Make = Callable[..., Path]
PERMUTED = "prune.permute_channels=true"
# the layers whose inputs are the outputs of others, and these; the layers that read hidden states
FEEDING = {
    "llama": {"mlp.down_proj": ("mlp.gate_proj", "mlp.up_proj"), "self_attn.o_proj": ("self_attn.v_proj",)},
    "opt": {"fc2": ("fc1",), "self_attn.out_proj": ("self_attn.v_proj",)},
}
FEEDING |= dict.fromkeys(("qwen2", "qwen3", "gemma2"), FEEDING["llama"])
BLOCKS = {"opt": "model.decoder.layers"}
READING = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc1")
WRITING = ("o_proj", "out_proj", "down_proj", "fc2")


@pytest.fixture
def uneven(make_checkpoint: Make, tmp_path: Path) -> Callable[[str], Path]:
    """uneven(FAMILY) -> a tiny checkpoint some of whose channels matter much more than others, with biases."""

    def make(family: str) -> Path:
        base = Path(shutil.copytree(make_checkpoint(family), tmp_path / "uneven"))
        generator, weights = torch.Generator().manual_seed(1), weights_of(base)
        for name, weight in weights.items():
            if any(part in name for part in ("up_proj.", "fc1.", "v_proj.")):
                sizes = torch.randn(len(weight), generator=generator).mul(1.5).exp().to(weight.dtype)
                if weight.dim() == 1:  # biases, which are zero at first
                    weight.copy_(torch.randn(len(weight), generator=generator) / 100)
                weight.mul_(sizes.view(-1, *[1] * (weight.dim() - 1)))
        for path in base.glob("*.safetensors*"):
            path.unlink()
        write_weights(weights, base)
        return base

    return make


def logits(model: PreTrainedModel | Path) -> Tensor:
    if isinstance(model, Path):
        model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(random_windows(2, 24)).logits


def order_of(before: Tensor, after: Tensor) -> list[int]:
    """The order in which rows (or single values) were put."""
    rows = [row.tolist() for row in before]
    return [rows.index(row.tolist()) for row in after]


def hidden_in_order(name: str, weight: Tensor, order: list[int]) -> Tensor:
    """A parameter after the hidden states were reordered."""
    layer, _, kind = name.rpartition(".")
    layer = layer.rpartition(".")[2]
    if "embed" in layer or layer == "lm_head" or (layer in READING and kind == "weight"):
        return weight[:, order]
    return weight[order] if layer in WRITING or ("norm" in layer and layer not in ("q_norm", "k_norm")) else weight


@pytest.mark.parametrize("stored", [("model.embed_tokens",), ("lm_head",), ("model.embed_tokens", "lm_head")], ids=str)
@pytest.mark.parametrize("permuted", ["true", "false"])
def test_tied_embeddings_are_stored_under_either_name(
    permuted: str, stored: tuple[str, ...], prune: Prune, uneven: Callable[[str], Path]
) -> None:
    base = uneven("llama")
    (base / "config.json").write_text(
        json.dumps(json.loads((base / "config.json").read_text()) | {"tie_word_embeddings": True})
    )
    weights = weights_of(base)
    embedding = weights.pop("model.embed_tokens.weight")
    del weights["lm_head.weight"]
    write_weights(weights | {"model.embed_tokens.weight": embedding}, base)
    options = ("prune.calibration.samples=2", f"prune.permute_channels={permuted}")
    expected = prune(*options, base=base)
    write_weights(weights | {f"{name}.weight": embedding.clone() for name in stored}, base)
    pruned = prune(*options, base=base)
    wanted = expected.weights.pop("model.embed_tokens.weight")
    assert torch.equal(wanted, embedding) == (permuted == "false")
    for name in stored:
        assert torch.equal(pruned.weights.pop(f"{name}.weight"), wanted)
    assert pruned.weights.keys() == expected.weights.keys()
    assert all(torch.equal(pruned.weights[name], weight) for name, weight in expected.weights.items())
    assert torch.equal(logits(pruned.directory), logits(expected.directory))


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("family", FEEDING)
def test_prunes_the_model_in_another_order(
    method: str, family: str, prune: Prune, uneven: Callable[[str], Path], tmp_path: Path
) -> None:
    base = uneven(family)
    names = [*(name.rpartition(".")[2] for name in FEEDING[family]), "q_proj"]
    common = [f"prune.targets=[{', '.join(names)}]", f"prune.method={method}", "prune.batch_size=3"]
    _, pruned, record = prune(*common, PERMUTED, base=base)
    # the embeddings and the layers that are not pruned show the orders, which are applied to a copy of the dense model
    before, blocks = weights_of(base), BLOCKS.get(family, "model.layers")
    embeddings = next(name for name in before if "embed_tokens" in name)
    hidden = order_of(before[embeddings].T, pruned[embeddings].T)
    assert sorted(hidden) == list(range(32))
    assert hidden != sorted(hidden)
    copied = {name: hidden_in_order(name, weight, hidden) for name, weight in before.items()}
    moved = 0
    for layer, feeding in FEEDING[family].items():
        for path in (f"{blocks}.{block}." for block in range(2)):
            first = f"{path}{feeding[0]}.weight"
            order = order_of(copied[first], pruned[first])
            moved += order != sorted(order)
            for name in (f"{path}{one}.{kind}" for one in feeding for kind in ("weight", "bias")):
                if name in before:
                    copied[name] = copied[name][order]
            weight = copied[f"{path}{layer}.weight"]
            if len(order) < weight.shape[1]:  # each head's values are read by two query heads
                heads = [order[head * 8 : head * 8 + 8] for head in (0, 0, 1, 1)]
                order = [one % 8 + place * 8 for place, head in enumerate(heads) for one in head]
            assert sorted(order) == list(range(weight.shape[1]))
            copied[f"{path}{layer}.weight"] = weight[:, order]
    assert moved >= 3
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    write_weights({name: weight.contiguous() for name, weight in copied.items()}, copy)
    torch.testing.assert_close(logits(copy), logits(base), rtol=1e-4, atol=1e-4)
    _, expected, _ = prune(*common, base=copy)
    assert expected.keys() == pruned.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(pruned[name], weight, rtol=1e-4, atol=1e-5, msg=name)
        assert torch.equal(pruned[name] == 0, weight == 0), name
    readers = {layer.name for layer in record.layers if not layer.name.endswith("q_proj")}
    assert {one.name for one in record.permuted} == {"hidden states", *readers}
    assert all(0 < one.after <= one.before < 1 for one in record.permuted)
    assert sum(one.after for one in record.permuted) < 0.95 * sum(one.before for one in record.permuted)


def test_the_recorded_shares_are_those_of_a_plain_loop(prune: Prune, uneven: Callable[[str], Path]) -> None:
    base, windows = uneven("llama"), random_windows(4, 24)
    _, _, record = prune(PERMUTED, base=base, windows=windows)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    layer = model.model.layers[0].mlp.down_proj
    seen: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
    with torch.no_grad():
        model(windows)
        mean_squares = torch.cat(seen).square().mean(dim=0)
        losses = (layer.weight.square() * mean_squares).tolist()
    lost = sum(sum(sorted(row[i : i + 4])[:2]) for row in losses for i in range(0, len(row), 4))
    (found,) = (one for one in record.permuted if one.name == "model.layers.0.mlp.down_proj")
    assert found.before == pytest.approx(lost / sum(map(sum, losses)), rel=1e-4)


def test_a_better_pattern_of_the_same_kind(prune: Prune, uneven: Callable[[str], Path]) -> None:
    base = uneven("llama")
    _, weights, record = prune(PERMUTED, base=base)
    for layer in record.layers:
        assert (kept_per_group(weights[f"{layer.name}.weight"]) == 2).all()
    _, _, plain = prune(base=base)
    assert plain.permuted == []

    def error(record: PruneRecord) -> float:
        return sum(layer.relative_output_error or 0 for layer in record.layers if layer.name.endswith("down_proj"))

    assert error(record) < error(plain)


def test_reordered_weights_keep_their_stored_values(prune: Prune, uneven: Callable[[str], Path]) -> None:
    """Computing in bfloat16 rounds nothing of a float32 checkpoint that wanda keeps."""
    base = uneven("llama")
    assert stored_dtype(base) == "float32"
    _, weights, _ = prune(PERMUTED, "model.compute_dtype=bfloat16", base=base)
    before = weights_of(base)
    for name in (f"model.layers.{block}.mlp.{part}_proj.weight" for block in (0, 1) for part in ("gate", "up", "down")):
        values = set(before[name].flatten().tolist())
        assert values.issuperset(weights[name][weights[name] != 0].tolist()), name


def test_a_resumed_pruning_gives_the_same_bytes(prune: Prune, interrupt: Callable[..., Path], deep: Path) -> None:
    settings = [PERMUTED, "prune.method=sparsegpt", "prune.targets=[down_proj, o_proj, q_proj]"]
    whole, _, record = prune(*settings, base=deep)
    cut = interrupt(*settings, base=deep)
    _, _, resumed = prune(*settings, base=deep, out=cut)
    assert shards(cut) == shards(whole)
    assert resumed.permuted == record.permuted
    assert any(one.after < one.before for one in record.permuted)
    assert provenance._pruned(record).startswith("sparsegpt 2:4, 12 matrices, channels reordered, mean relative")


def test_damaged_orders_are_noticed(prune: Prune, interrupt: Callable[..., Path], deep: Path) -> None:
    cut = interrupt(PERMUTED, base=deep)
    path = cut / "channels.json"
    path.write_text(path.read_text().replace("0", "1", 1))
    with pytest.raises(UserError, match=r"channels\.json"):
        prune(PERMUTED, base=deep, out=cut)


@pytest.mark.parametrize("moment", ["before the orders", "before the copy"])
def test_a_pruning_that_ended_before_its_first_block(
    moment: str, prune: Prune, deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole = tmp_path / "cut", prune(PERMUTED, base=deep)
    place = {"before the orders": (permute, "check_same"), "before the copy": (OwnFiles, "sync")}[moment]
    with monkeypatch.context() as patch:
        calls: list[int] = []

        def end(*_: object, **__: object) -> None:
            calls.append(1)
            if moment == "before the orders" or len(calls) == 2:  # the first is that of the plain copy
                raise KeyboardInterrupt

        patch.setattr(*place, end)
        with pytest.raises(KeyboardInterrupt):
            prune(PERMUTED, base=deep, out=out)
    prune(PERMUTED, base=deep, out=out)
    assert shards(out) == shards(whole.directory)


@pytest.mark.parametrize("family", ["mixtral", "phi3"])
def test_hidden_states_that_are_read_by_other_layers_stay(
    family: str, prune: Prune, make_checkpoint: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_checkpoint(family)
    if family == "phi3":
        with pytest.raises(UserError, match="there are none here"):
            prune(PERMUTED, "prune.targets=all-linear", base=base)
        return
    _, weights, record = prune(PERMUTED, "prune.targets=all-linear", base=base)
    assert {one.name.rpartition(".")[2] for one in record.permuted} == {"o_proj"}
    assert "only inside of blocks: the order of the hidden states stays" in capsys.readouterr().err
    embeddings = "model.embed_tokens.weight"
    assert torch.equal(weights[embeddings], weights_of(base)[embeddings])


def test_no_warning_if_nothing_that_reads_hidden_states_is_pruned(
    prune: Prune, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, record = prune(PERMUTED, "prune.targets=[down_proj]", base=llama)
    assert {one.name.rpartition(".")[2] for one in record.permuted} == {"down_proj"}
    assert "the order of the hidden states stays" not in capsys.readouterr().err


def test_in_memory(uneven: Callable[[str], Path], prune: Prune) -> None:
    base, windows = uneven("qwen2"), random_windows(4, 24)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    record = sppctl.prune_model(model, windows, permute_channels=True)
    _, expected, of_files = prune(PERMUTED, base=base, windows=windows)
    state = model.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in expected.items())
    assert record.permuted == of_files.permuted


class Weighted(nn.Module):
    """An activation that treats each channel differently."""

    def __init__(self, step: float) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        """Scales the channels by 1, 1 + step, 1 + 2 step, ..."""
        return nn.functional.silu(x) * (1 + self.step * torch.arange(x.shape[-1])).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("step", [1.0, 3e-3])
def test_a_block_that_depends_on_the_order_is_refused(
    step: float, dtype: torch.dtype, uneven: Callable[[str], Path]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(uneven("llama"), dtype=dtype)
    for block in model.model.layers:
        block.mlp.act_fn = Weighted(step)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(StageError, match="with its channels in another order LlamaForCausalLM computes something else"):
        sppctl.prune_model(model, random_windows(4, 24), permute_channels=True)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_gated_values_of_attention_are_not_reordered() -> None:
    """Qwen3-Next multiplies them by a gate that is in further rows of q_proj."""
    common = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    assert found_in(Qwen3Config(**common, **heads)) == {"o_proj", "down_proj", "hidden states"}
    gated = Qwen3NextConfig(**common, **heads, layer_types=["full_attention"] * 2, num_experts=0)
    assert "o_proj" not in found_in(gated)


def test_hidden_states_to_which_computed_positions_are_added_stay() -> None:
    config = XGLMConfig(vocab_size=64, d_model=32, ffn_dim=64, num_layers=2, attention_heads=4)
    assert found_in(config) == {"out_proj", "fc2"}


def found_in(config: PretrainedConfig) -> set[str]:
    """The last names of the channels that can be reordered in a model."""
    skeleton = Skeleton(config)
    targets = skeleton.targets("all-linear")
    found = permute.find(skeleton, targets, dict.fromkeys(targets, Pattern(keep=2, group=4)))
    return {channels.name.rpartition(".")[2] for channels in found}


@pytest.mark.parametrize(
    ("settings", "family", "problem"),
    [
        (["prune.pattern=0.5"], "llama", "reorders the groups of N:M, but prune.pattern is 0.5"),
        (["prune.method=magnitude"], "llama", "needs calibration inputs, which magnitude does not read"),
        (["prune.keep_zeros=true"], "llama", "prune.keep_zeros has zeros in the order"),
        (["prune.targets=all-linear"], "gpt2", "that get an N:M pattern; there are none here"),
        (["train.refresh.steps=5"], "llama", "train.refresh.steps: compares with the dense model channel by channel"),
        (["train.distill.hidden=1"], "llama", "train.distill.hidden: compares with the dense model channel by channel"),
    ],
)
def test_refusals(settings: list[str], family: str, problem: str, prune: Prune, make_checkpoint: Make) -> None:
    with pytest.raises(UserError, match=problem):
        prune(PERMUTED, *settings, base=make_checkpoint(family))


def test_masks_in_another_order_are_refused(prune: Prune, llama: Path) -> None:
    other, _, _ = prune()
    with pytest.raises(UserError, match=r"prune\.mask_from has zeros in the order that the channels have now"):
        prune(PERMUTED, f"prune.mask_from={other}")


@pytest.fixture
def permuted(config_file: Path, tmp_path: Path, command: Command) -> Path:
    """A checkpoint of a run whose channels were reordered."""
    assert command("prune", str(config_file), f"run.dir={tmp_path / 'first'}", PERMUTED).code == 0
    return tmp_path / "first/pruned"


def test_masks_of_a_permuted_model_are_for_that_model(
    permuted: Path, config_file: Path, tmp_path: Path, command: Command
) -> None:
    second = ["prune", str(config_file), f"run.dir={tmp_path / 'second'}", "prune.method=sparsegpt"]
    refused = command(*second, f"prune.mask_from={permuted}")
    assert refused.code == 2
    assert "first/pruned has its channels in another order than the model (prune.permute_channels)" in refused.err
    assert not (tmp_path / "second").exists()
    assert command(*second, f"prune.mask_from={permuted}", f"model.path={permuted}").code == 0


def test_a_model_pruned_further_has_the_order_of_the_first(
    permuted: Path, config_file: Path, llama: Path, tmp_path: Path, command: Command
) -> None:
    further = [str(config_file), f"run.dir={tmp_path / 'further'}", f"model.path={permuted}", "prune.keep_zeros=true"]
    assert command("prune", *further).code == 0
    assert channel_order.order_of(tmp_path / "further/pruned") == channel_order.order_of(permuted)
    assert channel_order.order_of(permuted) is not None
    unpacked = Path(shutil.copytree(llama, permuted.parent / "base"))  # as of a GGUF file, with a record of its own
    sealed.write(unpacked / "stage.json", {"stage": "base"})
    assert channel_order.order_of(unpacked) is None
    assert channel_order.order_of(llama) is None
    refused = command("train", *further, f"train.distill.teacher={llama}", "train.distill.hidden=1")
    assert refused.code == 2
    assert "train.distill.hidden: " in refused.err
    assert "has its channels in another order than the model (prune.permute_channels)" in refused.err


def test_an_adapter_of_the_dense_model_is_not_merged_into_a_permuted_one(
    permuted: Path, llama: Path, tmp_path: Path, command: Command
) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(llama), lora).save_pretrained(tmp_path / "adapter")
    merge = ["merge", str(permuted.parent), f"merge.adapter={tmp_path / 'adapter'}", "merge.mask=reapply"]
    refused = command(*merge)
    assert refused.code == 2
    assert f"was trained on {llama}, and {permuted} has its channels in another order" in refused.err
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(permuted)}))
    assert command(*merge).code == 0


def test_layers_with_their_own_ratio_stay_as_they_are(prune: Prune, uneven: Callable[[str], Path]) -> None:
    base = uneven("llama")
    _, weights, record = prune(PERMUTED, "prune.overrides={down_proj: 0.5}", base=base)
    assert {one.name.rpartition(".")[2] for one in record.permuted} == {"o_proj", "hidden states"}
    before, down = weights_of(base), "model.layers.0.mlp.down_proj.weight"
    hidden = order_of(before["model.embed_tokens.weight"].T, weights["model.embed_tokens.weight"].T)
    kept = weights[down] != 0
    assert torch.equal(weights[down][kept], before[down][hidden][kept])
