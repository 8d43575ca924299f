"""The cells of the study: what is pruned, trained and measured in each, and in which order."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sppctl.config.yaml12 import read_yaml

Record = dict[str, Any]  # the content of a committed file, see record.py
Records = Mapping[str, Record]  # by the name of the cell

PRUNERS = ("wanda", "sparsegpt")
PATTERNS = ("0.5", "2:4", "0.75", "2:8")
TUNED_AT = {"0.5": "2:4", "2:4": "2:4", "0.75": "0.75", "2:8": "0.75"}  # the pattern at which the rate was tuned
CLAIMED_AT = ("0.75", "2:8")  # where the paper has SPP beat DSnoT and LoRA: with every seed, elsewhere with the first
TRAINED = {"lora": ("train.method=lora", "merge.mask=reapply"), "spp": ("train.method=spp",)}
ABLATIONS = {
    "no beta": ("train.beta=false",),
    "r = 4": ("train.rank=4",),
    "r = 8": ("train.rank=8",),
    "r = 32": ("train.rank=32",),
    "init random": ("train.init=random",),
    "init ones": ("train.init=ones",),
}
SHARED: dict[str, Any] = read_yaml(Path(__file__).resolve().parent / "study.yaml")  # settings of all cells
OF_OTHER_STEPS = ("no beta", "init random", "init ones")  # where a step moves a weight much further: with own rates
VALIDATION = "validation"  # the texts on which rates are tuned; all others are measured on TEST
TEST = "test"


@dataclass(frozen=True)
class Scale:
    """How much is computed."""

    steps: int  # of training
    max_tokens: int  # of each text
    pruners: tuple[str, ...]
    patterns: tuple[str, ...]
    seeds: tuple[int, ...]
    rates: dict[str, tuple[float, ...]]  # trials of the learning rate by method or ablation
    ablated: tuple[str, ...]  # patterns of the ablations
    tasks: tuple[int, int] | None  # first examples of each zero-shot task and of each subject of MMLU
    with_recipes: bool = True

    @property
    def validation_tokens(self) -> int:
        """Of the text of prose on which rates are tuned."""
        return self.max_tokens // 2


FULL = Scale(
    steps=40,
    max_tokens=40_960,
    pruners=PRUNERS,
    patterns=PATTERNS,
    seeds=(0, 1, 2),
    rates={
        "lora": (3e-4, 1e-3, 3e-3, 1e-2),
        "spp": (3e-3, 1e-2, 3e-2, 1e-1),
        **dict.fromkeys(OF_OTHER_STEPS, (1e-3, 3e-3, 1e-2, 3e-2)),
    },
    ablated=("2:4", "0.75"),
    tasks=(50, 2),
)
QUICK = Scale(
    steps=20,
    max_tokens=8_192,
    pruners=("wanda",),
    patterns=("2:4", "0.75"),
    seeds=(0,),
    rates={"lora": (1e-3,), "spp": (1e-2,)},
    ablated=(),
    tasks=None,
    with_recipes=False,
)


@dataclass(frozen=True)
class Cell:
    """One measured checkpoint."""

    name: str  # of its record
    seed: int
    pruning: tuple[str, ...] = ()  # settings of `sppctl prune`; none: the dense model
    mask_of: tuple[str, ...] = ()  # settings of the pruning whose zeros DSnoT starts from
    training: tuple[str, ...] = ()  # settings of `sppctl train` and `merge`; none: the pruned model
    texts: str = TEST
    max_tokens: int = FULL.max_tokens
    tasks: tuple[int, int] | None = None
    also_unseen: bool = False  # on the VALIDATION texts too, by which no recipe was chosen

    @property
    def settings(self) -> Record:
        """What its numbers depend on, as plain data: a record of other settings is not one of this cell."""
        used = {"model", "eval", *({"prune"} if self.pruning else ()), *({"train"} if self.training else ())}
        shared = {section: settings for section, settings in SHARED.items() if section in used}
        content: Record = json.loads(json.dumps(asdict(self) | {"shared": shared}))
        return content if self.also_unseen else {k: v for k, v in content.items() if k != "also_unseen"}


def num_rows(max_tokens: int) -> int:
    """The number of held-out rows of instructions that are measured beside so many tokens of prose."""
    return max(1, min(200, max_tokens // 200))


def slug(pattern: str) -> str:
    """A pattern in the name of a file."""
    return pattern.replace(":", "of").replace("0.", "") + ("0" if pattern == "0.5" else "")


def all_cells(scale: Scale, records: Records) -> Iterator[Cell]:
    """The cells in the order in which they are computed; those whose learning rate is not known yet are left out."""
    yield Cell("dense", 0, max_tokens=scale.max_tokens, tasks=scale.tasks)
    yield from _trials(scale)
    for seed in scale.seeds:
        for pattern in scale.patterns:
            for pruner in scale.pruners:
                yield from _compared(scale, records, pruner, pattern, seed)
        for pattern in scale.ablated:
            yield from _ablations(scale, records, pattern, seed)
    if scale.with_recipes:
        import recipes  # it describes its rows by cells

        yield from recipes.all_cells()


def trial_name(method: str, pattern: str, rate: float) -> str:
    """The cell in which a learning rate is tried."""
    return f"rate-{_in_a_name(method)}-{slug(pattern)}-{rate:g}"


def cell_name(pruner: str, pattern: str, kind: str, seed: int) -> str:
    """The cell of a pruner, a pattern and what followed: pruned, dsnot, a method or an ablation."""
    return f"{pruner}-{slug(pattern)}-{_in_a_name(kind)}-{seed}"


def _in_a_name(kind: str) -> str:
    """A method or an ablation in the name of a file."""
    return kind.replace(" = ", "").replace(" ", "-")


def chosen_rate(scale: Scale, records: Records, method: str, pattern: str) -> float | None:
    """The trial with the lowest loss on the validation texts; None if trials are missing."""
    rates, place = scale.rates[method], TUNED_AT[pattern]
    if len(rates) == 1:
        return rates[0]
    trials = {rate: records.get(trial_name(method, place, rate)) for rate in rates}
    losses = {rate: _validation(record) for rate, record in trials.items() if record is not None}
    return min(losses, key=losses.__getitem__) if len(losses) == len(rates) else None


def _validation(record: Record) -> float:
    """The mean loss over the validation texts, each with the same weight; infinite if one has none."""
    losses = [loss_of(text) for text in record["texts"].values()]
    return sum(losses) / len(losses)


def loss_of(text: Record) -> float:
    """The mean loss on a text, in nats per token; infinite if it has none."""
    return math.inf if text["nll"] is None else float(text["nll"])


def pruning(pruner: str, pattern: str) -> tuple[str, ...]:
    """The settings of a pruning."""
    return (f"prune.method={pruner}", f"prune.pattern={pattern}")


def run_name(cell: Cell) -> str:
    """The name of the directory with its pruned checkpoint."""
    values = [setting.split("=")[1] for setting in (*cell.pruning, *cell.mask_of)]
    return "-".join(value.replace(":", "of") for value in (*values, str(cell.seed)))


def _training(kind: str) -> tuple[str, ...]:
    """The settings of a method, or of SPP with an ablation."""
    return TRAINED[kind] if kind in TRAINED else (*TRAINED["spp"], *ABLATIONS[kind])


def _steps(scale: Scale, rate: float) -> tuple[str, ...]:
    return (f"train.max_steps={scale.steps}", f"train.lr={rate:g}")


def _trials(scale: Scale) -> Iterator[Cell]:
    for pattern in dict.fromkeys(TUNED_AT[pattern] for pattern in scale.patterns):
        for method, rates in scale.rates.items():
            for rate in rates if len(rates) > 1 else ():
                training = (*_training(method), *_steps(scale, rate))
                name = trial_name(method, pattern, rate)
                yield Cell(name, 0, pruning("wanda", pattern), (), training, VALIDATION, scale.validation_tokens)


def _compared(scale: Scale, records: Records, pruner: str, pattern: str, seed: int) -> Iterator[Cell]:
    """Pruned, DSnoT, LoRA with the mask put back, and SPP; the second and third only where they decide a claim."""
    first = pruning(pruner, pattern)
    is_compared = seed == scale.seeds[0] or pattern in CLAIMED_AT
    tasks = scale.tasks if pruner == "wanda" and seed == 0 and TUNED_AT[pattern] == pattern else None
    yield Cell(cell_name(pruner, pattern, "pruned", seed), seed, first, max_tokens=scale.max_tokens, tasks=tasks)
    if is_compared:
        dsnot = pruning("dsnot", pattern)
        yield Cell(cell_name(pruner, pattern, "dsnot", seed), seed, dsnot, first, max_tokens=scale.max_tokens)
    for method in [one for one in TRAINED if one in scale.rates]:
        rate = chosen_rate(scale, records, method, pattern)
        if rate is not None and (is_compared or method == "spp"):
            training = (*_training(method), *_steps(scale, rate))
            name = cell_name(pruner, pattern, method, seed)
            yield Cell(name, seed, first, (), training, TEST, scale.max_tokens, tasks)


def _ablations(scale: Scale, records: Records, pattern: str, seed: int) -> Iterator[Cell]:
    """SPP with one setting changed, at SPP's learning rate unless it has trials of its own."""
    for kind in ABLATIONS:
        rate = chosen_rate(scale, records, kind if kind in scale.rates else "spp", pattern)
        if rate is not None:
            training = (*_training(kind), *_steps(scale, rate))
            name = cell_name("wanda", pattern, kind, seed)
            yield Cell(name, seed, pruning("wanda", pattern), (), training, TEST, scale.max_tokens)


def current(scale: Scale, records: Records) -> dict[str, Record]:
    """The records of the cells as they are now; rates are chosen by the trials among them."""
    found: dict[str, Record] = {}
    for cell in all_cells(scale, found):  # trials come before the cells whose rates they decide
        if is_of(cell, records.get(cell.name)):
            found[cell.name] = records[cell.name]
    return found


def missing(scale: Scale, records: Records) -> list[Cell]:
    """The cells without a record of their settings, as far as they are known."""
    known = current(scale, records)
    return [cell for cell in all_cells(scale, known) if cell.name not in known]


def is_of(cell: Cell, record: Record | None) -> bool:
    """Whether a record has the cell's settings."""
    return record is not None and record["cell"] == cell.settings


def count(scale: Scale) -> int:
    """The number of all cells, whatever is known."""
    known = {trial_name(method, pattern, rate): {"texts": {"": {"nll": 0.0}}} for method, pattern, rate in _all(scale)}
    return sum(1 for _ in all_cells(scale, known))


def _all(scale: Scale) -> Iterable[tuple[str, str, float]]:
    return [(m, p, rate) for m, rates in scale.rates.items() for p in set(TUNED_AT.values()) for rate in rates]
