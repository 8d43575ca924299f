"""Bridge to EleutherAI's lm-evaluation-harness: task groups, few-shot counts, and what to take from its results."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sppctl.errors import StageError, UserError

# the seven tasks of the SparseGPT / Wanda / SPP papers; the published metric is acc, not acc_norm
ZEROSHOT = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")


@dataclass(frozen=True)
class TaskGroup:
    """Tasks that are run and averaged together."""

    tasks: tuple[str, ...]
    num_fewshot: int | None = None


GROUPS = {"zeroshot": TaskGroup(ZEROSHOT, 0), "mmlu": TaskGroup(("mmlu",), 5)}


def group_of(name: str) -> TaskGroup:
    """The tasks a name means: one of ours, or any task or group of lm-eval with its own few-shot count."""
    return GROUPS.get(name, TaskGroup((name,)))


@functools.cache
def _task_manager() -> Any:
    """lm-eval's index of tasks; it takes seconds to build."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    return TaskManager()


def check_tasks(names: list[str]) -> None:
    """Checks that lm-eval knows every task, without loading any data.

    Raises:
        UserError: it does not.
    """
    if not [name for name in names if name not in GROUPS]:
        return
    known = set(_task_manager().all_tasks)
    unknown = [name for name in names if name not in GROUPS and name not in known]
    if unknown:
        import difflib

        close = difflib.get_close_matches(unknown[0], [*GROUPS, *known], n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else "; `lm-eval ls tasks` lists them"
        raise UserError(f"eval.tasks: {unknown[0]} is neither zeroshot nor mmlu nor an lm-eval task{hint}")


def load_tasks(name: str) -> None:
    """Loads the data of a task group, which leaves it in the cache of ``datasets``.

    Args:
        name: a key of ``GROUPS``, or a task or group of lm-eval.

    Raises:
        StageError: it cannot be had.
    """
    try:
        with _only_progress():
            _task_manager().load_task_or_group(list(group_of(name).tasks))
    except Exception as error:
        raise _failed(name, error) from error


def evaluate(model: Any, tokenizer: Any, name: str, *, batch_size: int, limit: int | None, seed: int) -> dict[str, Any]:
    """Runs one task group on a loaded model.

    Args:
        model: causal language model of transformers.
        tokenizer: its tokenizer.
        name: a key of ``GROUPS``, or a task or group of lm-eval.
        batch_size: requests at a time.
        limit: first examples of each task; None: all.
        seed: for few-shot sampling.

    Returns:
        ``{"tasks": {task: {metric: value, metric_stderr: value, "version", "num_fewshot", "samples"}}, "mean": {...}}``
        where the mean is lm-eval's own for a group it defines, else the plain mean over tasks.

    Raises:
        StageError: lm-eval failed, for example because a dataset cannot be had.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    import datasets
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    group = group_of(name)
    try:
        with _only_progress():
            found = lm_eval.simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                tasks=list(group.tasks),
                num_fewshot=group.num_fewshot,
                limit=limit,
                task_manager=_task_manager(),
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
                bootstrap_iters=100,  # for the few metrics whose standard error has no formula
                log_samples=False,
            )
    except Exception as error:  # whatever datasets, jinja or a task's own code raise
        raise _failed(name, error) from error
    assert found is not None
    return _summary(found, group)


def _failed(name: str, error: Exception) -> StageError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return StageError(f"lm-eval could not run {name}: {reason}")


@contextlib.contextmanager
def _only_progress() -> Iterator[None]:
    """Keeps stdout for results, and stderr clean where it is no terminal: lm-eval and its `git` write freely."""
    with contextlib.redirect_stdout(io.StringIO()):
        if sys.stderr.isatty():
            yield
            return
        sys.stderr.flush()
        saved = os.dup(2)
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)


def _summary(found: Any, group: TaskGroup) -> dict[str, Any]:
    subtasks = {member for members in found.get("group_subtasks", {}).values() for member in members}
    tasks = {}
    for task, metrics in found["results"].items():
        if task not in found["n-samples"]:
            continue
        tasks[task] = _plain(metrics) | {
            "version": found["versions"].get(task),
            "num_fewshot": found["n-shot"].get(task),
            "samples": found["n-samples"][task]["effective"],
        }
    top = {task: metrics for task, metrics in found["results"].items() if task in found.get("groups", {})}
    own_mean = [metrics for task, metrics in top.items() if task not in subtasks]
    if len(group.tasks) == 1 and own_mean:
        mean = _plain(own_mean[0])
    else:
        measured = {metric for values in tasks.values() for metric in values if metric.startswith("acc")}
        mean = {
            metric: sum(values[metric] for values in tasks.values()) / len(tasks)
            for metric in sorted(measured)
            if all(metric in values for values in tasks.values()) and not metric.endswith("stderr")
        }
    return {"tasks": tasks, "mean": mean}


def _plain(metrics: dict[str, Any]) -> dict[str, float]:
    """``{"acc,none": 0.5, ...}`` without the filter's name; of several for one metric only the first loses it."""
    plain: dict[str, float] = {}
    for key, value in metrics.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and "," in key:
            metric, _, chosen = key.partition(",")
            plain[f"{chosen} {metric}" if metric in plain else metric] = float(value)
    return plain
