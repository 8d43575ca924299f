"""The options of the commands that take a configuration, and the configuration from options and arguments."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any

import typer

from sppctl import console, launch, plugins
from sppctl.config import recorded
from sppctl.config.load import (
    QUICKSTART,
    config_keys,
    load_config,
    quoted,
    shipped_configs,
    short_name,
    uses_quickstart,
)
from sppctl.config.settings import Config, names_of
from sppctl.errors import UserError
from sppctl.files.names import DIRECTORIES
from sppctl.files.paths import expand
from sppctl.model import find


def completions(incomplete: str) -> list[str]:
    """For shells: shipped configurations, and keys."""
    words = [*shipped_configs(), *(f"{key}=" for key in config_keys())]
    return [word for word in words if word.startswith(incomplete)]


Arguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG] [KEY=VALUE]...",
        help="YAML file, run directory or shipped configuration (sppctl --help lists them), and overrides.",
        autocompletion=completions,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Imports = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        metavar="MODULE",
        help="Import a Python module first, which registers pruners or allocations (repeatable).",
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print warnings and errors only; RUN/sppctl.log has the rest.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Also print the messages of libraries.")]


def _option(kind: Any, text: str, *names: str) -> Any:
    return Annotated[kind, typer.Option(*names, help=text)]


OPTIONS = {
    "model": _option(str | None, "Dense model: hub id, directory or package:NAME (model.path)."),
    "models": _option(
        list[str] | None,
        "What to measure (repeatable): base, pruned, adapter (not merged) or merged of the run, or any checkpoint "
        "or adapter (directory or hub id); default: the newest checkpoint of the run.",
        "--model",
    ),
    "method": _option(str | None, "Pruning method (prune.method)."),
    "train_method": _option(str | None, "Training method (train.method).", "--method"),
    "pattern": _option(str | None, "2:4, 4:8 or a ratio of zeros (prune.pattern)."),
    "output": _option(str | None, "Run directory (run.dir)."),
    "tasks": _option(str | None, "Comma-separated: ppl, zeroshot, mmlu, wikitext, all, lm-eval tasks."),
    "limit": _option(int | None, "Use only the first N examples of each task (eval.limit)."),
    "resume": _option(bool, "Resume an interrupted training, or discard it."),
    "force": _option(bool, "Redo the stage of this command even if it is complete (run: all stages).", "--force"),
    "json": Json,
    "quiet": Quiet,
    "verbose": Verbose,
    "debug": Debug,
    "imports": Imports,
    "adapter": _option(str | None, "PEFT adapter, trained anywhere; default: RUN/adapter (merge.adapter)."),
}
KEYS = {"model": "model.path", "method": "prune.method", "pattern": "prune.pattern", "output": "run.dir"}
# the configuration key that an option sets
KEYS |= {"limit": "eval.limit", "train_method": "train.method", "adapter": "merge.adapter"}
LABELS = {"base", *DIRECTORIES.values()}  # checkpoints of a run in --model
QUICKSTART_NOTICE = (
    "neither CONFIG nor a model is given, so this is the quickstart: a model of 135M parameters, little data, run "
    "directory {}; for your own model: sppctl run --model HUB_ID_OR_DIRECTORY; for a run of yours: sppctl COMMAND "
    "RUN_DIRECTORY"
)


@dataclass(frozen=True)
class Call:
    """A call of a command that takes a configuration."""

    arguments: list[str]  # CONFIG, if there is one, and KEY=VALUE, including those set by options
    config: Config
    notice: str | None = None  # what is used in place of a CONFIG that was not given
    models: list[str] = field(default_factory=list)
    resume: bool = True
    force: bool = False
    json: bool = False
    quiet: bool = False
    verbose: bool = False
    debug: bool = False


def parse(arguments: Sequence[str] | None = None, tasks: str | None = None, **options: Any) -> Call:
    """The call with these arguments and options (:data:`OPTIONS` by name; None: not used).

    Raises:
        UserError: as of :func:`split` and :func:`sppctl.config.load.load_config`.
    """
    for module in options.pop("imports", None) or []:
        plugins.import_module(module)
    name, overrides = split(arguments)
    measures = "models" in options  # `sppctl eval`, with and without --model
    options = {option: value for option, value in options.items() if value is not None}
    for option in [option for option in KEYS if option in options]:
        value = options.pop(option)
        # a pattern is the same as text and as a number, and all others stay text
        overrides.append(f"{KEYS[option]}={value if option == 'pattern' else quoted(value)}")
    if tasks is not None:
        chosen = [task.strip() for task in tasks.split(",") if task.strip()]
        overrides.append(f"eval.tasks={quoted([task for task in chosen if task != 'ppl'])}")
        if "ppl" not in chosen:
            overrides.append("eval.perplexity=[]")
        if measures and not any(override.startswith("eval.prompts=") for override in overrides):
            overrides.append("eval.prompts=[]")  # the tasks alone are measured
    if "models" in options and uses_quickstart(name, overrides):
        name, overrides = _of_checkpoint(options["models"], overrides)
    config, notice = load_config(name, overrides), None
    if uses_quickstart(name, overrides):
        name, notice = QUICKSTART, QUICKSTART_NOTICE.format(config.run.dir)
    elif name is None:
        limits = [] if "models" in options else _limits(config, overrides)
        config = load_config(name, [*limits, *overrides])
        notice = _eval_defaults(config) if "models" in options else _defaults(config, overrides, limits)
    return Call(overrides if name is None else [name, *overrides], config, notice, **options)


def _of_checkpoint(models: Sequence[str], overrides: list[str]) -> tuple[str | None, list[str]]:
    """CONFIG and overrides for an evaluation of checkpoints alone.

    They are those of the run that the first checkpoint is in, else the defaults, with results in runs/CHECKPOINT.
    """
    if not models or not LABELS.isdisjoint(models):
        return None, overrides
    path = Path(expand(models[0]))
    if recorded.is_run(path.parent):
        # a checkpoint's folder may come from anybody, who does not decide whether its code is run
        return str(path.parent), ["model.trust_remote_code=false", *overrides]
    return None, [f"run.dir={quoted(f'runs/{short_name(models[0])}')}", f"model.path={quoted(models[0])}", *overrides]


def _eval_defaults(config: Config) -> str:
    """The defaults as they are used to measure a checkpoint."""
    measures = [f"perplexity on {name}" for name in config.eval.perplexity] + config.eval.tasks
    return (
        f"no CONFIG is given, so the defaults of eval are used: {', '.join(measures)}; results are in "
        f"{config.run.dir}/eval (--output)"
    )


def _limits(config: Config, overrides: Sequence[str]) -> list[str]:
    """Overrides of the default lengths that the model does not take."""
    lengths = {"prune.calibration.seq_len": config.prune.calibration.seq_len}
    lengths["train.data.seq_len"] = config.train.data.seq_len
    configured = [override.partition("=")[0].strip() for override in overrides]
    model = config.model
    limit = find.max_window(model.path or "", model.gguf_file, model.revision)
    return [
        f"{key}={limit}"
        for key, length in lengths.items()
        if limit is not None and length > limit and not any(f"{key}.".startswith(f"{name}.") for name in configured)
    ]


def _defaults(config: Config, overrides: Sequence[str], limits: Sequence[str]) -> str:
    """The defaults as they are used for the model that the overrides name; ``limits``: of :func:`_limits`."""
    prune, train = config.prune, config.train
    calibration, data = prune.calibration, " and ".join(names_of(train.data.dataset))
    if data == "instructions" and not any(override.startswith("train.data.dataset") for override in overrides):
        data = "the built-in instructions, as HF_HUB_OFFLINE is set and alpaca is not in the cache"
    length = f"epochs {train.epochs:g}" if train.max_steps is None else f"{train.max_steps} steps"
    return (
        f"no CONFIG is given, so the defaults are used: {prune.method} {prune.pattern} with {calibration.dataset} "
        f"({calibration.samples} x {calibration.seq_len} tokens), {train.method} on {data} ({length}, "
        f"lr {train.lr:g}, batch size {train.batch_size}), run directory {config.run.dir}; "
        + (f"{' and '.join(limits)}, as many tokens as the model takes; " if limits else "")
        + "KEY=VALUE changes them, "
        f"{shlex.join(['sppctl', 'config', *overrides])} prints all"
    )


def begin(call: Call) -> None:
    """Prints the notice of a call, and keeps its configuration for the commands that messages suggest."""
    console.remember(call.config.run.dir, [*call.arguments, *plugins.flags()])
    if call.notice is not None and not launch.is_started_by_sppctl():
        console.note(call.notice)


def split(arguments: Sequence[str] | None) -> tuple[str | None, list[str]]:
    """The CONFIG, if there is one, and the KEY=VALUE arguments; UserError if there are two, or an empty argument."""
    names = [expand(argument) for argument in arguments or [] if "=" not in argument]
    if "" in names:
        raise UserError("an empty argument is neither CONFIG nor KEY=VALUE; leave it out")
    if len(names) > 1:
        raise UserError(f"expected one CONFIG, found {', '.join(names)}; overrides are written KEY=VALUE")
    return names[0] if names else None, [argument for argument in arguments or [] if "=" in argument]


def with_options(function: Callable[[Call], None], names: Sequence[str]) -> Callable[..., None]:
    """The function with the signature that Typer needs: a parameter for the arguments and one for each option."""

    def command(**values: Any) -> None:
        call = parse(**values)
        begin(call)
        function(call)

    defaults = {option: getattr(Call, option) for option in ("resume", "force", "json", "quiet", "verbose", "debug")}
    kinds = {"arguments": Arguments} | {name: OPTIONS[name] for name in (*names, "imports")}
    parameters = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=defaults.get(name), annotation=kind)
        for name, kind in kinds.items()
    ]
    command.__name__, command.__doc__ = function.__name__, function.__doc__
    command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return command
