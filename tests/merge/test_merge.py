"""Merging: equal to PEFT's model, pattern proved, deterministic, refusing what does not match."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stage_calls
import torch
from checkpoints import weights_of, write_weights
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from sppctl import SppConfig
from sppctl.config.settings import Config
from sppctl.errors import StageError, UserError
from sppctl.records import MergeRecord, PruneRecord
from sppctl.run import attempts

Q = "model.layers.0.self_attn.q_proj"
Merge = Callable[..., tuple[dict[str, Tensor], MergeRecord]]


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"])
def pruned(
    request: pytest.FixtureRequest,
    make_checkpoint: Callable[..., Path],
    configure: Callable[..., Config],
    tmp_path: Path,
) -> tuple[Path, PruneRecord]:
    out = tmp_path / "pruned"
    record = stage_calls.prune(configure(), make_checkpoint("llama", request.param, "20KB"), out)
    attempts.clean(out)
    return out, record


def save_adapter(pruned: Path, out: Path, **settings: object) -> Path:
    """A random adapter, as if trained."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(pruned)
    get_peft_model(model, SppConfig(r=4, scale=1.5, init_weights=False, **settings)).save_pretrained(out)  # type: ignore[arg-type]
    return out


@pytest.fixture
def adapter(pruned: tuple[Path, PruneRecord], tmp_path: Path) -> Path:
    return save_adapter(pruned[0], tmp_path / "adapter", dropout=0.1)


@pytest.fixture
def merge(pruned: tuple[Path, PruneRecord], configure: Callable[..., Config], tmp_path: Path) -> Merge:
    """merge(adapter, KEY=VALUE, ..., to=) -> the merged tensors, and the record."""

    def merged(adapter: Path, *overrides: str, to: str = "merged") -> tuple[dict[str, Tensor], MergeRecord]:
        out = tmp_path / to
        out.mkdir()
        record = stage_calls.merge(configure(*overrides), pruned[0], adapter, out, pruned[1])
        return weights_of(out), record

    return merged


def test_equals_the_unmerged_model_and_loads_with_plain_transformers(
    merge: Merge, pruned: tuple[Path, PruneRecord], adapter: Path, tmp_path: Path
) -> None:
    merge(adapter)
    ids = torch.arange(20).view(1, -1)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pruned[0]), adapter).eval()
    assert torch.equal(plain(ids).logits, wrapped(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("hi").input_ids == [71, 72]


def test_the_record_counts_what_happened(merge: Merge, pruned: tuple[Path, PruneRecord], adapter: Path) -> None:
    after, merged = merge(adapter)
    records = {record.name: record for record in merged.records}
    assert len(records) == merged.matrices == 14
    for name, weight in weights_of(pruned[0]).items():
        assert torch.equal(weight == 0, after[name] == 0), name
        if name not in records:
            assert torch.equal(weight, after[name]), name
        else:
            assert records[name].moved == int((weight != after[name]).sum())
            assert records[name].zeros == int((weight == 0).sum())
    assert 0.9 < merged.moved_share <= 1


def test_the_exact_set_of_files_and_twice_the_same_bytes(
    merge: Merge, pruned: tuple[Path, PruneRecord], adapter: Path, tmp_path: Path
) -> None:
    contents = []
    for name in ("one", "two"):
        merge(adapter, to=name)
        contents.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert contents[0] == contents[1]
    assert contents[0].keys() == {path.name for path in pruned[0].iterdir()}


def test_another_dtype(merge: Merge, adapter: Path, tmp_path: Path) -> None:
    after, _ = merge(adapter, "merge.dtype=float16")
    assert {tensor.dtype for tensor in after.values()} == {torch.float16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").dtype == torch.float16


def test_a_kept_weight_that_would_vanish_becomes_the_smallest_number(
    merge: Merge, pruned: tuple[Path, PruneRecord], adapter: Path
) -> None:
    path = adapter / "adapter_model.safetensors"
    factors = {"spp_alpha": 1.0, "spp_beta": -1 / 1.5}  # 1 + s alpha beta = 0
    content = {name: torch.full_like(tensor, factors[name.split(".")[-1]]) for name, tensor in load_file(path).items()}
    save_file(content, path, {"format": "pt"})
    merged, record = merge(adapter)
    assert record.pattern_unchanged is True
    before, after = (weights[f"{Q}.weight"] for weights in (weights_of(pruned[0]), merged))
    smallest = 2.0**-24 if after.dtype == torch.float16 else 2.0**-126
    assert (after[before != 0].abs() == smallest).all()


# --- refused ----------------------------------------------------------------------------------------------------------


def test_another_kind_of_adapter(merge: Merge, adapter: Path) -> None:
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"peft_type": "VERA"}))
    with pytest.raises(UserError, match="adapter of type VERA; sppctl merges SPP"):
        merge(adapter)


# --- a bfloat16 checkpoint whose tensors were changed before it was pruned --------------------------------------------


@pytest.fixture
def merge_changed(
    make_checkpoint: Callable[..., Path], configure: Callable[..., Config], tmp_path: Path
) -> Callable[..., tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """merge_changed(name, value) -> the tensors before and after merging into float16, where one has another value."""

    def merged(name: str, value: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        base = shutil.copytree(make_checkpoint("llama", torch.bfloat16), tmp_path / "base")
        weights = weights_of(base)
        weights[name][:1] = value
        write_weights(weights, base)
        pruned, out = tmp_path / "pruned", tmp_path / "merged"
        stage_calls.prune(configure(), base, pruned)
        adapter = save_adapter(pruned, tmp_path / "adapter", target_modules=["down_proj"])
        stage_calls.merge(configure("merge.dtype=float16"), pruned, adapter, out)
        return weights_of(pruned), weights_of(out)

    return merged


def test_a_value_that_another_dtype_cannot_hold_is_refused(merge_changed: Callable[..., object]) -> None:
    with pytest.raises(StageError, match=r"float16 cannot hold model.norm.weight, whose largest value is 9.98e\+04"):
        merge_changed("model.norm.weight", 1e5)


def test_another_dtype_keeps_the_pattern_of_matrices_that_were_not_adapted(merge_changed: Callable[..., Any]) -> None:
    before, after = merge_changed(f"{Q}.weight", -1e-9)
    assert all(torch.equal(tensor == 0, after[name] == 0) for name, tensor in before.items())
    assert sorted(after[f"{Q}.weight"][0].tolist()) == [-(2.0**-24)] * 16 + [0] * 16
