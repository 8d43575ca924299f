"""What was done to make the numbers: commands, versions, seeds, machines, fingerprints. Old records may lack some."""

from __future__ import annotations

from typing import Any

from sppctl.evaluate import tasks
from sppctl.evaluate.stage import result_name
from sppctl.report.tables import Table


def facts(run: dict[str, Any]) -> list[str]:
    """What was done, one line per stage."""
    lines = []
    stages = run["stages"]
    if "prune" in stages:
        metrics = stages["prune"]["metrics"]
        error = metrics["mean_relative_output_error"]
        words = f", mean relative output error {error:.3f}" if error is not None else ""
        lines.append(
            f"prune: {metrics['method']} {metrics['pattern']}, {metrics['matrices']} matrices{words}, "
            f"{stages['prune']['wall_time_s']:.0f} s"
        )
    if "train" in stages:
        metrics = stages["train"]["metrics"]
        validation = metrics["validation_loss"]
        words = f", validation loss {validation:.3f}" if validation is not None else ""
        lines.append(
            f"train: {metrics['method']}, {metrics['trainable_parameters']:,} parameters "
            f"({metrics['trainable_share']:.2%}), {metrics['steps']} steps, {metrics['tokens']:,} tokens{words}, "
            f"{stages['train']['wall_time_s']:.0f} s"
        )
    if "merge" in stages:
        metrics = stages["merge"]["metrics"]
        lines.append(
            f"merge: {metrics['matrices']} matrices, {_zeros(metrics)}, "
            f"{metrics['moved_share']:.1%} of the kept weights moved, {stages['merge']['wall_time_s']:.0f} s"
        )
    return lines


def _zeros(merge: dict[str, Any]) -> str:
    """What became of the zeros in merging."""
    if merge.get("pattern_unchanged", True):
        return f"all {merge['zeros']:,} zeros kept"
    changes = f"{merge['filled_zeros']:,} zeros filled, {merge['lost_weights']:,} other weights zero"
    return f"{changes}, sparsity now {merge['sparsity']:.2%} (mask {merge['mask']})"


def commands(run: dict[str, Any]) -> list[str]:
    """The exact commands that made the stages and the evaluations, each once, in this order."""
    results = [result for content in run["checkpoints"].values() for result in content["results"]]
    return list(dict.fromkeys(one["command"] for one in [*run["stages"].values(), *results] if "command" in one))


def stage_table(run: dict[str, Any]) -> Table:
    """Header and rows: when, on what and with which seed every stage ran, how long, and with how much memory."""
    header = ["stage", "finished", "seconds", "peak memory, MB", "seed", "hardware"]
    lines = []
    for stage, record in run["stages"].items():
        if "created" in record:
            memory = ", ".join(f"{size:.0f} {name}" for name, size in record.get("peak_memory_mb", {}).items())
            seconds = f"{record['wall_time_s']:.0f}"
            seed = str(record.get("seed", "-"))
            lines.append([stage, record["created"], seconds, memory or "-", seed, record.get("hardware", "-")])
    return header, lines


def version_table(run: dict[str, Any]) -> Table:
    """Header and rows: a row per package, a column per stage, and one for the evaluations."""
    columns: dict[str, dict[str, str]] = {
        stage: record["versions"] for stage, record in run["stages"].items() if "versions" in record
    }
    for label, content in run["checkpoints"].items():
        found = [result["versions"] for result in content["results"] if "versions" in result]
        merged = {name: ", ".join(dict.fromkeys(one[name] for one in found if name in one)) for name in _names(found)}
        if merged:
            columns[f"eval {label}"] = merged
    same = _shared(columns)
    return ["package", *same], [
        [name, *(one.get(name, "-") for one in same.values())] for name in _names([*same.values()])
    ]


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


def fingerprint_table(run: dict[str, Any]) -> Table:
    """Header and rows: every identity that was recorded, of weights and of data."""
    lines = []
    for stage, record in run["stages"].items():
        lines += [[stage, f"input {name}", str(value)] for name, value in record.get("inputs", {}).items()]
        calibration = record["metrics"].get("calibration") or {}
        for key in ("documents_hash", "windows_hash"):
            if key in calibration:
                text = (
                    f"calibration {calibration['dataset']}, {calibration['samples']} x {calibration['seq_len']} tokens"
                )
                lines.append([stage, f"{text}: {key.replace('_', ' ')}", calibration[key]])
        if "output" in record:
            lines.append([stage, "output", record["output"]])
    for label, content in run["checkpoints"].items():
        if "fingerprint" in content:
            lines.append([f"eval {label}", f"weights of {content.get('checkpoint', label)}", content["fingerprint"]])
        for result in content["results"]:
            if "documents_hash" in result["metrics"]:
                name = result_name(result)
                lines.append([f"eval {label}", f"text of {name}", result["metrics"]["documents_hash"]])
    return ["stage", "what", "value"], lines


def evaluation_table(run: dict[str, Any]) -> Table:
    """Header and rows: on how much every number rests, with which few-shot count and task version, and what it took."""
    header = ["weights", "text or tasks", "measured on", "dtype", "device", "seconds"]
    lines = []
    for label, content in run["checkpoints"].items():
        families: dict[str, list[dict[str, Any]]] = {}
        for result in content["results"]:
            families.setdefault(_family(result), []).append(result)
        for family in families.values():
            group = family[0]["settings"].get("group")
            name = result_name(family[0]) if group is None else tasks.title(tasks.as_measured(family), group)
            cells = [", ".join(_different(family, key)) or "-" for key in ("dtype", "device")]
            seconds = sum(result.get("seconds", 0) for result in family)
            lines.append([label, name, _amount(family), *cells, f"{seconds:.1f}" if seconds else "-"])
    return header, lines


def _family(result: dict[str, Any]) -> str:
    """The same for the tasks of a group that are measured one by one."""
    hidden = {"tasks"} if "group" in result["settings"] else set()
    return str({key: value for key, value in result["settings"].items() if key not in hidden})


def _different(family: list[dict[str, Any]], key: str) -> list[str]:
    return list(dict.fromkeys(str(result[key]) for result in family if key in result))


def _amount(family: list[dict[str, Any]]) -> str:
    metrics = family[0]["metrics"]
    if family[0]["settings"]["kind"] == "perplexity":
        words = [f"{metrics['tokens']:,} tokens in {metrics['windows']} windows"] if "tokens" in metrics else []
        error = metrics.get("stderr")
        words += [f"loss ± {error:.4f} nats"] if error is not None else []
        return ", ".join(words)
    tasks = {task: values for result in family for task, values in result["metrics"]["tasks"].items()}
    whole = f"{sum(values.get('samples') or 0 for values in tasks.values()):,} samples of {len(tasks)} tasks"
    if len(tasks) > 10:
        shots = dict.fromkeys(str(values.get("num_fewshot", "?")) for values in tasks.values())
        return f"{whole}, {' or '.join(shots)}-shot"
    details = [
        f"{task} v{values.get('version', '?')}, {values.get('num_fewshot', '?')}-shot" + _error(values)
        for task, values in tasks.items()
    ]
    return f"{whole}: {'; '.join(details)}"


def _error(values: dict[str, Any]) -> str:
    error = values.get("acc_stderr")
    return f", acc ± {error:.2%}" if error is not None else ""
