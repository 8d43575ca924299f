"""The stages in their order: what each reads and depends on, and all that is checked before any of them works."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from sppctl import console, distributed, launch, machine
from sppctl.config.load import result_keys
from sppctl.config.settings import Config, names_of
from sppctl.errors import UserError, WriteError
from sppctl.files import disk, paths
from sppctl.files.names import DIRECTORIES
from sppctl.run.attempts import differences, settled
from sppctl.run.directory import Run

STAGES = ("prune", "train", "merge", "eval", "report")


def join_processes(config: Config) -> None:
    """Under torchrun, meets the other processes; otherwise nothing."""
    if distributed.world_size() > 1:
        from sppctl.model import checkpoint

        distributed.connect(checkpoint.pick_device(config.model.device))


# --- stages -----------------------------------------------------------------------------------------------------------


def preflight(
    run: Run,
    stages: tuple[str, ...],
    directory: Path | None = None,
    loaded: tuple[Any, Any] | None = None,
    *,
    announce: bool = False,
) -> None:
    """Everything that can be checked before anything is computed or written, for all stages that will run.

    Args:
        run: the run.
        stages: that will run.
        directory: a checkpoint to check them on; None: the configured model, which need not be unpacked yet.
        loaded: its skeleton and tokenizer, for many runs of one model.
        announce: print what will be done, and about how long it takes.

    Raises:
        UserError: every problem, one per line.
    """
    run.check_directory()
    from sppctl.model import checkpoint

    checkpoint.pick_device(run.config.model.device)
    skeleton, tokenizer = loaded or run.skeleton(directory)
    problems = []
    work: dict[str, Any] = {}
    for stage in stages:
        checks = [partial(check, run.config, skeleton) for check in filter(None, [_checks(tokenizer).get(stage)])]
        if stage in DIRECTORIES:
            settings = settings_of(run.config, stage)
            if not run.will_do(stage, settings):
                continue
            checks.insert(0, partial(run.check_attempt, stage, settings))
        for check in checks:
            try:
                work[stage] = check()
            except UserError as error:
                problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    if announce:
        _announce(run, skeleton, {stage: todo for stage, todo in work.items() if todo is not None})


def _announce(run: Run, skeleton: Any, work: dict[str, Any]) -> None:
    """Prints what a run will do, and about how long each stage takes if this very process does it."""
    from sppctl import machine
    from sppctl.model import estimate

    if _results(run, "merged").is_file():
        work.pop("eval", None)
    if "eval" in work:
        each = work["eval"]
        work["eval"] = replace(each, text=f"base, pruned and merged on {each.text}", tokens=3 * each.tokens)
    console.note(f"run: {run.directory}, on {machine.describe()}")
    # a process that only starts others leaves the GPU to them
    for line in estimate.lines(work, None if launch.needed(run.config) else _seconds_per_token(run, skeleton)):
        console.note(line)


def _seconds_per_token(run: Run, skeleton: Any) -> float:
    from sppctl.model import checkpoint, estimate
    from sppctl.plan import run as plan

    model = run.config.model
    device = checkpoint.pick_device(model.device)
    stored = "bfloat16" if model.dtype == "auto" and model.gguf_file is not None else model.dtype
    compute = checkpoint.choose_dtype(
        run.located(), device, model.compute_dtype, model.trust_remote_code, stored=stored, training=True
    )
    width = skeleton.config.get_text_config().hidden_size
    return estimate.seconds_per_token(plan.num_parameters(skeleton), width, compute.dtype, device)


def _checks(tokenizer: Any) -> dict[str, Callable[..., Any]]:
    from sppctl.evaluate import stage as evaluate
    from sppctl.merge import stage as merging
    from sppctl.prune import checks as prune_checks
    from sppctl.train import stage as train

    return {
        "prune": partial(prune_checks.preflight, tokenizer=tokenizer),
        "train": partial(train.preflight, tokenizer=tokenizer),
        "merge": merging.preflight,
        "eval": partial(evaluate.preflight, tokenizer=tokenizer),
    }


def prune(run: Run) -> dict[str, Any]:
    """base -> pruned."""
    from sppctl.model import checkpoint
    from sppctl.prune import stage

    base = run.base()
    settings = settings_of(run.config, "prune")
    inputs = {"base": _fingerprint(base)} | _file_hash("calibration", run.config.prune.calibration.dataset)
    inputs |= {"tokenizer": checkpoint.tokenizer_fingerprint(base)} | _newer_data(run, "prune")
    if run.config.prune.mask_from is not None:
        inputs["mask"] = _fingerprint(checkpoint.locate(run.config.prune.mask_from))
    return run.perform(
        "prune",
        settings,
        inputs,
        lambda out, dtype: stage.execute(run.config, base, out, dtype=dtype),
        choose=lambda: _choose_dtype(run.config, base, whole=False, stored=run.config.model.dtype),
    )


def train(run: Run) -> dict[str, Any]:
    """pruned -> adapter."""
    from sppctl.train import stage

    pruned = _need(run, "prune")
    settings = settings_of(run.config, "train")
    inputs = {"pruned": pruned["output"]}
    for dataset in names_of(run.config.train.data.dataset):
        inputs |= _file_hash(f"data {dataset}", dataset)
    base, dense = _dense_models(run)
    inputs |= dense | _newer_data(run, "train")
    layers = [layer["name"] for layer in pruned["metrics"]["layers"]]
    return run.perform(
        "train",
        settings,
        inputs,
        lambda out, dtype: stage.execute(
            run.config, run.path("prune"), layers, out, dtype=dtype, resume=run.resume, base=base
        ),
        choose=lambda: _choose_dtype(run.config, run.path("prune"), training=True),
    )


def merge(run: Run) -> dict[str, Any]:
    """pruned + adapter -> merged."""
    from sppctl.merge import stage

    stage.preflight(run.config)
    pruned, trained = _need(run, "prune"), _need(run, "train")
    if trained["inputs"]["pruned"] != pruned["output"]:
        raise UserError(
            f"{run.path('train')} was trained on other weights than {run.path('prune')} holds now; "
            "train again (sppctl train --force)"
        )
    settings = settings_of(run.config, "merge")
    inputs = {"pruned": pruned["output"], "adapter": trained["output"]}
    recorded = stage.Recorded.of(pruned["metrics"], trained["metrics"])
    return run.perform(
        "merge",
        settings,
        inputs,
        lambda out, _: stage.execute(run.config, run.path("prune"), run.path("train"), out, recorded),
    )


def evaluate(run: Run, checkpoints: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Measures checkpoints and adapters by label; what has been measured before is not measured again."""
    from sppctl.evaluate import perplexities, stage
    from sppctl.evaluate.subjects import Subject

    found = {}
    reference = _dense_model(run, checkpoints)
    jobs = []
    known = {}
    texts = perplexities.contents(run.config)
    for label, path in checkpoints.items():
        subject = Subject.at(label, path)
        results = _results(run, label)
        dense = reference if reference is not None and reference.fingerprint != subject.fingerprint else None
        # told by the first process: the others may have read the file while it was written
        known[label] = distributed.tell([] if run.force else stage.known(run.config, subject, results), 0)
        wanted = stage.missing(run.config, subject, known[label], texts, dense)
        compute = distributed.decide(partial(_choose_dtype, run.config, subject.directory))
        if wanted:
            console.note(f"eval {label}: {compute.text}")
        jobs.append((subject, compute.dtype, wanted, dense))
    try:
        stage.predict(run.config, jobs)
        for subject, dtype, wanted, _ in jobs:
            results = _results(run, subject.label)
            if not wanted and results.is_file():
                console.note(f"eval {subject.label}: up to date ({results})")
                found[subject.label] = stage.read_results(results)
            else:
                found[subject.label] = stage.execute(
                    run.config, subject, dtype, results, wanted, known[subject.label], reference
                )
            perplexities.release()
    except WriteError as error:
        raise WriteError(f"{error}; make room: what was measured before is kept, the same command continues") from error
    finally:
        if reference is not None:
            reference.close()
    return found


def share_results(source: Run, target: Run, label: str) -> None:
    """Adds the results of a checkpoint in one run to those that another run has of it."""
    from sppctl.evaluate import stage

    stage.take_over(_results(source, label), _results(target, label))


def plan(config: Config) -> dict[str, Any]:
    """What a run will take, from the shapes of its model alone; nothing is loaded or written."""
    from sppctl.plan import run as stage

    return stage.execute(config)


def _dense_model(run: Run, checkpoints: dict[str, Path]) -> Any:
    """The checkpoint whose predictions the others are compared with, if the configuration names one.

    The run's dense model is the measure of what belongs to the run; a foreign checkpoint is compared only if asked.
    """
    from sppctl.evaluate.perplexities import DenseModel
    from sppctl.model import checkpoint

    name = run.config.eval.divergence
    if name is None or not run.config.eval.perplexity:
        return None
    if name == "base" and not set(checkpoints) & {"pruned", "merged", "adapter"}:
        return None
    directory = _base(run) if name == "base" else checkpoint.locate(name, key="eval.divergence")
    return DenseModel(name, directory, run.config.model.trust_remote_code, run.directory)


def report(run_dirs: list[Path], output: Path | None = None, latex: Path | None = None) -> list[dict[str, Any]]:
    """Collects runs and writes their reports.

    Args:
        run_dirs: each gets a report of its own, unless it is the only one and ``output`` is given.
        output: where the report over all of them goes; None: the folder that they share.
        latex: file for the table over all of them.

    Returns:
        What :func:`sppctl.report.write.collect` found, by run.
    """
    from sppctl.report import latex as report_latex
    from sppctl.report import over_runs
    from sppctl.report import write as stage

    run_dirs = list({path.resolve(): path for path in run_dirs}.values())  # each once
    runs = []
    for path in run_dirs:
        collected = stage.collect(path)
        if not collected["stages"] and not collected["checkpoints"]:
            raise UserError(f"{path} holds no run: no stage.json and no eval/*.json; give the run.dir of a run")
        runs.append(collected)
    if latex is not None and not any(run["checkpoints"] for run in runs):
        raise UserError(f"--latex {latex}: nothing has been measured yet; sppctl eval does")
    if len(runs) == 1:
        places = {output or run_dirs[0]: runs}
    else:
        shared = output or Path(os.path.commonpath([path.resolve().parent for path in run_dirs]))
        if output is None and shared == Path(shared.anchor):
            raise UserError("these runs share no folder; name one for the report over all (--output)")
        if shared.resolve() in [path.resolve() for path in run_dirs]:
            raise UserError(f"{shared} is itself one of the runs; name a folder for the report over all (--output)")
        places = {path: [run] for path, run in zip(run_dirs, runs, strict=True)} | {shared: runs}
    for place in places:
        stage.check(place)
    if latex is not None:
        disk.demand_directory(latex.parent, "--latex")
        disk.demand_file(latex, "--latex")
    for place, content in places.items():
        stage.write(content, place)
    console.note(f"report: {list(places)[-1] / 'report.html'}")
    if latex is not None:
        disk.write(latex, report_latex.to_latex(over_runs.rows_of_all(runs)))
        console.note(f"report: {latex}")
    return runs


def run_all(run: Run, elsewhere: Callable[..., None] | None = None) -> dict[str, Any] | None:
    """The whole pipeline.

    Args:
        run: the run.
        elsewhere: does a stage in processes of its own, given its name and options; None: this process, or those it is
            one of, do it.

    Returns:
        The collected record of the run; None in processes that have nothing left to do after the training.
    """
    started = time.perf_counter()
    preflight(run, STAGES, announce=True)
    if not _results(run, "merged").is_file():
        from sppctl.evaluate import stage as evaluation

        evaluation.load_data(run.config)
    if elsewhere is not None:
        elsewhere("prune")
        elsewhere("train")
    with run.lock():
        base = run.base()
        if elsewhere is None:
            prune(run)
            train(run)
        if not distributed.leave():
            return None
        merge(run)
        if elsewhere is None:
            evaluate(run, {"base": base, "pruned": run.path("prune"), "merged": run.path("merge")})
    if elsewhere is not None:
        elsewhere("eval", *_models("base", "pruned", "merged"))
    collected = report([run.directory])[0]
    console.note(f"run: done in {time.perf_counter() - started:.0f} s ({run.directory})")
    return collected


def evaluate_some(
    run: Run, models: list[str], elsewhere: Callable[..., None] | None = None
) -> dict[str, dict[str, Any]]:
    """Measures checkpoints and adapters; what ``sppctl eval`` does.

    Args:
        run: the run.
        models: directories, hub ids, or base, pruned, adapter, merged of the run; none: its newest checkpoint.
        elsewhere: as for :func:`run_all`.

    Returns:
        The content of the results file of each, by label.
    """
    run.check_directory()
    if not (run.config.eval.perplexity or run.config.eval.tasks):
        raise UserError("eval.perplexity and eval.tasks are both empty, nothing to measure; name a text or a task")
    from sppctl.evaluate.subjects import Subject

    places = _checkpoints_to_measure(run, models)
    for label, path in places.items():
        subject = Subject.at(label, path) if path is not None else None
        preflight(run, ("eval",), subject.directory if subject is not None else None)
        if subject is not None:
            subject.check(run.config.model.trust_remote_code)
    from sppctl.evaluate import stage

    if distributed.world_size() == 1 and not all(_results(run, label).is_file() for label in places):
        stage.load_data(run.config)
    if elsewhere is not None:
        elsewhere("eval", *_models(*models))
        return {label: stage.read_results(_results(run, label)) for label in places}
    with run.lock(makes=False):
        found = {label: path or _base(run) for label, path in places.items()}
        console.note("eval: " + "; ".join(f"{label}, {path}" for label, path in found.items()))
        return evaluate(run, found)


def _models(*models: str) -> list[str]:
    return [f"--model={model}" for model in models]


def _results(run: Run, label: str) -> Path:
    return run.directory / "eval" / f"{label}.json"


def _checkpoints_to_measure(run: Run, models: list[str]) -> dict[str, Path | None]:
    from sppctl.model import checkpoint

    wanted: list[str | None] = [*models] or [None]
    places: dict[str, Path | None] = {}
    for label, path in (_checkpoint_to_measure(run, model) for model in wanted):
        taken = places.get(label)
        if path is not None and taken is not None and taken.resolve() != path.resolve():
            label = f"{label}-{checkpoint.fingerprint(path)[:6]}"
        places[label] = path
    return places


def _checkpoint_to_measure(run: Run, model: str | None) -> tuple[str, Path | None]:
    """Label and directory; no directory for the base model, which may have to be unpacked first."""
    from sppctl.model import checkpoint

    own = {"pruned": "prune", "adapter": "train", "merged": "merge"}
    if model is None:
        model = next((label for label in ("merged", "pruned") if run.record(own[label]) is not None), "base")
    if model == "base":
        return model, None
    if model in own and run.record(own[model]) is not None:
        return model, run.path(own[model])
    directory = checkpoint.locate(model, key="--model", adapters=True)
    known = {(run.directory / name).resolve(): name for name in ("base", *own)}
    return known.get(directory.resolve()) or _label(model, directory.resolve(), {"base", *own}), directory


def _label(model: str, directory: Path, reserved: set[str]) -> str:
    """A file name for a checkpoint that is not the run's own: its path below this folder, else its whole path."""
    name = model
    if Path(model).is_dir():
        here = Path.cwd()
        name = str(directory.relative_to(here) if directory.is_relative_to(here) else directory)
    label = re.sub(r"[^\w.-]+", "-", name.replace("/", "--")).strip("-.")
    return paths.file_stem(label if label and label not in reserved else f"{directory.parent.name}--{directory.name}")


# --- what a stage depends on ------------------------------------------------------------------------------------------


def settings_of(config: Config, stage: str) -> dict[str, Any]:
    """The configuration that the result of a stage depends on."""
    settings = {stage: result_keys(getattr(config, stage))}
    if stage == "merge":
        return settings
    model = result_keys(config.model)
    if stage == "train":  # which starts from what pruning made of all other keys
        model = {"compute_dtype": model["compute_dtype"]}
    return {"seed": config.run.seed, "model": model} | settings


def _choose_dtype(config: Config, directory: Path, *, whole: bool = True, **options: Any) -> machine.Compute:
    """The dtype in which a checkpoint is computed on the configured device, and why.

    Args:
        config: the configuration.
        directory: of the checkpoint.
        whole: whether all its weights are in memory at a time; where they fit only as stored, the reason says so.
        options: of :func:`sppctl.model.checkpoint.choose_dtype`.
    """
    from sppctl.model import checkpoint

    model, device = config.model, checkpoint.pick_device(config.model.device)
    chosen = checkpoint.choose_dtype(directory, device, model.compute_dtype, model.trust_remote_code, **options)
    if whole and chosen.widened:
        needed, free = checkpoint.weight_bytes(directory, chosen.dtype), machine.free_memory(device)
        if needed // 2 <= free < needed:
            text = (
                f"{chosen.text}, which takes {needed / 2**30:.1f} GiB for the weights; {free / 2**30:.1f} GiB are free"
            )
            return chosen._replace(text=f"{text}: model.compute_dtype=bfloat16 needs half")
    return chosen


def _need(run: Run, stage: str) -> dict[str, Any]:
    """The record of a stage that must be there, and must be what the configuration describes."""
    record = run.record(stage)
    if record is None:
        raise UserError(f"{run.path(stage)} does not exist; make it first: sppctl {stage} (or sppctl run)")
    settings = settings_of(run.config, stage)
    if record["settings"] != settled(settings, record):
        raise UserError(
            f"{run.path(stage)} was made with {differences(record, settings, record['inputs'])}; "
            f"redo it (sppctl {stage} --force), or use its settings or another run.dir"
        )
    distributed.decide(partial(run.verify, stage, record))
    return record


def _base(run: Run) -> Path:
    """The dense checkpoint; where the run has a pruned one, it must be the one that was pruned.

    Raises:
        UserError: it is another one, or has changed since.
    """
    base, pruned = run.base(), run.record("prune")
    if pruned is not None and pruned["inputs"]["base"] != _fingerprint(base):
        raise UserError(
            f"model.path: {base} does not hold the weights that {run.path('prune')} was made from (it changed, or is "
            "another model); restore it, or prune again (sppctl prune --force)"
        )
    return base


def _fingerprint(directory: Path) -> str:
    from sppctl.evaluate import subjects

    return subjects.fingerprint(directory)


def _dense_models(run: Run) -> tuple[Path | None, dict[str, str]]:
    """The dense checkpoint if training reads it (a teacher, regrown weights), and the fingerprints of what it reads."""
    from sppctl.train import distill

    train = run.config.train
    teacher = train.distill.teacher
    base = _base(run) if teacher == distill.BASE or train.refresh.steps is not None else None
    inputs = {} if base is None else {"base": _fingerprint(base)}
    if teacher not in (None, distill.BASE):
        inputs["teacher"] = _fingerprint(distill.locate(teacher))
    return base, inputs


def _newer_data(run: Run, stage: str) -> dict[str, str]:
    """What has become of the hub's data in the cache since a stage read it, which it would read now."""
    from sppctl.files import sources

    record = None if run.force else run.record(stage)
    if record is None:
        return {}
    metrics = record["metrics"]
    versions = (metrics.get("calibration") or metrics).get("versions", {})
    return {f"data {key}": version for key, version in sources.newer(versions).items()}


def _file_hash(key: str, dataset: str) -> dict[str, str]:
    """Identifies local data by content; data known by name needs no more than its name."""
    from sppctl.data import texts

    found = texts.file_hash(dataset)
    return {} if found is None else {key: found}
