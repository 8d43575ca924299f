"""Collected runs -> one HTML page: no script, no font, no picture and no style that is not in the page itself."""

from __future__ import annotations

import html
from collections.abc import Callable
from itertools import count, groupby
from typing import Any

from sppctl import __version__, console
from sppctl.report import measures, over_runs, plots, plots_results, provenance, tables

PROVENANCE: dict[str, Callable[[dict[str, Any]], tables.Table]] = {
    "Stages": provenance.stage_table,
    "Evaluations": provenance.evaluation_table,
    "Versions": provenance.version_table,
    "Fingerprints": provenance.fingerprint_table,
}
PAIRED = (
    "Paired bootstrap over samples (10,000 resamples, fixed seed): the 95 % interval of the mean difference, in "
    "percentage points for accuracies, in nats per token for losses (over windows); p, two-sided, is how often a "
    "resampled mean, centred on zero, is at least as far from zero. It is not corrected for the number of rows."
)
BETWEEN = "Merged checkpoints on the same samples, against the first run"
OVER_SEEDS = "Mean ± standard deviation over the runs that differ in nothing but run.seed."
STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 78rem; padding: 1.5rem; background: #fff; color: #1a1a1a;
  font: 16px/1.5 system-ui, "Helvetica Neue", Arial, sans-serif; }
h1, h2, h3 { line-height: 1.25; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; margin: 0 0 .5rem; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .5rem; border-bottom: 2px solid #1a1a1a; padding-bottom: .2rem; }
h3 { font-size: 1.05rem; margin: 1.8rem 0 .4rem; }
p, ul { max-width: 44rem; }
.scroll { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums;
  border-top: 2px solid #1a1a1a; border-bottom: 2px solid #1a1a1a; }
th, td { padding: .25rem .7rem .25rem 0; text-align: right; vertical-align: top; white-space: nowrap; }
th { border-bottom: 1px solid #1a1a1a; vertical-align: bottom; }
th.text, td.text { text-align: left; }
td.long { white-space: normal; min-width: 16rem; overflow-wrap: anywhere; }
tbody tr:nth-child(even) { background: #f3f3f3; }
.wide th { white-space: normal; min-width: 3.6rem; }
.wide thead tr:first-child th { border-bottom: 0; }
.wide thead tr:first-child th.span { text-align: center; border-bottom: 1px solid #888; }
figure { margin: 1rem 0; }
figure svg { max-width: 100%; height: auto; display: block; }
figcaption, .note { color: #444; font-size: .85rem; max-width: 44rem; }
pre { background: #f3f3f3; padding: .7rem; font-size: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; }
code { font-size: .95em; }
summary { cursor: pointer; }
@page { size: landscape; margin: 12mm; }
@media print { body { max-width: none; padding: 0; font-size: 11px; } .scroll { overflow: visible; }
  figure, tr, h2, h3 { break-inside: avoid; } h2, h3 { break-after: avoid; } .wide table { font-size: .65rem; }
  th, td { white-space: normal; padding-right: .4rem; } .wide th, td.long { min-width: 0; } }
"""
LONG = 60  # characters from which the text of a cell is broken into lines
HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
"""


class _Page:
    """The parts of the page in their order; figures get identifiers that no other figure has."""

    def __init__(self, depth: int = 3) -> None:
        self.parts: list[str] = []
        self.depth = depth  # of the headings of a run's sections
        self._figures = count(1)

    def add(self, *parts: str) -> None:
        self.parts += parts

    def heading(self, level: int, words: str, identity: str = "") -> None:
        name = f' id="{identity}"' if identity else ""
        self.add(f"<h{level}{name}>{escape(words)}</h{level}>")

    def section(self, words: str) -> None:
        self.heading(self.depth, words)

    def note(self, words: str) -> None:
        self.add(f'<p class="note">{escape(words)}</p>')

    def table(self, table: tables.Table, kind: str = "") -> None:
        header, rows = table
        sides = [' class="text"' if name in tables.TEXT_COLUMNS else "" for name in header]
        names = [tables.head(name)[1] for name in header] if kind == "wide" else header
        head = "".join(f'<th scope="col"{side}>{_inline(name)}</th>' for name, side in zip(names, sides, strict=True))
        body = []
        for row in rows:
            cells = []
            for text, side in zip(row, sides, strict=True):
                kind_of_cell = ' class="text long"' if len(text) > LONG else side
                cells.append(f"<td{kind_of_cell}>{_inline(text)}</td>")
            body.append(f"<tr>{''.join(cells)}</tr>")
        above = _spanning(header) if kind == "wide" else ""
        self.add(f'<div class="scroll {kind}"><table>', f"<thead>{above}<tr>{head}</tr></thead>", "<tbody>", *body)
        self.add("</tbody></table></div>")

    def figure(self, make: Callable[[], Any], caption: str) -> None:
        drawn = plots_results.svg(make, caption, f"figure{next(self._figures)}")
        self.add("<figure>", drawn, f"<figcaption>{escape(caption)}</figcaption>", "</figure>")


def escape(text: str) -> str:
    """Text that HTML shows as it is; lines stay lines."""
    return html.escape("\n".join(map(console.plain, text.split("\n"))))


def _inline(text: str) -> str:
    """Markdown's code in a cell becomes HTML's; spaces at the start keep a task below its mean."""
    words = f"<code>{text[1:-1]}</code>" if tables.is_code(text) else escape(text)
    return "&emsp;" + words.lstrip() if words.startswith("  ") else words


def _spanning(header: list[str]) -> str:
    """The upper head: what neighbouring columns share, once."""
    cells = []
    for shared, columns in groupby(tables.head(name)[0] for name in header):
        title = {"- base": "difference to base"}.get(shared, shared)
        side = ' class="span"' if shared else ""
        cells.append(f'<th scope="colgroup" colspan="{len(list(columns))}"{side}>{escape(title)}</th>')
    return f"<tr>{''.join(cells)}</tr>" if any(tables.head(name)[0] for name in header) else ""


def page(runs: list[dict[str, Any]]) -> str:
    """The whole page."""
    title = runs[0]["run"] if len(runs) == 1 else f"{len(runs)} runs"
    content = _Page(depth=2 if len(runs) == 1 else 3)
    content.heading(1, f"sppctl report: {title}")
    if len(runs) > 1:
        links = (f'<li><a href="#run{at}">{escape(run["run"])}</a></li>' for at, run in enumerate(runs))
        content.add(f"<ul>{''.join(links)}</ul>")
        _overview(content, runs)
    for at, run in enumerate(runs):
        if len(runs) > 1:
            content.heading(2, run["run"], f"run{at}")
        _run(content, run)
    content.note(f"Made by sppctl {__version__}. N:M means that N weights are kept in every M.")
    head = f"{HEAD}<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>"
    return "\n".join([head, *content.parts, "</main>\n</body>\n</html>\n"])


def _overview(content: _Page, runs: list[dict[str, Any]]) -> None:
    found = over_runs.rows_of_all(runs)
    if not found:
        return
    content.heading(2, "All runs")
    content.table(tables.value_table(found), "wide")
    content.note(tables.HEADS_MEAN)
    seeds = tables.seed_table(found)
    if seeds[1]:
        content.heading(3, "Over seeds")
        content.table(seeds, "wide")
        content.note(OVER_SEEDS)
    content.table(tables.gap_table([row for row in found if row.difference]), "wide")
    content.note(tables.note_on_differences(found))
    between = tables.significance_table(over_runs.comparisons(runs))
    if between[1]:
        content.section(BETWEEN)
        content.table(between)
        content.note(PAIRED)
    if plots_results.bar_names(found):
        content.figure(lambda: plots_results.bars(found), "Perplexity and divergence from the dense model, all runs")


def _run(content: _Page, run: dict[str, Any]) -> None:
    facts = provenance.facts(run)
    if facts:
        content.add("<ul>", *(f"<li>{escape(fact)}</li>" for fact in facts), "</ul>")
    if run["checkpoints"]:
        _results(content, run)
    else:
        content.note("No checkpoint of this run has been measured yet; sppctl eval does.")
    _paired(content, run)
    _training(content, run)
    layers = run["stages"].get("prune", {}).get("metrics", {}).get("layers", [])
    if layers:
        content.section("Pruning")
        error = plots.error_measure(layers).replace("_", " ")
        content.figure(lambda: plots.draw(layers), f"{error.capitalize()} and sparsity by block and module type")
        content.table(tables.type_table(layers))
    seconds, sizes = plots_results.costs_of(run)
    if seconds or sizes:
        content.section("Time and size")
        content.figure(lambda: plots_results.costs(seconds, sizes), "Time of each stage, size of each checkpoint")
    _made(content, run)


def _results(content: _Page, run: dict[str, Any]) -> None:
    found = measures.rows(run)
    content.section("Results")
    content.table(tables.table(run))
    if plots_results.bar_names(found):
        caption = "Perplexity and divergence from the dense model; whiskers are one standard error over windows"
        content.figure(lambda: plots_results.bars(found), caption)
    if plots_results.task_names(found):
        content.figure(
            lambda: plots_results.dots(found),
            "Accuracies and agreement with the dense model; whiskers: one standard error",
        )
    differences = tables.comparison_table(run)
    if differences[1]:
        content.section("Distance to the dense model")
        content.table(differences)
        content.note(tables.note_on_differences(found))


def _paired(content: _Page, run: dict[str, Any]) -> None:
    significant, flipped = tables.significance_table(run["comparisons"]), tables.flip_table(run["comparisons"])
    if significant[1]:
        content.section("On the same samples")
        content.table(significant)
        content.note(PAIRED)
    for note in run["notes"]:
        content.note(note)
    if flipped[1]:
        content.section("Flipped answers")
        content.table(flipped)
        content.note("Answers whose likeliest choice is another one; a small difference of accuracies can hide many.")


def _training(content: _Page, run: dict[str, Any]) -> None:
    metrics = run["stages"].get("train", {}).get("metrics", {})
    if not metrics:
        return
    end = (metrics["steps"], metrics.get("validation_loss"))
    curves = plots_results.loss_curves(metrics.get("history", []), end)
    if curves:
        content.section("Training")
        content.figure(lambda: plots_results.losses(curves), f"By optimizer step: {', '.join(curves)}")


def _made(content: _Page, run: dict[str, Any]) -> None:
    commands = provenance.commands(run)
    content.section("How it was made")
    if commands:
        content.add("<pre>" + escape("\n".join(commands)) + "</pre>")
    for title, table in PROVENANCE.items():
        header, rows = table(run)
        if rows:
            content.add(f"<p><strong>{title}</strong></p>")
            content.table((header, rows))
    if run["config"] is not None:
        content.add("<details><summary>Configuration</summary>")
        content.add(f"<pre>{escape(run['config'])}</pre>", "</details>")
