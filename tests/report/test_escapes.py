"""Names that mean something to a renderer: shown as they are in Markdown, CSV, LaTeX, HTML, figures and a terminal."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import pytest
from made_up_runs import layer, load, save, write_run

from sppctl import console
from sppctl.report import plots, text
from sppctl.report.tables import Column, Table
from sppctl.run import pipeline

ODD = "=1+2 <img src=x> [x](javascript:a) $\\frac{$ `b` *c* | d_ \x1b[31me\nf\u202eg \udc80"


def test_markdown_shows_it_as_it_is() -> None:
    shown = r"=1+2 &lt;img src=x&gt; \[x\](javascript:a) $\\frac{$ \`b\` \*c\* \| d\_ \\x1b\[31me\\nf\\u202eg \\udc80"
    assert text.escape(ODD) == shown
    assert text.escape("small_sums, 5-shot (norm 1.2 %)") == "small_sums, 5-shot (norm 1.2 %)"
    names = Table([Column("measure", kind="code")], [[ODD], ["q_proj"], ["a`b"]])
    assert text.grid(names)[2:] == [f"| {shown} |", "| `q_proj` |", r"| a\`b |"]


def test_a_report_of_odd_names_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "plain").rename(tmp_path / "=1 <b>[red]$\\frac{$`")
    for first in ("+cmd", "@sum", "-x", "\tt"):
        save(run, dataclasses.replace(load(run, "pruned"), label=first))
    study = pipeline.report([run], tmp_path / "out", tmp_path / "out/a.tex")
    with (tmp_path / "out/report.csv").open(newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert {"'+cmd", "'@sum", "'-x", r"'\tt"} <= set(cells)
    assert not [cell for cell in cells if cell.startswith(("=", "+", "@", "\t")) or cell[:2] == "-x"]
    markdown, page = ((tmp_path / f"out/report.{kind}").read_text() for kind in ("md", "html"))
    assert "<b>[red]" not in markdown + page
    assert r"\[red\]$\\frac{$\`" in markdown.splitlines()[0]
    assert "=1 &lt;b&gt;[red]$" in page
    text.show(study)
    console.show_table("[red]t", ("[bold]h", "n"), [(study.runs[0].directory, "\x1b[2J")])
    shown = capsys.readouterr().out
    assert all(words in shown for words in ("[red]t", "[bold]h", "<b>[red]$\\frac", r"\x1b[2J"))
    assert "\x1b[2J" not in shown


def test_figures_do_not_read_names_as_mathematics() -> None:
    layers = [layer(f"{index}.$\\frac{{$") for index in range(2)]
    assert "$\\frac{$" in plots.svg(lambda: plots.draw(layers))


def test_a_note_moves_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    console.note("one\x1b[1A\ntwo")
    assert capsys.readouterr().err == "one\\x1b[1A\ntwo\n"
