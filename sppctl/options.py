"""Arguments and options of the commands, the configuration that they mean together, and help with examples."""

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
    typer.Argument(metavar="[CONFIG] [KEY=VALUE]...", help="YAML file or shipped configuration, and overrides."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Force = Annotated[bool, typer.Option("--force", help="Redo completed stages.")]
Model = Annotated[str | None, typer.Option(help="Dense model: hub id, directory or package:NAME (model.path).")]
Method = Annotated[str | None, typer.Option(help="Pruning method (prune.method).")]
PatternOption = Annotated[str | None, typer.Option("--pattern", help="2:4, 4:8 or a ratio of zeros (prune.pattern).")]
Output = Annotated[str | None, typer.Option(help="Run directory (run.dir).")]
Tasks = Annotated[str | None, typer.Option(help="Comma-separated: ppl, zeroshot, mmlu, wikitext, all, lm-eval tasks.")]
Limit = Annotated[int | None, typer.Option(help="Use only the first N examples of each task (eval.limit).")]
Resume = Annotated[bool, typer.Option(help="Resume an interrupted training, or discard it.")]
Subjects = Annotated[
    list[str] | None,
    typer.Option(
        help="What to measure (repeatable): base, pruned, adapter (not merged) or merged of the run, or any checkpoint "
        "or adapter (directory or hub id); default: the newest checkpoint of the run."
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
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check all runs and print the plan; compute nothing.")]
Slurm = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Write one job script per stage, and submit.sh, into DIR.")
]
Only = Annotated[
    str | None, typer.Option(metavar="NAME", help="Run one member of the plan, or the report (used by jobs).")
]
Expect = Annotated[str | None, typer.Option(help="Pattern; exit 1 unless every pruned matrix matches it.")]


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


# --- help -------------------------------------------------------------------------------------------------------------

# examples, and the document that explains the command
_HELP: dict[str, tuple[list[str], str]] = {
    "run": (
        [
            "sppctl run                                  # the quickstart: a 135M model, a few minutes on a laptop",
            "sppctl run llama7b run.dir=runs/llama7b     # a shipped configuration, with a key overridden",
            "sppctl run my.yaml --model DIRECTORY --pattern 4:8",
        ],
        "README.md",
    ),
    "prune": (
        [
            "sppctl prune llama7b",
            "sppctl prune my.yaml --method sparsegpt --pattern 0.5 --output runs/half",
            "sppctl prune my.yaml prune.calibration.samples=64 prune.order=module",
        ],
        "docs/pruning.md",
    ),
    "train": (
        [
            "sppctl train llama7b train.epochs=1 train.lr=2e-3",
            "sppctl train llama7b launch.num_processes=8 launch.strategy=fsdp",
            "sppctl train my.yaml --no-resume            # discards an interrupted training",
        ],
        "docs/training.md, docs/cluster.md",
    ),
    "merge": (
        [
            "sppctl merge llama7b",
            "sppctl merge my.yaml merge.mask=reapply     # for method lora, whose merge fills the zeros",
        ],
        "docs/training.md",
    ),
    "eval": (
        [
            "sppctl eval                                 # the newest checkpoint of the run",
            "sppctl eval --model base --model merged --tasks ppl",
            "sppctl eval --model CHECKPOINT --tasks zeroshot,mmlu --limit 20",
        ],
        "docs/evaluation.md",
    ),
    "report": (
        [
            "sppctl report runs/quickstart",
            "sppctl report runs/a runs/b --output runs/both --latex table.tex",
        ],
        "docs/evaluation.md",
    ),
    "sweep": (
        [
            "sppctl sweep sweep-example --dry-run        # checks all runs and prints the plan",
            "sppctl sweep my-sweep.yaml train.epochs=1   # a key overridden in all runs",
            "sppctl sweep my-sweep.yaml --slurm jobs     # writes job scripts and jobs/submit.sh",
        ],
        "docs/evaluation.md, docs/cluster.md",
    ),
    "inspect": (
        [
            "sppctl inspect runs/quickstart/merged --expect 2:4",
            "sppctl inspect CHECKPOINT --json",
        ],
        "docs/evaluation.md",
    ),
    "verify": (
        [
            "sppctl verify runs/quickstart",
        ],
        "docs/evaluation.md",
    ),
    "bench": (
        [
            "sppctl bench runs/quickstart/merged",
            "sppctl bench CHECKPOINT --batch 1,8,32 --prompt 512 --new 32 --device cuda",
        ],
        "docs/evaluation.md",
    ),
    "plan": (
        [
            "sppctl plan llama7b launch.num_processes=8",
            "sppctl plan my.yaml train.gradient_checkpointing=true --json",
        ],
        "docs/training.md",
    ),
    "config": (
        [
            "sppctl config llama7b train.rank=8",
            "sppctl config --schema > my.yaml            # every key with its default and meaning",
        ],
        "README.md",
    ),
}


def help_of(command: str, summary: str) -> str:
    """The help of a command: its summary, examples, and where to read more."""
    examples, more = _HELP[command]
    lines = "\n".join(f"  {example}" for example in examples)
    return f"{summary}\n\n\b\nExamples:\n{lines}\n\nMore: {more}"  # \b keeps the line breaks
