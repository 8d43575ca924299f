"""The front matter of model cards: what the hub shows of a model and finds it by."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sppctl.config.settings import ModelConfig, names_of
from sppctl.config.yaml12 import parse_yaml
from sppctl.data.texts import HUB_ROWS, HUB_TEXTS, is_hub_id
from sppctl.evaluate.results import Json
from sppctl.evaluate.values import Kind
from sppctl.files.names import DIRECTORIES
from sppctl.records import BaseModel, MergeRecord, PruneRecord
from sppctl.report.study import Row, RunStudy
from sppctl.report.verdict import FEW_SAMPLES

CARD = "README.md"
BIGGEST = 1 << 20  # bytes of a card that is read
LICENSE = {"license": r"[\w.-]{1,64}", "license_name": r"[\w. -]{1,64}", "license_link": r"[!-~]{1,200}"}


# --- the dense model --------------------------------------------------------------------------------------------------


def base_of(model: ModelConfig, directory: Path) -> BaseModel:
    """What a card says of the dense model: its hub id, or its name here, and its licence.

    Args:
        model: the section of the configuration.
        directory: that ``model.path`` means.
    """
    path, snapshot = model.path or "", directory.absolute()
    cached = re.fullmatch(r"models--([\w.-]+?)(?:--([\w.-]+))?", snapshot.parent.parent.name)
    if snapshot.parent.name == "snapshots" and cached:  # of the hub, perhaps named by its place in the cache
        return BaseModel("/".join(filter(None, cached.groups())), True, snapshot.name, _license(directory))
    name = Path(model.gguf_file or path.removeprefix("package:")).name
    return BaseModel(name, False, license=_license(directory))


def _license(directory: Path) -> dict[str, str]:
    """The licence in the front matter of a model's card, else in its configuration; empty where neither has one."""
    found: Json = {}
    for name in ("config.json", CARD):
        try:
            path = directory / name
            text = path.read_text(encoding="utf-8") if path.stat().st_size <= BIGGEST else ""
            if name == CARD:
                front = re.match(r"\s*---\r?\n(.*?)\r?\n---", text, re.DOTALL)
                content = parse_yaml(front[1], str(path)) if front else None
            else:
                content = json.loads(text)
        except (OSError, ValueError, RecursionError):  # no card, or one that nobody can read
            continue
        if isinstance(content, dict) and isinstance(content.get("license"), str):
            found = content
    values = {key: found.get(key) for key in LICENSE}
    return {key: text for key, text in values.items() if isinstance(text, str) and re.fullmatch(LICENSE[key], text)}


# --- of a run --------------------------------------------------------------------------------------------------------


def metadata(run: RunStudy, stage: str, rows: Sequence[Row], name: str, pruned: str | None) -> Any:
    """The data of huggingface_hub for the card of a stage.

    Args:
        run: the stages up to this one.
        stage: prune, train or merge.
        rows: what was measured.
        name: of the model, in its index of results.
        pruned: hub id of the pruned weights that an adapter belongs to.
    """
    from huggingface_hub import ModelCardData

    base = base_model(run)
    results = [entry for row in rows if row.checkpoint == DIRECTORIES[stage] for entry in _evaluations(row)]
    on_hub = base.name if base is not None and base.is_on_hub else None
    relation = {"train": "adapter", "merge": "finetune"}.get(stage)  # the hub has no word for pruning
    named = pruned if pruned is not None and stage == "train" else on_hub
    licensed: Json = dict(base.license) if base is not None else {}
    return ModelCardData(
        base_model=named,
        base_model_relation=relation if named is not None else None,
        library_name="peft" if stage == "train" else "transformers",
        pipeline_tag="text-generation",
        tags=_tags(run, stage),
        datasets=list(_datasets(run)) or None,
        **licensed,
        eval_results=results or None,
        model_name=name if results else None,  # of the model index
    )


def base_model(run: RunStudy) -> BaseModel | None:
    """The dense model of a run, where its pruning recorded it."""
    return run.stages["prune"].metrics.base if "prune" in run.stages else None


def _tags(run: RunStudy, stage: str) -> list[str]:
    tags = []
    if "prune" in run.stages:
        pruned: PruneRecord = run.stages["prune"].metrics
        merged: MergeRecord | None = run.stages["merge"].metrics if stage == "merge" else None
        if merged is None or merged.sparsity:
            patterns = {
                str(layer.pattern) if layer.pattern.is_structured else "unstructured" for layer in pruned.layers
            }
            kept = merged is None or merged.pattern_unchanged
            tags += ["sparse", *(sorted(patterns) if kept else [])]
        tags.append(pruned.method)
    if "train" in run.stages:
        tags.append(run.stages["train"].metrics.method)
    return [*tags, "sppctl"]


def _datasets(run: RunStudy) -> Iterator[str]:
    """Hub ids of what was calibrated with and trained on, each once; local data has none."""
    known = HUB_TEXTS | HUB_ROWS
    names: dict[str, Mapping[str, str]] = {}
    if "prune" in run.stages and (calibration := run.stages["prune"].metrics.calibration) is not None:
        inputs = run.stages["prune"].inputs
        names[calibration.dataset] = {calibration.dataset: ""} if "calibration" in inputs else {}
    if "train" in run.stages:
        record = run.stages["train"]
        local = {key.removeprefix("data "): digest for key, digest in record.inputs.items()}
        names |= dict.fromkeys(names_of(record.settings.get("train", {}).get("data", {}).get("dataset", [])), local)
    found = (known.get(name, name) for name, local in names.items() if name not in local)
    yield from dict.fromkeys(name.partition(":")[0] for name in found if is_hub_id(name))


def _evaluations(row: Row) -> Iterator[Any]:
    """What was measured on a checkpoint, for the model index: perplexities and tasks."""
    from huggingface_hub import EvalResult

    for quantity, value in row.values.items():
        if value.number is None or quantity.metric.kind in (Kind.DIVERGENCE, Kind.AGREEMENT):
            continue
        if value.limit is not None and value.limit < FEW_SAMPLES:
            continue  # no result that leaderboards should compare
        dataset = quantity.part or re.split("[ ,]", quantity.title)[0]
        if not quantity.metric.is_of_task:
            dataset = quantity.title.rpartition(" @")[0]
        yield EvalResult(
            task_type="text-generation",
            dataset_type=HUB_TEXTS.get(dataset, dataset),
            dataset_name=dataset,
            metric_type="perplexity" if quantity.metric.kind == Kind.PERPLEXITY else quantity.metric.name,
            metric_value=round(value.number, 6),
            metric_name=quantity.label,  # with every limit
        )
