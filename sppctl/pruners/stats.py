"""Statistics of a layer's inputs for the pruners, accumulated batch by batch in float32."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 24  # converted to float32 at a time
CPU_CHUNK = 1 << 20  # fits a cache: ten times as fast as a matrix that does not
STRIPS = 8  # of a symmetric product, of which one half is computed and the other copied
MIN_STRIP = 256  # columns; narrower strips cost more than they save
MAX_DAMP = 1.0  # of the mean diagonal; beyond it the Hessian no longer matters


@contextlib.contextmanager
def _bfloat16_products(enabled: bool) -> Iterator[None]:
    """Lets a CPU multiply float32 matrices that hold bfloat16 values on its bfloat16 units.

    Nothing is lost: the inputs are representable, sums and result stay float32. Measured about twice as fast.
    """
    matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if not enabled or not hasattr(matmul, "fp32_precision"):
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


class InputNorms:
    """Sum of squares of every input feature: (in_features,)."""

    def __init__(self, in_features: int, device: torch.device | str) -> None:
        self.num_tokens = 0
        self.squares = torch.zeros(in_features, dtype=torch.float32, device=device)

    def update(self, inputs: Tensor) -> None:
        """Adds inputs (tokens, in_features) of any float dtype."""
        self.num_tokens += inputs.shape[0]
        size = CPU_CHUNK if inputs.device.type == "cpu" else CHUNK_ELEMENTS
        for rows in inputs.split(max(1, size // inputs.shape[1])):
            self._add(rows.float())

    def _add(self, rows: Tensor) -> None:
        self.squares += rows.square().sum(dim=0)

    def totals(self) -> list[Tensor]:
        """The sums, which are added up over all processes before anything is derived from them."""
        return [self.squares]

    def norms(self) -> Tensor:
        """Root mean square of every input feature, (in_features,): proportional to ||x||_2."""
        return (self.squares / max(1, self.num_tokens)).sqrt()


class InputMoments(InputNorms):
    """Mean and variance of every input feature besides its norm: what DSnoT needs."""

    def __init__(self, in_features: int, device: torch.device | str) -> None:
        super().__init__(in_features, device)
        self.sums = torch.zeros(in_features, dtype=torch.float32, device=device)

    def _add(self, rows: Tensor) -> None:
        super()._add(rows)
        self.sums += rows.sum(dim=0)

    def totals(self) -> list[Tensor]:
        """As in InputNorms."""
        return [self.squares, self.sums]

    def mean(self) -> Tensor:
        """Mean of every input feature, (in_features,)."""
        return self.sums / max(1, self.num_tokens)

    def variance(self) -> Tensor:
        """Variance of every input feature, (in_features,)."""
        return (self.squares / max(1, self.num_tokens) - self.mean().square()).clamp_min(0)


class Hessian:
    """Second moment X^T X of the inputs: (in_features, in_features); the layer-wise Hessian of SparseGPT."""

    def __init__(self, in_features: int, device: torch.device | str) -> None:
        self.num_tokens = 0
        self.moment = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self._factors: dict[float, tuple[Tensor, Tensor, float]] = {}

    def update(self, inputs: Tensor) -> None:
        """Adds inputs (tokens, in_features) of any float dtype."""
        self.num_tokens += inputs.shape[0]
        exact = inputs.dtype == torch.bfloat16
        inputs = inputs.float()
        width = max(MIN_STRIP, -(-inputs.shape[1] // STRIPS))
        with _bfloat16_products(exact and inputs.device.type == "cpu"):
            # symmetric: a strip of rows from the diagonal on, then its mirror image
            for start in range(0, inputs.shape[1], width):
                strip, below = slice(start, start + width), slice(start + width, None)
                self.moment[strip, start:].addmm_(inputs[:, strip].t(), inputs[:, start:])
                self.moment[below, strip] = self.moment[strip, below].t()
        self._factors.clear()

    def totals(self) -> list[Tensor]:
        """As in InputNorms."""
        return [self.moment]

    def norms(self) -> Tensor:
        """Root mean square of every input feature, (in_features,)."""
        return (self.moment.diagonal() / max(1, self.num_tokens)).sqrt()

    def reordered(self, order: Tensor) -> Hessian:
        """The second moment of the same inputs with their features in another order, (in_features,) int64."""
        other = Hessian(0, self.moment.device)
        other.num_tokens, other.moment = self.num_tokens, self.moment[order][:, order]
        return other

    def inverse_factor(self, damp: float) -> tuple[Tensor, Tensor, float]:
        """Upper Cholesky factor of the inverse of the damped Hessian; computed once for layers that share inputs.

        ``damp``, the share of the mean diagonal added to the diagonal, grows tenfold up to ``MAX_DAMP`` as long as the
        factorisation fails. Features that never fired have no part in the mean, and the mean as their diagonal.

        Returns:
            The factor U (in_features, in_features) with H^-1 = U^T U, the features that never fired (in_features,)
            boolean, and the damping that was needed.

        Raises:
            ValueError: ``damp`` is not a positive, finite number, or even ``MAX_DAMP`` does not make the Hessian
                positive definite (for example, inputs are not finite).
        """
        if damp in self._factors:
            return self._factors[damp]
        if not 0 < damp < math.inf:  # neither of zero nor of NaN would ten times be more
            raise ValueError(f"damp {damp} is not a positive, finite share of the Hessian's mean diagonal")
        dead = self.moment.diagonal() == 0
        live = len(dead) - int(dead.sum())
        hessian = self.moment * (2 / max(1, self.num_tokens))
        # the dead are zeros in the mean of all; without them the factor is exactly 1
        mean = hessian.diagonal().mean() * (len(dead) / live) if live else hessian.new_ones(())
        hessian.diagonal()[dead] = mean
        used = damp
        while True:
            damped = hessian.clone()
            damped.diagonal().add_(used * mean)
            lower, failed = torch.linalg.cholesky_ex(damped)
            if not failed:
                upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and torch.isfinite(upper).all():
                return self._factors.setdefault(damp, (upper, dead, used))
            if used >= MAX_DAMP:
                raise ValueError(
                    f"the Hessian of the inputs is not positive definite even with a damping of {used:g}; "
                    "more calibration text may help, or --method wanda"
                )
            used = min(used * 10, MAX_DAMP)


Statistics = InputNorms | Hessian  # InputMoments are InputNorms
