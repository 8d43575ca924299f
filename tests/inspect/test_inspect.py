"""Certified sparsity: what holds in a matrix, the totals of a checkpoint, and what does not meet an expectation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import weights_of, write_weights
from safetensors.torch import save_file
from torch import Tensor

from sppctl.inspect.inspect import (
    MatrixSparsity,
    measure,
    patterns_text,
    recorded_patterns,
    sentence,
    verdict,
    violations,
)
from sppctl.pattern import Pattern
from sppctl.pruners.masks import holds, mask_by_row

pattern = Pattern.parse


def rows(*texts: str) -> Tensor:
    """``x`` is a weight, ``.`` a zero."""
    return torch.tensor([[float(letter == "x") for letter in text.replace(" ", "")] for text in texts])


def saved(directory: Path, **tensors: Tensor) -> Path:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, directory / "model.safetensors")
    return directory


def inspected(directory: Path, **tensors: Tensor) -> dict[str, MatrixSparsity]:
    return {matrix.name: matrix for matrix in measure(saved(directory, **tensors))[0]}


def record(directory: Path, layers: list[str], text: str = "2:4") -> None:
    """The record of pruning these layers."""
    directory.mkdir(exist_ok=True)
    content = {"metrics": {"layers": [{"name": name, "pattern": text} for name in layers]}}
    (directory / "stage.json").write_text(json.dumps(content))


def pruned(source: Path, directory: Path, text: str, *, along_first: bool) -> Path:
    """A copy of a checkpoint, the matrices of its blocks pruned along the first or the last dimension."""
    shutil.copytree(source, directory, dirs_exist_ok=True)
    weights = weights_of(directory)
    for name, weight in weights.items():
        if weight.dim() == 2 and (".layers." in name or ".h." in name):
            mask = mask_by_row((weight.t() if along_first else weight).abs().contiguous(), pattern(text))
            weights[name] = (weight * (mask.t() if along_first else mask)).contiguous()
    write_weights(weights, directory)
    return directory


TWO_OF_FOUR = rows("xx.. x..x ..xx .x.x", ".xx. x.x. .... x...")
FOUR_OF_EIGHT = rows("xxxx .... x.x. x.x.", "xxx. ...x .... xxxx")  # the first group of four keeps all
ONE_OF_FOUR = rows("x... .x.. ..x. ...x", "x... .... ..x. ....")
TWO_OF_EIGHT = rows("xx.. .... .... xx..", "x... ...x .x.x ....")
ONE_TOO_MANY = TWO_OF_FOUR.repeat(50, 20)
ONE_TOO_MANY[76, 2] = 1e-30


# --- one matrix -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "text", "expected"),
    [
        (TWO_OF_FOUR, "2:4", True),
        (TWO_OF_FOUR, "4:8", True),
        (TWO_OF_FOUR, "1:4", False),
        (TWO_OF_FOUR, "2:8", False),
        (TWO_OF_FOUR.repeat(50, 20), "2:4", True),
        (ONE_TOO_MANY, "2:4", False),
        (FOUR_OF_EIGHT, "4:8", True),
        (FOUR_OF_EIGHT, "2:4", False),
        (ONE_OF_FOUR, "1:4", True),
        (ONE_OF_FOUR, "2:8", True),  # N is the number KEPT
        (ONE_OF_FOUR, "1:8", False),
        (TWO_OF_EIGHT, "2:8", True),
        (TWO_OF_EIGHT, "1:4", False),
        (rows("xx.xx."), "2:3", True),
        (rows("xx.xx."), "2:4", False),  # 6 columns are no whole groups of 4
        (rows("......"), "2:4", False),
        (rows("........"), "2:4", True),
        (rows("xxxxxxxx"), "2:4", False),
        (rows("xxxx", "xxxx", "....", "...."), "2:4", False),  # groups are along the input features
        (rows("xxxx", "xxxx", "....", "....").t().contiguous(), "2:4", True),
        (torch.tensor([[1.0, -0.0, -0.0, 1.0]]), "2:4", True),
        (torch.tensor([[1.0, float("nan"), 0.0, 1.0]]), "2:4", False),
    ],
)
def test_holds(weight: Tensor, text: str, expected: bool) -> None:
    assert holds(weight, pattern(text)) is expected


def test_every_row_of_a_matrix_that_is_read_in_parts_is_looked_at() -> None:
    weight = torch.zeros(1100, 256)
    assert holds(weight, pattern("2:4"))
    weight[-1, -3:] = 1
    assert not holds(weight, pattern("2:4"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
def test_every_floating_point_dtype_is_measured(tmp_path: Path, dtype: torch.dtype) -> None:
    matrix = inspected(tmp_path, w=TWO_OF_FOUR.to(dtype))["w"]
    assert (matrix.shape, matrix.zeros) == ((2, 16), 19)  # 8 in the first row, 11 in the second
    assert matrix.sparsity == 19 / 32
    assert matrix.patterns == ("2:4", "4:8", "8:16")


def test_patterns_of_each_matrix(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    found = inspected(
        tmp_path,
        two=TWO_OF_FOUR,
        four=FOUR_OF_EIGHT,
        one=ONE_OF_FOUR,
        eight=TWO_OF_EIGHT,
        dense=torch.ones(2, 16),
        odd_width=rows("x.x.x.x", "......."),
        width_of_twelve=rows("xx.. x..x ..xx"),
        unstructured=(torch.rand(64, 64, generator=generator) > 0.75).float(),
    )
    assert {name: set(matrix.patterns) for name, matrix in found.items()} == {
        "two": {"2:4", "4:8", "8:16"},
        "four": {"4:8", "8:16"},
        "one": {"1:4", "2:4", "2:8", "4:8", "4:16", "8:16"},
        "eight": {"2:4", "2:8", "4:8", "4:16", "8:16"},
        "dense": set(),
        "odd_width": set(),
        "width_of_twelve": {"2:4"},
        "unstructured": set(),
    }
    assert {name for name, matrix in found.items() if not matrix.is_sparse} == {"dense"}


def test_a_few_zeros_by_chance_do_not_make_a_matrix_sparse(tmp_path: Path) -> None:
    weight = torch.ones(40, 40)
    weight.view(-1)[:79] = 0
    assert not inspected(tmp_path, w=weight)["w"].is_sparse  # 79 of 1600 are less than 5 %
    weight.view(-1)[:80] = 0
    assert inspected(tmp_path, w=weight)["w"].is_sparse


def test_only_matrices_of_floating_point_are_measured(tmp_path: Path) -> None:
    found = inspected(
        tmp_path,
        norm=torch.zeros(8),
        scalar=torch.tensor(0.0),
        experts=torch.zeros(2, 4, 8),
        packed=torch.zeros(4, 8, dtype=torch.int32),
        w=torch.ones(4, 8),
        **{"experts.down_proj_bias": torch.zeros(4, 8), "experts.bias": torch.zeros(4, 8)},  # one row per expert
    )
    assert list(found) == ["experts", "w"]


@pytest.mark.parametrize(("text", "found"), [(None, ()), ("2:3", ("2:3",)), ("1:3", ()), ("0.5", ())])
def test_an_unusual_pattern_can_be_looked_for(text: str | None, found: tuple[str, ...], tmp_path: Path) -> None:
    also = None if text is None else pattern(text)
    (matrix,), _ = measure(saved(tmp_path, w=rows("xx.xx.", "x..x..")), also)
    assert matrix.patterns == found


# --- which dimension --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "along_first", "place"),
    [("llama", False, None), ("llama", True, "first"), ("gpt2", True, None), ("gpt2", False, "last")],
)
def test_groups_run_along_the_input_features_of_the_model(
    family: str, along_first: bool, place: str | None, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    measured, summary = measure(pruned(make_checkpoint(family), tmp_path, "2:4", along_first=along_first))
    sparse = [matrix for matrix in measured if matrix.is_sparse]
    assert len(sparse) == (14 if family == "llama" else 8)
    assert {matrix.transposed for matrix in sparse} == {family == "gpt2"}
    assert not any(matrix.transposed for matrix in measured if not matrix.is_sparse)  # embeddings
    expected = f"2:4 along the {place} dimension, which no kernel uses"
    lines = [] if place is None else [f"{matrix.name}: {expected}" for matrix in sparse]
    assert violations(measured, pattern("2:4")) == lines
    assert summary["patterns"] == (["2:4"] if place is None else [])
    assert {patterns_text(matrix) for matrix in sparse} >= (
        {"2:4 4:8 8:16"} if place is None else {f"(2:4 along the {place} dimension)"}
    )


@pytest.mark.parametrize(
    "config",
    [
        None,
        "{",
        "[]",
        '{"model_type": "unheard_of"}',
        '{"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}',
        '{"model_type": "gpt2", "n_head": 0}',
        '{"model_type": "t5"}',
    ],
)
def test_without_a_model_only_the_last_dimension_counts(
    config: str | None, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    pruned(make_checkpoint("gpt2"), tmp_path, "2:4", along_first=True)
    (tmp_path / "own.py").write_text("raise SystemExit('it ran')")
    if config is None:
        (tmp_path / "config.json").unlink()
    else:
        (tmp_path / "config.json").write_text(config)
    problems = violations(measure(tmp_path)[0], pattern("2:4"))
    assert problems[0].endswith("weight: 2:4 along the first dimension, which no kernel uses")
    assert len(problems) == 8
    pruned(make_checkpoint("llama"), tmp_path / "llama", "2:4", along_first=False)
    (tmp_path / "llama/config.json").unlink()
    assert violations(measure(tmp_path / "llama")[0], pattern("2:4")) == []


def test_a_ratio_is_rounded_down_for_the_inputs_of_a_transposed_matrix(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    measured, _ = measure(pruned(make_checkpoint("gpt2"), tmp_path, "0.3", along_first=True))
    widths = {matrix.name: (matrix.in_features, matrix.zeros) for matrix in measured}
    assert widths["transformer.h.0.attn.c_attn.weight"] == (32, 9 * 96)  # of 96 stored columns, 28 * 32 would be more
    assert violations(measured, pattern("0.3")) == []
    assert len(violations(measured, pattern("0.32"))) == 8


# --- a checkpoint -----------------------------------------------------------------------------------------------------


def test_totals_by_hand(tmp_path: Path) -> None:
    saved(tmp_path, a=TWO_OF_FOUR, b=ONE_OF_FOUR, dense=torch.ones(4, 4), norm=torch.zeros(8))
    _, summary = measure(tmp_path)
    assert summary == {
        "matrices": 3,
        "sparse_matrices": 2,
        "weights": 64,
        "zeros": 19 + 26,
        "sparsity": 45 / 64,
        "total_sparsity": 45 / (64 + 16 + 8),
        "patterns": ["2:4"],  # 4:8 and 8:16 follow from it
        "parameters": 88,
        "bytes": (tmp_path / "model.safetensors").stat().st_size,
    }
    assert sentence(summary | {"bytes": 1_250_000}) == (
        "2 of 3 matrices are sparse: 70.3125% zeros in them, pattern 2:4; 51.14% of all 88 parameters, 1.2 MB"
    )


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ([TWO_OF_FOUR], ["2:4"]),
        ([FOUR_OF_EIGHT], ["4:8"]),
        ([TWO_OF_FOUR, FOUR_OF_EIGHT], ["4:8"]),
        ([ONE_OF_FOUR], ["1:4"]),
        ([TWO_OF_EIGHT], ["2:4", "2:8"]),
        ([TWO_OF_EIGHT, ONE_OF_FOUR], ["2:4", "2:8"]),
        ([TWO_OF_FOUR, rows("x.x.x.x")], []),
    ],
)
def test_the_tightest_patterns_are_named(tmp_path: Path, tensors: list[Tensor], expected: list[str]) -> None:
    _, summary = measure(saved(tmp_path, **{f"w{i}": tensor for i, tensor in enumerate(tensors)}))
    assert summary["patterns"] == expected
    assert ("no common N:M pattern" in sentence(summary)) == (not expected)


def test_a_dense_checkpoint(llama: Path, make_checkpoint: Callable[..., Path]) -> None:
    measured, summary = measure(llama)
    assert (summary["sparse_matrices"], summary["sparsity"], summary["patterns"]) == (0, 0.0, [])
    assert summary["matrices"] == len(measured) == 16  # seven in each of two blocks, embeddings and head
    assert sentence(summary).startswith("dense: none of 16 matrices is sparse; 32,160 parameters, ")
    shards = measure(make_checkpoint("llama", max_shard_size="20KB"))[1]
    assert shards | {"bytes": 0} == summary | {"bytes": 0}
    for text in ("2:4", "0.5"):
        assert violations(measured, pattern(text)) == ["no matrix is sparse at all"]


# --- expectations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "text", "expected"),
    [
        ([TWO_OF_FOUR, ONE_OF_FOUR, torch.ones(4, 4)], "2:4", []),
        ([TWO_OF_FOUR, ONE_OF_FOUR, torch.ones(4, 4)], "0.5", []),
        ([TWO_OF_FOUR, FOUR_OF_EIGHT], "2:4", ["w1: not 2:4 (sparsity 0.5000)"]),
        # 0.6 of 16 are 9 whole weights a row, 18 in all; the first has 19 zeros
        ([TWO_OF_FOUR, FOUR_OF_EIGHT], "0.6", ["w1: sparsity 0.5000 is below 0.6"]),
        # 0.3 of 7 columns: 2 whole weights of each row
        ([rows("..xxxxx", "x.x.xxx")], "0.3", []),
        ([rows("..xxxxx", "x.xxxxx")], "0.3", ["w0: sparsity 0.2143 is below 0.3"]),
        ([rows("xx.xx.")], "2:3", []),
    ],
)
def test_each_violation_is_named(tensors: list[Tensor], text: str, expected: list[str], tmp_path: Path) -> None:
    measured, _ = measure(saved(tmp_path, **{f"w{i}": tensor for i, tensor in enumerate(tensors)}), pattern(text))
    assert violations(measured, pattern(text)) == expected


@pytest.mark.parametrize(
    ("tensors", "text", "said"),
    [
        ([TWO_OF_FOUR, ONE_OF_FOUR], "2:4", "2 of 2 sparse matrices match 2:4"),
        ([TWO_OF_FOUR], "4:8", "1 of 1 sparse matrices match 4:8, which 2:4 implies"),
        ([TWO_OF_EIGHT], "4:16", "1 of 1 sparse matrices match 4:16, which 2:8 implies"),
        ([TWO_OF_FOUR], "0.5", "1 of 1 sparse matrices match 0.5, which 2:4 implies"),
        ([rows("..xxxxx", "x.x.xxx")], "0.25", "1 of 1 sparse matrices match 0.25"),
    ],
)
def test_the_verdict_says_what_holds_and_why(tensors: list[Tensor], text: str, said: str, tmp_path: Path) -> None:
    measured, summary = measure(saved(tmp_path, **{f"w{i}": t for i, t in enumerate(tensors)}), pattern(text))
    assert violations(measured, pattern(text)) == []
    assert verdict(summary, pattern(text)) == said


def test_a_model_that_is_half_dense_meets_no_expectation(tmp_path: Path) -> None:
    tensors = dict.fromkeys(("model.layers.0.mlp.gate.weight", "lm_head.weight"), torch.ones(4, 16))
    tensors |= {"model.layers.0.self_attn.q_proj.weight": TWO_OF_FOUR}
    tensors |= {"model.layers.1.self_attn.q_proj.weight": torch.ones(2, 16)}
    cross_block = [
        "model.layers.1.self_attn.q_proj.weight: dense, though model.layers.0.self_attn.q_proj.weight is sparse"
    ]
    assert violations(list(inspected(tmp_path, **tensors).values()), pattern("2:4")) == cross_block
    record(tmp_path, ["model.layers.0.self_attn.q_proj"])
    assert violations(measure(tmp_path)[0], pattern("2:4")) == []  # pruned as it was asked
    # a checkpoint of the bare model leaves out the prefix
    listed = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "base.model.layers.0.mlp.gate"]
    record(tmp_path, listed)
    assert sorted(violations(measure(tmp_path)[0], pattern("0.5"))) == [
        "model.layers.0.mlp.gate.weight: dense, though its record says that it was pruned",
        "model.layers.1.self_attn.q_proj.weight: dense, though its record says that it was pruned",
    ]
    record(tmp_path, ["model.layers.0.self_attn.q_proj", "of.another.model"])
    assert violations(measure(tmp_path)[0], pattern("2:4")) == cross_block, "a record that does not match is not used"


def test_a_ratio_rounded_down_in_every_block_of_columns_is_met(tmp_path: Path) -> None:
    # SparseGPT, blocks of 128 columns: 64 x 128 x 0.6 = 4,915.2, so 5 x 4,915 zeros of 24,576
    for zeros, problems in ((24_575, []), (24_535, ["w: sparsity 0.5990 is below 0.6"])):
        (tmp_path / str(zeros)).mkdir()
        weight = torch.ones(64, 640)
        weight.view(-1)[:zeros] = 0
        assert violations(measure(saved(tmp_path / str(zeros), w=weight))[0], pattern("0.6")) == problems


def test_what_the_record_lists_is_sparse_however_few_its_zeros(llama: Path, tmp_path: Path) -> None:
    directory = pruned(llama, tmp_path, "0.04", along_first=False)
    assert violations(measure(directory)[0], pattern("0.04")) == ["no matrix is sparse at all"]
    names = [name.removesuffix(".weight") for name in weights_of(directory) if "_proj" in name]
    record(directory, names, "0.04")
    measured, summary = measure(directory)
    assert violations(measured, pattern("0.04")) == []
    assert verdict(summary, pattern("0.04")) == "14 of 14 sparse matrices match 0.04"
    record(directory, names[:-1], "0.04")
    assert measure(directory)[1]["sparse_matrices"] == 13
    assert violations(measured, pattern("0.1"))[0].endswith("is below 0.1")


@pytest.mark.parametrize("build", [True, False])
def test_listed_experts_are_found_under_the_names_of_the_checkpoint(
    build: bool, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    directory = pruned(make_checkpoint("mixtral"), tmp_path, "2:4", along_first=False)
    if not build:
        (directory / "config.json").unlink()
    record(directory, ["model.layers.0.mlp.experts.3.gate_proj", "model.layers.1.self_attn.q_proj"])
    listed = {matrix.name for matrix in measure(directory)[0] if matrix.listed}
    assert listed == (
        {"model.layers.0.block_sparse_moe.experts.3.w1.weight", "model.layers.1.self_attn.q_proj.weight"}
        if build
        else set()
    )


def test_what_was_pruned_is_known_from_the_record_of_the_run(tmp_path: Path) -> None:
    layers = [{"name": "model.layers.0.fc", "pattern": "2:6"}]
    for name, metrics in (("pruned", {"layers": layers}), ("merged", {"matrices": 1})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "stage.json").write_text(json.dumps({"metrics": metrics}))
    found = {"model.layers.0.fc": pattern("2:6")}
    assert recorded_patterns(tmp_path / "pruned") == recorded_patterns(tmp_path / "merged") == found
    record(tmp_path / "base", [])
    (tmp_path / "base/stage.json").write_text(json.dumps({"metrics": {"seconds": 1}}))
    assert recorded_patterns(tmp_path / "base") is None, "a dense model that a run has unpacked"
    (tmp_path / "other").mkdir()
    assert recorded_patterns(tmp_path / "other") is None
    (tmp_path / "merged/stage.json").write_text("{")
    (tmp_path / "pruned/stage.json").write_text("[]")
    assert recorded_patterns(tmp_path / "merged") is None
