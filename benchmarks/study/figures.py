"""The figures of the page: SVG files that are the same bytes for the same records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import recipes
from cells import Records, loss_of
from claims import TEXTS, TITLES, WIKITEXT, Findings, Interval, interval, losses, percent
from matplotlib.ticker import LogLocator

from sppctl.report import plots


def grid(findings: Findings, path: Path) -> None:
    """Perplexity after each method at each pattern, a panel per pruner, with 95 % intervals."""

    def draw() -> Any:
        pruners = findings.scale.pruners
        figure, axes = plots.panels(2.6 * len(pruners), rows=len(pruners), sharex=True, sharey=True)
        for axis, pruner in zip(axes[:, 0], pruners, strict=True):
            _pruner(axis, findings, pruner)
        plots.with_legend(figure, *axes[0, 0].get_legend_handles_labels())
        return figure

    path.write_text(plots.svg(draw))


def _pruner(axis: Any, findings: Findings, pruner: str) -> None:
    patterns = findings.scale.patterns
    for index, (kind, title) in enumerate(TITLES.items()):
        found = {place: findings.loss(pruner, pattern, kind) for place, pattern in enumerate(patterns)}
        measured = {place + (index - 1.5) * 0.15: one for place, one in found.items() if one is not None}
        if measured:
            values, errors = _perplexities(list(measured.values()))
            axis.errorbar(list(measured), values, yerr=errors, label=title, **_look(index))
    dense = findings.records.get("dense")
    if dense is not None:
        value = math.exp(loss_of(dense["texts"][WIKITEXT]))
        axis.axhline(value, linewidth=0.8, linestyle="--", color="0.5", label="dense")
    axis.set_yscale("log", subs=range(2, 10))
    _plain(axis.yaxis)
    axis.set_xlim(-0.5, len(patterns) - 0.5)
    axis.set_xticks(range(len(patterns)), [percent(pattern) for pattern in patterns])
    axis.set_ylabel("perplexity, WikiText-2")
    axis.set_title(pruner, loc="left")


def steps(records: Records, path: Path) -> None:
    """Perplexity after each row of the recipes, a panel per pattern, with 95 % intervals."""
    panels = {}
    for pattern, rows in recipes.ROWS.items():
        found = {row.name: recipes.measured(pattern, row, records) for row in rows}
        if any(found.values()):
            panels[pattern] = {name: list(by_seed.values()) for name, by_seed in found.items() if by_seed}

    def draw() -> Any:
        heights = [0.2 * len(rows) + 0.6 for rows in panels.values()]
        figure, axes = plots.panels(sum(heights), rows=len(panels), height_ratios=heights)
        for axis, (pattern, rows) in zip(axes[:, 0], panels.items(), strict=True):
            for index, (text, title) in enumerate(TEXTS.items()):
                values, errors = _perplexities([interval([losses(one, text) for one in row]) for row in rows.values()])
                axis.errorbar(values, range(len(rows)), xerr=errors, label=title, **_look(index))
            axis.set_xscale("log", subs=range(2, 10))
            _plain(axis.xaxis)
            axis.grid(axis="x")
            axis.set_yticks(range(len(rows)), list(rows))
            axis.set_ylim(len(rows) - 0.5, -0.5)  # from the top down
            axis.set_title(percent(pattern), loc="left")
        axis.set_xlabel("perplexity")
        plots.with_legend(figure, *axes[0, 0].get_legend_handles_labels())
        return figure

    path.write_text(plots.svg(draw))


def _perplexities(found: Sequence[Interval]) -> tuple[list[float], list[list[float]]]:
    """The exp of losses, and how far their intervals reach below and above."""
    values = [math.exp(one.mean) for one in found]
    below = [value - math.exp(one.low) for value, one in zip(values, found, strict=True)]
    above = [math.exp(one.high) - value for value, one in zip(values, found, strict=True)]
    return values, [below, above]


def _look(index: int) -> dict[str, Any]:
    return {"fmt": plots.MARKERS[index], "color": plots.COLOURS[index], "markersize": 5, "capsize": 2}


def _plain(axis: Any) -> None:
    """Plain numbers on a logarithmic axis; matplotlib's default uses mathematical notation."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")
