"""Time and saved tensors of one SPP layer, forward and backward, as ratios to the frozen layer of the same round.

    python benchmarks/spp_layer.py [--device auto --tokens 2048 --rank 16 --rounds 7 --dtypes bfloat16,float32]

The frozen layer computes y and dx, which takes two matrix products. The baselines are plain implementations under
autograd. Their trained parameters have the dtype of W, which favours them: SPP keeps alpha and beta in float32.

    residual:    y = x W^T + s dropout(x) (W * repeat(alpha) * beta)^T                    (Eq. 5)
    row blocks:  y = x W^T + s [((dropout(x) * alpha_k) W_k^T) * beta_k for each k]       (Eq. 7)
    LoRA:        y = x W^T + s dropout(x) A^T B^T, r = 8

"packed" is the same layer with a packed weight, of the pattern in --patterns; its results are the same bits. The
evaluation of a packed layer is its product alone, of --eval-tokens, as a ratio to the dense one.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hardware import add_clock, describe, name_of
from torch import Tensor

from sppctl import prune_linear
from sppctl.adapters.spp.kernel import spp_linear
from sppctl.model.checkpoint import pick_device
from sppctl.packed.format import PackedWeight
from sppctl.packed.linear import linear, packed_in

SHAPES = "576x1536,1536x576,2048x2048,2048x5632"
SCALE, DROPOUT, LORA_RANK = 2.0, 0.05, 8


@dataclass(frozen=True)
class Layer:
    """x (tokens, in), W (out, in), alpha (r, in), beta (out, 1), A (8, in), B (out, 8), dy (tokens, out)."""

    x: Tensor
    weight: Tensor
    packed: PackedWeight
    alpha: Tensor
    beta: Tensor
    down: Tensor
    up: Tensor
    upstream: Tensor

    @classmethod
    def make(
        cls, in_features: int, out_features: int, options: argparse.Namespace, dtype: torch.dtype, pattern: str
    ) -> Layer:
        """Creates a layer with a random mask; the values do not affect the time."""
        device = options.device
        weight = torch.randn(out_features, in_features, device=device) / in_features**0.5
        weight = prune_linear(weight, method="magnitude", pattern=pattern).to(dtype)
        return cls(
            torch.randn(options.tokens, in_features, device=device).to(dtype).requires_grad_(),
            weight,
            packed_in(weight, dtype, device),
            (torch.rand(options.rank, in_features, device=device) / in_features**0.5).requires_grad_(),
            torch.randn(out_features, 1, device=device).mul_(0.01).requires_grad_(),
            (torch.randn(LORA_RANK, in_features, device=device) / in_features**0.5).to(dtype).requires_grad_(),
            torch.randn(out_features, LORA_RANK, device=device).mul_(0.01).to(dtype).requires_grad_(),
            torch.randn(options.tokens, out_features, device=device).to(dtype),
        )


Form = Callable[[Layer, float], Tensor]


def frozen(layer: Layer, dropout: float) -> Tensor:
    return F.linear(layer.x, layer.weight)


def spp(layer: Layer, dropout: float) -> Tensor:
    return spp_linear(layer.x, layer.weight, None, [(layer.alpha, layer.beta, SCALE, dropout)])


def packed(layer: Layer, dropout: float) -> Tensor:
    return spp_linear(layer.x, layer.packed, None, [(layer.alpha, layer.beta, SCALE, dropout)])


def residual(layer: Layer, dropout: float) -> Tensor:
    x, weight, dtype = layer.x, layer.weight, layer.weight.dtype
    alpha = layer.alpha.to(dtype).repeat_interleave(len(weight) // len(layer.alpha), 0)
    delta = weight * alpha * layer.beta.to(dtype)
    return F.linear(x, weight) + SCALE * F.linear(F.dropout(x, dropout), delta)


def row_blocks(layer: Layer, dropout: float) -> Tensor:
    x, weight, dtype = layer.x, layer.weight, layer.weight.dtype
    dropped, r = F.dropout(layer.x, dropout), len(layer.alpha)
    parts = [
        F.linear(dropped * alpha, rows) * beta.squeeze(1)
        for alpha, rows, beta in zip(layer.alpha.to(dtype), weight.chunk(r), layer.beta.to(dtype).chunk(r), strict=True)
    ]
    return F.linear(x, weight) + SCALE * torch.cat(parts, 1)


def lora(layer: Layer, dropout: float) -> Tensor:
    low = F.linear(F.dropout(layer.x, dropout), layer.down)
    return F.linear(layer.x, layer.weight) + SCALE * F.linear(low, layer.up)


def trained(form: Form, layer: Layer) -> tuple[Tensor, ...]:
    if form is lora:
        return layer.down, layer.up
    return () if form is frozen else (layer.alpha, layer.beta)


FORMS: dict[str, tuple[Form, float]] = {
    "frozen": (frozen, 0.0),
    "SPP": (spp, 0.0),
    "SPP packed": (packed, 0.0),
    "residual": (residual, 0.0),
    "row blocks": (row_blocks, 0.0),
    "LoRA": (lora, 0.0),
    "SPP, dropout": (spp, DROPOUT),
    "SPP packed, dropout": (packed, DROPOUT),
    "residual, dropout": (residual, DROPOUT),
    "row blocks, dropout": (row_blocks, DROPOUT),
    "LoRA, dropout": (lora, DROPOUT),
}


def seconds(form: Form, dropout: float, layer: Layer, clock: Callable[[], float]) -> float:
    """One forward + backward."""
    wanted = (layer.x, *trained(form, layer))
    synchronize(layer)
    started = clock()
    torch.autograd.grad(form(layer, dropout), wanted, layer.upstream)
    synchronize(layer)
    return clock() - started


def synchronize(layer: Layer) -> None:
    if layer.x.is_cuda:
        torch.cuda.synchronize()


def saved_beyond_input(form: Form, dropout: float, layer: Layer) -> int:
    """Bytes kept for backward besides x and the layer's own parameters; shared memory counts once."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        form(layer, dropout)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    for own in (layer.x, layer.weight, *trained(form, layer)):
        storages.pop(own.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def measure(layer: Layer, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every form; each round runs all forms in turn, so that other load affects all of them alike."""
    spent: dict[str, list[float]] = {name: [] for name in FORMS}
    for _ in range(options.rounds):
        for name, (form, dropout) in FORMS.items():
            # warm up: otherwise a form has page faults for memory that the previous form has released
            seconds(form, dropout, layer, options.clock)
            spent[name].append(seconds(form, dropout, layer, options.clock))
    return spent


@torch.no_grad()
def packed_ratios(layer: Layer, spent: dict[str, list[float]], options: argparse.Namespace) -> dict[str, float]:
    """Packed to dense: bytes of W, time of a layer in training without and with dropout, and in evaluation."""
    evaluated: list[float] = []
    x = layer.x.repeat(max(1, options.eval_tokens // len(layer.x)), 1)
    for _ in range(options.rounds):
        seconds_of = []
        for weight in (layer.weight, layer.packed):
            linear(x, weight, None)
            synchronize(layer)
            started = options.clock()
            linear(x, weight, None)
            synchronize(layer)
            seconds_of.append(options.clock() - started)
        evaluated.append(seconds_of[1] / seconds_of[0])

    def ratio(suffix: str) -> float:
        pairs = zip(spent[f"SPP packed{suffix}"], spent[f"SPP{suffix}"], strict=True)
        return statistics.median(packed / dense for packed, dense in pairs)

    return {
        "bytes of W": layer.packed.num_bytes / layer.weight.nbytes,
        "training": ratio(""),
        "training, dropout": ratio(", dropout"),
        f"evaluation, {len(x)} tokens": statistics.median(evaluated),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--shapes", default=SHAPES, help="in x out, comma-separated")
    parser.add_argument("--patterns", default="2:4", help="comma-separated")
    parser.add_argument("--eval-tokens", type=int, default=8 * 2048)
    add_clock(parser)
    options = parser.parse_args()
    options.device = pick_device(options.device)
    torch.manual_seed(0)
    print(describe(options.device))
    print(f"{options.tokens} tokens, r = {options.rank}, dropout {DROPOUT}, {name_of(options.clock)}")
    print(f"medians of {options.rounds} rounds")
    for pattern in options.patterns.split(","):
        for dtype in options.dtypes.split(","):
            report(options, dtype, pattern)


def report(options: argparse.Namespace, dtype: str, pattern: str) -> None:
    ratios: dict[str, list[float]] = {name: [] for name in FORMS}
    ratios_of_packed: dict[str, list[float]] = {}
    print(
        f"\n{dtype}, {pattern}\n\n"
        "| in x out | form | ms | / frozen | saved beyond x, bytes |\n| --- | --- | ---: | ---: | ---: |"
    )
    for shape in options.shapes.split(","):
        in_features, out_features = map(int, shape.split("x"))
        layer = Layer.make(in_features, out_features, options, getattr(torch, dtype), pattern)
        spent = measure(layer, options)
        for name, values in spent.items():
            ratio = statistics.median(a / b for a, b in zip(values, spent["frozen"], strict=True))
            ratios[name].append(ratio)
            kept = saved_beyond_input(*FORMS[name], layer)
            milliseconds = 1000 * statistics.median(values)
            print(f"| {shape} | {name} | {milliseconds:.1f} | {ratio:.2f} | {kept:,} |", flush=True)
        for name, values in packed_ratios(layer, spent, options).items():
            ratios_of_packed.setdefault(name, []).append(values)
    print("\nPacked / dense, geometric means\n\n| | ratio |\n| --- | ---: |")
    for name, values in ratios_of_packed.items():
        print(f"| {name} | {statistics.geometric_mean(values):.3f} |")
    means = {name: statistics.geometric_mean(values) for name, values in ratios.items()}
    print("\nGeometric means over the shapes\n\n| form | / frozen | / SPP, same dropout |\n| --- | ---: | ---: |")
    for name, mean in means.items():
        spp_mean = means["SPP, dropout" if "dropout" in name else "SPP"]
        print(f"| {name} | {mean:.2f} | {mean / spp_mean:.2f} |")


if __name__ == "__main__":
    main()
