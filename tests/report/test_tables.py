from __future__ import annotations

import csv
import io
import math
import re
from typing import Any

import pytest
from made_up_runs import SPARSE, write_run

from sppctl.report import measures
from sppctl.report.latex import escape, to_latex
from sppctl.report.measures import gap_recovered, rows
from sppctl.report.over_runs import rows_of_all
from sppctl.report.provenance import version_table
from sppctl.report.readings import ACCURACY, DIVERGENCE, PERPLEXITY
from sppctl.report.tables import (
    CSV_COLUMNS,
    flip_table,
    gap_table,
    significance_table,
    to_csv,
    value_table,
    wide_table,
)
from sppctl.report.write import collect


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    root = tmp_path_factory.mktemp("runs")
    return [collect(write_run(root / "one")), collect(write_run(root / "two_%", pattern="4:8", seed=1))]


# --- how a checkpoint stands to the dense one -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "base", "pruned", "value", "share"),
    [
        (ACCURACY, 0.7, 0.5, 0.6, 0.5),
        (ACCURACY, 0.7, 0.5, 0.5, 0.0),
        (ACCURACY, 0.7, 0.5, 0.7, 1.0),
        (ACCURACY, 0.7, 0.5, 0.4, -0.5),  # worse than pruned
        (ACCURACY, 0.5, 0.6, 0.6, None),  # pruning did no harm
        (ACCURACY, 0.5, 0.5, 0.6, None),
        (PERPLEXITY, 8.0, 32.0, 16.0, 0.5),  # halfway between 2^3 and 2^5
        (PERPLEXITY, 10.0, 40.0, 10.0, 1.0),
        (PERPLEXITY, 10.0, 1000.0, 100.0, 0.5),
        (PERPLEXITY, 10.0, 9.0, 9.5, None),
        (PERPLEXITY, 10.0, math.inf, 20.0, None),
        (DIVERGENCE, 0.0, 1.0, 0.5, None),  # the dense model has none of itself
        (ACCURACY, None, 0.5, 0.6, None),
        (ACCURACY, 0.7, None, 0.6, None),
    ],
)
def test_share_of_the_gap(kind: str, base: float | None, pruned: float | None, value: float, share: float) -> None:
    assert gap_recovered(kind, base, pruned, value) == (None if share is None else pytest.approx(share, abs=1e-12))


def test_rows_say_how_a_checkpoint_was_made(collected: list[dict[str, Any]]) -> None:
    found = rows(collected[0])
    assert [(row.checkpoint, row.method, row.pattern, row.training, row.seed) for row in found] == [
        ("base", None, "dense", None, 0),
        ("pruned", "wanda", "2:4", None, 0),
        ("merged", "wanda", "2:4", "spp", 0),
    ]
    base, pruned, merged = found
    assert base.difference == base.recovered == pruned.recovered == {}
    name = "ppl wikitext2 @512"
    dense, sparse, healed = (row.measures[name].value or 0 for row in found)
    assert pruned.difference[name] == sparse - dense
    assert merged.recovered[name] == pytest.approx(math.log(healed / sparse) / math.log(dense / sparse))
    assert "KL(dense || model) wikitext2 @512" not in merged.difference


def test_perplexities_first_and_kl_in_nats(collected: list[dict[str, Any]]) -> None:
    found = rows(collected[0])
    assert measures.names(found)[:4] == [
        "ppl wikitext2 @512",
        "KL(dense || model) wikitext2 @512",
        "top-1 agreement wikitext2 @512",
        "zeroshot, limit 200 mean",
    ]
    assert measures.headlines(found) == ["ppl wikitext2 @512", "zeroshot, limit 200 mean"]
    header, lines = value_table(found)
    assert lines[1][header.index("KL(dense || model) wikitext2 @512")] == "1.8100"
    assert lines[1][header.index("top-1 agreement wikitext2 @512")] == "44.00%"


# --- tables -----------------------------------------------------------------------------------------------------------


def test_the_table_over_runs(collected: list[dict[str, Any]]) -> None:
    found = rows_of_all(collected)
    header, lines = wide_table(found)
    assert header[:7] == ["run", "checkpoint", "method", "pattern", "training", "seed", "sparsity"]
    assert header[-4:] == [
        "ppl wikitext2 @512 - base",
        "zeroshot, limit 200 mean - base",
        "gap recovered, ppl wikitext2 @512",
        "gap recovered, zeroshot, limit 200 mean",
    ]
    assert {len(line) for line in lines} == {len(header)}
    assert [line[:7] for line in lines[3:]] == [
        ["two_%", "base", "-", "dense", "-", "-", "dense"],
        ["two_%", "pruned", "wanda", "4:8", "-", "1", "50.00%"],
        ["two_%", "merged", "wanda", "4:8", "spp", "1", "50.00%"],
    ]
    assert lines[1][-4] == "+46.40"
    assert gap_table(found[:3])[0][0] == "checkpoint"  # a single run needs no name


def test_differences_with_their_intervals(collected: list[dict[str, Any]]) -> None:
    header, lines = significance_table(collected[0]["comparisons"])
    found = {(line[0], line[1]): dict(zip(header, line, strict=True)) for line in lines}
    mean = found["pruned to merged", "zeroshot, limit 200 mean acc"]
    assert mean["samples"] == "1400"
    low, high = (float(bound) for bound in mean["95 % interval"].split(" to "))
    assert low < float(mean["difference"]) < high
    assert found["pruned to merged", "wikitext2 loss, nats"]["samples"] == "40"
    assert {pair for pair, _ in found} == {"base to pruned", "base to merged", "pruned to merged"}


def test_flips_by_comparison(collected: list[dict[str, Any]]) -> None:
    header, lines = flip_table(collected[0]["comparisons"])
    assert len(lines) == 3 * 8
    for line in lines:
        cells = dict(zip(header, line, strict=True))
        flipped = int(cells["flipped"].split()[0])
        assert flipped == sum(int(cells[kind]) for kind in header[4:])


def test_packages_of_equal_versions_share_a_column(collected: list[dict[str, Any]]) -> None:
    header, lines = version_table(collected[0])
    assert header == ["package", "prune, train, merge", "eval base, eval pruned, eval merged"]
    assert ["python", "3.11.7", "-"] in lines


# --- CSV --------------------------------------------------------------------------------------------------------------


def test_csv_holds_every_number_unrounded(collected: list[dict[str, Any]]) -> None:
    found = rows_of_all(collected)
    lines = list(csv.DictReader(io.StringIO(to_csv(found))))
    assert list(lines[0]) == CSV_COLUMNS
    assert len(lines) == sum(len(row.measures) for row in found)
    merged = next(line for line in lines if (line["checkpoint"], line["kind"]) == ("merged", "perplexity"))
    row = found[2]
    measure = row.measures["ppl wikitext2 @512"]
    assert (merged["run"], merged["method"], merged["training"], merged["seed"]) == (row.run, "wanda", "spp", "0")
    numbers = [measure.value, row.difference[measure.name], row.recovered[measure.name], 0.03]
    keys = ("value", "difference_to_base", "gap_recovered", "stderr")
    assert [float(merged[key]) for key in keys] == numbers
    assert next(line for line in lines if line["measure"].startswith("boolq"))["acc_norm"]


def test_csv_keeps_what_has_not_been_measured(collected: list[dict[str, Any]]) -> None:
    run = collected[0] | {"checkpoints": {"pruned": {"sparsity": SPARSE, "results": []}}}
    (line,) = csv.DictReader(io.StringIO(to_csv(rows(run))))
    assert (line["checkpoint"], line["pattern"], line["measure"]) == ("pruned", "2:4", "")


# --- LaTeX ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "latex"),
    [
        ("arc_easy", r"arc\_easy"),
        ("50 % & more", r"50 \% \& more"),
        ("a\\b", r"a\textbackslash{}b"),
        ("#1 {x} ~ ^ $", r"\#1 \{x\} \textasciitilde{} \textasciicircum{} \$"),
        ("KL(p || q) < 1", r"KL(p \textbar{}\textbar{} q) \textless{} 1"),
    ],
)
def test_latex_sets_text_as_it_is(text: str, latex: str) -> None:
    assert escape(text) == latex


def test_latex_table(collected: list[dict[str, Any]]) -> None:
    found = rows_of_all(collected)
    text = to_latex(found)
    columns = len(wide_table(found)[0])
    start, end = text.index(r"\toprule"), text.index(r"\bottomrule")
    above, *body = [line for line in text[start:end].splitlines() if line.endswith(r"\\")]
    assert len(body) == 1 + len(found)
    spans = [int(size) for size in re.findall(r"\\multicolumn{(\d+)}", above)]
    assert sum(spans) == columns
    assert above.count("zeroshot, limit 200") == above.count("difference to base") == 1
    assert r"\shortstack[r]{arc\_easy} & " in body[0]
    assert r"\begin{table*}" in text
    assert r"\label{tab:sppctl}" in text
    for line in body:
        assert line.replace(r"\&", "").count(" & ") == columns - 1
    assert text.count(r"\midrule") == 2  # below the head, and between the runs
    assert text.count(r"\begin{") == text.count(r"\end{") == 2
    assert r"two\_\%" in text
    assert r"$-$" in body[2]  # a lost accuracy
    assert "%" not in body[2].replace(r"\%", "")
    depth = 0
    for before, character in zip(" " + text, text, strict=False):
        depth += {"{": 1, "}": -1}.get(character, 0) if before != "\\" else 0
        assert depth >= 0
    assert depth == 0
