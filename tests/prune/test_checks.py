"""What is found before a pruning loads or writes anything."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import weights_of, write_weights
from safetensors.torch import load_file
from stage_calls import outline

from sppctl import machine
from sppctl.config.settings import Config
from sppctl.errors import UserError
from sppctl.prune import checks
from sppctl.run import pipeline
from sppctl.run.directory import Run

RATIO = "prune.pattern=0.5"


def problems(config: Config) -> list[str]:
    """What the checks say, line by line."""
    try:
        checks.prepare(config, *outline(Path(str(config.model.path))))
    except UserError as error:
        return error.lines
    return []


def copied(llama: Path, directory: Path, **settings: Any) -> Path:
    """The tiny Llama with other settings in its configuration."""
    shutil.copytree(llama, directory)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return directory


def other_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = weights_of(directory)
    change(tensors)
    write_weights(tensors, directory)


# --- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prune.targets=[fc9]"], "prune.targets: 'fc9' matches no linear layer"),
        (["prune.skip=[fc9]"], "prune.skip: 'fc9' matches no linear layer"),
        (["prune.skip=['*']"], "nothing is left to prune"),
        (["prune.overrides={fc9: 0.5}"], "prune.overrides: 'fc9' matches none of the 14 targets"),
        (["prune.pattern=2:5"], "not a multiple of 5"),
        (["prune.overrides={down_proj: 2:5}"], "down_proj has 48 input features, not a multiple of 5"),
        # rows of 32 or 48; matrices of 32 x 16 at least; blocks of 16 columns of all 16 rows
        (["prune.pattern=0.03"], "prune.pattern: 0.03 prunes nothing in model.layers.0.self_attn.q_proj: wanda comp"),
        (["prune.pattern=0.0019", "prune.method=magnitude"], "k_proj: magnitude compares 512 weights with each other"),
        (["prune.pattern=0.003", "prune.method=sparsegpt", "prune.block_size=16"], "sparsegpt compares 256 weights"),
        (["prune.overrides={down_proj: 0.02}"], "prune.overrides: 0.02 prunes nothing in model.layers.0.mlp.down_proj"),
        (
            [RATIO, "prune.allocation=[0.01, 0.99]"],
            "prune.allocation: 0.01 prunes nothing in model.layers.0.self_attn.q_proj",
        ),
        ([RATIO, "prune.allocation=[0.5]"], "prune.allocation: 1 ratios for 2 blocks"),
        ([RATIO, "prune.allocation=[0.5, 1.5]"], "prune.allocation: pattern 1.5"),
        (["prune.allocation=[0.5, 0.5]"], "prune.allocation: splits a ratio over the blocks, but prune.pattern is 2:4"),
        (["prune.allocation=owl"], "prune.allocation: splits a ratio"),
        (
            [RATIO, "prune.allocation=[0.9, 0.9]"],
            "mean over all weights is 0.9, but prune.pattern is 0.5; set prune.p",
        ),
        ([RATIO, "prune.allocation=owl", "prune.owl_lambda=0.5"], "OWL with a spread of 0.5 around 0.5"),
        (["prune.pattern=0.97", "prune.allocation=owl"], "OWL with a spread of 0.08 around 0.97"),
        (["prune.pattern=0.07", "prune.allocation=owl"], "OWL with a spread of 0.08 around 0.07"),
        (["prune.mask_from=/nowhere"], "prune.mask_from: /nowhere does not exist"),
        (["prune.calibration.seq_len=1000"], "prune.calibration.seq_len: 1000 exceeds the model's 128 positions"),
        (["prune.calibration.dataset=/nowhere.txt"], "prune.calibration.dataset: /nowhere.txt"),
        (["prune.calibration.samples=2000"], "2000 windows of 64 need 128000; "),
        (["prune.calibration.windows=random-document"], "has 1 documents longer than 64 tokens"),
        (["prune.calibration.split=test"], "prune.calibration.split: "),
        (["prune.act_order=true"], "prune.act_order: wanda does not go column by column; use sparsegpt"),
        (["launch.num_processes=5"], "prune.calibration.samples: 4 windows are too few for 5 processes"),
    ],
)
def test_what_is_found(overrides: list[str], message: str, configure: Callable[..., Config]) -> None:
    (problem,) = problems(configure(*overrides))
    assert message in problem


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["prune.block_size=16"], "prune.block_size: no effect with prune.method=wanda"),
        (["prune.method=sparsegpt", "prune.block_size=16"], None),
        (["prune.owl_lambda=0.05"], "prune.owl_lambda: no effect without prune.allocation=owl"),
        (
            ["prune.reconstruct_lr=1e-3", "prune.reconstruct_loss=token"],
            "prune.reconstruct_loss, prune.reconstruct_lr: no effect without prune.reconstruct_epochs",
        ),
        (["prune.reconstruct_lr=1e-3", "prune.reconstruct_epochs=1"], None),
        (["prune.keep_zeros=true"], None),
    ],
)
def test_keys_without_effect_are_named(
    overrides: list[str], line: str | None, configure: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    assert problems(configure(*overrides)) == []
    warnings = [one for one in capsys.readouterr().err.splitlines() if one.startswith("warning")]
    assert warnings == ([] if line is None else [f"warning: {line}"])


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["prune.method=magnitude", "launch.num_processes=5", "prune.calibration.dataset=/nowhere.txt"],
        [RATIO, "prune.allocation=[0.4, 0.6]"],
        ["prune.pattern=0.03125"],  # one weight in each row
        ["prune.pattern=0.002", "prune.method=magnitude"],
        [RATIO, "prune.allocation=[0.9, 0.5]", "prune.skip=['*.layers.0.*']"],
        [RATIO, "prune.allocation=owl", "prune.owl_lambda=0.49"],
        ["prune.pattern=0.97", "prune.allocation=owl", "prune.skip=['*.layers.0.*']"],
        ["prune.order=module"],
    ],
)
def test_what_is_in_order(overrides: list[str], configure: Callable[..., Config]) -> None:
    assert problems(configure(*overrides)) == []


def test_everything_is_named_at_once(configure: Callable[..., Config]) -> None:
    overrides = ["prune.allocation=owl", "launch.num_processes=9", "prune.calibration.samples=8"]
    found = problems(configure("prune.targets=[fc9]", "prune.calibration.dataset=/nowhere.txt", *overrides))
    assert [line.split(":")[0] for line in found] == [
        "prune.targets",
        "prune.allocation",
        "prune.calibration.samples",
        "prune.calibration.dataset",
    ]


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_quantised_checkpoint(configure: Callable[..., Config], llama: Path, tmp_path: Path) -> None:
    for number, settings in enumerate(
        ({"quant_method": "fp8"}, {"quant_method": "bitsandbytes", "load_in_4bit": True})
    ):
        model = copied(llama, tmp_path / str(number), quantization_config=settings)
        method = settings["quant_method"]
        assert problems(configure(f"model.path={model}")) == [
            f"model.path: {model} is quantised ({method}), which cannot be pruned; use the unquantised model"
        ]


def test_a_checkpoint_of_other_names_or_shapes(configure: Callable[..., Config], llama: Path, tmp_path: Path) -> None:
    names, shapes = copied(llama, tmp_path / "names"), copied(llama, tmp_path / "shapes")
    key = "model.layers.1.mlp.up_proj.weight"
    other_tensors(names, lambda tensors: tensors.update(other=tensors.pop(key)))
    other_tensors(shapes, lambda tensors: tensors.update({key: tensors[key][:40].clone()}))
    for method in ("magnitude", "wanda"):
        with pytest.raises(
            UserError, match=rf"^{names}: holds no tensor {key}, which config.json implies \(and 1 more\); [^\n]*$"
        ):
            pipeline.preflight(Run(configure(f"prune.method={method}", f"model.path={names}")), ("prune",))
        with pytest.raises(UserError, match=rf"^{shapes}: {key} has shape \(40, 32\), the model's is \(48, 32\); "):
            pipeline.preflight(Run(configure(f"prune.method={method}", f"model.path={shapes}")), ("prune",))


def test_experts_that_are_stored_one_by_one(
    configure: Callable[..., Config], make_checkpoint: Any, tmp_path: Path
) -> None:
    for family in ("mixtral", "gpt2"):
        model = make_checkpoint(family)
        mask = copied(model, tmp_path / family)
        other_tensors(mask, lambda tensors: [tensor.zero_() for tensor in tensors.values()])
        overrides = ["prune.targets=all-linear", f"model.path={model}"]
        assert problems(configure(*overrides, f"prune.mask_from={mask}")) == []
        (problem,) = problems(configure(*overrides, f"prune.mask_from={model}"))
        assert "the mask of prune.mask_from is not 2:4" in problem


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_a_mask_of_another_model(
    family: str, configure: Callable[..., Config], make_checkpoint: Any, tmp_path: Path
) -> None:
    mask = make_checkpoint(family)
    if family == "llama":
        mask = copied(mask, tmp_path / "mask")
        key = "model.layers.0.mlp.down_proj.weight"
        other_tensors(mask, lambda tensors: tensors.update({key: tensors[key][:, :24].clone()}))
    (problem,) = problems(configure(f"prune.mask_from={mask}"))
    assert problem.startswith(f"prune.mask_from: {mask}")
    assert ("q_proj" if family == "opt" else "has shape (32, 24), the model's is (32, 48)") in problem


# --- space ------------------------------------------------------------------------------------------------------------


def test_a_disk_that_is_too_small(
    configure: Callable[..., Config], llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(tensor.nbytes for tensor in load_file(llama / "model.safetensors").values())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, size))
    assert problems(configure()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, size - 1))
    (problem,) = problems(configure())
    assert problem.startswith(f"run.dir: {tmp_path / 'run'} has 0.0 GiB free, the pruned checkpoint takes")
    assert problems(configure("model.dtype=bfloat16")) == []
    partial = tmp_path / "run" / ".pruned.partial"
    partial.mkdir(parents=True)
    shutil.copy(llama / "model.safetensors", partial)
    assert problems(configure()) == []


def test_module_order_that_cannot_be_held(
    configure: Callable[..., Config], llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, width = 4 * 64, 32 * 4
    needed = 12 * tokens * width + 40 * 64 * width
    options = ["prune.order=module", "prune.batch_size=1"]
    monkeypatch.setattr(machine, "free_memory", lambda _: needed)
    assert problems(configure(*options)) == []
    monkeypatch.setattr(machine, "free_memory", lambda _: needed - 1)
    (problem,) = problems(configure(*options))
    assert problem.startswith("prune.order: module holds all windows inside a block")
    assert problems(configure(*options, "launch.num_processes=2")) == []  # half of the windows each
    assert problems(configure("prune.batch_size=1")) == []
