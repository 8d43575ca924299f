"""Adapters that were trained elsewhere: merged as PEFT merges them, under the mask, or refused by name."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import weights_of
from conftest import Command, pruned_llama
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BloomConfig

from sppctl import MaskedLoraConfig, SppConfig, merge_adapter
from sppctl.errors import UserError

Save = Callable[..., Path]


@pytest.fixture
def pruned(llama: Path, tmp_path: Path) -> Path:
    """A checkpoint that was pruned elsewhere, without a record."""
    pruned_llama(llama).save_pretrained(tmp_path / "pruned")
    return tmp_path / "pruned"


@pytest.fixture
def save(pruned: Path, tmp_path: Path) -> Save:
    """save(OPTION=...) -> the directory of a random LoRA of those options."""

    def saved(**options: Any) -> Path:
        torch.manual_seed(0)
        settings = {"r": 2, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False} | options
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(pruned), LoraConfig(**settings))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                nn.init.normal_(parameter)
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return saved


NORMS = {"input_layernorm", "post_attention_layernorm", "norm"}  # PEFT compares the ends of names
EXACT: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "rank and alpha patterns": {"rank_pattern": {"down_proj": 3}, "alpha_pattern": {"layers.0.self_attn.q_proj": 5}},
    "modules_to_save": {"modules_to_save": ["lm_head", "norm"]},
    "output head": {"target_modules": ["q_proj", "down_proj", "lm_head"]},
}
ALSO_CHANGED = {"modules_to_save": NORMS | {"lm_head"}, "output head": {"lm_head"}}


@pytest.mark.parametrize("name", EXACT)
def test_merges_as_peft_does_under_the_mask(pruned: Path, save: Save, tmp_path: Path, name: str) -> None:
    adapter = save(**EXACT[name])
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pruned), adapter).merge_and_unload()
    before = weights_of(pruned)
    merge_adapter(pruned, adapter, tmp_path / "merged", mask="reapply")
    after = weights_of(tmp_path / "merged")
    changed = set()
    for key, weight in expected.state_dict().items():
        kept = before[key] != 0 if before[key].dim() == 2 and "layers" in key else torch.ones_like(weight, dtype=bool)
        torch.testing.assert_close(after[key], weight * kept, rtol=1e-5, atol=1e-6)
        assert torch.equal(after[key] == 0, before[key] == 0), key
        if not torch.equal(after[key], before[key]):
            changed.add(key.split(".")[-2])
    assert changed == {"q_proj", "down_proj"} | ALSO_CHANGED.get(name, set())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stored_base_weight_must_be_the_checkpoint_s(
    pruned: Path, save: Save, tmp_path: Path, dtype: torch.dtype
) -> None:
    """An adapter trained in another dtype stores it rounded."""
    adapter = save(**EXACT["output head"])
    path = adapter / "adapter_model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    record = merge_adapter(pruned, adapter, tmp_path / "merged", mask="reapply")
    assert "lm_head" in {matrix.name.removesuffix(".weight") for matrix in record.records}
    assert record.replaced_tensors == []
    tensors["base_model.model.lm_head.base_layer.weight"][3, 5] += 1
    save_file(tensors, path, {"format": "pt"})
    message = r"lm_head\.base_layer\.weight differs from lm_head\.weight of .*: it was trained on other base weights; "
    with pytest.raises(UserError, match=message) as refused:
        merge_adapter(pruned, adapter, tmp_path / "wrong", mask="reapply")
    assert len(refused.value.lines) == 1
    assert not (tmp_path / "wrong").exists()


def test_all_biases_are_merged(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    directory = make_checkpoint("qwen2")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(directory), LoraConfig(r=2, target_modules=["q_proj"], bias="all")
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "adapter")
    expected = model.merge_and_unload().state_dict()
    record = merge_adapter(directory, tmp_path / "adapter", tmp_path / "merged", mask="dense")
    after = weights_of(tmp_path / "merged")
    assert all(torch.equal(after[name].float(), expected[name].float()) for name in record.replaced_tensors)
    assert record.replaced_tensors == sorted(name for name in expected if name.endswith("bias"))


@pytest.mark.parametrize("options", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["word_embeddings"]}])
def test_what_would_also_change_a_tied_matrix_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    """Bloom ties its embeddings, here stored under the name of the output head."""
    config = BloomConfig(vocab_size=260, hidden_size=32, n_layer=1, n_head=4)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "base")
    path = tmp_path / "base/model.safetensors"
    stored = {name.replace("transformer.word_embeddings.", "lm_head."): w for name, w in load_file(path).items()}
    if "target_modules" in options:
        save_file(stored, path, {"format": "pt"})
    settings = {"r": 2, "target_modules": ["query_key_value"], "init_lora_weights": False} | options
    get_peft_model(model, LoraConfig(**settings)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="which the model ties to another matrix; untie them before pruning"):
        merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", mask="dense")


def test_keep_is_refused_with_the_reason(pruned: Path, save: Save, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"keep is impossible with .* lora, whose update fills the zeros; .*reapply"):
        merge_adapter(pruned, save(), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a pruned matrix in full": ({"modules_to_save": ["up_proj"]}, "up_proj.* in full .* was pruned"),
    "bias of the branch": ({"lora_bias": True}, "lora_bias=True cannot be merged exactly"),
    "embedding": ({"target_modules": ["embed_tokens"]}, "embed_tokens"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_merged_is_refused_by_name(pruned: Path, save: Save, tmp_path: Path, name: str) -> None:
    options, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        merge_adapter(pruned, save(**options), tmp_path / "merged", mask="reapply")


@pytest.mark.parametrize(
    ("key", "value"), [("init_lora_weights", "pissa_niter_4"), ("layer_replication", [[0, 1]]), ("option_of_2030", 1)]
)
def test_unknown_options_are_refused_by_name(pruned: Path, save: Save, tmp_path: Path, key: str, value: Any) -> None:
    adapter = save()
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match=f"{key}=.* cannot be merged exactly"):
        merge_adapter(pruned, adapter, tmp_path / "merged", mask="reapply")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank_pattern": {"(a+)+": 2}}, "rank_pattern=.* its keys must be names of modules"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern=.* its keys must be names of modules"),
        ({"alpha_pattern": {"q_proj": "x"}}, "lora_alpha 'x' is not a valid number"),
        ({"lora_alpha": None}, "lora_alpha None is not a valid number"),
        ({"r": 0}, "r 0 is not a valid number"),
    ],
)
def test_wrong_settings_are_named(
    pruned: Path, save: Save, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    adapter = save()
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        merge_adapter(pruned, adapter, tmp_path / "merged", mask="reapply")


@pytest.mark.parametrize("make", [SppConfig, MaskedLoraConfig])
@pytest.mark.parametrize("scale", [..., "2", None, math.nan, math.inf, 0, -2.0], ids=str)
def test_a_wrong_scale_is_named_before_anything_is_written(
    pruned: Path, tmp_path: Path, make: Callable[..., Any], scale: Any
) -> None:
    get_peft_model(AutoModelForCausalLM.from_pretrained(pruned), make(r=2)).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(path.read_text()) | {"scale": scale}
    if scale is ...:
        scale = settings.pop("scale") and None
    path.write_text(json.dumps(settings))
    with pytest.raises(UserError, match=f"scale {scale!r} is not a positive, finite number"):
        merge_adapter(pruned, tmp_path / "adapter", tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "pruned"]


def test_an_adapter_of_other_zeros_is_refused(pruned: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(pruned)
    get_peft_model(model, SppConfig(r=2)).save_pretrained(tmp_path / "adapter")
    other = AutoModelForCausalLM.from_pretrained(pruned)
    weight = other.model.layers[0].self_attn.q_proj.weight.data
    weight.copy_(weight.roll(1, 1))
    other.save_pretrained(tmp_path / "other")
    merge_adapter(pruned, tmp_path / "adapter", tmp_path / "merged")
    with pytest.raises(UserError, match="trained on weights with other zeros"):
        merge_adapter(tmp_path / "other", tmp_path / "adapter", tmp_path / "wrong")


def test_the_output_must_be_new(pruned: Path, save: Save) -> None:
    with pytest.raises(UserError, match="exists; name a new directory"):
        merge_adapter(pruned, save(), pruned, mask="reapply")


def test_the_command_takes_any_adapter(command: Command, here: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(here / "run" / "pruned")
    settings = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(model, settings).save_pretrained(tmp_path / "lora")
    before = weights_of(here / "run" / "pruned")
    at_once = command("merge", "tiny.yaml", "--adapter", str(tmp_path / "lora"))  # run/merged exists
    assert "merge.mask: keep is impossible" in at_once.err
    refused = command("merge", "tiny.yaml", "--adapter", str(tmp_path / "lora"), "--force")
    assert refused.code == 2
    assert "keep is impossible" in refused.err
    done = command("merge", "tiny.yaml", "--adapter", str(tmp_path / "lora"), "merge.mask=reapply", "--force")
    assert done.code == 0, done.err
    after = weights_of(here / "run" / "merged")
    assert all(torch.equal(weight == 0, after[name] == 0) for name, weight in before.items())
    assert any(not torch.equal(weight, after[name]) for name, weight in before.items())
    missing = command("merge", "tiny.yaml", "--adapter", str(tmp_path / "nothing"), "merge.mask=reapply", "--force")
    assert missing.code == 2
    assert "merge.adapter" in missing.err


def test_an_adapter_of_another_run_is_compared_with_its_record(
    command: Command, here: Path, pruned: Path, tmp_path: Path
) -> None:
    shutil.copytree(here / "run" / "adapter", other := tmp_path / "other")
    with pytest.raises(UserError, match="other was trained on other weights than"):
        merge_adapter(pruned, other, tmp_path / "merged")
    merged = weights_of(here / "run" / "merged")
    assert command("merge", "tiny.yaml", "--adapter", str(other), "--force").code == 0
    again = weights_of(here / "run" / "merged")
    assert all(torch.equal(weight, again[name]) for name, weight in merged.items())
    (other / "adapter_config.json").write_text((other / "adapter_config.json").read_text() + " ")
    damaged = command("merge", "tiny.yaml", "--adapter", str(other), "--force")
    assert damaged.code == 2
    assert "adapter_config.json is damaged" in damaged.err


def test_an_adapter_put_into_the_run_is_merged(command: Command, here: Path) -> None:
    run = here / "run"
    for path in (run / "adapter").iterdir():
        path.unlink() if path.is_file() else None
    model = AutoModelForCausalLM.from_pretrained(run / "pruned")
    settings = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(model, settings).save_pretrained(run / "adapter")
    done = command("merge", "tiny.yaml", "merge.mask=reapply", "--force")
    assert done.code == 0, done.err
    assert command("inspect", "run/merged", "--expect", "2:4").code == 0


@pytest.mark.parametrize(
    "arguments", [("train", "tiny.yaml"), ("eval", "run", "--model=adapter"), ("verify", "run")], ids=" ".join
)
def test_other_commands_name_the_merge_of_an_adapter_put_into_the_run(
    arguments: tuple[str, ...], command: Command, here: Path
) -> None:
    (here / "run/adapter/stage.json").unlink()
    refused = command(*arguments)
    run = "tiny.yaml" if "tiny.yaml" in arguments else "run"
    assert refused.code == 2
    assert refused.err == (
        "error: run/adapter/stage.json does not exist, so the adapter was trained elsewhere, or its record is lost; "
        f"sppctl merge {run} --adapter=run/adapter merges it as it is, sppctl train {run} --force replaces it by a "
        "new one\n"
    )


def test_a_run_does_not_merge_another_adapter(command: Command, here: Path) -> None:
    refused = command("run", "tiny.yaml", "merge.adapter=elsewhere", "--force")
    assert refused.code == 2
    assert "merge.adapter: sppctl run merges the adapter that it trains" in refused.err
