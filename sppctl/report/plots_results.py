"""Collected runs -> figures of results, losses and costs, in the style of ``plots``.

Nothing is distinguished by colour alone: bars have a number, a name and a hatch, lines a marker and a dash, so that
figures can be read in grey. matplotlib is imported only when something is drawn.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from sppctl.evaluate.values import Kind, Quantity
from sppctl.records import TrainRecord
from sppctl.report.plots import COLOURS, WIDTH, panels, svg
from sppctl.report.study import Row, RunStudy, quantities, short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# fill, hatch and marker of a checkpoint; the fills differ in lightness, for grey prints
LOOKS = {
    "base": ("#ffffff", "", "s"),
    "pruned": ("#E69F00", "///", "v"),
    "adapter": ("#56B4E9", "...", "D"),
    "merged": ("#0072B2", "", "o"),
}
FURTHER = (("#CC79A7", "xxx"), ("#009E73", "---"), ("#D55E00", "\\\\\\"))
FURTHER_MARKS = "^P*X<>phd8"  # ten marks and three fills: thirty combinations
LOG_FROM = 15  # largest / smallest perplexity; beyond it the short bars of a linear axis would vanish
CURVES = {"training": "loss", "validation": "eval_loss", "perplexity": "perplexity"}  # and their keys in the history

Look = tuple[str, str, str]


def element(make: Callable[[], Figure], title: str) -> str:
    """A figure as an element of a page: letters as paths, no declaration; ``title`` is for screen readers."""
    text = svg(make, **{"svg.fonttype": "path"})
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg") :], flags=re.DOTALL)
    label = title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1).rstrip()


def with_prefix(text: str, prefix: str) -> str:
    """The element with a prefix before all identifiers, so that figures of one page do not share any."""
    return re.sub(r'(\bid="|href="#|url\(#)(?=[^")])', rf"\g<1>{prefix}-", text)


# --- perplexity and divergence ----------------------------------------------------------------------------------------


def bar_quantities(rows: Sequence[Row]) -> list[Quantity]:
    """The quantities that are drawn as bars: perplexities, then divergences."""
    kinds = (Kind.PERPLEXITY, Kind.DIVERGENCE)
    candidates = [quantity for quantity in quantities(rows) if quantity.metric.kind in kinds]
    return [quantity for quantity in candidates if _points(rows, quantity)]


def _points(rows: Sequence[Row], quantity: Quantity) -> list[tuple[Row, float, float]]:
    """The rows with a finite number, that number, and its standard error."""
    points = []
    for row in rows:
        value = row.values.get(quantity)
        if value is not None and value.number is not None and math.isfinite(value.number):
            # the error is that of the mean loss; to first order that of the perplexity is the product of both
            scale = value.number if quantity.metric.kind == Kind.PERPLEXITY else 1.0
            points.append((row, value.number, (value.stderr or 0.0) * scale))
    return points


def bars(rows: Sequence[Row]) -> Figure:
    """A panel per perplexity and divergence, a bar per checkpoint; the whisker is one standard error."""
    bar_groups, titles, heights = [], [], []
    for quantity in bar_quantities(rows):
        points = _points(rows, quantity)
        names = _row_names([row for row, _, _ in points])
        # in characters: the width of the axes next to the labels, at this font size
        width = max(20, int((WIDTH - 0.075 * max(map(len, names)) - 0.2) / 0.09))
        is_perplexity = quantity.metric.kind == Kind.PERPLEXITY  # named by the label of the axis
        titles.append(textwrap.fill(quantity.scope if is_perplexity else quantity.label, width))
        heights.append(0.24 * len(points) + 0.75 + 0.15 * titles[-1].count("\n"))
        bar_groups.append((quantity, names, points))
    figure, grid = panels(sum(heights), len(bar_groups), height_ratios=heights)
    for axes, (quantity, names, points), title in zip(grid[:, 0], bar_groups, titles, strict=True):
        _panel(axes, quantity, names, points, _looks(rows))
        axes.set_title(title, loc="left", fontsize=9, fontweight="bold")
    return figure


def _panel(
    axes: Axes, quantity: Quantity, names: list[str], points: list[tuple[Row, float, float]], looks: dict[str, Look]
) -> None:
    values = [value for _, value, _ in points]
    is_perplexity = quantity.metric.kind == Kind.PERPLEXITY
    errors = [error for _, _, error in points]
    # the same decimals for all; for divergences enough to show two digits of the smallest
    smallest = min((value for value in values if value > 0), default=1.0)
    digits = 2 if is_perplexity else min(6, max(2, 1 - math.floor(math.log10(smallest))))
    texts = [f"{value:.{digits}f}" if value < 1e5 else f"{value:.3g}" for value in values]
    _horizontal(axes, names, values, [looks[row.checkpoint] for row, _, _ in points], texts, errors)
    is_logarithmic = is_perplexity and max(values) > LOG_FROM * min(values)
    if is_logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")  # matplotlib's default uses mathematical notation
        axes.xaxis.set_minor_formatter("")
        axes.set_xlim(min(values) / 2, max(values) * 3)
    else:
        axes.set_xlim(0, 1.18 * max(value + error for value, error in zip(values, errors, strict=True)) or 1)
    axes.set_xlabel(f"{quantity.metric.unit}, lower is better" + (", logarithmic axis" if is_logarithmic else ""))


def _horizontal(
    axes: Axes, names: Sequence[str], values: list[float], looks: list[Look], texts: list[str], errors: list[float]
) -> None:
    """Horizontal bars with their numbers at the end; no whisker where the error is 0."""
    shapes = axes.barh(range(len(values)), values, height=0.66, edgecolor="black", linewidth=0.8)
    for bar, (fill, hatch, _) in zip(shapes, looks, strict=True):
        bar.set(facecolor=fill, hatch=hatch)
    for position, (value, error, text) in enumerate(zip(values, errors, texts, strict=True)):
        if error:
            axes.errorbar(value, position, xerr=error, color="black", capsize=2.5, linewidth=1, fmt="none")
        axes.annotate(text, (value + error, position), (5, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 0.4, -0.6)  # from the top down, without empty space at the ends
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")


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


def dot_quantities(rows: Sequence[Row]) -> list[Quantity]:
    """The quantities that are drawn as dots: shares of 1."""
    return [quantity for quantity in quantities(rows) if quantity.metric.is_share]


def dots(rows: Sequence[Row]) -> Figure:
    """A line per task, a marker per checkpoint of one run; the whisker is one standard error."""
    measured = dot_quantities(rows)
    height = (0.3 + 0.08 * max(0, len(rows) - 3)) * len(measured) + 0.8
    figure, ((axes,),) = panels(height)
    looks = _looks(rows)
    step = min(0.16, 0.6 / len(rows))  # the markers of a task are one below the other, so that all whiskers are visible
    for index, row in enumerate(rows):
        shift = step * (index - (len(rows) - 1) / 2)
        points = [(y + shift, *point[1:]) for y, quantity in enumerate(measured) for point in _points([row], quantity)]
        if points:
            heights, shares, errors = zip(*points, strict=True)
            fill, _, mark = looks[row.checkpoint]
            style: dict[str, Any] = {"color": fill, "markeredgecolor": "black", "markeredgewidth": 0.8, "markersize": 6}
            style |= {"ecolor": "black", "elinewidth": 0.8, "label": textwrap.fill(row.checkpoint, 70)}
            percent = [[100 * number for number in numbers] for numbers in (shares, errors)]
            axes.errorbar(percent[0], heights, xerr=percent[1], fmt=mark, **style)
    axes.set_yticks(range(len(measured)), [quantity.label for quantity in measured])
    axes.set_ylim(len(measured) - 0.5, -0.5)
    axes.grid(axis="x")
    axes.set_xlabel("accuracy or agreement, %, higher is better")
    figure.set_size_inches(WIDTH, height + _legend(figure))
    return figure


def _legend(figure: Figure) -> float:
    """Puts a legend above the axes, in as many columns as the figure is wide for; returns its height in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()
    for columns in range(sum(len(axes.get_legend_handles_labels()[1]) for axes in figure.axes), 0, -1):
        legend = figure.legend(loc="outside upper right", ncols=columns)
        box = legend.get_window_extent(renderer)  # type: ignore[arg-type]
        if box.width <= figure.bbox.width or columns == 1:
            return float(box.height / figure.dpi)
        legend.remove()
    return 0.0


# --- losses -----------------------------------------------------------------------------------------------------------


def loss_curves(trained: TrainRecord) -> dict[str, list[tuple[int, float]]]:
    """The logged curves of a training as (step, value): training loss, validation loss and perplexity, if any."""
    curves = {
        name: [(entry["step"], float(entry[key])) for entry in trained.history if entry.get(key) is not None]
        for name, key in CURVES.items()
    }
    if trained.validation_loss is not None and trained.steps not in dict(curves["validation"]):
        curves["validation"].append((trained.steps, trained.validation_loss))  # measured at the end
    return {name: points for name, points in curves.items() if points}


def losses(curves: dict[str, list[tuple[int, float]]]) -> Figure:
    """Losses by optimizer step, and below them the perplexity if it was logged."""
    from matplotlib.ticker import MaxNLocator

    has_perplexity = "perplexity" in curves
    figure, grid = panels(4.4 if has_perplexity else 2.8, 1 + has_perplexity, sharex=True)
    # last in each look: distance of the number from its line in points, so that close numbers do not overlap
    is_higher = {"training", "validation"} <= curves.keys() and curves["validation"][-1][1] < curves["training"][-1][1]
    looks = {
        "training": (COLOURS[4], "-", "o", 3 if is_higher else -13),
        "validation": (COLOURS[5], "--", "s", -13 if is_higher else 3),
        "perplexity": ("black", "-", "D", -3),
    }
    for name, points in curves.items():
        axes = grid[-1 if name == "perplexity" else 0, 0]
        colour, line, marker, shift = looks[name]
        interval = max(1, len(points) // 24)
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, line, color=colour, marker=marker, markersize=5, markevery=interval, label=name)
        value = f"{values[-1]:.2f}" if name == "perplexity" else f"{values[-1]:.3f}"
        axes.annotate(value, (steps[-1], values[-1]), (6, shift), textcoords="offset points", color=colour)
    for axes, label in zip(grid[:, 0], ("loss (nats per token)", "perplexity"), strict=False):
        axes.set_ylabel(label)
        axes.margins(x=0.09, y=0.18)  # room for the numbers at the ends
    if len(curves) - has_perplexity > 1:
        grid[0, 0].legend()
    grid[-1, 0].set_xlabel("optimizer step")
    grid[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


# --- costs ------------------------------------------------------------------------------------------------------------


def costs_of(run: RunStudy) -> dict[str, dict[str, float]]:
    """By unit: the seconds of every stage and evaluation, and the megabytes of every checkpoint; without empty ones."""
    seconds = {stage: record.wall_time_s for stage, record in run.stages.items()}
    for label, content in run.checkpoints.items():
        seconds[f"eval {label}"] = sum(result.seconds for result in content.results)
    seconds = {name: value for name, value in seconds.items() if value}
    sizes = {label: content.sparsity["bytes"] / 1e6 for label, content in run.checkpoints.items()}
    return {unit: values for unit, values in (("seconds", seconds), ("megabytes on disk", sizes)) if values}


def costs(by_unit: dict[str, dict[str, float]]) -> Figure:
    """Bars of the time of stages, and of the size of checkpoints."""
    figure, grid = panels(0.25 * max(map(len, by_unit.values())) + 0.8, 1, len(by_unit))
    for axes, (unit, values) in zip(grid[0], by_unit.items(), strict=True):
        texts = [f"{value:,.0f}" if value >= 100 else f"{value:.1f}" for value in values.values()]
        count = len(values)
        _horizontal(axes, list(values), list(values.values()), [("#999999", "", "")] * count, texts, [0.0] * count)
        axes.set_xlim(0, 1.25 * max(values.values()))
        axes.set_xlabel(unit)
    return figure
