"""Pruning a checkpoint: statistics of the right inputs, what is recorded and written; the walk is in test_walk.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sppctl.config.load import load_config
from sppctl.config.settings import Config
from sppctl.errors import StageError
from sppctl.model.targets import matches
from sppctl.pattern import Pattern
from sppctl.prune import calibrate
from sppctl.prune import stage as prune
from sppctl.pruners import prune_linear
from sppctl.run import attempts


@pytest.fixture
def configure(config_file: Path) -> Callable[..., Config]:
    def configured(*overrides: str) -> Config:
        return load_config(str(config_file), overrides)

    return configured


def pruned(config: Config, base: Path, out: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    out.mkdir()
    metrics = prune.execute(config, base, out, dtype="float32")
    return load_file(out / "model.safetensors"), metrics


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "2:4"),
        (["prune.overrides={q_proj: 2:4}"], "2:4"),
        (["prune.overrides={q_proj: 4:8, '*.1.*up_proj': 0.3}"], "2:4, 4:8 in 2 matrices, 0.3 in 1 matrices"),
        (["prune.overrides={'*_proj': 4:8}"], "4:8"),
        (
            ["prune.pattern=0.5", "prune.allocation=owl", "prune.overrides={q_proj: 4:8}"],
            "0.5 by outliers, 4:8 in 2 matrices",
        ),
        (["prune.pattern=0.5", "prune.allocation=[0.4,0.6]"], "0.5 by block"),
    ],
)
def test_the_pattern_is_the_one_that_is_there(
    configure: Callable[..., Config], overrides: list[str], words: str
) -> None:
    config = configure(*overrides).prune
    layers = []
    for name, block in (("q_proj", 0), ("q_proj", 1), ("up_proj", 0), ("up_proj", 1), ("o_proj", 0), ("o_proj", 1)):
        full = f"model.layers.{block}.{name}"
        found = [pattern for wanted, pattern in config.overrides.items() if matches(full, wanted)]
        layers.append({"name": full, "pattern": str(found[-1] if found else Pattern(ratio=0.4 + 0.2 * block))})
        if config.allocation == "uniform" and not found:
            layers[-1]["pattern"] = str(config.pattern)
    assert prune._pattern_words(config, layers) == words


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_layers_see_the_inputs_of_blocks_pruned_before_them(
    method: str, configure: Callable[..., Config], llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a literal walk: hooks on a plain model, block by block, one window at a time."""
    windows = torch.randint(0, 250, (4, 24), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(calibrate, "windows_of", lambda *_: (windows, {}))
    after, _ = pruned(configure(f"prune.method={method}"), llama, tmp_path / "out")

    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    for index, block in enumerate(model.model.layers):
        linears = {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}
        inputs: dict[str, list[Tensor]] = {name: [] for name in linears}
        handles = [
            m.register_forward_pre_hook(lambda _, args, seen=inputs[name]: seen.append(args[0][0]))
            for name, m in linears.items()
        ]
        with torch.no_grad():
            for window in windows:
                model(window.view(1, -1))
        for handle in handles:
            handle.remove()
        for name, linear in linears.items():
            expected = prune_linear(linear.weight.data, torch.cat(inputs[name]), method=method, pattern="2:4")
            linear.weight.data = expected
            written = after[f"model.layers.{index}.{name}.weight"]
            agreement = ((written != 0) == (expected != 0)).float().mean().item()
            assert agreement > 0.995, name  # batching the windows rounds differently, a tie may fall the other way
            if method == "wanda" and agreement == 1:
                assert torch.equal(written, expected)


def test_magnitude_needs_no_calibration(
    configure: Callable[..., Config], llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "windows_of", lambda *_: pytest.fail("calibrated"))
    _, metrics = pruned(configure("prune.method=magnitude", "prune.pattern=0.7"), llama, tmp_path / "out")
    assert {layer["relative_output_error"] for layer in metrics["layers"]} == {None}
    for layer in metrics["layers"]:
        count = layer["shape"][0] * layer["shape"][1]
        assert layer["sparsity"] == int(count * 0.7) / count


def test_the_record_says_which_windows(configure: Callable[..., Config], llama: Path, tmp_path: Path) -> None:
    records = [
        pruned(configure(*options), llama, tmp_path / str(number))[1]["calibration"]
        for number, options in enumerate([[], [], ["run.seed=9"], ["prune.calibration.windows=concatenate"]])
    ]
    assert records[0] == records[1]  # the second time from the cache
    assert records[0].keys() == {
        "dataset", "versions", "windows", "documents_hash", "windows_hash", "samples", "seq_len"
    }  # fmt: skip
    assert records[0]["windows_hash"] != records[2]["windows_hash"]
    assert records[3]["windows"] == "concatenate"


def test_calibration_text_of_a_column(configure: Callable[..., Config], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "One.", "story": "1"}\n')
    for column, document in (("story", "1"), ("auto", "One."), ("null", "One.")):
        config = configure(f"prune.calibration.dataset={path}", f"prune.calibration.column={column}")
        assert calibrate.calibration_text(config.prune).documents == [document]


def test_only_targets_are_pruned(configure: Callable[..., Config], llama: Path, tmp_path: Path) -> None:
    _, metrics = pruned(configure("prune.targets=[mlp.down_proj, '*.0.self_attn.q_proj']"), llama, tmp_path / "out")
    assert [layer["name"] for layer in metrics["layers"]] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
    ]


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(
    configure: Callable[..., Config], llama: Path, tmp_path: Path
) -> None:
    contents = []
    for seed, name in ((1, "a"), (1, "b"), (2, "c")):
        pruned(configure(f"run.seed={seed}"), llama, tmp_path / name)
        contents.append((tmp_path / name / "model.safetensors").read_bytes())
    assert contents[0] == contents[1]
    assert contents[0] != contents[2]


def test_shards_and_side_files_keep_their_names(
    configure: Callable[..., Config], make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_checkpoint("llama", max_shard_size="20KB")
    (tmp_path / "out").mkdir()
    prune.execute(configure(), base, tmp_path / "out", dtype="float32")
    attempts.clean(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in base.iterdir()}
    index = json.loads((base / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text()) == index


def test_another_dtype_is_written_and_recorded(configure: Callable[..., Config], llama: Path, tmp_path: Path) -> None:
    after, _ = pruned(configure("model.dtype=bfloat16"), llama, tmp_path / "out")
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_the_recorded_error_is_that_of_the_layers_output(
    configure: Callable[..., Config], llama: Path, tmp_path: Path
) -> None:
    after, metrics = pruned(configure("prune.calibration.samples=1"), llama, tmp_path / "out")
    before = load_file(llama / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    (layer,) = (layer for layer in metrics["layers"] if layer["name"] == name)
    old, new = before[f"{name}.weight"], after[f"{name}.weight"]
    assert layer["relative_weight_error"] == pytest.approx(((old - new).norm() / old.norm()).item(), rel=1e-5)
    assert 0 < layer["relative_output_error"] < 1


def test_nan_weights_stop_it(configure: Callable[..., Config], llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    for path in llama.glob("tokenizer*"):
        (tmp_path / "broken" / path.name).write_bytes(path.read_bytes())
    for method in ("magnitude", "wanda"):
        (tmp_path / method).mkdir()
        with pytest.raises(StageError, match=r"layers\.1\.mlp\.up_proj"):
            prune.execute(configure(f"prune.method={method}"), tmp_path / "broken", tmp_path / method, dtype="float32")
