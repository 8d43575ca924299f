"""SparseGPT's GPU kernel against the operations of a CPU: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import inspect
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import without_interpreter
from torch import Tensor

from sppctl.pattern import Pattern
from sppctl.pruners import sparsegpt
from sppctl.pruners.sparsegpt import prune_sparsegpt
from sppctl.pruners.stats import Hessian

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Solve = Callable[..., list[Tensor]]


@pytest.fixture
def kernels() -> types.ModuleType:
    pytest.importorskip("triton", reason="Triton is not installed")
    from sppctl.pruners import triton_kernels

    return triton_kernels


@pytest.fixture
def by_kernel(kernels: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> Solve:
    """As :func:`by_operations`, with the kernel."""

    def solve(
        weights: list[Tensor], statistics: Hessian, patterns: list[str | float], **options: object
    ) -> list[Tensor]:
        with monkeypatch.context() as context:
            context.setattr(sparsegpt, "KERNELS", types.SimpleNamespace(usable=lambda _: kernels))
            return solved(weights, statistics, patterns, DEVICE, **options)

    return solve


def by_operations(
    weights: list[Tensor], statistics: Hessian, patterns: list[str | float], **options: object
) -> list[Tensor]:
    """The pruned weights, by PyTorch's operations on a CPU."""
    return solved(weights, statistics, patterns, "cpu", **options)


def solved(
    weights: list[Tensor], statistics: Hessian, patterns: list[str | float], device: str, **options: object
) -> list[Tensor]:
    factor, dead, damp = statistics.inverse_factor(0.01)
    placed = Factor(factor.to(device), dead.to(device), damp)
    parsed = [Pattern.parse(pattern) for pattern in patterns]
    pruned, _ = prune_sparsegpt([w.to(device) for w in weights], placed, parsed, **options)  # type: ignore[arg-type]
    return [one.cpu() for one in pruned]


@dataclass
class Factor:
    """Statistics with a given factor, so that both sides have the same bits of it."""

    factor: Tensor
    dead: Tensor
    damp: float = 0.01

    def inverse_factor(self, damp: float) -> tuple[Tensor, Tensor, float]:
        return self.factor, self.dead, self.damp


def correlated(columns: int, seed: int = 0) -> tuple[Hessian, Tensor]:
    """The second moment of correlated inputs, and the inputs (tokens, columns)."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(columns) + torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(4 * columns, columns, generator=generator) @ mixing
    hessian = Hessian(columns, "cpu")
    hessian.update(inputs)
    return hessian, inputs


def bits(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors]).view(torch.int32)


def literal(
    weight: Tensor, statistics: Hessian, pattern: Pattern | None, mask: Tensor, block_size: int = 128
) -> Tensor:
    """Algorithm 1 of the paper, one operation after the other; the mask is chosen where there is a pattern."""
    factor, _, _ = statistics.inverse_factor(0.01)
    work, mask = weight.clone(), mask.clone()
    for column in range(work.shape[1]):
        if pattern is not None and pattern.ratio and column % block_size == 0:
            scores = (work / factor.diagonal()).square()
            entries = [(row, place) for row in range(len(work)) for place in range(column, column + block_size)]
            order = sorted((entry for entry in entries if entry[1] < work.shape[1]), key=lambda entry: scores[entry])
            for number, entry in enumerate(order):
                mask[entry] = number >= int(pattern.ratio * len(order))
        if pattern is not None and pattern.group and pattern.keep and column % pattern.group == 0:
            places = range(column, column + pattern.group)
            for row, score in enumerate((work / factor.diagonal()).square().tolist()):
                order = sorted(places, key=lambda place: (score[place], place))
                mask[row, list(places)] = False
                mask[row, order[-pattern.keep :]] = True
        error = (work[:, column] / factor[column, column]).masked_fill(mask[:, column], 0)
        product = error[:, None] * factor[column, column:]
        work[:, column:] = work[:, column:] - product
    return work.masked_fill(~mask, 0)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "5:8", "3:20", None])
def test_it_does_the_algorithm_to_the_bit(pattern: str | None, by_kernel: Solve) -> None:
    """Products are not fused with the subtraction, and divisions are rounded to the nearest."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(37, 40, generator=generator)
    mask = torch.rand(weight.shape, generator=generator) < 0.5
    hessian, _ = correlated(40)
    expected = literal(weight, hessian, None if pattern is None else Pattern.parse(pattern), mask)
    pruned = by_kernel([weight], hessian, [pattern or 0.5], masks=None if pattern else [mask.to(DEVICE)])
    assert torch.equal(bits(pruned), bits([expected]))


@pytest.mark.parametrize("block_size", [16, 128])
def test_a_ratio_is_that_of_each_block_of_columns_over_all_rows_of_a_layer(block_size: int) -> None:
    generator = torch.Generator().manual_seed(6)
    hessian, _ = correlated(200)
    weights = [torch.randn(rows, 200, generator=generator) for rows in (12, 9)]
    pruned = by_operations(weights, hessian, [0.5, 0.75], block_size=block_size)
    for weight, ratio, result in zip(weights, (0.5, 0.75), pruned, strict=True):
        expected = literal(weight, hessian, Pattern(ratio=ratio), weight != 0, block_size)
        assert torch.equal(result == 0, expected == 0)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block_size", [1, 20, 128])
@pytest.mark.parametrize("keep_zeros", [False, True])
@pytest.mark.parametrize("patterns", [["2:4", "2:4"], [0.5, "4:8"], ["3:5", "2:4"], ["1:40", 0.7]], ids=str)
def test_equal_scores_leave_the_weights_that_they_leave_on_a_cpu(
    patterns: list[str | float],
    keep_zeros: bool,
    block_size: int,
    by_kernel: Solve,
    kernels: types.ModuleType,
    monkeypatch: Any,
) -> None:
    """Small integers and powers of two: no operation rounds, whatever its order, and most scores have an equal."""
    monkeypatch.setattr(kernels, "COLUMNS", 32)  # several launches in a block
    monkeypatch.setattr(kernels, "ROWS", 16)  # in fewer programs: the interpreter's time grows with their number
    generator = torch.Generator().manual_seed(2)
    columns = torch.arange(80)
    weights = [torch.randint(-2, 3, (rows, 80), generator=generator).float() for rows in (13, 20)]
    # even inputs change odd ones, so that no value is divided again and again
    factor = torch.randint(-1, 2, (80, 80), generator=generator).float() / 2
    factor *= (columns[:, None] % 2 == 0) & (columns % 2 == 1) & (columns[:, None] < columns)
    factor += torch.diag(2.0 ** torch.randint(-1, 2, (80,), generator=generator))
    statistics = Factor(factor, columns % 31 == 3)
    options = {"block_size": block_size, "keep_zeros": keep_zeros}
    expected = by_operations(weights, statistics, patterns, **options)
    pruned = by_kernel(weights, statistics, patterns, **options)
    assert torch.equal(bits(pruned), bits(expected))


@pytest.mark.parametrize(
    ("patterns", "block_size"), [(["2:4", "2:4"], 128), (["3:7", 0.5], 100), ([0.75, "4:8"], 32)], ids=str
)
def test_rounding_changes_hardly_a_weight(
    patterns: list[str | float], block_size: int, by_kernel: Solve, kernels: types.ModuleType, monkeypatch: Any
) -> None:
    if DEVICE == "cpu":
        monkeypatch.setattr(kernels, "ROWS", 128)
    generator = torch.Generator().manual_seed(3)
    hessian, inputs = correlated(280)
    weights = [torch.randn(rows, 280, generator=generator) for rows in (128, 256)]
    expected = torch.cat(by_operations(weights, hessian, patterns, block_size=block_size))
    pruned = torch.cat(by_kernel(weights, hessian, patterns, block_size=block_size))
    assert ((pruned == 0) != (expected == 0)).sum() <= 1e-5 * pruned.numel()
    errors = [(inputs @ (one - torch.cat(weights)).t()).square().sum().item() for one in (pruned, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def test_inputs_that_never_fire_are_pruned_first_and_cost_nothing(by_kernel: Solve) -> None:
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(4))
    hessian, _ = correlated(64)
    dead = [1, 4, 5, 30, 63]
    hessian.moment[dead] = hessian.moment[:, dead] = 0
    (pruned,), (expected,) = (solve([weight], hessian, ["2:4"]) for solve in (by_kernel, by_operations))
    assert torch.equal(pruned == 0, expected == 0)
    assert (pruned[:, [4, 5]] == 0).all()
    kept = pruned[:, dead] != 0
    assert torch.equal(pruned[:, dead][kept], weight[:, dead][kept])


def test_a_group_that_does_not_fit_into_registers_is_left_to_pytorch(
    kernels: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    hessian, _ = correlated(12)
    weight = torch.randn(4, 12, generator=torch.Generator().manual_seed(5))
    monkeypatch.setattr(sparsegpt, "MAX_GROUP", 11)
    monkeypatch.setattr(sparsegpt, "KERNELS", types.SimpleNamespace(usable=pytest.fail))
    (pruned,) = solved([weight, weight], hessian, ["2:4", "1:3"], DEVICE)[:1]
    assert torch.equal((pruned != 0).view(4, 3, 4).sum(-1), torch.full((4, 3), 2))


def test_the_check_accepts_it_and_notices_a_wrong_result(kernels: types.ModuleType) -> None:
    sparsegpt.check(kernels, DEVICE)

    def failing(name: str, change: Callable[[Tensor], Tensor]) -> types.SimpleNamespace:
        def solve(*arguments: Any) -> None:
            kernels.solve(*arguments)
            change(inspect.signature(kernels.solve).bind(*arguments).arguments[name])

        return types.SimpleNamespace(solve=solve)

    for name in ("work", "errors"):
        with pytest.raises(AssertionError, match="not close"):
            sparsegpt.check(failing(name, lambda tensor: tensor.mul_(1.01)), DEVICE)
    with pytest.raises(AssertionError, match="zeros differ"):
        sparsegpt.check(failing("kept", lambda mask: mask[0, :4].logical_not_()), DEVICE)


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from sppctl.pruners import triton_kernels as kernels

for keep, group, columns in ((2, 4, 128), (0, 1, 128), (1, 600, 1024)):
    types = ["*fp32", "*i1", "*fp32", "constexpr" if group == 4 else "*i1", "*fp32", "*fp32"]
    types += ["i32"] * 4 + ["constexpr"] * 4
    constants = {"zeros": None} if group == 4 else {}
    constants |= dict(keep=keep, group=group, rows_per_program=kernels.ROWS, padded_width=columns)
    source = ASTSource(kernels._solve_kernel, dict(zip(kernels._solve_kernel.arg_names, types, strict=True)), constants)
    for capability in (80, 90):
        options = {"num_warps": columns // kernels.WARP_COLUMNS, "enable_fp_fusion": False}
        made = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        print(len(made.asm["cubin"]), "fma.rn.f32" in made.asm["ptx"])
"""


@pytest.mark.slow
def test_it_compiles_for_gpus(kernels: types.ModuleType, tmp_path: Path) -> None:
    lines = [line.split() for line in without_interpreter(COMPILE, tmp_path).splitlines()]
    assert len(lines) == 6
    assert all(int(size) > 1000 and fused == "False" for size, fused in lines)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_it_is_used() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sparsegpt.KERNELS.usable(torch.zeros(64, 64, device="cuda")) is not None
