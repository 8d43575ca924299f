"""The commands on a run: the checks before any stage starts, and the stages in order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sppctl import console, distributed, launch, machine
from sppctl.config.settings import Config, names_of
from sppctl.errors import Problems, StageError, UserError, first_line
from sppctl.run import dense, measure
from sppctl.run.directory import Run
from sppctl.run.stages import BY_NAME, MERGE, PRUNE, TRAIN, choose_dtype

if TYPE_CHECKING:
    from sppctl.evaluate.results import Json
    from sppctl.model.blocks import Skeleton
    from sppctl.model.estimate import Work
    from sppctl.report.study import Study

STAGES = ("prune", "train", "merge", "eval", "report")
MEASURED = ("base", "pruned", "merged")
Starter = Callable[..., None]  # does a stage, given its name and options, in separate processes


def join_processes(config: Config) -> None:
    """Connects to the other processes under torchrun; does nothing in a single process."""
    if distributed.world_size() > 1:
        from sppctl.model import checkpoint

        distributed.connect(checkpoint.pick_device(config.model.device))


def check_names(run: Run, stages: Iterable[str]) -> None:
    """Raises UserError for unknown texts and tasks at once: :func:`preflight` loads libraries first."""
    from sppctl.data import texts
    from sppctl.evaluate import task_names

    config, problems = run.config, Problems()
    for stage in stages:
        with problems:
            if stage == "prune" and run.will_do(stage):
                texts.check_name(config.prune.calibration.dataset, "prune.calibration.dataset")
            elif stage == "train" and run.will_do(stage):
                for name in names_of(config.train.data.dataset):
                    texts.check_name(name, "train.data.dataset", rows=True)
            elif stage == "eval":
                for name in config.eval.perplexity:
                    texts.check_name(name, "eval.perplexity")
                if config.eval.include_path is None:
                    task_names.check(config.eval.tasks)
    problems.raise_all()


def preflight(run: Run, stages: tuple[str, ...], directory: Path | None = None, *, announce: bool = False) -> None:
    """Makes all checks of all stages that will run, before anything is computed or written.

    Args:
        run: the run; it keeps the data that the checks load.
        stages: the stages that will run.
        directory: a checkpoint to measure; None: the configured model, which need not be unpacked yet.
        announce: print what will be done, and about how long it takes.

    Raises:
        UserError: every problem, one per line; shared if all processes find the same.
    """
    with distributed.sharing_errors():
        with console.warned_before(launch.is_started_by_sppctl()):
            work, skeleton = _checked(run, stages, directory)
        if announce:
            if not measure.results_of(run, "merged").is_file():
                from sppctl.evaluate import stage as evaluation

                evaluation.load_data(run.config)
            _announce(run, skeleton, work)


def _checked(run: Run, stages: tuple[str, ...], directory: Path | None) -> tuple[dict[str, Work], Skeleton]:
    """The work of each stage, and the model; UserError with every problem."""
    run.check_directory()
    outline = run.outline() if directory is None else dense.outline(run, directory)
    from sppctl.merge.rules import check_mask
    from sppctl.model import checkpoint

    checkpoint.pick_device(run.config.model.device)
    problems = Problems()
    work: dict[str, Work] = {}
    _check_windows(run, stages, outline.skeleton.config, problems)
    for stage in stages:
        with problems:
            if stage == "eval":
                from sppctl.evaluate import stage as evaluation

                work[stage] = evaluation.preflight(run.config, outline.skeleton, outline.tokenizer)
                if "prune" in stages and any(run.will_do(one) for one in ("prune", "train")):
                    _check_dense(run, outline.skeleton)
            elif stage in BY_NAME and run.will_do(stage):
                with problems:
                    run.check_attempt(stage)
                if stage == "merge":
                    if run.config.merge.adapter is not None:
                        fix = "sppctl prune and sppctl merge need no training"
                        raise UserError("merge.adapter", "sppctl run merges the adapter that it trains", fix)
                    check_mask(run.config.train.method.upper(), run.config.merge.mask)
                else:
                    work[stage] = run.prepare(BY_NAME[stage]).work
    problems.raise_all()
    return work, outline.skeleton


def _check_dense(run: Run, skeleton: Skeleton) -> None:
    """Raises UserError if the others are to be compared with the dense model, which does not fit into memory."""
    if run.config.eval.divergence != dense.BASE or not run.config.eval.perplexity:
        return
    if launch.needed(run.config) or distributed.world_size() > 1:
        return  # a process that only starts others must not use the GPU; one of several has only its own
    from sppctl.evaluate import stage as evaluation
    from sppctl.machine import torch_dtype
    from sppctl.plan import run as plan

    needed = plan.num_parameters(skeleton) * torch_dtype(_dense_dtype(run)).itemsize
    evaluation.check_dense(run.config, f"{run.config.model.path}", needed)


def _measurable(run: Run, base: Path) -> dict[str, Path]:
    """The checkpoints to measure by label; a dense model that does not fit into memory is left out, with a warning."""
    from sppctl.evaluate.subjects import shortage
    from sppctl.model import checkpoint

    own = {"pruned": run.path("prune"), "merged": run.path("merge")}
    needed = checkpoint.weight_bytes(base, choose_dtype(run.config, base).dtype)
    lacking = None if run.config.model.weights == "dense" else shortage(run.config.model, needed)
    if lacking is None or measure.results_of(run, dense.BASE).is_file():
        return {dense.BASE: base, **own}
    console.warn(f"the dense model {base} {lacking}, so it is not measured")
    return own


def _check_windows(run: Run, stages: Iterable[str], model: Any, problems: Problems) -> None:
    """Raises UserError with each length that exceeds the model's: tokenising before that would be in vain."""
    from sppctl.model import checkpoint
    from sppctl.prune.choose import needs_inputs

    config, lengths = run.config, {"train": ("train.data.seq_len", run.config.train.data.seq_len)}
    if needs_inputs(config.prune):
        lengths["prune"] = "prune.calibration.seq_len", config.prune.calibration.seq_len
    for stage in stages:
        if stage in lengths and run.will_do(stage):
            with problems:
                checkpoint.check_window(*lengths[stage], model)
        elif stage == "eval":
            with problems:
                checkpoint.check_window("eval.seq_len", config.eval.seq_len, model)
    problems.raise_all()


def _announce(run: Run, skeleton: Skeleton, work: dict[str, Work]) -> None:
    """Prints what a run will do, and, if this process does the work, about how long each stage takes."""
    from sppctl.model import estimate

    if measure.results_of(run, "merged").is_file():
        work.pop("eval", None)
    if "eval" in work:
        single = work["eval"]  # of one checkpoint
        work["eval"] = replace(single, text=f"base, pruned and merged on {single.text}", tokens=3 * single.tokens)
    console.note(f"run: {run.directory}, on {machine.describe()}")
    # a process that only starts others must not use the GPU
    for line in estimate.lines(work, None if launch.needed(run.config) else _seconds_per_token(run, skeleton)):
        console.note(line)


def _seconds_per_token(run: Run, skeleton: Skeleton) -> float:
    from sppctl.model import checkpoint, estimate
    from sppctl.plan import run as plan

    dtype, device = _dense_dtype(run, training=True), checkpoint.pick_device(run.config.model.device)
    width = skeleton.config.get_text_config().hidden_size
    return estimate.seconds_per_token(plan.num_parameters(skeleton), width, dtype, device)


def _dense_dtype(run: Run, training: bool = False) -> str:
    """The dtype that the dense model is computed in, which need not be unpacked yet."""
    from sppctl.model import checkpoint

    model, directory = run.config.model, dense.locate(run.config)
    stored = checkpoint.dtype_of(model.dtype, None) if model.gguf_file is not None else model.dtype
    choices = checkpoint.pick_device(model.device), model.compute_dtype, model.trust_remote_code
    return checkpoint.choose_dtype(directory, *choices, stored=stored, training=training).dtype


def report(run_dirs: list[Path], output: Path | None = None, latex: Path | None = None) -> Study:
    """Writes the reports of runs, see :func:`sppctl.report.write.report`, and their model cards."""
    from sppctl.publish import card
    from sppctl.report import write

    study = write.report(run_dirs, output, latex)
    for run in study.runs:
        card.update(run)
    return study


def run_all(run: Run, start_stage: Starter | None = None) -> Study | None:
    """Runs all stages: with ``start_stage`` in separate processes, otherwise in this process and those it joined.

    Returns:
        The report's data; None in processes that have nothing to do after the training.
    """
    started = time.perf_counter()
    preflight(run, STAGES, announce=True)
    if start_stage is not None:
        run.prepared.clear()  # the started processes prepare their own
        start_stage("prune")
        start_stage("train")
    with run.lock():
        base = dense.base(run)
        if start_stage is None:
            run.do(PRUNE)
            run.do(TRAIN)
        if not distributed.leave():
            return None
        run.do(MERGE)
        if start_stage is None:
            measure.evaluate(run, _measurable(run, base))
            _write_samples(run)
    if start_stage is not None:
        start_stage("eval", *(f"--model={label}" for label in MEASURED))
    study = report([run.directory])
    console.note(f"run: done in {time.perf_counter() - started:.0f} s ({run.directory})")
    return study


def evaluate_some(run: Run, models: list[str], start_stage: Starter | None = None) -> dict[str, Json]:
    """Measures checkpoints and adapters: the command ``sppctl eval``.

    Args:
        run: its configuration selects the measures.
        models: directories, hub ids, or base, pruned, adapter, merged of the run; empty: its newest checkpoint.
        start_stage: as in :func:`run_all`.

    Returns:
        The content of each results file, by label.
    """
    with distributed.sharing_errors():
        directories = _checked_directories(run, models)
    from sppctl.evaluate import stage
    from sppctl.evaluate.results import Results

    files = {label: measure.results_of(run, label) for label in directories}
    if distributed.world_size() == 1 and not all(path.is_file() for path in files.values()):
        stage.load_data(run.config)
    if start_stage is not None:
        start_stage("eval", *(f"--model={model}" for model in models))
        return {label: content.to_json() for label, path in files.items() if (content := Results.load(path))}
    with run.lock(only_measures=True):
        checkpoints = {label: path or dense.same_base(run) for label, path in directories.items()}
        console.note("eval: " + "; ".join(f"{label}, {path}" for label, path in checkpoints.items()))
        if distributed.world_size() > 1 and measure.needs_all_gpus(run, checkpoints):
            console.note("eval: the dense model exceeds one GPU, so one process spreads it over all")
            if not distributed.leave():
                return {}
        results = measure.evaluate(run, checkpoints)
        if distributed.leave():
            _update_cards(run.directory)
            if "merged" in checkpoints:
                _write_samples(run)
        return results


def _checked_directories(run: Run, models: list[str]) -> dict[str, Path | None]:
    """The checkpoints to measure by label, as :func:`sppctl.run.measure.checkpoints_to_measure`, checked."""
    run.check_directory()
    if not (run.config.eval.perplexity or run.config.eval.tasks):
        raise UserError("eval.perplexity and eval.tasks are both empty, nothing to measure; add a text or a task")
    directories = measure.checkpoints_to_measure(run, models)
    from sppctl.evaluate.subjects import Subject

    for label, path in directories.items():
        subject = Subject.at(label, path) if path is not None else None
        preflight(run, ("eval",), subject.directory if subject is not None else None)
        if subject is not None:
            subject.check(run.config.model.trust_remote_code)
    return directories


def _update_cards(run_dir: Path) -> None:
    """Writes the model cards of a run with its new results, which are kept whatever is wrong with other records."""
    from sppctl.publish import card

    try:
        card.update(card.study_of(run_dir))
    except UserError as error:
        console.warn(f"the model cards of {run_dir} stay as they were: {error}")


def _write_samples(run: Run) -> None:
    """Writes the samples for the report; without them the results of the evaluation are as good."""
    from sppctl.publish import samples

    try:
        samples.update(run.directory, run.config.eval.prompts, run.config.model)
    except (UserError, RuntimeError) as error:  # out of memory is a RuntimeError
        if isinstance(error, StageError):
            raise
        console.warn(f"no samples for the report: {first_line(error)}; eval.prompts=[] does without")
