from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sppctl import cli
from sppctl.errors import UserError
from sppctl.files.safe_files import OwnFiles, TensorFiles
from sppctl.inspect import semi_structured, speed
from sppctl.inspect.inspect import matrices
from sppctl.inspect.semi_structured import no_kernel, relative_difference, takes
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


def test_storage_of_2_4_by_hand(pruned: Callable[..., Path]) -> None:
    found = stored(pruned("2:4"))
    assert found.dense_bytes == 4 * (SPARSE + OTHERS) == 128_640
    assert found.sparse_matrices_bytes == 4 * SPARSE
    # half the values in 4 bytes, 2 bits for each
    assert found.packed_bytes == 4 * OTHERS + 4 * SPARSE // 2 + SPARSE // 2 * 2 // 8 == 99_840
    # half the values, a bit for every weight
    assert found.bitmask_bytes == 4 * OTHERS + 4 * SPARSE // 2 + SPARSE // 8 == 99_840
    assert found.packed_matrices == 14


def test_4_8_needs_longer_indices(pruned: Callable[..., Path]) -> None:
    found = stored(pruned("4:8", torch.bfloat16))
    assert found.packed_bytes == 2 * OTHERS + 2 * SPARSE // 2 + SPARSE // 2 * 3 // 8
    assert found.bitmask_bytes == 2 * OTHERS + 2 * SPARSE // 2 + SPARSE // 8


def test_unstructured_zeros_are_packed_with_bitmasks_alone(pruned: Callable[..., Path]) -> None:
    found = stored(pruned("0.6"))
    zeros = 2 * (192 * 19 + 32 * 28)  # of a block's rows of 32, and of 48
    assert found.packed_matrices == 0
    assert found.packed_bytes == found.dense_bytes
    assert found.bitmask_bytes == 4 * OTHERS + 4 * (SPARSE - zeros) + SPARSE // 8


def test_a_dense_checkpoint_has_nothing_to_pack(llama: Path) -> None:
    found = stored(llama)
    assert found.dense_bytes == found.packed_bytes == found.bitmask_bytes


def test_matrices_that_are_stored_transposed(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(make_checkpoint("gpt2"), tmp_path, dirs_exist_ok=True)
    files = OwnFiles(tmp_path)
    name = next(name for name in files if name.endswith("mlp.c_fc.weight"))
    weight = files.read(name)
    files.write(name, weight * mask_by_row(weight.t().abs().contiguous(), Pattern.parse("2:4")).t())
    count = weight.numel()
    assert stored(tmp_path).dense_bytes - stored(tmp_path).packed_bytes == count * 4 - (count // 2 * 4 + count // 8)


# --- speed on a CPU ---------------------------------------------------------------------------------------------------


def test_a_cpu_times_dense_weights_and_says_why(pruned: Callable[..., Path]) -> None:
    found = execute(str(pruned("2:4")), TINY)
    assert [row.batch for row in found.speed] == [1, 3]
    for row in found.speed:
        assert row.prefill_tokens_per_s.keys() == row.decode_ms_per_token.keys() == {"dense"}
        assert row.prefill_tokens_per_s["dense"] > 0
        assert row.prefill_speedup is row.decode_speedup is row.max_relative_difference is None
    assert found.patterns == ["2:4"]
    assert found.kernel.layers == 0
    assert found.notes[0].startswith("no sparse kernel on this device (cpu)")
    assert "exactly as fast as a dense one" in found.notes[0]
    assert not any("not all sparse matrices are 2:4" in note for note in found.notes)


@pytest.mark.parametrize(
    ("text", "said"), [("4:8", "not all sparse matrices are 2:4"), ("0.6", "unstructured zeros"), (None, "is dense")]
)
def test_other_zeros_gain_no_time_and_it_is_said(
    pruned: Callable[..., Path], llama: Path, text: str | None, said: str
) -> None:
    found = execute(str(pruned(text) if text else llama), TINY)
    assert any(said in note for note in found.notes)


def test_1_4_is_2_4_too(pruned: Callable[..., Path]) -> None:
    found = execute(str(pruned("1:4")), TINY)
    assert not any("not all sparse matrices are 2:4" in note for note in found.notes)


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
    ("device", "capability", "dtype", "said"),
    [
        ("cpu", (0, 0), torch.bfloat16, "no sparse kernel on this device"),
        ("mps", (0, 0), torch.float16, "no sparse kernel on this device"),
        ("cuda", (7, 5), torch.float16, "compute capability 7.5"),
        ("cuda", (8, 0), torch.float32, "float32"),
        ("cuda", (8, 0), torch.float16, None),
        ("cuda", (9, 0), torch.bfloat16, None),
    ],
)
def test_where_a_kernel_is(device: str, capability: tuple[int, int], dtype: torch.dtype, said: str | None) -> None:
    reason = no_kernel(device, capability, dtype)
    assert reason is None if said is None else said in str(reason)


def test_shapes_that_the_kernels_take(monkeypatch: pytest.MonkeyPatch) -> None:
    assert takes(torch.Size((32, 48)), torch.bfloat16)
    assert not takes(torch.Size((30, 48)), torch.bfloat16)
    monkeypatch.setattr(torch.sparse.SparseSemiStructuredTensor, "_FORCE_CUTLASS", True)
    assert takes(torch.Size((32, 64)), torch.bfloat16)
    assert not takes(torch.Size((32, 48)), torch.bfloat16)


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
        assert x.dim() == 2 or all(weight is not sparse for sparse in weights.sparse)
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


def test_transposed_layers_have_no_kernel_and_it_is_said(
    make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "no_kernel", lambda *_: None)
    model = load_model(make_checkpoint("gpt2"), torch.device("cpu"), "float32")
    assert "no linear layer of the checkpoint is 2:4" in str(speed.two_weights(model)[1].reason)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.view(-1, 4, model.transformer.h[0].mlp.c_fc.nf)[:, 2:] = 0
    assert "2:4 layers are Conv1D (GPT-2)" in str(speed.two_weights(model)[1].reason)


def test_difference_by_hand() -> None:
    assert relative_difference(torch.tensor([-4.0, 2.0]), torch.tensor([-3.0, 2.5])) == 0.25


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="needs a GPU with 2:4 kernels"
)
def test_on_a_gpu_sparse_weights_give_the_same_logits(pruned: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(pruned("2:4", torch.bfloat16), tmp_path, dirs_exist_ok=True)
    torch.manual_seed(0)
    config = AutoModelForCausalLM.from_pretrained(tmp_path).config
    config.hidden_size, config.intermediate_size, config.head_dim = 256, 512, 64  # shapes that every kernel takes
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


def test_the_command_prints_json(
    pruned: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--batch", "1,2", "--prompt", "4", "--new", "2", "--repeats", "1", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["sppctl", "bench", str(pruned("2:4")), *options, "--json"])
    _main()
    found = json.loads(capsys.readouterr().out)
    assert list(found) == [field.name for field in fields(Bench)]
    assert [row["batch"] for row in found["speed"]] == [1, 2]


def test_the_command_prints_tables(
    pruned: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--batch", "1", "--prompt", "4", "--new", "2", "--repeats", "1", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["sppctl", "bench", str(pruned("2:4")), *options])
    _main()
    printed = capsys.readouterr().out
    assert "prefill dense, tokens/s" in printed
    assert "values and bitmask" in printed
    assert "no sparse kernel" in printed


def _main() -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--prompt", "126", "--new", "3"], "longer than the model's limit of 128"),
        (["--batch", "1,two"], "--batch: 1,two"),
        (["--batch", "1,0"], "--batch: 0"),
        (["--repeats", "0"], "--repeats: 0"),
        (["--new", "0"], "--new: 0"),
        (["--device", "moon"], "--device: moon is not usable"),
    ],
)
def test_wrong_options_end_with_one_line(
    llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["sppctl", "bench", str(llama), "--prompt", "8", *options])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert said in printed.err


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        execute(str(tmp_path), TINY)
