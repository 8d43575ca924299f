"""A report as text: Markdown, CSV for programs, and on a terminal."""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import quote

from sppctl import console
from sppctl.evaluate.results import Json, Results
from sppctl.evaluate.values import Kind, distinguish, values_of
from sppctl.records import Sample
from sppctl.report.document import Facts, Item, Note, Samples, Section, chapter, document
from sppctl.report.plots import Figure
from sppctl.report.study import Study
from sppctl.report.tables import NOTHING, Table, written
from sppctl.report.verdict import Verdict

# --- Markdown ---------------------------------------------------------------------------------------------------------


def to_markdown(sections: Sequence[Section]) -> str:
    """The report, with figures only if they are files. Sections without other content are left out."""
    blocks = []
    for section in sections:
        contents = [block for item in section.items if (block := _block(item, section.folder))]
        if contents or not section.items:
            blocks += [f"{'#' * section.level} {escape(section.title)}", *contents]
    return "\n\n".join(blocks) + "\n"


def escape(text: str) -> str:
    """Escapes text for Markdown."""
    return re.sub(r"[\\`*\[\]|]|(?<!\w)_|_(?!\w)", r"\\\g<0>", html.escape(console.plain(text), quote=False))


def _block(item: Item, folder: str) -> str:
    if isinstance(item, Table):
        return (f"**{escape(item.title)}**\n\n" if item.title else "") + "\n".join(grid(item))
    if isinstance(item, Verdict | Facts):
        return "\n".join(f"- {escape(line)}" for line in item.lines)
    if isinstance(item, Note):
        return escape(item.text)
    if isinstance(item, Samples):
        return "\n\n".join(block for sample in item.samples for block in _sample(sample))
    if isinstance(item, Figure):
        return "" if item.file is None else f"![{item.file[1]}]({quote(folder)}{item.file[0]})"
    block = _fenced(item.text, item.language)
    if item.folded is None:
        return block
    return f"<details><summary>{escape(item.folded)}</summary>\n\n{block}\n\n</details>"


def _fenced(text: str, language: str = "") -> str:
    fence = "`" * (1 + max(2, *map(len, re.findall("`*", text))))  # longer than any in the text
    return f"{fence}{language}\n{console.plain_lines(text)}\n{fence}"


def _sample(sample: Sample) -> Iterator[str]:
    yield f"**{escape(sample.prompt)}**"
    for one in sample.completions:
        yield f"{escape(one.checkpoint)}:"
        yield _fenced(one.shown)


def grid(table: Table) -> list[str]:
    """The lines of a table: text left-aligned, numbers right-aligned, names as code unless they would break it."""
    lines = [[escape(column.head) for column in table.columns]]
    lines.append(["---" if column.is_text else "---:" for column in table.columns])
    for index, row in enumerate(table.rows):
        cells = [
            f"`{text}`" if column.kind == "code" and re.fullmatch(r"[\w.:-]+", text) else escape(text)
            for text, column in zip(row, table.columns, strict=True)
        ]
        lines.append([f"  {cells[0]}" if index in table.parts else cells[0], *cells[1:]])
    return [f"| {' | '.join(line)} |" for line in lines]


# --- CSV --------------------------------------------------------------------------------------------------------------


def to_csv(table: Table) -> str:
    """A table with its heads; numbers are not rounded, and text cannot be taken for a formula."""
    text = io.StringIO()
    rows = ([column.head for column in table.columns], *table.rows)
    csv.writer(text, lineterminator="\n").writerows([map(_cell, row) for row in rows])
    return text.getvalue()


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return ("'" if value.startswith(("=", "+", "-", "@", "\t", "\r")) else "") + console.plain(value)


# --- on a terminal ----------------------------------------------------------------------------------------------------


def show(study: Study) -> None:
    """Prints the summary of a report: what was done, and tables of results."""
    for section in document(study, [chapter(run) for run in study.runs]):
        if not section.is_summary:
            continue
        if not any(isinstance(item, Table) for item in section.items):
            print(console.plain(section.title))
        for item in sorted(section.items, key=lambda item: isinstance(item, Table)):  # tables last
            if isinstance(item, Verdict | Facts):
                print("\n".join(map(console.plain, item.lines)))
            elif isinstance(item, Table):
                rows = [[f"  {row[0]}" if i in item.parts else row[0], *row[1:]] for i, row in enumerate(item.rows)]
                console.show_table(section.title, [column.head for column in item.columns], rows)


def show_results(results: dict[str, Json], seed: int) -> None:
    """Prints results files by label; names do not show ``seed``, the configured one."""
    by_label = {label: Results.from_json(content) for label, content in results.items()}
    values_by_label, _ = distinguish({label: values_of(content.results) for label, content in by_label.items()}, seed)
    for label, values in values_by_label.items():
        has_norms = any(value.norm is not None for value in values.values())
        rows = []
        for quantity, value in values.items():
            name = "  " * (quantity.part is not None) + quantity.label
            unit = quantity.metric.unit if quantity.metric.kind == Kind.DIVERGENCE else ""
            norm = NOTHING if value.norm is None else f"{value.norm:.2%}"
            rows.append((name, f"{written(quantity, value.number)} {unit}".rstrip(), *[norm] * has_norms))
        title = f"{label}: {by_label[label].checkpoint}"
        console.show_table(title, ("measure", "value", *["acc_norm"] * has_norms), rows)
