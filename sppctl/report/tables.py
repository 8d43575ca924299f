"""Rows and comparisons -> tables, whose columns tell renderers how to show them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from sppctl.evaluate.values import Kind, Quantity
from sppctl.records import LayerRecord
from sppctl.report import plots
from sppctl.report.significance import Comparison, Entry
from sppctl.report.study import SEED, OverSeeds, Row, headlines, pattern_text, quantities, relative_paths, short_names

COLUMN_NOTE = (
    "ppl: perplexity; KL: divergence from the dense model, in nats per token; top-1: share of tokens for which both "
    "models predict the same one; mean: over the tasks of the group."
)
NOTHING = "-"


@dataclass(frozen=True)
class Column:
    """A column and its head."""

    name: str  # below the group, if any
    group: str = ""  # the upper head, shared with its neighbours
    title: str = ""  # the complete head in one line, if not the name
    kind: str = "number"  # right-aligned; text and code are left-aligned
    is_setting: bool = False  # of how the row was made, which a narrow page shows below its head

    @property
    def head(self) -> str:
        """The complete head in one line."""
        return self.title or self.name

    @property
    def is_text(self) -> bool:
        """Whether it is aligned to the left."""
        return self.kind != "number"


@dataclass(frozen=True)
class Table:
    """Cells by row."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]  # text; in a table for programs any value
    title: str = ""  # if it needs one besides the section's
    parts: frozenset[int] = frozenset()  # rows that belong to the mean above them
    breaks: frozenset[int] = frozenset()  # rows that begin another run
    is_wide: bool = False  # heads are on several lines, below those that neighbours share
    # for each row the head that it shares with its neighbours, and a short one below it, for renderers that have room
    # for both in place of the first ``num_heads`` columns
    heads: Sequence[tuple[str, str]] = ()
    num_heads: int = 1

    @property
    def spans(self) -> list[tuple[str, int]]:
        """The upper heads and how many columns share each; empty if there are none."""
        groups = [column.group for column in self.columns]
        return [(name, len(list(columns))) for name, columns in groupby(groups)] if any(groups) else []


def columns_of(*heads: str) -> list[Column]:
    """Columns of numbers; of text where the head begins with ``<``, of code where it begins with a backquote."""
    kinds = {"<": "text", "`": "code"}
    return [Column(head.lstrip("<`"), kind=kinds.get(head[0], "number")) for head in heads]


# --- one run ----------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> Table:
    """One row per quantity, one column per checkpoint."""
    lines = [
        ["sparsity of pruned matrices", *(_sparsity(row) for row in rows)],
        ["pattern", *(pattern_text(row.sparsity) for row in rows)],
        ["sparse matrices", *(str(row.sparsity["sparse_matrices"]) for row in rows)],
        ["size, MB", *(f"{row.sparsity['bytes'] / 1e6:.1f}" for row in rows)],
    ]
    heads = [("", str(line[0])) for line in lines]
    measured = by_scope(rows)
    parts = frozenset(at for at, quantity in enumerate(measured, len(lines)) if quantity.part is not None)
    lines += [[quantity.label, *(_value(row, quantity, with_norm=True) for row in rows)] for quantity in measured]
    heads += map(_row_head, measured)
    columns = [Column("", kind="text"), *(Column(row.checkpoint) for row in rows)]
    return Table(columns, lines, parts=parts, heads=heads)


def by_scope(rows: Iterable[Row]) -> list[Quantity]:
    """The quantities of rows; those of a text or a group together."""
    measured = quantities(rows)
    scopes = list(dict.fromkeys(quantity.scope for quantity in measured))
    return sorted(measured, key=lambda quantity: scopes.index(quantity.scope))


def _row_head(quantity: Quantity) -> tuple[str, str]:
    return quantity.scope, quantity.name if quantity.metric.is_of_task else quantity.metric.title


def comparison_table(rows: Sequence[Row]) -> Table:
    """How far every checkpoint is from the dense one, and the share of the gap that it recovers."""
    columns: list[tuple[str, Row, Callable[[Row, Quantity], str]]] = []
    for row in rows:
        columns += [(f"{row.checkpoint} - base", row, _difference)] if row.difference or row.recovered else []
        columns += [("gap recovered", row, _recovered)] if row.recovered else []
    lines, heads = [], []
    for quantity in by_scope(row for _, row, _ in columns):
        cells = [write(row, quantity) for _, row, write in columns]
        if set(cells) != {NOTHING}:
            lines.append([quantity.label, *cells])
            heads.append(_row_head(quantity))
    return Table([*columns_of("<measure"), *(Column(head) for head, _, _ in columns)], lines, heads=heads)


def note_on_differences(rows: Iterable[Row]) -> str:
    """Explains the numbers of :func:`comparison_table` and :func:`gaps`."""
    text = "Differences of accuracies are percentage points"
    if any(row.recovered for row in rows):
        text += (
            "; gap recovered = (x - pruned) / (base - pruned), where x is the checkpoint's value; of perplexities the "
        )
        text += "logarithms are compared"
    return text + "."


def type_table(layers: list[LayerRecord]) -> Table:
    """Pruned layers by module type; the experts of all blocks are one type."""
    key = plots.error_measure(layers)
    error = key.replace("_", " ")
    damped = any(layer.damp is not None for layer in layers)
    columns = columns_of("`module type", "matrices", "mean sparsity", f"mean {error}", "worst", "`worst layer")
    columns += columns_of(*["damping"] * damped, "seconds")
    lines = []
    for name, points in plots.by_type(layers).items():
        members = [layer for block in points.values() for layer in block]
        worst = max(members, key=lambda layer: float(getattr(layer, key)))
        sparsity, mean = (sum(getattr(layer, name) for layer in members) / len(members) for name in ("sparsity", key))
        cells = [name, str(len(members)), f"{sparsity:.2%}", f"{mean:.3f}", f"{getattr(worst, key):.3f}", worst.name]
        damps = sorted(layer.damp for layer in members if layer.damp is not None)
        ends = dict.fromkeys(f"{damp:g}" for damp in damps[:1] + damps[-1:])
        cells += [" to ".join(ends) or NOTHING] if damped else []
        lines.append([*cells, f"{sum(layer.seconds for layer in members):.1f}"])
    return Table(columns, lines)


def significance_table(comparisons: Iterable[Comparison]) -> Table:
    """Differences on the same samples, with intervals; losses are in nats per token."""
    columns = columns_of("<comparison", "<measure", "samples", "first", "second", "difference", "<95 % interval", "p")
    lines = []
    for entry, names in _named(comparisons):
        paired, is_share = entry.paired, entry.measure == "acc"
        if paired is not None:
            means = [f"{mean:.2%}" if is_share else f"{mean:.4f}" for mean in (entry.first, entry.second)]
            changes = (paired.difference, paired.low, paired.high)
            difference, low, high = (f"{100 * x:+.2f}" if is_share else f"{x:+.4f}" for x in changes)
            p = f"{paired.p:.4f}" if paired.p >= 0.001 else f"{paired.p:.1e}"
            name = f"{entry.name} {'acc' if is_share else 'loss, nats'}"
            lines.append([names, name, str(entry.samples), *means, difference, f"{low} to {high}", p])
    return Table(columns, lines, heads=[(line[0], line[1]) for line in lines], num_heads=2)


def flip_table(comparisons: Iterable[Comparison]) -> Table:
    """How many answers differ between two checkpoints, by whether they are correct."""
    columns = columns_of("<comparison", "<measure", "answers", "flipped")
    columns += columns_of("correct to wrong", "wrong to correct", "wrong to wrong")
    lines = []
    for entry, names in _named(comparisons):
        flips = entry.flips
        if flips is not None and flips.answers:
            share = f"{flips.flipped} ({flips.flipped / flips.answers:.2%})"
            kinds = (flips.correct_to_wrong, flips.wrong_to_correct, flips.wrong_to_wrong)
            lines.append([names, entry.name, str(flips.answers), share, *map(str, kinds)])
    return Table(columns, lines, heads=[(line[0], line[1]) for line in lines], num_heads=2)


def _named(comparisons: Iterable[Comparison]) -> Iterator[tuple[Entry, str]]:
    return ((entry, f"{pair.first} to {pair.second}") for pair in comparisons for entry in pair.entries)


# --- several runs -----------------------------------------------------------------------------------------------------

Part = tuple[list[Column], list[list[str]]]  # columns of a table, and their cells by row


def over_runs(rows: Sequence[Row], *parts: Callable[[Sequence[Row]], Part]) -> Table:
    """A table as in papers: a row per checkpoint, with its settings and then parts such as :func:`values`."""
    names = relative_paths(row.run for row in rows)
    columns = columns_of("<run") if len(names) > 1 else []
    lines = [[names[row.run]] if len(names) > 1 else [] for row in rows]
    for part in (_settings, *parts):
        part_columns, part_rows = part(rows)
        columns += part_columns
        lines = [[*line, *cells] for line, cells in zip(lines, part_rows, strict=True)]
    breaks = frozenset(index for index in range(1, len(rows)) if rows[index].run != rows[index - 1].run)
    heads = [(names[row.run] if len(names) > 1 else "", row.checkpoint) for row in rows]
    return Table(columns, lines, breaks=breaks, is_wide=True, heads=heads, num_heads=1 + (len(names) > 1))


def values(rows: Sequence[Row]) -> Part:
    """Sparsity, and a column per quantity."""
    measured = by_scope(rows)
    cells = [[_sparsity(row), *(_value(row, quantity) for quantity in measured)] for row in rows]
    return [Column("sparsity"), *map(_column, measured)], cells


def gaps(rows: Sequence[Row]) -> Part:
    """The headline quantities: their difference from the dense model, and the share of the gap recovered."""
    columns: list[Column] = []
    cells: list[list[str]] = [[] for _ in rows]
    for group, title, write in (
        ("difference to base", "{} - base", _difference),
        ("gap recovered", "gap recovered, {}", _recovered),
    ):
        for quantity in headlines(rows):
            column = [write(row, quantity) for row in rows]
            if set(column) != {NOTHING}:
                columns.append(Column(quantity.label, group, title.format(quantity.label)))
                cells = [[*line, cell] for line, cell in zip(cells, column, strict=True)]
    return columns, cells


def seed_table(groups: Sequence[OverSeeds]) -> Table:
    """Mean and standard deviation over rows that differ only in the seed."""
    rows = [group.row for group in groups]
    measured = [quantity for quantity in quantities(rows) if any(quantity in group.numbers for group in groups)]
    columns, lines = _settings(rows)
    for group, line in zip(groups, lines, strict=True):
        line.append(str(group.seeds))
        for quantity in measured:
            numbers = group.numbers.get(quantity, ())  # the deviation with as many decimals as the mean
            line.append(" ± ".join(format(number, _format(quantity, numbers[0])) for number in numbers) or NOTHING)
    return Table([*columns, Column("seeds"), *map(_column, measured)], lines, is_wide=True)


def _settings(rows: Sequence[Row]) -> Part:
    """The methods by which checkpoints were made, and the settings in which they differ."""
    text_keys = {key for row in rows for key, value in row.settings.items() if isinstance(value, str)}
    keys = short_names(rows)
    columns = columns_of("<checkpoint", "<method", "<pattern", "<training")
    columns += [Column(name, kind="text" if key in text_keys else "number") for key, name in keys.items()]
    columns[1:] = [replace(column, is_setting=True) for column in columns[1:]]
    lines = []
    for row in rows:
        methods = [row.checkpoint, row.method or NOTHING, row.pattern or NOTHING, row.training or NOTHING]
        lines.append([*methods, *(str(row.settings.get(key, NOTHING)) for key in keys)])
    return columns, lines


def _column(quantity: Quantity) -> Column:
    return Column(quantity.name, quantity.scope, quantity.label)


# --- cells ------------------------------------------------------------------------------------------------------------


def _value(row: Row, quantity: Quantity, with_norm: bool = False) -> str:
    value = row.values.get(quantity)
    if value is None or value.number is None:
        return NOTHING
    norm = f" (norm {value.norm:.2%})" if with_norm and value.norm is not None else ""
    return written(quantity, value.number) + norm


def written(quantity: Quantity, number: float | None) -> str:
    """A number as tables show it."""
    return NOTHING if number is None else format(number, _format(quantity, number))


def _format(quantity: Quantity, number: float) -> str:
    metric = quantity.metric
    if metric.is_share:
        return ".2%"
    if metric.kind == Kind.PERPLEXITY:
        return ".2f" if number < 1e5 else ".3g"
    # correlations and bits per byte differ in the third decimal
    has_few_digits = metric.kind == Kind.OTHER and (abs(number) >= 10 or metric.name.endswith("perplexity"))
    return ".2f" if has_few_digits else ".4f"


def _difference(row: Row, quantity: Quantity) -> str:
    if quantity not in row.difference:
        return NOTHING
    difference, number = row.difference[quantity], row.values[quantity].number
    if quantity.metric.kind != Kind.OTHER or number is None:
        return f"{difference * (100 if quantity.metric.is_share else 1):+.2f}"
    return format(difference, f"+{_format(quantity, number)}")


def _recovered(row: Row, quantity: Quantity) -> str:
    return f"{row.recovered[quantity]:.1%}" if quantity in row.recovered else NOTHING


def _sparsity(row: Row) -> str:
    share = row.sparsity["sparsity"]
    return f"{share:.2%}" if share else "dense"


# --- for programs -----------------------------------------------------------------------------------------------------


def long_table(rows: Sequence[Row]) -> Table:
    """One row per checkpoint and quantity, unrounded; checkpoints without numbers have one row.

    Columns for the settings in which runs differ follow the fixed ones.
    """
    keys = [key for key in short_names(rows) if key != SEED]
    about = ("run", "checkpoint", "method", "pattern", "training", "seed", "sparsity", "bytes", "fingerprint")
    numbers = ("measure", "kind", "value", "stderr", "acc_norm", "difference_to_base", "gap_recovered")
    lines: list[list[Any]] = []
    for row in rows:
        fields = vars(row) | row.sparsity  # "sparsity" becomes the number
        identity, settings = [fields[key] for key in about], [row.settings.get(key) for key in keys]
        for quantity, value in row.values.items():
            cells = [quantity.label, quantity.metric.kind.value, value.number, value.stderr, value.norm]
            changes = [row.difference.get(quantity), row.recovered.get(quantity)]
            lines.append([*identity, *cells, *changes, *settings])
        if not row.values:
            lines.append([*identity, *[None] * len(numbers), *settings])
    return Table([Column(head) for head in (*about, *numbers, *keys)], lines)
