"""Bridge to EleutherAI's lm-evaluation-harness: task groups, few-shot counts and scores."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import io
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from sppctl.errors import StageError, UserError, first_line
from sppctl.evaluate import task_names
from sppctl.evaluate.results import Json, Rules, TaskMeasure, TaskNumbers, TaskScores
from sppctl.evaluate.task_names import IS_PATTERN, SHOTS, ZEROSHOT
from sppctl.evaluate.values import headline, plain_mean
from sppctl.files import sources

# where lm-eval defines these tasks and wikitext; indexing all of its 14,000 files takes 15 seconds
_FOLDERS = ("super_glue/boolq", "glue/rte", "hellaswag", "winogrande", "arc", "openbookqa", "mmlu/default", "wikitext")
BOOTSTRAP = 100  # resamples, for the few metrics whose standard error has no formula


# --- names ------------------------------------------------------------------------------------------------------------


@functools.cache
def _task_manager(include_path: str | None, complete: bool) -> Any:
    """lm-eval's index of tasks: the complete one, or the tasks of our own groups only, which takes no time."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    import lm_eval.tasks

    if complete:
        return lm_eval.tasks.TaskManager(include_path=include_path)
    root = Path(lm_eval.tasks.__file__).parent
    folders = [str(root / folder) for folder in _FOLDERS] + ([include_path] if include_path else [])
    return lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False)


def _manager_for(names: list[str], include_path: str | None) -> Any:
    """The small index if it defines all of the names, else the complete one."""
    small = _task_manager(include_path, complete=False)
    is_sufficient = all(_is_defined(name, small.task_index) for name in names)
    return small if is_sufficient else _task_manager(include_path, complete=True)


def _is_defined(name: str, index: Json) -> bool:
    """Whether an index holds a task, or a group with all its members; files outside it may add members to a tag."""
    entry = index.get(name)
    if entry is None or entry.kind.name == "TAG":
        return entry is not None and name.startswith("mmlu_")
    children = entry.cfg["task"] if entry.kind.name == "GROUP" else []
    return all(isinstance(child, str) and _is_defined(child, index) for child in children)


def expanded(names: list[str], include_path: str | None = None) -> list[str]:
    """Unique task names, with ``all`` and patterns such as ``blimp_*`` expanded.

    Raises:
        UserError: a pattern matches no task, tag or group of lm-eval.
    """
    tasks: list[str] = []
    for name in names:
        matching = [*SHOTS, "wikitext"] if name == "all" else [name]
        if IS_PATTERN.search(name):
            matching = sorted(fnmatch.filter(_task_manager(include_path, complete=True).all_tasks, name))
            if not matching:
                raise UserError("eval.tasks", f"{name} matches no lm-eval task", "`lm-eval ls tasks` lists them")
        tasks += matching
    return list(dict.fromkeys(tasks))


def check_tasks(names: list[str], include_path: str | None = None, tokenizer: Any = None) -> None:
    """Checks that lm-eval knows every task, without loading any data.

    Raises:
        UserError: a task or folder is unknown, or a task needs an end-of-text token that the tokenizer does not have.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError("eval.include_path", f"{include_path} is not a folder", "give the folder of your tasks' YAML")
    lm_eval_names = [name for name in expanded(names, include_path) if name not in SHOTS]
    if not lm_eval_names:
        return
    available = _manager_for(lm_eval_names, include_path).all_tasks
    for name in lm_eval_names:
        if name not in available:
            raise task_names.unknown(name, available)
    without_end = tokenizer is not None and tokenizer.eos_token_id is None
    for name in lm_eval_names:
        for task in members(name, include_path):
            definition = _definition(task, include_path) or {}
            if definition.get("unsafe_code"):
                raise UserError(
                    "eval.tasks",
                    f"{name} executes model-generated code, which sppctl refuses",
                    "use lm_eval itself (--confirm_run_unsafe_code), in a sandbox",
                )
            kind = definition.get("output_type")
            if without_end and (
                kind == "generate_until" or (kind == "loglikelihood_rolling" and tokenizer.bos_token_id is None)
            ):
                raise UserError(
                    "eval.tasks",
                    f"{task} ({kind}) needs an end-of-text token, but the tokenizer has none",
                    "set eos_token in the model's tokenizer_config.json",
                )


def _definition(name: str, include_path: str | None) -> Json | None:
    """The content of a task's YAML; None for a group, and for a task that is a Python class."""
    from lm_eval.tasks._yaml_loader import load_yaml

    entry = _manager_for([name], include_path).task_index[name]
    return load_yaml(entry.yaml_path, resolve_func=False) if entry.kind.name == "TASK" else None


def without_group(measure: TaskMeasure, include_path: str | None) -> TaskMeasure:
    """The measure without its group, with the actual number of examples, and with a seed only if it has an effect.

    A seed has an effect where examples or answers are drawn. Groups, and tasks that are Python classes, have no
    definition to read; they keep both.
    """
    definition = _definition(measure.task, include_path)
    if definition is None:
        return replace(measure, group=None)
    count = _shots(definition.get("num_fewshot"), measure.num_fewshot)
    is_drawn = count != 0 or definition.get("output_type", "generate_until") == "generate_until"
    return replace(measure, group=None, num_fewshot=count, seed=measure.seed if is_drawn else None)


def _shots(default: int | None, configured: int | None) -> int:
    """As in lm-eval: a task that defines 0 examples keeps 0; without any setting there are none."""
    return default or 0 if configured is None or default == 0 else configured


def load_tasks(names: list[str], include_path: str | None = None) -> None:
    """Loads the data of tasks into the cache of ``datasets``; UserError if that fails."""
    try:
        with _stage_errors(", ".join(names)), _quiet(processes=True):
            _load(names, include_path)
    except StageError as error:
        fix = "check the network and the task's files; scripts/prefetch.sh loads data for offline use"
        raise UserError("eval.tasks", str(error), fix) from error


def _load(names: list[str], include_path: str | None) -> tuple[Any, sources.Recorded]:
    """Tasks as lm-eval loads them, and the sources that were read."""
    manager = _manager_for(names, include_path)
    with sources.recording() as recorded:
        loaded = manager.load(names)
        for task in loaded["tasks"].values():
            sources.note(getattr(task, "dataset", None))
    return loaded, recorded


def members(name: str, include_path: str | None = None) -> dict[str, Rules]:
    """The tasks of a group that can be run one by one with the same results, each with the groups that it is in.

    A group that changes its tasks' settings, or averages the results of certain filters only, is one member.
    """
    if name == "zeroshot":
        return {task: {name: {}} for task in ZEROSHOT}
    index = _manager_for([name], include_path).task_index
    tasks: dict[str, Rules] = {}
    try:
        for task, groups in _leaves(name, index, {}):  # a task that is listed twice is run once
            tasks[task] = tasks.get(task, {}) | groups
    except LookupError:
        return {name: {}}
    return tasks


def _leaves(name: str, index: Json, outer_groups: Rules) -> Iterator[tuple[str, Rules]]:
    from lm_eval.tasks._factory import GROUP_FIELD_NAMES

    entry = index[name]
    if entry.kind.name not in ("GROUP", "TAG"):
        yield name, outer_groups
        return
    if entry.kind.name == "TAG":
        children: list[Any] = sorted(entry.tags)
        groups = outer_groups or {name: {}}
    else:
        children = entry.cfg["task"]
        rules = entry.cfg.get("aggregate_metric_list") or []
        rules = [rules] if isinstance(rules, dict) else rules
        special = any(rule.get("filter_list") or rule.get("aggregation", "mean") != "mean" for rule in rules)
        if special or set(entry.cfg) - GROUP_FIELD_NAMES or not all(isinstance(child, str) for child in children):
            raise LookupError(f"{name} is more than a list of tasks")
        groups = outer_groups | {name: {rule["metric"]: rule.get("weight_by_size", True) for rule in rules}}
    for child in children:
        yield from _leaves(child, index, groups)


def are_current(task: str, recorded: Json, include_path: str | None) -> bool:
    """Whether the files and data of a task are those that an earlier run recorded (``sources`` of its numbers)."""
    return sources.are_current(recorded, _manager_for([task], include_path).task_index[task].yaml_path, include_path)


# --- running ----------------------------------------------------------------------------------------------------------


def evaluate(
    model: Any, tokenizer: Any, measure: TaskMeasure, include_path: str | None = None, label: str = ""
) -> tuple[TaskNumbers, dict[str, list[Json]]]:
    """Runs one task, or one group of lm-eval, on a loaded model; several processes share the work.

    Returns:
        The numbers, without groups; and for each task the records of its samples (see :func:`_sample`), of the first
        filter if there are several.

    Raises:
        StageError: lm-eval failed, for example because a data set could not be loaded.
    """
    import datasets
    import lm_eval
    from transformers import set_seed

    from sppctl.evaluate.scorer import Scorer

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    seed = measure.seed or 0
    with _stage_errors(measure.task):
        with _quiet(processes=True):
            set_seed(seed)
            loaded, recorded = _load([measure.task], include_path)
            for task in loaded["tasks"].values():
                task.set_config(key="num_fewshot", value=_shots(task.get_config("num_fewshot"), measure.num_fewshot))
                task.set_fewshot_seed(seed=seed)
        scorer = Scorer(model, tokenizer, measure.batch_size, seed=seed, label=label)
        with _quiet():
            # simple_evaluate would describe the machine each time, for longer than some tasks take
            outcome = lm_eval.evaluate(
                lm=scorer,
                task_dict=loaded,
                limit=measure.limit,
                bootstrap_iters=BOOTSTRAP,
                log_samples=True,
                system_instruction=measure.system_prompt,
                apply_chat_template=measure.chat_template,
                fewshot_as_multiturn=measure.chat_template,
            )
            assert outcome is not None
            samples = {
                task: [_sample(loaded["tasks"][task], log) for log in logs if log["filter"] == logs[0]["filter"]]
                for task, logs in outcome["samples"].items()
            }
    truncated, summary = len(scorer.truncated), recorded.summary(include_path)
    return replace(task_numbers(outcome), truncated_prompts=truncated, sources=summary), samples


@contextlib.contextmanager
def _stage_errors(name: str) -> Iterator[None]:
    """Turns whatever datasets, jinja or a task's own code raise into a StageError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise StageError(f"lm-eval could not run {name}: {first_line(error)}") from error


@contextlib.contextmanager
def _quiet(processes: bool = False) -> Iterator[None]:
    """Keeps stdout for results, and stderr clean of lm-eval's bars where it is not a terminal.

    ``processes``: also silences subprocesses, such as the `git` that lm-eval calls when it loads tasks; then no
    progress can be shown.
    """
    with contextlib.redirect_stdout(io.StringIO()), open(os.devnull, "w") as devnull:
        if sys.stderr.isatty():
            yield
        elif not processes:
            with contextlib.redirect_stderr(devnull):
                yield
        else:
            sys.stderr.flush()
            saved = os.dup(2)
            os.dup2(devnull.fileno(), 2)
            try:
                yield
            finally:
                sys.stderr.flush()
                os.dup2(saved, 2)
                os.close(saved)


# --- results ----------------------------------------------------------------------------------------------------------


def task_numbers(outcome: Json) -> TaskNumbers:
    """The scores of each task that lm-eval returns, and its mean of a group that it defines, else the plain mean."""
    tasks = {}
    for task, metrics in outcome["results"].items():
        if task not in outcome["n-samples"]:  # a group
            continue
        scores = _plain(metrics)
        metric = headline(scores)
        tasks[task] = TaskScores(
            scores,
            metric,
            outcome.get("higher_is_better", {}).get(task, {}).get(metric),
            outcome["versions"].get(task),
            outcome["n-shot"].get(task),
            outcome["n-samples"][task]["effective"],
        )
    subtasks = {member for members in outcome.get("group_subtasks", {}).values() for member in members}
    outermost = [name for name in outcome["results"] if name in outcome.get("groups", {}) and name not in subtasks]
    if outermost:
        return TaskNumbers(tasks, _plain(outcome["results"][outermost[0]]))
    return TaskNumbers(tasks, plain_mean([task_scores.scores for task_scores in tasks.values()]))


def _plain(metrics: Json) -> dict[str, float]:
    """``{"acc,none": 0.5, ...}`` without the filter's name; where a metric has several, only the first loses it."""
    plain: dict[str, float] = {}
    for key, value in metrics.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and "," in key:
            metric, _, filter_name = key.partition(",")
            plain[f"{filter_name} {metric}" if metric in plain else metric] = float(value)
    return plain


def _sample(task: Any, sample: Json) -> Json:
    """The record of one document.

    Returns:
        ``{"doc": its number, "hash": of its content, "chosen": index of the likeliest answer, "target": index of the
        correct one, metric: value, ...}``; None where there is no choice, or no single correct answer.
    """
    chosen = target = None
    if task.OUTPUT_TYPE == "multiple_choice":
        choices = task.doc_to_choice(sample["doc"])
        likelihoods = [likelihood for likelihood, _ in sample["filtered_resps"][: len(choices)]]
        chosen = max(range(len(likelihoods)), key=likelihoods.__getitem__)
        gold = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
        if isinstance(gold, str):
            gold = choices.index(gold) if gold in choices else None
        target = gold if isinstance(gold, int) else None
    record = {"doc": sample["doc_id"], "hash": sample["doc_hash"], "chosen": chosen, "target": target}
    for metric in sample["metrics"]:
        value = sample[metric]
        if isinstance(value, int | float):
            record[metric] = int(value) if metric.startswith("acc") and value in (0, 1) else float(value)
    return record
