"""No number from weights that are not in the files: what is checked before anything is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import FAMILIES
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sppctl.errors import UserError
from sppctl.files.names import INDEX_NAME, SINGLE_NAME
from sppctl.files.safe_files import TensorFiles
from sppctl.model.blocks import BlockStack
from sppctl.model.checkpoint import load_model
from sppctl.model.weights import check_directory, refuse_random, renamed

CPU = torch.device("cpu")
UP, THIRD = "model.layers.1.mlp.up_proj.weight", "model.layers.2.input_layernorm.weight"
Tensors = dict[str, Tensor]


@pytest.fixture
def changed(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """changed(change, family, key=value...): a tiny checkpoint with other tensors and settings in its config.json."""

    def make(change: Callable[[Tensors], Any] = len, family: str = "llama", **settings: Any) -> Path:
        out = tmp_path / f"changed-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(make_checkpoint(family), out)
        tensors = load_file(out / SINGLE_NAME)
        change(tensors)
        save_file(tensors, out / SINGLE_NAME, {"format": "pt"})
        path = out / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        return out

    return make


def complaint(directory: Path) -> str:
    """The one line in which the check refuses a checkpoint."""
    with pytest.raises(UserError) as error:
        check_directory(directory)
    assert str(error.value).startswith(f"{directory}")
    assert "\n" not in str(error.value)
    return str(error.value)


def third_block(tensors: Tensors) -> None:
    tensors |= {n.replace("layers.1.", "layers.2."): t.clone() for n, t in tensors.items() if "layers.1." in n}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_whole(family: str, make_checkpoint: Callable[..., Path]) -> None:
    check_directory(make_checkpoint(family))


def test_old_files_hold_tables_that_are_computed_today(changed: Callable[..., Path]) -> None:
    def tables(tensors: Tensors) -> None:
        tensors |= {f"model.layers.{block}.self_attn.rotary_emb.inv_freq": torch.ones(4) for block in range(2)}

    def masks(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)  # as the headless GPT-2 was published
        tensors |= {f"h.{block}.attn.bias": torch.ones(1, 1, 128, 128) for block in range(2)}
        tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)

    check_directory(changed(tables))
    check_directory(changed(masks, "gpt2"))
    assert "h.0.attn.masked_bias" in complaint(
        changed(lambda t: t.update({"h.0.attn.masked_bias": torch.ones(7)}), "gpt2")
    )


def test_a_tied_head_is_stored_not_at_all_or_twice_or_alone(changed: Callable[..., Path]) -> None:
    def alone(tensors: Tensors) -> None:
        tensors.pop("model.embed_tokens.weight")

    def twice(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    for change in (lambda tensors: tensors.pop("lm_head.weight"), alone, twice):
        directory = changed(change, tie_word_embeddings=True)
        check_directory(directory)
        model = load_model(directory, CPU, "float32")
        assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("change", "settings", "named"),
    [
        (lambda t: t.pop("lm_head.weight"), {}, "no tensor lm_head.weight, which config.json implies;"),
        (lambda t: t.pop(UP), {}, f"no tensor {UP}, which"),
        (len, {"num_hidden_layers": 3}, f"no tensor {THIRD}, which config.json implies (and 8"),
        (third_block, {}, f"{THIRD} (model.safetensors) is not part of the model"),
        (lambda t: t.update(extra=torch.ones(2)), {}, "extra (model.safetensors) is not part of the model"),
        (lambda t: t.update({UP: t[UP].t().contiguous()}), {}, f"{UP} has shape (32, 48), the model's is (48, 32)"),
        (len, {"vocab_size": 300}, "lm_head.weight has shape (260, 32), the model's is (300, 32) (and 1 more)"),
        (
            lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:200].clone()}),
            {"tie_word_embeddings": True},
            "lm_head.weight has shape (200, 32), the model's is (260, 32)",
        ),
        (lambda t: t.update({UP[6:]: t[UP].clone()}), {}, f"is stored twice, as {UP[6:]} and {UP}"),
        (
            lambda t: t.update({UP: t[UP].to(torch.int8)}),
            {},
            f"{UP} is stored as int8, and config.json does not say how",
        ),
    ],
)
def test_what_the_files_do_not_hold_is_named(
    change: Callable[[Tensors], Any], settings: dict[str, Any], named: str, changed: Callable[..., Path]
) -> None:
    assert named in complaint(changed(change, **settings))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_an_expert_is_named_as_it_is_stored(family: str, changed: Callable[..., Path]) -> None:
    inside, part = ("block_sparse_moe", "w3") if family == "mixtral" else ("mlp", "up_proj")
    name = f"model.layers.1.{inside}.experts.2.{part}.weight"
    cut = complaint(changed(lambda tensors: tensors.update({name: tensors[name][:7].clone()}), family))
    assert f"{name} has shape (7, 32), the model's is (" in cut
    assert f"no tensor {name}, which" in complaint(changed(lambda tensors: tensors.pop(name), family))
    fifth = name.replace("experts.2", "experts.4")

    def one_more(tensors: Tensors) -> None:
        tensors |= {
            n.replace("experts.2", "experts.4"): t.clone() for n, t in tensors.items() if "s.1." in n and "ts.2." in n
        }

    assert (
        f".experts.4.{'w1' if part == 'w3' else 'down_proj'}.weight (model.safetensors) is not part of the model"
        in complaint(changed(one_more, family))
    )
    assert f"{fifth} (model.safetensors) is not part of the model" in complaint(
        changed(lambda tensors: tensors.update({fifth: tensors[name].clone()}), family)
    )


def test_experts_stored_one_by_one_and_as_one(changed: Callable[..., Path]) -> None:
    name = "model.layers.1.block_sparse_moe.experts.{}.w2.weight"

    def also_as_one(tensors: Tensors) -> None:
        tensors["model.layers.1.mlp.experts.down_proj"] = torch.stack([tensors[name.format(i)] for i in range(4)])

    words = f"{name.format(0)} (model.safetensors) is not part of the model that config.json describes (and 3 more)"
    assert words in complaint(changed(also_as_one, "mixtral"))


def test_a_renamed_head_is_there_once(changed: Callable[..., Path]) -> None:
    twice = changed(lambda t: t.update({"lm_head.weight": t["embed_out.weight"].clone()}), "gpt_neox")
    assert "the same tensor is stored twice, as embed_out.weight and lm_head.weight" in complaint(twice)
    assert "no tensor lm_head.weight" in complaint(changed(lambda t: t.pop("embed_out.weight"), "gpt_neox"))


def test_every_way_of_loading_asks(changed: Callable[..., Path]) -> None:
    directory = changed(lambda tensors: tensors.pop("lm_head.weight"))
    for load in (load_model, BlockStack):
        with pytest.raises(UserError, match=r"no tensor lm_head\.weight, which config\.json implies"):
            load(directory, CPU, "float32")


def test_what_transformers_would_make_up_is_refused_after_loading_too() -> None:
    whole: dict[str, Any] = {"missing_keys": set(), "mismatched_keys": set()}
    refuse_random("here", whole)
    with pytest.raises(UserError, match=r"^here holds no b of the model's shape"):
        refuse_random("here", whole | {"mismatched_keys": {("b", (2,), (3,))}})


def test_shards_without_an_index(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(make_checkpoint("llama", max_shard_size="20KB"), tmp_path / "m")
    (tmp_path / "m" / INDEX_NAME).unlink()
    assert f"holds model-00001-of-00006.safetensors, but neither {INDEX_NAME} nor" in complaint(tmp_path / "m")


@pytest.mark.parametrize("file", ["other.safetensors", "adapter_model.bin", "../m/model.safetensors"])
def test_a_configuration_that_names_other_weights(file: str, changed: Callable[..., Path]) -> None:
    assert f"config.json names {file!r} as transformers_weights" in complaint(changed(transformers_weights=file))


def test_a_quantised_checkpoint_is_left_to_its_library(changed: Callable[..., Path]) -> None:
    check_directory(
        changed(lambda tensors: tensors.update(scale=torch.ones(1)), quantization_config={"quant_method": "fp8"})
    )


def test_a_library_that_is_missing_is_named(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise ImportError("Quantisation needs bits: `pip install bits`\nand a GPU")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", missing)
    with pytest.raises(UserError, match=r"^model\.path: .*\(Quantisation needs bits: `pip install bits`\); install "):
        load_model(llama, CPU, "float32")


class Loaded(nn.Module):
    """A model whose weights are a stored tensor, half of it, and its transpose."""

    config = SimpleNamespace()

    @classmethod
    def from_pretrained(cls, *_: Any, state_dict: Tensors, **__: Any) -> tuple[nn.Module, None]:
        made, stored = cls(), state_dict["stored"]
        for name, tensor in {"same": stored, "first": stored[:2], "turned": stored.t()}.items():
            made.register_parameter(name, nn.Parameter(tensor))
        return made, None


def test_a_changed_tensor_is_not_only_renamed(tmp_path: Path) -> None:
    save_file({"stored": torch.zeros(4, 4)}, tmp_path / SINGLE_NAME)
    assert renamed(TensorFiles(tmp_path), Loaded()) == {"same": "stored"}


def test_an_adapter_beside_the_weights_is_not_attached(changed: Callable[..., Path]) -> None:
    from peft import LoraConfig, get_peft_model

    directory = changed()
    model = load_model(directory, CPU, "float32")
    tokens = torch.arange(8)[None]
    expected = model(tokens).logits
    settings = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(directory), settings).save_pretrained(directory)
    assert not torch.equal(AutoModelForCausalLM.from_pretrained(directory)(tokens).logits, expected)  # attached
    assert torch.equal(load_model(directory, CPU, "float32")(tokens).logits, expected)
