"""The command line: parses, calls and prints. torch is imported only by the commands that need it."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from inspect import getdoc
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperGroup

from sppctl import __version__, console, distributed, launch, options, plugins, show
from sppctl.config.load import schema, schema_yaml, shipped_configs, to_dict, to_yaml
from sppctl.config.recorded import trusts_code
from sppctl.config.settings import ModelConfig
from sppctl.console import Verbosity
from sppctl.errors import StageError, UserError, did_you_mean, first_line, with_argument_names
from sppctl.files.paths import expand, similar_directory
from sppctl.model import find
from sppctl.options import Call, Debug, Imports, Json, Quiet, Verbose
from sppctl.records import refuse_outdated, to_json
from sppctl.run.directory import Run

# configuration keys in errors -> arguments of the commands that take a checkpoint instead of a configuration
ARGUMENT_NAMES = {"model.path": "CHECKPOINT", "model.device": "--device"}
Checkpoint = Annotated[str, typer.Argument(help="Directory, hub id, package:NAME, or a run (its newest checkpoint).")]
IN_SEVERAL_PROCESSES = {"run", "prune", "train", "eval", "sweep"}  # sweep refuses them itself
NEXT = {"prune": "train", "train": "merge", "merge": "eval"}
RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Run directory.")]
F = TypeVar("F", bound=Callable[..., None])


class Commands(TyperGroup):
    """The commands; a shipped configuration in place of a command is answered with the command that runs it."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As in Click; UserError for a shipped configuration."""
        try:
            return super().resolve_command(ctx, args)
        except Exception as error:
            commands = {name: name for name in self.commands}
            for verb in ("run", "sweep"):
                commands |= {name: f"sppctl {verb} {name}" for name in shipped_configs(sweeps=verb == "sweep")}
            hint = did_you_mean(args[0], commands)
            if "sppctl" not in hint:
                raise
            raise UserError(f"there is no command {args[0]}{hint}") from error


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Prune, retrain, merge and evaluate sparse language models that stay sparse.\n\n\b\nExamples:\n"
    "  sppctl run                                  # the quickstart: a few minutes\n"
    "  sppctl run --model meta-llama/Llama-3.1-8B  # a model, with the defaults\n"
    "  sppctl help run                             # more about a command",
    epilog="CONFIG is a YAML file, a run directory, or one of the shipped configurations: "
    f"{', '.join(shipped_configs())} (sweeps: {', '.join(shipped_configs(sweeps=True))}). With --model alone, the "
    "defaults are used; with neither, the quickstart. KEY=VALUE overrides any key: sppctl run llama7b train.epochs=1. "
    "Precedence: command line, then CONFIG, then defaults.",
)


def command(function: F) -> F:
    """Registers a command by the function's name; its help is the docstring."""
    text = (getdoc(function) or "").replace("Examples:", "\b\nExamples:")  # \b keeps the line breaks
    app.command(function.__name__.strip("_"), help=text)(function)
    return function


def configured(*names: str) -> Callable[[Callable[[Call], None]], Callable[..., None]]:
    """Registers a command that takes a configuration and these of the :data:`sppctl.options.OPTIONS`."""
    return lambda function: command(options.with_options(function, names))


def _version(value: bool) -> None:
    if value:
        print(f"sppctl {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    if context.invoked_subcommand not in IN_SEVERAL_PROCESSES and not distributed.leave():
        raise typer.Exit  # the first process does the work


# --- the pipeline -----------------------------------------------------------------------------------------------------


@configured("model", "method", "pattern", "output", "tasks", "limit", "force", "json", "quiet", "verbose", "debug")
def run(call: Call) -> None:
    """Prune, train, merge, evaluate and report in one command.

    Stages that are up to date are skipped, interrupted ones are resumed.

    Examples:
      sppctl run                                  # the quickstart: a few minutes
      sppctl run --model meta-llama/Llama-3.1-8B  # a model, with the defaults
      sppctl run llama7b run.dir=runs/llama7b     # a shipped configuration
      sppctl run my.yaml --model DIRECTORY --pattern 4:8

    More: README.md
    """
    from sppctl.run import pipeline

    run = Run(call.config, force=call.force)
    pipeline.check_names(run, pipeline.STAGES)
    pipeline.join_processes(call.config)
    study = pipeline.run_all(run, _starter(call))
    if study is not None:
        show.report(study, call.json)


@configured("model", "method", "pattern", "output", "force", "json", "quiet", "verbose", "debug")
def prune(call: Call) -> None:
    """Prune the dense model into RUN/pruned.

    Examples:
      sppctl prune --model HUB_ID_OR_DIRECTORY --pattern 2:4
      sppctl prune my.yaml --method sparsegpt --pattern 0.5 --output runs/half
      sppctl prune my.yaml prune.calibration.samples=64 prune.order=module

    More: docs/pruning.md
    """
    _do("prune", call)


@configured("train_method", "output", "resume", "force", "json", "quiet", "verbose", "debug")
def train(call: Call) -> None:
    """Train a sparsity-preserving adapter on RUN/pruned, into RUN/adapter.

    The same command resumes an interrupted training.

    Examples:
      sppctl train runs/X train.epochs=1  # a run, with a key overridden
      sppctl train llama7b --method masked_lora train.scheduler=cosine train.warmup_steps=100
      sppctl train llama7b launch.num_processes=8 launch.strategy=fsdp
      sppctl train my.yaml --no-resume    # discards an interrupted training

    More: docs/training.md, docs/cluster.md
    """
    _do("train", call)


@configured("adapter", "output", "force", "json", "quiet", "verbose", "debug")
def merge(call: Call) -> None:
    """Merge RUN/pruned and RUN/adapter into RUN/merged, and verify that every zero is still zero.

    Examples:
      sppctl merge runs/X
      sppctl merge my.yaml merge.mask=reapply     # for method lora, whose merge fills the zeros
      sppctl merge my.yaml --adapter DIRECTORY merge.mask=reapply     # a LoRA trained elsewhere on RUN/pruned

    More: docs/training.md
    """
    _do("merge", call)


def _do(name: str, call: Call) -> None:
    """Checks and does a stage, in the configured number of processes unless it is merging."""
    from sppctl.run import pipeline, stages

    run = Run(call.config, force=call.force, resume=call.resume)
    pipeline.check_names(run, [name])
    if name != "merge":  # merging needs one process, and checks its inputs itself
        pipeline.join_processes(call.config)
        pipeline.preflight(run, (name,))
    if name != "merge" and launch.needed(call.config, name):  # each process runs this same command
        if code := launch.start(sys.argv[1:], launch.num_processes(call.config, name), run.log):
            raise typer.Exit(code)
    else:
        with run.lock():
            show.stage(run.do(stages.BY_NAME[name]), call.json)
    if not launch.is_started_by_sppctl():
        console.note(f"next: {run.command(NEXT[name], *(stages.MERGE.options(run) if name == 'train' else []))}")


@configured("models", "tasks", "limit", "output", "force", "json", "quiet", "verbose", "debug")
def _eval(call: Call) -> None:
    """Measure perplexity and benchmark accuracy of any checkpoint, into RUN/eval.

    Results with the same settings and the same weights are not measured again.

    Examples:
      sppctl eval runs/X                          # the newest checkpoint of the run
      sppctl eval runs/X --model base --model merged --tasks ppl
      sppctl eval --model CHECKPOINT --tasks zeroshot,mmlu --limit 20

    More: docs/evaluation.md
    """
    from sppctl.run import pipeline

    run, models = Run(call.config, force=call.force), [expand(model) for model in call.models]
    pipeline.check_names(run, ["eval"])
    pipeline.join_processes(call.config)
    contents = pipeline.evaluate_some(run, models, _starter(call))
    show.results(contents, call.config.run.seed, call.json)


def _starter(call: Call) -> Callable[..., None] | None:
    """A function that does a stage in the configured number of processes; None if this process does it."""
    if not launch.needed(call.config):
        return None

    def do(stage: str, *options: str) -> None:
        arguments = [stage, *call.arguments, *options, *["--force"] * call.force, *["--debug"] * call.debug]
        code = launch.start(arguments, launch.num_processes(call.config, stage), Run(call.config).log, silent=True)
        if code:
            raise typer.Exit(code)

    return do


@command
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
    """Collect runs into tables and figures: report.html, report.md, report.csv and report.json.

    Examples:
      sppctl report runs/quickstart
      sppctl report runs/a runs/b --output runs/both --latex table.tex

    More: docs/evaluation.md
    """
    paths = [_existing(path) for path in run_dirs], output and _expanded(output), latex and _expanded(latex)
    from sppctl.run import pipeline

    show.report(pipeline.report(*paths), json)


def _expanded(path: Path) -> Path:
    """The path with ``~`` expanded, which shells do not do in --output=~/folder."""
    return Path(expand(str(path)))


def _existing(path: str | Path) -> Path:
    """The directory of a run, or of a part of one; UserError if there is none of that name."""
    run_dir = Path(expand(str(path)))
    if not os.path.lexists(run_dir):
        similar = similar_directory(str(run_dir))
        fix = "give the run.dir of a run" if similar is None else f"did you mean {similar}?"
        raise UserError(f"{run_dir} does not exist; {fix}")
    return run_dir


@command
def sweep(
    arguments: Annotated[
        list[str], typer.Argument(metavar="SWEEP [KEY=VALUE]...", help="YAML file with a grid, and overrides.")
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all runs and print the plan; compute nothing.")
    ] = False,
    slurm: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write one job script per stage, and submit.sh, into DIR.")
    ] = None,
    only: Annotated[
        str | None, typer.Option(metavar="NAME", help="Run one member of the plan, or the report (used by jobs).")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
    imports: Imports = None,
) -> None:
    """Run a grid of configurations; shared stages are computed once.

    Examples:
      sppctl sweep sweep-example --dry-run        # checks all runs and prints the plan
      sppctl sweep my-sweep.yaml train.epochs=1   # a key overridden in all runs
      sppctl sweep my-sweep.yaml --slurm jobs     # writes job scripts and jobs/submit.sh

    More: docs/evaluation.md, docs/cluster.md
    """
    for module in imports or []:
        plugins.import_module(module)
    name, overrides = options.split(arguments)
    if name is None:
        raise UserError("no sweep given; name its YAML file, or sweep-example")
    from sppctl.sweep import grid, work
    from sppctl.sweep import slurm as jobs

    loaded = grid.load_sweep(name, overrides)
    if dry_run or slurm is not None:
        work.check(loaded, existing=not dry_run)
        entries = work.plan(loaded)
        if slurm is not None and not dry_run:
            console.note(f"sweep: {jobs.write(loaded, _expanded(slurm), overrides)} submits the jobs")
        show.sweep(entries, work.totals(entries), json)
        work.check_existing(loaded)  # after the plan, so that a dry run prints it in any case
        return
    study, failed = work.execute(loaded, only, debug)
    if study is not None:
        show.report(study, json)
    if failed:
        raise StageError("\n".join(f"{name} failed: {reason}" for name, reason in failed.items()))


# --- checkpoints, runs and configurations -----------------------------------------------------------------------------


@command
def inspect(
    checkpoint: Checkpoint,
    expect: Annotated[str | None, typer.Option(help="Pattern; exit 1 unless every pruned matrix matches it.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Certify the sparsity of any safetensors checkpoint, matrix by matrix.

    Examples:
      sppctl inspect runs/quickstart/merged --expect 2:4
      sppctl inspect CHECKPOINT --json

    More: docs/evaluation.md
    """
    from sppctl.pattern import Pattern

    try:
        expected = Pattern.parse(expect) if expect is not None else None
    except ValueError as error:
        raise UserError("--expect", str(error)) from error
    with with_argument_names(ARGUMENT_NAMES):
        checkpoint = _newest(checkpoint)
        directory = find.locate_weights(checkpoint)
    from sppctl.files import integrity
    from sppctl.files.safe_files import TensorFiles
    from sppctl.inspect import inspect as stage
    from sppctl.inspect.storage import storage

    integrity.check_record(directory)
    matrices, summary = stage.measure(directory, expected)
    sparse = [matrix for matrix in matrices if matrix.is_sparse]
    summary |= {"packed_bytes": storage(TensorFiles(directory), sparse).bitmask_bytes}
    wrong = stage.violations(matrices, expected) if expected is not None else []
    show.matrices(checkpoint, matrices, summary, expected, wrong, json)
    if wrong:
        more = f"\n... and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        count = f"{len(wrong)} violation{'s' * (len(wrong) > 1)}"
        raise StageError(f"{checkpoint} is not {expected}: {count}\n" + "\n".join(wrong[:3]) + more)


def _newest(checkpoint: str) -> str:
    """The checkpoint of that name; of a run, the newest one."""
    path = expand(checkpoint)
    newest = find.newest_checkpoint(Path(path))
    if newest is not None:
        refuse_outdated(Path(path))
    return str(newest or path)


@command
def verify(run_dir: RunDir, json: Json = False, debug: Debug = False) -> None:
    """Compare every file of a run with the hashes in its records.

    Exits with code 2 if a file is damaged, missing or not recorded.

    Examples:
      sppctl verify runs/quickstart

    More: docs/evaluation.md
    """
    place = _existing(run_dir)
    from sppctl.run import verify as stage

    files = stage.execute(place)
    show.files(str(run_dir), files, json)
    problems = [file.problem for file in files if file.problem is not None]
    if problems:
        raise UserError("\n".join(problems))


@command
def bench(
    checkpoint: Checkpoint,
    batch: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1,8,32",
    prompt: Annotated[
        int | None, typer.Option(help="Tokens of each prompt; default: 512, or as many as the model allows.")
    ] = None,
    new: Annotated[int, typer.Option(help="Tokens decoded after the prompt.")] = 32,
    repeats: Annotated[int, typer.Option(help="Measured rounds; the median is reported.")] = 5,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure prefill and decode speed of a checkpoint, dense and with 2:4 kernels, and its storage.

    Examples:
      sppctl bench runs/quickstart/merged
      sppctl bench CHECKPOINT --batch 1,8,32 --prompt 512 --new 32 --device cuda

    More: docs/evaluation.md
    """
    try:
        batches = tuple(int(part) for part in batch.split(","))
    except ValueError as error:
        raise UserError("--batch", f"{batch} is not a list of numbers", "write --batch 1,8,32") from error
    with with_argument_names(ARGUMENT_NAMES):
        trust = trusts_code(Path(expand(checkpoint)))
        checkpoint = _newest(checkpoint)
        find.directory_of(checkpoint, key="CHECKPOINT")  # before torch is imported
        from sppctl.inspect import speed, speed_text

        speeds = speed.execute(
            checkpoint,
            speed.Settings(batches, 512 if prompt is None else prompt, new, repeats, device, prompt is None, trust),
        )
    if json:
        console.show_json(asdict(speeds))
    else:
        show.tables(speed_text.tables(speeds), speeds.notes)


@command
def push(
    directory: Annotated[str, typer.Argument(metavar="RUN", help="Run (its merged checkpoint), or RUN/pruned, ...")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Made if it does not exist.")],
    public: Annotated[bool, typer.Option("--public", help="Visible to everybody; default: private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; default: main.")] = None,
    base_model: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Where the pruned weights of an adapter are on the hub.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the files with their sizes; upload nothing.")
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Upload a checkpoint or an adapter with its model card to the hub, privately by default.

    The files are checked against the hashes in the record first. The token is that of HF_TOKEN or hf auth login.

    Examples:
      sppctl push runs/quickstart OWNER/NAME --dry-run
      sppctl push runs/quickstart/merged OWNER/NAME --public
      sppctl push runs/quickstart/adapter OWNER/NAME --base-model OWNER/PRUNED

    More: docs/serving.md
    """
    path, options = _existing(directory), {"public": public, "revision": revision, "dry_run": dry_run}
    from sppctl.publish import push as pushing

    show.upload(pushing.execute(path, repository, pruned=base_model, **options), json)  # type: ignore[arg-type]


@command
def generate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run directory, or any checkpoint or adapter.")],
    prompt: Annotated[list[str] | None, typer.Option(help="Repeatable; default: three short ones.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens written after each prompt.")] = 64,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of drawn tokens.")] = 0,
    chat: Annotated[bool, typer.Option(help="Use the tokenizer's chat template where there is one.")] = True,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what the base, pruned and merged checkpoint of a run write after the same prompts.

    Examples:
      sppctl generate runs/quickstart --prompt "Why is the sky blue?"
      sppctl generate runs/quickstart/merged --prompt "Once upon a time" --max-new-tokens 100 --no-chat

    More: docs/serving.md
    """
    name = expand(run)
    find.directory_of(name, key="RUN")  # before torch is imported
    from sppctl.publish import generate as generating

    model = ModelConfig(device=device, trust_remote_code=trusts_code(Path(name)))
    settings = generating.Settings(max_new_tokens, temperature, seed, chat, model)
    with with_argument_names(ARGUMENT_NAMES):
        subjects = generating.subjects_of(name, model)
        samples = generating.generate(subjects, prompt or generating.PROMPTS, settings)
    show.samples(samples, json)


@configured("model", "method", "pattern", "output", "json", "debug")
def plan(call: Call) -> None:
    """Estimate parameters, memory, disk and steps without loading weights.

    Examples:
      sppctl plan llama7b launch.num_processes=8
      sppctl plan --model HUB_ID_OR_DIRECTORY --pattern 2:4 train.gradient_checkpointing=true

    More: docs/training.md
    """
    model = call.config.model
    assert model.path is not None
    find.config_source(model.path, model.gguf_file, model.revision)  # before torch is imported
    from sppctl.plan import run as planning
    from sppctl.plan import text

    planned = planning.execute(call.config)
    if call.json:
        console.show_json(to_json(planned))
    else:
        show.tables(text.tables(planned), text.sentences(planned, call.config))


@command
def config(
    arguments: options.Arguments = None,
    show_schema: Annotated[
        bool, typer.Option("--schema", help="Print every key with default, meaning and type; of a SECTION, if named.")
    ] = False,
    json: Json = False,
    debug: Debug = False,
    imports: Imports = None,
) -> None:
    """Print the configuration that a run would use, or the schema of all keys.

    Examples:
      sppctl config llama7b train.rank=8
      sppctl config --schema train.data  # every key of a section, and its meaning
      sppctl config --schema > my.yaml   # a configuration to edit

    More: README.md
    """
    tree: Any
    if show_schema:
        section, overrides = options.split(arguments)
        if overrides:
            raise UserError("--schema", f"{overrides[0]} is not a section", "leave out KEY=VALUE")
        tree, text = schema(section or ""), schema_yaml(section or "")
    else:
        call = options.parse(arguments, imports=imports)
        options.begin(call)
        if call.config.launch.num_processes != "auto":  # of a job that is planned here and runs elsewhere
            launch.accumulation(call.config.train, launch.configured_processes(call.config))
        tree, text = to_dict(call.config), to_yaml(call.config)
    if json:
        console.show_json(tree)
    else:
        print(text, end="")


@command
def _help(name: Annotated[str | None, typer.Argument(metavar="[COMMAND]")] = None) -> None:
    """Show the help of a command, or the list of commands.

    Examples:
      sppctl help train

    More: README.md
    """
    app([*([name] if name is not None else []), "--help"], prog_name="sppctl")


@command
def clean(
    run_dir: RunDir,
    kinds: Annotated[
        str | None,
        typer.Option(help="Comma-separated: leftovers, base (these by default), unfinished, weights."),
    ] = None,
    caches: Annotated[bool, typer.Option("--caches", help="Also the caches, which all runs share.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Delete; otherwise nothing is changed.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what can be freed in a run directory, with sizes and consequences; --yes deletes it.

    Examples:
      sppctl clean runs/quickstart                # lists everything, deletes nothing
      sppctl clean runs/quickstart --yes          # what the next command makes again by itself
      sppctl clean runs/quickstart --kinds weights,unfinished --yes

    More: docs/cluster.md
    """
    place = _existing(run_dir)
    from sppctl.run import clean as cleaning

    chosen = cleaning.kinds_of(kinds, caches)
    show.pieces(str(run_dir), cleaning.free(place, chosen) if yes else cleaning.find(place), chosen, yes, json)


@command
def doctor(json: Json = False, debug: Debug = False) -> None:
    """Report what this installation and machine can do, and how to fix what is missing.

    Versions, dtypes that the device computes in natively, kernels and their self-tests, memory, disks, caches, hub.
    Exits with code 1 if something will fail.

    Examples:
      sppctl doctor
      sppctl doctor --json

    More: README.md, docs/hardware.md
    """
    from sppctl import doctor as checks

    found = checks.examine()
    show.findings(found, json)
    problems = [finding for finding in found if finding.state is checks.State.PROBLEM]
    if problems:
        raise StageError("\n".join(f"{each.subject}: {each.text}; {each.advice}" for each in problems))


# --- the program ------------------------------------------------------------------------------------------------------


def main() -> None:
    """Entry point: errors become one line and an exit code, a traceback only with --debug."""
    try:
        _run()
    except SystemExit as stop:
        if distributed.is_connected():
            distributed.exit_now(stop.code if isinstance(stop.code, int) else int(stop.code is not None))
        raise
    finally:
        console.remember(None)


def _verbosity() -> Verbosity:
    chosen = [verbosity for verbosity in Verbosity if f"--{verbosity.value}" in sys.argv]
    if len(chosen) > 1:
        raise UserError("--quiet", "contradicts --verbose", "use one of them")
    return chosen[0] if chosen else Verbosity.NORMAL


def _silence_libraries(debug: bool) -> None:
    """Leaves the errors of libraries; called before they are imported."""
    if not debug:
        warnings.simplefilter("ignore")  # deprecations, which users of sppctl cannot fix
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").addFilter(_is_error)  # it sets the level itself


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _run() -> None:
    launch.adopt()
    debug = "--debug" in sys.argv
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    process = "" if distributed.is_main() else f"process {distributed.rank()}: "
    try:
        console.log_to(None)
        console.verbosity = _verbosity()
        if console.verbosity is not Verbosity.VERBOSE:
            _silence_libraries(debug)
        app()
    except (UserError, StageError) as error:
        if not debug and (distributed.is_main() or (distributed.is_connected() and not error.shared)):
            for line in str(error).splitlines():
                console.print_error(f"error: {process}{line}")
        if error.shared:
            distributed.await_others()
        if debug:
            raise
        sys.exit(error.exit_code)
    except SystemExit as stop:
        # Typer turns Ctrl-C into an Exit; that of started processes, which have reported it, has no such cause
        if isinstance(getattr(stop.__context__, "__cause__", None), KeyboardInterrupt):
            console.note_interrupt()
        raise
    except Exception as error:
        if debug:
            raise
        text = f"{process}{type(error).__name__}: {first_line(error) if str(error).strip() else ''}"
        console.print_error(f"error: {text} (--debug shows where)")
        sys.exit(1)
