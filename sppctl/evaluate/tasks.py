"""Benchmark tasks of lm-eval: which are asked for, one result each.

A group is measured task by task, so that an interrupted evaluation continues with the next task. Its mean is computed
from the results whenever it is shown.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from sppctl import console, distributed
from sppctl.config.settings import Config
from sppctl.evaluate import harness
from sppctl.evaluate.results import Rules, TaskMeasure, TaskNumbers, TaskResult, task_numbers
from sppctl.evaluate.values import quantity_of
from sppctl.files import disk, paths


def wanted(config: Config) -> list[TaskMeasure]:
    """The configured tasks, one measure per task."""
    measures: list[TaskMeasure] = []
    settings = config.eval
    batch_size = None if settings.batch_size == "auto" else settings.batch_size
    for name in harness.expanded(settings.tasks, settings.include_path):
        few = harness.group_of(name).num_fewshot if settings.num_fewshot is None else settings.num_fewshot
        for member in harness.members(name, settings.include_path):
            group = name if member.task != name else None
            measures.append(
                TaskMeasure(
                    member.task,
                    few,
                    settings.limit,
                    config.run.seed,
                    group,
                    settings.chat_template,
                    settings.system_prompt,
                    batch_size,
                )
            )
    return measures


def is_placed(config: Config, measure: TaskMeasure, result: TaskResult) -> bool:
    """Whether a result names the groups that the task is in now, and their size."""
    groups, members = _place(config, measure)
    return (result.numbers.groups, result.numbers.members) == (groups, members)


def is_current(config: Config, result: TaskResult) -> bool:
    """Whether a result of a configured task is of the files and data that the task is made from now."""
    sources = result.numbers.sources
    return sources is not None and harness.are_current(result.measure.task, sources, config.eval.include_path)


def has_samples(result: TaskResult, folder: Path) -> bool:
    """Whether the files of samples are still those of a result, and not of the same task with other settings."""
    return all(
        _content_hash(folder / _samples_name(result.numbers, task)) == expected
        for task, expected in result.numbers.samples_hash.items()
    )


def _content_hash(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else None


def measure(
    config: Config, model: Any, tokenizer: Any, measure: TaskMeasure, *, label: str, samples: Path
) -> TaskNumbers:
    """Runs one task; every process of several takes part.

    Args:
        config: the configuration, for what does not change the numbers.
        model: the loaded model.
        tokenizer: its tokenizer.
        measure: one of :func:`wanted`.
        label: of the checkpoint, for progress.
        samples: folder for what came of each sample, ``TASK.jsonl`` or with examples ``TASK.5-shot.jsonl``.
    """
    name = measure.task
    console.note(f"{label}: {quantity_of(measure).label}")
    metrics, logged = harness.evaluate(
        model,
        tokenizer,
        name,
        num_fewshot=measure.num_fewshot,
        batch_size=None if config.eval.batch_size == "auto" else config.eval.batch_size,
        limit=measure.limit,
        seed=measure.seed or 0,
        chat_template=measure.chat_template,
        system_prompt=measure.system_prompt,
        include_path=config.eval.include_path,
        progress=lambda what, count: console.Progress(f"{label}: {name}, {what}", count),
    )
    if metrics["truncated_prompts"]:
        console.warn(
            f"{name}: {metrics['truncated_prompts']} prompts are longer than the model's context; lm-eval cuts off "
            "their beginning"
        )
    groups, members = _place(config, measure)
    numbers = replace(task_numbers(metrics), groups=groups, members=members)
    hashes = {task: _write_samples(samples / _samples_name(numbers, task), rows) for task, rows in logged.items()}
    return replace(numbers, samples_hash=hashes)


def _place(config: Config, measure: TaskMeasure) -> tuple[Rules, int]:
    """Groups of a task, and the number of tasks that were asked for with it."""
    family = harness.members(measure.group or measure.task, config.eval.include_path)
    return next((member.groups for member in family if member.task == measure.task), {}), len(family)


def shared(config: Config, measure: TaskMeasure, known: Iterable[TaskResult]) -> TaskResult | None:
    """The same measurement for another group, or for none, as the one that is asked for.

    Args:
        config: the configuration.
        measure: one of :func:`wanted`.
        known: results for the same weights whose samples are there.

    Returns:
        A result, which took no time; None if there is none.
    """
    twins = [result for result in known if result.measure.task == measure.task]
    asked = _alone(config, measure) if twins else None
    twin = next((result for result in twins if _alone(config, result.measure) == asked), None)
    if twin is None:
        return None
    groups, members = _place(config, measure)
    return replace(twin, measure=measure, numbers=replace(twin.numbers, groups=groups, members=members), seconds=0.0)


def _alone(config: Config, measure: TaskMeasure) -> TaskMeasure:
    """The measure without its group, with the examples that prompts really have, and with a seed only if it counts."""
    own = config.eval.include_path
    count = harness.shots(measure.task, measure.num_fewshot, own)
    seed = measure.seed if harness.is_drawn(measure.task, count, own) else None
    return replace(measure, group=None, num_fewshot=count, seed=seed)


def _write_samples(path: Path, rows: list[dict[str, Any]]) -> str:
    lines = harness.as_lines(rows)
    if distributed.is_main():
        disk.write(path, lines)
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def _samples_name(numbers: TaskNumbers, task: str) -> str:
    """The file of a task's samples: one for each number of examples, so that groups with several do not take turns."""
    count = numbers.tasks[task].num_fewshot if task in numbers.tasks else None
    return paths.file_stem(re.sub(r"[^\w.:-]+", "-", task)) + (f".{count}-shot" if count else "") + ".jsonl"
