"""The digest of the zeros in an adapter's configuration, and the warnings that follow from it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from conftest import PROJECTIONS, Command, pruned_llama
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from sppctl import MaskedLoraConfig, SppConfig, SteConfig
from sppctl.files.integrity import mask_digest, masks_digest


def test_a_new_adapter_records_its_zeros(llama: Path, tmp_path: Path) -> None:
    model = pruned_llama(llama)
    weights = {name: module.weight for name, module in model.named_modules() if name.rpartition(".")[2] in PROJECTIONS}
    digest = masks_digest({name: mask_digest(weight) for name, weight in weights.items()})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="SppConfig")
        get_peft_model(model, SppConfig(r=2)).save_pretrained(tmp_path)
        PeftModel.from_pretrained(pruned_llama(llama), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["mask_digest"] == digest


@pytest.mark.parametrize("config", [SppConfig, MaskedLoraConfig])
def test_dense_weights_are_named(llama: Path, config: type[SppConfig]) -> None:
    with pytest.warns(UserWarning, match=rf"{config.__name__}: model.layers.0.self_attn.q_proj and 13 more .* dense"):
        get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config(r=2))


def test_a_method_that_chooses_its_mask_may_start_dense(llama: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="SteConfig")
        get_peft_model(AutoModelForCausalLM.from_pretrained(llama), SteConfig(pattern="2:4"))


def test_other_zeros_are_named(llama: Path, tmp_path: Path) -> None:
    get_peft_model(pruned_llama(llama), SppConfig(r=2)).save_pretrained(tmp_path)
    other = pruned_llama(llama)
    weight = other.model.layers[1].mlp.up_proj.weight.data
    weight.copy_(weight.roll(1, 1))
    with pytest.warns(UserWarning, match="other zeros than those that the adapter 'default' was trained on"):
        PeftModel.from_pretrained(other, tmp_path)


def test_a_configuration_serves_several_models(llama: Path) -> None:
    other = pruned_llama(llama)
    weight = other.model.layers[1].mlp.up_proj.weight.data
    weight.copy_(weight.roll(1, 1))
    config = SppConfig(r=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="SppConfig")
        digests = {
            get_peft_model(model, config).peft_config["default"].mask_digest for model in (pruned_llama(llama), other)
        }
    assert len(digests) == 2
    assert config.mask_digest is None


def test_an_adapter_without_a_digest_still_loads(llama: Path, tmp_path: Path) -> None:
    model = pruned_llama(llama)
    get_peft_model(model, SppConfig(r=2, init_weights=False)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    settings = json.loads(path.read_text())
    del settings["mask_digest"]
    path.write_text(json.dumps(settings))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="SppConfig")
        loaded = PeftModel.from_pretrained(pruned_llama(llama), tmp_path)
    ids = torch.arange(8).view(1, -1)
    assert not torch.equal(loaded.eval()(ids).logits, pruned_llama(llama)(ids).logits)


def test_training_writes_the_digest_of_the_pruned_weights(command: Command, here: Path, llama: Path) -> None:
    adapter = here / "run" / "adapter"
    digest = json.loads((adapter / "adapter_config.json").read_text())["mask_digest"]
    assert digest
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="SppConfig")
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(here / "run" / "pruned"), adapter)
    with pytest.warns(UserWarning, match="other zeros"):
        PeftModel.from_pretrained(pruned_llama(llama), adapter)
