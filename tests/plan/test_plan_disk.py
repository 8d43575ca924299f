"""The planned disk space against files that training and evaluation really write."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import stage_calls
import torch
from conftest import BF16, Cpu
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sppctl.config.settings import PROJECTIONS, Config
from sppctl.evaluate import perplexity
from sppctl.evaluate.divergence import Reference
from sppctl.model import checkpoint
from sppctl.model.refreshed import REFRESHED
from sppctl.plan import run as plan
from sppctl.plan import storage
from sppctl.pruners import dsnot

Configure = Callable[..., Config]


def tensor_bytes(file: Path) -> int:
    return sum(tensor.nbytes for tensor in load_file(file).values())


def optimizer_bytes(file: Path) -> int:
    """The moments of AdamW, without its counters of steps."""
    states = torch.load(file, weights_only=True)["state"].values()
    return sum(value.nbytes for state in states for value in state.values() if value.dim())


def test_the_masks_of_ste_are_stored_with_its_adapter(configure: Configure, pruned: Any, tmp_path: Path) -> None:
    config = configure("train.method=ste", "train.max_steps=2", "train.save_steps=1", "train.keep_checkpoints=1")
    stage_calls.train(config, *pruned, tmp_path / "adapter")
    disk = plan.execute(config).disk
    assert tensor_bytes(tmp_path / "adapter" / "adapter_model.safetensors") == disk["adapter"]
    [saved] = (tmp_path / "adapter" / "checkpoints").glob("checkpoint-*")
    state = tensor_bytes(saved / "adapter_model.safetensors") + optimizer_bytes(saved / "optimizer.pt")
    assert 2 * state == disk["checkpoints"]  # one more exists while saving


def test_refreshed_matrices_are_stored_with_the_adapter_and_in_checkpoints(
    configure: Configure, make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the outputs of a random model are so small that no row would pass the threshold
    monkeypatch.setattr(dsnot, "update_mask", partial(dsnot.update_mask, threshold=1e-6))
    base = make_checkpoint("llama", torch.bfloat16)
    config = configure(
        *(f"model.path={base}", "prune.skip=[o_proj]", f"train.targets=[{','.join(PROJECTIONS)}]"),
        *(
            "model.compute_dtype=float32",
            "train.max_steps=4",
            "train.lr=5e-2",
            "train.refresh.steps=1",
            "train.refresh.until=1",
        ),
        *("train.save_steps=1", "train.keep_checkpoints=1"),
    )
    record = stage_calls.prune(config, base, tmp_path / "pruned")
    trained = stage_calls.train(config, tmp_path / "pruned", record, tmp_path / "adapter", base=base)
    assert trained.refresh is not None
    assert trained.refresh.changed_matrices == 2 * 6
    disk = plan.execute(config).disk
    adapter = tmp_path / "adapter"
    assert tensor_bytes(adapter / "adapter_model.safetensors") + tensor_bytes(adapter / REFRESHED) == disk["adapter"]
    [saved] = (adapter / "checkpoints").glob("checkpoint-*")
    state = optimizer_bytes(saved / "optimizer.pt")
    state += tensor_bytes(saved / "adapter_model.safetensors") + tensor_bytes(saved / REFRESHED)
    assert 2 * state == disk["checkpoints"]


@pytest.mark.parametrize("stride", [None, 16, 24, 64])
def test_the_hidden_states_of_overlapping_windows_are_those_that_are_reserved(
    stride: int | None, configure: Configure, llama: Path, text_file: Path, tmp_path: Path
) -> None:
    config = configure("eval.max_tokens=500", f"eval.stride={'null' if stride is None else stride}")
    tokenizer = checkpoint.load_tokenizer(llama)
    windows = perplexity.text_windows(tokenizer, text_file.read_text(), 64, 500, "text", stride)
    Reference(AutoModelForCausalLM.from_pretrained(llama).eval(), windows, 4, tmp_path / "1.bin")
    assert plan.execute(config).disk["scratch"] == (tmp_path / "1.bin").stat().st_size


def test_windows_by_hand(configure: Configure, cpu: Cpu) -> None:
    def scratch(*overrides: str) -> int:
        return plan.execute(configure(*overrides)).disk["scratch"]

    assert scratch("eval.stride=16", "eval.max_tokens=300") == 15 * 64 * 32 * 4  # the last one begins at 224
    assert scratch("eval.stride=16", "eval.max_tokens=60") == 0
    assert scratch("eval.seq_len=null", "eval.max_tokens=500") == 3 * 128 * 32 * 4  # the model's limit
    # at most 256 windows of C4 are measured, as in the literature, whatever the stride
    assert scratch("eval.perplexity=[c4]", "eval.max_tokens=null") == 256 * 64 * 32 * 4
    assert scratch("eval.perplexity=[c4]", "eval.max_tokens=640", "eval.stride=32") == 19 * 64 * 32 * 4
    cpu(BF16)  # bfloat16 for the pruned checkpoint, float32 for the merged one
    assert scratch("model.dtype=bfloat16", "merge.dtype=float32") == 8 * 64 * 32 * (2 + 4)
    assert scratch("model.dtype=bfloat16") == 8 * 64 * 32 * 2


def test_the_default_window_is_that_of_the_evaluation() -> None:
    assert storage.DEFAULT_WINDOW == perplexity.DEFAULT_WINDOW
