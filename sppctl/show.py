"""Results on stdout: tables for people, JSON for programs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from sppctl import console, distributed
from sppctl.records import Sample, StageRecord, to_json

if TYPE_CHECKING:
    from sppctl.doctor import Finding
    from sppctl.evaluate.results import Json
    from sppctl.inspect.inspect import MatrixSparsity
    from sppctl.pattern import Pattern
    from sppctl.publish.push import Upload
    from sppctl.report.study import Study
    from sppctl.run.clean import Kind, Piece
    from sppctl.run.verify import Checked
    from sppctl.sweep.work import Entry


def tables(contents: Iterable[tuple[str, Sequence[str], Sequence[Sequence[str]]]], sentences: Iterable[str]) -> None:
    """Prints tables, each with title, header and rows, and then sentences."""
    for title, header, rows in contents:
        console.show_table(title, header, rows)
    for sentence in sentences:
        print(console.plain(sentence))


def matrices(
    checkpoint: str,
    records: Sequence[MatrixSparsity],
    summary: dict[str, Any],
    expected: Pattern | None,
    violations: list[str],
    as_json: bool,
) -> None:
    """Prints the sparsity of every matrix of a checkpoint, and whether they have the expected pattern."""
    if as_json:
        return console.show_json({"summary": summary, "violations": violations, "matrices": to_json(records)})
    from sppctl.inspect.inspect import patterns_text, sentence, verdict

    rows = [(m.name, "x".join(map(str, m.shape)), f"{m.sparsity:.4f}", patterns_text(m)) for m in records]
    header = ("matrix", "shape", "sparsity", "N:M that hold")
    verdicts = [] if expected is None or violations else [verdict(summary, expected)]
    return tables([(checkpoint, header, rows)], [sentence(summary), *verdicts])


def files(run_dir: str, checked: Sequence[Checked], as_json: bool) -> None:
    """Prints the state of every file of a run."""
    if as_json:
        return console.show_json(to_json(checked))
    rows = [(file.artefact, file.file, file.state) for file in checked]
    return console.show_table(run_dir, ("artefact", "file", "state"), rows)


def pieces(run_dir: str, each: Sequence[Piece], chosen: Sequence[Kind], deleted: bool, as_json: bool) -> None:
    """What can be freed of a run, or what was."""
    if as_json:
        return console.show_json(to_json(each))
    rows = [(piece.path, piece.kind, f"{piece.size / 1e6:,.1f}", piece.cost) for piece in each]
    console.show_table(run_dir, ("path", "kind", "MB", "deleting it costs"), rows)
    size = sum(piece.size for piece in each if piece.kind in chosen) / 1e6
    verb = "deleted" if deleted else "--yes deletes"
    caches = sum(piece.size for piece in each if piece.kind == "cache" and piece.kind not in chosen) / 1e6
    more = f"; with --caches also {caches:,.1f} MB that all runs share" if caches else ""
    return print(f"{verb} {size:,.1f} MB ({', '.join(chosen)}){more}")


def findings(each: Sequence[Finding], as_json: bool) -> None:
    """What was found about the installation and the machine."""
    if as_json:
        return console.show_json(to_json(each))
    for finding in each:
        print(console.plain(f"{finding.state:8} {finding.subject:14} {finding.text}"))
        if finding.advice:
            print(console.plain(f"{'':23} -> {finding.advice}"))
    return None


def sweep(entries: Sequence[Entry], totals: dict[str, int], as_json: bool) -> None:
    """Prints the plan of a sweep."""
    if as_json:
        console.show_json(to_json(entries))
        return
    rows = []
    for entry in entries:
        existing = [*entry.made, *(f"{stage} (other settings)" for stage in entry.other_settings)]
        rows.append((entry.directory, ", ".join(entry.stages), ", ".join(existing) or "-", ", ".join(entry.runs)))
    console.show_table("plan", ("directory", "stages", "existing", "for runs"), rows)
    print("; ".join(f"{stage}: {number}" for stage, number in totals.items()))


def stage(record: StageRecord[Any], as_json: bool) -> None:
    """Prints the summary of a stage."""
    if not distributed.is_main():
        return
    if as_json:
        console.show_json(to_json(record))
        return
    from sppctl.report import provenance

    print(console.plain(provenance.fact(record)))


def upload(made: Upload, as_json: bool) -> None:
    """The files of an upload, and where they are."""
    if as_json:
        return console.show_json(to_json(made))
    title = f"{made.directory} -> {made.repository} ({made.revision})"
    rows = [*((file.file, f"{file.bytes:,}") for file in made.files)]
    rows.append((f"{len(made.files)} files", f"{sum(file.bytes for file in made.files):,}"))
    return tables([(title, ("file", "bytes"), rows)], ["nothing was uploaded" if made.url is None else made.url])


def samples(each: Sequence[Sample], as_json: bool) -> None:
    """What checkpoints wrote, side by side."""
    if as_json:
        return console.show_json(to_json(each))
    for sample in each:
        labels, texts = zip(*((one.checkpoint, one.shown) for one in sample.completions), strict=True)
        console.show_texts(sample.prompt, labels, texts)
    return None


def results(by_label: dict[str, Json], seed: int, as_json: bool) -> None:
    """Prints the results of checkpoints by label."""
    if not distributed.is_main():
        return
    if as_json:
        console.show_json(next(iter(by_label.values())) if len(by_label) == 1 else by_label)
        return
    from sppctl.report import text

    text.show_results(by_label, seed)


def report(study: Study, as_json: bool) -> None:
    """Prints the records of runs, or the summary of their report."""
    if as_json:
        console.show_json([run.to_json() for run in study.runs])
        return
    from sppctl.report import text

    text.show(study)
