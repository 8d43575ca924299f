from __future__ import annotations

import copy
import csv
import io
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from made_up_runs import DENSE, write_run

from sppctl.report import plots_results
from sppctl.report.over_runs import comparisons, over_seeds, places, rows_of_all, short_names
from sppctl.report.tables import seed_table, to_csv, value_table
from sppctl.report.write import collect
from sppctl.run import pipeline

pytestmark = pytest.mark.slow


def config(model: str, rank: int, seed: int) -> str:
    train = f"{{rank: {rank}, log_steps: {seed + 1}}}"
    return f"run: {{dir: x, seed: {seed}}}\nmodel: {{path: {model}, device: cpu}}\ntrain: {train}\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks by two seeds."""
    root = tmp_path_factory.mktemp("sweep")
    for rank in (8, 16):
        for seed in (0, 1):
            run = write_run(root / f"r{rank}-s{seed}", seed=seed)
            (run / "resolved.yaml").write_text(config("a/model", rank, seed))
    return root


@pytest.fixture(scope="module")
def runs(folder: Path) -> list[dict[str, Any]]:
    return [collect(run) for run in sorted(folder.iterdir()) if run.is_dir()]


def test_keys_that_differ_are_columns_of_the_checkpoints_that_depend_on_them(runs: list[dict[str, Any]]) -> None:
    found = rows_of_all(runs)
    assert short_names(found) == {"run.seed": "seed", "train.rank": "rank"}
    header, lines = value_table(found)
    assert header[:7] == ["run", "checkpoint", "method", "pattern", "training", "seed", "rank"]
    assert [line[0:2] + line[5:7] for line in lines if line[0] in ("r16-s0", "r16-s1")] == [
        *(["r16-s0", "base", "-", "-"], ["r16-s0", "pruned", "0", "-"], ["r16-s0", "merged", "0", "16"]),
        *(["r16-s1", "base", "-", "-"], ["r16-s1", "pruned", "1", "-"], ["r16-s1", "merged", "1", "16"]),
    ]


def test_csv_has_their_full_names(runs: list[dict[str, Any]]) -> None:
    lines = list(csv.DictReader(io.StringIO(to_csv(rows_of_all(runs)))))
    assert {(line["seed"], line["train.rank"]) for line in lines if line["checkpoint"] == "merged"} == {
        *(("0", "8"), ("1", "8"), ("0", "16"), ("1", "16"))
    }
    assert {line["train.rank"] for line in lines if line["checkpoint"] == "pruned"} == {""}


def test_models_have_names_and_equal_leaves_are_written_out(runs: list[dict[str, Any]]) -> None:
    """What was measured with is in the measures' names, so keys of eval are no columns."""
    configs = tuple(
        f"model: {{path: {path}}}\nprune: {{calibration: {{seq_len: {n}}}}}\n"
        f"train: {{scale: 1, data: {{seq_len: {n}}}}}\neval: {{seq_len: {n}}}"
        for n, path in enumerate("ab")
    )
    found = rows_of_all([run | {"config": text} for run, text in zip(runs, configs, strict=False)])
    assert short_names(found) == {
        "model.path": "model",
        "prune.calibration.seq_len": "prune.calibration.seq_len",
        "train.data.seq_len": "train.data.seq_len",
    }


def test_runs_that_lack_a_stage_take_no_columns_from_others(runs: list[dict[str, Any]]) -> None:
    configs = ("train: {rank: 4}", "train: {rank: 8}", "prune: {damp: 1}")
    found = rows_of_all([run | {"config": text} for run, text in zip(runs, configs, strict=False)])
    assert short_names(found) == {"train.rank": "rank"}


def test_runs_without_a_configuration_have_no_such_columns(runs: list[dict[str, Any]]) -> None:
    assert short_names(rows_of_all([run | {"config": None} for run in runs])) == {}


def test_a_checkpoint_that_runs_share_stands_there_once(tmp_path: Path) -> None:
    one = collect(write_run(tmp_path / "one"))
    other = collect(write_run(tmp_path / "two"))
    for label in ("base", "pruned"):
        other["checkpoints"][label] = one["checkpoints"][label]
    assert [row.checkpoint for row in rows_of_all([one, other])] == ["base", "pruned", "merged", "merged"]
    found = rows_of_all([{**one, "checkpoints": {"base": {"sparsity": DENSE, "results": []}}}] * 2)
    assert len(found) == 2  # nothing says that they are the same


def test_no_run_disappears_because_its_weights_equal_anothers(tmp_path: Path) -> None:
    """A training that moved nothing, a pruning that came out the same by another method."""
    one, other = (collect(write_run(tmp_path / name, method=name)) for name in ("wanda", "magnitude"))
    other["checkpoints"] = one["checkpoints"]
    found = rows_of_all([one, other])
    assert [(row.checkpoint, row.method) for row in found] == [
        *((("base"), None), ("pruned", "wanda"), ("merged", "wanda")),
        *(("pruned", "magnitude"), ("merged", "magnitude")),
    ]


def test_mean_and_deviation_over_seeds(runs: list[dict[str, Any]]) -> None:
    groups = over_seeds(rows_of_all(runs))
    name = "ppl wikitext2 @512"
    merged = [group for group in groups if group.row.checkpoint == "merged"]
    assert [(group.row.settings, group.seeds) for group in merged] == [({"train.rank": 16}, 2), ({"train.rank": 8}, 2)]
    own = [run["checkpoints"]["merged"]["results"][0]["metrics"]["value"] for run in runs[:2]]
    assert merged[0].spread(name) == (statistics.fmean(own), statistics.stdev(own))
    header, lines = seed_table(rows_of_all(runs))
    line = dict(zip(header, next(line for line in lines if line[0] == "merged"), strict=True))
    assert (line["rank"], line["seeds"]) == ("16", "2")
    assert line[name] == f"{statistics.fmean(own):.2f} ± {statistics.stdev(own):.2f}"
    assert seed_table(rows_of_all(runs[:1]))[1] == []


def test_bars_are_labelled_by_the_keys_that_differ(runs: list[dict[str, Any]]) -> None:
    axes = plots_results.bars(rows_of_all(runs[:2])).axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[-1] == "merged wanda 2:4 spp seed 1"


def test_the_report_over_runs_has_both_tables(folder: Path) -> None:
    pipeline.report([run for run in sorted(folder.iterdir()) if run.is_dir()])
    assert "## Over seeds" in (folder / "report.md").read_text()
    assert "<h3>Over seeds</h3>" in (folder / "report.html").read_text()
    assert {row["settings"].get("train.rank") for row in json.loads((folder / "report.json").read_text())["table"]} == {
        *(None, 8, 16)
    }


def test_merged_checkpoints_of_runs_on_the_same_samples(tmp_path: Path) -> None:
    runs = [collect(write_run(tmp_path / name, training=name)) for name in ("spp", "lora")]
    better = runs[1]["checkpoints"]["merged"]["results"][0]["metrics"]
    better["window_nll"] = [loss - 51.1 for loss in better["window_nll"]]
    (pair,) = comparisons(runs)
    assert (pair["first"], pair["second"]) == ("spp", "lora")
    text, mean = pair["entries"]
    assert text["name"] == "wikitext2"
    assert text["difference"] == pytest.approx(-0.1)
    assert (mean["name"], mean["samples"], mean["difference"]) == ("zeroshot, limit 200 mean", 1400, 0)
    assert comparisons(runs[:1]) == []
    assert [entry["name"] for entry in comparisons([runs[0], runs[0] | {"checkpoints": {}}, runs[1]])[0]["entries"]]
    pipeline.report([tmp_path / "spp", tmp_path / "lora"])
    for name, words in (("report.md", "| spp to lora | "), ("report.html", ">spp to lora<"), ("report.json", '"lora"')):
        assert words in (tmp_path / name).read_text()


def test_another_seed_is_compared_where_it_draws_nothing(tmp_path: Path) -> None:
    runs = [collect(write_run(tmp_path / name)) for name in ("one", "two")]
    runs[1]["checkpoints"]["merged"]["results"][1]["settings"]["seed"] = 5
    assert len(comparisons(runs)[0]["entries"]) == 2
    runs[1]["checkpoints"]["merged"]["results"][1]["settings"]["num_fewshot"] = 5
    assert len(comparisons(runs)[0]["entries"]) == 1


def test_windows_of_other_tokens_are_no_pairs(tmp_path: Path) -> None:
    runs = [collect(write_run(tmp_path / name)) for name in ("one", "two")]
    for run, tokenizer in zip(runs, ("a", "b"), strict=True):
        run["checkpoints"]["merged"]["results"][0]["tokenizer"] = tokenizer
    assert [entry["measure"] for entry in comparisons(runs)[0]["entries"]] == ["acc"]


def test_long_titles_and_labels_stay_inside(runs: list[dict[str, Any]]) -> None:
    text = "/a/long/way/to/the/text/that/was/read.txt"
    changed = copy.deepcopy(runs)
    for run in changed:
        for content in run["checkpoints"].values():
            content["results"][0]["settings"]["text"] = text
    figure = plots_results.bars(rows_of_all(changed))
    figure.savefig(io.BytesIO())
    for axes in figure.axes:
        assert axes.get_title(loc="left").replace("\n", "").replace(" ", "").count("/a/long/way") == 1
        assert axes._left_title.get_window_extent().x1 <= figure.bbox.width  # type: ignore[attr-defined]


def test_runs_are_named_from_the_folder_that_they_share(runs: list[dict[str, Any]]) -> None:
    assert list(places(run["run"] for run in runs).values()) == ["r16-s0", "r16-s1", "r8-s0", "r8-s1"]
