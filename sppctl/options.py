"""The options of the commands that take a configuration, and the configuration from options and arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from inspect import Parameter, Signature
from typing import Annotated, Any

import typer

from sppctl import plugins
from sppctl.config.load import load_config, quoted
from sppctl.config.settings import Config
from sppctl.errors import UserError
from sppctl.files.paths import expand

Arguments = Annotated[
    list[str] | None,
    typer.Argument(metavar="[CONFIG] [KEY=VALUE]...", help="YAML file or shipped configuration, and overrides."),
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
    "pattern": _option(str | None, "2:4, 4:8 or a ratio of zeros (prune.pattern)."),
    "output": _option(str | None, "Run directory (run.dir)."),
    "tasks": _option(str | None, "Comma-separated: ppl, zeroshot, mmlu, wikitext, all, lm-eval tasks."),
    "limit": _option(int | None, "Use only the first N examples of each task (eval.limit)."),
    "resume": _option(bool, "Resume an interrupted training, or discard it."),
    "force": _option(bool, "Redo completed stages.", "--force"),
    "json": Json,
    "debug": Debug,
    "imports": Imports,
    "adapter": _option(str | None, "PEFT adapter, trained anywhere; default: RUN/adapter (merge.adapter)."),
}
KEYS = {"model": "model.path", "method": "prune.method", "pattern": "prune.pattern", "output": "run.dir"}
KEYS |= {"limit": "eval.limit", "adapter": "merge.adapter"}  # the configuration key that an option sets


@dataclass(frozen=True)
class Call:
    """A call of a command that takes a configuration."""

    arguments: list[str]  # CONFIG, if there is one, and KEY=VALUE, including those set by options
    config: Config
    models: list[str] = field(default_factory=list)
    resume: bool = True
    force: bool = False
    json: bool = False
    debug: bool = False


def parse(arguments: Sequence[str] | None = None, tasks: str | None = None, **options: Any) -> Call:
    """The call with these arguments and options (:data:`OPTIONS` by name; None: not used).

    Raises:
        UserError: as of :func:`split` and :func:`sppctl.config.load.load_config`.
    """
    for module in options.pop("imports", None) or []:
        plugins.import_module(module)
    name, overrides = split(arguments)
    options = {option: value for option, value in options.items() if value is not None}
    overrides += [f"{key}={quoted(options.pop(option))}" for option, key in KEYS.items() if option in options]
    if tasks is not None:
        chosen = [task.strip() for task in tasks.split(",") if task.strip()]
        overrides.append(f"eval.tasks={quoted([task for task in chosen if task != 'ppl'])}")
        if "ppl" not in chosen:
            overrides.append("eval.perplexity=[]")
    return Call(overrides if name is None else [name, *overrides], load_config(name, overrides), **options)


def split(arguments: Sequence[str] | None) -> tuple[str | None, list[str]]:
    """The name of a file, if there is one, and the KEY=VALUE arguments; UserError if there are two names."""
    names = [expand(argument) for argument in arguments or [] if "=" not in argument]
    if len(names) > 1:
        raise UserError(f"expected one CONFIG, found {', '.join(names)}; overrides are written KEY=VALUE")
    return names[0] if names else None, [argument for argument in arguments or [] if "=" in argument]


def with_options(function: Callable[[Call], None], names: Sequence[str]) -> Callable[..., None]:
    """The function with the signature that Typer needs: a parameter for the arguments and one for each option."""

    def command(**values: Any) -> None:
        function(parse(**values))

    defaults = {option: getattr(Call, option) for option in ("resume", "force", "json", "debug")}
    kinds = {"arguments": Arguments} | {name: OPTIONS[name] for name in (*names, "imports")}
    parameters = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=defaults.get(name), annotation=kind)
        for name, kind in kinds.items()
    ]
    command.__name__, command.__doc__ = function.__name__, function.__doc__
    command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return command
