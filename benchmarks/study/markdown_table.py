"""Tables of the page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """A Markdown table; all columns but the first ``texts`` hold numbers."""
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * texts}{' ---: |' * (len(head) - texts)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
