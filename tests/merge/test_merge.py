"""Merging: equal to PEFT's model, pattern proved, deterministic, refusing what does not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sppctl import SppConfig
from sppctl.config.load import load_config
from sppctl.config.settings import Config
from sppctl.errors import StageError, UserError
from sppctl.merge import stage as merge
from sppctl.prune import stage as prune
from sppctl.run import attempts


@pytest.fixture
def config(config_file: Path) -> Config:
    return load_config(str(config_file))


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"])
def pruned(request: pytest.FixtureRequest, make_checkpoint: object, config: Config, tmp_path: Path) -> Path:
    base = make_checkpoint("llama", request.param, "20KB")  # type: ignore[operator]
    out = tmp_path / "pruned"
    out.mkdir()
    prune.execute(config, base, out, dtype="float32")
    attempts.clean(out)
    return out


@pytest.fixture
def adapter(pruned: Path, tmp_path: Path) -> Path:
    """A random adapter, as if trained."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(pruned)
    wrapped = get_peft_model(model, SppConfig(r=5, scale=1.5, dropout=0.1, init_weights=False))
    wrapped.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def merged(config: Config, pruned: Path, adapter: Path, out: Path) -> dict[str, object]:
    out.mkdir()
    return merge.execute(config, pruned, adapter, out)


def test_equals_the_unmerged_model_and_loads_with_plain_transformers(
    config: Config, pruned: Path, adapter: Path, tmp_path: Path
) -> None:
    merged(config, pruned, adapter, tmp_path / "merged")
    ids = torch.arange(20).view(1, -1)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pruned), adapter).eval()
    assert torch.equal(plain(ids).logits, wrapped(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("hi").input_ids == [71, 72]


def test_the_record_counts_what_happened(config: Config, pruned: Path, adapter: Path, tmp_path: Path) -> None:
    metrics = merged(config, pruned, adapter, tmp_path / "merged")
    before, after = tensors(pruned), tensors(tmp_path / "merged")
    records = {record["name"]: record for record in metrics["records"]}  # type: ignore[attr-defined]
    assert len(records) == metrics["matrices"] == 14
    for name, weight in before.items():
        assert torch.equal(weight == 0, after[name] == 0), name
        if name not in records:
            assert torch.equal(weight, after[name]), name
        else:
            assert records[name]["moved"] == int((weight != after[name]).sum())
            assert records[name]["zeros"] == int((weight == 0).sum())
    assert 0.9 < metrics["moved_share"] <= 1  # type: ignore[operator]


def test_the_exact_set_of_files_and_twice_the_same_bytes(
    config: Config, pruned: Path, adapter: Path, tmp_path: Path
) -> None:
    merged(config, pruned, adapter, tmp_path / "one")
    merged(config, pruned, adapter, tmp_path / "two")
    names = {path.name for path in pruned.iterdir()}
    for directory in ("one", "two"):
        assert {path.name for path in (tmp_path / directory).iterdir()} == names
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_another_dtype(config: Config, pruned: Path, adapter: Path, config_file: Path, tmp_path: Path) -> None:
    wanted = load_config(str(config_file), ["merge.dtype=float16"])
    merged(wanted, pruned, adapter, tmp_path / "merged")
    assert {tensor.dtype for tensor in tensors(tmp_path / "merged").values()} == {torch.float16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").dtype == torch.float16


@pytest.fixture
def rewritten(make_checkpoint: Callable[..., Path], config: Config, tmp_path: Path) -> Callable[..., Path]:
    """rewritten(change) -> a bfloat16 checkpoint whose tensors were changed before it was pruned."""

    def rewritten(change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
        base, out = tmp_path / "base", tmp_path / "pruned"
        shutil.copytree(make_checkpoint("llama", torch.bfloat16), base)
        content = load_file(base / "model.safetensors")
        change(content)
        save_file(content, base / "model.safetensors", {"format": "pt"})
        out.mkdir()
        prune.execute(config, base, out, dtype="float32")
        return out

    return rewritten


def down_adapter(pruned: Path, out: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(pruned)
    get_peft_model(model, SppConfig(r=4, target_modules=["down_proj"], init_weights=False)).save_pretrained(out)
    return out


def test_a_value_that_another_dtype_cannot_hold_is_refused(
    rewritten: Callable[..., Path], config_file: Path, tmp_path: Path
) -> None:
    pruned = rewritten(lambda content: content["model.norm.weight"][:1].fill_(1e5))
    wanted = load_config(str(config_file), ["merge.dtype=float16"])
    adapter = down_adapter(pruned, tmp_path / "adapter")
    with pytest.raises(StageError, match=r"float16 cannot hold model.norm.weight, whose largest value is 9.98e\+04"):
        merged(wanted, pruned, adapter, tmp_path / "merged")


def test_another_dtype_keeps_the_pattern_of_matrices_that_were_not_adapted(
    rewritten: Callable[..., Path], config_file: Path, tmp_path: Path
) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    pruned = rewritten(lambda content: content[name][0].fill_(-1e-9))
    wanted = load_config(str(config_file), ["merge.dtype=float16"])
    merged(wanted, pruned, down_adapter(pruned, tmp_path / "adapter"), tmp_path / "merged")
    before, after = tensors(pruned), tensors(tmp_path / "merged")
    assert all(torch.equal(tensor == 0, after[name] == 0) for name, tensor in before.items())
    assert sorted(after[name][0].tolist()) == [-(2.0**-24)] * 16 + [0] * 16


def rewrite(adapter: Path, part: str, change: object) -> None:
    path = adapter / "adapter_model.safetensors"
    content = load_file(path)
    name = next(name for name in content if name.endswith(f"q_proj.{part}"))
    content[name] = change(content[name])  # type: ignore[operator]
    save_file(content, path, {"format": "pt"})


def test_a_kept_weight_that_would_vanish_becomes_the_smallest_number(
    config: Config, pruned: Path, adapter: Path, tmp_path: Path
) -> None:
    rewrite(adapter, "spp_alpha", torch.ones_like)
    rewrite(adapter, "spp_beta", lambda beta: torch.full_like(beta, -1 / 1.5))  # 1 + s alpha beta = 0
    assert merged(config, pruned, adapter, tmp_path / "merged")["pattern_unchanged"] is True
    name = "model.layers.0.self_attn.q_proj.weight"
    before, after = tensors(pruned)[name], tensors(tmp_path / "merged")[name]
    smallest = 2.0**-24 if after.dtype == torch.float16 else 2.0**-126
    assert (after[before != 0].abs() == smallest).all()


def test_a_broken_adapter_is_refused(config: Config, pruned: Path, adapter: Path, tmp_path: Path) -> None:
    rewrite(adapter, "spp_beta", lambda beta: beta * float("nan"))
    with pytest.raises(StageError, match="not finite"):
        merged(config, pruned, adapter, tmp_path / "merged")


def test_another_models_adapter_is_refused(config: Config, pruned: Path, adapter: Path, tmp_path: Path) -> None:
    rewrite(adapter, "spp_beta", lambda beta: torch.zeros(len(beta) + 4, 1))
    with pytest.raises(UserError, match="another model's adapter"):
        merged(config, pruned, adapter, tmp_path / "merged")


def test_another_kind_of_adapter_is_refused(config: Config, pruned: Path, adapter: Path, tmp_path: Path) -> None:
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"peft_type": "VERA"}))
    with pytest.raises(UserError, match="adapter of type VERA; sppctl merges SPP"):
        merged(config, pruned, adapter, tmp_path / "merged")
