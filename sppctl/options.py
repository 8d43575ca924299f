"""Arguments and options of the commands, and the configuration that they mean together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from sppctl.config.load import load_config, quoted
from sppctl.config.settings import Config
from sppctl.errors import UserError
from sppctl.files.paths import expand

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
Resume = Annotated[bool, typer.Option(help="Continue an interrupted training.")]
Subjects = Annotated[
    list[str] | None,
    typer.Option(
        help="What to measure, may be repeated: base, pruned, adapter (not merged) or merged of the run, or any "
        "checkpoint or adapter directory or hub id; default: the newest checkpoint of the run."
    ),
]
ReportFolder = Annotated[
    Path | None,
    typer.Option(help="Folder of the report; default: the run itself, for several runs the folder they share."),
]
Latex = Annotated[Path | None, typer.Option(help="File for the table in LaTeX (booktabs).")]
SweepArguments = Annotated[
    list[str], typer.Argument(metavar="SWEEP [KEY=VALUE]...", help="YAML file with a grid, and overrides.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check all runs, print the plan and do nothing.")]
Slurm = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Write one job script per stage, and submit.sh, into DIR.")
]
Only = Annotated[
    str | None, typer.Option(metavar="NAME", help="Do one member of the plan, or report: what a job does.")
]
Expect = Annotated[str | None, typer.Option(help="Pattern that every pruned matrix must keep to, or exit 1.")]


def resolve(arguments: Sequence[str] | None, **sugar: Any) -> Config:
    """The configuration that positional arguments and options mean together."""
    names, overrides = given(arguments, **sugar)
    return load_config(names[0] if names else None, overrides)


def given(arguments: Sequence[str] | None, **sugar: Any) -> tuple[list[str], list[str]]:
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
