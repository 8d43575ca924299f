"""What the records say about the paper's claims: differences with their uncertainty, and a verdict for each claim."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from cells import ABLATIONS, CLAIMED_AT, FULL, Record, Records, Scale, cell_name
from scipy.stats import norm
from scipy.stats import t as student

from sppctl.report.significance import resampled_means

WIKITEXT, INSTRUCTIONS = "wikitext2", "instructions"
TEXTS = {WIKITEXT: "WikiText-2", INSTRUCTIONS: "held-out instructions"}
TITLES = {"pruned": "pruned", "dsnot": "DSnoT", "lora": "LoRA*", "spp": "SPP"}  # of the kinds of the grid
HOLDS, FAILS, UNKNOWN, OPEN = "holds", "does not hold", "cannot be told here", "not measured yet"
DIVERGED = "diverged"  # instead of a number, if the training of one of the seeds did


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval (bootstrap over windows; the seeds are averaged in each window)."""

    mean: float
    low: float
    high: float
    by_seed: tuple[float, ...]  # the mean of each seed

    @property
    def is_below_zero(self) -> bool:
        """Whether the interval excludes zero and all seeds agree."""
        return self.high < 0 and max(self.by_seed) < 0

    @property
    def error(self) -> float:
        """The standard error of the mean over windows, as far as they explain it."""
        return (self.high - self.low) / (2 * norm.ppf(0.975))


@dataclass(frozen=True)
class Spread:
    """By how much another seed changes a number: a standard deviation, pooled over several numbers."""

    deviation: float
    degrees: int  # of freedom

    @classmethod
    def of(cls, numbers: Iterable[Sequence[float]]) -> Spread | None:
        """Of numbers by seed; None if none has more than one seed."""
        several = [values for values in numbers if len(values) > 1]
        degrees = sum(len(values) - 1 for values in several)
        squares = sum(float(np.var(values)) * len(values) for values in several)
        return cls(math.sqrt(squares / degrees), degrees) if degrees else None

    def at_least(self, values: Sequence[float]) -> Spread:
        """This spread; with the deviation of these seeds instead if they differ more."""
        own = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        return replace(self, deviation=max(self.deviation, own))

    def reach(self, one: Interval, seeds: float, comparisons: int = 1) -> float:
        """How far from zero chance alone takes one of several differences with a probability of 5 % (Bonferroni).

        Args:
            one: the difference.
            seeds: 1 / the share of a seed's variance in it: the number of seeds, or half of it if it is one of means
                whose seeds are not paired.
            comparisons: the number of differences.
        """
        quantile = student.ppf(1 - 0.025 / comparisons, self.degrees)
        return float(quantile * math.hypot(one.error, self.deviation / math.sqrt(seeds)))


@dataclass(frozen=True)
class Verdict:
    """A claim, what was found, and the numbers."""

    claim: str
    verdict: str
    numbers: list[str]


def losses(record: Record, text: str) -> np.ndarray:
    """(windows,) loss per predicted token in each window, in nats; their mean is that of all tokens.

    Rows of instructions have different numbers of tokens. Theirs is the mean over all tokens plus what the row adds to
    it, (loss - mean x tokens) / (tokens of an average row): the ratio of two means, linearised, so that the length of a
    row counts as weight and not as loss.
    """
    measured = record["texts"][text]
    per_window = measured["tokens"] / measured["windows"]
    values = np.array([math.nan if loss is None else loss for loss in measured["window_nll"]], dtype=np.float64)
    if "window_tokens" not in measured:
        return values / per_window
    mean = values.sum() / measured["tokens"]
    return mean + (values - mean * np.array(measured["window_tokens"])) / per_window


def interval(samples: Sequence[np.ndarray]) -> Interval:
    """Of the mean over seeds and windows."""
    values = np.mean(samples, axis=0)
    low, high = np.quantile(resampled_means(values), [0.025, 0.975])
    by_seed = tuple(float(np.mean(sample)) for sample in samples)
    return Interval(float(values.mean()), float(low), float(high), by_seed)


class Findings:
    """The records of a scale, and comparisons of them."""

    def __init__(self, scale: Scale, records: Records) -> None:
        self.scale, self.records = scale, records

    def of(self, pruner: str, pattern: str, kind: str) -> list[Record | None]:
        """The records of one entry of the grid, by seed."""
        return [self.records.get(cell_name(pruner, pattern, kind, seed)) for seed in self.scale.seeds]

    def loss(self, pruner: str, pattern: str, kind: str, text: str = WIKITEXT) -> Interval | None:
        """The loss of an entry over the seeds that have been measured; None if there are none."""
        found = [losses(record, text) for record in self.of(pruner, pattern, kind) if record is not None]
        return interval(found) if found else None

    def difference(self, pruner: str, pattern: str, first: str, second: str, text: str = WIKITEXT) -> Interval | None:
        """Loss of the second minus that of the first, paired by seed and window; None without a common seed."""
        found = [one for one in self.differences(pruner, pattern, first, second, text) if one is not None]
        return interval(found) if found else None

    def differences(
        self, pruner: str, pattern: str, first: str, second: str, text: str = WIKITEXT
    ) -> list[np.ndarray | None]:
        """As :meth:`difference`, for each seed and window; None for a seed that one of them lacks."""
        pairs = zip(self.of(pruner, pattern, first), self.of(pruner, pattern, second), strict=True)
        return [None if a is None or b is None else losses(b, text) - losses(a, text) for a, b in pairs]

    # --- the claims ---------------------------------------------------------------------------------------------------

    def verdicts(self) -> list[Verdict]:
        """One for each claim, in the order of the paper."""
        return [
            self.lifts(),
            self.most_at_75(),
            self.beats("dsnot", "DSnoT"),
            self.beats("lora", "LoRA with the mask put back"),
            self.ablations("no beta", "Training beta improves on alpha alone"),
            self.ablations("r = ", "r = 16 is the best rank"),
            self.ablations("init ", "Starting at the pruned model (beta = 0) is the best initialisation"),
            self.pattern_kept(),
        ]

    def lifts(self) -> Verdict:
        """SPP improves every pruned model."""
        found = {
            f"{pruner}, {percent(pattern)}": self.difference(pruner, pattern, "pruned", "spp")
            for pruner in self.scale.pruners
            for pattern in self.scale.patterns
        }
        return _verdict("SPP improves every pruned model", found)

    def most_at_75(self) -> Verdict:
        """The gain at a ratio of 75 % exceeds that at 50 %, for each pruner, and that at 2:8 exceeds 2:4."""
        pairs = {}
        for pruner in self.scale.pruners:
            for high, low in (("0.75", "0.5"), ("2:8", "2:4")):
                gains = [self.differences(pruner, pattern, "pruned", "spp") for pattern in (high, low)]
                common = [a - b for a, b in zip(*gains, strict=True) if a is not None and b is not None]
                pairs[f"{pruner}, {percent(high)} - {percent(low)}"] = interval(common) if common else None
        return _verdict("SPP gains most at 75 % zeros", pairs)

    def beats(self, other: str, title: str) -> Verdict:
        """SPP is better than a baseline at 75 %, in both patterns."""
        patterns = [pattern for pattern in CLAIMED_AT if pattern in self.scale.patterns]
        found = {
            f"{pruner}, {percent(pattern)}": self.difference(pruner, pattern, other, "spp")
            for pruner in self.scale.pruners
            for pattern in patterns
        }
        return _verdict(f"SPP beats {title} at 75 % zeros", found)

    def ablations(self, prefix: str, claim: str) -> Verdict:
        """SPP as published is better than SPP with a setting changed, for each change whose name starts so."""
        kinds = [kind for kind in ABLATIONS if kind.startswith(prefix)]
        found = {
            f"{percent(pattern)}, {kind}": self.difference("wanda", pattern, kind, "spp")
            for pattern in self.scale.ablated
            for kind in kinds
        }
        return _verdict(claim, found)

    def pattern_kept(self) -> Verdict:
        """SPP's merged weights have exactly the zeros of the pruned ones; merging proves it or fails."""
        merges = [record["stages"]["merge"] for record in self.records.values() if _keeps_the_mask(record)]
        kept = sum(bool(merge["pattern_unchanged"]) for merge in merges)
        zeros = sum(merge["zeros"] for merge in merges)
        claim = "Pattern and ratio of zeros are identical after SPP"
        if not merges:
            return Verdict(claim, OPEN, [])
        text = f"{kept} of {len(merges)} merged checkpoints; {zeros:,} zeros compared, position by position"
        grid = [
            one for p in self.scale.pruners for pattern in self.scale.patterns for one in self.of(p, pattern, "spp")
        ]
        complete = HOLDS if all(one is not None for one in grid) else OPEN
        return Verdict(claim, complete if kept == len(merges) else FAILS, [text])


def _keeps_the_mask(record: Record) -> bool:
    """Whether a checkpoint was trained by SPP with the pruner's mask."""
    is_refreshed = any(setting.startswith("train.refresh.") for setting in record["cell"]["training"])
    return bool(record["stages"].get("train", {}).get("method") == "spp" and not is_refreshed)


def percent(pattern: str) -> str:
    """A pattern as the page names it: 2:4, 75 %."""
    return pattern if ":" in pattern else f"{float(pattern):.0%}".replace("%", " %")


def _verdict(claim: str, found: dict[str, Interval | None]) -> Verdict:
    """Holds if every difference is negative beyond its uncertainty; does not if one is positive beyond chance.

    The chance of one positive difference grows with their number, so that of refuting a claim is corrected for it, and
    counts the seeds as drawn; a difference whose own seeds vary more than those of all is judged by its own. One of
    fewer than three seeds can refute nothing and confirm nothing; it is shown.
    """
    if not any(found.values()):
        return Verdict(claim, OPEN, [])
    numbers = [f"{name}: {_text(one)}" for name, one in found.items() if one is not None]
    numbers += [f"{len(found) - len(numbers)} not measured"] if len(numbers) < len(found) else []
    measured = [one for one in found.values() if one is not None]
    enough = [one for one in measured if len(one.by_seed) >= len(FULL.seeds)]
    spread = Spread.of(one.by_seed for one in enough if not math.isnan(one.mean))
    if spread and any(
        one.mean > spread.at_least(one.by_seed).reach(one, len(one.by_seed), len(found)) for one in enough
    ):
        return Verdict(claim, FAILS, numbers)
    if enough and len(enough) == len(found) and all(one.is_below_zero for one in enough):
        return Verdict(claim, HOLDS, numbers)
    return Verdict(claim, UNKNOWN, numbers)


def _text(one: Interval) -> str:
    if math.isnan(one.mean):
        return DIVERGED
    return f"{one.mean:+.3f} [{one.low:+.3f}, {one.high:+.3f}], {of_seeds(one)}"


def of_seeds(one: Interval) -> str:
    """The number of seeds, in words."""
    return f"{len(one.by_seed)} seed{'s' * (len(one.by_seed) > 1)}"


def perplexity(one: Interval) -> str:
    """exp of a loss, with its interval."""
    if math.isnan(one.mean):
        return DIVERGED
    mean, low, high = (math.exp(value) for value in (one.mean, one.low, one.high))
    digits = 1 if mean < 1000 else 0
    return f"{mean:,.{digits}f} [{low:,.{digits}f}, {high:,.{digits}f}]"


def mean_of(values: Iterable[float]) -> float:
    """The mean of numbers."""
    listed = list(values)
    return sum(listed) / len(listed)
