"""Records of one or more runs -> a report: Markdown, CSV, JSON and one self-contained HTML page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from sppctl import console
from sppctl.errors import UserError
from sppctl.files import disk, strict_json
from sppctl.files.names import RECORD
from sppctl.report import plots, records, tables
from sppctl.report.document import Section, chapter, document
from sppctl.report.html import to_html
from sppctl.report.latex import to_latex
from sppctl.report.study import Study
from sppctl.report.text import to_csv, to_markdown

FILES = ("report.md", "report.csv", "report.json", "report.html", plots.FIGURE)


def report(run_dirs: Sequence[Path], output: Path | None = None, latex: Path | None = None) -> Study:
    """Reads runs and writes their reports.

    Args:
        run_dirs: each gets its own report, except a single one with ``output``.
        output: directory of the report on all of them; None: the directory that contains them.
        latex: file for the table of all runs.

    Raises:
        UserError: a directory is not a run, or a report cannot be written to its directory.
        WriteError: the disk is full; every file is either complete or unchanged.
    """
    run_dirs = list({path.resolve(): path for path in run_dirs}.values())  # without duplicates
    for path in run_dirs:
        if not [*path.glob(f"*/{RECORD}"), *path.glob("eval/*.json")]:
            raise records.no_run(path)
    main_directory = _main_directory(run_dirs, output)
    for directory in [*(run_dirs if len(run_dirs) > 1 else []), main_directory]:
        disk.demand_directory(directory, "--output")
        for name in FILES:
            disk.demand_file(directory / name, "--output")
    if latex is not None:
        disk.demand_directory(latex.parent, "--latex")
        disk.demand_file(latex, "--latex")
    study = Study.of(run_dirs)
    if latex is not None and not study.rows:
        measure = console.command("eval", run=run_dirs[0])
        raise UserError(f"--latex {latex}", "nothing has been measured yet", f"run {measure} first")
    chapters = [chapter(run) for run in study.runs]
    if len(run_dirs) > 1:
        for path, run, sections in zip(run_dirs, study.runs, chapters, strict=True):
            _write(Study([run]), [sections], path)
    _write(study, chapters, main_directory)
    console.note(f"report: {main_directory / 'report.html'}")
    if latex is not None:
        disk.write(latex, to_latex(tables.over_runs(study.rows, tables.values, tables.gaps)))
        console.note(f"report: {latex}")
    return study


def _main_directory(run_dirs: Sequence[Path], output: Path | None) -> Path:
    """The directory of the report on all runs."""
    if len(run_dirs) == 1:
        return output or run_dirs[0]
    directory = output or Path(os.path.commonpath([path.resolve().parent for path in run_dirs]))
    if output is None and directory == Path(directory.anchor):
        raise UserError("these runs have no common directory; name one for the report on all of them with --output")
    if directory.resolve() in [path.resolve() for path in run_dirs]:
        raise UserError(f"{directory} is itself one of the runs; name another directory with --output")
    return directory


def _write(study: Study, chapters: Sequence[Sequence[Section]], directory: Path) -> None:
    """Writes the files of a report; the pruning figure only for a single run."""
    sections = document(study, chapters, directory)
    texts = {  # all are rendered before the first is written
        "report.md": to_markdown(sections),
        "report.csv": to_csv(tables.long_table(study.rows)),
        "report.json": strict_json.dumps(study.to_json(), indent=2, default=str) + "\n",
        "report.html": to_html(sections),
    }
    if len(study.runs) == 1 and plots.pruning(study.runs[0].layers) is not None:
        texts[plots.FIGURE] = plots.svg(partial(plots.draw, study.runs[0].layers))
    for name, text in texts.items():
        disk.write(directory / name, text)
