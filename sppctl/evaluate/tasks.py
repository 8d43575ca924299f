"""Benchmark tasks of lm-eval, with one result per task.

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
from sppctl.evaluate.results import Rules, TaskMeasure, TaskNumbers, TaskResult
from sppctl.evaluate.task_names import SHOTS
from sppctl.evaluate.values import title_of
from sppctl.files import disk, paths, strict_json


def configured(config: Config) -> list[TaskMeasure]:
    """The configured tasks, one measure per task."""
    settings = config.eval
    batch_size = None if settings.batch_size == "auto" else settings.batch_size
    measures: list[TaskMeasure] = []
    for name in harness.expanded(settings.tasks, settings.include_path):
        shots = SHOTS.get(name) if settings.num_fewshot is None else settings.num_fewshot
        prompts = settings.chat_template, settings.system_prompt
        for task in harness.members(name, settings.include_path):
            group = name if task != name else None
            measures.append(TaskMeasure(task, shots, settings.limit, config.run.seed, group, *prompts, batch_size))
    return measures


def has_current_groups(config: Config, result: TaskResult) -> bool:
    """Whether a result records the groups that its task is in now, and their size."""
    return (result.numbers.groups, result.numbers.members) == _groups_and_size(config, result.measure)


def is_member(config: Config, result: TaskResult, measures: Iterable[TaskMeasure]) -> bool:
    """Whether the group of a result still has its task, if one of the measures is for that group."""
    group = result.measure.group
    if group is None or all(measure.group != group for measure in measures):
        return True
    return result.measure.task in harness.members(group, config.eval.include_path)


def is_current(config: Config, result: TaskResult) -> bool:
    """Whether the files and data of a configured task are still those that its result recorded."""
    sources = result.numbers.sources
    return sources is not None and harness.are_current(result.measure.task, sources, config.eval.include_path)


def has_samples(result: TaskResult, folder: Path) -> bool:
    """Whether the files of samples are those of a result, and not of the same task with other settings."""
    return all(
        (path := folder / _samples_name(result.measure, result.numbers, task)).is_file()
        and _content_hash(path.read_bytes()) == digest
        for task, digest in result.numbers.samples_hash.items()
    )


def _content_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def measure(
    config: Config, model: Any, tokenizer: Any, measure: TaskMeasure, *, label: str, samples: Path
) -> TaskNumbers:
    """Runs one task; all processes take part.

    ``samples``: directory for the records of samples, ``TASK.jsonl``, or for example ``TASK.5-shot.limit-20.jsonl``.
    """
    name = measure.task
    console.note(f"{label}: {title_of(replace(measure, group=None))}")
    numbers, logged = harness.evaluate(model, tokenizer, measure, config.eval.include_path, f"{label}: {name}, ")
    if numbers.truncated_prompts:
        console.warn(
            f"{name}: {numbers.truncated_prompts} prompts are longer than the model's context; lm-eval truncates "
            "them on the left"
        )
    hashes = {}
    for task, rows in logged.items():
        lines = "".join(strict_json.dumps(row) + "\n" for row in rows)
        if distributed.is_main():
            disk.write(samples / _samples_name(measure, numbers, task), lines)
        hashes[task] = _content_hash(lines.encode())
    groups, members = _groups_and_size(config, measure)
    return replace(numbers, groups=groups, members=members, samples_hash=hashes)


def _groups_and_size(config: Config, measure: TaskMeasure) -> tuple[Rules, int]:
    """The groups of a task, and the number of tasks in its configured group."""
    family = harness.members(measure.group or measure.task, config.eval.include_path)
    return family.get(measure.task, {}), len(family)


def reused(config: Config, measure: TaskMeasure, results: Iterable[TaskResult]) -> TaskResult | None:
    """The result of the same measure for another group, or for none, as one of this measure that took no time.

    ``results``: of the same weights, with their samples.
    """
    folder = config.eval.include_path
    for result in results:
        is_same_task = result.measure.task == measure.task
        if is_same_task and harness.without_group(result.measure, folder) == harness.without_group(measure, folder):
            groups, members = _groups_and_size(config, measure)
            numbers = replace(result.numbers, groups=groups, members=members)
            return replace(result, measure=measure, numbers=numbers, seconds=0.0)
    return None


def _samples_name(measure: TaskMeasure, numbers: TaskNumbers, task: str) -> str:
    """The file of a task's samples; those of a quick trial do not take the place of those of a long evaluation."""
    count = numbers.tasks[task].num_fewshot if task in numbers.tasks else None
    marks = [f".{count}-shot"] if count else []
    marks += [f".limit-{measure.limit}"] if measure.limit is not None else []
    marks += [".chat"] if measure.chat_template else []
    if measure.system_prompt is not None:
        marks.append(f".prompt-{_content_hash(measure.system_prompt.encode())[:8]}")
    return paths.file_stem(re.sub(r"[^\w.:-]+", "-", task)) + "".join(marks) + ".jsonl"
