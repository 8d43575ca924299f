from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sppctl.files.safe_files import TensorFiles
from sppctl.inspect.inspect import (
    MatrixSparsity,
    holds,
    matrices,
    measure,
    recorded_patterns,
    sentence,
    summarise,
    violations,
)
from sppctl.pattern import Pattern


def pattern(text: str) -> Pattern:
    return Pattern.parse(text)


def rows(*texts: str) -> Tensor:
    """``x`` is a weight, ``.`` a zero."""
    return torch.tensor([[float(letter == "x") for letter in text.replace(" ", "")] for text in texts])


def inspected(directory: Path, **tensors: Tensor) -> dict[str, MatrixSparsity]:
    save_file(tensors, directory / "model.safetensors")
    return {matrix.name: matrix for matrix in matrices(TensorFiles(directory))}


TWO_OF_FOUR = rows("xx.. x..x ..xx .x.x", ".xx. x.x. .... x...")
FOUR_OF_EIGHT = rows("xxxx .... x.x. x.x.", "xxx. ...x .... xxxx")  # the first group of four keeps all
ONE_OF_FOUR = rows("x... .x.. ..x. ...x", "x... .... ..x. ....")
TWO_OF_EIGHT = rows("xx.. .... .... xx..", "x... ...x .x.x ....")


# --- one matrix -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "text", "expected"),
    [
        (TWO_OF_FOUR, "2:4", True),
        (TWO_OF_FOUR, "4:8", True),
        (TWO_OF_FOUR, "8:16", True),
        (TWO_OF_FOUR, "1:4", False),
        (TWO_OF_FOUR, "2:8", False),
        (FOUR_OF_EIGHT, "4:8", True),
        (FOUR_OF_EIGHT, "2:4", False),
        (ONE_OF_FOUR, "1:4", True),
        (ONE_OF_FOUR, "2:4", True),
        (ONE_OF_FOUR, "2:8", True),  # N is the number KEPT
        (ONE_OF_FOUR, "1:8", False),
        (TWO_OF_EIGHT, "2:8", True),
        (TWO_OF_EIGHT, "1:4", False),
        (rows("xx.xx."), "2:3", True),
        (rows("xx.xx."), "2:4", False),  # 6 columns are no whole groups of 4
        (rows("......"), "2:4", False),
        (rows("........"), "2:4", True),
        (rows("xxxxxxxx"), "2:4", False),
    ],
)
def test_holds(weight: Tensor, text: str, expected: bool) -> None:
    assert holds(weight, pattern(text)) is expected


def test_groups_lie_along_the_input_features() -> None:
    assert not holds(TWO_OF_FOUR[:, :4].t().contiguous().repeat(1, 2), pattern("1:4"))
    columns = rows("xxxx", "xxxx", "....", "....")  # 2:4 down the columns is not 2:4
    assert not holds(columns, pattern("2:4"))
    assert holds(columns.t().contiguous(), pattern("2:4"))


def test_one_weight_too_many_is_seen() -> None:
    weight = TWO_OF_FOUR.repeat(50, 20)
    assert holds(weight, pattern("2:4"))
    weight[77, 2] = 1e-30
    weight[77, :2] = 1
    assert not holds(weight, pattern("2:4"))


def test_minus_zero_is_zero_and_nan_is_not() -> None:
    assert holds(torch.tensor([[1.0, -0.0, -0.0, 1.0]]), pattern("2:4"))
    assert not holds(torch.tensor([[1.0, float("nan"), 0.0, 1.0]]), pattern("2:4"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
def test_every_floating_point_dtype_is_measured(tmp_path: Path, dtype: torch.dtype) -> None:
    found = inspected(tmp_path, w=TWO_OF_FOUR.to(dtype))["w"]
    assert (found.shape, found.zeros) == ((2, 16), 19)  # 8 in the first row, 11 in the second
    assert found.sparsity == 19 / 32
    assert found.patterns == ("2:4", "4:8", "8:16")


def test_patterns_of_each_matrix(tmp_path: Path) -> None:
    found = inspected(
        tmp_path, two=TWO_OF_FOUR, four=FOUR_OF_EIGHT, one=ONE_OF_FOUR, eight=TWO_OF_EIGHT, dense=torch.ones(2, 16)
    )
    assert {name: set(matrix.patterns) for name, matrix in found.items()} == {
        "two": {"2:4", "4:8", "8:16"},
        "four": {"4:8", "8:16"},
        "one": {"1:4", "2:4", "2:8", "4:8", "4:16", "8:16"},
        "eight": {"2:4", "2:8", "4:8", "4:16", "8:16"},
        "dense": set(),
    }


def test_odd_widths_have_no_patterns(tmp_path: Path) -> None:
    found = inspected(tmp_path, w=rows("x.x.x.x", "......."))["w"]
    assert (found.zeros, found.patterns) == (10, ())
    assert found.is_sparse


def test_a_width_of_twelve_holds_groups_of_four_only(tmp_path: Path) -> None:
    assert inspected(tmp_path, w=rows("xx.. x..x ..xx"))["w"].patterns == ("2:4",)


def test_unstructured_sparsity_has_no_pattern(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 64)
    weight[weight.abs() < weight.abs().quantile(0.75)] = 0
    found = inspected(tmp_path, w=weight)["w"]
    assert found.sparsity == pytest.approx(0.75, abs=1e-3)
    assert found.patterns == ()


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
    )
    assert list(found) == ["experts", "w"]


def test_a_pattern_of_ones_own_is_looked_for(tmp_path: Path) -> None:
    save_file({"w": rows("xx.xx.", "x..x..")}, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path)
    assert next(matrices(files)).patterns == ()
    assert next(matrices(files, pattern("2:3"))).patterns == ("2:3",)
    assert next(matrices(files, pattern("1:3"))).patterns == ()
    assert next(matrices(files, pattern("0.5"))).patterns == ()


# --- a checkpoint -----------------------------------------------------------------------------------------------------


def test_totals_by_hand(tmp_path: Path) -> None:
    save_file(
        {"a": TWO_OF_FOUR, "b": ONE_OF_FOUR, "dense": torch.ones(4, 4), "norm": torch.zeros(8)},
        tmp_path / "model.safetensors",
    )
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
        ([torch.ones(2, 16)], []),
    ],
)
def test_the_tightest_patterns_are_named(tmp_path: Path, tensors: list[Tensor], expected: list[str]) -> None:
    save_file({f"w{i}": tensor.clone() for i, tensor in enumerate(tensors)}, tmp_path / "model.safetensors")
    assert measure(tmp_path)[1]["patterns"] == expected


def test_a_dense_checkpoint(llama: Path) -> None:
    measured, summary = measure(llama)
    assert (summary["sparse_matrices"], summary["sparsity"], summary["patterns"]) == (0, 0.0, [])
    assert summary["matrices"] == len(measured) == 16  # seven in each of two blocks, embeddings and head
    assert sentence(summary).startswith("dense: none of 16 matrices is sparse; 32,160 parameters, ")


def test_shards_count_as_one_checkpoint(make_checkpoint: Callable[..., Path]) -> None:
    whole = measure(make_checkpoint("llama"))[1]
    shards = measure(make_checkpoint("llama", max_shard_size="20KB"))[1]
    assert {**shards, "bytes": 0} == {**whole, "bytes": 0}


# --- expectations -----------------------------------------------------------------------------------------------------


def test_no_violations(tmp_path: Path) -> None:
    measured = list(inspected(tmp_path, a=TWO_OF_FOUR, b=ONE_OF_FOUR, dense=torch.ones(4, 4)).values())
    assert violations(measured, pattern("2:4")) == []
    assert violations(measured, pattern("0.5")) == []


def test_each_violation_is_named(tmp_path: Path) -> None:
    measured = list(inspected(tmp_path, a=TWO_OF_FOUR, b=FOUR_OF_EIGHT, dense=torch.ones(4, 4)).values())
    assert violations(measured, pattern("2:4")) == ["b: not 2:4 (sparsity 0.5000)"]
    assert violations(measured, pattern("0.6")) == [
        "b: sparsity 0.5000 is below 0.6",
    ]  # 0.6 of 16 are 9 whole weights a row, 18 in all; a has 19 zeros


def test_a_ratio_is_met_to_the_weight_per_row(tmp_path: Path) -> None:
    # 0.3 of 7 columns: 2 whole weights of each row
    measured = list(inspected(tmp_path, w=rows("..xxxxx", "x.x.xxx")).values())
    assert violations(measured, pattern("0.3")) == []
    measured = list(inspected(tmp_path, w=rows("..xxxxx", "x.xxxxx")).values())
    assert violations(measured, pattern("0.3")) == ["w: sparsity 0.2143 is below 0.3"]


def test_an_expectation_of_sparsity_is_not_met_by_a_dense_checkpoint(llama: Path) -> None:
    measured, _ = measure(llama)
    for text in ("2:4", "0.5"):
        assert violations(measured, pattern(text)) == ["no matrix is sparse at all"]


def test_a_model_that_is_half_dense_meets_no_expectation(tmp_path: Path) -> None:
    tensors = {f"model.layers.{block}.self_attn.q_proj.weight": TWO_OF_FOUR.clone() for block in range(2)}
    tensors |= {"model.layers.0.mlp.gate.weight": torch.ones(4, 16), "lm_head.weight": torch.ones(4, 16)}
    tensors["model.layers.1.self_attn.q_proj.weight"] = torch.ones(2, 16)
    measured = list(inspected(tmp_path, **tensors).values())
    assert violations(measured, pattern("2:4")) == [
        "model.layers.1.self_attn.q_proj.weight: dense, though model.layers.0.self_attn.q_proj.weight is sparse"
    ]
    assert violations(measured, pattern("2:4"), ["model.layers.0.self_attn.q_proj"]) == []  # pruned as it was asked
    listed = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.gate"]
    assert violations(measured, pattern("0.5"), listed) == [
        "model.layers.0.mlp.gate.weight: dense, though its record says that it was pruned",
        "model.layers.1.self_attn.q_proj.weight: dense, though its record says that it was pruned",
    ]


def test_what_was_pruned_is_known_from_the_record_of_the_run(tmp_path: Path) -> None:
    layers = [{"name": "model.layers.0.fc", "pattern": "2:6"}]
    for name, metrics in (("pruned", {"layers": layers}), ("merged", {"matrices": 1})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "stage.json").write_text(json.dumps({"metrics": metrics}))
    found = {"model.layers.0.fc": pattern("2:6")}
    assert recorded_patterns(tmp_path / "pruned") == recorded_patterns(tmp_path / "merged") == found
    (tmp_path / "other").mkdir()
    assert recorded_patterns(tmp_path / "other") is None
    (tmp_path / "merged/stage.json").write_text("{")
    (tmp_path / "pruned/stage.json").write_text("[]")
    assert recorded_patterns(tmp_path / "merged") is None


def test_an_unusual_pattern_can_be_expected(tmp_path: Path) -> None:
    save_file({"w": rows("xx.xx.")}, tmp_path / "model.safetensors")
    measured, _ = measure(tmp_path, pattern("2:3"))
    assert violations(measured, pattern("2:3")) == []


# --- words ------------------------------------------------------------------------------------------------------------


def test_the_totals_in_words(tmp_path: Path) -> None:
    save_file({"a": TWO_OF_FOUR, "dense": torch.ones(4, 8)}, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path)
    summary = summarise(files, list(matrices(files))) | {"bytes": 1_250_000}
    assert sentence(summary) == (
        "1 of 2 matrices are sparse: 59.3750% zeros in them, pattern 2:4; 29.69% of all 64 parameters, 1.2 MB"
    )


def test_no_common_pattern_in_words(tmp_path: Path) -> None:
    save_file({"a": rows("x.x.x.x")}, tmp_path / "model.safetensors")
    assert "no common N:M pattern" in sentence(measure(tmp_path)[1])
