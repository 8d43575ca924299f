"""What a report says first: whether the pattern was kept, what the numbers became, what it cost, and what to doubt."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from sppctl.evaluate.results import TaskResult, TextResult
from sppctl.evaluate.values import Kind, Quantity, Value, family_title, text_quantity
from sppctl.records import MergeRecord, PruneRecord
from sppctl.report import provenance
from sppctl.report.study import MADE_BY, Row, RunStudy, Study, headlines, pattern_text, relative_paths
from sppctl.report.tables import written

SHOWN = 4  # headline quantities
FEW_WINDOWS = 16  # with fewer, the standard error of a perplexity is uncertain itself
FEW_SAMPLES = 100  # with fewer, the standard error of an accuracy exceeds 4 points
IN_ORDER = ("base", "pruned", "merged")


@dataclass(frozen=True)
class Finding:
    """One result in a few words."""

    title: str
    value: str
    detail: str = ""
    is_good: bool | None = None  # None: neither good nor bad

    def __str__(self) -> str:
        return f"{self.title}: {self.value}" + (f" ({self.detail})" if self.detail else "")


@dataclass(frozen=True)
class Verdict:
    """What was found, and what makes it doubtful."""

    findings: Sequence[Finding]
    warnings: Sequence[str] = field(default_factory=list)

    @property
    def lines(self) -> list[str]:
        """In plain text."""
        return [*map(str, self.findings), *(f"warning: {warning}" for warning in self.warnings)]


# --- one run ----------------------------------------------------------------------------------------------------------


def of_run(run: RunStudy) -> Verdict:
    """The verdict on one run."""
    return Verdict([*_pattern([run]), *_numbers(run.rows), *_cost([run])], list(_warnings(run)))


def _numbers(rows: Sequence[Row]) -> Iterator[Finding]:
    """The headline quantities of base, pruned and merged, as far as they are measured."""
    chain = [row for label in IN_ORDER for row in rows if row.checkpoint == label]
    for quantity in headlines(chain)[:SHOWN]:
        measured = [row for row in chain if quantity in row.values]
        texts = [written(quantity, row.values[quantity].number) for row in measured]
        share = measured[-1].recovered.get(quantity)
        detail = " -> ".join(row.checkpoint for row in measured)
        detail += f"; {_recovered(share)}" if share is not None else ""
        yield Finding(_title(quantity), " -> ".join(texts), detail, None if share is None else share > 0)


def _title(quantity: Quantity) -> str:
    if quantity.metric.is_of_task:
        return f"Accuracy {quantity.label}" if quantity.metric.kind == Kind.ACCURACY else quantity.label
    return f"{quantity.metric.unit.capitalize()} {quantity.scope}"


def _recovered(share: float) -> str:
    return f"{share:.1%} of the gap recovered" if share > 0 else "nothing of the gap recovered"


def _pattern(runs: Sequence[RunStudy]) -> Iterator[Finding]:
    """In how many matrices the zeros are exactly where pruning put them."""
    total = kept = filled = 0
    patterns: dict[str, None] = {}
    merged = [run for run in runs if "merge" in run.stages]
    for run in merged or runs:
        if "prune" in run.stages:
            pruned: PruneRecord = run.stages["prune"].metrics
            matrices, pattern = pruned.matrices, pruned.pattern
        elif merged:
            rows = [row for row in run.rows if row.checkpoint == "merged"]
            matrices, pattern = run.stages["merge"].metrics.matrices, "".join(pattern_text(r.sparsity) for r in rows)
        else:
            continue
        patterns[pattern or "the pattern"] = None
        total, kept = total + matrices, kept + matrices
        if merged:
            record: MergeRecord = run.stages["merge"].metrics
            kept -= sum(1 for matrix in record.records if matrix.filled or matrix.lost)
            filled += record.filled_zeros
    if not total:
        return
    name = " and ".join(patterns)
    if not merged:
        yield Finding("Pattern", f"{name} in {total:,} matrices", "pruned, not merged yet")
        return
    detail = f"{filled:,} zeros were filled" if filled else "checked in the merged weights"
    yield Finding("Pattern", f"{name} kept exactly in {kept:,} of {total:,} matrices", detail, kept == total)


def _cost(runs: Sequence[RunStudy]) -> Iterator[Finding]:
    """Time by stage, and the most memory that one needed."""
    seconds: dict[str, float] = {}
    for name, own in (item for run in runs for item in run.seconds.items()):
        stage = name.partition(" ")[0]  # evaluations together
        seconds[stage] = seconds.get(stage, 0.0) + own
    if not seconds:
        return
    peaks = [
        (size, kind, stage)
        for run in runs
        for stage, record in run.stages.items()
        for kind, size in record.peak_memory_mb.items()
    ]
    value = duration(sum(seconds.values()))
    detail = ", ".join(f"{stage} {duration(own)}" for stage, own in seconds.items()) if len(seconds) > 1 else ""
    for kind in dict.fromkeys(kind for _, kind, _ in peaks):
        size, _, stage = max(peak for peak in peaks if peak[1] == kind)
        value += f", {provenance.gigabytes(size):.1f} GB" + (" on the GPU" if kind == "cuda" else "")
        detail += f"; most memory: {stage}" if kind == "process" else f"; on the GPU: {stage}"
    yield Finding("Time and memory", value, detail.removeprefix("; "))


def duration(seconds: float) -> str:
    """A time in two units at most."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


# --- warnings ---------------------------------------------------------------------------------------------------------


def _warnings(run: RunStudy) -> Iterator[str]:
    if "merge" in run.stages and not run.stages["merge"].metrics.pattern_unchanged:
        yield "merging changed the pattern: the merged weights are less sparse than the pruned ones"
    yield from provenance.unmoved(run)
    if "train" in run.stages and run.stages["train"].settings.get("train", {}).get("keep_best") == "perplexity":
        (name,) = run.stages["train"].settings["eval"]["perplexity"]
        yield f"the adapter was chosen by its perplexity on {name} (train.keep_best), which is a little too good"
    if "prune" in run.stages and (count := run.stages["prune"].metrics.fallbacks):
        yield f"{count:,} matrices of experts received too few tokens, and were pruned by their weights alone"
    yield from _small_texts([text for content in run.checkpoints.values() for text in content.texts])
    yield from _small_tasks([task for content in run.checkpoints.values() for task in content.tasks])
    pruned = next((row.values for row in run.rows if row.checkpoint == "pruned"), {})
    for row in run.rows:
        missing = [value.quantity.label for value in row.values.values() if value.number is None]
        if missing:
            yield f"{row.checkpoint}: {_listed(missing)}: not a finite number"
        worse = [quantity.label for quantity in headlines([row]) if _is_worse(row, quantity, pruned)]
        if worse:
            yield f"{row.checkpoint} is worse than pruned on {_listed(worse)}"
    yield from _perhaps_chance(run)
    if run.left_out:
        yield f"read the notes below on records that are left out or come from elsewhere ({len(run.left_out)})"


def _is_worse(row: Row, quantity: Quantity, pruned: Mapping[Quantity, Value]) -> bool:
    """Whether a trained checkpoint is worse than the pruned one, even where pruning did no harm and there is no gap."""
    if row.checkpoint not in MADE_BY["train"] or quantity not in pruned:
        return False
    before, after, is_higher_better = pruned[quantity].number, row.values[quantity].number, _is_higher_better(quantity)
    if before is None or after is None or is_higher_better is None:
        return False
    return after < before if is_higher_better else after > before


def _is_higher_better(quantity: Quantity) -> bool | None:
    """The direction of a metric; None if it is unknown. Means of groups do not record that of their accuracies."""
    direction = quantity.metric.higher_is_better
    return True if direction is None and quantity.metric.is_share else direction


def _small_texts(texts: Sequence[TextResult]) -> Iterator[str]:
    by_windows: dict[int, dict[str, float]] = {}
    for text in texts:
        names = by_windows.setdefault(text.numbers.windows, {})
        name = text_quantity(text).scope
        error = text.numbers.stderr or 0.0
        names[name] = max(names.get(name, 0.0), error if math.isfinite(error) else 0.0)
    for windows, errors in sorted(by_windows.items()):
        if windows < FEW_WINDOWS:
            error = max(errors.values())
            size = f"; one standard error is up to {error:.0%} of a perplexity" if error else ""
            yield f"few windows ({windows}): {_listed(list(errors))}{size}"


def _small_tasks(tasks: Sequence[TaskResult]) -> Iterator[str]:
    by_limit: dict[str, list[str]] = {}
    for result in tasks:
        samples = [scores.samples for scores in result.numbers.tasks.values() if scores.samples is not None]
        if samples and min(samples) < FEW_SAMPLES:
            by_limit.setdefault(f"few samples ({min(samples)})", []).append(family_title([result]))
    for problem, names in by_limit.items():
        yield f"{problem}: {_listed(list(dict.fromkeys(names)))}"


def _perhaps_chance(run: RunStudy) -> Iterator[str]:
    """Means and texts on which pruned and merged do not differ beyond chance."""
    unclear = [
        entry.name
        for pair in run.comparisons
        if (pair.first, pair.second) == ("pruned", "merged")
        for entry in pair.entries
        if entry.paired is not None and (entry.is_mean or entry.measure != "acc")
        if entry.paired.low <= 0 <= entry.paired.high
    ]
    if unclear:
        yield f"pruned and merged may differ by chance (95 % interval) on {_listed(unclear)}"


def _listed(names: Sequence[str], most: int = 3) -> str:
    """Names, in which there may be commas."""
    return " and ".join([*names[:most], *([f"{len(names) - most} more"] if len(names) > most else [])])


# --- several runs -----------------------------------------------------------------------------------------------------


def of_study(study: Study) -> Verdict:
    """The verdict on several runs: the best of them by each headline quantity."""
    names = relative_paths(run.directory for run in study.runs)
    by_warning: dict[str, list[str]] = {}
    for run in study.runs:
        for warning in _warnings(run):
            by_warning.setdefault(warning, []).append(names[run.directory])
    warnings = [
        text if len(runs) == len(study.runs) else f"{_listed(runs)}: {text}" for text, runs in by_warning.items()
    ]
    return Verdict([*_pattern(study.runs), *_best(study.rows, names), *_cost(study.runs)], warnings)


def _best(rows: Iterable[Row], names: dict[str, str]) -> Iterator[Finding]:
    merged = [row for row in rows if row.checkpoint == "merged"]
    for quantity in headlines(merged)[:SHOWN]:
        numbers = [(row.values[quantity].number, row) for row in merged if quantity in row.values]
        known = [(number, row) for number, row in numbers if number is not None]
        is_higher_better = _is_higher_better(quantity)
        if len(known) < 2 or is_higher_better is None:
            continue
        known.sort(key=lambda pair: pair[0], reverse=is_higher_better)
        (best, row), (worst, _) = known[0], known[-1]
        share = row.recovered.get(quantity)
        detail = f"best of {len(known)} merged, the worst {written(quantity, worst)}"
        detail += f"; {_recovered(share)}" if share is not None else ""
        yield Finding(_title(quantity), f"{written(quantity, best)} ({names[row.run]})", detail)
