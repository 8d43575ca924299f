"""Records of one or more runs -> one table: base, pruned and merged side by side, as Markdown and JSON.

The Markdown also says what pruning did to each type of module, and shows the figure that ``plots`` draws.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sppctl.errors import UserError
from sppctl.stages import plots
from sppctl.stages.evaluate import read_results, rows_of
from sppctl.stages.tasks import is_share

ORDER = ("base", "pruned", "merged")
STAGES = {"pruned": "prune", "adapter": "train", "merged": "merge"}


def collect(run_dir: Path) -> dict[str, Any]:
    """Everything a run has recorded.

    Returns:
        ``{"run", "stages": {stage: stage.json}, "checkpoints": {label: results}}``, in the order of the pipeline.
    """
    stages = {}
    for directory, stage in STAGES.items():
        record = run_dir / directory / "stage.json"
        if record.is_file():
            try:
                stages[stage] = json.loads(record.read_text())
            except ValueError as error:
                raise UserError(f"{record} is damaged ({error}); sppctl {stage} --force redoes it") from error
    found = {path.stem: read_results(path) for path in sorted((run_dir / "eval").glob("*.json"))}
    labels = [label for label in ORDER if label in found] + [label for label in found if label not in ORDER]
    return {"run": str(run_dir), "stages": stages, "checkpoints": {label: found[label] for label in labels}}


def table(run: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one row per measure, one column per checkpoint."""
    checkpoints = run["checkpoints"]
    rows = [
        ["sparsity of pruned matrices", *(_percent(found["sparsity"]["sparsity"]) for found in checkpoints.values())],
        ["pattern", *(_pattern(found["sparsity"]) for found in checkpoints.values())],
        ["sparse matrices", *(str(found["sparsity"]["sparse_matrices"]) for found in checkpoints.values())],
        ["size, MB", *(f"{found['sparsity']['bytes'] / 1e6:.1f}" for found in checkpoints.values())],
    ]
    values = {
        label: {name: (value, norm) for name, value, norm in rows_of(found)} for label, found in checkpoints.items()
    }
    names = list(dict.fromkeys(name for measured in values.values() for name in measured))
    for name in names:
        cells = [measured.get(name) for measured in values.values()]
        rows.append([name, *(_cell(name, cell) for cell in cells)])
    return ["", *checkpoints], rows


def _percent(share: float) -> str:
    return f"{share:.2%}" if share else "dense"


def _pattern(sparsity: dict[str, Any]) -> str:
    if sparsity["patterns"]:
        return ", ".join(sparsity["patterns"])
    return "unstructured" if sparsity["sparse_matrices"] else "dense"


def _cell(name: str, cell: tuple[float | None, float | None] | None) -> str:
    if cell is None or cell[0] is None:
        return "-"
    value, norm = cell[0], cell[1]
    if name.startswith("ppl "):
        return f"{value:.2f}" if value < 1e5 else f"{value:.3g}"
    if not is_share(name):
        return f"{value:.4f}" if name.startswith("KL(") else f"{value:.2f}"
    return f"{value:.2%}" + (f" (norm {norm:.2%})" if norm is not None else "")


def pruned_layers(run: dict[str, Any]) -> list[plots.Layer]:
    """The records of all layers that were pruned; none without pruning."""
    layers: list[plots.Layer] = run["stages"].get("prune", {}).get("metrics", {}).get("layers", [])
    return layers


def type_table(layers: list[plots.Layer]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: what pruning did, one row per module type, the experts of all blocks counted in one."""
    key = plots.error_measure(layers)
    error = key.replace("_", " ")
    damped = any(layer["damp"] is not None for layer in layers)
    header = ["module type", "matrices", "mean sparsity", f"mean {error}", "worst", "worst layer"]
    header += ["damping"] * damped + ["seconds"]
    rows = []
    for name, points in plots.by_type(layers).items():
        own = [layer for block in points.values() for layer in block]
        worst = max(own, key=lambda layer: float(layer[key]))
        sparsity, mean = (sum(layer[what] for layer in own) / len(own) for what in ("sparsity", key))
        cells = [f"`{name}`", str(len(own)), f"{sparsity:.2%}"]
        cells += [f"{mean:.3f}", f"{worst[key]:.3f}", f"`{worst['name']}`"]
        cells += [_range([layer["damp"] for layer in own if layer["damp"] is not None])] * damped
        rows.append([*cells, f"{sum(layer['seconds'] for layer in own):.1f}"])
    return header, rows


def _range(values: list[float]) -> str:
    if not values:
        return "-"
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def facts(run: dict[str, Any]) -> list[str]:
    """What was done, one line per stage."""
    lines = []
    stages = run["stages"]
    if "prune" in stages:
        metrics = stages["prune"]["metrics"]
        error = metrics["mean_relative_output_error"]
        words = f", mean relative output error {error:.3f}" if error is not None else ""
        lines.append(
            f"prune: {metrics['method']} {metrics['pattern']}, {metrics['matrices']} matrices{words}, "
            f"{stages['prune']['wall_time_s']:.0f} s"
        )
    if "train" in stages:
        metrics = stages["train"]["metrics"]
        validation = metrics["validation_loss"]
        words = f", validation loss {validation:.3f}" if validation is not None else ""
        lines.append(
            f"train: {metrics['method']}, {metrics['trainable_parameters']:,} parameters "
            f"({metrics['trainable_share']:.2%}), {metrics['steps']} steps, {metrics['tokens']:,} tokens{words}, "
            f"{stages['train']['wall_time_s']:.0f} s"
        )
    if "merge" in stages:
        metrics = stages["merge"]["metrics"]
        lines.append(
            f"merge: {metrics['matrices']} matrices, {_zeros(metrics)}, "
            f"{metrics['moved_share']:.1%} of the kept weights moved, {stages['merge']['wall_time_s']:.0f} s"
        )
    return lines


def _zeros(merge: dict[str, Any]) -> str:
    """What became of the zeros in merging."""
    if merge["pattern_unchanged"]:
        return f"all {merge['zeros']:,} zeros kept"
    changes = f"{merge['filled_zeros']:,} zeros filled, {merge['lost_weights']:,} other weights zero"
    return f"{changes}, sparsity now {merge['sparsity']:.2%} (mask {merge['mask']})"


def markdown(runs: list[dict[str, Any]]) -> str:
    """The report as Markdown; it refers to the figure where layers were pruned."""
    parts = []
    for run in runs:
        header, rows = table(run)
        lines = [f"# {run['run']}", ""]
        if len(header) > 1:
            lines += [*_grid(header, rows), ""]
        lines += [f"- {fact}" for fact in facts(run)]
        layers = pruned_layers(run)
        if layers:
            lines += ["", "## Pruning", "", *_grid(*type_table(layers))]
            lines += ["", f"![{plots.error_measure(layers).replace('_', ' ')} and sparsity by block]({plots.FIGURE})"]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _grid(header: list[str], rows: list[list[str]]) -> list[str]:
    """A table in Markdown: names to the left, numbers to the right."""
    sides = ["---" if name in ("", "module type", "worst layer") else "---:" for name in header]
    return [f"| {' | '.join(cells)} |" for cells in (header, sides, *rows)]
