"""A run directory as the stages would leave it, with numbers that are made up: what the report is tested on."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

DENSE = {"sparsity": 0.0, "patterns": [], "sparse_matrices": 0, "bytes": 269_060_552}
SPARSE = {"sparsity": 0.5, "patterns": ["2:4"], "sparse_matrices": 210, "bytes": 269_060_552}
PERPLEXITIES = {"base": 9.57, "pruned": 55.97, "merged": 14.33}
ACCURACIES = {"base": 0.62, "pruned": 0.5, "merged": 0.57}
TASKS = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
VERSIONS = {"sppctl": "0.1.0", "torch": "2.13.0+cpu"}
PROJECTIONS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


def write_run(
    directory: Path, *, method: str = "wanda", pattern: str = "2:4", training: str = "spp", seed: int = 0
) -> Path:
    """Base, pruned and merged, measured on a text and on seven tasks of 200 samples each."""
    chance = random.Random(seed)
    for folder, record in _stages(directory, method, pattern, training, seed, chance).items():
        write_json(directory / folder / "stage.json", record)
    (directory / "resolved.yaml").write_text(f"run: {{dir: {directory.name}, seed: {seed}}}\n# <b> & other signs\n")
    hardness = {task: [chance.random() for _ in range(200)] for task in TASKS}
    windows = [2.2 + 0.4 * chance.random() for _ in range(40)]
    for label in PERPLEXITIES:
        content = _results(directory, label, windows, chance) | {"sparsity": SPARSE if label != "base" else DENSE}
        content["sparsity"] = content["sparsity"] | ({"patterns": [pattern]} if label != "base" else {})
        tasks, hashes = {}, {}
        for task in TASKS:
            samples = _samples(hardness[task], ACCURACIES[label], chance)
            hashes[task] = write_samples(directory / f"eval/{label}.samples/{task}.jsonl", samples)
            accuracy = sum(sample["acc"] for sample in samples) / len(samples)
            tasks[task] = {"acc": accuracy, "acc_stderr": 0.035, "acc_norm": accuracy + 0.01}
            tasks[task] |= {"version": 1.0, "num_fewshot": 0, "samples": 200}
        mean = {key: sum(values[key] for values in tasks.values()) / len(tasks) for key in ("acc", "acc_norm")}
        settings = {"kind": "tasks", "tasks": "zeroshot", "num_fewshot": 0, "limit": 200, "seed": 0}
        entry = {"settings": settings, "metrics": {"tasks": tasks, "mean": mean, "samples_hash": hashes}}
        entry |= {"seconds": 321.5, "dtype": "bfloat16", "device": "cpu", "versions": VERSIONS}
        content["results"].append(entry | {"command": f"sppctl eval run.dir={directory.name}"})
        write_json(directory / f"eval/{label}.json", content)
    return directory


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


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
    found = []
    for number, hard in enumerate(hardness):
        right = int(hard + 0.2 * (chance.random() - 0.5) < accuracy)
        found.append(sample(f"hash{number}", right, 1 if right else chance.choice([0, 2, 3])) | {"doc": number})
    return found


def _results(directory: Path, label: str, windows: list[float], chance: random.Random) -> dict[str, Any]:
    value = PERPLEXITIES[label] * (1 + 0.1 * chance.random() * (label == "merged"))
    settings = {"kind": "perplexity", "text": "wikitext2", "seq_len": 512, "stride": None, "max_tokens": None}
    metrics: dict[str, Any] = {"value": value, "nll": 2.2, "stderr": 0.03, "tokens": 40 * 511, "windows": 40}
    shift = {"base": 0.0, "pruned": 1.7, "merged": 0.4}[label]
    metrics |= {"seq_len": 512, "stride": 512, "documents_hash": "0123456789abcdef"}
    metrics["window_nll"] = [511 * (mean + shift + 0.02 * chance.random()) for mean in windows]
    if label != "base":
        metrics |= {"kl": {"pruned": 1.81, "merged": 0.52}[label], "kl_stderr": 0.02}
        metrics |= {"top1_agreement": {"pruned": 0.44, "merged": 0.63}[label]}
    entry = {"settings": settings | {"reference": None if label == "base" else "b" * 16}, "metrics": metrics}
    entry |= {"seconds": 61.2, "dtype": "bfloat16", "device": "cpu", "versions": VERSIONS}
    fingerprint = "b" * 16 if label == "base" else f"{label[0]}{directory.name}"
    return {"label": label, "checkpoint": str(directory / label), "fingerprint": fingerprint, "results": [entry]}


def _stages(
    directory: Path, method: str, pattern: str, training: str, seed: int, chance: random.Random
) -> dict[str, dict[str, Any]]:
    layers = [
        {
            "name": f"model.layers.{block}.{name}",
            "shape": [576, 576],
            "sparsity": 0.5,
            "relative_output_error": 0.1 + 0.02 * at + 0.1 * chance.random(),
            "relative_weight_error": 0.4,
            "damp": None,
            "seconds": 0.25,
        }
        for block in range(12)
        for at, name in enumerate(PROJECTIONS)
    ]
    pruned = {"method": method, "pattern": pattern, "matrices": len(layers), "mean_relative_output_error": 0.223}
    calibration = {
        "dataset": "c4",
        "samples": 128,
        "seq_len": 2048,
        "documents_hash": "c" * 16,
        "windows_hash": "d" * 16,
    }
    history: list[dict[str, Any]] = []
    for step in range(10, 301, 10):
        history.append({"loss": 1.9 + 1.2 * 0.98**step + 0.1 * chance.random(), "step": step})
        if step % 50 == 0:
            history.append({"eval_loss": 2.0 + 1.1 * 0.98**step, "step": step})
            history.append({"perplexity": 14 + 40 * 0.98**step, "text": "wikitext2", "step": step})
    trained = {"method": training, "trainable_parameters": 2551680, "trainable_share": 0.0186, "steps": 300}
    trained |= {"tokens": 374110, "validation_loss": 2.004, "history": history}
    merged = {"matrices": 210, "zeros": 53084651, "moved_share": 0.867}
    common = {"seed": seed, "created": "2026-11-24T00:10:07+00:00", "hardware": "x86_64 CPU, 2 threads"}
    common |= {"versions": VERSIONS | {"python": "3.11.7"}, "peak_memory_mb": {"process": 1067.7}}
    place = f"run.dir={directory.name}"
    return {
        "pruned": common
        | {
            "wall_time_s": 17.2,
            "inputs": {"base": "b" * 16},
            "output": f"p{directory.name}",
            "command": f"sppctl prune {place}",
        }
        | {"metrics": pruned | {"layers": layers, "calibration": calibration}},
        "adapter": common
        | {
            "wall_time_s": 166.0,
            "inputs": {"pruned": f"p{directory.name}"},
            "command": f"sppctl train {place}",
            "metrics": trained,
        },
        "merged": common
        | {
            "wall_time_s": 2.1,
            "inputs": {"pruned": f"p{directory.name}", "adapter": "f" * 16},
            "output": f"m{directory.name}",
        }
        | {"command": f"sppctl merge {place}", "metrics": merged},
    }
