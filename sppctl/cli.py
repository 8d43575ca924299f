"""The command line: parse, call, print. torch is imported only by the commands that need it."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from sppctl import __version__, console, distributed, launch
from sppctl.config.load import flatten, load_config, quoted, schema, schema_yaml, to_dict, to_yaml
from sppctl.config.settings import Config
from sppctl.errors import StageError, UserError, named_as_given
from sppctl.files.paths import expand
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
    "sppctl run prune.pattern=4:8 train.epochs=1. Command line over YAML over defaults.",
)

Arguments = Annotated[
    list[str] | None,
    typer.Argument(metavar="[CONFIG] [KEY=VALUE]...", help="YAML file or shipped name, and overrides."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Force = Annotated[bool, typer.Option("--force", help="Redo the stage even if it exists.")]
Model = Annotated[str | None, typer.Option(help="Dense model: hub id, directory or package:NAME (model.path).")]
Method = Annotated[str | None, typer.Option(help="Pruning method (prune.method).")]
PatternOption = Annotated[str | None, typer.Option("--pattern", help="2:4, 4:8 or a ratio of zeros (prune.pattern).")]
Output = Annotated[str | None, typer.Option(help="Run directory (run.dir).")]
Tasks = Annotated[str | None, typer.Option(help="zeroshot, mmlu, wikitext, all, ppl, any of lm-eval, with commas.")]
Limit = Annotated[int | None, typer.Option(help="First N examples of each task (eval.limit).")]


def _resolve(arguments: Sequence[str] | None, **sugar: Any) -> Config:
    """The configuration that positional arguments and options mean together."""
    names, overrides = _given(arguments, **sugar)
    return load_config(names[0] if names else None, overrides)


def _given(arguments: Sequence[str] | None, **sugar: Any) -> tuple[list[str], list[str]]:
    """At most one CONFIG, and all overrides as KEY=VALUE."""
    names = [expand(argument) for argument in arguments or [] if "=" not in argument]
    overrides = [argument for argument in arguments or [] if "=" in argument]
    if len(names) > 1:
        raise UserError(f"expected one CONFIG, found {', '.join(names)}; overrides are written KEY=VALUE")
    keys = {
        "model": "model.path",
        "method": "prune.method",
        "pattern": "prune.pattern",
        "output": "run.dir",
        "limit": "eval.limit",
    }
    given = {keys[name]: value for name, value in sugar.items() if name in keys and value is not None}
    overrides += [f"{key}={quoted(value)}" for key, value in given.items()]
    tasks = sugar.get("tasks")
    if tasks is not None:
        chosen = [task.strip() for task in tasks.split(",") if task.strip()]
        overrides.append(f"eval.tasks={quoted([task for task in chosen if task != 'ppl'])}")
        if "ppl" not in chosen:
            overrides.append("eval.perplexity=[]")
    return names, overrides


def _expanded(path: Path) -> Path:
    """The path without ``~``, which shells leave in --output=~/folder."""
    return Path(expand(str(path)))


def _launch(config: Config) -> None:
    """Does this very command in the configured number of processes, unless it is in one of several already."""
    if launch.needed(config):
        raise typer.Exit(launch.start(sys.argv[1:], launch.num_processes(config)))


def _elsewhere(config: Config, arguments: list[str], force: bool, debug: bool) -> Callable[..., None] | None:
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


@app.callback()
def _main(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    pass


@app.command()
def run(
    arguments: Arguments = None,
    model: Model = None,
    method: Method = None,
    pattern: PatternOption = None,
    output: Output = None,
    tasks: Tasks = None,
    limit: Limit = None,
    force: Force = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Prune, train, merge, evaluate and report; stages that are up to date are skipped."""
    names, overrides = _given(
        arguments, model=model, method=method, pattern=pattern, output=output, tasks=tasks, limit=limit
    )
    config = load_config(names[0] if names else None, overrides)
    from sppctl.run import pipeline

    pipeline.join_processes(config)
    elsewhere = _elsewhere(config, [*names, *overrides], force, debug)
    collected = pipeline.run_all(Run(config, force=force), elsewhere)
    if collected is not None:
        _print_report([collected], json)


@app.command()
def prune(
    arguments: Arguments = None,
    model: Model = None,
    method: Method = None,
    pattern: PatternOption = None,
    output: Output = None,
    force: Force = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Make RUN/pruned from the dense model."""
    config = _resolve(arguments, model=model, method=method, pattern=pattern, output=output)
    from sppctl.run import pipeline

    pipeline.join_processes(config)
    work = Run(config, force=force)
    pipeline.preflight(work, ("prune",))
    _launch(config)
    with work.lock():
        _print_stage(pipeline.prune(work), json)


@app.command()
def train(
    arguments: Arguments = None,
    output: Output = None,
    resume: Annotated[bool, typer.Option(help="Continue an interrupted training.")] = True,
    force: Force = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Make RUN/adapter: tune SPP adapters on RUN/pruned."""
    config = _resolve(arguments, output=output)
    from sppctl.run import pipeline

    pipeline.join_processes(config)
    work = Run(config, force=force, resume=resume)
    pipeline.preflight(work, ("train",))
    _launch(config)
    with work.lock():
        _print_stage(pipeline.train(work), json)


@app.command()
def merge(
    arguments: Arguments = None, output: Output = None, force: Force = False, json: Json = False, debug: Debug = False
) -> None:
    """Make RUN/merged from RUN/pruned and RUN/adapter, and prove that the pattern is unchanged."""
    config = _resolve(arguments, output=output)
    from sppctl.run import pipeline

    work = Run(config, force=force)
    with work.lock():
        _print_stage(pipeline.merge(work), json)


@app.command(name="eval")
def evaluate(
    arguments: Arguments = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="What to measure, may be repeated: base, pruned, adapter (not merged) or merged of the run, or any "
            "checkpoint or adapter directory or hub id; default: the newest checkpoint of the run."
        ),
    ] = None,
    tasks: Tasks = None,
    limit: Limit = None,
    output: Output = None,
    force: Force = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure perplexity and benchmark accuracy of any checkpoint."""
    names, overrides = _given(arguments, output=output, tasks=tasks, limit=limit)
    config = load_config(names[0] if names else None, overrides)
    from sppctl.run import pipeline

    pipeline.join_processes(config)
    elsewhere = _elsewhere(config, [*names, *overrides], force, debug)
    found = pipeline.evaluate_some(Run(config, force=force), [expand(one) for one in model or []], elsewhere)
    if not distributed.is_main():
        return
    if json:
        console.show_json(next(iter(found.values())) if len(found) == 1 else found)
        return
    _print_results(found, config.run.seed)


@app.command()
def report(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...")],
    output: Annotated[
        Path | None,
        typer.Option(help="Folder of the report; default: the run itself, for several runs the folder they share."),
    ] = None,
    latex: Annotated[Path | None, typer.Option(help="File for the table in LaTeX (booktabs).")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Collect runs into tables and figures: report.html, .md, .csv and .json."""
    given = [_expanded(path) for path in run_dirs], output and _expanded(output), latex and _expanded(latex)
    from sppctl.run import pipeline

    _print_report(pipeline.report(*given), json)


@app.command()
def sweep(
    arguments: Annotated[
        list[str], typer.Argument(metavar="SWEEP [KEY=VALUE]...", help="YAML file with a grid, and overrides.")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all runs, print the plan and do nothing.")] = False,
    slurm: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write one job script per stage, and submit.sh, into DIR.")
    ] = None,
    only: Annotated[
        str | None, typer.Option(metavar="NAME", help="Do one member of the plan, or report: what a job does.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Do a grid of runs; what they share is made once, what is up to date is skipped, and one table compares them."""
    names, overrides = _given(arguments)
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
        if json:
            console.show_json(entries)
        else:
            _print_plan_of_sweep(entries, sweeping.totals(entries))
        sweeping.check_made(read)
        return
    collected, failed = sweeping.execute(read, only, debug)
    if collected:
        _print_report(collected, json)
    if failed:
        raise StageError("\n".join(f"{name} failed: {reason}" for name, reason in failed.items()))


@app.command()
def inspect(
    checkpoint: Annotated[str, typer.Argument(help="Directory, hub id or package:NAME.")],
    expect: Annotated[
        str | None, typer.Option(help="Pattern that every pruned matrix must keep to, or exit 1.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Certify the sparsity of any safetensors checkpoint."""
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
    if json:
        console.show_json(
            {"summary": summary, "violations": wrong, "matrices": [asdict(matrix) for matrix in matrices]}
        )
    else:
        rows = [
            (m.name, "x".join(map(str, m.shape)), f"{m.sparsity:.4f}", " ".join(m.patterns) or "-") for m in matrices
        ]
        console.show_table(checkpoint, ("matrix", "shape", "sparsity", "N:M that hold"), rows)
        print(stage.sentence(summary))
    if wrong:
        more = f"\n... and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise StageError(f"{checkpoint} is not {expected}: {len(wrong)} violations\n" + "\n".join(wrong[:3]) + more)


@app.command()
def verify(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR")], json: Json = False, debug: Debug = False
) -> None:
    """Read every file of a run again and compare it with the run's records; exit 2 if one is damaged or missing."""
    from sppctl.run import verify as stage

    found = stage.execute(_expanded(run_dir))
    if json:
        console.show_json([asdict(file) for file in found])
    else:
        console.show_table(
            str(run_dir), ("artefact", "file", "state"), [(file.artefact, file.file, file.state) for file in found]
        )
    problems = [file.problem for file in found if file.problem is not None]
    if problems:
        raise UserError("\n".join(problems))


@app.command()
def bench(
    checkpoint: Annotated[str, typer.Argument(help="Directory, hub id or package:NAME.")],
    batch: Annotated[str, typer.Option(help="Sequences at a time, with commas.")] = "1,8,32",
    prompt: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 512,
    new: Annotated[int, typer.Option(help="Tokens decoded after the prompt.")] = 32,
    repeats: Annotated[int, typer.Option(help="Rounds whose median counts.")] = 5,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Time a checkpoint's prefill and decode, dense and with 2:4 kernels, and say what it takes to store."""
    try:
        batches = tuple(int(part) for part in batch.split(","))
    except ValueError as error:
        raise UserError(f"--batch: {batch} is no list of numbers; write --batch 1,8,32") from error
    from sppctl.inspect import speed as stage
    from sppctl.inspect import speed_text

    with named_as_given(AS_ARGUMENTS):
        found = stage.execute(expand(checkpoint), stage.Settings(batches, prompt, new, repeats, device))
    if json:
        console.show_json(found)
        return
    for title, header, rows in speed_text.tables(found):
        console.show_table(title, header, rows)
    for sentence in found["notes"]:
        print(console.plain(sentence))


@app.command()
def plan(
    arguments: Arguments = None, model: Model = None, method: Method = None, json: Json = False, debug: Debug = False
) -> None:
    """Say what a run will take, without weights: parameters, memory, what fits on which GPU, disk, steps."""
    config = _resolve(arguments, model=model, method=method)
    from sppctl.run import pipeline

    planned = pipeline.plan(config)
    if json:
        console.show_json(planned)
        return
    from sppctl.plan import text as plan_text

    for title, header, rows in plan_text.tables(planned):
        console.show_table(title, header, rows)
    for sentence in plan_text.sentences(planned, config):
        print(console.plain(sentence))


@app.command()
def config(
    arguments: Arguments = None,
    show_schema: Annotated[
        bool, typer.Option("--schema", help="Print every key with default, meaning and type.")
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Print the configuration that a run would use."""
    if show_schema:
        if json:
            console.show_json(schema())
        else:
            print(schema_yaml(), end="")
        return
    resolved = _resolve(arguments)
    if json:
        console.show_json(to_dict(resolved))
    else:
        print(to_yaml(resolved), end="")


def _print_plan_of_sweep(entries: list[dict[str, Any]], totals: dict[str, int]) -> None:
    rows = [
        (entry["directory"], ", ".join(entry["stages"]), _there(entry), ", ".join(entry["runs"])) for entry in entries
    ]
    console.show_table("plan", ("directory", "stages", "there", "for"), rows)
    print("; ".join(f"{stage}: {number}" for stage, number in totals.items()))


def _there(entry: dict[str, Any]) -> str:
    return ", ".join([*entry["made"], *(f"{stage} (other settings)" for stage in entry["other_settings"])]) or "-"


def _print_stage(record: dict[str, Any], as_json: bool) -> None:
    if not distributed.is_main():
        return
    if as_json:
        console.show_json(record)
        return
    metrics = {key: value for key, value in flatten(record["metrics"]).items() if not isinstance(value, list)}
    console.show_table(record["stage"], ("", ""), [(key, _figure(value)) for key, value in metrics.items()])


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _print_results(found: dict[str, dict[str, Any]], seed: int) -> None:
    from sppctl.report.readings import ACCURACY, AGREEMENT, measured

    # with the configured seed as the run's, which goes without saying
    named, _ = measured({"stages": {"eval": {"seed": seed}}, "checkpoints": found})
    for label, measures in named.items():
        rows = []
        for name, one in measures.items():
            if one.value is not None and one.kind not in (ACCURACY, AGREEMENT):
                rows.append((name, f"{one.value:.3f}", ""))
            else:
                norm = "" if one.norm is None else f"{one.norm:.2%}"
                rows.append((name, "-" if one.value is None else f"{one.value:.2%}", norm))
        title = f"{label}: {found[label]['checkpoint']}"
        console.show_table(title, ("measure", "acc / perplexity", "acc_norm"), rows)


def _print_report(runs: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        console.show_json(runs)
        return
    from sppctl.report import over_runs, provenance
    from sppctl.report import tables as report_tables

    if len(runs) > 1:
        console.show_table(f"{len(runs)} runs", *report_tables.wide_table(over_runs.rows_of_all(runs)))
    for found in runs:
        console.show_table(found["run"], *report_tables.table(found))
        for fact in provenance.facts(found):
            print(console.plain(fact))


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
        reason = str(error).strip().splitlines()
        said = console.plain(f"{_where()}{type(error).__name__}: {reason[0] if reason else ''}")
        print(f"error: {said} (--debug shows where)", file=sys.stderr)
        sys.exit(1)
