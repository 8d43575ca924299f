"""docs/results.md from the records: the claims with their verdicts, the grid, rates, ablations, recipes, literature."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cells
import figures
import gpus
import recipes
from cells import ABLATIONS, Record, Records, Scale
from claims import (
    INSTRUCTIONS,
    TEXTS,
    TITLES,
    UNKNOWN,
    WIKITEXT,
    Findings,
    Interval,
    Spread,
    interval,
    losses,
    mean_of,
    of_seeds,
    percent,
    perplexity,
)
from markdown_table import table

HERE = Path(__file__).resolve().parent
ROW_HEAD = ["row", "change", "seeds", "pruned", "WikiText-2", "gain", "instructions", "tokens", "memory", "time"]
IDLE = 0.05  # share of the machine's CPU time that other processes may take where seconds are compared


def write(scale: Scale, records: Records, target: Path) -> None:
    """Writes the page and its figures beside it.

    Raises:
        ValueError: records that would be compared were measured, calibrated or trained on different texts.
    """
    current = cells.current(scale, records)
    _check_sources(current)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text(scale, current, target.parent))


def _check_sources(records: Records) -> None:
    """C4, for one, is the first documents of its hub repository for some users, and a part of them for others."""
    found: dict[tuple[str, tuple[Any, ...]], dict[str, str]] = {}
    for name, record in records.items():
        cell = record["cell"]
        for title, one in record["texts"].items():
            if "documents_hash" in one:
                place = (f"texts for {title}", (one["windows"], cell["texts"] == cells.TEST))
                found.setdefault(place, {})[one["documents_hash"]] = name
        if calibration := record["stages"].get("prune", {}).get("calibration"):
            place = ("calibration windows", (cell["seed"], calibration["samples"], calibration["seq_len"]))
            found.setdefault(place, {})[calibration["windows_hash"]] = name
        if digest := record["stages"].get("train", {}).get("data_hash"):
            settings = [setting for setting in cell["training"] if setting.startswith("train.data.")]
            found.setdefault(("training data", (cell["seed"], *settings)), {})[digest] = name
    for (title, _), names in found.items():
        if len(names) > 1:
            raise ValueError(f"{' and '.join(names.values())} have different {title}")


def text(scale: Scale, records: Records, folder: Path) -> str:
    """The page; figures are written into a folder."""
    findings = Findings(scale, records)
    parts = [_introduction(scale, records), _claims(findings), _grid(findings, folder), _rates(scale, records)]
    parts += [_ablations(findings), _recipes(records, folder) if scale.with_recipes else "", _tasks(records)]
    parts += [(HERE / "literature.md").read_text().strip(), gpus.text(), _machines(records)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _introduction(scale: Scale, records: Records) -> str:
    total, rows = cells.count(scale), cells.num_rows(scale.max_tokens)
    state = "All" if len(records) == total else f"{len(records)} of {total}"
    source = """`bash scripts/study.sh --page` from the records in `benchmarks/study/records/`.
`bash scripts/study.sh` computes the cells without a record."""
    if scale is cells.QUICK:
        source = "`bash scripts/study.sh --subset quick` from the records beside it, a few small cells of the study."
    return f"""# Results

This page is written by {source} {state} cells have been measured.

SmolLM2-135M-Instruct, computed in float32, from `{cells.SHARED["model"]["gguf_file"]}`: weights that were once
quantised to 4 bits, so the dense model is not quite the published one. Calibration: 64 windows of 512 tokens of C4.
Training: {scale.steps} steps of 8 rows of Alpaca, of at most 512 tokens, without dropout. Perplexity: the first
{scale.max_tokens:,} tokens of WikiText-2's test split in windows of 2,048, and {rows} rows of Alpaca that no training
reads, prompts included. Losses are in nats per token. Intervals are 95 % intervals of a bootstrap over windows or rows,
paired where two checkpoints are compared, with the seeds averaged in each of them. A seed changes the calibration
windows, the initialisation, and which rows are read in which order; what no claim is about has one seed. N:M means that
N weights are kept in every M; percentages are shares of zeros. LoRA* is LoRA merged with the mask put back, of SPP's
rank, 16, and so with nearly twice as many parameters."""


def _claims(findings: Findings) -> str:
    lines = ["| claim | verdict | numbers |", "| --- | --- | --- |"]
    for verdict in findings.verdicts():
        lines.append(f"| {verdict.claim} | **{verdict.verdict}** | {'<br>'.join(verdict.numbers)} |")
    return f"""## The paper's claims

The numbers are differences in loss on WikiText-2: SPP minus what it is compared with, so a negative one favours SPP.
A claim holds if every difference, over three seeds, excludes zero and all seeds agree. It does not hold if one of them
is positive beyond what windows and seeds explain (t test at 5 %, corrected for the number of differences). Anything
else that was measured is "{UNKNOWN}". DSnoT moves the zeros of a pruner in the dense weights, so after SparseGPT it
lacks SparseGPT's update of the kept ones. Merging refuses a changed pattern, so that claim is verified rather than
tested. A model of 135 million parameters and a few hundred training rows say little about 7 billion parameters and
50,000 rows.

{chr(10).join(lines)}"""


def _grid(findings: Findings, folder: Path) -> str:
    parts = ["## Pruned and retrained"]
    entries = itertools.product(findings.scale.pruners, findings.scale.patterns, TITLES)
    if any(findings.loss(*entry) is not None for entry in entries):
        figures.grid(findings, folder / "results-grid.svg")
        parts.append("![Perplexity by method and pattern](results-grid.svg)")
    dense = findings.records.get("dense")
    if dense is not None:
        values = ", ".join(f"{math.exp(cells.loss_of(one)):.2f} on {name}" for name, one in dense["texts"].items())
        parts.append(f"Dense: {values}.")
    for pruner in findings.scale.pruners:
        for name, title in TEXTS.items():
            rows = [
                [percent(pattern), *(_perplexity(findings.loss(pruner, pattern, kind, name)) for kind in TITLES)]
                for pattern in findings.scale.patterns
            ]
            if any(any(row[1:]) for row in rows):
                parts += [f"### {pruner}, perplexity on {title}", table(["pattern", *TITLES.values()], rows)]
    return "\n\n".join(parts) if len(parts) > 1 else ""


def _perplexity(found: Interval | None) -> str:
    if found is None:
        return ""
    return perplexity(found) + (f" ({of_seeds(found)})" if len(found.by_seed) < len(cells.FULL.seeds) else "")


def _rates(scale: Scale, records: Records) -> str:
    """The trials of learning rates, if there were any."""
    rows = []
    for pattern in dict.fromkeys(cells.TUNED_AT[pattern] for pattern in scale.patterns):
        for method in scale.rates:
            chosen = cells.chosen_rate(scale, records, method, pattern)
            tried = scale.rates[method]
            for rate in tried if len(tried) > 1 else ():
                record = records.get(cells.trial_name(method, pattern, rate))
                if record is not None:
                    losses = [cells.loss_of(one) for one in record["texts"].values()]
                    values = [f"{loss:.4f}" for loss in (*losses, mean_of(losses))]
                    rows.append(
                        [
                            TITLES.get(method, f"SPP, {method}"),
                            percent(pattern),
                            f"{rate:g}",
                            *values,
                            _mark(rate, chosen, tried),
                        ]
                    )
    if not rows:
        return ""
    names = ["method", "pattern", "rate", "WikiText-2 validation", "held-out instructions", "mean", ""]
    num = cells.num_rows(scale.validation_tokens)
    return f"""## Learning rates

Tuned for each method at 2:4 and 75 % after Wanda, seed 0, with the same number of trials each, on
{scale.validation_tokens:,} tokens of WikiText-2's validation split and on {num} other rows of Alpaca: the lowest mean
of both losses is used for all pruners, and 2:4's for 50 %, 75 %'s for 2:8. Other ranks use SPP's. Without beta, or with
a beta that does not start at 0, a step of the same rate moves a weight much further, so these have trials of their own.

{table(names, rows)}"""


def _mark(rate: float, chosen: float | None, tried: Sequence[float]) -> str:
    """Whether a rate is the chosen one, and whether a better one may lie beyond those that were tried."""
    if rate != chosen:
        return ""
    edges = {min(tried): "chosen, the smallest tried", max(tried): "chosen, the largest tried"}
    return edges.get(rate, "chosen")


def _ablations(findings: Findings) -> str:
    rows = []
    for pattern in findings.scale.ablated:
        for kind in ("spp", *ABLATIONS):
            found = findings.loss("wanda", pattern, kind)
            difference = findings.difference("wanda", pattern, "spp", kind) if kind != "spp" else None
            if found is not None:
                title = "as published (r = 16, beta starts at 0)" if kind == "spp" else kind
                rows.append([percent(pattern), title, _perplexity(found), _difference(difference)])
    if not any(row[1] in ABLATIONS for row in rows):
        return ""
    head = ["pattern", "SPP", "WikiText-2", "loss minus as published"]
    return f"## Ablations of SPP, after Wanda\n\n{table(head, rows, texts=2)}"


def _difference(found: Interval | None) -> str:
    return "" if found is None else f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


def _recipes(records: Records, folder: Path) -> str:
    """A table per pattern; the gain of a row is measured from the row that it changes, over their common seeds."""
    parts = []
    for pattern, rows in recipes.ROWS.items():
        measured = [row for row in rows if recipes.measured(pattern, row, records)]
        lines = [_recipe(pattern, row, records) for row in recipes.with_earlier(pattern, measured)]
        if lines:
            parts += [f"### {percent(pattern)}", table(ROW_HEAD, lines, texts=2)]
            parts += [_beyond_chance(pattern, records), _against_the_paper(pattern, records)]
    if not parts:
        return ""
    figures.steps(records, folder / "results-recipes.svg")
    about = f"""## Recipes

Each row changes an earlier row and trains for {recipes.STEPS} steps of 8 rows of Alpaca, unless it or an earlier one
says otherwise; rates that no row is about are usual ones and not tuned. WikiText-2 and held-out instructions are
perplexities after training, of the mean loss over the seeds, with the range of the seeds; "pruned" is that on
WikiText-2 before training. The gain is the difference in loss on WikiText-2 from the row that is changed, over the
seeds that both have, with its 95 % interval over windows. Tokens are those of the training, and memory is the peak of
its process, in GiB. Time is that of pruning and training together, as a multiple of the first row's of the same seed on
the same machine, which did nothing else (at most {percent(str(IDLE))} of its CPU time); it is left out where the two
were computed on different machines. Rows of Alpaca differ in length, so the ratios of two seeds can differ by a tenth.
A name in brackets is one for `sppctl run NAME`, which runs that row, here with `model.compute_dtype=float32`;
`configs/recipes/NAME.yaml` has all its settings.

The rows were chosen by these numbers, so those of the best row are a little too good; the last seed came after the
choice."""
    parts.append(_unseen(records))
    if failed := recipes.diverged(records):
        parts.append(f"Training diverged: {', '.join(failed)}.")
    return "\n\n".join([about, "![Perplexity of each row](results-recipes.svg)", *filter(None, parts)])


def _beyond_chance(pattern: str, records: Records) -> str:
    """Which gains exceed what another seed and other windows change."""
    rows = recipes.ROWS[pattern]
    losses_of = [
        [cells.loss_of(one["texts"][WIKITEXT]) for one in recipes.measured(pattern, row, records).values()]
        for row in rows
    ]
    spread = Spread.of(losses_of)
    if spread is None:
        return ""
    found: dict[str, list[str]] = {"Better": [], "Worse": [], "Undecided": []}
    for row in rows:
        gain = _gain(pattern, row, records)
        if gain is not None:
            is_large = abs(gain.mean) > spread.reach(gain, len(gain.by_seed) / 2)
            found[("Better" if gain.mean < 0 else "Worse") if is_large else "Undecided"].append(row.name)
    verdicts = "; ".join(f"{title.lower()}: {', '.join(names)}" for title, names in found.items() if names)
    return f"""Another seed changes a row's loss on WikiText-2 by {spread.deviation:.3f} (standard deviation, with
{spread.degrees} degrees of freedom). Gains beyond that and the windows (t test at 5 % each): {verdicts}."""


def _unseen(records: Records) -> str:
    """The last seed's rows on texts that had no part in their choice."""
    lines = []
    for pattern, rows in recipes.ROWS.items():
        for row in rows:
            record = recipes.measured(pattern, row, records).get(recipes.SEEDS[-1])
            if record is not None:
                names = [f"{name}-{cells.VALIDATION}" for name in TEXTS]
                lines.append([row.name, percent(pattern), *_perplexities(record, names)])
    dense = records.get(recipes.UNSEEN)
    if not lines or dense is None:
        return ""
    lines.insert(0, ["dense", "", *_perplexities(dense, [f"{WIKITEXT}-{cells.VALIDATION}", "instructions"])])
    return f"""### On other texts

The last seed on the first {recipes.MAX_TOKENS:,} tokens of WikiText-2's validation split and on
{cells.num_rows(recipes.MAX_TOKENS)} other rows of Alpaca, by which no row was chosen:

{table(["row", "pattern", "WikiText-2 validation", "instructions"], lines, texts=2)}"""


def _perplexities(record: Record, texts: Sequence[str]) -> list[str]:
    return [f"{math.exp(cells.loss_of(record['texts'][name])):.2f}" for name in texts]


def _recipe(pattern: str, row: recipes.Row, records: Records) -> list[str]:
    by_seed = recipes.measured(pattern, row, records)
    measured = list(by_seed.values())
    shipped = [f" (`{name}`)" for name, place in recipes.SHIPPED.items() if place == (pattern, row.name)]
    name, title = "".join([row.name, *shipped]), f"{row.title}, after {row.after}" if row.after else row.title
    if not measured:
        return [name, title, "0", *[""] * (len(ROW_HEAD) - 3)]
    values = [_over_seeds([cells.loss_of(one["texts"][name]) for one in measured]) for name in TEXTS]
    starts = [one for seed in by_seed if (one := recipes.start_of(pattern, row, seed, records))]
    before = [cells.loss_of(one["texts"][WIKITEXT]) for one in starts]
    trained = [one["stages"]["train"] for one in measured]
    return [
        name,
        title,
        str(len(measured)),
        f"{math.exp(mean_of(before)):.2f}" if before else "",
        values[0],
        _difference(_gain(pattern, row, records)),
        values[1],
        f"{mean_of(stage['tokens'] for stage in trained):,.0f}",
        f"{mean_of(stage['peak_memory_mb'] for stage in trained) / 1024:.1f}",
        _time(pattern, row, records),
    ]


def _over_seeds(found: Sequence[float]) -> str:
    """The perplexity of the mean of several losses, and the lowest and the highest one."""
    mean, low, high = (f"{math.exp(loss):.2f}" for loss in (mean_of(found), min(found), max(found)))
    return f"{mean} ({low} to {high})" if len(found) > 1 else mean


def _gain(pattern: str, row: recipes.Row, records: Records) -> Interval | None:
    """The loss on WikiText-2 minus that of the row that is changed; None without a common seed."""
    before = recipes.row_of(pattern, row.after)
    return _between(pattern, before, row, records, WIKITEXT) if before else None


def _between(pattern: str, first: recipes.Row, second: recipes.Row, records: Records, text: str) -> Interval | None:
    """The loss of the second row minus that of the first, over their common seeds; None without one."""
    earlier, later = (recipes.measured(pattern, row, records) for row in (first, second))
    pairs = [losses(later[seed], text) - losses(earlier[seed], text) for seed in later if seed in earlier]
    return interval(pairs) if pairs else None


def _against_the_paper(pattern: str, records: Records) -> str:
    """The shipped rows against the paper's method: as published, for longer, and at a better rate."""
    sentences = []
    for paper in recipes.PAPERS:
        found = []
        for name, (place, row_name) in recipes.SHIPPED.items():
            row = recipes.row_of(pattern, row_name) if place == pattern else None
            if row is None or row in recipes.PAPERS:
                continue
            prose, rows = (_between(pattern, paper, row, records, text) for text in TEXTS)
            if prose is not None:
                texts = f"{_difference(prose)} on {TEXTS[WIKITEXT]} and {_difference(rows)} on {TEXTS[INSTRUCTIONS]}"
                found.append(f"`{name}` {texts} ({of_seeds(prose)})")
        sentences += [f"Loss minus that of row {paper.name}: {'; '.join(found)}."] if found else []
    return "\n".join(sentences)


def _time(pattern: str, row: recipes.Row, records: Records) -> str:
    """The time of pruning and training, as a multiple of the first row's; empty without a seed that allows it."""
    ratios = []
    for seed in row.seeds:
        times = [_seconds(pattern, one, seed, records) for one in (row, recipes.ROWS[pattern][0])]
        if all(times) and len({where for where, _ in times}) == 1:
            ratios.append(times[0][1] / times[1][1])
    return f"{mean_of(ratios):.2f}" if ratios else ""


def _seconds(pattern: str, row: recipes.Row, seed: int, records: Records) -> tuple[str, float] | None:
    """Where a row was computed, and its seconds of pruning and training; None if the machine did anything else."""
    trained = records.get(recipes.cell_of(pattern, row, seed).name)
    if trained is None:
        return None
    # a model need not be pruned for the cell that measures it; the first records watched the pruning only there
    pruned = trained if trained.get("pruning") else recipes.start_of(pattern, row, seed, records)
    if pruned is None:
        return None
    watched = [trained, pruned.get("pruning") or pruned]
    # of an interrupted stage, only the time until the last work that was kept is known
    if any(one.get("interrupted") for one in watched) or max(one["others"] for one in watched) > IDLE:
        return None
    places = {f"{one['hardware']} {one.get('boot')}" for one in watched}  # the first records have no boot
    if len(places) > 1:
        return None
    return places.pop(), pruned["stages"]["prune"]["seconds"] + trained["stages"]["train"]["seconds"]


def _tasks(records: Records) -> str:
    measured = {name: record["tasks"] for name, record in records.items() if record["tasks"]}
    if not measured:
        return ""
    groups: dict[str, list[str]] = {}
    for tasks in measured.values():
        for task, one in tasks.items():
            groups.setdefault(one["group"], [])
            groups[one["group"]] += [task] if task not in groups[one["group"]] else []
    rows = []
    for name, tasks in measured.items():
        cells_of = [name]
        for members in groups.values():
            found = [tasks[task] for task in members if task in tasks]
            cells_of.append(_accuracy(found) if len(found) == len(members) else "")
        rows.append(cells_of)
    limits = {
        group: sorted({one["n"] for t in measured.values() for one in t.values() if one["group"] == group})
        for group in groups
    }
    head = ["cell", *(f"{group}, {len(tasks)} tasks" for group, tasks in groups.items())]
    sizes = "; ".join(f"{group}: {', '.join(map(str, sizes))} examples of each" for group, sizes in limits.items())
    return f"""## Tasks

Mean accuracy, with one standard error, on the first examples of each task ({sizes}).

{table(head, rows)}"""


def _accuracy(found: Sequence[Record]) -> str:
    error = math.sqrt(sum((one["stderr"] or 0.0) ** 2 for one in found)) / len(found)
    return f"{mean_of(one['score'] for one in found):.1%} ± {error:.1%}"


def _machines(records: Records) -> str:
    """Hardware, versions and cost of the cells."""
    used: dict[tuple[str, str], list[float]] = {}
    for record in records.values():
        versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        used.setdefault((record["hardware"], versions), []).append(record["seconds"])
    rows = [[hardware, versions, str(len(s)), f"{sum(s) / 3600:.1f}"] for (hardware, versions), s in used.items()]
    if not rows:
        return ""
    return f"## Machines\n\n{table(['hardware', 'versions', 'cells', 'hours'], rows, texts=2)}"
