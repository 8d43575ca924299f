"""Any checkpoint -> perplexity and benchmark accuracy, with plain transformers and lm-eval.

Each checkpoint has one JSON file of results. A result is found again by what was measured, with which settings, on
which weights; asking twice costs nothing, and other measures are added beside it.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from jinja2 import TemplateError

from sppctl import __version__, console, distributed
from sppctl.config.settings import Config
from sppctl.data import texts, vocabulary
from sppctl.data.chat import try_template
from sppctl.errors import UserError
from sppctl.evaluate import harness, perplexities, perplexity, tasks
from sppctl.evaluate.perplexities import DenseModel
from sppctl.evaluate.subjects import Subject
from sppctl.files import sealed, strict_json
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
        StageError: some cannot be had.
    """
    names = list(dict.fromkeys(entry["tasks"] for entry in tasks.wanted(config)))
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


def measures(
    config: Config, window: int, texts: dict[str, str], dense: DenseModel | None = None
) -> list[dict[str, Any]]:
    """What the configuration asks for: one entry per text and task, with all settings that change its value."""
    reference = None if dense is None else dense.fingerprint
    return perplexities.wanted(config, window, reference, texts) + tasks.wanted(config)


def window_of(config: Config, directory: Path) -> int:
    """Tokens in a perplexity window: as configured, else min(2048, the model's limit)."""
    return _window(config, checkpoint.max_window(checkpoint.load_config(directory, config.model.trust_remote_code)))


def _window(config: Config, limit: int | None) -> int:
    return config.eval.seq_len or min(DEFAULT_WINDOW, limit or DEFAULT_WINDOW)


def read_results(path: Path) -> dict[str, Any]:
    """The results file of a checkpoint; empty if there is none."""
    if not path.is_file():
        return {}
    remedy = "delete it and run sppctl eval again"
    content = sealed.read(path, remedy, older=True)
    if content.get("label", path.stem) != path.stem:
        raise UserError(f"{path} holds the results of another checkpoint ({content['label']}); {remedy}")
    return content


def known(config: Config, subject: Subject, results: Path) -> list[dict[str, Any]]:
    """What a results file holds for these weights and this tokenizer, as far as its samples are there.

    Whatever dtype it was computed in will do, unless one is configured.
    """
    before = read_results(results)
    if before.get("fingerprint") != subject.fingerprint:
        return []
    tokenizer = checkpoint.tokenizer_fingerprint(subject.directory)
    valid = [result for result in before["results"] if result.get("tokenizer", tokenizer) == tokenizer]
    if config.model.compute_dtype != "auto":
        valid = [result for result in valid if result.get("dtype") == config.model.compute_dtype]
    samples, asked = _samples(results), {entry["tasks"] for entry in tasks.wanted(config)}
    return [
        result
        for result in valid
        if result["settings"]["kind"] == "perplexity"
        or (
            result["settings"]["tasks"] in asked
            and tasks.has_samples(result, samples)
            and tasks.is_current(config, result)
        )
    ]


def missing(
    config: Config,
    subject: Subject,
    found: list[dict[str, Any]],
    texts: dict[str, str],
    dense: DenseModel | None = None,
) -> list[dict[str, Any]]:
    """The measures that are asked for and not among those found."""
    wanted = measures(config, window_of(config, subject.directory), texts, dense)
    return [
        settings
        for settings in wanted
        if not (
            perplexities.is_done(settings, found)
            if settings["kind"] == "perplexity"
            else tasks.is_done(config, settings, found)
        )
    ]


def _of(settings: dict[str, Any]) -> ModuleType:
    return perplexities if settings["kind"] == "perplexity" else tasks


def replaces(new: dict[str, Any], old: dict[str, Any]) -> bool:
    """Whether a measurement, by its settings, takes the place of another one."""
    return bool(new["kind"] == old["kind"] and _of(new).replaces(new, old))


def take_over(source: Path, target: Path) -> None:
    """Adds what one results file holds, and its samples, to another of the same label, which may hold more."""
    content = read_results(source)
    before = read_results(target)
    if before.get("fingerprint") == content["fingerprint"]:
        taken = [result["settings"] for result in content["results"]]
        content["results"] += [
            result for result in before["results"] if not any(replaces(new, result["settings"]) for new in taken)
        ]
    samples = _samples(source)
    if samples.is_dir():
        shutil.copytree(samples, _samples(target), dirs_exist_ok=True)
    sealed.write(target, content)


def _samples(results: Path) -> Path:
    return results.with_suffix(".samples")


def predict(config: Config, jobs: Iterable[tuple[Subject, str, list[dict[str, Any]], DenseModel | None]]) -> None:
    """Runs the dense model on all windows on which it will be compared, before any other model is loaded.

    Args:
        config: the configuration.
        jobs: checkpoints, the dtype that each is computed in, what will be measured on it, and the model that it is
            compared with, if any, in the same dtype.
    """
    device = checkpoint.pick_device(config.model.device)
    texts: dict[DenseModel, list[tuple[perplexities.Windows, str]]] = {}
    for subject, dtype, wanted, dense in jobs:
        asked = [settings for settings in wanted if settings["kind"] == "perplexity"]
        if dense is not None and asked:
            tokenizer = checkpoint.load_tokenizer(subject.directory, config.model.trust_remote_code)
            windows = [(perplexities.windows_of(config, tokenizer, settings, device), dtype) for settings in asked]
            texts.setdefault(dense, []).extend(windows)
    for dense, found in texts.items():
        dense.predict(found, device)


def execute(
    config: Config,
    subject: Subject,
    dtype: str,
    results: Path,
    wanted: list[dict[str, Any]],
    found: list[dict[str, Any]],
    dense: DenseModel | None = None,
) -> dict[str, Any]:
    """Measures one checkpoint and adds to its results file after every measure.

    Args:
        config: the configuration.
        subject: the checkpoint, or an adapter on one.
        dtype: name of the dtype to compute in.
        results: its JSON file.
        wanted: entries of :func:`measures`.
        found: results of :func:`known` that may serve where the same was measured for another group.
        dense: the model with which others are compared, and perhaps this one itself; after :func:`predict`.

    Returns:
        The content of the results file.
    """
    content = distributed.tell(read_results(results), 0)
    samples = _samples(results)
    if content.get("fingerprint") != subject.fingerprint:
        if distributed.is_main():
            shutil.rmtree(samples, ignore_errors=True)
        recorded = inspect.recorded_patterns(subject.directory) or {}
        with console.working(f"counting zeros in {subject.directory}"):
            _, sparsity = inspect.measure(subject.directory, *recorded.values())
        content = {
            "label": subject.label,
            "checkpoint": str(subject.place),
            "fingerprint": subject.fingerprint,
            "sparsity": sparsity,
            "results": [],
        }
    # a mean over a group would mix what was measured before and after its files changed
    asked = {settings["tasks"] for settings in wanted if settings["kind"] == "tasks"}
    content["results"] = [
        result
        for result in content["results"]
        if result["settings"].get("tasks") not in asked
        or "sources" not in result["metrics"]
        or tasks.is_current(config, result)
    ]
    device = checkpoint.pick_device(config.model.device)
    trust = config.model.trust_remote_code
    model, label = None, subject.label
    found = list(found)
    for settings in wanted:
        entry = tasks.shared(config, settings, found) if settings["kind"] == "tasks" else None
        if entry is None:
            if model is None:
                model = subject.load(device, dtype, trust)
                tokenizer = checkpoint.load_tokenizer(subject.directory, trust)
            started = time.perf_counter()
            if settings["kind"] == "perplexity":
                metrics = perplexities.measure(config, model, tokenizer, settings, label=label, dense=dense)
            else:
                metrics = tasks.measure(config, model, tokenizer, settings, label=label, samples=samples)
            entry = {"settings": settings, "metrics": strict_json.finite(metrics)}
            entry["seconds"] = round(time.perf_counter() - started, 2)
            entry |= {"dtype": dtype, "device": device.type, "versions": _versions()}
            entry["batch_size"] = config.eval.batch_size
            entry["tokenizer"] = checkpoint.tokenizer_fingerprint(subject.directory)
            entry["command"] = console.command_line()
        found.append(entry)
        kept = [old for old in content["results"] if not replaces(settings, old["settings"])]
        content["results"] = [*kept, entry]
        if distributed.is_main():
            sealed.write(results, content)
    return content


def _versions() -> dict[str, str]:
    import importlib.metadata

    names = ("torch", "transformers", "lm_eval", "datasets")
    return {"sppctl": __version__} | {name: importlib.metadata.version(name) for name in names}


def result_name(result: dict[str, Any]) -> str:
    """How a measure is called in tables, with what limited it."""
    settings, metrics = result["settings"], result["metrics"]
    if settings["kind"] != "perplexity":
        return tasks.title(tasks.as_measured([result]))
    step = settings.get("stride") or settings["seq_len"]
    used = (metrics["windows"] - 1) * step + settings["seq_len"] if "windows" in metrics else settings["max_tokens"]
    cut = f", first {used} tokens" if settings["max_tokens"] else ""
    stride = f" stride {settings['stride']}" if settings.get("stride") else ""
    return f"ppl {settings['text']} @{settings['seq_len']}{stride}{cut}"


def rows_of(content: dict[str, Any]) -> list[tuple[str, float | None, float | None]]:
    """The results of a checkpoint as rows: name, value (perplexity or acc), acc_norm where there is one."""
    rows: list[tuple[str, float | None, float | None]] = []
    for result in content["results"]:
        if result["settings"]["kind"] != "perplexity":
            continue
        name, metrics = result_name(result), result["metrics"]
        rows.append((name, metrics["value"], None))
        if metrics.get("kl") is not None:
            text = name.removeprefix("ppl ")
            if "compared_with" in metrics:
                text += f" (dense: {metrics['compared_with']})"
            rows.append((f"KL(dense || model) {text}", metrics["kl"], None))
            rows.append((f"top-1 agreement {text}", metrics["top1_agreement"], None))
    return rows + tasks.rows([result for result in content["results"] if result["settings"]["kind"] == "tasks"])
