"""Collected runs -> figures of results, losses and costs, in the style of ``plots``.

Each is small, so that a telephone shows it in full and a wide screen several side by side. What would show nothing,
such as equal bars, is not drawn. Nothing is distinguished by colour alone, so that figures can be read in grey: bars
have a number, a name and a hatch, lines a marker and a dash. matplotlib is imported only when something is drawn.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, groupby
from typing import TYPE_CHECKING, Any

from sppctl.evaluate.values import Kind, Quantity
from sppctl.records import TrainRecord
from sppctl.report.plots import COLOURS, NARROW, Figure, panels, with_legend
from sppctl.report.study import Row, RunStudy, quantities, short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

# fill, hatch and marker of a checkpoint; the fills differ in lightness, for grey prints
LOOKS = {
    "base": ("#ffffff", "", "s"),
    "pruned": ("#E69F00", "///", "v"),
    "adapter": ("#56B4E9", "...", "D"),
    "merged": ("#0072B2", "", "o"),
}
FURTHER = (("#CC79A7", "xxx"), ("#009E73", "---"), ("#D55E00", "\\\\\\"))
FURTHER_MARKS = "^P*X<>phd8"  # ten marks and three fills: thirty combinations
GREY = ("#999999", "", "")
LOG_FROM = 15  # largest / smallest perplexity; beyond it the short bars of a linear axis would vanish
CURVES = {"training": "loss", "validation": "eval_loss", "perplexity": "perplexity"}  # and their keys in the history
CHARACTER = 0.078  # inches of an average letter
BESIDE = 14  # characters; longer names are above their bars
# the kinds that are drawn as bars, and what their captions say
BARS = {
    Kind.PERPLEXITY: "Perplexity, lower is better",
    Kind.DIVERGENCE: "KL divergence from the dense model, lower is better",
    Kind.AGREEMENT: "Tokens for which the dense model predicts the same, higher is better",
}
UNITS = {Kind.AGREEMENT: "% of tokens"}

Look = tuple[str, str, str]
Point = tuple[Row, float, float]  # with a number and its standard error


def result_figures(rows: Sequence[Row]) -> Iterator[Figure]:
    """What was measured: bars of perplexities, divergences and agreements, and dots of the accuracies of one run."""
    for kind, caption in BARS.items():
        if panels_of_kind := bar_panels(rows, kind):
            errors = any(error for panel in panels_of_kind for _, _, error in panel.points)
            whiskers = "; whiskers: one standard error over windows" if errors else ""
            numbers = "; ".join(f"{panel.title}: {panel.numbers}" for panel in panels_of_kind)
            yield Figure(caption + whiskers, numbers, partial(bars, rows, kind))
    if len({row.run for row in rows}) == 1:
        for scope, measured in dot_groups(rows).items():
            yield _dot_figure(rows, scope, measured)


# --- perplexity, divergence and agreement -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """The bars of one quantity."""

    quantity: Quantity
    points: list[Point]
    names: list[str]  # of the bars
    texts: list[str]  # their numbers

    @property
    def title(self) -> str:
        """The text."""
        return self.quantity.scope

    @property
    def numbers(self) -> str:
        """For those who cannot see the bars."""
        return ", ".join(f"{name} {text}" for name, text in zip(self.names, self.texts, strict=True))


def bar_panels(rows: Sequence[Row], kind: Kind) -> list[Panel]:
    """The quantities of a kind that differ between checkpoints."""
    found = []
    for quantity in (quantity for quantity in quantities(rows) if quantity.metric.kind == kind):
        points = _points(rows, quantity)
        texts = _bar_texts(kind, [value for _, value, _ in points])
        if len(set(texts)) > 1:
            found.append(Panel(quantity, points, _row_names([row for row, _, _ in points]), texts))
    return found


def _points(rows: Sequence[Row], quantity: Quantity) -> list[Point]:
    """The rows with a finite number, that number, and its standard error; of shares in percent."""
    points = []
    for row in rows:
        value = row.values.get(quantity)
        if value is not None and value.number is not None and math.isfinite(value.number):
            # the error is that of the mean loss; to first order that of the perplexity is the product of both
            scale = value.number if quantity.metric.kind == Kind.PERPLEXITY else 1.0
            unit = 100.0 if quantity.metric.is_share else 1.0
            points.append((row, value.number * unit, (value.stderr or 0.0) * scale * unit))
    return points


def _bar_texts(kind: Kind, values: Sequence[float]) -> list[str]:
    """The same decimals for all; for divergences enough to show two digits of the smallest."""
    digits = 2
    if kind == Kind.DIVERGENCE:
        smallest = min((value for value in values if value > 0), default=1.0)
        digits = min(6, max(2, 1 - math.floor(math.log10(smallest))))
    return [f"{value:.{digits}f}" if value < 1e5 else f"{value:.3g}" for value in values]


def bars(rows: Sequence[Row], kind: Kind) -> Drawing:
    """A panel per text, a bar per checkpoint; the whisker is one standard error."""
    drawn = bar_panels(rows, kind)
    titles = [textwrap.fill(panel.title, int(NARROW / CHARACTER) - 4) for panel in drawn]
    heights = [
        (0.24 if _are_short(panel.names) else 0.42) * len(panel.points) + 0.75 + 0.15 * title.count("\n")
        for panel, title in zip(drawn, titles, strict=True)
    ]
    figure, grid = panels(sum(heights), len(drawn), height_ratios=heights)
    looks = _looks(rows)
    for axes, panel, title in zip(grid[:, 0], drawn, titles, strict=True):
        _bar_panel(axes, panel, [looks[row.checkpoint] for row, _, _ in panel.points])
        axes.set_title(title, loc="left", fontsize=9, fontweight="bold")
    return figure


def _are_short(names: Sequence[str]) -> bool:
    return max(map(len, names)) <= BESIDE


def _bar_panel(axes: Axes, panel: Panel, looks: list[Look]) -> None:
    values, errors = [value for _, value, _ in panel.points], [error for _, _, error in panel.points]
    _horizontal(axes, panel.names, values, looks, panel.texts, errors)
    metric = panel.quantity.metric
    is_logarithmic = metric.kind == Kind.PERPLEXITY and max(values) > LOG_FROM * min(values)
    if is_logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")  # matplotlib's default uses mathematical notation
        axes.xaxis.set_minor_formatter("")
        axes.set_xlim(min(values) / 2, max(values) * 3)
    else:
        axes.set_xlim(0, 1.25 * max(value + error for value, error in zip(values, errors, strict=True)) or 1)
    axes.set_xlabel(UNITS.get(metric.kind, metric.unit) + (", logarithmic axis" if is_logarithmic else ""))


def _horizontal(
    axes: Axes, names: Sequence[str], values: list[float], looks: list[Look], texts: list[str], errors: list[float]
) -> None:
    """Horizontal bars with their numbers at the end; no whisker where the error is 0. Long names are above the bars."""
    is_beside = _are_short(names)
    shapes = axes.barh(range(len(values)), values, height=0.66 if is_beside else 0.4, edgecolor="black", linewidth=0.8)
    for bar, (fill, hatch, _) in zip(shapes, looks, strict=True):
        bar.set(facecolor=fill, hatch=hatch)
    for position, (value, error, text) in enumerate(zip(values, errors, texts, strict=True)):
        if error:
            axes.errorbar(value, position, xerr=error, color="black", capsize=2.5, linewidth=1, fmt="none")
        axes.annotate(text, (value + error, position), (5, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(names)), names if is_beside else [""] * len(names))
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 0.4, -0.6 if is_beside else -0.9)  # from the top down, no empty space at the ends
    if not is_beside:
        for position, name in enumerate(names):
            at: dict[str, Any] = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
            axes.annotate(_cut(name), (0, position - 0.22), (1, 1), va="bottom", fontsize=8, **at)
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")


def _cut(name: str) -> str:
    """A name that fits the width of a figure; its middle is left out."""
    most = int(NARROW / CHARACTER)
    return name if len(name) <= most else f"{name[: most // 2 - 2]} ... {name[len(name) - most // 2 + 3 :]}"


def _looks(rows: Sequence[Row]) -> dict[str, Look]:
    other_labels = dict.fromkeys(row.checkpoint for row in rows if row.checkpoint not in LOOKS)
    further = zip(other_labels, cycle(FURTHER), cycle(FURTHER_MARKS), strict=False)
    return LOOKS | {label: (*fill_and_hatch, mark) for label, fill_and_hatch, mark in further}


def _row_names(rows: Sequence[Row]) -> list[str]:
    """The labels of checkpoints; where they repeat, with how each was made and if needed its run."""
    labels, keys, full_names = [row.checkpoint for row in rows], short_names(rows), []
    for row in rows:
        parts = [part for part in (row.checkpoint, row.method, row.pattern, row.training) if part]
        for key, value in row.settings.items():  # a number needs its key
            parts.append(f"{keys[key]} {value}" if isinstance(value, int | float) else str(value))
        full_names.append(" ".join(parts))
    names = []
    for row, name in zip(rows, full_names, strict=True):
        unique = name if full_names.count(name) == 1 else f"{name} ({row.run.rstrip('/').rpartition('/')[2]})"
        names.append(row.checkpoint if labels.count(row.checkpoint) == 1 else unique)
    return names


# --- tasks ------------------------------------------------------------------------------------------------------------


def dot_groups(rows: Sequence[Row]) -> dict[str, list[Quantity]]:
    """The accuracies that differ between checkpoints or tasks, by the group of their tasks."""
    accuracies = [quantity for quantity in quantities(rows) if quantity.metric.kind == Kind.ACCURACY]
    groups: dict[str, list[Quantity]] = {}
    for scope, members in groupby(accuracies, key=lambda quantity: quantity.scope):
        measured = [quantity for quantity in members if _points(rows, quantity)]
        if len({value for quantity in measured for _, value, _ in _points(rows, quantity)}) > 1:
            groups[scope] = [*groups.get(scope, []), *measured]
    return groups


def _dot_figure(rows: Sequence[Row], scope: str, measured: list[Quantity]) -> Figure:
    points = {quantity: _points(rows, quantity) for quantity in measured}
    has_errors = any(error for own in points.values() for _, _, error in own)
    caption = f"Accuracy{f' on {scope}' if scope else ''}, higher is better"
    numbers = [
        f"{quantity.name}: {', '.join(f'{row.checkpoint} {value:.2f}%' for row, value, _ in own)}"
        for quantity, own in points.items()
    ]
    whiskers = "; whiskers: one standard error" if has_errors else ""
    return Figure(caption + whiskers, "; ".join(numbers), partial(dots, rows, measured))


def dots(rows: Sequence[Row], measured: Sequence[Quantity]) -> Drawing:
    """A line per task, a marker per checkpoint of one run; the whisker is one standard error."""
    figure, ((axes,),) = panels((0.3 + 0.08 * max(0, len(rows) - 3)) * len(measured) + 0.6)
    looks = _looks(rows)
    step = min(0.16, 0.6 / len(rows))  # the markers of a task are one below the other, so that all whiskers are visible
    for index, row in enumerate(rows):
        shift = step * (index - (len(rows) - 1) / 2)
        points = [(y + shift, *point[1:]) for y, quantity in enumerate(measured) for point in _points([row], quantity)]
        if points:
            heights, shares, errors = zip(*points, strict=True)
            fill, _, mark = looks[row.checkpoint]
            style: dict[str, Any] = {"color": fill, "markeredgecolor": "black", "markeredgewidth": 0.8, "markersize": 6}
            style |= {"ecolor": "black", "elinewidth": 0.8, "label": textwrap.fill(row.checkpoint, 40)}
            axes.errorbar(shares, heights, xerr=errors if any(errors) else None, fmt=mark, **style)
    axes.set_yticks(range(len(measured)), [textwrap.fill(quantity.name, 22) for quantity in measured])
    axes.set_ylim(len(measured) - 0.5, -0.5)
    axes.grid(axis="x")
    axes.set_xlabel("% of samples")
    with_legend(figure, *axes.get_legend_handles_labels())
    return figure


# --- losses -----------------------------------------------------------------------------------------------------------


def loss_curves(trained: TrainRecord) -> dict[str, list[tuple[int, float]]]:
    """The logged curves of a training as (step, value): training loss, validation loss and perplexity, if any."""
    curves = {
        name: [(entry["step"], float(entry[key])) for entry in trained.history if entry.get(key) is not None]
        for name, key in CURVES.items()
    }
    published = trained.best_step or trained.steps
    if trained.validation_loss is not None and published not in dict(curves["validation"]):
        curves["validation"].append((published, trained.validation_loss))  # measured at the end
    return {name: points for name, points in curves.items() if points}


def loss_figures(trained: TrainRecord) -> Iterator[Figure]:
    """The losses of a training, and its perplexity if it was logged; a single point is no curve."""
    curves = loss_curves(trained)
    perplexity = {name: curves.pop(name) for name in ("perplexity",) if name in curves}
    for label, own in (("Loss, nats per token", curves), ("Perplexity", perplexity)):
        if any(len(points) > 1 for points in own.values()):
            names = f" ({' and '.join(own)})" if own is curves else ""
            numbers = [
                f"{name} from {points[0][1]:.3f} at step {points[0][0]} to {points[-1][1]:.3f} at step {points[-1][0]}"
                for name, points in own.items()
            ]
            yield Figure(f"{label}, by optimizer step{names}", "; ".join(numbers), partial(losses, own))


def losses(curves: dict[str, list[tuple[int, float]]]) -> Drawing:
    """Curves by optimizer step."""
    from matplotlib.ticker import MaxNLocator

    figure, ((axes,),) = panels(2.6)
    # last in each look: distance of the number from its line in points, so that close numbers do not overlap
    is_higher = {"training", "validation"} <= curves.keys() and curves["validation"][-1][1] < curves["training"][-1][1]
    looks = {
        "training": (COLOURS[4], "-", "o", 3 if is_higher else -13),
        "validation": (COLOURS[5], "--", "s", -13 if is_higher else 3),
        "perplexity": ("black", "-", "D", -3),
    }
    for name, points in curves.items():
        colour, line, marker, shift = looks[name]
        interval = max(1, len(points) // 24)
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, line, color=colour, marker=marker, markersize=5, markevery=interval, label=name)
        value = f"{values[-1]:.2f}" if name == "perplexity" else f"{values[-1]:.3f}"
        axes.annotate(value, (steps[-1], values[-1]), (6, shift), textcoords="offset points", color=colour)
    axes.set_ylabel("perplexity" if "perplexity" in curves else "loss (nats per token)")
    axes.margins(x=0.13, y=0.18)  # room for the numbers at the ends
    if len(curves) > 1:
        axes.legend()
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


# --- costs ------------------------------------------------------------------------------------------------------------


def cost_figures(run: RunStudy) -> Iterator[Figure]:
    """The time of stages and evaluations, and the size of checkpoints where it differs."""
    sizes = {label: content.sparsity["bytes"] / 1e6 for label, content in run.checkpoints.items()}
    for caption, unit, values in (("Time of each stage", "s", run.seconds), ("Size on disk", "MB", sizes)):
        texts = _cost_texts(values.values())
        if len(set(texts)) > 1:
            numbers = ", ".join(f"{name} {text} {unit}" for name, text in zip(values, texts, strict=True))
            yield Figure(caption, numbers, partial(costs, values, "seconds" if unit == "s" else "megabytes"))


def _cost_texts(values: Iterable[float]) -> list[str]:
    return [f"{value:,.0f}" if value >= 100 else f"{value:.1f}" for value in values]


def costs(values: dict[str, float], unit: str) -> Drawing:
    """Bars with their numbers."""
    figure, ((axes,),) = panels(0.25 * len(values) + 0.6)
    count, numbers = len(values), list(values.values())
    _horizontal(axes, list(values), numbers, [GREY] * count, _cost_texts(numbers), [0.0] * count)
    axes.set_xlim(0, 1.25 * max(numbers))
    axes.set_xlabel(unit)
    return figure
