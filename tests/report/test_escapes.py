"""Names that mean something to a renderer: shown as they are in Markdown, CSV, LaTeX, HTML, figures and a terminal."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from made_up_runs import write_run

from sppctl import console
from sppctl.report import plots
from sppctl.report.latex import escape
from sppctl.report.tables import code, grid, in_markdown
from sppctl.run import pipeline

ODD = "=1+2 <img src=x> [x](javascript:a) $\\frac{$ `b` *c* | d_ \x1b[31me\nf\u202eg \udc80"


def test_markdown_shows_it_as_it_is() -> None:
    shown = r"=1+2 &lt;img src=x&gt; \[x\](javascript:a) $\\frac{$ \`b\` \*c\* \| d\_ \\x1b\[31me\\nf\\u202eg \\udc80"
    assert in_markdown(ODD) == shown
    assert grid(["measure"], [[ODD], [code("q_proj")], [code("a`b")]])[2:] == [
        f"| {shown} |",
        "| `q_proj` |",
        r"| a\`b |",
    ]
    assert in_markdown("small_sums, 5-shot (norm 1.2 %)") == "small_sums, 5-shot (norm 1.2 %)"


@pytest.mark.parametrize(
    ("text", "typeset"),
    [("[a] *b", "{[}a{]} {*}b"), ("a--b_c", r"a-{}-b\_c"), ("50% & $x$\n", r"50\% \& \$x\$\textbackslash{}n")],
)
def test_latex_shows_it_as_it_is(text: str, typeset: str) -> None:
    assert escape(text) == typeset


def test_a_report_of_odd_names_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "plain").rename(tmp_path / "=1 <b>[red]$\\frac{$`")
    for first in ("+cmd", "@sum", "-x", "\tt"):
        content = json.loads((run / "eval/pruned.json").read_text())
        (run / f"eval/{first}.json").write_text(json.dumps(content | {"label": first}))
    found = pipeline.report([run], tmp_path / "out", tmp_path / "out/a.tex")
    with (tmp_path / "out/report.csv").open(newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert {"'+cmd", "'@sum", "'-x", r"'\tt"} <= set(cells)
    assert not [cell for cell in cells if cell.startswith(("=", "+", "@", "\t")) or cell[:2] == "-x"]
    markdown, page = ((tmp_path / f"out/report.{kind}").read_text() for kind in ("md", "html"))
    assert "<b>[red]" not in markdown + page
    assert r"\[red\]$\\frac{$\`" in markdown.splitlines()[0]
    assert "=1 &lt;b&gt;[red]$" in page
    console.show_table("[red]t", ("[bold]h", "n"), [(found[0]["run"], "\x1b[2J")])
    shown = capsys.readouterr().out
    assert "[red]t" in shown
    assert "[bold]h" in shown
    assert "<b>[red]$\\frac" in shown
    assert "\x1b[2J" not in shown
    assert r"\x1b[2J" in shown


def test_figures_do_not_read_names_as_mathematics(tmp_path: Path) -> None:
    layer = {"relative_output_error": 0.1, "relative_weight_error": 0.1, "sparsity": 0.5, "damp": None, "seconds": 1.0}
    layers = [layer | {"name": f"model.layers.{index}.$\\frac{{$"} for index in range(2)]
    plots.write(layers, tmp_path / "a.svg")
    assert "$\\frac{$" in (tmp_path / "a.svg").read_text()


def test_a_note_moves_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    console.note("one\x1b[1A\ntwo")
    assert capsys.readouterr().err == "one\\x1b[1A\ntwo\n"
