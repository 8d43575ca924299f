"""The provenance of the numbers: commands, versions, seeds, machines, fingerprints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sppctl.evaluate.results import Result, TaskResult, TextNumbers
from sppctl.evaluate.values import SHOWN, families, family_title, text_quantity
from sppctl.files.names import DIRECTORIES, FOREIGN
from sppctl.records import Calibration, MergeRecord, PruneRecord, StageRecord, TrainRecord
from sppctl.report import records
from sppctl.report.study import RunStudy
from sppctl.report.tables import NOTHING, Column, Table, columns_of

FEW_MOVED = 0.01  # of the kept weights; with fewer, training has changed next to nothing


def facts(run: RunStudy) -> list[str]:
    """A summary of each stage in one line."""
    return [fact(run.stages[stage]) for stage in DIRECTORIES if stage in run.stages]


def fact(record: StageRecord[Any]) -> str:
    """A summary of a stage in one line."""
    describe: dict[str, Callable[[Any], str]] = {"prune": _pruned, "train": _trained, "merge": _merged}
    return f"{record.stage}: {describe[record.stage](record.metrics)}, {records.seconds(record):.0f} s"


def _pruned(record: PruneRecord) -> str:
    error = record.mean_relative_output_error
    output = f", mean relative output error {error:.3f}" if error is not None else ""
    permuted = ", channels reordered" if record.permuted else ""
    tuned = ""
    if record.reconstruction:
        blocks = record.reconstruction.values()
        before, after = (
            sum(errors) / len(blocks) for errors in zip(*((b.before, b.after) for b in blocks), strict=True)
        )
        tuned = f", blocks reconstructed (mean error {before:.3f}, then {after:.3f})"
    return f"{record.method} {record.pattern}, {record.matrices} matrices{permuted}{output}{tuned}"


def _trained(record: TrainRecord) -> str:
    loss = f", validation loss {record.validation_loss:.3f}" if record.validation_loss is not None else ""
    parameters = f"{record.trainable_parameters:,} parameters ({record.trainable_share:.2%})"
    best = f" (best adapter: step {record.best_step})" if record.best_step is not None else ""
    return f"{record.method}, {parameters}, {record.steps} steps{best}, {record.tokens:,} tokens{loss}"


def _merged(record: MergeRecord) -> str:
    zeros = f"all {record.zeros:,} zeros kept"
    if not record.pattern_unchanged:
        zeros = f"{record.filled_zeros:,} zeros filled, {record.lost_weights:,} other weights zero"
        zeros += f", sparsity now {record.sparsity:.2%} (mask {record.mask})"
    return f"{record.matrices} matrices, {zeros}, {record.moved_share:.1%} of the kept weights moved"


def unmoved(run: RunStudy) -> list[str]:
    """A warning if training moved hardly any of the merged weights."""
    if "merge" not in run.stages:
        return []
    merge = run.stages["merge"]
    return warnings_of_merge(merge.metrics, None if FOREIGN in merge.inputs else run.stages.get("train"))


def warnings_of_merge(merged: MergeRecord, trained: StageRecord[TrainRecord] | None) -> list[str]:
    """A warning if hardly a kept weight moved; ``trained``: the adapter's record, None: it was made elsewhere."""
    if not merged.kept_weights or merged.moved_share >= FEW_MOVED:
        return []
    text = f"only {merged.moved_share:.2%} of the kept weights moved"
    if not (merged.moved_weights or merged.lost_weights or merged.replaced_tensors or merged.refreshed_matrices):
        text = "none of the kept weights moved: merged equals pruned"
    made = [f"dtype: {merged.dtype}"]
    if trained is not None:
        made = [f"train.lr={trained.settings['train']['lr']:g}", f"steps: {trained.metrics.steps}", *made]
    fixes = ["a higher train.lr", "more steps"] + ["merge.dtype=float32"] * (merged.dtype != "float32")
    return [f"{text} ({', '.join(made)}); use {' or '.join(fixes)}"]


def commands(run: RunStudy) -> list[str]:
    """The exact commands that ran the stages and the evaluations, in this order, without duplicates."""
    evaluations = [result.command for content in run.checkpoints.values() for result in content.results]
    recorded = [*(record.command for record in run.stages.values()), *evaluations]
    return list(dict.fromkeys(command for command in recorded if command is not None))


def stage_table(run: RunStudy) -> Table:
    """Finish time, duration, peak memory, seed and hardware of every stage."""
    columns = columns_of("<stage", "<finished", "seconds", "peak memory, GB", "seed", "<hardware")
    lines = []
    for stage, record in run.stages.items():
        memory = ", ".join(f"{gigabytes(size):.2f} {name}" for name, size in record.peak_memory_mb.items()) or NOTHING
        numbers = (f"{records.seconds(record):.0f}", memory, str(record.seed))
        lines.append([stage, record.created, *numbers, record.hardware])
    return Table(columns, lines, "Stages")


def gigabytes(size: float) -> float:
    """A recorded peak of memory, which is in MiB, in GB (10^9 bytes)."""
    return size * 2**20 / 1e9


def version_table(run: RunStudy) -> Table:
    """A row per package; stages and evaluations with the same versions share a column."""
    columns = {stage: record.versions for stage, record in run.stages.items()}
    for label, content in run.checkpoints.items():
        used: dict[str, list[str]] = {}
        for result in content.results:
            for name, version in result.versions.items():
                used.setdefault(name, []).append(version)
        if used:
            columns[f"eval {label}"] = {name: ", ".join(dict.fromkeys(versions)) for name, versions in used.items()}
    titles: dict[frozenset[tuple[str, str]], list[str]] = {}
    for title, versions in columns.items():
        titles.setdefault(frozenset(versions.items()), []).append(title)
    packages = dict.fromkeys(package for versions in columns.values() for package in versions)
    lines = [[package, *(dict(versions).get(package, NOTHING) for versions in titles)] for package in packages]
    return Table([*columns_of("<package"), *(Column(", ".join(names)) for names in titles.values())], lines, "Versions")


def fingerprint_table(run: RunStudy) -> Table:
    """Every recorded fingerprint and hash, of weights and of data."""
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
    return Table(columns_of("<stage", "<what", "<value"), lines, "Fingerprints")


def evaluation_table(run: RunStudy) -> Table:
    """Sample sizes, few-shot counts, task versions, dtypes, devices and duration of every evaluation."""
    columns = columns_of("<weights", "<text or tasks", "<measured on", "<dtype", "<device", "seconds")
    lines = []
    for label, content in run.checkpoints.items():
        measured: list[tuple[str, str, Sequence[Result]]] = [
            *((text_quantity(text).label, _windows(text.numbers), [text]) for text in content.texts),
            *((family_title(family), _samples(family), family) for family in families(content.tasks)),
        ]
        for name, extent, results in measured:
            details = [
                ", ".join(dict.fromkeys(getattr(result, key) for result in results if getattr(result, key) is not None))
                for key in ("dtype", "device")
            ]
            seconds = sum(result.seconds for result in results)
            details.append(f"{seconds:.1f}" if seconds else "")
            lines.append([label, name, extent, *(text or NOTHING for text in details)])
    return Table(columns, lines, "Evaluations")


def _windows(numbers: TextNumbers) -> str:
    error = "" if numbers.stderr is None else f", loss ± {numbers.stderr:.4f} nats"
    return f"{numbers.tokens:,} tokens in {numbers.windows} windows{error}"


def _samples(family: list[TaskResult]) -> str:
    tasks = {task: scores for result in family for task, scores in result.numbers.tasks.items()}
    total = f"{sum(scores.samples or 0 for scores in tasks.values()):,} samples of {len(tasks)} tasks"
    shots = {task: f"{_or_unknown(scores.num_fewshot)}-shot" for task, scores in tasks.items()}
    if len(tasks) > SHOWN:
        return f"{total}, {' or '.join(dict.fromkeys(shots.values()))}"
    details = []
    for task, scores in tasks.items():
        error = f", acc ± {scores.scores['acc_stderr']:.2%}" if "acc_stderr" in scores.scores else ""
        details.append(f"{task} v{_or_unknown(scores.version)}, {shots[task]}{error}")
    return f"{total}: {'; '.join(details)}"


def _or_unknown(value: float | str | None) -> float | str:
    return "?" if value is None else value
