from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from made_up_runs import write_json, write_run

from sppctl.config.yaml12 import parse_yaml
from sppctl.errors import UserError
from sppctl.report import measures
from sppctl.report.provenance import evaluation_table, facts
from sppctl.report.tables import table, type_table
from sppctl.report.write import collect, markdown, pruned_layers
from sppctl.run import pipeline

DENSE = {"sparsity": 0.0, "patterns": [], "sparse_matrices": 0, "bytes": 1_000_000}
SPARSE = {"sparsity": 0.5, "patterns": ["2:4"], "sparse_matrices": 14, "bytes": 1_000_000}


def perplexity(value: float, seq_len: int = 2048, max_tokens: int | None = None) -> dict[str, Any]:
    settings = {"kind": "perplexity", "text": "wikitext2", "seq_len": seq_len, "max_tokens": max_tokens}
    return {"settings": settings, "metrics": {"value": value, "stderr": 0.1}}


def accuracy(
    tasks: str, values: dict[str, dict[str, float]], shots: int | None = 0, limit: int | None = None
) -> dict[str, Any]:
    measured = {
        name: found | {"version": 1.0, "num_fewshot": shots, "samples": limit or 10} for name, found in values.items()
    }
    mean = {}
    if all("acc" in found for found in values.values()):
        mean = {"acc": sum(found["acc"] for found in values.values()) / len(values)}
    settings = {"kind": "tasks", "tasks": tasks, "num_fewshot": shots, "limit": limit, "seed": 0}
    return {"settings": settings, "metrics": {"tasks": measured, "mean": mean}}


def run(**checkpoints: tuple[dict[str, Any], list[dict[str, Any]]]) -> dict[str, Any]:
    return {
        "run": "runs/mine",
        "config": None,
        "stages": {},
        "checkpoints": {
            label: {"sparsity": sparsity, "results": results} for label, (sparsity, results) in checkpoints.items()
        },
        "comparisons": [],
        "notes": [],
    }


def cells(collected: dict[str, Any]) -> dict[str, list[str]]:
    return {row[0]: row[1:] for row in table(collected)[1]}


# --- tables -----------------------------------------------------------------------------------------------------------


def test_one_column_for_each_checkpoint() -> None:
    header, rows = table(
        run(base=(DENSE, [perplexity(12.345)]), pruned=(SPARSE, [perplexity(45.678)]), merged=(SPARSE, []))
    )
    assert header == ["", "base", "pruned", "merged"]
    assert rows == [
        ["sparsity of pruned matrices", "dense", "50.00%", "50.00%"],
        ["pattern", "dense", "2:4", "2:4"],
        ["sparse matrices", "0", "14", "14"],
        ["size, MB", "1.0", "1.0", "1.0"],
        ["ppl wikitext2 @2048", "12.35", "45.68", "-"],
    ]


def test_sparsity_without_a_pattern() -> None:
    found = cells(run(pruned=(SPARSE | {"patterns": [], "sparsity": 0.75}, [])))
    assert found["pattern"] == ["unstructured"]
    assert found["sparsity of pruned matrices"] == ["75.00%"]


def test_a_perplexity_names_its_window_and_what_it_was_cut_to() -> None:
    found = cells(run(base=(DENSE, [perplexity(5.0), perplexity(6.0, 64), perplexity(7.0, 64, 512)])))
    assert found["ppl wikitext2 @2048"] == ["5.00"]
    assert found["ppl wikitext2 @64"] == ["6.00"]
    assert found["ppl wikitext2 @64, first 512 tokens"] == ["7.00"]


def test_other_settings_are_other_rows() -> None:
    found = cells(run(base=(DENSE, [perplexity(5.0)]), pruned=(SPARSE, [perplexity(6.0, 64)])))
    assert found["ppl wikitext2 @2048"] == ["5.00", "-"]
    assert found["ppl wikitext2 @64"] == ["-", "6.00"]


@pytest.mark.parametrize(("value", "words"), [(99999.0, "99999.00"), (123456.0, "1.23e+05"), (float("inf"), "inf")])
def test_a_hopeless_perplexity_stays_short(value: float, words: str) -> None:
    assert cells(run(base=(DENSE, [perplexity(value)])))["ppl wikitext2 @2048"] == [words]


def test_a_task_names_its_shots_and_limit() -> None:
    values = {"piqa": {"acc": 0.5, "acc_stderr": 0.1, "acc_norm": 0.625}}
    found = cells(run(base=(DENSE, [accuracy("piqa", values), accuracy("piqa", values, 5, 100)])))
    assert found["piqa"] == found["piqa 5-shot, limit 100"] == ["50.00% (norm 62.50%)"]


def test_a_group_has_its_mean_and_its_tasks() -> None:
    values = {"boolq": {"acc": 0.5}, "arc_easy": {"acc": 0.75, "acc_norm": 0.25}}
    _, rows = table(run(base=(DENSE, [accuracy("zeroshot", values)])))
    mean, boolq, arc = rows[-3:]
    assert mean == ["zeroshot mean", "62.50%"]
    assert (boolq[0].split()[0], boolq[1]) == ("boolq", "50.00%")
    assert (arc[0].split()[0], arc[1]) == ("arc_easy", "75.00% (norm 25.00%)")


def test_a_limit_is_named_in_every_row_of_a_group() -> None:
    values = {"boolq": {"acc": 0.5}, "arc_easy": {"acc": 0.75}}
    found = cells(run(base=(DENSE, [accuracy("zeroshot", values, limit=20)])))
    numbers = [name for name in found if "%" in found[name][0]]
    assert len(numbers) == 3
    assert all("limit 20" in name for name in numbers)


def test_a_limit_that_cut_nothing_is_not_named() -> None:
    values = {"boolq": {"acc": 0.5}, "arc_easy": {"acc": 0.75}}
    whole, cut = accuracy("zeroshot", values, limit=20), accuracy("zeroshot", values, limit=20)
    for one in whole["metrics"]["tasks"].values():
        one["samples"] = 19
    cut["metrics"]["tasks"]["boolq"]["samples"] = 19
    assert not [name for name in cells(run(base=(DENSE, [whole]))) if "limit" in name]
    assert len([name for name in cells(run(base=(DENSE, [cut]))) if "limit 20" in name]) == 3


@pytest.mark.parametrize(("stride", "used"), [(None, 192), (16, 96)])
def test_first_tokens_are_those_that_windows_covered(stride: int | None, used: int) -> None:
    result = perplexity(12.0, 64, 250)
    result["settings"]["stride"] = stride
    result["metrics"]["windows"] = 3  # of 250 tokens that were allowed, or all that the text has
    words = "" if stride is None else " stride 16"
    assert cells(run(base=(DENSE, [result])))[f"ppl wikitext2 @64{words}, first {used} tokens"] == ["12.00"]


def test_a_merged_checkpoint_whose_zeros_were_filled_has_the_pattern_that_it_has() -> None:
    found = run(pruned=(SPARSE, [perplexity(45.0)]), merged=(DENSE, [perplexity(15.0)]))
    found["stages"] = {"prune": {"metrics": {"method": "wanda", "pattern": "2:4, 0.3 in 1 matrices"}}}
    found["stages"]["merge"] = {"metrics": {"pattern_unchanged": False}}
    assert [row.pattern for row in measures.rows(found)] == ["2:4, 0.3 in 1 matrices", "dense"]


def test_the_configuration_is_that_of_the_records(tmp_path: Path) -> None:
    """Whatever a command that made no stage has said since."""
    made = write_run(tmp_path / "made", seed=3)
    for name, settings in (("pruned", {"prune": {"damp": 0.5}}), ("merged", {"merge": {"dtype": "float32"}})):
        path = made / name / "stage.json"
        write_json(path, json.loads(path.read_text()) | {"settings": {"seed": 3} | settings})
    assert parse_yaml(collect(made)["config"], "") == {
        "run": {"seed": 3},
        "prune": {"damp": 0.5},
        "merge": {"dtype": "float32"},
    }


def test_a_group_of_many_tasks_is_one_row() -> None:
    values = {f"mmlu_{index}": {"acc": index / 100} for index in range(57)}
    found = cells(run(base=(DENSE, [accuracy("mmlu", values, 5, 3)])))
    assert [name for name in found if "mmlu" in name] == ["mmlu 5-shot, limit 3 mean"]
    assert found["mmlu 5-shot, limit 3 mean"] == ["28.00%"]


def test_the_same_task_in_two_groups_keeps_both_numbers() -> None:
    zeroshot = accuracy("zeroshot", {"arc_easy": {"acc": 0.5}, "boolq": {"acc": 0.5}})
    other = accuracy("ai2_arc", {"arc_easy": {"acc": 0.75}, "arc_challenge": {"acc": 0.5}}, 25)
    _, rows = table(run(base=(DENSE, [zeroshot, other])))
    assert sorted(row[1] for row in rows if "arc_easy" in row[0]) == ["50.00%", "75.00%"]


def test_a_metric_that_is_no_share_is_no_percentage() -> None:
    lambada = accuracy("lambada", {"lambada": {"perplexity": 12.5}}, None)
    ((_, value),) = (row for row in table(run(base=(DENSE, [lambada])))[1] if row[0].startswith("lambada"))
    assert value == "12.50"


# --- facts ------------------------------------------------------------------------------------------------------------

PRUNE = {
    "wall_time_s": 12.4,
    "metrics": {"method": "wanda", "pattern": "2:4", "matrices": 14, "mean_relative_output_error": 0.12345},
}
TRAIN = {
    "wall_time_s": 65.0,
    "metrics": {
        "method": "spp",
        "trainable_parameters": 19578880,
        "trainable_share": 0.0029,
        "steps": 300,
        "tokens": 1234567,
        "validation_loss": 1.2345,
    },
}
MERGE = {
    "wall_time_s": 3.0,
    "metrics": {"matrices": 14, "zeros": 7680, "moved_share": 0.9876, "pattern_unchanged": True},
}


def test_what_was_done_in_the_order_it_was_done() -> None:
    stages = {"merge": MERGE, "train": TRAIN, "prune": PRUNE}
    assert facts({"stages": stages}) == [
        "prune: wanda 2:4, 14 matrices, mean relative output error 0.123, 12 s",
        "train: spp, 19,578,880 parameters (0.29%), 300 steps, 1,234,567 tokens, validation loss 1.234, 65 s",
        "merge: 14 matrices, all 7,680 zeros kept, 98.8% of the kept weights moved, 3 s",
    ]


def test_what_was_not_measured_is_left_out() -> None:
    prune = PRUNE | {"metrics": PRUNE["metrics"] | {"method": "magnitude", "mean_relative_output_error": None}}
    train = TRAIN | {"metrics": TRAIN["metrics"] | {"validation_loss": None}}
    lines = facts({"stages": {"prune": prune, "train": train}})
    assert lines[0] == "prune: magnitude 2:4, 14 matrices, 12 s"
    assert "validation" not in lines[1]


def test_no_stages_no_facts() -> None:
    assert facts({"stages": {}}) == []


# --- what pruning did to each module type -----------------------------------------------------------------------------


def layer(name: str, error: float | None = 0.25, damp: float | None = None, sparsity: float = 0.5) -> dict[str, Any]:
    return {
        "name": f"model.layers.{name}",
        "shape": [8, 8],
        "sparsity": sparsity,
        "relative_output_error": error,
        "relative_weight_error": 0.5,
        "damp": damp,
        "seconds": 0.25,
    }


def test_one_row_for_each_module_type() -> None:
    layers = [
        layer("0.self_attn.q_proj", 0.125, sparsity=0.25),
        layer("0.mlp.down_proj", 0.25),
        layer("1.self_attn.q_proj", 0.375, sparsity=0.75),
        layer("1.mlp.down_proj", 0.125),
    ]
    header, rows = type_table(layers)
    measures = ["mean relative output error", "worst", "worst layer"]
    assert header == ["module type", "matrices", "mean sparsity", *measures, "seconds"]
    assert rows == [
        ["`q_proj`", "2", "50.00%", "0.250", "0.375", "`model.layers.1.self_attn.q_proj`", "0.5"],
        ["`down_proj`", "2", "50.00%", "0.188", "0.250", "`model.layers.0.mlp.down_proj`", "0.5"],
    ]


def test_damping_is_a_range_where_there_was_any() -> None:
    layers = [
        layer("0.mlp.up_proj", damp=0.01),
        layer("0.mlp.down_proj", damp=0.01),
        layer("0.mlp.gate_proj"),
        layer("1.mlp.down_proj", damp=0.1),
    ]
    header, rows = type_table(layers)
    assert [row[header.index("damping")] for row in rows] == ["0.01", "0.01 to 0.1", "-"]


def test_without_inputs_it_is_the_error_of_the_weights() -> None:
    header, rows = type_table([layer("0.mlp.up_proj", None)])
    assert "mean relative weight error" in header
    assert not any("output" in name for name in header)
    assert rows[0][3:5] == ["0.500", "0.500"]


def test_every_expert_is_counted_and_the_worst_is_named() -> None:
    layers = [layer(f"{block}.mlp.experts.{i}.gate_proj", block / 10 + i / 100) for block in (0, 1) for i in range(4)]
    _, ((name, matrices, _, mean, worst, where, _),) = type_table(layers)
    assert (name, matrices, mean, worst) == ("`gate_proj`", "8", "0.065", "0.130")
    assert where == "`model.layers.1.mlp.experts.3.gate_proj`"


def test_layers_of_a_run() -> None:
    layers = [layer("0.mlp.up_proj")]
    assert pruned_layers({"stages": {"prune": {"metrics": {"layers": layers}}}}) == layers
    assert pruned_layers({"stages": {"prune": PRUNE}}) == pruned_layers({"stages": {}}) == []


# --- markdown ---------------------------------------------------------------------------------------------------------


def test_a_report_in_markdown() -> None:
    collected = run(base=(DENSE, [perplexity(5.0, 64)]), pruned=(SPARSE, [perplexity(6.0, 64)]))
    collected["stages"] = {"prune": PRUNE}
    assert markdown([collected]) == (
        "# runs/mine\n"
        "\n"
        "|  | base | pruned |\n"
        "| --- | ---: | ---: |\n"
        "| sparsity of pruned matrices | dense | 50.00% |\n"
        "| pattern | dense | 2:4 |\n"
        "| sparse matrices | 0 | 14 |\n"
        "| size, MB | 1.0 | 1.0 |\n"
        "| ppl wikitext2 @64 | 5.00 | 6.00 |\n"
        "\n"
        "- prune: wanda 2:4, 14 matrices, mean relative output error 0.123, 12 s\n"
        "\n"
        "## Distance to the dense model\n"
        "\n"
        "| measure | pruned - base |\n"
        "| --- | ---: |\n"
        "| ppl wikitext2 @64 | +1.00 |\n"
        "\n"
        "Differences of accuracies are percentage points.\n"
        "\n"
        "## How it was made\n"
        "\n"
        "### Evaluations\n"
        "\n"
        "| weights | text or tasks | measured on | dtype | device | seconds |\n"
        "| --- | --- | --- | --- | --- | ---: |\n"
        "| base | ppl wikitext2 @64 | loss ± 0.1000 nats | - | - | - |\n"
        "| pruned | ppl wikitext2 @64 | loss ± 0.1000 nats | - | - | - |\n"
    )


def test_pruned_layers_are_a_table_and_a_figure() -> None:
    prune = PRUNE | {"metrics": PRUNE["metrics"] | {"layers": [layer("0.mlp.up_proj")]}}
    assert markdown([run() | {"stages": {"prune": prune}}]) == (
        "# runs/mine\n"
        "\n"
        "- prune: wanda 2:4, 14 matrices, mean relative output error 0.123, 12 s\n"
        "\n"
        "## Pruning\n"
        "\n"
        "| module type | matrices | mean sparsity | mean relative output error | worst | worst layer | seconds |\n"
        "| --- | ---: | ---: | ---: | ---: | --- | ---: |\n"
        "| `up_proj` | 1 | 50.00% | 0.250 | 0.250 | `model.layers.0.mlp.up_proj` | 0.2 |\n"
        "\n"
        "![relative output error and sparsity by block](pruning.svg)\n"
    )


def test_zeros_that_were_filled_are_not_called_kept() -> None:
    changed = {"pattern_unchanged": False, "filled_zeros": 7000, "lost_weights": 2, "sparsity": 0.0443, "mask": "dense"}
    assert facts({"stages": {"merge": MERGE | {"metrics": MERGE["metrics"] | changed}}}) == [
        "merge: 14 matrices, 7,000 zeros filled, 2 other weights zero, sparsity now 4.43% (mask dense), "
        "98.8% of the kept weights moved, 3 s"
    ]


def test_a_run_without_evaluation_has_no_table() -> None:
    assert markdown([run() | {"stages": {"merge": MERGE}}]) == (
        "# runs/mine\n\n- merge: 14 matrices, all 7,680 zeros kept, 98.8% of the kept weights moved, 3 s\n"
    )


def test_several_runs_follow_the_table_over_all() -> None:
    text = markdown([run(base=(DENSE, [])), run(base=(DENSE, [])) | {"run": "runs/other"}])
    assert text.index("# 2 runs\n") < text.index("\n# runs/mine\n") < text.index("\n\n# runs/other\n")


# --- collecting -------------------------------------------------------------------------------------------------------


def test_records_are_collected_in_the_order_of_the_pipeline(tmp_path: Path) -> None:
    for directory, record in (("pruned", PRUNE), ("adapter", TRAIN), ("merged", MERGE)):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "stage.json").write_text(json.dumps(record))
    (tmp_path / "eval").mkdir()
    for label in ("another", "base", "merged", "pruned"):
        content = {"label": label, "sparsity": DENSE, "results": []}
        (tmp_path / "eval" / f"{label}.json").write_text(json.dumps(content))
    found = collect(tmp_path)
    assert found["run"] == str(tmp_path)
    assert found["stages"] == {"prune": PRUNE, "train": TRAIN, "merge": MERGE}
    assert list(found["checkpoints"]) == ["base", "pruned", "merged", "another"]
    assert found["checkpoints"]["another"] == {"label": "another", "sparsity": DENSE, "results": []}
    assert [row["training"] for row in found["table"]] == [None, None, "spp", None]


def test_an_unfinished_run(tmp_path: Path) -> None:
    (tmp_path / "pruned").mkdir()
    (tmp_path / "pruned" / "stage.json").write_text(json.dumps(PRUNE))
    nothing = {"config": None, "checkpoints": {}, "comparisons": [], "notes": [], "table": []}
    assert collect(tmp_path) == {"run": str(tmp_path), "stages": {"prune": PRUNE}} | nothing


def test_an_empty_directory_holds_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        pipeline.report([tmp_path])


# --- files ------------------------------------------------------------------------------------------------------------

FILES = {"report.md", "report.csv", "report.json", "report.html"}


def test_one_run_has_its_report_in_itself_or_elsewhere(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one")
    before = {path.name for path in one.iterdir()}
    pipeline.report([one], output=tmp_path / "there")
    assert {path.name for path in one.iterdir()} == before
    assert {path.name for path in (tmp_path / "there").iterdir()} == FILES | {"pruning.svg"}
    (found,) = pipeline.report([one])
    assert {path.name for path in one.iterdir()} == before | FILES | {"pruning.svg"}
    assert json.loads((one / "report.json").read_text()) == found
    assert (one / "report.md").read_text() == (tmp_path / "there/report.md").read_text()


def test_several_runs_have_one_report_more_in_the_folder_they_share(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a/one"), write_run(tmp_path / "b/two", pattern="4:8", seed=1)]
    pipeline.report(runs, latex=tmp_path / "tables/all.tex")
    assert {path.name for path in tmp_path.iterdir()} == FILES | {"a", "b", "tables"}
    assert all((run / "report.html").is_file() for run in runs)
    content = json.loads((tmp_path / "report.json").read_text())
    assert [row["pattern"] for row in content["table"]] == ["dense", "2:4", "2:4", "dense", "4:8", "4:8"]
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# 2 runs\n")
    assert "](b/two/pruning.svg)" in text
    assert (tmp_path / "tables/all.tex").read_text().count(r"\\") > 6


def test_the_report_of_several_runs_never_replaces_that_of_one(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "one"), write_run(tmp_path / "two", seed=1)]
    with pytest.raises(UserError, match=r"itself one of the runs.*--output"):
        pipeline.report(runs, output=tmp_path / "two/../one")
    assert not (tmp_path / "one/report.md").exists()


def test_runs_that_share_no_folder_need_one_to_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [write_run(tmp_path / "one"), write_run(tmp_path / "two")]
    monkeypatch.setattr("os.path.commonpath", lambda _: "/")
    with pytest.raises(UserError, match=r"share no folder; name one .*--output"):
        pipeline.report(runs)
    assert not (tmp_path / "one/report.md").exists()


def test_a_run_given_twice_is_one_run(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one")
    assert len(pipeline.report([one, one / "eval/.."])) == 1
    assert not (tmp_path / "report.md").exists()


def test_a_report_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "one")
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "out/report.csv").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "deep")
    before = sorted(tmp_path.rglob("*"))
    for output, latex, said in (
        ("file", None, "--output: .*file is a file, not a directory"),
        ("file/deep", None, "--output: .*deep cannot be made, .*file is not a writable directory"),
        ("link", None, "--output: .*link is a broken link"),
        ("out", None, "--output: .*report.csv is not an ordinary file"),
        (None, "out", "--latex: .*out is not an ordinary file"),
        (None, "pipe", "--latex: .*pipe is not an ordinary file"),
        (None, "file/a.tex", "--latex: .*file is a file, not a directory"),
    ):
        with pytest.raises(UserError, match=said):
            pipeline.report([run], *(name and tmp_path / name for name in (output, latex)))
    assert sorted(tmp_path.rglob("*")) == before


def test_the_whole_report_in_markdown(tmp_path: Path) -> None:
    (found,) = pipeline.report([write_run(tmp_path / "one")])
    text = markdown([found])
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == [
        "## Distance to the dense model",
        "## On the same samples",
        "## Flipped answers",
        "## Pruning",
        "## How it was made",
    ]
    for words in ("sppctl prune run.dir=one", "torch", "x86_64 CPU, 2 threads", "0123456789abcdef", "c" * 16, "d" * 16):
        assert words in text
    assert text.count("sppctl eval run.dir=one") == 1  # one command measured three checkpoints
    assert "gap recovered = (x - pruned) / (base - pruned)" in text
    assert "\n\n\n" not in text
    assert "# <b> & other signs" in text  # of the configuration, as it stands


@pytest.mark.parametrize("gone", ["eval", "pruned", "adapter", "eval/base.json", "eval/pruned.json", "resolved.yaml"])
def test_a_run_in_parts_has_a_report(gone: str, tmp_path: Path) -> None:
    one = write_run(tmp_path / "one")
    whole = one / gone
    shutil.rmtree(whole) if whole.is_dir() else whole.unlink()
    pipeline.report([one])
    assert {path.name for path in one.iterdir()} >= FILES
    assert "None" not in (one / "report.md").read_text()
    assert "None" not in (one / "report.html").read_text()


def test_samples_of_another_evaluation_are_not_compared(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one")
    strange = one / "eval/merged.samples/rte.jsonl"
    strange.write_text("".join(strange.read_text().splitlines(keepends=True)[:100]))
    (found,) = pipeline.report([one])
    names = {pair["second"]: [entry["name"] for entry in pair["entries"]] for pair in found["comparisons"]}
    assert "rte, limit 200" in names["pruned"]
    assert "rte, limit 200" not in names["merged"]
    assert "zeroshot, limit 200 mean" not in names["merged"]
    assert f"- {strange} belongs to another evaluation and is left out" in (one / "report.md").read_text()
    assert "belongs to another evaluation" in (one / "report.html").read_text()


def test_tasks_of_a_group_measured_one_by_one_are_one_line_of_evaluations() -> None:
    found = [accuracy(f"mmlu_{index}", {f"mmlu_{index}": {"acc": 0.5}}, 5) | {"seconds": 1.5} for index in range(57)]
    for result in found:
        result["settings"]["group"] = "mmlu"
    (line,) = evaluation_table(run(base=(DENSE, found)))[1]
    assert line == ["base", "mmlu 5-shot", "570 samples of 57 tasks, 5-shot", "-", "-", "85.5"]


def test_records_of_an_older_version_have_a_report(tmp_path: Path) -> None:
    """No stride, no reference, no windows, no samples, no history, no commands."""
    for directory, record in (("pruned", PRUNE), ("adapter", TRAIN), ("merged", MERGE)):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "stage.json").write_text(json.dumps(record))
    (tmp_path / "eval").mkdir()
    for label, value in (("base", 10.0), ("pruned", 20.0), ("merged", 14.0)):
        content = {"label": label, "sparsity": DENSE, "results": [perplexity(value)]}
        (tmp_path / f"eval/{label}.json").write_text(json.dumps(content))
    pipeline.report([tmp_path])
    text = (tmp_path / "report.md").read_text()
    assert "| ppl wikitext2 @2048 | +10.00 | +4.00 | 51.5% |" in text  # ln(20 / 14) / ln(20 / 10)
    assert "On the same samples" not in text
    assert "<svg" in (tmp_path / "report.html").read_text()
