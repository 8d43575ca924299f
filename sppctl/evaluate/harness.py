"""Bridge to EleutherAI's lm-evaluation-harness: task groups, few-shot counts, and what to take from its results."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import functools
import io
import itertools
import logging
import os
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sppctl.errors import StageError, UserError
from sppctl.evaluate.results import Json, Rules
from sppctl.evaluate.values import headline, plain_mean
from sppctl.files import sources, strict_json

# the seven tasks of the SparseGPT / Wanda / SPP papers; the published metric is acc, not acc_norm
ZEROSHOT = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
ALL = ("zeroshot", "mmlu", "wikitext")
# where lm-eval defines the tasks above; its index of all 14,000 files takes a quarter of a minute
_FOLDERS = ("super_glue/boolq", "glue/rte", "hellaswag", "winogrande", "arc", "openbookqa", "mmlu/default", "wikitext")
BOOTSTRAP = 100  # samples, for the few metrics whose standard error has no formula


@dataclass(frozen=True)
class TaskGroup:
    """Tasks that are run and averaged together."""

    tasks: tuple[str, ...]
    num_fewshot: int | None = None


GROUPS = {"zeroshot": TaskGroup(ZEROSHOT, 0), "mmlu": TaskGroup(("mmlu",), 5)}


def group_of(name: str) -> TaskGroup:
    """The tasks a name means: one of ours, or any task or group of lm-eval with its own few-shot count."""
    return GROUPS.get(name, TaskGroup((name,)))


@dataclass(frozen=True)
class Member:
    """A task that is run by itself.

    Attributes:
        task: its name in lm-eval.
        groups: the groups it is averaged in, the widest first; for each the metrics that lm-eval averages, and whether
            by samples (True) or by tasks. No metric: the plain mean of the accuracies.
    """

    task: str
    groups: Rules = field(default_factory=dict)


# --- names ------------------------------------------------------------------------------------------------------------


@functools.cache
def _task_manager(include_path: str | None, whole: bool) -> Any:
    """lm-eval's index of tasks: the whole, or that of our own groups, which takes no time."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    import lm_eval.tasks

    if whole:
        return lm_eval.tasks.TaskManager(include_path=include_path)
    root = Path(lm_eval.tasks.__file__).parent
    folders = [str(root / folder) for folder in _FOLDERS] + ([include_path] if include_path else [])
    return lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False)


def _manager_for(names: list[str], include_path: str | None) -> Any:
    """The small index if it knows all about the names, else the whole."""
    small = _task_manager(include_path, whole=False)
    closed = all(_closed(name, small.task_index) for name in names)
    return small if closed else _task_manager(include_path, whole=True)


def _closed(name: str, index: Json) -> bool:
    """Whether an index holds a task, or a group with all members; other files may add members to a tag."""
    entry = index.get(name)
    if entry is None or entry.kind.name == "TAG":
        return entry is not None and name.startswith("mmlu_")
    children = entry.cfg["task"] if entry.kind.name == "GROUP" else []
    return all(isinstance(child, str) and _closed(child, index) for child in children)


def expanded(names: list[str], include_path: str | None = None) -> list[str]:
    """Names without repetition; ``all``, and patterns such as ``blimp_*``, replaced by what they mean.

    Raises:
        UserError: a pattern matches no task, tag or group of lm-eval.
    """
    found: list[str] = []
    for name in names:
        if name == "all":
            found += ALL
        elif set(name) & set("*?["):
            known = _task_manager(include_path, whole=True).all_tasks
            matching = sorted(fnmatch.filter(known, name))
            if not matching:
                raise UserError(f"eval.tasks: {name} matches no lm-eval task; `lm-eval ls tasks` lists them")
            found += matching
        else:
            found.append(name)
    return list(dict.fromkeys(found))


def check_tasks(names: list[str], include_path: str | None = None, tokenizer: Any = None) -> None:
    """Checks that lm-eval knows every task, without loading any data.

    Raises:
        UserError: a task or folder is unknown, or a task needs an end-of-text token that the tokenizer does not have.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"eval.include_path: {include_path} is not a folder; give the one with your tasks' YAML")
    foreign = [name for name in expanded(names, include_path) if name not in GROUPS]
    if not foreign:
        return
    known = _manager_for(foreign, include_path).all_tasks
    unknown = [name for name in foreign if name not in known]
    if unknown:
        close = difflib.get_close_matches(unknown[0], [*GROUPS, *known], n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else "; `lm-eval ls tasks` lists them"
        raise UserError(f"eval.tasks: {unknown[0]} is neither zeroshot nor mmlu nor an lm-eval task{hint}")
    unsafe = [name for name in foreign for member in members(name, include_path) if _runs_code(member, include_path)]
    if unsafe:
        raise UserError(
            f"eval.tasks: {unsafe[0]} executes model-generated code, which sppctl refuses; use lm_eval itself "
            "(--confirm_run_unsafe_code), in a sandbox"
        )
    if tokenizer is None or tokenizer.eos_token_id is not None:
        return
    for member in itertools.chain.from_iterable(members(name, include_path) for name in foreign):
        kind = (_definition(member.task, include_path) or {}).get("output_type")
        if kind == "generate_until" or (kind == "loglikelihood_rolling" and tokenizer.bos_token_id is None):
            raise UserError(
                f"eval.tasks: {member.task} ({kind}) needs an end-of-text token, and the tokenizer has none; "
                "name it in the model's tokenizer_config.json (eos_token)"
            )


def _runs_code(member: Member, include_path: str | None) -> bool:
    definition = _definition(member.task, include_path)
    return definition is not None and bool(definition.get("unsafe_code"))


def _definition(name: str, include_path: str | None) -> Json | None:
    """The content of a task's YAML; None for a group, and for a task that is a Python class."""
    from lm_eval.tasks._yaml_loader import load_yaml

    entry = _manager_for([name], include_path).task_index[name]
    return load_yaml(entry.yaml_path, resolve_func=False) if entry.kind.name == "TASK" else None


def shots(task: str, asked: int | None, include_path: str | None = None) -> int | None:
    """Examples that prompts have if ``asked`` is configured; as asked where only running the task would tell."""
    definition = _definition(task, include_path)
    return asked if definition is None else _shots(definition.get("num_fewshot"), asked)


def is_drawn(task: str, count: int | None, include_path: str | None = None) -> bool:
    """Whether a seed can change a task's numbers: it draws ``count`` examples, or answers, or cannot be looked into."""
    definition = _definition(task, include_path)
    return definition is None or count != 0 or definition.get("output_type", "generate_until") == "generate_until"


def _shots(own: int | None, asked: int | None) -> int:
    """As lm-eval does: a task whose own count is 0 keeps it, one without a count has none."""
    return own or 0 if asked is None or own == 0 else asked


def load_tasks(names: list[str], include_path: str | None = None) -> None:
    """Loads the data of tasks, which leaves it in the cache of ``datasets``.

    Args:
        names: tasks or groups of lm-eval.
        include_path: folder with tasks of one's own.

    Raises:
        StageError: it could not be loaded.
    """
    try:
        with _silently():
            _load(names, include_path)
    except Exception as error:
        raise _failed(", ".join(names), error) from error


def _load(names: list[str], include_path: str | None) -> tuple[Any, sources.Recorded]:
    """Tasks as lm-eval loads them, and what was read to do so."""
    manager = _manager_for(names, include_path)
    with sources.recording() as recorded:
        loaded = manager.load(names)
        for task in loaded["tasks"].values():
            sources.note(getattr(task, "dataset", None))
    return loaded, recorded


def members(name: str, include_path: str | None = None) -> list[Member]:
    """The tasks of a group, each of which can be run by itself without changing its numbers.

    A group that changes its tasks' settings, or averages only what a certain filter lets through, is one member.
    """
    if name == "zeroshot":
        return [Member(task, {name: {}}) for task in ZEROSHOT]
    index = _manager_for([name], include_path).task_index
    found: dict[str, Rules] = {}
    try:
        for member in _leaves(name, index, {}):  # one that is named twice is run once
            found[member.task] = found.get(member.task, {}) | member.groups
    except LookupError:
        return [Member(name)]
    return [Member(task, groups) for task, groups in found.items()]


def _leaves(name: str, index: Json, above: Rules) -> Iterator[Member]:
    from lm_eval.tasks._factory import GROUP_FIELD_NAMES

    entry = index[name]
    if entry.kind.name not in ("GROUP", "TAG"):
        yield Member(name, above)
        return
    if entry.kind.name == "TAG":
        children: list[Any] = sorted(entry.tags)
        groups = above or {name: {}}
    else:
        children = entry.cfg["task"]
        rules = entry.cfg.get("aggregate_metric_list") or []
        rules = [rules] if isinstance(rules, dict) else rules
        special = any(rule.get("filter_list") or rule.get("aggregation", "mean") != "mean" for rule in rules)
        if special or set(entry.cfg) - GROUP_FIELD_NAMES or not all(isinstance(child, str) for child in children):
            raise LookupError(f"{name} is more than a list of tasks")
        groups = above | {name: {rule["metric"]: rule.get("weight_by_size", True) for rule in rules}}
    for child in children:
        yield from _leaves(child, index, groups)


def are_current(task: str, recorded: Json, include_path: str | None) -> bool:
    """Whether a task would be made from what is recorded of an earlier run of it (``sources`` of :func:`evaluate`)."""
    return sources.are_current(recorded, _manager_for([task], include_path).task_index[task].yaml_path, include_path)


# --- running ----------------------------------------------------------------------------------------------------------


def evaluate(
    model: Any,
    tokenizer: Any,
    name: str,
    *,
    num_fewshot: int | None,
    batch_size: int | None,
    limit: int | None,
    seed: int,
    chat_template: bool = False,
    system_prompt: str | None = None,
    include_path: str | None = None,
    progress: Callable[[str, int], Any] | None = None,
) -> tuple[Json, dict[str, list[Json]]]:
    """Runs one task, or one group of lm-eval, on a loaded model; several processes share the work.

    Args:
        model: causal language model of transformers.
        tokenizer: its tokenizer.
        name: a task or group of lm-eval.
        num_fewshot: examples in the prompt; None, or a task that insists on none: as the task has it.
        batch_size: requests at a time; None: as many as memory allows.
        limit: first examples of each task; None: all.
        seed: for few-shot sampling, and for generation that draws.
        chat_template: whether prompts are put into the tokenizer's chat template, few-shot examples as turns.
        system_prompt: system message.
        include_path: folder with tasks of one's own.
        progress: given what is done and how many of it, a context manager whose ``advance`` is called for each.

    Returns:
        ``{"tasks": {task: {metric: value, metric_stderr: value, "metric", "higher_is_better", "version", "num_fewshot",
        "samples"}}, "mean": {...}, "truncated_prompts": n, "sources": {...}}``, where "metric" is the one that tables
        show, the mean is lm-eval's own for a group it defines, else the plain mean over tasks, and the sources are
        those of :meth:`sppctl.files.sources.Recorded.summary`; and for each task what came of each of its samples, see
        :func:`_sample`.

    Raises:
        StageError: lm-eval failed, for example because a data set could not be loaded.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    import datasets
    import lm_eval

    from sppctl.evaluate.scorer import Scorer

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        with _silently():
            _seed_everything(seed)
            loaded, recorded = _load([name], include_path)
            for task in loaded["tasks"].values():
                task.set_config(key="num_fewshot", value=_shots(task.get_config("num_fewshot"), num_fewshot))
                task.set_fewshot_seed(seed=seed)
        scorer = Scorer(model, tokenizer, batch_size, seed=seed, progress=progress)
        with _without_chatter():
            # simple_evaluate would describe the machine each time, for longer than some tasks take
            found = lm_eval.evaluate(
                lm=scorer,
                task_dict=loaded,
                limit=limit,
                bootstrap_iters=BOOTSTRAP,
                log_samples=True,
                system_instruction=system_prompt,
                apply_chat_template=chat_template,
                fewshot_as_multiturn=chat_template,
            )
            assert found is not None
            samples = {task: _samples(loaded["tasks"][task], logged) for task, logged in found["samples"].items()}
    except UserError:
        raise
    except Exception as error:  # whatever datasets, jinja or a task's own code raise
        raise _failed(name, error) from error
    summary = _summary(found)
    summary["truncated_prompts"] = len(scorer.truncated)
    summary["sources"] = recorded.summary(include_path)
    return summary, samples


def _seed_everything(seed: int) -> None:
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _failed(name: str, error: Exception) -> StageError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return StageError(f"lm-eval could not run {name}: {reason}")


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """Keeps stdout for results, and stderr clean of lm-eval's bars where it is not a terminal."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if not sys.stderr.isatty():
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield


@contextlib.contextmanager
def _silently() -> Iterator[None]:
    """As above, with all that other processes write: lm-eval calls `git` when it loads tasks."""
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


# --- results ----------------------------------------------------------------------------------------------------------


def _summary(found: Any) -> Json:
    subtasks = {member for members in found.get("group_subtasks", {}).values() for member in members}
    tasks = {}
    for task, metrics in found["results"].items():
        if task not in found["n-samples"]:
            continue
        values = _plain(metrics)
        direction = found.get("higher_is_better", {}).get(task, {}).get(headline(values))
        tasks[task] = values | ({} if direction is None else {"higher_is_better": direction})
        tasks[task] |= {
            "metric": headline(values),
            "version": found["versions"].get(task),
            "num_fewshot": found["n-shot"].get(task),
            "samples": found["n-samples"][task]["effective"],
        }
    top = {task: metrics for task, metrics in found["results"].items() if task in found.get("groups", {})}
    own_mean = [metrics for task, metrics in top.items() if task not in subtasks]
    return {"tasks": tasks, "mean": _plain(own_mean[0]) if own_mean else plain_mean(list(tasks.values()))}


def _plain(metrics: Json) -> dict[str, float]:
    """``{"acc,none": 0.5, ...}`` without the filter's name; of several for one metric only the first loses it."""
    plain: dict[str, float] = {}
    for key, value in metrics.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and "," in key:
            metric, _, chosen = key.partition(",")
            plain[f"{chosen} {metric}" if metric in plain else metric] = float(value)
    return plain


def _samples(task: Any, logged: list[Json]) -> list[Json]:
    """One record per document, in lm-eval's order; of several filters the first."""
    first = logged[0]["filter"]
    return [_sample(task, sample) for sample in logged if sample["filter"] == first]


def _sample(task: Any, sample: Json) -> Json:
    """What came of one document.

    Returns:
        ``{"doc": its number, "hash": of its content, "chosen": index of the likeliest answer, "target": index of the
        right one, metric: value, ...}``; None where there is no choice, or no single right one.
    """
    chosen = target = None
    if task.OUTPUT_TYPE == "multiple_choice":
        choices = task.doc_to_choice(sample["doc"])
        likelihoods = [likelihood for likelihood, _ in sample["filtered_resps"][: len(choices)]]
        chosen = max(range(len(likelihoods)), key=likelihoods.__getitem__)
        target = _gold(task, sample, choices)
    record = {"doc": sample["doc_id"], "hash": sample["doc_hash"], "chosen": chosen, "target": target}
    for metric in sample["metrics"]:
        value = sample[metric]
        if isinstance(value, int | float):
            record[metric] = int(value) if metric.startswith("acc") and value in (0, 1) else float(value)
    return record


def _gold(task: Any, sample: Json, choices: list[str]) -> int | None:
    right = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
    if isinstance(right, str):
        return choices.index(right) if right in choices else None
    return right if isinstance(right, int) else None


def as_lines(samples: list[Json]) -> str:
    """Records as JSON lines."""
    return "".join(strict_json.dumps(sample) + "\n" for sample in samples)
