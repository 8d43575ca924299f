"""Certified sparsity: what holds in a matrix, the totals of a checkpoint, and what does not meet an expectation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sppctl.inspect.inspect import MatrixSparsity, measure, recorded_patterns, sentence, verdict, violations
from sppctl.pattern import Pattern
from sppctl.pruners.masks import holds

pattern = Pattern.parse


def rows(*texts: str) -> Tensor:
    """``x`` is a weight, ``.`` a zero."""
    return torch.tensor([[float(letter == "x") for letter in text.replace(" ", "")] for text in texts])


def saved(directory: Path, **tensors: Tensor) -> Path:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, directory / "model.safetensors")
    return directory


def inspected(directory: Path, **tensors: Tensor) -> dict[str, MatrixSparsity]:
    return {matrix.name: matrix for matrix in measure(saved(directory, **tensors))[0]}


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
    )
    assert list(found) == ["experts", "w"]


@pytest.mark.parametrize(("text", "found"), [(None, ()), ("2:3", ("2:3",)), ("1:3", ()), ("0.5", ())])
def test_an_unusual_pattern_can_be_looked_for(text: str | None, found: tuple[str, ...], tmp_path: Path) -> None:
    also = None if text is None else pattern(text)
    (matrix,), _ = measure(saved(tmp_path, w=rows("xx.xx.", "x..x..")), also)
    assert matrix.patterns == found


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
    measured = list(inspected(tmp_path, **tensors).values())
    assert violations(measured, pattern("2:4")) == [
        "model.layers.1.self_attn.q_proj.weight: dense, though model.layers.0.self_attn.q_proj.weight is sparse"
    ]
    assert violations(measured, pattern("2:4"), ["model.layers.0.self_attn.q_proj"]) == []  # pruned as it was asked
    # a checkpoint of the bare model leaves out the prefix
    listed = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "base.model.layers.0.mlp.gate"]
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
