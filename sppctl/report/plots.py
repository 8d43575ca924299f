"""Records of pruned layers -> one figure: error and sparsity by depth, a line per module type.

The figure suits paper and screens: the colours of Okabe and Ito (Color Universal Design, 2008), which colour-blind
people can tell apart, a different marker for every line, text that stays text. The same records give the same bytes.
matplotlib is imported only when something is drawn.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sppctl.records import LayerRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
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
WIDTH = 7.0  # inches: the text width of a page

Points = dict[int, list[LayerRecord]]  # block index -> its layers of one module type


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


def svg(make: Callable[[], Figure], **options: str) -> str:
    """A figure as SVG, in the project's style with these options of matplotlib; equal figures give equal text."""
    from matplotlib import style

    text = io.StringIO()
    with style.context(["default", STYLE, options]):  # "default": no matplotlibrc changes the figure
        make().savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def panels(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure of this height in inches, and (rows, columns) axes in it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def draw(layers: list[LayerRecord]) -> Figure:
    """The figure: error by depth above, sparsity by depth below. Experts of one block are averaged."""
    from matplotlib.ticker import MaxNLocator

    error = error_measure(layers)
    types = by_type(layers)
    figure, ((above,), (below,)) = panels(4.8, 2, sharex=True, height_ratios=(3, 1))
    errors, sparsities = ([_means(points, key) for points in types.values()] for key in (error, "sparsity"))
    lines = _lines(above, errors)
    kind = error.split("_")[1]  # weight or output
    above.set_ylabel(f"relative {kind} error\n(share of the {kind} norm)")
    all_errors = [value for values in errors for value in values.values()]
    if min(all_errors) < max(all_errors) / 2:  # otherwise an axis from zero would hide small differences
        above.set_ylim(bottom=0)
    _sparsity_lines(below, [{block: 100 * value for block, value in values.items()} for values in sparsities])
    below.set_ylabel("sparsity\n(% zeros)")
    below.set_xlabel("block index (0 = nearest to the input)")
    below.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    labels = []
    for name, points in types.items():
        num_experts = max(map(len, points.values()))
        labels.append(name if num_experts == 1 else f"{name}\n(mean of {num_experts})")
    figure.legend(lines, labels, loc="outside right upper", handlelength=2.6)
    figure.align_ylabels()
    return figure


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
