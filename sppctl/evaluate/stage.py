"""Any checkpoint -> perplexity and benchmark accuracy, with plain transformers and lm-eval.

Each checkpoint has one JSON file of results. A result is found again by what was measured, with which settings, on
which weights; asking twice costs nothing, and other measures are added beside it.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from sppctl import console, distributed, machine
from sppctl.config.settings import Config
from sppctl.data import texts, vocabulary
from sppctl.data.chat import try_template
from sppctl.errors import UserError
from sppctl.evaluate import harness, perplexities, perplexity, tasks
from sppctl.evaluate.perplexities import DenseModel
from sppctl.evaluate.results import AnyResult, Measure, Results, TaskMeasure, TaskResult, TextMeasure, TextResult
from sppctl.evaluate.subjects import Subject
from sppctl.inspect import inspect
from sppctl.model import checkpoint
from sppctl.model.blocks import Skeleton
from sppctl.model.estimate import CHARACTERS, Work
from sppctl.model.weights import check_directory

DEFAULT_WINDOW = 2048
LOADED_AT_ONCE = 20  # tasks whose data is looked for before a run starts


def preflight(config: Config, skeleton: Skeleton, tokenizer: Any) -> Work:
    """Checks that texts can be loaded and tasks are known.

    Returns:
        What evaluating one checkpoint will do; benchmark tasks are not counted.

    Raises:
        UserError: with everything that is wrong.
    """
    problems = []
    limit = checkpoint.max_window(skeleton.config)
    window = _window(config, limit)
    tokens = 0.0
    if config.eval.seq_len is not None and limit is not None and config.eval.seq_len > limit:
        problems.append(f"eval.seq_len: {config.eval.seq_len} exceeds the model's {limit} positions")
    checks: list[Callable[[], float | None]] = []
    checks += [partial(check_text, config, name, skeleton, tokenizer) for name in config.eval.perplexity]
    checks += [
        partial(_check_reference, config, skeleton),
        partial(_check_chat, config, tokenizer, vocabulary.embeddings(skeleton.model)),
        partial(harness.check_tasks, config.eval.tasks, config.eval.include_path, tokenizer),
    ]
    for check in checks:
        try:
            tokens += check() or 0
        except UserError as error:
            problems.append(str(error))
    if config.eval.stride is not None and config.eval.stride > window:
        problems.append(
            f"eval.stride: {config.eval.stride} would skip tokens between windows of {window}; at most that"
        )
    if problems:
        raise UserError("\n".join(problems))
    return Work(", ".join([*config.eval.perplexity, *(f"{name} (not counted)" for name in config.eval.tasks)]), tokens)


def check_text(config: Config, name: str, skeleton: Skeleton, tokenizer: Any) -> float:
    """About how many tokens a text has in all of its windows.

    Raises:
        UserError: it is not there, shorter than a window, or has tokens that the model does not embed.
    """
    text = texts.load_text(name, "test", "eval.perplexity")
    window, rows = _window(config, checkpoint.max_window(skeleton.config)), vocabulary.embeddings(skeleton.model)
    whole = text.joiner.join(text.documents)
    # the start shows whether it suffices; all tokens are looked at where some may be beyond
    read = whole if vocabulary.may_exceed(tokenizer, rows) else whole[: 64 * window]
    windows = perplexity.text_windows(tokenizer, read, window, config.eval.max_tokens, name)
    vocabulary.check(windows, tokenizer, rows, f"eval.perplexity: {name}")
    most = config.eval.max_tokens or math.inf, text.windows * window if text.windows else math.inf
    return min(len(whole) / CHARACTERS, *most) * window / (config.eval.stride or window)


def load_data(config: Config) -> None:
    """Loads the data of the configured tasks, unless they are many, so that what is missing is found at once.

    Raises:
        StageError: some could not be loaded.
    """
    names = list(dict.fromkeys(measure.task for measure in tasks.wanted(config)))
    if names and len(names) <= LOADED_AT_ONCE:
        harness.load_tasks(names, config.eval.include_path)


def _check_reference(config: Config, skeleton: Any) -> None:
    """A named reference is there, and has the model's vocabulary."""
    name = config.eval.divergence
    if name in (None, "base") or not config.eval.perplexity:
        return
    assert name is not None
    directory = checkpoint.locate(name, key="eval.divergence")
    other = checkpoint.load_config(directory, config.model.trust_remote_code)
    theirs, own = (int(found.get_text_config().vocab_size) for found in (other, skeleton.config))
    if theirs != own:
        raise UserError(
            f"eval.divergence: {name} has a vocabulary of {theirs}, this model of {own}; compare models of one family, "
            "or set it to null"
        )
    check_directory(directory, config.model.trust_remote_code)


def _check_chat(config: Config, tokenizer: Any, rows: int) -> None:
    """The tokenizer has a chat template, and it takes the system prompt."""
    if not config.eval.chat_template or not config.eval.tasks:
        return
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("eval.chat_template: this model's tokenizer has no chat template; set it to false")
    prompt = config.eval.system_prompt
    chat = [{"role": "user", "content": "Hello"}]
    instructed = [{"role": "system", "content": prompt or ""}, *chat]
    try_template(tokenizer, [chat, instructed] if prompt else [chat], "eval.chat_template")
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program: it raises what it likes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"eval.chat_template: this model's chat template fails on a question: {reason}") from error
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    vocabulary.check(tokens, tokenizer, rows, "eval.chat_template")
    if prompt is None:
        return
    try:
        taken = prompt.strip() in tokenizer.apply_chat_template(instructed, tokenize=False)
    except TemplateError:
        taken = False
    if not taken:
        raise UserError("eval.system_prompt: this model's chat template takes no system message; set it to null")


def wanted(config: Config, window: int, texts: dict[str, str], dense: DenseModel | None = None) -> list[Measure]:
    """What the configuration asks for: a measure per text and task."""
    reference = None if dense is None else dense.fingerprint
    return [*perplexities.wanted(config, window, reference, texts), *tasks.wanted(config)]


def window_of(config: Config, directory: Path) -> int:
    """Tokens in a perplexity window: as configured, else min(2048, the model's limit)."""
    return _window(config, checkpoint.max_window(checkpoint.load_config(directory, config.model.trust_remote_code)))


def _window(config: Config, limit: int | None) -> int:
    return config.eval.seq_len or min(DEFAULT_WINDOW, limit or DEFAULT_WINDOW)


def known(config: Config, subject: Subject, path: Path) -> list[AnyResult]:
    """What a results file holds for these weights and this tokenizer, as far as its samples are there.

    Whatever dtype it was computed in will do, unless one is configured.
    """
    before = Results.load(path)
    if before is None or before.fingerprint != subject.fingerprint:
        return []
    tokenizer = checkpoint.tokenizer_fingerprint(subject.directory)
    dtype = config.model.compute_dtype
    asked = {measure.task for measure in tasks.wanted(config)}

    def is_valid(result: AnyResult) -> bool:
        if result.tokenizer != tokenizer or dtype not in ("auto", result.dtype):
            return False
        if isinstance(result, TextResult):
            return True
        is_asked = result.measure.task in asked
        return is_asked and tasks.has_samples(result, _samples(path)) and tasks.is_current(config, result)

    return [result for result in before.results if is_valid(result)]


def missing(
    config: Config,
    subject: Subject,
    known: list[AnyResult],
    texts: dict[str, str],
    dense: DenseModel | None = None,
) -> list[Measure]:
    """The measures that are asked for and not among the known ones."""
    measures = wanted(config, window_of(config, subject.directory), texts, dense)
    valid = Results(subject.label, str(subject.place), subject.fingerprint, {}, known)
    return valid.missing(measures, partial(tasks.is_placed, config))


def take_over(source: Path, target: Path) -> None:
    """Adds what one results file holds, and its samples, to another of the same label, which may hold more."""
    content, before = Results.load(source), Results.load(target)
    assert content is not None
    if before is not None and before.fingerprint == content.fingerprint:
        measures = [result.measure for result in content.results]
        content.results += [old for old in before.results if not any(new.supersedes(old.measure) for new in measures)]
    if _samples(source).is_dir():
        shutil.copytree(_samples(source), _samples(target), dirs_exist_ok=True)
    content.save(target)


def _samples(path: Path) -> Path:
    return path.with_suffix(".samples")


def predict(config: Config, jobs: Iterable[tuple[Subject, str, list[Measure], DenseModel | None]]) -> None:
    """Runs the dense model on all windows on which it will be compared, before any other model is loaded.

    Args:
        config: the configuration.
        jobs: checkpoints, the dtype that each is computed in, what will be measured on it, and the model that it is
            compared with, if any, in the same dtype.
    """
    device = checkpoint.pick_device(config.model.device)
    texts: dict[DenseModel, list[tuple[perplexities.Windows, str]]] = {}
    for subject, dtype, measures, dense in jobs:
        asked = [measure for measure in measures if isinstance(measure, TextMeasure)]
        if dense is not None and asked:
            tokenizer = checkpoint.load_tokenizer(subject.directory, config.model.trust_remote_code)
            windows = [(perplexities.windows_of(config, tokenizer, measure, device), dtype) for measure in asked]
            texts.setdefault(dense, []).extend(windows)
    for dense, windows in texts.items():
        dense.predict(windows, device)


def execute(
    config: Config,
    subject: Subject,
    dtype: str,
    path: Path,
    measures: list[Measure],
    known: list[AnyResult],
    dense: DenseModel | None = None,
) -> Results:
    """Measures one checkpoint and adds to its results file after every measure.

    Args:
        config: the configuration.
        subject: the checkpoint, or an adapter on one.
        dtype: name of the dtype to compute in.
        path: its results file.
        measures: of :func:`missing`.
        known: results of :func:`known` that may serve where the same was measured for another group.
        dense: the model with which others are compared, and perhaps this one itself; after :func:`predict`.

    Returns:
        The content of the results file.
    """
    content: Results | None = distributed.broadcast_object(Results.load(path), 0)
    if content is None or content.fingerprint != subject.fingerprint:
        content = _none_yet(subject, path)
    # a mean over a group would mix what was measured before and after its files changed
    asked = {measure.task for measure in measures if isinstance(measure, TaskMeasure)}
    content.results = [old for old in content.results if not _is_outdated(config, old, asked)]
    device, trust = checkpoint.pick_device(config.model.device), config.model.trust_remote_code
    model = tokenizer = None
    shareable = [result for result in known if isinstance(result, TaskResult)]
    for measure in measures:
        result: AnyResult | None = None
        if isinstance(measure, TaskMeasure):
            result = tasks.shared(config, measure, shareable)
        if result is None:
            if model is None:
                model = subject.load(device, dtype, trust)
                tokenizer = checkpoint.load_tokenizer(subject.directory, trust)
            result = _measured(config, subject, measure, model, tokenizer, dense, path)
            result = replace(result, dtype=dtype, device=device.type)
        shareable += [result] if isinstance(result, TaskResult) else []
        content.add(result)
        if distributed.is_main():
            content.save(path)
    return content


def _is_outdated(config: Config, result: AnyResult, asked: set[str]) -> bool:
    """Whether a result is of one of these tasks before its files changed."""
    return isinstance(result, TaskResult) and result.measure.task in asked and not tasks.is_current(config, result)


def _none_yet(subject: Subject, path: Path) -> Results:
    """The results of weights of which nothing has been measured."""
    if distributed.is_main():
        shutil.rmtree(_samples(path), ignore_errors=True)
    recorded = inspect.recorded_patterns(subject.directory) or {}
    with console.working(f"counting zeros in {subject.directory}"):
        _, sparsity = inspect.measure(subject.directory, *recorded.values())
    return Results(subject.label, str(subject.place), subject.fingerprint, sparsity)


def _measured(
    config: Config, subject: Subject, measure: Measure, model: Any, tokenizer: Any, dense: DenseModel | None, path: Path
) -> AnyResult:
    label, samples, started = subject.label, _samples(path), time.perf_counter()
    result: AnyResult
    if isinstance(measure, TextMeasure):
        text = perplexities.measure(config, model, tokenizer, measure, label=label, dense=dense)
        result = TextResult(measure, text)
    else:
        result = TaskResult(measure, tasks.measure(config, model, tokenizer, measure, label=label, samples=samples))
    return replace(
        result,
        seconds=round(time.perf_counter() - started, 2),
        versions=machine.versions("torch", "transformers", "lm_eval", "datasets"),
        batch_size=config.eval.batch_size,
        tokenizer=checkpoint.tokenizer_fingerprint(subject.directory),
        command=console.command_line(),
    )
