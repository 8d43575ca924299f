"""A report as one HTML page, from the template ``page.html``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count, groupby
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from sppctl import __version__, console
from sppctl.report.document import Code, Facts, Item, Note, Samples, Section
from sppctl.report.plots import Figure
from sppctl.report.tables import NOTHING, Column, Table
from sppctl.report.verdict import Verdict

LONG = 60  # characters; longer cells are broken into lines


def to_html(sections: Sequence[Section]) -> str:
    """Renders a report as a page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    numbers = count(1)

    def drawn(figure: Figure) -> Markup:
        """An SVG element with identifiers that are unique in the page."""
        return Markup(_with_prefix(figure.svg, f"figure{next(numbers)}"))  # noqa: S704

    environment.filters |= {"shown": _shown, "drawn": drawn, "side_by_side": _side_by_side, "headed": _headed}
    environment.filters |= {"settings": _settings, "upper_heads": _upper_heads}
    kinds = {"verdict": Verdict, "facts": Facts, "note": Note, "code": Code, "samples": Samples, "figures": list}
    for name, kind in kinds.items():
        environment.tests[name] = lambda item, kind=kind: isinstance(item, kind)
    chapters = [section for section in sections if section.anchor]
    template = environment.get_template("page.html")
    return template.render(sections=sections, chapters=chapters, version=__version__, long=LONG)


def _shown(text: str) -> str:
    return console.plain_lines(text).replace(" -> ", " → ")


def _with_prefix(text: str, prefix: str) -> str:
    """The element with a prefix before all identifiers, so that figures of one page do not share any."""
    return re.sub(r'(\bid="|href="#|url\(#)(?=[^")])', rf"\g<1>{prefix}-", text)


def _side_by_side(items: Sequence[Item]) -> list[Item | list[Item]]:
    """The items of a section; figures that follow each other are a list."""
    together: list[Item | list[Item]] = []
    for is_figure, members in groupby(items, key=lambda item: isinstance(item, Figure)):
        consecutive = list(members)
        together += [consecutive] if is_figure else consecutive
    return together


def _headed(table: Table) -> Table:
    """The table with one head for each row, the short one where the heads that rows share are rows of their own."""
    if not table.heads:
        return table
    first = Column(table.columns[table.num_heads - 1].name, kind="text")
    rows = [[short, *row[table.num_heads :]] for (_, short), row in zip(table.heads, table.rows, strict=True)]
    return replace(table, columns=[first, *table.columns[table.num_heads :]], rows=rows)


def _upper_heads(table: Table) -> Iterator[tuple[Column, int]]:
    """For each head that neighbouring columns share the first of them and their number; other columns are alone."""
    for group, columns in groupby(table.columns, key=lambda column: column.group):
        members = list(columns)
        yield from [(members[0], len(members))] if group else [(column, 1) for column in members]


def _settings(table: Table, row: Sequence[str]) -> str:
    """How a row was made, in one line; a number needs the name of its column."""
    cells = [(column, text) for column, text in zip(table.columns, row, strict=True) if column.is_setting]
    return " ".join(text if column.is_text else f"{column.name} {text}" for column, text in cells if text != NOTHING)
