"""A report in Markdown."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from urllib.parse import quote

from sppctl import console
from sppctl.report.document import Code, Facts, Figure, Item, Note, Section
from sppctl.report.tables import Column, Table


def to_markdown(sections: Sequence[Section]) -> str:
    """The whole report; of figures those that are files. A section of other figures alone is left out."""
    blocks = []
    for section in sections:
        own = [block for item in section.items if (block := _block(item, section.folder))]
        if own or not section.items:
            blocks += [f"{'#' * section.level} {escape(section.title)}", *own]
    return "\n\n".join(blocks) + "\n"


def escape(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"[\\`*\[\]|]|(?<!\w)_|_(?!\w)", r"\\\g<0>", html.escape(console.plain(text), quote=False))


def _block(item: Item, folder: str) -> str:
    if isinstance(item, Table):
        title = f"**{escape(item.title)}**\n\n" if item.title else ""
        return title + "\n".join(grid(item))
    if isinstance(item, Facts):
        return "\n".join(f"- {escape(line)}" for line in item.lines)
    if isinstance(item, Note):
        return escape(item.text)
    if isinstance(item, Figure):
        return "" if item.file is None else f"![{item.file[1]}]({quote(folder)}{item.file[0]})"
    return _code(item)


def grid(table: Table) -> list[str]:
    """A table: text to the left, numbers to the right."""
    sides = ["---" if column.is_text else "---:" for column in table.columns]
    lines = [[escape(column.head) for column in table.columns], sides]
    for at, row in enumerate(table.rows):
        cells = [_cell(text, column) for text, column in zip(row, table.columns, strict=True)]
        lines.append([f"  {cells[0]}" if at in table.parts else cells[0], *cells[1:]])
    return [f"| {' | '.join(line)} |" for line in lines]


def _cell(text: str, column: Column) -> str:
    """Names are shown as code where nothing in them ends it."""
    is_code = column.kind == "code" and re.fullmatch(r"[\w.:-]+", text)
    return f"`{text}`" if is_code else escape(text)


def _code(item: Code) -> str:
    """A block of code that nothing in it can end."""
    fence = "`" * (1 + max(2, *map(len, re.findall("`*", item.text))))
    block = "\n".join([fence + item.language, *map(console.plain, item.text.split("\n")), fence])
    if item.folded is None:
        return block
    return f"<details><summary>{escape(item.folded)}</summary>\n\n{block}\n\n</details>"
