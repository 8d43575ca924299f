"""The figures of the page: SVG files that are the same bytes for the same records."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from cells import loss_of
from claims import TITLES, WIKITEXT, Findings, percent
from matplotlib.ticker import LogLocator

from sppctl.report import plots

LOOKS = dict(zip(TITLES, zip(plots.MARKERS, plots.COLOURS, strict=False), strict=False))


def grid(findings: Findings, path: Path) -> None:
    """Perplexity after each method at each pattern, a panel per pruner, with 95 % intervals."""

    def draw() -> Any:
        figure, axes = plots.panels(
            2.6 * len(findings.scale.pruners), rows=len(findings.scale.pruners), sharex=True, sharey=True
        )
        for axis, pruner in zip(axes[:, 0], findings.scale.pruners, strict=True):
            _panel(axis, findings, pruner)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        plots.with_legend(figure, handles, labels)
        return figure

    path.write_text(plots.svg(draw))


def _panel(axis: Any, findings: Findings, pruner: str) -> None:
    patterns = findings.scale.patterns
    for offset, (kind, title) in enumerate(TITLES.items()):
        places, values, errors = [], [], []
        for place, pattern in enumerate(patterns):
            found = findings.loss(pruner, pattern, kind)
            if found is not None:
                value, low, high = (math.exp(loss) for loss in (found.mean, found.low, found.high))
                places.append(place + (offset - 1.5) * 0.15)
                values.append(value)
                errors.append((value - low, high - value))
        if values:
            bars = list(zip(*errors, strict=True))
            marker, colour = LOOKS[kind]
            style = {"fmt": marker, "color": colour, "markersize": 5, "capsize": 2}
            axis.errorbar(places, values, yerr=bars, label=title, **style)
    dense = findings.records.get("dense")
    if dense is not None:
        axis.axhline(
            math.exp(loss_of(dense["texts"][WIKITEXT])), linewidth=0.8, linestyle="--", color="0.5", label="dense"
        )
    axis.set_yscale("log", subs=range(2, 10))
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")  # matplotlib's default uses mathematical notation
    axis.yaxis.set_minor_formatter("")
    axis.set_xlim(-0.5, len(patterns) - 0.5)
    axis.set_xticks(range(len(patterns)), [percent(pattern) for pattern in patterns])
    axis.set_ylabel("perplexity, WikiText-2")
    axis.set_title(pruner, loc="left")
