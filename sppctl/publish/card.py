"""The model card of a checkpoint or an adapter: README.md, written from the records of its run.

The card is not among the hashed files of a stage, because results are measured after it is published: each command that
measures or reports writes it again. A card without the line MARK is somebody's own and is left alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sppctl import records
from sppctl.config.yaml12 import dump_yaml
from sppctl.data.texts import is_hub_id
from sppctl.evaluate.results import Json
from sppctl.evaluate.values import Quantity
from sppctl.files import disk
from sppctl.files.names import DIRECTORIES, FOREIGN, RECORD
from sppctl.model.refreshed import REFRESHED
from sppctl.publish import card_data
from sppctl.publish.citations import PRUNING, SPP
from sppctl.records import MergeRecord, PruneRecord, StageRecord, TrainRecord
from sppctl.report import provenance, tables
from sppctl.report import records as report_records
from sppctl.report.study import Row, RunStudy, headlines, settings_of
from sppctl.report.text import escape, grid

TEMPLATE = Path(__file__).with_name("card.md.jinja")
MARK = "<!-- Written by sppctl from the records of its run. Delete this line to keep a text of your own. -->"
TITLES = {"magnitude": "magnitude", "wanda": "Wanda", "sparsegpt": "SparseGPT", "dsnot": "DSnoT"}
TITLES |= {"spp": "SPP", "lora": "LoRA", "hira": "HiRA", "masked_lora": "masked LoRA", "ste": "STE"}
PATHS = {"path", "dataset", "mask_from", "teacher", "perplexity"}  # keys whose values may be places on one machine
OWN_METHODS = {"SPP", "MASKED_LORA", "MASKED_FULL", "STE"}  # types of adapters that PEFT has from sppctl


# --- cards of a run ---------------------------------------------------------------------------------------------------


def write_new(run_dir: Path, record: StageRecord[Any], directory: Path) -> None:
    """Writes the card of a stage that is about to be published, in the place of any that libraries left there.

    Args:
        run_dir: of the run, with the stages before this one.
        record: of the stage.
        directory: that holds its files.
    """
    stages = {}
    for stage, folder in DIRECTORIES.items():
        if stage == record.stage:
            stages[stage] = record
            break
        if (run_dir / folder / RECORD).is_file():
            stages[stage] = records.read(run_dir / folder / RECORD, stage)
    study = RunStudy(str(run_dir), None, stages, {})
    disk.write(directory / card_data.CARD, render(study, record.stage))


def update(run: RunStudy) -> None:
    """Writes the cards of a run with the results that it has now; cards of other people's making stay."""
    for stage in run.stages:
        directory = Path(run.directory) / DIRECTORIES[stage]
        if is_ours(directory) and os.access(directory, os.W_OK):
            disk.write(directory / card_data.CARD, render(run, stage))


def is_ours(directory: Path) -> bool:
    """Whether a directory has no card, or one that sppctl has written."""
    path = directory / card_data.CARD
    return not os.path.lexists(path) or (path.is_file() and MARK in path.read_text(encoding="utf-8", errors="replace"))


def study_of(run_dir: Path) -> RunStudy:
    """What a run has recorded, as far as cards show it; UserError if a record is damaged."""
    stages, results, _ = report_records.read(run_dir)
    return RunStudy(str(run_dir), None, stages, results)


def render(run: RunStudy, stage: str, repository: str | None = None, pruned: str | None = None) -> str:
    """The text of a card.

    Args:
        run: that the stage belongs to.
        stage: prune, train or merge.
        repository: hub id that it is uploaded to; None: a placeholder.
        pruned: hub id of the pruned weights that an adapter belongs to; None: they are not on the hub.
    """
    from huggingface_hub import ModelCard

    upto = list(DIRECTORIES)[: list(DIRECTORIES).index(stage) + 1]
    stages = {name: run.stages[name] for name in upto if name in run.stages}
    if stage == "merge" and FOREIGN in stages[stage].inputs:
        stages.pop("train", None)  # of another adapter
    rows = _without_places(run, [row for row in run.rows if row.checkpoint in ("base", "pruned", DIRECTORIES[stage])])
    run = replace(run, stages=stages)
    name = repository or f"OWNER/{_short_name(run, stage)}"
    card = ModelCard.from_template(
        card_data.metadata(run, stage, rows, name.rpartition("/")[2], pruned),
        template_path=str(TEMPLATE),
        mark=MARK,
        title=escape(_title(run, stage)),
        summary=_summary(run, stage),
        made=[escape(line) for line in (*_of_base(run), *provenance.facts(run), *_warnings(run))],
        results=_results(rows, DIRECTORIES[stage]),
        usage=_usage(run, stage, name, pruned),
        costs="\n".join(grid(provenance.stage_table(run))),
        settings=dump_yaml(_public(run)).rstrip().replace("```", "'''"),
        versions=escape(", ".join(f"{name} {number}" for name, number in run.stages[stage].versions.items())),
        citations=[f"```bibtex\n{entry}\n```" for entry in _citations(run)],
    )
    return str(card).rstrip() + "\n"


# --- text -------------------------------------------------------------------------------------------------------------


def _short_name(run: RunStudy, stage: str) -> str:
    """A name for a repository."""
    base = card_data.base_model(run)
    parts = [base.name.rpartition("/")[2].removesuffix(".gguf") if base is not None else "model"]
    parts += [run.stages[name].metrics.method for name in ("prune", "train") if name in run.stages]
    return re.sub(r"[^\w.-]+", "-", "-".join(parts)) + ("-adapter" if stage == "train" else "")


def _title(run: RunStudy, stage: str) -> str:
    base = card_data.base_model(run)
    name = base.name.rpartition("/")[2] if base is not None else "A language model"
    pruned = f"pruned {run.stages['prune'].metrics.pattern}" if "prune" in run.stages else "pruned"
    method = _method(run, "train")
    if stage == "prune":
        return f"{name}, {pruned}"
    return (
        f"{method} adapter for {name}, {pruned}" if stage == "train" else f"{name}, {pruned}, retrained with {method}"
    )


def _of_base(run: RunStudy) -> Iterator[str]:
    """What is to know of the dense model: an unknown licence, and that it had been quantised."""
    base = card_data.base_model(run)
    if base is None or not base.license:
        yield "base: its licence is unknown; ask its authors before you publish this model"
    model = run.stages["prune"].settings.get("model", {}) if "prune" in run.stages else {}
    if name := model.get("gguf_file"):
        kind = re.search(r"(?:^|[-._])(I?Q\d\w*|BF16|F16|F32)(?=[-.])", name, re.IGNORECASE)
        quantisation = f", quantised to {kind[1]}" if kind and "Q" in kind[1].upper() else ""
        yield f"base: unpacked from a GGUF file, {Path(name).name}{quantisation}"


def _warnings(run: RunStudy) -> list[str]:
    return [f"warning: {text}" for text in provenance.unmoved(run)]


def _method(run: RunStudy, stage: str) -> str:
    name = run.stages[stage].metrics.method if stage in run.stages else "an adapter"
    return TITLES.get(name, name.replace("_", " "))


def _summary(run: RunStudy, stage: str) -> str:
    base = card_data.base_model(run)
    name = "A dense model" if base is None else escape(base.name)
    if base is not None and base.is_on_hub:
        name = f"[{name}](https://huggingface.co/{base.name})"
    text = name
    if "prune" in run.stages:
        pruned: PruneRecord = run.stages["prune"].metrics
        text += (
            f" was pruned by {escape(_method(run, 'prune'))} to {escape(pruned.pattern)}: {pruned.sparsity:.2%} of "
            f"the weights of {pruned.matrices} matrices are zero."
        )
        if any(layer.pattern.is_structured for layer in pruned.layers):
            text += " In a pattern N:M, N weights of every M consecutive inputs are kept."
    if stage == "prune":
        return f"{text} It was not retrained. {SPEED}"
    trained = escape(_method(run, "train"))
    if stage == "train":
        return f"{text} This {trained} adapter was trained on the pruned weights and belongs to them, not to the base."
    merged: MergeRecord = run.stages["merge"].metrics
    zeros = f"and all {merged.zeros:,} zeros are verified to be zero still"
    if not merged.pattern_unchanged:
        zeros = f"which filled {merged.filled_zeros:,} zeros: {merged.sparsity:.2%} of the weights are zero now"
    return f"{text} It was retrained with {trained} and merged, {zeros}. {SPEED}"


SPEED = (
    "The file format is that of a dense model: the zeros are stored, and they are multiplied like other weights unless "
    "the software has kernels for them (2:4 on NVIDIA GPUs from Ampere on)."
)


def _results(rows: Sequence[Row], own: str) -> str:
    if not any(row.values for row in rows):
        return "Nothing has been measured yet."
    blocks = ["\n".join(grid(tables.table(rows)))]
    for row in (row for row in rows if row.checkpoint == own):
        shares = [(one, row.recovered[one]) for one in headlines([row]) if one in row.recovered]
        texts = [f"{share:.1%} ({escape(quantity.label)})" for quantity, share in shares[:3]]
        if texts:
            blocks.append(f"Share of the gap between pruned and base that is recovered: {', '.join(texts)}.")
    blocks.append("A number that was measured on a part of its data says so: a limit of examples, or the first tokens.")
    return "\n\n".join(blocks)


def _usage(run: RunStudy, stage: str, repository: str, pruned: str | None) -> list[str]:
    load = "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
    if stage != "train":
        return [
            "```python\n"
            f"{load}\n"
            f'model = AutoModelForCausalLM.from_pretrained("{repository}", dtype="auto")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{repository}")\n'
            "```"
        ]
    trained: TrainRecord = run.stages["train"].metrics
    if trained.refresh is not None:
        return [
            "Training moved the mask and with it some of the base weights, which are in "
            f"`{REFRESHED}` beside the adapter and which PEFT does not load. `sppctl merge` puts both together."
        ]
    kind = trained.method.upper()
    first = "import sppctl  # registers the adapter's type with PEFT\n" if kind in OWN_METHODS else ""
    code = (
        f"```python\n{first}from peft import PeftModel\n{load}\n"
        f'base = "{pruned or "OWNER/PRUNED"}"  # the pruned weights, not the dense ones\n'
        'model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")\n'
        "tokenizer = AutoTokenizer.from_pretrained(base)\n"
        f'model = PeftModel.from_pretrained(model, "{repository}")\n```'
    )
    if kind not in OWN_METHODS:
        return [code]
    return [
        code,
        f"`import sppctl` (`pip install sppctl`) registers the type of this adapter, `{kind}`, with PEFT, which stops "
        f"with `KeyError: '{kind}'` without it. `model.merge_and_unload()` gives a plain transformers model with the "
        "zeros of the pruned one.",
    ]


def _citations(run: RunStudy) -> list[str]:
    keys = []
    if "prune" in run.stages:
        settings = run.stages["prune"].settings.get("prune", {})
        keys = [run.stages["prune"].metrics.method, str(settings.get("allocation"))]
    return [SPP] * ("train" in run.stages) + [PRUNING[key] for key in keys if key in PRUNING]


# --- without places on the machine ------------------------------------------------------------------------------------


def _without_places(run: RunStudy, rows: Sequence[Row]) -> list[Row]:
    """Rows whose texts and dense models are named by the last parts of their paths, numbered where these are equal."""
    texts = [text for results in run.checkpoints.values() for text in results.texts]
    names = [name for text in texts for name in (text.measure.text, text.numbers.compared_with) if name is not None]
    shown: dict[str, str] = {}
    for name in dict.fromkeys(names):
        same = list(map(place, shown)).count(place(name))
        shown[name] = place(name) + (f" ({same + 1})" if same else "")

    def renamed(quantity: Quantity) -> Quantity:
        title = quantity.title
        for name in sorted(shown, key=len, reverse=True):  # no name is replaced inside of another
            title = title.replace(name, shown[name]) if "/" in name else title
        return replace(quantity, title=title)

    return [
        replace(
            row,
            values={
                renamed(quantity): replace(value, quantity=renamed(quantity)) for quantity, value in row.values.items()
            },
            recovered={renamed(quantity): share for quantity, share in row.recovered.items()},
        )
        for row in rows
    ]


def _public(run: RunStudy) -> Json:
    """The settings of the stages; of paths their last parts."""
    shown: Json = _shortened(settings_of(run.stages))
    return shown


def _shortened(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {place(name) if key in PATHS else name: _shortened(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [_shortened(inner, key) for inner in value]
    return place(value) if key in PATHS and isinstance(value, str) else value


def place(name: str) -> str:
    """The last part of a path; a name or a hub id as it is."""
    return name if is_hub_id(name) or "/" not in name else Path(name).name
