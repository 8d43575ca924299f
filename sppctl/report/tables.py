"""Collected runs -> tables, as header and rows of text, and those as Markdown and CSV."""

from __future__ import annotations

import csv
import html
import io
import re
from typing import Any

from sppctl import console
from sppctl.report import measures, over_runs, plots
from sppctl.report.measures import Row
from sppctl.report.readings import ACCURACY, AGREEMENT, DIVERGENCE, PERPLEXITY

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
    *("device", "measured on", "model"),
}
CSV_COLUMNS = [
    *("run", "checkpoint", "method", "pattern", "training", "seed", "sparsity", "bytes", "fingerprint"),
    *("measure", "kind", "value", "stderr", "acc_norm", "difference_to_base", "gap_recovered"),
]

MADE = ("checkpoint", "method", "pattern", "training")
# how names of columns begin or end that share something with their neighbours
HEADS = (
    r"(?P<own>.+) (?P<shared>- base)",
    r"(?P<shared>gap recovered), (?P<own>.+)",
    r"(?P<own>ppl|KL|top-1)(?:\(dense \|\| model\)| agreement)? (?P<shared>.+)",
    r"(?P<own>.+) \((?P<shared>(?!lm-eval)[^()]+)\)(?P<more>.*)",
    r"(?P<shared>.+) (?P<own>mean)(?P<more>.*)",
)


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
        cells = [code(name), str(len(own)), f"{sparsity:.2%}"]
        cells += [f"{mean:.3f}", f"{worst[key]:.3f}", code(worst["name"])]
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


HEADS_MEAN = (
    "ppl: perplexity; KL: divergence from the dense model, in nats per token; top-1: share of tokens that both models "
    "find likeliest; mean: over the tasks beside it."
)


def note_on_differences(found: list[Row]) -> str:
    """What the numbers of :func:`comparison_table` and :func:`gap_table` are."""
    words = "Differences of accuracies are percentage points"
    return f"{words}; {measures.GAP_FORMULA}." if any(row.recovered for row in found) else f"{words}."


# --- several runs -----------------------------------------------------------------------------------------------------


def value_table(found: list[Row]) -> Table:
    """The paper's shape: a row per checkpoint, a column per measure."""
    header, lines = _identities(found)
    texts = {name: head(name)[0] for name in measures.names(found)}
    order = list(texts.values())  # what belongs to one text or group stands together
    columns = sorted(texts, key=lambda name: order.index(texts[name]))
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


def seed_table(found: list[Row]) -> Table:
    """Header and rows: mean and standard deviation of what differs in nothing but the seed."""
    groups = over_runs.over_seeds(found)
    keys = over_runs.short_names([group.row for group in groups])
    columns = [
        name for name in measures.names([group.row for group in groups]) if any(g.values.get(name) for g in groups)
    ]
    header = [*MADE, *keys.values(), "seeds", *(name.strip() for name in columns)]
    lines = []
    for group in groups:
        cells = [*_made(group.row), *(_setting(group.row, key) for key in keys), str(group.seeds)]
        for name in columns:
            spread = group.spread(name)
            words = [_written(group.row.measures[name].kind, value) for value in spread or ()]
            cells.append(" ± ".join(words) or "-")
        lines.append(cells)
    return header, lines


def head(name: str) -> tuple[str, str]:
    """The name of a column in two parts, what neighbours share and what is its own: a group and its task."""
    name = name.strip()
    for pattern in HEADS:
        found = re.fullmatch(pattern, name)
        if found is not None:
            parts = found.groupdict()
            return parts["shared"], parts["own"] + (parts.get("more") or "")
    return "", name


def _identities(found: list[Row]) -> Table:
    places, keys = over_runs.places(row.run for row in found), over_runs.short_names(found)
    several = len(places) > 1
    header = ["run"] * several + [*MADE, *keys.values()]
    lines = []
    for row in found:
        lines.append([places[row.run]] * several + [*_made(row), *(_setting(row, key) for key in keys)])
    return header, lines


def _made(row: Row) -> list[str]:
    return [row.checkpoint, row.method or "-", row.pattern or "-", row.training or "-"]


def _setting(row: Row, key: str) -> str:
    return str(row.settings[key]) if key in row.settings else "-"


def cell(row: Row, name: str, with_norm: bool = False) -> str:
    """One measure of a checkpoint as text."""
    measure = row.measures.get(name)
    if measure is None or measure.value is None:
        return "-"
    norm = f" (norm {measure.norm:.2%})" if with_norm and measure.norm is not None else ""
    return _written(measure.kind, measure.value) + norm


def _written(kind: str, value: float) -> str:
    if kind == PERPLEXITY:
        return f"{value:.2f}" if value < 1e5 else f"{value:.3g}"
    if kind == DIVERGENCE:
        return f"{value:.4f}"
    return f"{value:.2%}" if kind in (ACCURACY, AGREEMENT) else f"{value:.2f}"


def _difference(row: Row, name: str) -> str:
    if name not in row.difference:
        return "-"
    value = row.difference[name]
    return f"{100 * value:+.2f}" if row.measures[name].kind in (ACCURACY, AGREEMENT) else f"{value:+.2f}"


def _recovered(row: Row, name: str) -> str:
    return f"{row.recovered[name]:.1%}" if name in row.recovered else "-"


def _percent(share: float) -> str:
    return f"{share:.2%}" if share else "dense"


# --- text that is shown as it is ----------------------------------------------------------------------------------


def code(name: str) -> str:
    """A cell that shows a name as code, where it is one."""
    return f"`{name}`" if re.fullmatch(r"[\w.:-]+", name) else name


def is_code(cell: str) -> bool:
    """Whether :func:`code` has made a cell."""
    return re.fullmatch(r"`[\w.:-]+`", cell) is not None


def in_markdown(text: str) -> str:
    """Text that Markdown shows as it is; what :func:`code` has made stays code."""
    if is_code(text):
        return text
    return re.sub(r"[\\`*\[\]|]|(?<!\w)_|_(?!\w)", r"\\\g<0>", html.escape(console.plain(text), quote=False))


def _in_csv(value: Any) -> Any:
    """A cell that no program takes for a formula."""
    if not isinstance(value, str):
        return value
    return ("'" if value.startswith(("=", "+", "-", "@", "\t", "\r")) else "") + console.plain(value)


# --- files ------------------------------------------------------------------------------------------------------------


def grid(header: list[str], lines: list[list[str]]) -> list[str]:
    """A table in Markdown: names to the left, numbers to the right."""
    sides = ["---" if name in TEXT_COLUMNS else "---:" for name in header]
    cells = [[in_markdown(text) for text in line] for line in (header, *lines)]
    return [f"| {' | '.join(line)} |" for line in (cells[0], sides, *cells[1:])]


def to_csv(found: list[Row]) -> str:
    """One line per checkpoint and measure, unrounded; a checkpoint without measures has one line.

    Columns for the settings in which runs differ follow the fixed ones.
    """
    keys = [key for key in over_runs.short_names(found) if key != over_runs.SEED]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    lines: list[list[Any]] = [[*CSV_COLUMNS, *keys]]
    for row in found:
        own = [row.run, row.checkpoint, row.method, row.pattern, row.training, row.seed, row.sparsity["sparsity"]]
        own += [row.sparsity["bytes"], row.fingerprint]
        settings = [row.settings.get(key) for key in keys]
        for name, measure in row.measures.items():
            numbers = [measure.value, measure.stderr, measure.norm, row.difference.get(name), row.recovered.get(name)]
            lines.append([*own, name.strip(), measure.kind, *numbers, *settings])
        if not row.measures:
            lines.append([*own, *[None] * (len(CSV_COLUMNS) - len(own)), *settings])
    writer.writerows([[_in_csv(value) for value in line] for line in lines])
    return text.getvalue()
