from __future__ import annotations

import csv
import io
import re
from dataclasses import replace

import pytest
from made_up_runs import layer, stage_of, study_of, task, text, write_run

from sppctl.evaluate.results import TaskResult
from sppctl.report import latex, provenance, tables
from sppctl.report.significance import Comparison, Entry, Flips
from sppctl.report.study import RunStudy, Study
from sppctl.report.tables import Table
from sppctl.report.text import to_csv


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    root = tmp_path_factory.mktemp("runs")
    return Study.of([write_run(root / "one"), write_run(root / "two_%", pattern="4:8", seed=1)])


def heads(made: Table) -> list[str]:
    return [column.head for column in made.columns]


def records(made: Table) -> list[dict[str, str]]:
    return [dict(zip(heads(made), row, strict=True)) for row in made.rows]


def by_first_cell(made: Table) -> dict[str, list[str]]:
    return {row[0]: list(row[1:]) for row in made.rows}


# --- one run ----------------------------------------------------------------------------------------------------------


def test_other_settings_are_other_rows_and_a_hopeless_perplexity_stays_short() -> None:
    run = study_of(base=[text(99999.0), text(5.0, 2048)], pruned=[text(123456.0)], merged=[text(float("inf"))])
    rows = by_first_cell(tables.table(run.rows))
    assert rows["ppl prose @2048"] == ["5.00", "-", "-"]
    assert rows["ppl prose @64"] == ["99999.00", "1.23e+05", "-"]


def test_shares_are_percentages_and_tasks_of_a_group_are_marked() -> None:
    both = {"acc": 0.5, "acc_norm": 0.625}
    results = [task(0.5, scores=both), task(None, "lambada", scores={"perplexity": 12.5}, metric="perplexity")]
    results += [task(0.5, name, group="g", groups={"g": {}}, members=2) for name in "ab"]
    made = tables.table(study_of(base=[*results, text(5.0, kl=1.81, top1_agreement=0.44)]).rows)
    rows = by_first_cell(made)
    assert rows["rte"] == ["50.00% (norm 62.50%)"]
    assert rows["lambada perplexity (lm-eval)"] == ["12.50"]
    assert rows["KL(dense || model) prose @64"] == ["1.8100"]
    assert rows["top-1 agreement prose @64"] == ["44.00%"]
    assert [made.rows[at][0] for at in sorted(made.parts)] == ["a (g)", "b (g)"]


def scored(name: str, metric: str, value: float) -> TaskResult:
    return task(None, name, scores={metric: value}, metric=metric)


def test_small_metrics_that_are_no_shares_have_four_decimals() -> None:
    measured = {"base": (0.124, 0.85, 31.0), "merged": (0.116, 0.8541, 9.5)}
    results = {
        label: [scored("cola", "mcc", mcc), scored("pile", "bits_per_byte", bits), scored("wmt", "bleu", bleu)]
        for label, (mcc, bits, bleu) in measured.items()
    }
    rows = study_of(**results).rows
    assert by_first_cell(tables.table(rows)) | {
        "cola mcc": ["0.1240", "0.1160"],
        "pile bits per byte": ["0.8500", "0.8541"],
        "wmt bleu": ["31.00", "9.5000"],
    } == by_first_cell(tables.table(rows))
    assert by_first_cell(tables.comparison_table(rows)) == {
        "cola mcc": ["-0.0080"],
        "pile bits per byte": ["+0.0041"],
        "wmt bleu": ["-21.5000"],
    }


def test_memory_has_the_unit_of_its_head() -> None:
    """1,907.35 MiB are 2.00 GB, in the table as in the verdict."""
    run = study_of(stages={"merge": stage_of("merge", peak_memory_mb={"process": 1907.35})})
    (line,) = records(provenance.stage_table(run))
    assert line["peak memory, GB"] == "2.00 process"


def test_differences_with_their_intervals_and_flips(study: Study) -> None:
    comparisons = study.runs[0].comparisons
    lines = {(line["comparison"], line["measure"]): line for line in records(tables.significance_table(comparisons))}
    mean = lines["pruned to merged", "zeroshot, limit 200 mean acc"]
    assert mean["samples"] == "1400"
    low, high = (float(bound) for bound in mean["95 % interval"].split(" to "))
    assert low < float(mean["difference"]) < high
    assert lines["pruned to merged", "wikitext2 @512 loss, nats"]["samples"] == "40"
    assert {pair for pair, _ in lines} == {"base to pruned", "base to merged", "pruned to merged"}
    flips = records(tables.flip_table(comparisons))
    assert len(flips) == 3 * 8
    for line in flips:
        kinds = ("correct to wrong", "wrong to correct", "wrong to wrong")
        assert int(line["flipped"].split()[0]) == sum(int(line[kind]) for kind in kinds)
    no_choices = Entry("perplexity", "acc", 1, flips=Flips(0, 0, 0, 0, 0))
    assert not tables.flip_table([Comparison("base", "pruned", [no_choices])]).rows


def test_how_it_was_made(study: Study) -> None:
    """Packages of equal versions share a column, tasks of a group that are measured one by one a line."""
    made = provenance.version_table(study.runs[0])
    assert heads(made) == ["package", "prune, train, merge", "eval base, eval pruned, eval merged"]
    assert ["python", "3.11.7", "-"] in made.rows
    results = [task(0.5, f"mmlu_{at}", 5, group="mmlu", members=57, seconds=1.5) for at in range(57)]
    (line,) = provenance.evaluation_table(study_of(base=results)).rows
    assert line == ["base", "mmlu 5-shot", "570 samples of 57 tasks, 5-shot", "-", "-", "85.5"]


# --- what pruning did to each module type -----------------------------------------------------------------------------


def test_one_row_for_each_module_type() -> None:
    errors = {
        "0.self_attn.q_proj": 0.125,
        "0.mlp.down_proj": 0.25,
        "1.self_attn.q_proj": 0.375,
        "1.mlp.down_proj": 0.125,
    }
    sparsities = (0.25, 0.5, 0.75, 0.5)
    made = tables.type_table(
        [layer(*one, sparsity=share) for one, share in zip(errors.items(), sparsities, strict=True)]
    )
    names = ["mean relative output error", "worst", "worst layer"]
    assert heads(made) == ["module type", "matrices", "mean sparsity", *names, "seconds"]
    assert [column.head for column in made.columns if column.kind == "code"] == ["module type", "worst layer"]
    assert made.rows == [
        ["q_proj", "2", "50.00%", "0.250", "0.375", "model.layers.1.self_attn.q_proj", "0.5"],
        ["down_proj", "2", "50.00%", "0.188", "0.250", "model.layers.0.mlp.down_proj", "0.5"],
    ]


def test_damping_is_a_range_and_errors_are_those_of_the_weights_without_inputs() -> None:
    damps = {"0.mlp.up_proj": 0.01, "0.mlp.down_proj": 0.01, "0.mlp.gate_proj": None, "1.mlp.down_proj": 0.1}
    lines = records(tables.type_table([layer(name, None, damp) for name, damp in damps.items()]))
    assert [line["damping"] for line in lines] == ["0.01", "0.01 to 0.1", "-"]
    assert {(line["mean relative weight error"], line["worst"]) for line in lines} == {("0.500", "0.500")}


def test_every_expert_is_counted_and_the_worst_is_named() -> None:
    layers = [layer(f"{block}.mlp.experts.{i}.gate_proj", block / 10 + i / 100) for block in (0, 1) for i in range(4)]
    (line,) = tables.type_table(layers).rows
    assert line == ["gate_proj", "8", "50.00%", "0.065", "0.130", "model.layers.1.mlp.experts.3.gate_proj", "2.0"]


# --- several runs -----------------------------------------------------------------------------------------------------


def test_the_table_over_runs(study: Study) -> None:
    made = tables.over_runs(study.rows, tables.values, tables.gaps)
    assert heads(made)[:7] == ["run", "checkpoint", "method", "pattern", "training", "seed", "sparsity"]
    quoted = ["ppl wikitext2 @512", "zeroshot, limit 200 mean"]
    assert heads(made)[-4:] == [f"{name} - base" for name in quoted] + [f"gap recovered, {name}" for name in quoted]
    groups = ["difference to base"] * 2 + ["gap recovered"] * 2
    assert [column.group for column in made.columns[-5:]] == ["zeroshot, limit 200", *groups]
    assert {len(line) for line in made.rows} == {len(made.columns)}
    assert [line[:7] for line in made.rows[3:]] == [
        ["two_%", "base", "-", "dense", "-", "-", "dense"],
        ["two_%", "pruned", "wanda", "4:8", "-", "1", "50.00%"],
        ["two_%", "merged", "wanda", "4:8", "spp", "1", "50.00%"],
    ]
    assert made.rows[1][-4] == "+46.40"
    assert made.breaks == {3}
    assert heads(tables.over_runs(study.rows[:3]))[0] == "checkpoint"  # a single run needs no name


def test_columns_of_a_text_or_group_stand_together() -> None:
    results = [text(5.0, 64, kl=1.0), text(6.0, 128, kl=1.0)]
    results += [task(0.5, "a", group="g", groups={"g": {}}, members=2), task(0.5, "b"), task(0.5, "c")]
    columns = tables.over_runs(study_of(base=results).rows, tables.values).columns[5:]
    assert [(column.group, column.name) for column in columns] == [
        *(("prose @64", name) for name in ("ppl", "KL", "top-1")),
        *(("prose @128", name) for name in ("ppl", "KL", "top-1")),
        *(("g", "mean of 1 of 2 tasks"), ("g", "a"), ("", "b"), ("", "c")),
    ]


def test_mean_and_deviation_over_seeds_in_a_table() -> None:
    runs = []
    for seed in (0, 1):
        own = study_of(merged=[text(5.0 + seed), task(0.5 + seed / 4), scored("wmt", "bleu", 20.0 + seed)])
        runs.append(replace(own, directory=f"runs/{seed}", config=f"run: {{seed: {seed}}}", stages={}))
    (line,) = records(tables.seed_table(Study(runs).seeds))
    assert (line["checkpoint"], line["seeds"]) == ("merged", "2")
    assert (line["ppl prose @64"], line["rte"]) == ("5.50 ± 0.71", "62.50% ± 17.68%")
    assert line["wmt bleu"] == "20.50 ± 0.71"  # as many decimals as the mean


# --- CSV --------------------------------------------------------------------------------------------------------------


def lines_of(study: Study | RunStudy) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(to_csv(tables.long_table(study.rows)))))


def test_csv_holds_every_number_unrounded(study: Study) -> None:
    lines = lines_of(study)
    columns = ["run", "checkpoint", "method", "pattern", "training", "seed", "sparsity", "bytes", "fingerprint"]
    columns += ["measure", "kind", "value", "stderr", "acc_norm", "difference_to_base", "gap_recovered"]
    assert list(lines[0]) == columns
    assert len(lines) == sum(len(row.values) for row in study.rows)
    merged = next(line for line in lines if (line["checkpoint"], line["kind"]) == ("merged", "perplexity"))
    row = study.rows[2]
    quantity = next(iter(row.values))
    assert [merged[key] for key in ("run", "method", "training", "seed")] == [row.run, "wanda", "spp", "0"]
    numbers = [row.values[quantity].number, row.difference[quantity], row.recovered[quantity], 0.03]
    keys = ("value", "difference_to_base", "gap_recovered", "stderr")
    assert [float(merged[key]) for key in keys] == numbers
    assert next(line for line in lines if line["measure"].startswith("boolq"))["acc_norm"]
    (line,) = lines_of(study_of(pruned=[]))  # nothing has been measured
    assert (line["checkpoint"], line["pattern"], line["measure"]) == ("pruned", "2:4", "")


def test_csv_has_the_full_names_of_keys() -> None:
    own = study_of(base=[text(5.0)], merged=[text(6.0)])
    lines = lines_of(Study([replace(own, config=f"train: {{rank: {rank}}}", directory=rank) for rank in ("8", "16")]))
    assert {(line["checkpoint"], line["train.rank"]) for line in lines} == {
        ("base", ""),
        ("merged", "8"),
        ("merged", "16"),
    }


# --- LaTeX ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("arc_easy 50 % & more", r"arc\_easy 50 \% \& more"),
        ("a\\b", r"a\textbackslash{}b"),
        ("#1 {x} ~ ^ $", r"\#1 \{x\} \textasciitilde{} \textasciicircum{} \$"),
        ("KL(p || q) < 1", r"KL(p \textbar{}\textbar{} q) \textless{} 1"),
        ("[a] *b--c\n", r"{[}a{]} {*}b-{}-c\textbackslash{}n"),
    ],
)
def test_latex_sets_text_as_it_is(raw: str, shown: str) -> None:
    assert latex.escape(raw) == shown


def test_latex_table(study: Study) -> None:
    made = tables.over_runs(study.rows, tables.values, tables.gaps)
    text = latex.to_latex(made)
    columns = len(made.columns)
    start, end = text.index(r"\toprule"), text.index(r"\bottomrule")
    above, *body = [line for line in text[start:end].splitlines() if line.endswith(r"\\")]
    assert len(body) == 1 + len(study.rows)
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
