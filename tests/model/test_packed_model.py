"""Loading with packed weights: the same model bit for bit, without ever holding it dense."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from conftest import FAMILIES
from torch import Tensor, nn

from sppctl.errors import StageError, UserError
from sppctl.files.safe_files import OwnFiles, TensorFiles
from sppctl.model import packed_model
from sppctl.model.blocks import Skeleton
from sppctl.model.checkpoint import load_config, load_model
from sppctl.model.packed_model import packable
from sppctl.packed.linear import PackedLinear, num_packed

CPU = torch.device("cpu")
TOKENS = torch.randint(0, 250, (2, 9), generator=torch.Generator().manual_seed(0))
NOT_LINEAR = ("gpt2",)  # Conv1D


def sparse(directory: Path, share: float = 0.75) -> dict[str, str]:
    """Zeros in the matrices that can be packed; returns their names."""
    names, files = packable(TensorFiles(directory), Skeleton(load_config(directory))), OwnFiles(directory)
    for tensor in names.values():
        weight = files.read(tensor)
        scores = torch.rand(weight.shape, generator=torch.Generator().manual_seed(len(tensor)))
        files.write(tensor, weight.masked_fill(scores < share, 0))
    return names


@pytest.fixture
def checkpoint(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., tuple[Path, dict[str, str]]]:
    """checkpoint(family, dtype, ...) -> a sparse copy of the tiny checkpoint, and its packable matrices."""

    def make(
        family: str = "llama", dtype: torch.dtype = torch.float32, share: float = 0.75, shards: str = "1GB"
    ) -> tuple[Path, dict[str, str]]:
        directory = tmp_path / family
        shutil.copytree(make_checkpoint(family, dtype, shards), directory)
        return directory, sparse(directory, share)

    return make


def same_bits(one: Tensor, other: Tensor) -> bool:
    kinds = {2: torch.int16, 4: torch.int32}
    return one.dtype == other.dtype and torch.equal(one.view(kinds[one.itemsize]), other.view(kinds[one.itemsize]))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in NOT_LINEAR])
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "bfloat16")])
def test_every_family_is_the_same_model(
    family: str, dtypes: tuple[str, str], checkpoint: Callable[..., tuple[Path, dict[str, str]]]
) -> None:
    directory, names = checkpoint(family, getattr(torch, dtypes[0]))
    dense, packed = (load_model(directory, CPU, dtypes[1], packed=packed) for packed in (False, True))
    assert names
    assert {name for name, m in packed.named_modules() if isinstance(m, PackedLinear)} == names.keys()
    parameters = dict(packed.named_parameters())
    for name, parameter in dense.named_parameters():
        layer = name.removesuffix(".weight")
        other = packed.get_submodule(layer).unpack() if layer in names else parameters.pop(name)
        assert same_bits(parameter.detach(), other), name
    assert not parameters
    buffers = dict(packed.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in dense.named_buffers())
    count = sum(parameter.numel() for parameter in dense.parameters())
    assert sum(parameter.numel() for parameter in packed.parameters()) + num_packed(packed) == count
    with torch.no_grad():
        assert same_bits(dense(TOKENS).logits, packed(TOKENS).logits)
    assert not packed.training
    assert packed.config.to_dict() == dense.config.to_dict()
    assert packed.generation_config.to_dict() == dense.generation_config.to_dict()


@pytest.mark.parametrize(("stored", "computed"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_another_compute_dtype(
    stored: str, computed: str, checkpoint: Callable[..., tuple[Path, dict[str, str]]]
) -> None:
    directory, names = checkpoint("llama", getattr(torch, stored), shards="40KB")
    dense, packed = (load_model(directory, CPU, computed, packed=packed) for packed in (False, True))
    assert same_bits(dense(TOKENS).logits, packed(TOKENS).logits)
    layer = packed.get_submodule(next(iter(names)))
    assert layer.weight.values.itemsize == 2, "the narrower of the two"


def test_tensors_at_odd_offsets(checkpoint: Callable[..., tuple[Path, dict[str, str]]]) -> None:
    directory, _ = checkpoint()
    expected = load_model(directory, CPU, "float32")(TOKENS).logits
    path = directory / "model.safetensors"
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.dumps(json.loads(content[8 : 8 + size])).encode()
    header += b" " * (8 - len(header) % 8 + 3)
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + size :])
    assert (8 + len(header)) % 8 == 3
    assert same_bits(load_model(directory, CPU, "float32", packed=True)(TOKENS).logits, expected)


def test_a_matrix_that_would_not_shrink_stays_dense(checkpoint: Callable[..., tuple[Path, dict[str, str]]]) -> None:
    directory, names = checkpoint()
    first, files = next(iter(names)), OwnFiles(directory)
    files.write(names[first], torch.ones(files.spec(names[first]).shape))
    model = load_model(directory, CPU, "float32", packed=True)
    assert isinstance(model.get_submodule(first), nn.Linear)
    assert same_bits(load_model(directory, CPU, "float32")(TOKENS).logits, model(TOKENS).logits)


def test_a_checkpoint_without_zeros_is_refused_with_both_sizes(llama: Path) -> None:
    problem = r"model.weights: .* is not sparse enough to pack: its matrices take \S+ GiB packed and \S+ GiB dense; set"
    with pytest.raises(UserError, match=problem):
        load_model(llama, CPU, "float32", packed=True)


def test_a_quantised_checkpoint_is_refused(checkpoint: Callable[..., tuple[Path, dict[str, str]]]) -> None:
    directory, _ = checkpoint()
    config = json.loads((directory / "config.json").read_text())
    quantised = config | {"quantization_config": {"quant_method": "fp8"}}
    (directory / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(UserError, match=r"model.weights: .* is quantised, and cannot be packed; set it to dense"):
        load_model(directory, CPU, "float32", packed=True)


def test_a_model_that_does_not_fit_even_packed_is_refused(
    checkpoint: Callable[..., tuple[Path, dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, _ = checkpoint()
    sizes = iter([1 << 30] * 6 + [100] * 2)
    monkeypatch.setattr(packed_model.machine, "free_memory", lambda _: next(sizes))
    with pytest.raises(StageError, match=r"does not fit into memory: .* GiB packed, and 0.00 GiB are left"):
        load_model(directory, CPU, "float32", packed=True)


def test_generation(checkpoint: Callable[..., tuple[Path, dict[str, str]]]) -> None:
    directory, _ = checkpoint()
    texts = [
        load_model(directory, CPU, "float32", packed=packed).generate(TOKENS, max_new_tokens=5, do_sample=False)
        for packed in (False, True)
    ]
    assert torch.equal(*texts)


MEASURED = """
import sys, torch
from pathlib import Path
from sppctl import machine
from sppctl.model.checkpoint import load_model
torch.set_num_threads(1)
large, tiny, packed = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "packed"
load_model(tiny, torch.device("cpu"), "bfloat16", packed=packed)(torch.arange(4)[None])  # imports, buffers
machine.reset_peak_memory()
before = machine.peak_memory_mb()["process"]
model = load_model(large, torch.device("cpu"), "bfloat16", packed=packed)
sum(float(parameter.sum()) for parameter in model.parameters())  # mapped files are in memory once they are read
print(machine.peak_memory_mb()["process"] - before)
"""


@pytest.mark.slow
def test_the_dense_model_is_never_in_memory(
    tmp_path: Path, checkpoint: Callable[..., tuple[Path, dict[str, str]]]
) -> None:
    """At 75 % zeros a third of it, and the largest matrix (6 % of it)."""
    config = transformers.LlamaConfig(
        vocab_size=260,
        hidden_size=1536,
        intermediate_size=4096,
        num_hidden_layers=4,
        num_attention_heads=12,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02, generator=generator)
        if parameter.dim() == 2 and len(parameter) > 260:
            parameter.data.view(-1)[torch.rand(parameter.numel(), generator=generator) < 0.75] = 0
    directory = tmp_path / "large"
    model.save_pretrained(directory)
    size = (directory / "model.safetensors").stat().st_size / 2**20
    tiny, _ = checkpoint("llama", torch.bfloat16)
    growth = {}
    for kind in ("packed", "dense"):
        command = [sys.executable, "-c", MEASURED, str(directory), str(tiny), kind]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        growth[kind] = float(done.stdout.split()[-1])
    assert growth["packed"] < 0.5 * size
    assert growth["dense"] > 0.9 * size
