"""What was done to make the numbers: commands, versions, seeds, machines, fingerprints."""

from __future__ import annotations

from typing import Any

from sppctl.evaluate.results import Result, TaskResult, TaskScores, TextNumbers, TextResult
from sppctl.evaluate.values import SHOWN, families, task_quantity, text_quantity
from sppctl.records import Calibration, MergeRecord, PruneRecord, TrainRecord
from sppctl.report.records import Record
from sppctl.report.study import RunStudy
from sppctl.report.tables import NOTHING, Table, number_columns, text_columns


def tables(run: RunStudy) -> list[Table]:
    """Everything below "How it was made"."""
    return [stage_table(run.stages), evaluation_table(run), version_table(run), fingerprint_table(run)]


def facts(run: RunStudy) -> list[str]:
    """What was done, one line per stage."""
    lines = []
    stages = run.stages
    if "prune" in stages:
        pruned: PruneRecord = stages["prune"].metrics
        error = pruned.mean_relative_output_error
        output = f", mean relative output error {error:.3f}" if error is not None else ""
        lines.append(
            f"prune: {pruned.method} {pruned.pattern}, {pruned.matrices} matrices{output}, "
            f"{stages['prune'].wall_time_s:.0f} s"
        )
    if "train" in stages:
        trained: TrainRecord = stages["train"].metrics
        loss = trained.validation_loss
        validation = f", validation loss {loss:.3f}" if loss is not None else ""
        lines.append(
            f"train: {trained.method}, {trained.trainable_parameters:,} parameters "
            f"({trained.trainable_share:.2%}), {trained.steps} steps, {trained.tokens:,} tokens{validation}, "
            f"{stages['train'].wall_time_s:.0f} s"
        )
    if "merge" in stages:
        merged: MergeRecord = stages["merge"].metrics
        lines.append(
            f"merge: {merged.matrices} matrices, {_zeros(merged)}, "
            f"{merged.moved_share:.1%} of the kept weights moved, {stages['merge'].wall_time_s:.0f} s"
        )
    return lines


def _zeros(merge: MergeRecord) -> str:
    """What became of the zeros in merging."""
    if merge.pattern_unchanged:
        return f"all {merge.zeros:,} zeros kept"
    changes = f"{merge.filled_zeros:,} zeros filled, {merge.lost_weights:,} other weights zero"
    return f"{changes}, sparsity now {merge.sparsity:.2%} (mask {merge.mask})"


def commands(run: RunStudy) -> list[str]:
    """The exact commands that made the stages and the evaluations, each once, in this order."""
    evaluations = [result.command for content in run.checkpoints.values() for result in content.results]
    made = [*(record.command for record in run.stages.values()), *evaluations]
    return list(dict.fromkeys(command for command in made if command is not None))


def stage_table(stages: dict[str, Record]) -> Table:
    """When, on what and with which seed every stage ran, how long, and with how much memory."""
    columns = text_columns("stage", "finished") + number_columns("seconds", "peak memory, MB", "seed")
    lines = []
    for stage, record in stages.items():
        memory = ", ".join(f"{size:.0f} {name}" for name, size in record.peak_memory_mb.items()) or NOTHING
        seconds, seed = f"{record.wall_time_s:.0f}", str(record.seed)
        lines.append([stage, record.created, seconds, memory, seed, record.hardware])
    return Table(columns + text_columns("hardware"), lines, "Stages")


def version_table(run: RunStudy) -> Table:
    """A row per package, a column per stage, and one for the evaluations."""
    columns = {stage: record.versions for stage, record in run.stages.items()}
    for label, content in run.checkpoints.items():
        used = [result.versions for result in content.results]
        merged = {name: ", ".join(dict.fromkeys(one[name] for one in used if name in one)) for name in _names(used)}
        if merged:
            columns[f"eval {label}"] = merged
    same = _shared(columns)
    lines = [[name, *(one.get(name, NOTHING) for one in same.values())] for name in _names([*same.values()])]
    return Table([*text_columns("package"), *number_columns(*same)], lines, "Versions")


def _names(versions: list[dict[str, str]]) -> list[str]:
    return list(dict.fromkeys(name for one in versions for name in one))


def _shared(columns: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """Columns with the same content become one."""
    found: dict[str, dict[str, str]] = {}
    for title, content in columns.items():
        twin = next((other for other, own in found.items() if own == content), None)
        if twin is None:
            found[title] = content
        else:
            found = {f"{name}, {title}" if name == twin else name: own for name, own in found.items()}
    return found


def fingerprint_table(run: RunStudy) -> Table:
    """Every identity that was recorded, of weights and of data."""
    lines = []
    for stage, record in run.stages.items():
        lines += [[stage, f"input {name}", value] for name, value in record.inputs.items()]
        calibration: Calibration | None = record.metrics.calibration if stage == "prune" else None
        if calibration is not None:
            data = f"calibration {calibration.dataset}, {calibration.samples} x {calibration.seq_len} tokens"
            lines.append([stage, f"{data}: documents hash", calibration.documents_hash])
            lines.append([stage, f"{data}: windows hash", calibration.windows_hash])
        lines.append([stage, "output", record.output])
    for label, content in run.checkpoints.items():
        if content.fingerprint is not None:
            lines.append([f"eval {label}", f"weights of {content.checkpoint}", content.fingerprint])
        for text in content.texts:
            if text.numbers.documents_hash is not None:
                lines.append([f"eval {label}", f"text of {text_quantity(text).label}", text.numbers.documents_hash])
    return Table(text_columns("stage", "what", "value"), lines, "Fingerprints")


def evaluation_table(run: RunStudy) -> Table:
    """On how much every number rests, with which few-shot count and task version, and how long it took."""
    columns = text_columns("weights", "text or tasks", "measured on", "dtype", "device") + number_columns("seconds")
    lines = []
    for label, content in run.checkpoints.items():
        for text in content.texts:
            lines.append([label, text_quantity(text).label, _windows(text.numbers), *_made([text])])
        for family in families(content.tasks):
            lines.append([label, task_quantity(family).title, _samples(family), *_made(family)])
    return Table(columns, lines, "Evaluations")


def _made(family: list[TextResult] | list[TaskResult]) -> list[str]:
    """Dtypes, devices and seconds of results."""
    results: list[Result] = [*family]
    devices = dict.fromkeys(result.device for result in results if result.device is not None)
    dtypes = dict.fromkeys(result.dtype for result in results if result.dtype is not None)
    seconds = sum(result.seconds for result in results)
    return [", ".join(dtypes) or NOTHING, ", ".join(devices) or NOTHING, f"{seconds:.1f}" if seconds else NOTHING]


def _windows(numbers: TextNumbers) -> str:
    error = "" if numbers.stderr is None else f", loss ± {numbers.stderr:.4f} nats"
    return f"{numbers.tokens:,} tokens in {numbers.windows} windows{error}"


def _samples(family: list[TaskResult]) -> str:
    tasks = {task: scores for result in family for task, scores in result.numbers.tasks.items()}
    whole = f"{sum(scores.samples or 0 for scores in tasks.values()):,} samples of {len(tasks)} tasks"
    if len(tasks) > SHOWN:
        return f"{whole}, {' or '.join(dict.fromkeys(_shots(scores) for scores in tasks.values()))}"
    details = [
        f"{task} v{_or_unknown(scores.version)}, {_shots(scores)}{_error(scores)}" for task, scores in tasks.items()
    ]
    return f"{whole}: {'; '.join(details)}"


def _shots(scores: TaskScores) -> str:
    return f"{_or_unknown(scores.num_fewshot)}-shot"


def _or_unknown(value: Any) -> Any:
    return "?" if value is None else value


def _error(scores: TaskScores) -> str:
    error = scores.scores.get("acc_stderr")
    return f", acc ± {error:.2%}" if error is not None else ""
