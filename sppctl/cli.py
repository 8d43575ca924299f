"""The command line: parse, call, print. torch is imported only by the commands that need it."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from inspect import getdoc
from pathlib import Path
from typing import Annotated

import typer

from sppctl import __version__, console, distributed, launch, options, show
from sppctl.config.load import load_config, schema, schema_yaml, to_dict, to_yaml
from sppctl.config.settings import Config
from sppctl.errors import StageError, UserError, first_line, named_as_given
from sppctl.files.paths import expand
from sppctl.records import to_json
from sppctl.run.directory import Run

# commands on any checkpoint have no configuration; what its keys are called there
AS_ARGUMENTS = {"model.path": "CHECKPOINT", "model.device": "--device"}
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Prune, retrain, merge and evaluate sparse language models that stay sparse.",
    epilog="CONFIG is a YAML file or the name of a shipped one (default: quickstart). KEY=VALUE overrides any key: "
    "sppctl run prune.pattern=4:8 train.epochs=1. Precedence: command line, then YAML, then defaults.",
)


def _do(stage: str, work: Run, json: bool) -> None:
    """Checks and does a stage, in the configured number of processes."""
    from sppctl.run import pipeline, stages

    pipeline.join_processes(work.config)
    pipeline.preflight(work, (stage,))
    if launch.needed(work.config):  # this very command in each of them
        raise typer.Exit(launch.start(sys.argv[1:], launch.num_processes(work.config)))
    with work.lock():
        show.stage(work.do(stages.BY_NAME[stage]), json)


def _expanded(path: Path) -> Path:
    """The path without ``~``, which shells leave in --output=~/folder."""
    return Path(expand(str(path)))


def _starter(config: Config, arguments: list[str], force: bool, debug: bool) -> Callable[..., None] | None:
    """What does a stage in the configured number of processes; None if this process is to do it."""
    if not launch.needed(config):
        return None

    def do(stage: str, *options: str) -> None:
        same = [stage, *arguments, *options, *["--force"] * force, *["--debug"] * debug]
        code = launch.start(same, launch.num_processes(config), silent=True)
        if code:
            raise typer.Exit(code)

    return do


def _version(value: bool) -> None:
    if value:
        print(f"sppctl {__version__}")
        raise typer.Exit


def command(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a command, whose help is its docstring with examples."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        return app.command(name, help=options.help_of(name, getdoc(function) or ""))(function)

    return register


@app.callback()
def _main(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    pass


@command("run")
def run(
    arguments: options.Arguments = None,
    model: options.Model = None,
    method: options.Method = None,
    pattern: options.PatternOption = None,
    output: options.Output = None,
    tasks: options.Tasks = None,
    limit: options.Limit = None,
    force: options.Force = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Prune, train, merge, evaluate and report in one command.

    Stages that are up to date are skipped, interrupted ones are resumed.
    """
    names, overrides = options.given(
        arguments, model=model, method=method, pattern=pattern, output=output, tasks=tasks, limit=limit
    )
    config = load_config(names[0] if names else None, overrides)
    from sppctl.run import pipeline

    pipeline.join_processes(config)
    start_stage = _starter(config, [*names, *overrides], force, debug)
    study = pipeline.run_all(Run(config, force=force), start_stage)
    if study is not None:
        show.report(study, json)


@command("prune")
def prune(
    arguments: options.Arguments = None,
    model: options.Model = None,
    method: options.Method = None,
    pattern: options.PatternOption = None,
    output: options.Output = None,
    force: options.Force = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Prune the dense model into RUN/pruned."""
    config = options.resolve(arguments, model=model, method=method, pattern=pattern, output=output)
    _do("prune", Run(config, force=force), json)


@command("train")
def train(
    arguments: options.Arguments = None,
    output: options.Output = None,
    resume: options.Resume = True,
    force: options.Force = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Train a sparsity-preserving adapter on RUN/pruned, into RUN/adapter.

    The same command resumes an interrupted training.
    """
    config = options.resolve(arguments, output=output)
    _do("train", Run(config, force=force, resume=resume), json)


@command("merge")
def merge(
    arguments: options.Arguments = None,
    output: options.Output = None,
    force: options.Force = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Merge RUN/pruned and RUN/adapter into RUN/merged, and verify that every zero is still zero."""
    config = options.resolve(arguments, output=output)
    from sppctl.run import stages

    work = Run(config, force=force)
    with work.lock():
        show.stage(work.do(stages.MERGE), json)


@command("eval")
def evaluate(
    arguments: options.Arguments = None,
    model: options.Subjects = None,
    tasks: options.Tasks = None,
    limit: options.Limit = None,
    output: options.Output = None,
    force: options.Force = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Measure perplexity and benchmark accuracy of any checkpoint, into RUN/eval.

    What was measured with the same settings on the same weights is not measured again.
    """
    names, overrides = options.given(arguments, output=output, tasks=tasks, limit=limit)
    config = load_config(names[0] if names else None, overrides)
    from sppctl.run import pipeline

    pipeline.join_processes(config)
    start_stage = _starter(config, [*names, *overrides], force, debug)
    found = pipeline.evaluate_some(Run(config, force=force), [expand(one) for one in model or []], start_stage)
    show.results(found, config.run.seed, json)


@command("report")
def report(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...")],
    output: options.ReportFolder = None,
    latex: options.Latex = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Collect runs into tables and figures: report.html, report.md, report.csv and report.json."""
    places = [_expanded(path) for path in run_dirs], output and _expanded(output), latex and _expanded(latex)
    from sppctl.run import pipeline

    show.report(pipeline.report(*places), json)


@command("sweep")
def sweep(
    arguments: options.SweepArguments,
    dry_run: options.DryRun = False,
    slurm: options.Slurm = None,
    only: options.Only = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Run a grid of configurations; shared stages are computed once."""
    names, overrides = options.given(arguments)
    if not names:
        raise UserError("which sweep? give its YAML file, or sweep-example")
    from sppctl.sweep import grid
    from sppctl.sweep import slurm as jobs
    from sppctl.sweep import work as sweeping

    read = grid.load_sweep(names[0], overrides)
    if dry_run or slurm is not None:
        sweeping.check(read, made=not dry_run)
        entries = sweeping.plan(read)
        if slurm is not None and not dry_run:
            console.note(f"sweep: {jobs.write(read, _expanded(slurm), overrides)} submits the jobs")
        show.sweep(entries, sweeping.totals(entries), json)
        sweeping.check_made(read)
        return
    study, failed = sweeping.execute(read, only, debug)
    if study is not None:
        show.report(study, json)
    if failed:
        raise StageError("\n".join(f"{name} failed: {reason}" for name, reason in failed.items()))


@command("inspect")
def inspect(
    checkpoint: Annotated[str, typer.Argument(help="Directory, hub id or package:NAME.")],
    expect: options.Expect = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Certify the sparsity of any safetensors checkpoint, matrix by matrix."""
    from sppctl.pattern import Pattern

    try:
        expected = Pattern.parse(expect) if expect is not None else None
    except ValueError as error:
        raise UserError(f"--expect: {error}") from error
    from sppctl.files import integrity
    from sppctl.inspect import inspect as stage
    from sppctl.model.checkpoint import locate_weights

    with named_as_given(AS_ARGUMENTS):
        directory = locate_weights(expand(checkpoint))
    integrity.check_record(directory)
    matrices, summary = stage.measure(directory, expected)
    wrong = stage.violations(matrices, expected, stage.recorded_patterns(directory)) if expected is not None else []
    show.matrices(checkpoint, matrices, summary, wrong, json)
    if wrong:
        more = f"\n... and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise StageError(f"{checkpoint} is not {expected}: {len(wrong)} violations\n" + "\n".join(wrong[:3]) + more)


@command("verify")
def verify(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR")],
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Compare every file of a run with the hashes in its records.

    Exits with code 2 if a file is damaged, missing or not recorded.
    """
    from sppctl.run import verify as stage

    found = stage.execute(_expanded(run_dir))
    show.files(str(run_dir), found, json)
    problems = [file.problem for file in found if file.problem is not None]
    if problems:
        raise UserError("\n".join(problems))


@command("bench")
def bench(
    checkpoint: Annotated[str, typer.Argument(help="Directory, hub id or package:NAME.")],
    batch: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1,8,32",
    prompt: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 512,
    new: Annotated[int, typer.Option(help="Tokens decoded after the prompt.")] = 32,
    repeats: Annotated[int, typer.Option(help="Measured rounds; the median is reported.")] = 5,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Measure prefill and decode speed of a checkpoint, dense and with 2:4 kernels, and its storage."""
    try:
        batches = tuple(int(part) for part in batch.split(","))
    except ValueError as error:
        raise UserError("--batch", f"{batch} is not a list of numbers", "write --batch 1,8,32") from error
    from sppctl.inspect import speed as stage
    from sppctl.inspect import speed_text

    with named_as_given(AS_ARGUMENTS):
        found = stage.execute(expand(checkpoint), stage.Settings(batches, prompt, new, repeats, device))
    if json:
        console.show_json(asdict(found))
    else:
        show.tables(speed_text.tables(found), found.notes)


@command("plan")
def plan(
    arguments: options.Arguments = None,
    model: options.Model = None,
    method: options.Method = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Estimate parameters, memory, disk and steps without loading weights."""
    config = options.resolve(arguments, model=model, method=method)
    from sppctl.plan import run as planning
    from sppctl.plan import text as plan_text

    planned = planning.execute(config)
    if json:
        console.show_json(to_json(planned))
    else:
        show.tables(plan_text.tables(planned), plan_text.sentences(planned, config))


@command("config")
def config(
    arguments: options.Arguments = None,
    show_schema: Annotated[
        bool, typer.Option("--schema", help="Print every key with default, meaning and type.")
    ] = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Print the configuration that a run would use, or the schema of all keys."""
    if show_schema:
        if json:
            console.show_json(schema())
        else:
            print(schema_yaml(), end="")
        return
    resolved = options.resolve(arguments)
    if json:
        console.show_json(to_dict(resolved))
    else:
        print(to_yaml(resolved), end="")


def _where() -> str:
    """Which of several processes speaks, if it is not the first."""
    return "" if distributed.is_main() else f"process {distributed.rank()}: "


def main() -> None:
    """Entry point: errors become one line and an exit code, a traceback only with --debug."""
    try:
        _run()
    except SystemExit as stop:
        if distributed.is_connected():
            distributed.exit_now(stop.code if isinstance(stop.code, int) else int(stop.code is not None))
        raise


def _run() -> None:
    launch.adopt()
    debug = "--debug" in sys.argv
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if not debug:
        warnings.simplefilter("ignore")  # deprecations of the libraries below, of no use to those who run sppctl
    try:
        app()
    except (UserError, StageError) as error:
        if debug:
            raise
        if distributed.is_main() or (distributed.is_connected() and not error.shared):
            for line in str(error).splitlines():
                print(f"error: {_where()}{console.plain(line)}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except SystemExit as stop:
        if stop.code == 130:  # Typer turns Ctrl-C into this
            console.note("interrupted; the same command continues or starts the stage again")
        raise
    except Exception as error:
        if debug:
            raise
        reason = console.plain(f"{_where()}{type(error).__name__}: {first_line(error) if str(error).strip() else ''}")
        print(f"error: {reason} (--debug shows where)", file=sys.stderr)
        sys.exit(1)
