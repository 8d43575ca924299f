"""Bytes and speed of a checkpoint: storage by hand, which kernel where, rounds, and the command."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import Command
from transformers import AutoModelForCausalLM

from sppctl.errors import UserError
from sppctl.files.safe_files import OwnFiles, TensorFiles
from sppctl.inspect import semi_structured, speed
from sppctl.inspect.inspect import matrices
from sppctl.inspect.semi_structured import no_kernel, supports_shape
from sppctl.inspect.speed import Settings, execute
from sppctl.inspect.speed_text import Bench, Kernel
from sppctl.inspect.storage import Storage, storage
from sppctl.model.checkpoint import load_model
from sppctl.pattern import Pattern
from sppctl.pruners.masks import mask_by_row

TINY = Settings(batches=(1, 3), prompt=8, new=3, repeats=2, device="cpu")
LAYER = 32 * 32 * 2 + 16 * 32 * 2 + 48 * 32 * 3  # q and o, k and v, the three of the MLP
SPARSE = 2 * LAYER
OTHERS = 2 * 260 * 32 + 5 * 32  # embedding and head, norms


@pytest.fixture(scope="module")
def pruned(
    make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, torch.dtype], Path]:
    """pruned("2:4", dtype) -> the tiny Llama with the smallest weights of its blocks set to zero."""

    def make(text: str, dtype: torch.dtype = torch.float32) -> Path:
        directory = tmp_path_factory.mktemp("pruned") / "llama"
        shutil.copytree(make_checkpoint("llama", dtype), directory)
        files = OwnFiles(directory)
        for name in files:
            if "_proj" in name:
                weight = files.read(name)
                files.write(name, weight * mask_by_row(weight.float().abs(), Pattern.parse(text)))
        return directory

    return make


def stored(directory: Path) -> Storage:
    files = TensorFiles(directory)
    return storage(files, [matrix for matrix in matrices(files) if matrix.is_sparse])


# --- storage ----------------------------------------------------------------------------------------------------------


ROWS = 2 * (2 * 32 + 2 * 16 + 2 * 48 + 32)
ZEROS = 2 * (192 * 19 + 32 * 28)  # at 0.6: of a block's rows of 32, and of 48


@pytest.mark.parametrize(
    ("text", "itemsize", "packed", "bitmask"),
    [
        # half the values, 2 bits for each; half the values, a bit for every weight
        ("2:4", 4, 4 * SPARSE // 2 + SPARSE // 2 * 2 // 8, 4 * SPARSE // 2 + SPARSE // 8),
        ("2:4", 2, 2 * SPARSE * 9 // 16, 2 * SPARSE * 9 // 16),
        ("4:8", 2, 2 * SPARSE // 2 + SPARSE // 2 * 3 // 8, 2 * SPARSE // 2 + SPARSE // 8),  # longer indices
        ("1:4", 4, 4 * SPARSE // 4 + SPARSE // 4 * 2 // 8, 4 * SPARSE // 4 + SPARSE // 8),  # which is also 2:4
        ("0.6", 4, 4 * SPARSE, 4 * (SPARSE - ZEROS) + SPARSE // 8),  # bitmasks alone
    ],
)
def test_storage_by_hand(text: str, itemsize: int, packed: int, bitmask: int, pruned: Callable[..., Path]) -> None:
    found = stored(pruned(text, torch.float32 if itemsize == 4 else torch.bfloat16))
    assert found.dense_bytes == itemsize * (SPARSE + OTHERS)
    assert found.sparse_matrices_bytes == itemsize * SPARSE
    assert found.packed_bytes == itemsize * OTHERS + packed
    assert found.bitmask_bytes == itemsize * OTHERS + bitmask + 4 * ROWS, "an offset for each row of up to 256 columns"
    assert found.packed_matrices == (0 if text == "0.6" else 14)


def test_a_dense_checkpoint_has_nothing_to_pack(llama: Path) -> None:
    found = stored(llama)
    assert found.dense_bytes == found.packed_bytes == found.bitmask_bytes == 128_640


def test_matrices_that_are_stored_transposed(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(make_checkpoint("gpt2"), tmp_path, dirs_exist_ok=True)
    files = OwnFiles(tmp_path)
    name = next(name for name in files if name.endswith("mlp.c_fc.weight"))
    weight = files.read(name)
    files.write(name, weight * mask_by_row(weight.t().abs().contiguous(), Pattern.parse("2:4")).t())
    count = weight.numel()
    assert stored(tmp_path).dense_bytes - stored(tmp_path).packed_bytes == count * 4 - (count // 2 * 4 + count // 8)


# --- speed on a CPU ---------------------------------------------------------------------------------------------------


NOT_2_4 = "not all sparse matrices are 2:4"


@pytest.mark.parametrize(
    ("text", "note", "absent"),
    [
        ("2:4", "exactly as fast as a dense one", NOT_2_4),
        ("1:4", "storage: by formula", NOT_2_4),
        ("4:8", NOT_2_4, "unstructured"),
        ("0.6", "unstructured zeros", NOT_2_4),
        (None, "is dense", "storage: by formula"),
    ],
)
def test_a_cpu_times_dense_weights_and_says_why(
    text: str | None, note: str, absent: str, pruned: Callable[..., Path], llama: Path
) -> None:
    found = execute(str(pruned(text) if text else llama), TINY)
    assert [row.batch for row in found.speed] == [1, 3]
    for row in found.speed:
        assert row.prefill_tokens_per_s.keys() == row.decode_ms_per_token.keys() == {"dense"}
        assert row.prefill_tokens_per_s["dense"] > 0
        assert row.prefill_speedup is row.decode_speedup is row.max_relative_difference is None
    assert found.kernel.layers == 0
    assert found.notes[0].startswith("no sparse kernel on this device (cpu)")
    notes = " ".join(found.notes)
    assert note in notes
    assert absent not in notes


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt"])
def test_decoding_with_the_cache_gives_the_logits_of_a_whole_forward(
    make_checkpoint: Callable[..., Path], family: str
) -> None:
    model = load_model(make_checkpoint(family), torch.device("cpu"), "float32")
    tokens = torch.randint(250, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        *seconds, logits = speed.run(model, tokens, 8)
        whole = model(tokens).logits[:, 7:]
    assert min(seconds) > 0
    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)


# --- which kernel, when -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "problem"),
    [
        ("cpu", (0, 0), torch.bfloat16, "no sparse kernel on this device"),
        ("mps", (0, 0), torch.float16, "no sparse kernel on this device"),
        ("cuda", (7, 5), torch.float16, "compute capability 7.5"),
        ("cuda", (8, 0), torch.float32, "float32"),
        ("cuda", (8, 0), torch.float16, None),
        ("cuda", (9, 0), torch.bfloat16, None),
    ],
)
def test_where_a_kernel_is(device: str, capability: tuple[int, int], dtype: torch.dtype, problem: str | None) -> None:
    reason = no_kernel(device, capability, dtype)
    assert reason is None if problem is None else problem in str(reason)


def test_shapes_that_the_kernels_take(monkeypatch: pytest.MonkeyPatch) -> None:
    assert supports_shape(torch.Size((32, 48)), torch.bfloat16)
    assert not supports_shape(torch.Size((30, 48)), torch.bfloat16)
    monkeypatch.setattr(torch.sparse.SparseSemiStructuredTensor, "_FORCE_CUTLASS", True)
    assert supports_shape(torch.Size((32, 64)), torch.bfloat16)
    assert not supports_shape(torch.Size((32, 48)), torch.bfloat16)


def test_both_kinds_of_weights_take_turns(pruned: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The rounds, with ordinary weights that are 1 % larger standing in for those of the kernel."""
    monkeypatch.setattr(speed, "no_kernel", lambda *_: None)
    monkeypatch.setattr(semi_structured, "to_sparse_semi_structured", lambda weight: weight * 1.01)
    model = load_model(pruned("2:4", torch.bfloat16), torch.device("cpu"), "bfloat16")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    weights, kernel = speed.two_weights(model)
    assert kernel == Kernel(layers=14, not_2_4=1, shapes_not_taken=[], reason=None)
    linear = torch.nn.functional.linear

    def matrices_only(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        assert x.dim() == 2 or all(weight is not sparse for _, _, sparse in weights.layers)
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", matrices_only)
    for row in speed.speed(model, weights, TINY):
        assert row.prefill_tokens_per_s.keys() == {"dense", "sparse"}
        assert row.prefill_speedup > 0
        assert row.decode_speedup > 0
        assert 0 < row.max_relative_difference < 0.2
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_a_kernel_that_refuses_is_a_reason(pruned: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "no_kernel", lambda *_: None)  # what PyTorch itself says to a CPU tensor
    model = load_model(pruned("2:4", torch.bfloat16), torch.device("cpu"), "bfloat16")
    weights, kernel = speed.two_weights(model)
    assert not weights.layers
    assert "refuses this GPU or model" in str(kernel.reason)


def test_transposed_layers_have_no_kernel(
    make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "no_kernel", lambda *_: None)
    model = load_model(make_checkpoint("gpt2"), torch.device("cpu"), "float32")
    assert "no linear layer of the checkpoint is 2:4" in str(speed.two_weights(model)[1].reason)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.view(-1, 4, model.transformer.h[0].mlp.c_fc.nf)[:, 2:] = 0
    assert "2:4 layers are Conv1D (GPT-2)" in str(speed.two_weights(model)[1].reason)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="needs a GPU with 2:4 kernels"
)
def test_on_a_gpu_sparse_weights_give_the_same_logits(pruned: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(pruned("2:4", torch.bfloat16), tmp_path, dirs_exist_ok=True)
    torch.manual_seed(0)
    config = AutoModelForCausalLM.from_pretrained(tmp_path).config
    config.hidden_size, config.intermediate_size, config.head_dim = 256, 512, 64  # every kernel supports these shapes
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "_proj" in name:
                weight *= mask_by_row(weight.float().abs(), Pattern.parse("2:4"))
    model.save_pretrained(tmp_path)
    found = execute(str(tmp_path), Settings(batches=(1, 8), prompt=32, new=4, repeats=2, device="cuda"))
    assert found.kernel.reason is None
    assert found.kernel.layers == 14
    for row in found.speed:
        assert row.max_relative_difference < 0.05
        assert row.prefill_speedup > 0


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_json_or_tables(pruned: Callable[..., Path], command: Command) -> None:
    options = ["--batch", "1,2", "--prompt", "4", "--new", "2", "--repeats", "1", "--device", "cpu"]
    result = command("bench", str(pruned("2:4")), *options, "--json").json
    assert list(result) == [field.name for field in fields(Bench)]
    assert [row["batch"] for row in result["speed"]] == [1, 2]
    assert result["patterns"] == ["2:4"]
    printed = command("bench", str(pruned("2:4")), *options).out
    for text in ("prefill dense, tokens/s", "values and bitmask", "no sparse kernel"):
        assert text in printed


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--prompt", "126", "--new", "3"], "longer than the model's limit of 128"),
        (["--batch", "1,two"], "--batch: 1,two"),
        (["--batch", "1,0"], "--batch: 0"),
        (["--repeats", "0"], "--repeats: 0"),
        (["--new", "0"], "--new: 0"),
        (["--device", "moon"], "--device: moon is not usable"),
    ],
)
def test_wrong_options_end_with_one_line(llama: Path, command: Command, options: list[str], problem: str) -> None:
    refused = command("bench", str(llama), "--prompt", "8", *options)
    assert (refused.code, refused.out) == (2, "")
    assert refused.err.count("\n") == 1
    assert problem in refused.err


def test_prompts_are_shortened_unless_their_length_is_given(llama: Path, command: Command) -> None:
    outcome = command("bench", str(llama), "--batch", "1", "--new", "2", "--repeats", "1", "--json")
    assert (outcome.code, outcome.json["prompt"]) == (0, 126)
    assert "bench: prompts of 126 tokens, as the model has 128 positions" in outcome.err


def test_what_is_not_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        execute(str(tmp_path), TINY)
