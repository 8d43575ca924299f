"""The search for the best recipe: each row changes one thing of an earlier row, for the same number of steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import cells
from cells import TEST, VALIDATION, Cell, Record, Records, slug

Settings = dict[str, str]
UNSEEN = "dense-validation"  # the dense model on the texts by which no row was chosen
PREFIX = "recipe-"  # of the names of cells
STEPS = 120
SEEDS = (0, 1, 2)
MAX_TOKENS = 40_960
PAPER = {
    "prune.method": "wanda",
    "train.method": "spp",
    "train.lr": "1e-2",
    "train.max_steps": str(STEPS),
}


@dataclass(frozen=True)
class Row:
    """One row of the table of recipes."""

    name: str
    title: str  # what is new
    changes: Mapping[str, str | None] = field(default_factory=dict)  # None: without this setting of the earlier row
    after: str | None = None  # the row that it changes; None: the paper's settings
    seeds: tuple[int, ...] = (0,)


RECONSTRUCTED = {
    "prune.reconstruct_epochs": "4",
    "prune.reconstruct_lr": "3e-4",
    "prune.reconstruct_batch_size": "2",
    "prune.reconstruct_scheduler": "cosine",
    "prune.reconstruct_loss": "token",
}
DENSE_TARGET = {"prune.reconstruct_target": "dense"}
FULL = {"train.method": "masked_full", "train.lr": "5e-4"}
# 144 steps of 4 rows have about as many tokens as 120 steps of 8 rows of Alpaca, of which few have more than 256
MIXED = {
    "train.data.dataset": "{alpaca: 1, c4: 1}",
    "train.data.split": "train[:12000]",
    "train.data.seq_len": "256",
    "train.data.packing": "true",
    "train.data.group_by_length": "false",
    "train.batch_size": "4",
    "train.micro_batch_size": "4",
    "train.max_steps": "144",
}
# as many tokens in fewer steps, because rows of text are longer
TEXT = {"train.data.dataset": "{alpaca: 1, c4: 4}", "train.max_steps": "115"}
DISTILLED = {"train.distill.teacher": "base", "train.distill.weight": "0.5", "train.distill.tokens": "text"}
TUNED = {"train.lr": "3e-2"}  # SPP's best rate in the trials
SPP = {"train.method": "spp", **TUNED}
REFRESH = {"train.refresh.steps": "20"}
HIRA = {"train.method": "hira", "train.lr": "1e-2"}
LORA = {"train.method": "lora", "train.rank": "8", "train.lr": "3e-3"}  # the best rate of the trials at 2:4, of rank 16
SMALLER = {
    "train.batch_size": "2",
    "train.micro_batch_size": "2",
    "train.max_steps": "288",
    "train.lr": "3.5e-4",
}
LONGER = {"train.max_steps": "288"}
FASTER = {"train.max_steps": "72", **dict.fromkeys(DISTILLED)}
UNRECONSTRUCTED = dict.fromkeys(RECONSTRUCTED)
PERMUTED = {"prune.permute_channels": "true"}
WINDOWS = {"prune.calibration.samples": "128", "prune.reconstruct_epochs": "2"}  # as many steps of reconstruction
HEALED = (  # the rows that both patterns share
    Row("reconstructed", "4 epochs of block reconstruction", RECONSTRUCTED),
    Row("full", "every kept weight is trained (masked_full)", FULL, "reconstructed"),
    Row("mixed", "every second row is 256 tokens of plain text (C4); 144 steps of 4 rows", MIXED, "full"),
    Row("distilled", "the dense model teaches on the plain text", DISTILLED, "mixed"),
    Row("spp", "SPP instead of every kept weight", SPP, "distilled"),
    Row("rate", "twice the learning rate", {"train.lr": "1e-3"}, "distilled"),
    Row("unreconstructed", "no block reconstruction", UNRECONSTRUCTED, "distilled"),
)
PAPERS = (
    Row("paper", "the paper's: Wanda, then SPP on Alpaca", seeds=SEEDS),
    Row("paper-longer", "400 steps: about the time of the best rows", {"train.max_steps": "400"}, "paper"),
    Row("paper-rate", "SPP's best learning rate of the trials", TUNED, "paper"),
)
METHODS = (
    Row("refresh", "the mask is chosen again after every 20 steps of the first half", REFRESH, "paper-rate"),
    Row("lora", "LoRA of rank 8 instead, with the mask put back", {**LORA, "merge.mask": "reapply"}, "paper-rate"),
    Row("masked-lora", "the LoRA masked in every step", {"train.method": "masked_lora", "merge.mask": None}, "lora"),
    Row("paper-hira", "HiRA instead, at 1e-2", HIRA, "paper-rate"),
    Row("paper-full", "every kept weight instead, at 5e-4 (masked_full)", FULL, "paper-rate"),
    Row("ste", "all weights behind a mask that follows them (STE)", {"train.method": "ste"}, "paper-full"),
)
SPARSEGPT = Row("sparsegpt", "SparseGPT instead of Wanda", {"prune.method": "sparsegpt"}, "paper-rate")
ROWS: dict[str, tuple[Row, ...]] = {
    "2:4": (
        *PAPERS,
        *METHODS,
        SPARSEGPT,
        *(replace(row, after=row.after or "sparsegpt") for row in HEALED),
        Row("sublayers", "attention and MLP reconstructed apart", {"prune.reconstruct_unit": "sublayer"}, "distilled"),
        Row("dense-target", "reconstruction towards the dense model's own stream", DENSE_TARGET, "distilled"),
        Row("longer", "twice the steps", LONGER, "distilled"),
        Row("smaller", "twice the steps of half the rows, learning rate 3.5e-4", SMALLER, "distilled"),
        Row("text", "four rows of plain text for each instruction", TEXT, "distilled"),
        Row("hidden", "the teacher's hidden states too", {"train.distill.hidden": "1"}, "distilled"),
        Row("hira", "HiRA instead of every kept weight", HIRA, "distilled"),
        Row("fast", "half the steps, no teacher", FASTER, "unreconstructed"),
        Row("permuted", "channels reordered before pruning", PERMUTED, "distilled"),
        Row("windows", "twice the calibration windows, half the epochs of reconstruction", WINDOWS, "permuted", SEEDS),
        Row("permuted-fast", "channels reordered before pruning", PERMUTED, "fast", SEEDS),
    ),
    "0.75": (
        *PAPERS,
        SPARSEGPT,
        Row("owl", "blocks with fewer outliers lose more (OWL)", {"prune.allocation": "owl"}, "sparsegpt"),
        Row("narrow", "zeros chosen in 16 columns at a time, not 128", {"prune.block_size": "16"}, "owl"),
        *(replace(row, after=row.after or "narrow") for row in HEALED),
        Row("windows", "twice the calibration windows, half the epochs of reconstruction", WINDOWS, "distilled", SEEDS),
    ),
}
SHIPPED = {  # configs/recipes/NAME.yaml: the pattern and the row that it repeats
    "best-2of4": ("2:4", "windows"),
    "best-75": ("0.75", "windows"),
    "fast-2of4": ("2:4", "permuted-fast"),
    "paper-2of4": ("2:4", "paper"),
}


def row_of(pattern: str, name: str | None) -> Row | None:
    """The row of that name; None without one."""
    return next((row for row in ROWS[pattern] if row.name == name), None)


def with_earlier(pattern: str, rows: Sequence[Row]) -> list[Row]:
    """These rows and those that they change, directly or not, in the order of the table."""
    names = {row.name for row in rows}
    for row in reversed(ROWS[pattern]):  # a row follows the one that it changes
        if row.name in names and row.after:
            names.add(row.after)
    return [row for row in ROWS[pattern] if row.name in names]


def settings_of(pattern: str, row: Row) -> Settings:
    """All settings of a row."""
    earlier = row_of(pattern, row.after)
    before = settings_of(pattern, earlier) if earlier else {**PAPER, "prune.pattern": pattern}
    return {key: value for key, value in {**before, **row.changes}.items() if value is not None}


def cell_of(pattern: str, row: Row, seed: int) -> Cell:
    """The trained cell of a row; the last seed's is also measured on texts by which no row was chosen."""
    pruning, training = _stages(pattern, row)
    name, unseen = f"{PREFIX}{slug(pattern)}-{row.name}-{seed}", seed == SEEDS[-1]
    return Cell(name, seed, pruning, (), training, TEST, MAX_TOKENS, also_unseen=unseen)


def pruned_of(pattern: str, row: Row, seed: int) -> Cell | None:
    """The pruned model that a row trains, one for all rows that prune alike; None if the grid has it."""
    pruning, _ = _stages(pattern, row)
    if pruning in (cells.pruning(pruner, pattern) for pruner in cells.PRUNERS):
        return None
    first = next(one for one in ROWS[pattern] if _stages(pattern, one)[0] == pruning)
    return Cell(f"{PREFIX}{slug(pattern)}-{first.name}-pruned-{seed}", seed, pruning, max_tokens=MAX_TOKENS)


def start_of(pattern: str, row: Row, seed: int, records: Records) -> Record | None:
    """The record of the pruned model that a row trains, if there is one."""
    own, method = pruned_of(pattern, row, seed), settings_of(pattern, row)["prune.method"]
    return records.get(own.name if own else cells.cell_name(method, pattern, "pruned", seed))


def _stages(pattern: str, row: Row) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The settings of pruning, and those of training."""
    settings = [f"{key}={value}" for key, value in settings_of(pattern, row).items()]
    pruning = tuple(one for one in settings if one.startswith("prune."))
    return pruning, tuple(one for one in settings if not one.startswith("prune."))


def measured(pattern: str, row: Row, records: Records) -> dict[int, Record]:
    """The records of a row by seed, as far as they exist and have numbers."""
    found = {seed: records.get(cell_of(pattern, row, seed).name) for seed in row.seeds}
    return {seed: record for seed, record in found.items() if record is not None and "diverged" not in record}


def diverged(records: Records) -> list[str]:
    """The names of the cells of rows whose training diverged."""
    return [name for name, record in records.items() if name.startswith(PREFIX) and "diverged" in record]


def all_cells() -> Iterator[Cell]:
    """The cells of all rows, the first seed first; before them the pruned models that they train."""
    yield Cell(UNSEEN, 0, texts=VALIDATION, max_tokens=MAX_TOKENS)
    for seed in SEEDS:
        for pattern, rows in ROWS.items():
            trained = [row for row in rows if seed in row.seeds]
            both = [cell(pattern, row, seed) for row in trained for cell in (pruned_of, cell_of)]
            yield from {cell.name: cell for cell in both if cell}.values()
