"""A report as a tree of sections, which is rendered to Markdown, HTML, LaTeX, CSV or a terminal.

Cells are plain text; each renderer escapes its own special characters. What a renderer must know of a column (the head
that it shares with its neighbours, whether it is text, a number or code) is a property of the column.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sppctl import console
from sppctl.records import Sample
from sppctl.report import plots, plots_results, provenance, tables, verdict
from sppctl.report.plots import Figure
from sppctl.report.study import RunStudy, Study
from sppctl.report.tables import Table
from sppctl.report.verdict import Verdict

PAIRED = (
    "Paired bootstrap over samples (10,000 resamples, fixed seed): the 95 % interval of the mean difference, in "
    "percentage points for accuracies, in nats per token for losses (over windows); p, two-sided, is how often a "
    "resampled mean, centred on zero, is at least as far from zero. It is not corrected for multiple comparisons."
)
FLIPPED = "Samples that the checkpoints answer differently; a small difference in accuracy can hide many of them."
BETWEEN = "Merged checkpoints on the same samples, against the first run"
PROVENANCE = "How it was made"
SAMPLED = (
    "Each checkpoint continues the prompt with its likeliest tokens, in the tokenizer's chat template if it has one. "
    "Dots are where a text was cut. A few samples show how a model writes, not how good it is."
)
OVER_SEEDS = "Mean ± standard deviation over runs that differ only in run.seed."


@dataclass(frozen=True)
class Facts:
    """A list of short statements; on the page each may be a paragraph in small print."""

    lines: list[str]
    is_small: bool = False


@dataclass(frozen=True)
class Note:
    """A paragraph in small print."""

    text: str


@dataclass(frozen=True)
class Code:
    """Text to be shown line by line."""

    text: str
    language: str = ""  # for Markdown
    folded: str | None = None  # the summary that unfolds it; None: it is always shown


@dataclass(frozen=True)
class Samples:
    """What checkpoints wrote after the same prompts, side by side."""

    samples: Sequence[Sample]


Item = Samples | Verdict | Table | Figure | Note | Facts | Code


@dataclass(frozen=True)
class Section:
    """A heading and the items below it."""

    title: str
    items: Sequence[Item] = ()
    level: int = 2  # of the heading; 1 for the whole report
    anchor: str = ""  # link target in the page
    folder: str = ""  # of the files of its figures
    is_summary: bool = False  # shown on a terminal
    is_folded: bool = False  # a page shows its heading alone until it is unfolded


def document(study: Study, chapters: Sequence[Sequence[Section]], directory: str | Path = ".") -> list[Section]:
    """The report in a directory: the :func:`chapter` of each run, of several runs after an overview."""
    if len(study.runs) == 1:
        return list(chapters[0])
    sections = [Section(f"{len(study.runs)} runs", [verdict.of_study(study)], 1, is_summary=True), *_overview(study)]
    for index, (run, chapter_of_run) in enumerate(zip(study.runs, chapters, strict=True)):
        folder = f"{os.path.relpath(run.directory, directory)}/"
        lower = [replace(section, level=section.level + 1, folder=folder) for section in chapter_of_run]
        sections += [replace(lower[0], anchor=f"run{index}"), *lower[1:]]
    return sections


def _overview(study: Study) -> list[Section]:
    rows = study.rows
    items: list[Item] = list(plots_results.result_figures(rows))
    items += _noted(tables.over_runs(rows, tables.values), tables.COLUMN_NOTE)
    if rows:
        gaps = tables.over_runs([row for row in rows if row.difference], tables.gaps)
        items += [gaps, Note(tables.note_on_differences(rows))]
    sections = [
        Section("All runs", items, is_summary=True),
        Section("Over seeds", _noted(tables.seed_table(study.seeds), OVER_SEEDS), 3),
        Section(BETWEEN, _noted(tables.significance_table(study.comparisons), PAIRED), 3),
    ]
    return [section for section in sections if section.items]


def chapter(run: RunStudy) -> list[Section]:
    """The report of one run."""
    facts, found = provenance.facts(run), verdict.of_run(run)
    top: list[Item] = [found] if found.findings or found.warnings else []
    top += [Facts(facts)] if facts else []
    if not run.rows:
        measure = console.command("eval", run=run.directory)
        top.append(Note(f"No checkpoint of this run has been measured yet; run {measure}."))
    sections = [Section(run.directory, top, level=1, is_summary=True)]
    distance = _noted(tables.comparison_table(run.rows), tables.note_on_differences(run.rows))
    for title, items in (
        ("Results", _results(run)),
        ("Distance to the dense model", distance),
        ("Generated text", _samples(run)),
        ("On the same samples", _noted(tables.significance_table(run.comparisons), PAIRED)),
        ("", [Facts(run.notes, is_small=True)] if run.notes else []),  # added to the previous section
        ("Flipped answers", _noted(tables.flip_table(run.comparisons), FLIPPED)),
        ("Training", _training(run)),
        ("Pruning", _pruning(run)),
        ("Time and size", list(plots_results.cost_figures(run))),
        (PROVENANCE, _provenance(run)),
    ):
        if items and title:
            is_last = title == PROVENANCE
            sections.append(Section(title, items, is_summary=title == "Results", is_folded=is_last))
        elif items:
            sections[-1] = replace(sections[-1], items=[*sections[-1].items, *items])
    return sections


def _noted(table: Table, note: str) -> list[Item]:
    return [table, Note(note)] if table.rows else []


def _results(run: RunStudy) -> list[Item]:
    measured = [tables.table(run.rows)] if run.rows else []
    return [*plots_results.result_figures(run.rows), *measured]


def _samples(run: RunStudy) -> list[Item]:
    return [Samples(run.samples), Note(SAMPLED)] if run.samples else []


def _training(run: RunStudy) -> list[Item]:
    return list(plots_results.loss_figures(run.stages["train"].metrics)) if "train" in run.stages else []


def _pruning(run: RunStudy) -> list[Item]:
    if not run.layers:
        return []
    figure = plots.pruning(run.layers)
    return [*([figure] if figure is not None else []), tables.type_table(run.layers)]


def _provenance(run: RunStudy) -> list[Item]:
    commands = provenance.commands(run)
    items: list[Item] = [Code("\n".join(commands))] if commands else []
    makers = provenance.stage_table, provenance.evaluation_table, provenance.version_table, provenance.fingerprint_table
    items += [table for table in (make(run) for make in makers) if table.rows]
    return items + ([] if run.config is None else [Code(run.config.rstrip("\n"), "yaml", "Configuration")])
