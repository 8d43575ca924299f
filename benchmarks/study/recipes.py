"""The search for the best recipe: each row changes one thing of an earlier row, for the same number of steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from cells import TEST, Cell, slug

Settings = dict[str, str]
STEPS = 120
SEEDS = (0, 1, 2)
MAX_TOKENS = 40_960
# the settings of docs/training.md's table
PAPER = {
    "prune.method": "wanda",
    "prune.calibration.seq_len": "1024",
    "train.method": "spp",
    "train.lr": "1e-2",
    "train.max_steps": str(STEPS),
}


@dataclass(frozen=True)
class Row:
    """One row of the table of recipes."""

    name: str
    title: str  # what is new
    changes: Settings = field(default_factory=dict)
    after: str | None = None  # the row that it changes; None: the paper's settings
    seeds: tuple[int, ...] = (0,)


ROWS: dict[str, tuple[Row, ...]] = {
    "2:4": (Row("paper", "the paper's: Wanda, then SPP on Alpaca", seeds=SEEDS),),
    "0.75": (Row("paper", "the paper's: Wanda, then SPP on Alpaca", seeds=SEEDS),),
}


def settings_of(pattern: str, row: Row) -> Settings:
    """All settings of a row."""
    earlier = next((one for one in ROWS[pattern] if one.name == row.after), None)
    before = settings_of(pattern, earlier) if earlier else {**PAPER, "prune.pattern": pattern}
    return before | row.changes


def cell_of(pattern: str, row: Row, seed: int) -> Cell:
    """The trained cell of a row."""
    settings = settings_of(pattern, row)
    pruning = tuple(f"{key}={value}" for key, value in settings.items() if key.startswith("prune."))
    training = tuple(f"{key}={value}" for key, value in settings.items() if not key.startswith("prune."))
    return Cell(f"recipe-{slug(pattern)}-{row.name}-{seed}", seed, pruning, (), training, TEST, MAX_TOKENS)


def all_cells() -> Iterator[Cell]:
    """The cells of all rows, the first seed first; before them the pruned models that they train."""
    pruned = {}
    for seed in SEEDS:
        for pattern, rows in ROWS.items():
            for row in rows:
                if seed in row.seeds:
                    cell = cell_of(pattern, row, seed)
                    if cell.pruning not in pruned:
                        pruned[cell.pruning] = f"recipe-{slug(pattern)}-{row.name}-pruned-{seed}"
                        yield Cell(pruned[cell.pruning], seed, cell.pruning, max_tokens=MAX_TOKENS)
                    yield cell
