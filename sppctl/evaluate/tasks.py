"""Benchmark tasks of lm-eval: which are asked for, one result each, and the means of their groups.

A group is measured task by task, so that an interrupted evaluation goes on with the next task. Its mean is computed
from the results whenever it is shown, as lm-eval computes it: by samples where the group says so, else by tasks.
"""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path
from typing import Any

from sppctl import console, distributed
from sppctl.config.settings import Config
from sppctl.evaluate import harness
from sppctl.files import disk, paths

Row = tuple[str, float | None, float | None]
SHOWN = 10  # tasks of a group in a table; of a larger one its parts, if it has any


def wanted(config: Config) -> list[dict[str, Any]]:
    """The configured tasks, one entry per task, with all settings that change its numbers."""
    entries: list[dict[str, Any]] = []
    for name in harness.expanded(config.eval.tasks, config.eval.include_path):
        asked = config.eval.num_fewshot
        few = harness.group_of(name).num_fewshot if asked is None else asked
        for member in harness.members(name, config.eval.include_path):
            entry: dict[str, Any] = {"kind": "tasks", "tasks": member.task, "num_fewshot": few}
            entry |= {"limit": config.eval.limit, "seed": config.run.seed}
            optional = {
                "group": name if member.task != name else None,
                "chat_template": config.eval.chat_template or None,
                "system_prompt": config.eval.system_prompt,
                # another one changes the last bits of likelihoods
                "batch_size": None if config.eval.batch_size == "auto" else config.eval.batch_size,
            }
            entries.append(entry | {key: value for key, value in optional.items() if value is not None})
    return entries


def is_done(config: Config, entry: dict[str, Any], found: list[dict[str, Any]]) -> bool:
    """Whether results hold an entry, in the groups that it is in now."""
    twin = next((result for result in found if result["settings"] == entry), None)
    return twin is not None and _place(config, entry).items() <= twin["metrics"].items()


def is_current(config: Config, result: dict[str, Any]) -> bool:
    """Whether a result of a configured task is of the files and data that the task is made from now."""
    sources = result["metrics"].get("sources")  # what older versions measured cannot be traced
    return sources is not None and harness.are_current(result["settings"]["tasks"], sources, config.eval.include_path)


def replaces(new: dict[str, Any], old: dict[str, Any]) -> bool:
    """Whether a measurement takes the place of another one: the last batch size stays."""
    passing = {"batch_size": None, "own_tasks": None}  # the latter named an older version's files
    return new | passing == old | passing


def has_samples(result: dict[str, Any], folder: Path) -> bool:
    """Whether the files of samples are still those of a result, and not of the same task with other settings."""
    metrics = result["metrics"]
    return all(
        # a task once had one file for all numbers of examples
        expected in (_content_hash(folder / name) for name in (_samples_name(metrics, task), _samples_name({}, task)))
        for task, expected in metrics.get("samples_hash", {}).items()
    )


def _content_hash(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else None


def measure(
    config: Config, model: Any, tokenizer: Any, settings: dict[str, Any], *, label: str, samples: Path
) -> dict[str, Any]:
    """Runs one task; every process of several takes part.

    Args:
        config: the configuration, for what does not change the numbers.
        model: the loaded model.
        tokenizer: its tokenizer.
        settings: an entry of :func:`wanted`.
        label: of the checkpoint, for progress.
        samples: folder for what came of each sample, ``TASK.jsonl`` or with examples ``TASK.5-shot.jsonl``.

    Returns:
        ``{"tasks", "mean", "truncated_prompts", "sources"}`` of :func:`sppctl.evaluate.harness.evaluate`, ``"groups"``
        of the task's :class:`sppctl.evaluate.harness.Member`, the number of ``"members"`` of the group that was asked
        for, and for each task the hash of its file of samples.
    """
    name = settings["tasks"]
    console.note(f"{label}: {title(settings)}")
    metrics, logged = harness.evaluate(
        model,
        tokenizer,
        name,
        num_fewshot=settings["num_fewshot"],
        batch_size=None if config.eval.batch_size == "auto" else config.eval.batch_size,
        limit=settings["limit"],
        seed=settings["seed"],
        chat_template=settings.get("chat_template", False),
        system_prompt=settings.get("system_prompt"),
        include_path=config.eval.include_path,
        progress=lambda what, count: console.Progress(f"{label}: {name}, {what}", count),
    )
    if metrics["truncated_prompts"]:
        console.warn(
            f"{name}: {metrics['truncated_prompts']} prompts are longer than the model's context; lm-eval cuts off "
            "their beginning"
        )
    metrics |= _place(config, settings)
    metrics["samples_hash"] = {
        task: _write_samples(samples / _samples_name(metrics, task), found) for task, found in logged.items()
    }
    return metrics


def _place(config: Config, settings: dict[str, Any]) -> dict[str, Any]:
    """Groups of a task, and the number of tasks that were asked for with it."""
    name = settings["tasks"]
    family = harness.members(settings.get("group", name), config.eval.include_path)
    groups = next((member.groups for member in family if member.task == name), {})
    return {"groups": groups, "members": len(family)}


def shared(config: Config, settings: dict[str, Any], known: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The same measurement for another group, or for none, as the one that is asked for.

    Args:
        config: the configuration.
        settings: an entry of :func:`wanted`.
        known: results for the same weights whose samples are there.

    Returns:
        A result, which took no time; None if there is none.
    """
    theirs = [result for result in known if result["settings"].get("tasks") == settings["tasks"]]
    asked = _alone(config, settings) if theirs else {}
    twin = next((one for one in theirs if _alone(config, one["settings"]) == asked), None)
    if twin is None:
        return None
    return twin | {"settings": settings, "metrics": twin["metrics"] | _place(config, settings), "seconds": 0.0}


def _alone(config: Config, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without the group, with the number of examples that prompts really have, and with a seed that counts."""
    task, own = settings["tasks"], config.eval.include_path
    count = harness.shots(task, settings["num_fewshot"], own)
    seed = settings["seed"] if harness.is_drawn(task, count, own) else None
    return {key: value for key, value in settings.items() if key != "group"} | {"num_fewshot": count, "seed": seed}


def _write_samples(path: Path, found: list[dict[str, Any]]) -> str:
    lines = harness.as_lines(found)
    if distributed.is_main():
        disk.write(path, lines)
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def _samples_name(metrics: dict[str, Any], task: str) -> str:
    """The file of a task's samples: one for each number of examples, so that groups with several do not take turns."""
    count = metrics.get("tasks", {}).get(task, {}).get("num_fewshot")
    return paths.file_stem(re.sub(r"[^\w.:-]+", "-", task)) + (f".{count}-shot" if count else "") + ".jsonl"


# --- tables -----------------------------------------------------------------------------------------------------------


def title(settings: dict[str, Any], name: str | None = None) -> str:
    """How a task or group is called in tables, with all that sets it apart."""
    words = [name or settings["tasks"]]
    words += [f"{settings['num_fewshot']}-shot"] * bool(settings["num_fewshot"])
    words += ["chat"] * bool(settings.get("chat_template")) + ["system prompt"] * bool(settings.get("system_prompt"))
    cut = f", limit {settings['limit']}" if settings["limit"] is not None else ""
    return " ".join(words) + cut


def as_measured(family: list[dict[str, Any]]) -> dict[str, Any]:
    """Settings as they came true: examples in the prompts, as a task may insist on its own, and the limit if it cut."""
    measured = [values for result in family for values in result["metrics"]["tasks"].values()]
    settings: dict[str, Any] = dict(family[0]["settings"])
    shots = {values.get("num_fewshot") for values in measured}
    if len(shots) == 1 and None not in shots:
        settings["num_fewshot"] = shots.pop()
    limit = settings["limit"]
    if limit is not None and all((values.get("samples") or limit) < limit for values in measured):
        settings["limit"] = None  # every task was measured whole
    return settings


def families(results: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The tasks of a group that were measured one by one together, every other result by itself."""
    found: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        settings = result["settings"]
        found.setdefault(str(of_family(settings) if "group" in settings else settings), []).append(result)
    return list(found.values())


def of_family(settings: dict[str, Any]) -> dict[str, Any]:
    """What the tasks of a group have in common that are measured one by one."""
    return {key: value for key, value in settings.items() if key != "tasks"}


def rows(results: list[dict[str, Any]]) -> list[Row]:
    """Name, value and acc_norm of every task and group among the results of a checkpoint."""
    found: list[Row] = []
    for family in families(results):
        settings = family[0]["settings"]
        found += _group_rows(family) if "group" in settings else _whole_rows(family[0])
    return found


def _whole_rows(result: dict[str, Any]) -> list[Row]:
    """A task, or a group that lm-eval ran in one go."""
    name, metrics = title(as_measured([result])), result["metrics"]
    tasks = metrics["tasks"] if len(metrics["tasks"]) <= SHOWN else {}
    if len(metrics["tasks"]) == 1 and result["settings"]["tasks"] in tasks:
        return [_row(name, next(iter(tasks.values())))]
    return [
        _row(f"{name} mean", metrics["mean"]),
        *(_row(f"  {task} ({name})", values) for task, values in tasks.items()),
    ]


def _group_rows(family: list[dict[str, Any]]) -> list[Row]:
    settings, metrics = family[0]["settings"], family[0]["metrics"]
    name = title(as_measured(family), settings["group"])
    part = f" of {len(family)} of {metrics['members']} tasks" if len(family) < metrics["members"] else ""
    whole = group_mean(family, settings["group"])
    found = [_row(f"{name} mean{part}", whole)]
    if metrics["members"] > SHOWN:
        parts = dict.fromkeys(group for result in family for group in list(result["metrics"]["groups"])[1:])
        means = {group: group_mean(family, group) for group in parts}
        return found + [_row(f"  {group} ({name})", mean) for group, mean in means.items()]
    for result in family:
        for task, values in result["metrics"]["tasks"].items():
            found.append(_row(f"  {task} ({name})", values))
    return found


def _row(name: str, values: dict[str, Any]) -> Row:
    """The metric that counts, named behind the title unless it is acc: :func:`is_share` reads it there."""
    metric = values.get("metric") or harness.headline(values)
    if metric is None:
        return name, None, None
    words = "" if metric == "acc" else f" {metric.replace('_', ' ')}" + " (lm-eval)" * metric.endswith("perplexity")
    return f"{name}{words}", values.get(metric), values.get("acc_norm")


_TITLE = r"\S+?( \d+-shot)?( chat)?( system prompt)?(, limit \d+)?"
_ROW = re.compile(rf"({_TITLE}( mean)?( of \d+ of \d+ tasks)?|  \S+ \({_TITLE}\))(?P<metric> .+)?")
_SHARES = re.compile(r" ((.* )?acc(uracy)?( .*)?|(quasi )?(prefix )?exact match|em|f1|pass@\d+)")


def is_share(name: str) -> bool:
    """Whether a row's value is a share of samples, shown in percent, rather than a perplexity, a BLEU or the like."""
    if name.startswith(("ppl ", "KL(", "top-1 agreement ")):
        return name.startswith("top-1")
    row = _ROW.fullmatch(name)
    metric = None if row is None else row["metric"]
    return row is not None and (metric is None or _SHARES.fullmatch(metric) is not None)


def group_mean(family: list[dict[str, Any]], group: str) -> dict[str, float]:
    """The mean of a group over those of its tasks that have been measured, with its standard error if it is lm-eval's.

    Args:
        family: results of single tasks.
        group: one of the groups they name.
    """
    inside = [result["metrics"] for result in family if group in result["metrics"]["groups"]]
    tasks = [values for metrics in inside for values in metrics["tasks"].values()]
    rules = inside[0]["groups"][group]
    if not rules:
        return harness.plain_mean(tasks)
    mean = {}
    for metric, by_samples in rules.items():
        having = [values for values in tasks if metric in values]
        if not having:
            continue
        sizes = [values["samples"] for values in having]
        weights = sizes if by_samples else [1] * len(having)
        pairs = zip(weights, having, strict=True)
        mean[metric] = sum(weight * values[metric] for weight, values in pairs) / sum(weights)
        errors = [values.get(f"{metric}_stderr") for values in having]
        if None not in errors:
            mean[f"{metric}_stderr"] = _error_of_mean(errors, sizes, by_samples)  # type: ignore[arg-type]
    return mean


def _error_of_mean(errors: list[float], sizes: list[int], by_samples: bool) -> float:
    """lm-eval's: of the pooled variance over all samples, or of a mean of independent means."""
    if not by_samples:
        return math.sqrt(sum(error**2 for error in errors)) / len(errors)
    pooled = sum((size - 1) * size * error**2 for error, size in zip(errors, sizes, strict=True))
    return math.sqrt(pooled / (sum(sizes) - len(sizes)) / sum(sizes))
