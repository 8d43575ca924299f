"""Runs as sppctl leaves them behind, without any model: records and results with made-up numbers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stage_calls import blank

from sppctl.evaluate.results import (
    AnyResult,
    Results,
    TaskMeasure,
    TaskNumbers,
    TaskResult,
    TaskScores,
    TextMeasure,
    TextNumbers,
    TextResult,
)
from sppctl.files import sealed
from sppctl.files.names import DIRECTORIES
from sppctl.pattern import Pattern
from sppctl.records import METRICS, Calibration, LayerRecord, StageRecord, to_json
from sppctl.report.study import RunStudy

DENSE = {"sparsity": 0.0, "patterns": [], "sparse_matrices": 0, "bytes": 269_060_552}
SPARSE = {"sparsity": 0.5, "patterns": ["2:4"], "sparse_matrices": 210, "bytes": 269_060_552}
PERPLEXITIES = {"base": 9.57, "pruned": 55.97, "merged": 14.33}
ACCURACIES = {"base": 0.62, "pruned": 0.5, "merged": 0.57}
TASKS = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
PROJECTIONS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
COMMON: dict[str, Any] = {
    "created": "2026-11-24T00:10:07+00:00",
    "hardware": "x86_64 CPU, 2 threads",
    "versions": {"sppctl": "0.1.0", "torch": "2.13.0+cpu", "python": "3.11.7"},
    "peak_memory_mb": {"process": 1067.7},
}
MADE: dict[str, Any] = {
    "dtype": "bfloat16",
    "device": "cpu",
    "versions": {"sppctl": "0.1.0", "torch": "2.13.0+cpu"},
    "tokenizer": "t" * 16,
}


# --- results ----------------------------------------------------------------------------------------------------------


def text(value: float, seq_len: int = 64, name: str = "prose", stride: int | None = None, **options: Any) -> TextResult:
    """A result of a text; options are further fields of its measure, its numbers and itself."""
    numbers = {"nll": 2.0, "stderr": 0.1, "tokens": 189, "windows": 3, "seq_len": seq_len, "stride": stride or seq_len}
    numbers |= {"documents_hash": "x"} | options
    measure = TextMeasure(name, seq_len, stride, **_chosen(TextMeasure, options))
    return TextResult(measure, TextNumbers(value, **_chosen(TextNumbers, numbers)), **_chosen(TextResult, options))


def task(acc: float | None, name: str = "rte", shots: int | None = 0, **options: Any) -> TaskResult:
    """A result of a task; options are fields of its measure, its scores, its numbers and itself."""
    scores: dict[str, float] = {} if acc is None else {"acc": acc, "acc_stderr": 0.03}
    options = {"scores": scores, "metric": "acc", "num_fewshot": shots, "samples": 10} | options
    if "group" in options:
        options = {"groups": {options["group"]: {}}} | options
    options = {"tasks": {name: TaskScores(**_chosen(TaskScores, options))}} | options
    measure, numbers = TaskMeasure(name, **_chosen(TaskMeasure, options)), TaskNumbers(**_chosen(TaskNumbers, options))
    return TaskResult(measure, numbers, **_chosen(TaskResult, options))


def _chosen(kind: Any, options: dict[str, Any]) -> dict[str, Any]:
    return {one.name: options[one.name] for one in dataclasses.fields(kind) if one.name in options}


def results_of(label: str, results: list[AnyResult], sparsity: dict[str, Any] = DENSE) -> Results:
    return Results(label, label, None, sparsity, results)


def study_of(seed: int | None = 0, stages: dict[str, Any] | None = None, **results: list[AnyResult]) -> RunStudy:
    """A run with these results by label of the checkpoint; all but base are sparse."""
    records = {} if seed is None else {"merge": stage_of("merge", seed=seed, wall_time_s=3.0)}
    sparsity = {label: DENSE if label == "base" else SPARSE for label in results}
    checkpoints = {label: results_of(label, own, sparsity[label]) for label, own in results.items()}
    return RunStudy("runs/mine", None, records if stages is None else stages, checkpoints)


def stage_of(stage: str, metrics: dict[str, Any] | None = None, **entries: Any) -> StageRecord[Any]:
    """The record of a stage with these metrics and entries; others are empty, and no zero was filled."""
    own = ({"pattern_unchanged": True} if stage == "merge" else {}) | (metrics or {})
    return blank(StageRecord, stage=stage, metrics=blank(METRICS[stage], **own), **entries)


# --- runs on the disk -------------------------------------------------------------------------------------------------


def write_run(
    directory: Path, *, method: str = "wanda", pattern: str = "2:4", training: str = "spp", seed: int = 0
) -> Path:
    """Base, pruned and merged, measured on a text and on seven tasks of 200 samples each."""
    chance = random.Random(seed)
    for stage, record in _stages(directory, method, pattern, training, seed, chance).items():
        write_record(directory, stage, record)
    (directory / "resolved.yaml").write_text(f"run: {{dir: {directory.name}, seed: {seed}}}\n# <b> & other signs\n")
    hardness = {name: [chance.random() for _ in range(200)] for name in TASKS}
    windows = [2.2 + 0.4 * chance.random() for _ in range(40)]
    for label in PERPLEXITIES:
        fingerprint = "b" * 16 if label == "base" else f"{label[0]}{directory.name}"
        sparsity = DENSE if label == "base" else SPARSE | {"patterns": [pattern]}
        content = Results(label, str(directory / label), fingerprint, sparsity, [_text(label, windows, chance)])
        for name in TASKS:
            samples = _samples(hardness[name], ACCURACIES[label], chance)
            identity = write_samples(directory / f"eval/{label}.samples/{name}.jsonl", samples)
            accuracy = sum(sample["acc"] for sample in samples) / len(samples)
            scores = {"acc": accuracy, "acc_stderr": 0.035, "acc_norm": accuracy + 0.01}
            place: dict[str, Any] = {"group": "zeroshot", "groups": {"zeroshot": {}}, "members": 7}
            own = {"samples_hash": {name: identity}, "samples": 200, "version": 1.0, "limit": 200, "seconds": 45.9}
            command = f"sppctl eval run.dir={directory.name}"
            content.add(task(0, name, scores=scores, command=command, **place, **own, **MADE))
        save(directory, content)
    return directory


def write_record(run: Path, stage: str, record: StageRecord[Any] | dict[str, Any]) -> None:
    """``stage.json`` of a stage, sealed."""
    folder = run / DIRECTORIES[stage]
    folder.mkdir(parents=True, exist_ok=True)
    sealed.write(folder / "stage.json", to_json(record))


def save(run: Path, content: Results) -> None:
    """The results file of a checkpoint."""
    content.save(run / f"eval/{content.label}.json")


def change_record(run: Path, stage: str, **entries: Any) -> None:
    """Other entries of a stage's record."""
    path = run / DIRECTORIES[stage] / "stage.json"
    write_record(run, stage, sealed.read(path, "") | entries)


def change_results(run: Path, label: str, change: Callable[[Results], object]) -> None:
    """Other results of a checkpoint."""
    content = load(run, label)
    change(content)
    save(run, content)


def load(run: Path, label: str) -> Results:
    """The results of a checkpoint."""
    content = Results.load(run / f"eval/{label}.json")
    assert content is not None
    return content


def with_numbers(result: Any, **numbers: Any) -> Any:
    """The same result with other numbers."""
    return dataclasses.replace(result, numbers=dataclasses.replace(result.numbers, **numbers))


def with_measure(result: Any, **settings: Any) -> Any:
    """The same result of another measure."""
    return dataclasses.replace(result, measure=dataclasses.replace(result.measure, **settings))


def write_samples(path: Path, samples: list[dict[str, Any]]) -> str:
    """Returns the hash by which results know the file."""
    content = "".join(json.dumps(sample) + "\n" for sample in samples)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def sample(name: str, acc: int | None, chosen: int | None = None) -> dict[str, Any]:
    """A line of a file of samples; the gold answer is 1."""
    given = acc if chosen is None else chosen
    return {"doc": 0, "hash": name, "chosen": given, "target": 1, "acc": acc, "acc_norm": acc}


def _samples(hardness: list[float], accuracy: float, chance: random.Random) -> list[dict[str, Any]]:
    samples = []
    for number, hard in enumerate(hardness):
        right = int(hard + 0.2 * (chance.random() - 0.5) < accuracy)
        samples.append(sample(f"hash{number}", right, 1 if right else chance.choice([0, 2, 3])) | {"doc": number})
    return samples


def _text(label: str, windows: list[float], chance: random.Random) -> TextResult:
    value = PERPLEXITIES[label] * (1 + 0.1 * chance.random() * (label == "merged"))
    shift = {"base": 0.0, "pruned": 1.7, "merged": 0.4}[label]
    losses = [511 * (mean + shift + 0.02 * chance.random()) for mean in windows]
    numbers: dict[str, Any] = {"nll": 2.2, "stderr": 0.03, "tokens": 40 * 511, "windows": 40, "window_nll": losses}
    numbers |= {"documents_hash": "0123456789abcdef"}
    if label != "base":
        numbers |= {"kl": {"pruned": 1.81, "merged": 0.52}[label], "kl_stderr": 0.02, "reference": "b" * 16}
        numbers |= {"top1_agreement": {"pruned": 0.44, "merged": 0.63}[label]}
    return text(value, 512, "wikitext2", **numbers, seconds=61.2, **MADE)


def layer(name: str, error: float | None = 0.25, damp: float | None = None, sparsity: float = 0.5) -> LayerRecord:
    """The record of a pruned layer."""
    return LayerRecord(f"model.layers.{name}", (8, 8), Pattern(keep=2, group=4), sparsity, error, 0.5, damp, 0.25)


def _stages(
    directory: Path, method: str, pattern: str, training: str, seed: int, chance: random.Random
) -> dict[str, StageRecord[Any]]:
    names = [(block, at, name) for block in range(12) for at, name in enumerate(PROJECTIONS)]
    layers = [layer(f"{block}.{name}", 0.1 + 0.02 * at + 0.1 * chance.random()) for block, at, name in names]
    hashes = {"documents_hash": "c" * 16, "windows_hash": "d" * 16}
    pruned = {"method": method, "pattern": pattern, "matrices": len(layers), "mean_relative_output_error": 0.223}
    pruned |= {"layers": layers, "calibration": blank(Calibration, dataset="c4", samples=128, seq_len=2048, **hashes)}
    history: list[dict[str, Any]] = []
    for step in range(10, 301, 10):
        history.append({"loss": 1.9 + 1.2 * 0.98**step + 0.1 * chance.random(), "step": step})
        if step % 50 == 0:
            history.append({"eval_loss": 2.0 + 1.1 * 0.98**step, "step": step})
            history.append({"perplexity": 14 + 40 * 0.98**step, "text": "wikitext2", "step": step})
    trained = {"method": training, "trainable_parameters": 2551680, "trainable_share": 0.0186, "steps": 300}
    trained |= {"tokens": 374110, "validation_loss": 2.004, "history": history}
    merged = {"matrices": 210, "zeros": 53084651, "moved_share": 0.867}

    def record(stage: str, seconds: float, metrics: Any, inputs: dict[str, str], output: str) -> StageRecord[Any]:
        own = {"wall_time_s": seconds, "inputs": inputs, "command": f"sppctl {stage} run.dir={directory.name}"}
        return stage_of(stage, metrics, **COMMON, **own, seed=seed, output=output)

    fingerprint = f"p{directory.name}"
    return {
        "prune": record("prune", 17.2, pruned, {"base": "b" * 16}, fingerprint),
        "train": record("train", 166.0, trained, {"pruned": fingerprint}, "f" * 16),
        "merge": record("merge", 2.1, merged, {"pruned": fingerprint, "adapter": "f" * 16}, f"m{directory.name}"),
    }
