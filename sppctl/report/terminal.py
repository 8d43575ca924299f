"""A report, and results, on a terminal."""

from __future__ import annotations

from sppctl import console
from sppctl.evaluate.results import Json, Results
from sppctl.evaluate.values import distinguish, is_part, values_of
from sppctl.report.document import Facts, chapter, document
from sppctl.report.study import Study
from sppctl.report.tables import Table


def show(study: Study) -> None:
    """Prints the summary of a report: tables of results and what was done."""
    chapters = [chapter(run) for run in study.runs]
    for section in document(study, chapters, [""] * len(chapters)):
        if not section.is_summary:
            continue
        tables = [item for item in section.items if isinstance(item, Table)]
        if not tables:
            print(console.plain(section.title))
        for item in section.items:
            if isinstance(item, Facts):
                print("\n".join(map(console.plain, item.lines)))
        for table in tables:
            show_table(section.title, table)


def show_table(title: str, table: Table) -> None:
    """Prints a table."""
    rows = [[f"  {row[0]}" if at in table.parts else row[0], *row[1:]] for at, row in enumerate(table.rows)]
    console.show_table(title, [column.head for column in table.columns], rows)


def show_results(results: dict[str, Json], seed: int) -> None:
    """Prints what was measured.

    Args:
        results: contents of results files by label.
        seed: the configured one, which names leave out.
    """
    by_label = {label: Results.from_json(content) for label, content in results.items()}
    named, _ = distinguish({label: values_of(content.results) for label, content in by_label.items()}, seed)
    for label, values in named.items():
        rows = []
        for quantity, value in values.items():
            name = f"  {quantity.label}" if is_part(quantity) else quantity.label
            if value.number is None or quantity.metric.is_share:
                norm = "" if value.norm is None else f"{value.norm:.2%}"
                rows.append((name, "-" if value.number is None else f"{value.number:.2%}", norm))
            else:
                rows.append((name, f"{value.number:.3f}", ""))
        title = f"{label}: {by_label[label].checkpoint}"
        console.show_table(title, ("measure", "acc / perplexity", "acc_norm"), rows)
