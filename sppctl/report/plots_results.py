"""Collected runs -> figures of results, losses and costs, in the style of ``plots``.

Colour alone never distinguishes two things: bars have their number, their name and a hatch, lines a marker and a dash,
so that a grey print shows the same. matplotlib is imported only when something is drawn.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sppctl.evaluate.values import Kind, Quantity, Value
from sppctl.report.plots import COLOURS, svg
from sppctl.report.study import Row, RunStudy, quantities, short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# fill and hatch of a bar: the fills differ in lightness, the hatches on paper
BARS = {"base": ("#ffffff", ""), "pruned": ("#E69F00", "///"), "adapter": ("#56B4E9", "..."), "merged": ("#0072B2", "")}
FURTHER = (("#CC79A7", "xxx"), ("#009E73", "---"), ("#D55E00", "\\\\\\"))
MARKS = {"base": "s", "pruned": "v", "adapter": "D", "merged": "o"}
FURTHER_MARKS = "^P*X<>phd8"  # ten, and three fills: thirty that differ
LOG_FROM = 15  # largest by smallest perplexity from which bars of a linear axis would vanish
WIDTH = 7.0  # inches: a page's text


def element(make: Callable[[], Figure], title: str) -> str:
    """A figure as an element of a page: letters as paths, no declaration; ``title`` is for screen readers."""
    text = svg(make, **{"svg.fonttype": "path"})
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg") :], flags=re.DOTALL)
    label = title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1).rstrip()


def with_prefix(text: str, prefix: str) -> str:
    """The same element with another prefix of all identifiers for every figure of a page."""
    text = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', text)
    return re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", text)


# --- perplexity and divergence ----------------------------------------------------------------------------------------


def bar_quantities(rows: Sequence[Row]) -> list[Quantity]:
    """What is drawn as bars: perplexities, then divergences."""
    drawn = dict.fromkeys(quantity for row in rows for quantity in row.values if _finite(row, quantity))
    return [one for kind in (Kind.PERPLEXITY, Kind.DIVERGENCE) for one in drawn if one.metric.kind == kind]


def bars(rows: Sequence[Row]) -> Figure:
    """A panel per perplexity and divergence, a bar per checkpoint; the whisker is one standard error."""
    from matplotlib.figure import Figure

    drawn = bar_quantities(rows)
    panels = [[row for row in rows if _finite(row, quantity)] for quantity in drawn]
    titles = [_title(quantity, own) for quantity, own in zip(drawn, panels, strict=True)]
    heights = [0.24 * len(own) + 0.75 + 0.15 * title.count("\n") for own, title in zip(panels, titles, strict=True)]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    grid = figure.subplots(len(drawn), 1, squeeze=False, height_ratios=heights)
    looks = _looks(rows)
    for axes, quantity, own, title in zip(grid[:, 0], drawn, panels, titles, strict=True):
        _panel(axes, quantity, own, looks)
        axes.set_title(title, loc="left", fontsize=9, fontweight="bold")
    return figure


def _title(quantity: Quantity, rows: Sequence[Row]) -> str:
    """The name in lines as wide as the axes beside the labels, in inches at this size of letters."""
    is_perplexity = quantity.metric.kind == Kind.PERPLEXITY  # which the label of the axis names
    labels = 0.075 * max(len(_row_name(row, rows)) for row in rows)
    width = max(20, int((WIDTH - labels - 0.2) / 0.09))
    return textwrap.fill(quantity.scope if is_perplexity else quantity.label, width)


def _finite(row: Row, quantity: Quantity) -> bool:
    value = row.values.get(quantity)
    return value is not None and value.number is not None and math.isfinite(value.number)


def _panel(axes: Axes, quantity: Quantity, rows: Sequence[Row], looks: dict[str, tuple[str, str]]) -> None:
    chosen = [row.values[quantity] for row in rows]
    values = [float(value.number or 0.0) for value in chosen]
    perplexity = quantity.metric.kind == Kind.PERPLEXITY
    digits = 2 if perplexity else _digits(values)
    logarithmic = perplexity and max(values) > LOG_FROM * min(values)
    # of the mean loss, so that of the perplexity is to first order its product with the perplexity
    errors = [(one.stderr or 0.0) * (value if perplexity else 1.0) for one, value in zip(chosen, values, strict=True)]
    _horizontal(axes, [_row_name(row, rows) for row in rows], values, [looks[row.checkpoint] for row in rows])
    for index, (value, error) in enumerate(zip(values, errors, strict=True)):
        if error:
            axes.errorbar(value, index, xerr=error, color="black", capsize=2.5, linewidth=1, fmt="none")
        written = f"{value:.{digits}f}" if value < 1e5 else f"{value:.3g}"
        axes.annotate(written, (value + error, index), (5, 0), textcoords="offset points", va="center")
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")  # matplotlib's own writes mathematics
        axes.xaxis.set_minor_formatter("")
        axes.set_xlim(min(values) / 2, max(values) * 3)
    else:
        axes.set_xlim(0, 1.18 * max(value + error for value, error in zip(values, errors, strict=True)) or 1)
    axes.set_xlabel(f"{quantity.metric.unit}, lower is better" + (", logarithmic axis" if logarithmic else ""))


def _digits(values: Sequence[float]) -> int:
    """Decimals of the numbers at bars: the same for all, enough for two figures of the smallest."""
    smallest = min((value for value in values if value > 0), default=1.0)
    return min(6, max(2, 1 - math.floor(math.log10(smallest))))


def _horizontal(axes: Axes, labels: list[str], values: list[float], looks: Sequence[tuple[str, str]]) -> None:
    shapes = axes.barh(range(len(values)), values, height=0.66, edgecolor="black", linewidth=0.8)
    for bar, (fill, hatch) in zip(shapes, looks, strict=True):
        bar.set(facecolor=fill, hatch=hatch)
    axes.set_yticks(range(len(labels)), labels)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(labels) - 0.4, -0.6)  # downwards, and no empty band however many there are
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")


def _looks(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    others = list(dict.fromkeys(row.checkpoint for row in rows if row.checkpoint not in BARS))
    return BARS | {label: FURTHER[index % len(FURTHER)] for index, label in enumerate(others)}


def _row_name(row: Row, rows: Sequence[Row]) -> str:
    """The checkpoint, with as much of how it was made as distinguishes it from the others."""
    if sum(other.checkpoint == row.checkpoint for other in rows) == 1:
        return row.checkpoint
    name = _made(row, rows)
    twins = [other for other in rows if _made(other, rows) == name]
    return name if len(twins) == 1 else f"{name} ({row.run.rstrip('/').rpartition('/')[2]})"


def _made(row: Row, rows: Sequence[Row]) -> str:
    words = [word for word in (row.checkpoint, row.method, row.pattern, row.training) if word]
    names = short_names(rows)
    for key, value in row.settings.items():  # a number alone would say nothing
        words.append(f"{names[key]} {value}" if isinstance(value, int | float) else str(value))
    return " ".join(words)


# --- tasks ------------------------------------------------------------------------------------------------------------


def dot_quantities(rows: Sequence[Row]) -> list[Quantity]:
    """What is drawn as dots: shares of 1."""
    return [quantity for quantity in quantities(rows) if quantity.metric.is_share]


def dots(rows: Sequence[Row]) -> Figure:
    """A line per task, a marker per checkpoint of one run; the whisker is one standard error."""
    from matplotlib.figure import Figure

    drawn = dot_quantities(rows)
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    looks = _looks(rows)
    others = [row.checkpoint for row in rows if row.checkpoint not in MARKS]
    marks = MARKS | {label: FURTHER_MARKS[index % len(FURTHER_MARKS)] for index, label in enumerate(others)}
    step = min(0.16, 0.6 / len(rows))  # the markers of a task stand one below the other, so that all whiskers show
    for index, row in enumerate(rows):
        shift = step * (index - (len(rows) - 1) / 2)
        points: list[tuple[Value, float]] = [
            (row.values[quantity], at + shift) for at, quantity in enumerate(drawn) if _finite(row, quantity)
        ]
        if points:
            fill, _ = looks[row.checkpoint]
            style: dict[str, Any] = {"color": fill, "markeredgecolor": "black", "markeredgewidth": 0.8, "markersize": 6}
            style |= {"ecolor": "black", "elinewidth": 0.8, "label": textwrap.fill(row.checkpoint, 70)}
            shares = [100 * (value.number or 0) for value, _ in points]
            errors = [100 * (value.stderr or 0) for value, _ in points]
            axes.errorbar(shares, [at for _, at in points], xerr=errors, fmt=marks[row.checkpoint], **style)
    axes.set_yticks(range(len(drawn)), [quantity.label for quantity in drawn])
    axes.set_ylim(len(drawn) - 0.5, -0.5)
    axes.grid(axis="x")
    axes.set_xlabel("accuracy or agreement, %, higher is better")
    height = (0.3 + 0.08 * max(0, len(rows) - 3)) * len(drawn) + 0.8
    figure.set_size_inches(WIDTH, height)
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


def loss_curves(history: list[dict[str, Any]], last: tuple[int, float | None]) -> dict[str, list[tuple[int, float]]]:
    """What a training logged: (step, value) of training loss, validation loss and perplexity, those that there are.

    Args:
        history: ``metrics["history"]`` of the training.
        last: steps of the training, and the validation loss at its end.
    """
    steps, validation = last
    curves = {
        words: [(entry["step"], float(entry[key])) for entry in history if entry.get(key) is not None]
        for words, key in (("training", "loss"), ("validation", "eval_loss"), ("perplexity", "perplexity"))
    }
    if validation is not None and steps not in dict(curves["validation"]):
        curves["validation"].append((steps, validation))
    return {words: points for words, points in curves.items() if points}


def losses(curves: dict[str, list[tuple[int, float]]]) -> Figure:
    """Losses by optimizer step, and below them the perplexity where it was watched."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    below = "perplexity" in curves
    figure = Figure(figsize=(WIDTH, 4.4 if below else 2.8), layout="constrained")
    grid = figure.subplots(1 + below, 1, sharex=True, squeeze=False)
    looks = {
        "training": (COLOURS[4], "-", "o"),
        "validation": (COLOURS[5], "--", "s"),
        "perplexity": ("black", "-", "D"),
    }
    # points from the end of a line to its number, so that two losses that end together can be read
    higher = "validation" in curves and "training" in curves and curves["validation"][-1][1] < curves["training"][-1][1]
    shifts = {"training": 3 if higher else -13, "validation": -13 if higher else 3, "perplexity": -3}
    for name, points in curves.items():
        axes = grid[-1 if name == "perplexity" else 0, 0]
        colour, line, marker = looks[name]
        every = max(1, len(points) // 24)
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, line, color=colour, marker=marker, markersize=5, markevery=every, label=name)
        value = f"{values[-1]:.2f}" if name == "perplexity" else f"{values[-1]:.3f}"
        axes.annotate(value, (steps[-1], values[-1]), (6, shifts[name]), textcoords="offset points", color=colour)
    grid[0, 0].set_ylabel("loss (nats per token)")
    if len(curves) - below > 1:
        grid[0, 0].legend()
    grid[-1, 0].set_xlabel("optimizer step")
    grid[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in grid[:, 0]:
        axes.margins(x=0.09, y=0.18)  # room for the numbers at the ends
    if below:
        grid[-1, 0].set_ylabel("perplexity")
    return figure


# --- costs ------------------------------------------------------------------------------------------------------------


def costs_of(run: RunStudy) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of every stage and evaluation, and megabytes of every checkpoint."""
    seconds = {stage: record.wall_time_s for stage, record in run.stages.items()}
    sizes = {}
    for label, content in run.checkpoints.items():
        seconds[f"eval {label}"] = sum(result.seconds for result in content.results)
        sizes[label] = content.sparsity["bytes"] / 1e6
    return {name: value for name, value in seconds.items() if value}, sizes


def costs(seconds: dict[str, float], sizes: dict[str, float]) -> Figure:
    """Bars of the time that stages took, and of the space that checkpoints take."""
    from matplotlib.figure import Figure

    panels = [(values, words) for values, words in ((seconds, "seconds"), (sizes, "megabytes on disk")) if values]
    most = max(len(values) for values, _ in panels)
    figure = Figure(figsize=(WIDTH, 0.25 * most + 0.8), layout="constrained")
    for axes, (values, words) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _horizontal(axes, list(values), list(values.values()), [("#999999", "")] * len(values))
        for index, value in enumerate(values.values()):
            written = f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
            axes.annotate(written, (value, index), (5, 0), textcoords="offset points", va="center")
        axes.set_xlim(0, 1.25 * max(values.values()))
        axes.set_xlabel(words)
    return figure
