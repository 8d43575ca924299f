"""Rows and comparisons -> tables whose columns say what they hold, so that no renderer guesses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sppctl.evaluate.values import Kind, Quantity, is_part
from sppctl.records import LayerRecord
from sppctl.report import plots
from sppctl.report.significance import Comparison, Entry
from sppctl.report.study import SEED, OverSeeds, Row, headlines, pattern_text, places, quantities, short_names

GAP_FORMULA = (
    "gap recovered = (x - pruned) / (base - pruned), where x is the checkpoint's value; of perplexities the logarithms "
    "are compared"
)
HEADS_MEAN = (
    "ppl: perplexity; KL: divergence from the dense model, in nats per token; top-1: share of tokens that both models "
    "find likeliest; mean: over the tasks beside it."
)
NOTHING = "-"


@dataclass(frozen=True)
class Column:
    """A column and its head."""

    name: str  # below the group, where there is one
    group: str = ""  # what it shares with its neighbours
    title: str = ""  # the whole head in one line, if not the name
    kind: str = "number"  # to the right; text or code: to the left

    @property
    def head(self) -> str:
        """In one line."""
        return self.title or self.name

    @property
    def is_text(self) -> bool:
        """Whether it is aligned to the left."""
        return self.kind != "number"


@dataclass(frozen=True)
class Table:
    """Cells by row."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]  # of text; in a table for programs any value
    title: str = ""  # where the section's title does not say enough
    parts: frozenset[int] = frozenset()  # rows that belong to the mean above them
    breaks: frozenset[int] = frozenset()  # rows that begin another run
    is_wide: bool = False  # heads are broken into lines, below those that neighbours share


def text_columns(*names: str) -> list[Column]:
    """Columns of text."""
    return [Column(name, kind="text") for name in names]


def number_columns(*names: str) -> list[Column]:
    """Columns of numbers."""
    return [Column(name) for name in names]


# --- one run ----------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> Table:
    """One row per quantity, one column per checkpoint."""
    lines = [
        ["sparsity of pruned matrices", *(_sparsity(row) for row in rows)],
        ["pattern", *(pattern_text(row.sparsity) for row in rows)],
        ["sparse matrices", *(str(row.sparsity["sparse_matrices"]) for row in rows)],
        ["size, MB", *(f"{row.sparsity['bytes'] / 1e6:.1f}" for row in rows)],
    ]
    measured = quantities(rows)
    parts = frozenset(at for at, quantity in enumerate(measured, len(lines)) if is_part(quantity))
    lines += [[quantity.label, *(cell(row, quantity, with_norm=True) for row in rows)] for quantity in measured]
    return Table([*text_columns(""), *number_columns(*(row.checkpoint for row in rows))], lines, parts=parts)


def comparison_table(rows: Sequence[Row]) -> Table:
    """How far every checkpoint is from the dense one, and the share of the gap that it recovers."""
    columns = text_columns("measure")
    writers: list[tuple[Row, Callable[[Row, Quantity], str]]] = []
    for row in (row for row in rows if row.difference or row.recovered):
        columns.append(Column(f"{row.checkpoint} - base"))
        writers.append((row, _difference))
        if row.recovered:
            columns.append(Column("gap recovered"))
            writers.append((row, _recovered))
    lines = []
    for quantity in quantities(row for row, _ in writers):
        cells = [write(row, quantity) for row, write in writers]
        if set(cells) != {NOTHING}:
            lines.append([quantity.label, *cells])
    return Table(columns, lines)


def type_table(layers: list[LayerRecord]) -> Table:
    """What pruning did, one row per module type, the experts of all blocks counted in one."""
    key = plots.error_measure(layers)
    error = key.replace("_", " ")
    damped = any(layer.damp is not None for layer in layers)
    columns = [Column("module type", kind="code")]
    columns += number_columns("matrices", "mean sparsity", f"mean {error}", "worst")
    columns += [Column("worst layer", kind="code"), *number_columns(*["damping"] * damped, "seconds")]
    lines = []
    for name, points in plots.by_type(layers).items():
        own = [layer for block in points.values() for layer in block]
        worst = max(own, key=lambda layer: float(getattr(layer, key)))
        sparsity, mean = (sum(getattr(layer, what) for layer in own) / len(own) for what in ("sparsity", key))
        cells = [name, str(len(own)), f"{sparsity:.2%}", f"{mean:.3f}", f"{getattr(worst, key):.3f}", worst.name]
        cells += [_range([layer.damp for layer in own if layer.damp is not None])] if damped else []
        lines.append([*cells, f"{sum(layer.seconds for layer in own):.1f}"])
    return Table(columns, lines)


def _range(values: list[float]) -> str:
    if not values:
        return NOTHING
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def significance_table(comparisons: Iterable[Comparison]) -> Table:
    """Differences on the same samples with their intervals; of losses in nats per token."""
    columns = text_columns("comparison", "measure") + number_columns("samples", "first", "second", "difference")
    columns += [*text_columns("95 % interval"), *number_columns("p")]
    lines = []
    for pair in comparisons:
        for entry in pair.entries:
            if entry.paired is not None:
                lines.append([f"{pair.first} to {pair.second}", *_compared(entry)])
    return Table(columns, lines)


def _compared(entry: Entry) -> list[str]:
    paired = entry.paired
    assert paired is not None
    is_share = entry.measure == "acc"
    means = [f"{mean:.2%}" if is_share else f"{mean:.4f}" for mean in (entry.first, entry.second)]
    changes = [paired.difference, paired.low, paired.high]
    difference, low, high = (f"{100 * change:+.2f}" if is_share else f"{change:+.4f}" for change in changes)
    p = f"{paired.p:.4f}" if paired.p >= 0.001 else f"{paired.p:.1e}"
    name = f"{entry.name} {'acc' if is_share else 'loss, nats'}"
    return [name, str(entry.samples), *means, difference, f"{low} to {high}", p]


def flip_table(comparisons: Iterable[Comparison]) -> Table:
    """Answers that differ between two checkpoints, and what became of them."""
    columns = text_columns("comparison", "measure") + number_columns("answers", "flipped")
    columns += number_columns("correct to wrong", "wrong to correct", "wrong to wrong")
    lines = []
    for pair in comparisons:
        for entry in pair.entries:
            flips = entry.flips
            if flips is not None and flips.answers:
                kinds = (flips.correct_to_wrong, flips.wrong_to_correct, flips.wrong_to_wrong)
                counts = [str(flips.answers), f"{flips.flipped} ({flips.share:.2%})", *map(str, kinds)]
                lines.append([f"{pair.first} to {pair.second}", entry.name, *counts])
    return Table(columns, lines)


def note_on_differences(rows: Iterable[Row]) -> str:
    """What the numbers of :func:`comparison_table` and :func:`gap_table` are."""
    text = "Differences of accuracies are percentage points"
    return f"{text}; {GAP_FORMULA}." if any(row.recovered for row in rows) else f"{text}."


# --- several runs -----------------------------------------------------------------------------------------------------


def value_table(rows: Sequence[Row]) -> Table:
    """The paper's shape: a row per checkpoint, a column per quantity."""
    measured = quantities(rows)
    scopes = list(dict.fromkeys(quantity.scope for quantity in measured))
    measured.sort(key=lambda quantity: scopes.index(quantity.scope))  # columns of a text or a group are neighbours
    heads = [_column(quantity) for quantity in measured]
    cells = [[_sparsity(row), *(cell(row, quantity) for quantity in measured)] for row in rows]
    return _beside_identities(rows, [Column("sparsity"), *heads], cells)


def gap_table(rows: Sequence[Row]) -> Table:
    """The same rows: what is quoted as difference to the dense model and as share of the gap recovered."""
    columns: list[Column] = []
    cells: list[list[str]] = [[] for _ in rows]
    quoted = headlines(rows)
    for group, title, write in (
        ("difference to base", "{} - base", _difference),
        ("gap recovered", "gap recovered, {}", _recovered),
    ):
        shown = [quantity for quantity in quoted if any(write(row, quantity) != NOTHING for row in rows)]
        columns += [Column(quantity.label, group, title.format(quantity.label)) for quantity in shown]
        for line, row in zip(cells, rows, strict=True):
            line += [write(row, quantity) for quantity in shown]
    return _beside_identities(rows, columns, cells)


def wide_table(rows: Sequence[Row]) -> Table:
    """Both in one."""
    values, gaps = value_table(rows), gap_table(rows)
    own = len(_identities(rows)[0])
    lines = [[*line, *other[own:]] for line, other in zip(values.rows, gaps.rows, strict=True)]
    return Table([*values.columns, *gaps.columns[own:]], lines, breaks=values.breaks, is_wide=True)


def seed_table(groups: Sequence[OverSeeds]) -> Table:
    """Mean and standard deviation of what differs in nothing but the seed."""
    rows = [group.row for group in groups]
    keys = short_names(rows)
    measured = [quantity for quantity in quantities(rows) if any(group.numbers.get(quantity) for group in groups)]
    columns = [*text_columns(*MADE), *_setting_columns(rows, keys), Column("seeds")]
    columns += [_column(quantity) for quantity in measured]
    lines = []
    for group in groups:
        cells = [*_made(group.row), *(_setting(group.row, key) for key in keys), str(group.seeds)]
        for quantity in measured:
            numbers = [_written(quantity.metric.kind, number) for number in group.spread(quantity) or ()]
            cells.append(" ± ".join(numbers) or NOTHING)
        lines.append(cells)
    return Table(columns, lines, is_wide=True)


MADE = ("checkpoint", "method", "pattern", "training")


def _column(quantity: Quantity) -> Column:
    return Column(quantity.name, quantity.scope, quantity.label)


def _beside_identities(rows: Sequence[Row], columns: list[Column], cells: list[list[str]]) -> Table:
    own, lines = _identities(rows)
    breaks = frozenset(at for at in range(1, len(rows)) if rows[at].run != rows[at - 1].run)
    lines = [[*line, *more] for line, more in zip(lines, cells, strict=True)]
    return Table([*own, *columns], lines, breaks=breaks, is_wide=True)


def _identities(rows: Sequence[Row]) -> tuple[list[Column], list[list[str]]]:
    named, keys = places(row.run for row in rows), short_names(rows)
    several = len(named) > 1
    columns = [*text_columns(*["run"] * several, *MADE), *_setting_columns(rows, keys)]
    lines = []
    for row in rows:
        lines.append([*[named[row.run]] * several, *_made(row), *(_setting(row, key) for key in keys)])
    return columns, lines


def _setting_columns(rows: Sequence[Row], keys: dict[str, str]) -> list[Column]:
    texts = {key for row in rows for key, value in row.settings.items() if isinstance(value, str)}
    return [Column(name, kind="text" if key in texts else "number") for key, name in keys.items()]


def _made(row: Row) -> list[str]:
    return [row.checkpoint, row.method or NOTHING, row.pattern or NOTHING, row.training or NOTHING]


def _setting(row: Row, key: str) -> str:
    return str(row.settings[key]) if key in row.settings else NOTHING


def cell(row: Row, quantity: Quantity, with_norm: bool = False) -> str:
    """One number of a checkpoint as text."""
    value = row.values.get(quantity)
    if value is None or value.number is None:
        return NOTHING
    norm = f" (norm {value.norm:.2%})" if with_norm and value.norm is not None else ""
    return _written(quantity.metric.kind, value.number) + norm


def _written(kind: Kind, number: float) -> str:
    if kind == Kind.PERPLEXITY:
        return f"{number:.2f}" if number < 1e5 else f"{number:.3g}"
    if kind == Kind.DIVERGENCE:
        return f"{number:.4f}"
    return f"{number:.2f}" if kind == Kind.OTHER else f"{number:.2%}"


def _difference(row: Row, quantity: Quantity) -> str:
    if quantity not in row.difference:
        return NOTHING
    return f"{row.difference[quantity] * (100 if quantity.metric.is_share else 1):+.2f}"


def _recovered(row: Row, quantity: Quantity) -> str:
    return f"{row.recovered[quantity]:.1%}" if quantity in row.recovered else NOTHING


def _sparsity(row: Row) -> str:
    share = row.sparsity["sparsity"]
    return f"{share:.2%}" if share else "dense"


# --- for programs -----------------------------------------------------------------------------------------------------


def long_table(rows: Sequence[Row]) -> Table:
    """One row per checkpoint and quantity, unrounded; a checkpoint without numbers has one row.

    Columns for the settings in which runs differ follow the fixed ones.
    """
    keys = [key for key in short_names(rows) if key != SEED]
    about = ("run", "checkpoint", "method", "pattern", "training", "seed", "sparsity", "bytes", "fingerprint")
    numbers = ("measure", "kind", "value", "stderr", "acc_norm", "difference_to_base", "gap_recovered")
    lines: list[list[Any]] = []
    for row in rows:
        own = [row.run, row.checkpoint, row.method, row.pattern, row.training, row.seed, row.sparsity["sparsity"]]
        own += [row.sparsity["bytes"], row.fingerprint]
        settings = [row.settings.get(key) for key in keys]
        for one, value in row.values.items():
            named = [one.label, one.metric.kind.value, value.number, value.stderr, value.norm]
            lines.append([*own, *named, row.difference.get(one), row.recovered.get(one), *settings])
        if not row.values:
            lines.append([*own, *[None] * len(numbers), *settings])
    return Table(text_columns(*about, *numbers, *keys), lines)
