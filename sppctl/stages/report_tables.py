"""Collected runs -> tables, as header and rows of text, and those as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import re
from typing import Any

from sppctl.stages import measures, plots
from sppctl.stages.measures import ACCURACY, AGREEMENT, DIVERGENCE, PERPLEXITY, Row

Table = tuple[list[str], list[list[str]]]

TEXT_COLUMNS = {
    *("", "module type", "worst layer", "comparison", "measure", "run", "checkpoint", "method", "pattern", "training"),
    *(
        "stage",
        "finished",
        "hardware",
        "package",
        "what",
        "value",
        "95 % interval",
        "weights",
        "text or tasks",
        "dtype",
    ),
    *("device", "measured on"),
}
CSV_COLUMNS = [
    *("run", "checkpoint", "method", "pattern", "training", "seed", "sparsity", "bytes", "fingerprint"),
    *("measure", "kind", "value", "stderr", "acc_norm", "difference_to_base", "gap_recovered"),
]
SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "|": r"\textbar{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
} | {character: f"\\{character}" for character in "&%$#_{}"}


# --- one run ----------------------------------------------------------------------------------------------------------


def table(run: dict[str, Any]) -> Table:
    """Header and rows: one row per measure, one column per checkpoint."""
    found = measures.rows(run)
    lines = [
        ["sparsity of pruned matrices", *(_percent(row.sparsity["sparsity"]) for row in found)],
        ["pattern", *(measures.pattern_words(row.sparsity) for row in found)],
        ["sparse matrices", *(str(row.sparsity["sparse_matrices"]) for row in found)],
        ["size, MB", *(f"{row.sparsity['bytes'] / 1e6:.1f}" for row in found)],
    ]
    for name in measures.names(found):
        lines.append([name, *(cell(row, name, with_norm=True) for row in found)])
    return ["", *run["checkpoints"]], lines


def comparison_table(run: dict[str, Any]) -> Table:
    """Header and rows: how far every checkpoint is from the dense one, and the share of the gap that it recovers."""
    found = [row for row in measures.rows(run) if row.difference or row.recovered]
    header = ["measure"]
    for row in found:
        header += [f"{row.checkpoint} - base"] + ["gap recovered"] * bool(row.recovered)
    lines = []
    for name in measures.names(found):
        cells = []
        for row in found:
            cells += [_difference(row, name)] + [_recovered(row, name)] * bool(row.recovered)
        if set(cells) != {"-"}:
            lines.append([name.strip(), *cells])
    return header, lines


def type_table(layers: list[plots.Layer]) -> Table:
    """Header and rows: what pruning did, one row per module type, the experts of all blocks counted in one."""
    key = plots.error_measure(layers)
    error = key.replace("_", " ")
    damped = any(layer["damp"] is not None for layer in layers)
    header = ["module type", "matrices", "mean sparsity", f"mean {error}", "worst", "worst layer"]
    header += ["damping"] * damped + ["seconds"]
    lines = []
    for name, points in plots.by_type(layers).items():
        own = [layer for block in points.values() for layer in block]
        worst = max(own, key=lambda layer: float(layer[key]))
        sparsity, mean = (sum(layer[what] for layer in own) / len(own) for what in ("sparsity", key))
        cells = [f"`{name}`", str(len(own)), f"{sparsity:.2%}"]
        cells += [f"{mean:.3f}", f"{worst[key]:.3f}", f"`{worst['name']}`"]
        cells += [_range([layer["damp"] for layer in own if layer["damp"] is not None])] * damped
        lines.append([*cells, f"{sum(layer['seconds'] for layer in own):.1f}"])
    return header, lines


def _range(values: list[float]) -> str:
    if not values:
        return "-"
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def significance_table(comparisons: list[dict[str, Any]]) -> Table:
    """Header and rows: differences on the same samples with their intervals; of losses in nats per token."""
    header = ["comparison", "measure", "samples", "first", "second", "difference", "95 % interval", "p"]
    lines = []
    for pair in comparisons:
        for entry in (entry for entry in pair["entries"] if "p" in entry):
            share = entry["measure"] == "acc"
            first, second = (f"{entry[key]:.2%}" if share else f"{entry[key]:.4f}" for key in ("first", "second"))
            difference, low, high = (
                f"{100 * entry[key]:+.2f}" if share else f"{entry[key]:+.4f}" for key in ("difference", "low", "high")
            )
            name = f"{entry['name']} {'acc' if share else 'loss, nats'}"
            cells = [f"{pair['first']} to {pair['second']}", name, str(entry["samples"]), first, second]
            p = f"{entry['p']:.4f}" if entry["p"] >= 0.001 else f"{entry['p']:.1e}"
            lines.append([*cells, difference, f"{low} to {high}", p])
    return header, lines


def flip_table(comparisons: list[dict[str, Any]]) -> Table:
    """Header and rows: answers that differ between two checkpoints, and what became of them."""
    header = ["comparison", "measure", "answers", "flipped", "correct to wrong", "wrong to correct", "wrong to wrong"]
    lines = []
    for pair in comparisons:
        for entry in (entry for entry in pair["entries"] if entry.get("flips", {}).get("answers")):
            found = entry["flips"]
            kinds = [str(found[kind]) for kind in ("correct_to_wrong", "wrong_to_correct", "wrong_to_wrong")]
            flipped = f"{found['flipped']} ({found['share']:.2%})"
            lines.append(
                [f"{pair['first']} to {pair['second']}", entry["name"], str(found["answers"]), flipped, *kinds]
            )
    return header, lines


def note_on_differences(found: list[Row]) -> str:
    """What the numbers of :func:`comparison_table` and :func:`gap_table` are."""
    words = "Differences of accuracies are percentage points"
    return f"{words}; {measures.GAP_FORMULA}." if any(row.recovered for row in found) else f"{words}."


# --- several runs -----------------------------------------------------------------------------------------------------


def value_table(found: list[Row]) -> Table:
    """The paper's shape: a row per checkpoint, a column per measure."""
    header, lines = _identities(found)
    columns = measures.names(found)
    header += ["sparsity", *(name.strip() for name in columns)]
    for line, row in zip(lines, found, strict=True):
        line += [_percent(row.sparsity["sparsity"]), *(cell(row, name) for name in columns)]
    return header, lines


def gap_table(found: list[Row]) -> Table:
    """The same rows: what is quoted as difference to the dense model and as share of the gap recovered."""
    header, lines = _identities(found)
    for title, write in (("{} - base", _difference), ("gap recovered, {}", _recovered)):
        own = [name for name in measures.headlines(found) if any(write(row, name) != "-" for row in found)]
        header += [title.format(name.strip()) for name in own]
        for line, row in zip(lines, found, strict=True):
            line += [write(row, name) for name in own]
    return header, lines


def wide_table(found: list[Row]) -> Table:
    """Both in one."""
    first, second = value_table(found), gap_table(found)
    own = len(_identities(found)[0])
    lines = [[*line, *other[own:]] for line, other in zip(first[1], second[1], strict=True)]
    return [*first[0], *second[0][own:]], lines


def _identities(found: list[Row]) -> Table:
    several = len({row.run for row in found}) > 1
    header = ["run"] * several + ["checkpoint", "method", "pattern", "training"]
    lines = []
    for row in found:
        words = [row.checkpoint, row.method or "-", row.pattern or "-", row.training or "-"]
        lines.append([row.run] * several + words)
    return header, lines


def cell(row: Row, name: str, with_norm: bool = False) -> str:
    """One measure of a checkpoint as text."""
    measure = row.measures.get(name)
    if measure is None or measure.value is None:
        return "-"
    value = measure.value
    if measure.kind == PERPLEXITY:
        return f"{value:.2f}" if value < 1e5 else f"{value:.3g}"
    if measure.kind == DIVERGENCE:
        return f"{value:.4f}"
    if measure.kind in (ACCURACY, AGREEMENT):
        return f"{value:.2%}" + (f" (norm {measure.norm:.2%})" if with_norm and measure.norm is not None else "")
    return f"{value:.2f}"


def _difference(row: Row, name: str) -> str:
    if name not in row.difference:
        return "-"
    value = row.difference[name]
    return f"{100 * value:+.2f}" if row.measures[name].kind in (ACCURACY, AGREEMENT) else f"{value:+.2f}"


def _recovered(row: Row, name: str) -> str:
    return f"{row.recovered[name]:.1%}" if name in row.recovered else "-"


def _percent(share: float) -> str:
    return f"{share:.2%}" if share else "dense"


# --- files ------------------------------------------------------------------------------------------------------------


def grid(header: list[str], lines: list[list[str]]) -> list[str]:
    """A table in Markdown: names to the left, numbers to the right."""
    sides = ["---" if name in TEXT_COLUMNS else "---:" for name in header]
    cells = [[text.replace("|", "\\|") for text in line] for line in (header, *lines)]
    return [f"| {' | '.join(line)} |" for line in (cells[0], sides, *cells[1:])]


def to_csv(found: list[Row]) -> str:
    """One line per checkpoint and measure, with unrounded numbers; a checkpoint without measures has one line."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for row in found:
        own = [row.run, row.checkpoint, row.method, row.pattern, row.training, row.seed, row.sparsity["sparsity"]]
        own += [row.sparsity["bytes"], row.fingerprint]
        for name, measure in row.measures.items():
            numbers = [measure.value, measure.stderr, measure.norm, row.difference.get(name), row.recovered.get(name)]
            writer.writerow([*own, name.strip(), measure.kind, *numbers])
        if not row.measures:
            writer.writerow([*own, *[None] * (len(CSV_COLUMNS) - len(own))])
    return text.getvalue()


def escape(text: str) -> str:
    """Text that LaTeX sets as it is."""
    return "".join(SPECIAL.get(character, character) for character in text)


def to_latex(found: list[Row]) -> str:
    """A table of the package booktabs; percentages without their sign, which the caption has."""
    header, lines = wide_table(found)
    sides = "".join("l" if name in TEXT_COLUMNS else "r" for name in header)
    body = []
    before = None
    for row, line in zip(found, lines, strict=True):
        if before not in (None, row.run):
            body.append(r"\midrule")
        before = row.run
        body.append(" & ".join(_typeset(text) for text in line) + r" \\")
    caption = (
        r"Perplexities; accuracies and sparsity in percent, their differences to the dense model (-- base) in "
        r"percentage points. Gap recovered in percent: $(x - \mathrm{pruned}) / (\mathrm{base} - \mathrm{pruned})$, "
        r"of perplexities the logarithms."
    )
    head = " & ".join(r"\shortstack[r]{" + _broken(escape(name)) + "}" for name in header)
    return "\n".join(
        [
            "% needs \\usepackage{booktabs}; made by sppctl report",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{caption}}}",
            rf"\begin{{tabular}}{{{sides}}}",
            r"\toprule",
            rf"{head} \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _broken(name: str) -> str:
    """The head of a column on several lines."""
    return name.replace(" (", r"\\ (").replace(", ", r",\\ ")


def _typeset(text: str) -> str:
    """A cell in LaTeX: a dash for nothing, numbers with a minus that is one and without the sign of percent."""
    if text == "-":
        return "--"
    number = re.fullmatch(r"([+-]?)(\d[\d.e+]*)%?", text)
    if number is None:
        return escape(text)
    return {"-": "$-$"}.get(number[1], number[1]) + number[2]
