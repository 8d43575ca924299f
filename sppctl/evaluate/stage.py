"""Any checkpoint -> perplexity and benchmark accuracy, with plain transformers and lm-eval.

Each checkpoint has one JSON file of results. A result is reused if the measure, its settings and the weights are the
same; results of other measures are added to the file.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from sppctl import console, distributed, machine
from sppctl.config.settings import Config
from sppctl.data import texts, vocabulary
from sppctl.data.chat import try_template
from sppctl.errors import Problems, UserError, first_line
from sppctl.evaluate import harness, perplexities, perplexity, results, tasks
from sppctl.evaluate.perplexities import DenseModel, Windows
from sppctl.evaluate.results import AnyResult, Measure, Results, TaskMeasure, TaskResult, TextMeasure, TextResult
from sppctl.evaluate.subjects import Subject, shortage
from sppctl.inspect import inspect
from sppctl.model import checkpoint, find
from sppctl.model.blocks import Skeleton
from sppctl.model.estimate import CHARACTERS, Work
from sppctl.model.weights import check_directory

LOADED_AT_ONCE = 20  # tasks whose data is loaded before a run starts; more would take too long


# --- before a run -----------------------------------------------------------------------------------------------------


def preflight(config: Config, skeleton: Skeleton, tokenizer: Any) -> Work:
    """Checks that texts can be loaded and tasks are known.

    Returns:
        The work of evaluating one checkpoint, without benchmark tasks.

    Raises:
        UserError: with all problems.
    """
    problems, settings, tokens = Problems(), config.eval, 0.0
    window = perplexity.window_length(settings.seq_len, checkpoint.max_window(skeleton.config))
    with problems:
        checkpoint.check_window("eval.seq_len", settings.seq_len, skeleton.config)
    for name in settings.perplexity:
        with problems:
            tokens += check_text(config, name, skeleton, tokenizer)
    with problems:
        _check_reference(config, skeleton)
    with problems:
        _check_chat(config, tokenizer, vocabulary.embeddings(skeleton.model))
    with problems:
        harness.check_tasks(settings.tasks, settings.include_path, tokenizer)
    with problems:
        check_stride(settings.stride, window)
    problems.raise_all()
    return Work(", ".join([*settings.perplexity, *(f"{name} (not counted)" for name in settings.tasks)]), tokens)


def check_stride(stride: int | None, window: int) -> None:
    """Raises UserError if windows so far apart leave out tokens."""
    if stride is not None and stride > window:
        raise UserError(
            "eval.stride", f"{stride} would skip tokens between windows of {window}", f"set at most {window}"
        )


def check_text(config: Config, name: str, skeleton: Skeleton, tokenizer: Any) -> float:
    """The approximate number of tokens in all windows of a text.

    Raises:
        UserError: it is missing, shorter than a window, or has tokens that the model does not embed.
    """
    text = texts.load_text(name, "test", "eval.perplexity")
    window = perplexity.window_length(config.eval.seq_len, checkpoint.max_window(skeleton.config))
    rows = vocabulary.embeddings(skeleton.model)
    content = text.joiner.join(text.documents)
    # its start shows whether it is long enough; all tokens are checked only where the model may not embed some
    start = content if vocabulary.may_exceed(tokenizer, rows) else content[: 64 * window]
    limit = perplexity.used_tokens(text, window, config.eval.max_tokens)
    windows = perplexity.text_windows(tokenizer, start, window, limit, name)
    vocabulary.check(windows, tokenizer, rows, f"eval.perplexity: {name}")
    return min(len(content) / CHARACTERS, limit or math.inf) * window / (config.eval.stride or window)


def load_data(config: Config) -> None:
    """Loads the data of the configured tasks unless they are many; UserError if some could not be loaded."""
    names = list(dict.fromkeys(measure.task for measure in tasks.configured(config)))
    if names and len(names) <= LOADED_AT_ONCE:
        harness.load_tasks(names, config.eval.include_path)


def _check_reference(config: Config, skeleton: Any) -> None:
    """Checks that a reference given by name exists and has a vocabulary of the same size."""
    name = config.eval.divergence
    if name in (None, "base") or not config.eval.perplexity:
        return
    assert name is not None
    directory = find.locate(name, key="eval.divergence")
    reference = checkpoint.load_config(directory, config.model.trust_remote_code)
    sizes = [int(model.get_text_config().vocab_size) for model in (reference, skeleton.config)]
    if sizes[0] != sizes[1]:
        raise UserError(
            "eval.divergence",
            f"{name} has a vocabulary of {sizes[0]}, this model of {sizes[1]}",
            "compare models of the same family, or set it to null",
        )
    check_directory(directory, config.model.trust_remote_code)


def _check_chat(config: Config, tokenizer: Any, rows: int) -> None:
    """Checks that the tokenizer has a chat template, and that it accepts the system prompt."""
    if not config.eval.chat_template or not config.eval.tasks:
        return
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("eval.chat_template", "this model's tokenizer has no chat template", "set it to false")
    prompt = config.eval.system_prompt
    chat = [{"role": "user", "content": "Hello"}]
    with_system = [{"role": "system", "content": prompt or ""}, *chat]
    try_template(tokenizer, [chat, with_system] if prompt else [chat], "eval.chat_template")
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template can raise anything
        problem = f"this model's chat template fails on a user message: {first_line(error)}"
        raise UserError("eval.chat_template", problem) from error
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    vocabulary.check(tokens, tokenizer, rows, "eval.chat_template")
    if prompt is None:
        return
    try:
        is_included = prompt.strip() in tokenizer.apply_chat_template(with_system, tokenize=False)
    except TemplateError:
        is_included = False
    if not is_included:
        raise UserError("eval.system_prompt", "this model's chat template accepts no system message", "set it to null")


# --- existing and missing results -------------------------------------------------------------------------------------


def window_of(config: Config, directory: Path) -> int:
    """Tokens in a perplexity window of a checkpoint, see :func:`sppctl.evaluate.perplexity.window_length`."""
    model = checkpoint.load_config(directory, config.model.trust_remote_code)
    return perplexity.window_length(config.eval.seq_len, checkpoint.max_window(model))


def valid_results(config: Config, subject: Subject, path: Path) -> list[AnyResult]:
    """The results in a file that are of these weights and this tokenizer and whose samples exist.

    Any dtype is valid unless one is configured.
    """
    recorded = Results.load(path)
    if recorded is None or recorded.fingerprint != subject.fingerprint:
        return []
    tokenizer = checkpoint.tokenizer_fingerprint(subject.directory)
    generation = checkpoint.generation_fingerprint(subject.directory)
    dtype = config.model.compute_dtype
    configured = {measure.task for measure in tasks.configured(config)}

    def is_valid(result: AnyResult) -> bool:
        if result.tokenizer != tokenizer or dtype not in ("auto", result.dtype):
            return False
        if isinstance(result, TextResult):
            return True
        if result.measure.task not in configured or result.generation not in (None, generation):
            return False
        return tasks.has_samples(result, _samples(path)) and tasks.is_current(config, result)

    return [result for result in recorded.results if is_valid(result)]


def missing(
    config: Config, subject: Subject, valid: list[AnyResult], contents: dict[str, str], dense: DenseModel | None
) -> list[Measure]:
    """The configured measures, one per text and task, that have no valid result.

    ``contents``: from :func:`perplexities.contents`; ``dense``: the model that all other checkpoints are compared with.
    """
    reference = None if dense is None or dense.fingerprint == subject.fingerprint else dense.fingerprint
    window, stride, max_tokens = window_of(config, subject.directory), config.eval.stride, config.eval.max_tokens
    measures = [TextMeasure(name, window, stride, max_tokens, reference, content) for name, content in contents.items()]
    return results.missing([*measures, *tasks.configured(config)], valid, partial(tasks.has_current_groups, config))


def take_over(source: Path, target: Path) -> None:
    """Adds the results and samples of one results file to another of the same label."""
    content, previous = Results.load(source), Results.load(target)
    assert content is not None
    if previous is not None and previous.fingerprint == content.fingerprint:
        measures = [result.measure for result in content.results]
        content.results += [old for old in previous.results if not any(new.supersedes(old.measure) for new in measures)]
    if _samples(source).is_dir():
        shutil.copytree(_samples(source), _samples(target), dirs_exist_ok=True)
    content.save(target)


def _samples(path: Path) -> Path:
    return path.with_suffix(".samples")


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Job:
    """A checkpoint and the measures to run on it."""

    subject: Subject
    path: Path  # its results file
    dtype: str  # of the computation
    valid: list[AnyResult]  # from :func:`valid_results`; one that was measured for another group may be reused
    measures: list[Measure]  # from :func:`missing`
    dense: DenseModel | None  # the model that checkpoints are compared with, perhaps this one
    packed: bool = False  # whether its weights are packed in memory, from :meth:`Subject.is_packed`
    windows: dict[TextMeasure, Windows] = field(default_factory=dict)  # of its texts, filled by :func:`prepare`


def check_memory(config: Config, jobs: Iterable[Job]) -> None:
    """Raises UserError if a model would be loaded dense that does not fit into memory; to be called by one process."""
    for job in jobs:
        is_compared = any(isinstance(measure, TextMeasure) and measure.reference for measure in job.measures)
        if is_compared and job.dense:
            check_dense(config, str(job.dense.directory), checkpoint.weight_bytes(job.dense.directory, job.dtype))
        if not job.measures or job.packed or config.model.weights == "dense":
            continue
        if lacking := shortage(config.model, checkpoint.weight_bytes(job.subject.directory, job.dtype)):
            fix = "measure others without it (--model merged eval.divergence=null)"
            fix += ", or set model.weights=dense to load it all the same"
            raise UserError("--model", f"{job.subject.label}: {job.subject.place} {lacking}", fix)


def check_dense(config: Config, place: str, needed: int) -> None:
    """Raises UserError if the model that others are compared with, of so many bytes, does not fit into memory."""
    if lacking := shortage(config.model, needed):
        raise UserError("eval.divergence", f"the dense model {place} {lacking}", "set it to null")


def prepare(config: Config, jobs: Iterable[Job]) -> None:
    """Makes the windows of all texts, and runs the dense model on those that are used for comparisons.

    It is freed before another model is loaded. Checkpoints with the same tokenizer share their windows.
    """
    device, trust = checkpoint.pick_device(config.model.device), config.model.trust_remote_code
    windows: dict[tuple[str, TextMeasure], Windows] = {}
    compared: dict[DenseModel, list[tuple[str, Windows]]] = {}
    for job in jobs:
        for measure in job.measures:
            if not isinstance(measure, TextMeasure):
                continue
            key = checkpoint.tokenizer_fingerprint(job.subject.directory), measure.windows
            if key not in windows:
                tokenizer = checkpoint.load_tokenizer(job.subject.directory, trust)
                windows[key] = perplexities.windows_of(config, tokenizer, measure, device)
            job.windows[measure] = windows[key]
            if measure.reference is not None and job.dense is not None:
                compared.setdefault(job.dense, []).append((job.dtype, windows[key]))
    if windows:
        _announce({measure: text for (_, measure), text in windows.items()})
    for dense, compared_texts in compared.items():
        dense.predict(compared_texts, device)


def _announce(texts: dict[TextMeasure, Windows]) -> None:
    """Prints how long the texts are, and how to shorten those that are used in full."""
    sizes = [
        f"{measure.text} {len(text.tokens):,} windows, {text.tokens.numel():,} tokens"
        for measure, text in texts.items()
    ]
    is_cut = all(measure.max_tokens is not None for measure in texts)
    fix = "" if is_cut else "; eval.max_tokens=N uses the first N tokens of a text"
    console.note(f"eval: each checkpoint reads {' and '.join(sizes)}{fix}")


def execute(config: Config, job: Job) -> Results:
    """Measures one checkpoint and updates its results file after every measure; returns the file's content."""
    content: Results | None = distributed.broadcast_object(Results.load(job.path), 0)
    if content is None or content.fingerprint != job.subject.fingerprint:
        if distributed.is_main():
            shutil.rmtree(_samples(job.path), ignore_errors=True)
        content = _empty_results(job.subject)
    outdated = _outdated(config, job, content.tasks)
    content.results = [result for result in content.results if result not in outdated]
    model = tokenizer = None
    shareable = [result for result in job.valid if isinstance(result, TaskResult)]
    for measure in job.measures:
        result: AnyResult | None = None
        if isinstance(measure, TaskMeasure):
            result = tasks.reused(config, measure, shareable)
        if result is None:
            if model is None:
                device, trust = checkpoint.pick_device(config.model.device), config.model.trust_remote_code
                model = job.subject.load(device, job.dtype, trust, packed=job.packed)
                tokenizer = checkpoint.load_tokenizer(job.subject.directory, trust)
            result = _measured(config, job, measure, model, tokenizer)
        shareable += [result] if isinstance(result, TaskResult) else []
        content.add(result)
        if distributed.is_main():
            content.save(job.path)
    return content


def _outdated(config: Config, job: Job, recorded: list[TaskResult]) -> list[TaskResult]:
    """Results with which the mean of a group would mix what was measured before and after something changed."""
    pending = [measure for measure in job.measures if isinstance(measure, TaskMeasure)]
    names = {measure.task for measure in pending}
    tokenizer = checkpoint.tokenizer_fingerprint(job.subject.directory)
    generation = checkpoint.generation_fingerprint(job.subject.directory)

    def is_outdated(result: TaskResult) -> bool:
        if not tasks.is_member(config, result, pending):
            return True
        is_same_model = result.tokenizer == tokenizer and result.generation in (None, generation)
        return result.measure.task in names and not (is_same_model and tasks.is_current(config, result))

    return [result for result in recorded if is_outdated(result)]


def _empty_results(subject: Subject) -> Results:
    """The results of a checkpoint before its first measure."""
    recorded = inspect.recorded_patterns(subject.directory) or {}
    with console.working(f"counting zeros in {subject.directory}"):
        _, sparsity = inspect.measure(subject.directory, *recorded.values())
    return Results(subject.label, str(subject.place), subject.fingerprint, sparsity)


def _measured(config: Config, job: Job, measure: Measure, model: Any, tokenizer: Any) -> AnyResult:
    label, samples, started = job.subject.label, _samples(job.path), time.perf_counter()
    result: AnyResult
    if isinstance(measure, TextMeasure):
        text = perplexities.measure(model, job.windows[measure], measure, label=label, dense=job.dense)
        result = TextResult(measure, text)
    else:
        result = TaskResult(measure, tasks.measure(config, model, tokenizer, measure, label=label, samples=samples))
    return replace(
        result,
        seconds=round(time.perf_counter() - started, 2),
        dtype=job.dtype,
        device=checkpoint.pick_device(config.model.device).type,
        versions=machine.versions("torch", "transformers", "lm_eval", "datasets"),
        batch_size=config.eval.batch_size,
        tokenizer=checkpoint.tokenizer_fingerprint(job.subject.directory),
        generation=checkpoint.generation_fingerprint(job.subject.directory),
        command=console.command_line(),
        weights="packed" if job.packed else "dense",
    )
