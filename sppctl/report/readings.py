"""Results files -> numbers by name, each with its standard error.

A name says what was measured with what limits it. Results that still differ in something that changes the number (the
few-shot examples' seed, the text's version, the dense model of a divergence, the system prompt, the dtype that was
computed in) get it into their names, so that equal names within a run are equal measures and only those are compared.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from sppctl.evaluate import tasks
from sppctl.evaluate.stage import result_name, rows_of
from sppctl.report import significance

PERPLEXITY, DIVERGENCE, AGREEMENT, ACCURACY, OTHER = "perplexity", "kl", "agreement", "accuracy", "other"
# what no name says, and how it is said where it differs
HIDDEN = {
    "text": "text {:.8}",
    "reference": "dense model {:.8}",
    "seed": "seed {}",
    "tasks": "task files {:.8}",
    "prompt": "system prompt {:.8}",
    "dtype": "computed in {}",
}

Hidden = dict[str, str]
Results = list[dict[str, Any]]


@dataclass(frozen=True)
class Measure:
    """One number of one checkpoint.

    Attributes:
        name: as tables call it, with what limits it.
        kind: perplexity, kl (nats per token), agreement, accuracy (shares of 1), or other.
        value: None where lm-eval gave none.
        norm: acc_norm beside an accuracy.
        stderr: of the mean loss in nats for a perplexity, else of the value.
        dtype: that it was computed in; of a mean perhaps several; None where nothing recorded it.
    """

    name: str
    kind: str
    value: float | None
    norm: float | None = None
    stderr: float | None = None
    dtype: str | None = None


def measured(run: dict[str, Any]) -> tuple[dict[str, dict[str, Measure]], list[str]]:
    """The measures of a collected run by checkpoint and name, and a note for each that was measured in several ways."""
    found = {label: list(_read(content["results"])) for label, content in run["checkpoints"].items()}
    ways: dict[str, list[Hidden]] = {}
    for entries in found.values():
        for measure, hidden in entries:
            known = ways.setdefault(measure.name, [])
            known += [hidden] * (hidden not in known)
    differing = {
        name: [key for key in HIDDEN if len({way.get(key) for way in known}) > 1] for name, known in ways.items()
    }
    own = {"seed": str(seed_of(run))}
    named: dict[str, dict[str, Measure]] = {}
    said: dict[str, list[str]] = {}
    for label, entries in found.items():
        named[label] = {}
        for measure, hidden in entries:
            # what the run itself is set to goes without saying
            words = {key: HIDDEN[key].format(hidden.get(key, "unknown")) for key in differing[measure.name]}
            name = ", ".join([measure.name, *(word for key, word in words.items() if own.get(key) != hidden.get(key))])
            named[label][name] = replace(measure, name=name)
            if words:
                said.setdefault(measure.name.strip(), []).append(f"{label} {' '.join(words.values())}")
    notes = [
        f"{name} is not one measure, and only equal ones are compared: {', '.join(by)}" for name, by in said.items()
    ]
    return named, notes


def seed_of(run: dict[str, Any]) -> int | None:
    """The seed of a collected run, where a stage recorded it."""
    return next((record["seed"] for record in run["stages"].values() if "seed" in record), None)


def _read(results: Results) -> Iterator[tuple[Measure, Hidden]]:
    """Every number, and what its name does not say."""
    ordered = sorted(tasks.families(results), key=lambda family: family[0]["settings"]["kind"] != "perplexity")
    for family in ordered:
        names = [{row[0] for row in rows_of({"results": [result]})} for result in family]
        for name, value, norm in rows_of({"results": family}):
            # a mean over the family stands among the rows of no single result
            inside = [result for result, own in zip(family, names, strict=True) if name in own] or family
            perplexity = family[0]["settings"]["kind"] == "perplexity"
            error = _error_of_text(name, inside[0]) if perplexity else _error_of_tasks(name, inside)
            hidden = _hidden_of_text(name, inside[0]) if perplexity else _hidden_of_tasks(inside)
            dtype = " and ".join(sorted({result["dtype"] for result in inside if "dtype" in result})) or None
            if dtype is not None:
                hidden["dtype"] = dtype
            yield Measure(name, _kind(name), value, norm, error, dtype), hidden


def _kind(name: str) -> str:
    for start, kind in (("ppl ", PERPLEXITY), ("KL(", DIVERGENCE), ("top-1 agreement", AGREEMENT)):
        if name.startswith(start):
            return kind
    return ACCURACY if tasks.is_share(name) else OTHER


# --- texts ------------------------------------------------------------------------------------------------------------


def _error_of_text(name: str, result: dict[str, Any]) -> float | None:
    keys = {result_name(result): "stderr"}
    error: float | None = result["metrics"].get(keys.get(name, "kl_stderr" if name.startswith("KL(") else ""))
    return error


def _hidden_of_text(name: str, result: dict[str, Any]) -> Hidden:
    found = {"text": result["metrics"].get("documents_hash")}
    if not name.startswith("ppl "):  # no other model changes a perplexity
        found["reference"] = result["settings"].get("reference")
    return {key: value for key, value in found.items() if value is not None}


# --- tasks ------------------------------------------------------------------------------------------------------------


def _hidden_of_tasks(results: Results) -> Hidden:
    found = {}
    if "seed" in results[0]["settings"] and any(significance.draws_examples(result) for result in results):
        found["seed"] = str(results[0]["settings"]["seed"])
    if "system_prompt" in results[0]["settings"]:
        found["prompt"] = hashlib.sha256(results[0]["settings"]["system_prompt"].encode()).hexdigest()
    files = [result["metrics"]["sources"]["digest"] for result in results if "sources" in result["metrics"]]
    one = files[0] if len(files) == 1 else hashlib.sha256("".join(sorted(files)).encode()).hexdigest()
    return found | ({"tasks": one} if files else {})


def _error_of_tasks(name: str, results: Results) -> float | None:
    """Of a task lm-eval's; of a mean lm-eval's where it has one, else that of a mean of independent means."""
    words = name.strip()
    every = {task: values for result in results for task, values in result["metrics"]["tasks"].items()}
    for task, values in every.items():
        if re.match(rf"{re.escape(task)}(?=[ ,]|$)(?! mean)", words):
            return values.get(f"{values.get('metric') or 'acc'}_stderr")
    known = results[0]["metrics"].get("mean", {})
    groups = results[0]["metrics"].get("groups") or {}
    group = next((group for group in groups if re.match(rf"{re.escape(group)}(?=[ ,])", words)), None)
    if "group" in results[0]["settings"] and group is not None:
        known = tasks.group_mean(results, group)
    errors = [values.get("acc_stderr") for values in every.values()]
    if "acc_stderr" in known:
        error: float | None = known["acc_stderr"]
        return error
    return None if None in errors or not errors else math.hypot(*errors) / len(errors)  # type: ignore[arg-type]
