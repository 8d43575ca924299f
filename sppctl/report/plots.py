"""Figures, and the one of pruned layers: error by depth, a line per module type, and sparsity where it differs.

Figures suit paper and screens: the colours of Okabe and Ito (Color Universal Design, 2008), which colour-blind people
can tell apart, a different marker for every line, text that stays text. The same records give the same bytes.
matplotlib is imported only when something is drawn.
"""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from sppctl.records import LayerRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing
    from matplotlib.lines import Line2D

FIGURE = "pruning.svg"
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7")  # yellow is too pale
MARKERS = "os^DvPX<p>h*d8"
LINES = ("-", "--", ":")  # solid for the first of each colour
SAME = 0.1  # percentage points of sparsity; types that differ by less are drawn as one line
STYLE: dict[str, Any] = {
    "text.parse_math": False,  # a dollar in a name is a dollar
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "grid.color": "#d9d9d9",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.1,
    "lines.markeredgecolor": "white",
    "lines.markeredgewidth": 0.4,
    "svg.fonttype": "none",
    "svg.hashsalt": "sppctl",  # otherwise identifiers in the file are random
}
WIDTH = 7.0  # inches: the text width of a printed page
NARROW = 4.2  # inches: on a telephone its letters are hardly made smaller, and wide screens show several side by side
ON_PAGES = {  # colours that a page sets: its ink, its paper, and those that a dark one needs lighter
    "#000000": "currentColor",
    "#ffffff": "var(--page)",
    "#d9d9d9": "var(--grid)",
    "#0072b2": "var(--blue)",
}

Points = dict[int, list[LayerRecord]]  # block index -> its layers of one module type


@dataclass(frozen=True)
class Figure:
    """A drawing, with its numbers for those who cannot see it."""

    caption: str
    numbers: str
    draw: Callable[[], Drawing]  # called under the project's style
    file: tuple[str, str] | None = None  # if it is also written to a file: its name, and a description

    @cached_property
    def svg(self) -> str:
        """The figure as an element of a page, drawn once: no declaration, no background, colours of the page."""
        text = svg(self.draw, **{"savefig.transparent": True})
        text = re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg") :], flags=re.DOTALL)
        text = re.sub(r"<[^>]+>", lambda tag: re.sub("#[0-9a-f]{6}", _on_page, tag[0]), text)
        label = f"{self.caption.rstrip('.')}. {self.numbers}"
        label = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")
        return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1).rstrip()


def _on_page(colour: re.Match[str]) -> str:
    return ON_PAGES.get(colour[0], colour[0])


def error_measure(layers: list[LayerRecord]) -> str:
    """The field of an error that all layers have: the weight error, if some were pruned without inputs."""
    return f"relative_{'weight' if any(layer.relative_output_error is None for layer in layers) else 'output'}_error"


def by_type(layers: list[LayerRecord]) -> dict[str, Points]:
    """Sorts layers by module type and block, in the order of the model.

    ``model.layers.3.mlp.experts.5.gate_proj`` is a ``gate_proj`` of block 3, as are those of the other experts. Where
    one name is used for different modules, as much of the path is added as distinguishes them: ``attn.c_proj`` and
    ``mlp.c_proj``, ``shared_expert.gate_proj`` and ``experts.gate_proj``.
    """
    by_path: dict[tuple[str, ...], Points] = {}
    for layer in layers:
        parts = layer.name.split(".")
        position = next(index for index, part in enumerate(parts) if part.isdigit())  # of the block index
        path = tuple(part for part in parts[position + 1 :] if not part.isdigit())  # without the numbers of experts
        by_path.setdefault(path, {}).setdefault(int(parts[position]), []).append(layer)
    named = {}
    for path, points in by_path.items():
        same_name = [candidate for candidate in by_path if candidate[-1] == path[-1]]
        length = 1
        while len({candidate[-length:] for candidate in same_name}) < len(same_name):
            length += 1
        named[".".join(path[-length:])] = points
    return named


def svg(make: Callable[[], Drawing], **options: Any) -> str:
    """A figure as SVG, in the project's style with these options of matplotlib; equal figures give equal text."""
    from matplotlib import style

    text = io.StringIO()
    with style.context(["default", STYLE, options]):  # "default": no matplotlibrc changes the figure
        make().savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def panels(height: float, rows: int = 1, width: float = NARROW, **options: Any) -> tuple[Drawing, Any]:
    """A figure of this size in inches, and (rows, 1) axes in it."""
    from matplotlib.figure import Figure as Drawing

    figure = Drawing(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, squeeze=False, **options)


def with_legend(figure: Drawing, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Puts a legend above the axes, in as many columns as there is room for, and makes the figure higher by it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()
    for columns in range(len(labels), 0, -1):
        legend = figure.legend(handles, labels, loc="outside upper right", ncols=columns, handlelength=2.6)
        box = legend.get_window_extent(renderer)  # type: ignore[arg-type]
        if box.width <= figure.bbox.width or columns == 1:
            figure.set_size_inches(figure.get_figwidth(), figure.get_figheight() + box.height / figure.dpi)
            return
        legend.remove()


def pruning(layers: list[LayerRecord]) -> Figure | None:
    """The figure of pruned layers; None of a single block, which a table shows as well."""
    types = {name: _means(points, error_measure(layers)) for name, points in by_type(layers).items()}
    if len({block for values in types.values() for block in values}) < 2:
        return None
    error = error_measure(layers).replace("_", " ")
    shown = f"{error} and sparsity" if _sparsity_differs(layers) else error
    ranges = {name: (min(errors.values()), max(errors.values())) for name, errors in types.items()}
    numbers = [f"{name} from {low:.3f} to {high:.3f}" for name, (low, high) in ranges.items()]
    caption = f"{shown.capitalize()} by block and module type"
    return Figure(caption, "; ".join(numbers), lambda: draw(layers, NARROW), (FIGURE, f"{shown} by block"))


def draw(layers: list[LayerRecord], width: float = WIDTH) -> Drawing:
    """The figure: error by depth above, sparsity by depth below if it differs. Experts of one block are averaged."""
    from matplotlib.ticker import MaxNLocator

    error = error_measure(layers)
    types = by_type(layers)
    has_sparsity = _sparsity_differs(layers)
    ratios = (3, 1)[: 1 + has_sparsity]
    figure, grid = panels(4.4 if has_sparsity else 3.2, len(ratios), width, sharex=True, height_ratios=ratios)
    above, below = grid[0, 0], grid[-1, 0]
    errors, sparsities = ([_means(points, key) for points in types.values()] for key in (error, "sparsity"))
    lines = _lines(above, errors)
    kind = error.split("_")[1]  # weight or output
    above.set_ylabel(f"relative {kind} error\n(share of the {kind} norm)")
    all_errors = [value for values in errors for value in values.values()]
    if min(all_errors) < max(all_errors) / 2:  # otherwise an axis from zero would hide small differences
        above.set_ylim(bottom=0)
    if has_sparsity:
        _sparsity_lines(below, [{block: 100 * value for block, value in values.items()} for values in sparsities])
        below.set_ylabel("sparsity\n(% zeros)")
        below.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    below.set_xlabel("block index (0 = nearest to the input)")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    labels = []
    for name, points in types.items():
        num_experts = max(map(len, points.values()))
        labels.append(name if num_experts == 1 else f"{name}\n(mean of {num_experts})")
    with_legend(figure, lines, labels)
    figure.align_ylabels()
    return figure


def _sparsity_differs(layers: list[LayerRecord]) -> bool:
    """Whether it is worth a drawing: a flat line is not."""
    by_layer = [100 * layer.sparsity for layer in layers]
    return max(by_layer) - min(by_layer) >= SAME


def _means(points: Points, key: str) -> dict[int, float]:
    """Block index -> mean over its layers of this type."""
    by_block = {block: [getattr(layer, key) for layer in layers] for block, layers in sorted(points.items())}
    return {block: sum(values) / len(values) for block, values in by_block.items()}


def _lines(axes: Axes, series: list[dict[int, float]]) -> list[Line2D]:
    """A line per module type; in deep models the lines' markers alternate, so that lines below others are visible."""
    step = -(-len({block for values in series for block in values}) // 32)
    lines = []
    for index, values in enumerate(series):
        marker = MARKERS[index % len(MARKERS)]
        lines += axes.plot(
            list(values),
            list(values.values()),
            color=COLOURS[index % len(COLOURS)],
            linestyle=LINES[index // len(COLOURS) % len(LINES)],
            marker=marker,
            markersize=4.5 if marker in "osD" else 6,  # so that they look equally large
            clip_on=False,  # do not cut markers at the edge
            markevery=(index % step if len(values) > step else 0, step),
        )
    return lines


def _sparsity_lines(axes: Axes, series: list[dict[int, float]]) -> None:
    """As :func:`_lines`, but a single line if all module types of every block are equally sparse, the usual case."""
    by_block: dict[int, list[float]] = defaultdict(list)
    for block, value in (item for values in series for item in values.items()):
        by_block[block].append(value)
    all_values = [value for values in series for value in values.values()]
    if len(series) > 1 and all(max(values) - min(values) < SAME for values in by_block.values()):
        means = {block: sum(values) / len(values) for block, values in sorted(by_block.items())}
        axes.plot(list(means), list(means.values()), color="black", marker="." if len(means) == 1 else "")
        axes.text(0.01, 0.95, "all module types", transform=axes.transAxes, va="top")
    else:
        _lines(axes, series)
    margin = max(5.0, 0.15 * (max(all_values) - min(all_values)))
    axes.set_ylim(min(all_values) - margin, max(all_values) + margin)
