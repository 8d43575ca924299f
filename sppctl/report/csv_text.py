"""A table for programs, as CSV."""

from __future__ import annotations

import csv
import io
from typing import Any

from sppctl import console
from sppctl.report.tables import Table


def to_csv(table: Table) -> str:
    """A table with its heads; numbers as they are."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([[_cell(value) for value in row] for row in ([c.head for c in table.columns], *table.rows)])
    return text.getvalue()


def _cell(value: Any) -> Any:
    """A cell that no program takes for a formula."""
    if not isinstance(value, str):
        return value
    return ("'" if value.startswith(("=", "+", "-", "@", "\t", "\r")) else "") + console.plain(value)
