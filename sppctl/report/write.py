"""Records of one or more runs -> a report: Markdown, CSV, JSON and one HTML page that needs nothing beside it."""

from __future__ import annotations

import itertools
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sppctl import console
from sppctl.config.yaml12 import dump_yaml, read_text
from sppctl.files import disk, strict_json
from sppctl.report import html as report_html
from sppctl.report import measures, over_runs, plots, provenance, readings, records, significance, tables

FILES = ("report.md", "report.csv", "report.json", "report.html")


def collect(run_dir: Path) -> dict[str, Any]:
    """Everything a run has recorded, and what follows from it.

    Returns:
        ``{"run", "config": YAML or None, "stages": {stage: stage.json}, "checkpoints": {label: results},
        "comparisons", "notes", "table"}``, in the order of the pipeline. ``comparisons`` has an entry for every two
        checkpoints that were measured on the same samples or windows, ``notes`` say what is left out,
        ``table`` has a :class:`sppctl.report.measures.Row` for each checkpoint.

    Raises:
        UserError: a record is damaged.
    """
    stages, checkpoints, outdated = records.read(run_dir)
    run: dict[str, Any] = {
        "run": str(run_dir),
        "config": _configuration(run_dir, stages),
        "stages": stages,
        "checkpoints": checkpoints,
    }
    run["comparisons"], notes = comparisons(run_dir, checkpoints)
    run["notes"] = outdated + readings.measured(run)[1] + notes
    run["table"] = [asdict(row) for row in measures.rows(run)]
    return run


def _configuration(run_dir: Path, stages: records.Records) -> str | None:
    """The configuration that the stages were made with; of a run without stages what its last command was given."""
    settings: dict[str, Any] = {}
    for record in stages.values():
        settings |= record.get("settings", {})
    if settings:
        seed = settings.pop("seed", None)
        return dump_yaml(({} if seed is None else {"run": {"seed": seed}}) | settings)
    resolved = run_dir / "resolved.yaml"
    return read_text(resolved) if resolved.is_file() else None


def comparisons(run_dir: Path, checkpoints: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """Paired differences of every checkpoint to the dense and to the pruned one, and what they leave out."""
    samples, notes = {}, []
    for label, content in checkpoints.items():
        samples[label], strange = significance.read_samples(run_dir / f"eval/{label}.samples", content["results"])
        notes += strange
    found = []
    for first, second in itertools.product(("base", "pruned"), checkpoints):
        if first not in checkpoints or second in ("base", first):
            continue
        entries = significance.compare_texts(checkpoints[first]["results"], checkpoints[second]["results"])
        entries += significance.compare_tasks(samples[first], samples[second])
        notes += [f"{first} and {second}, {entry['name']}: {entry['note']}" for entry in entries if "note" in entry]
        if entries:
            found.append({"first": first, "second": second, "entries": entries})
    return found, notes


def pruned_layers(run: dict[str, Any]) -> list[plots.Layer]:
    """The records of all layers that were pruned; none without pruning."""
    layers: list[plots.Layer] = run["stages"].get("prune", {}).get("metrics", {}).get("layers", [])
    return layers


# --- markdown ---------------------------------------------------------------------------------------------------------


def markdown(runs: list[dict[str, Any]], directory: Path = Path()) -> str:
    """The report as Markdown: of several runs first the table over all; it refers to the figure of each run.

    Args:
        runs: collected runs.
        directory: where it will lie, with the figure of a single run beside it.
    """
    parts = []
    if len(runs) > 1:
        found = over_runs.rows_of_all(runs)
        if found:
            lines = [f"# {len(runs)} runs", "", *_section(tables.value_table(found)), ""]
            seeds = tables.seed_table(found)
            if seeds[1]:
                lines += ["## Over seeds", "", *_section(seeds, [report_html.OVER_SEEDS]), ""]
            between = tables.significance_table(over_runs.comparisons(runs))
            if between[1]:
                lines += [f"## {report_html.BETWEEN}", "", *_section(between, [report_html.PAIRED]), ""]
            parts.append(
                "\n".join(
                    [
                        *lines,
                        *_section(
                            tables.gap_table([row for row in found if row.difference]),
                            [tables.note_on_differences(found)],
                        ),
                        "",
                    ]
                )
            )
    for run in runs:
        place = f"{os.path.relpath(run['run'], directory)}/" if len(runs) > 1 else ""
        parts.append(_markdown_of_run(run, place))
    return "\n".join(parts)


def _section(table: tables.Table, notes: list[str] | None = None) -> list[str]:
    return [*tables.grid(*table), *(line for note in notes or [] for line in ("", note))]


def _markdown_of_run(run: dict[str, Any], place: str) -> str:
    lines = [f"# {tables.in_markdown(run['run'])}", ""]
    if run["checkpoints"]:
        lines += [*_section(tables.table(run)), ""]
    lines += [f"- {tables.in_markdown(fact)}" for fact in provenance.facts(run)]
    differences = tables.comparison_table(run)
    if differences[1]:
        lines += [
            "",
            "## Distance to the dense model",
            "",
            *_section(differences, [tables.note_on_differences(measures.rows(run))]),
        ]
    lines += _paired(run)
    layers = pruned_layers(run)
    if layers:
        lines += ["", "## Pruning", "", *tables.grid(*tables.type_table(layers))]
        figure = f"{plots.error_measure(layers).replace('_', ' ')} and sparsity by block"
        lines += ["", f"![{figure}]({quote(place)}{plots.FIGURE})"]
    lines += _made(run)
    return "\n".join(lines).rstrip("\n") + "\n"


def _paired(run: dict[str, Any]) -> list[str]:
    lines = []
    significant, flipped = tables.significance_table(run["comparisons"]), tables.flip_table(run["comparisons"])
    if significant[1]:
        lines += ["", "## On the same samples", "", *_section(significant, [report_html.PAIRED])]
    lines += [""] * bool(run["notes"]) + [f"- {tables.in_markdown(note)}" for note in run["notes"]]
    if flipped[1]:
        lines += ["", "## Flipped answers", "", *_section(flipped)]
    return lines


def _made(run: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    commands = provenance.commands(run)
    if commands:
        lines += ["", *_fenced("\n".join(commands))]
    for title, table in report_html.PROVENANCE.items():
        header, rows = table(run)
        if rows:
            lines += ["", f"### {title}", "", *tables.grid(header, rows)]
    if run["config"] is not None:
        lines += ["", "<details><summary>configuration</summary>", "", *_fenced(run["config"].rstrip("\n"), "yaml")]
        lines += ["", "</details>"]
    return ["", "## How it was made", *lines] if lines else []


def _fenced(text: str, language: str = "") -> list[str]:
    """A block of code that nothing in it can end."""
    fence = "`" * (1 + max(2, *map(len, re.findall("`*", text))))
    return [fence + language, *map(console.plain, text.split("\n")), fence]


# --- files ------------------------------------------------------------------------------------------------------------


def write(runs: list[dict[str, Any]], directory: Path) -> None:
    """Writes report.md, report.csv, report.json and report.html, for a single run its figure of pruning too.

    Args:
        runs: collected runs.
        directory: made if it is not there.

    Raises:
        WriteError: the disk is full; files that are there are whole.
    """
    found = over_runs.rows_of_all(runs)
    together = {"table": [asdict(row) for row in found], "comparisons": over_runs.comparisons(runs), "runs": runs}
    content = runs[0] if len(runs) == 1 else together
    made = (
        markdown(runs, directory),
        tables.to_csv(found),
        strict_json.dumps(content, indent=2, default=str) + "\n",
        report_html.page(runs),
    )
    for name, text in zip(FILES, made, strict=True):
        disk.write(directory / name, text)
    layers = pruned_layers(runs[0])
    if len(runs) == 1 and layers:
        plots.write(layers, directory / plots.FIGURE)


def check(directory: Path) -> None:
    """Raises UserError if no report can be written into a directory."""
    disk.demand_directory(directory, "--output")
    for name in (*FILES, plots.FIGURE):
        disk.demand_file(directory / name, "--output")
