"""Rows of runs, how they compare to the dense model and to each other, and that all is computed once."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import made_up_runs
import numpy as np
import pytest
from made_up_runs import (
    change_record,
    change_results,
    load,
    save,
    stage_of,
    study_of,
    task,
    text,
    with_numbers,
    write_run,
)

from sppctl import show
from sppctl.config.yaml12 import parse_yaml
from sppctl.evaluate.results import Results
from sppctl.evaluate.values import Kind
from sppctl.report import significance, study
from sppctl.report.study import RunStudy, Study, gap_recovered, headlines, quantities, short_names
from sppctl.run import pipeline

NAME = "ppl wikitext2 @512"


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> RunStudy:
    return RunStudy.of(write_run(tmp_path_factory.mktemp("runs") / "one"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks by two seeds."""
    root = tmp_path_factory.mktemp("sweep")
    for rank in (8, 16):
        for seed in (0, 1):
            run = write_run(root / f"r{rank}-s{seed}", seed=seed)
            train = f"{{rank: {rank}, log_steps: {seed + 1}}}"
            config = f"run: {{dir: x, seed: {seed}}}\nmodel: {{path: a/model, device: cpu}}\ntrain: {train}\n"
            (run / "resolved.yaml").write_text(config)
    return root


@pytest.fixture(scope="module")
def grid(folder: Path) -> list[RunStudy]:
    return [RunStudy.of(run) for run in sorted(folder.iterdir()) if run.is_dir()]


# --- one run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "base", "pruned", "value", "share"),
    [
        (Kind.ACCURACY, 0.7, 0.5, 0.6, 0.5),
        (Kind.ACCURACY, 0.7, 0.5, 0.4, -0.5),  # worse than pruned
        (Kind.ACCURACY, 0.5, 0.6, 0.6, None),  # pruning did no harm
        (Kind.ACCURACY, 0.5, 0.5, 0.6, None),
        (Kind.PERPLEXITY, 8.0, 32.0, 16.0, 0.5),  # halfway between 2^3 and 2^5
        (Kind.PERPLEXITY, 10.0, 40.0, 10.0, 1.0),
        (Kind.PERPLEXITY, 10.0, 9.0, 9.5, None),
        (Kind.DIVERGENCE, 0.0, 1.0, 0.5, None),  # the dense model has none of itself
    ],
)
def test_share_of_the_gap(kind: Kind, base: float, pruned: float, value: float, share: float | None) -> None:
    assert gap_recovered(kind, base, pruned, value) == (None if share is None else pytest.approx(share, abs=1e-12))


def test_rows_say_how_a_checkpoint_was_made(one: RunStudy) -> None:
    assert [(row.checkpoint, row.method, row.pattern, row.training, row.seed) for row in one.rows] == [
        ("base", None, "dense", None, 0),
        ("pruned", "wanda", "2:4", None, 0),
        ("merged", "wanda", "2:4", "spp", 0),
    ]
    base, pruned, merged = (row.to_json() for row in one.rows)
    assert base["difference"] == base["recovered"] == pruned["recovered"] == {}
    dense, sparse, healed = (row["measures"][NAME]["value"] for row in (base, pruned, merged))
    assert pruned["difference"][NAME] == sparse - dense
    assert merged["recovered"][NAME] == pytest.approx(math.log(healed / sparse) / math.log(dense / sparse))
    assert "KL(dense || model) wikitext2 @512" not in merged["difference"]


def test_perplexities_first_and_what_a_paper_quotes(one: RunStudy) -> None:
    mean = "zeroshot, limit 200 mean"
    names = [quantity.label for quantity in quantities(one.rows)]
    assert names[:4] == [NAME, "KL(dense || model) wikitext2 @512", "top-1 agreement wikitext2 @512", mean]
    assert [quantity.label for quantity in headlines(one.rows)] == [NAME, mean]


def test_a_merged_checkpoint_whose_zeros_were_filled_has_the_pattern_that_it_has() -> None:
    pruned = stage_of("prune", {"method": "wanda", "pattern": "2:4, 0.3 in 1 matrices"})
    stages = {"prune": pruned, "merge": stage_of("merge", {"pattern_unchanged": False})}
    assert [row.pattern for row in study_of(stages=stages, pruned=[], merged=[]).rows] == [
        pruned.metrics.pattern,
        "2:4",
    ]


def test_the_gap_of_a_run_is_no_other_checkpoints(tmp_path: Path) -> None:
    run = write_run(tmp_path / "one")
    foreign = load(run, "merged")
    save(run, Results("other", "other", "other", foreign.sparsity, foreign.results))
    merged, other = (row for row in RunStudy.of(run).rows if row.checkpoint in ("merged", "other"))
    assert merged.recovered
    assert other.recovered == {}
    assert other.difference


def test_the_configuration_is_that_of_the_records(tmp_path: Path) -> None:
    """Whatever a command that made no stage has set since."""
    run = write_run(tmp_path / "made", seed=3)
    model = {"path": "a/b", "compute_dtype": "float32"}
    change_record(run, "prune", settings={"seed": 3, "model": model, "prune": {"damp": 0.5}})
    change_record(run, "train", settings={"seed": 3, "model": {"compute_dtype": "bfloat16"}})
    change_record(run, "merge", settings={"merge": {"dtype": "float32"}})
    config = {
        "run": {"seed": 3},
        "model": {"path": "a/b", "compute_dtype": "bfloat16"},
        "prune": {"damp": 0.5},
        "merge": {"dtype": "float32"},
    }
    assert parse_yaml(RunStudy.of(run).config or "", "") == config


def test_samples_of_another_evaluation_are_not_compared(tmp_path: Path) -> None:
    run = write_run(tmp_path / "one")
    strange = run / "eval/merged.samples/rte.jsonl"
    strange.write_text("".join(strange.read_text().splitlines(keepends=True)[:100]))
    found = RunStudy.of(run)
    names = {pair.second: [entry.name for entry in pair.entries] for pair in found.comparisons}
    assert "rte, limit 200" in names["pruned"]
    assert not {"rte, limit 200", "zeroshot, limit 200 mean"} & set(names["merged"])
    assert found.notes == [f"{strange} belongs to another evaluation and is left out"]


def test_windows_without_a_finite_loss_are_noted_and_have_no_share_of_the_gap(tmp_path: Path) -> None:
    run = write_run(tmp_path / "one")

    def spoil(content: Results) -> None:
        losses = [None, *content.texts[0].numbers.window_nll[1:]]
        content.add(with_numbers(content.texts[0], value=math.inf, window_nll=losses))

    change_results(run, "pruned", spoil)
    study = RunStudy.of(run)
    assert "base and pruned, wikitext2 @512: 1 windows have no finite loss and are left out" in study.notes
    assert NAME not in study.rows[2].to_json()["recovered"]


# --- several runs: columns --------------------------------------------------------------------------------------------


def test_keys_that_differ_belong_to_the_checkpoints_that_depend_on_them(grid: list[RunStudy]) -> None:
    rows = Study(grid).rows
    assert short_names(rows) == {"run.seed": "seed", "train.rank": "rank"}
    assert [(row.checkpoint, row.settings) for row in rows[3:6]] == [
        ("base", {}),
        ("pruned", {"run.seed": 1}),
        ("merged", {"run.seed": 1, "train.rank": 16}),
    ]


KEYS = """
model: {{path: {0}}}
prune: {{calibration: {{seq_len: {1}}}}}
train: {{scale: 1, data: {{seq_len: {1}}}}}
eval: {{seq_len: {1}}}
"""
SAME_LEAF = ("prune.calibration.seq_len", "train.data.seq_len")


@pytest.mark.parametrize(
    ("configs", "names"),
    [
        # what was measured with is in the names of quantities, so keys of eval are no columns
        ([KEYS.format("a", 0), KEYS.format("b", 1)], {"model.path": "model"} | {key: key for key in SAME_LEAF}),
        # a run that lacks a stage takes no columns from others
        (["train: {rank: 4}", "train: {rank: 8}", "prune: {damp: 1}"], {"train.rank": "rank"}),
        # a record leaves out later keys that have their default
        (
            ["prune: {damp: 1}", "prune: {damp: 1, reconstruct_target: dense}"],
            {"prune.reconstruct_target": "reconstruct_target"},
        ),
        # a mapping is one value, whatever its names
        (["train: {data: {dataset: {a: 1, b: 3}}}", "train: {data: {dataset: a}}"], {"train.data.dataset": "dataset"}),
        (["prune: {overrides: {}}", "prune: {overrides: {down_proj: 0.4}}"], {"prune.overrides": "overrides"}),
        ([None, None], {}),
    ],
)
def test_names_of_the_keys_that_differ(configs: list[str | None], names: dict[str, str], grid: list[RunStudy]) -> None:
    runs = [replace(run, config=config) for run, config in zip(grid, configs, strict=False)]
    assert short_names(Study(runs).rows) == names


def test_runs_computed_in_several_dtypes_say_so() -> None:
    dtypes = ["bfloat16", "float32"]
    rows = Study([study_of(merged=[text(5.0, dtype=dtype)]) for dtype in dtypes]).rows
    assert [row.settings for row in rows] == [{"model.compute_dtype": dtype} for dtype in dtypes]


def names_of(*runs: RunStudy) -> list[list[str]]:
    return [[quantity.label for quantity in row.values] for row in Study(runs).rows]


def test_runs_computed_in_the_same_dtypes_for_other_quantities_share_no_columns() -> None:
    narrow, wide = "bfloat16", "float32"
    runs = [study_of(merged=[text(5.0, dtype=a), task(0.5, dtype=b)]) for a, b in ((wide, narrow), (narrow, wide))]
    assert names_of(*runs) == [
        ["ppl prose @64, computed in float32", "rte, computed in bfloat16"],
        ["ppl prose @64, computed in bfloat16", "rte, computed in float32"],
    ]
    assert names_of(runs[0], runs[0]) == [["ppl prose @64", "rte"]] * 2


def test_other_batch_sizes_have_other_names() -> None:
    fixed, automatic = (study_of(merged=[task(0.5, "arc_easy", batch_size=size)]) for size in (1, None))
    assert names_of(fixed, automatic) == [["arc_easy, batch size 1"], ["arc_easy"]]
    assert names_of(fixed, fixed) == [["arc_easy"]] * 2


def test_examples_of_another_seed_than_the_runs_have_other_names() -> None:
    def measured(seed: int, drawn: int) -> RunStudy:
        return study_of(seed, merged=[task(0.5, "rte", 2, seed=drawn)])

    assert names_of(measured(0, 0), measured(1, 1)) == [["rte 2-shot"]] * 2
    assert names_of(measured(0, 0), measured(1, 1), measured(0, 5)) == [*[["rte 2-shot"]] * 2, ["rte 2-shot, seed 5"]]
    assert names_of(measured(0, 5), measured(1, 5)) == [["rte 2-shot"]] * 2  # the same examples


def test_perplexities_of_other_tokens_have_other_names() -> None:
    same, other = (study_of(base=[text(4.0, tokens_hash=h)], merged=[text(5.0, tokens_hash=h)]) for h in ("a" * 8, "b"))
    rows = Study([same, other]).rows
    names = [[quantity.label for quantity in row.values] for row in rows]
    assert names == [["ppl prose @64, tokens aaaaaaaa"]] * 2 + [["ppl prose @64, tokens b"]] * 2
    assert [list(row.difference.values()) for row in rows] == [[], [1.0], [], [1.0]]
    assert all(row.difference.keys() <= row.values.keys() for row in rows)
    assert [quantity.label for row in Study([same, same]).rows for quantity in row.values] == ["ppl prose @64"] * 4


def test_a_checkpoint_that_runs_share_is_there_once(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name) for name in ("one", "two")]
    fingerprint = load(runs[0], "pruned").fingerprint
    for stage, entries in {"prune": {"output": fingerprint}, "train": {"inputs": {}}, "merge": {"inputs": {}}}.items():
        change_record(runs[1], stage, **entries)
    for label in ("base", "pruned"):
        save(runs[1], load(runs[0], label))
    assert [row.checkpoint for row in Study.of(runs).rows] == ["base", "pruned", "merged", "merged"]
    unknown = study_of(base=[])
    assert len(Study([unknown, unknown]).rows) == 2  # nothing says that they are the same


def test_no_run_disappears_because_its_weights_equal_anothers(tmp_path: Path) -> None:
    """A training that moved nothing, a pruning that came out the same by another method."""
    one, other = (RunStudy.of(write_run(tmp_path / name, method=name)) for name in ("wanda", "magnitude"))
    same = replace(other, checkpoints=one.checkpoints)
    rows = [(row.checkpoint, row.method) for row in Study([one, same]).rows]
    assert rows[:3] == [("base", None), ("pruned", "wanda"), ("merged", "wanda")]
    assert rows[3:] == [("pruned", "magnitude"), ("merged", "magnitude")]


def test_mean_and_deviation_over_seeds(grid: list[RunStudy]) -> None:
    merged = [group for group in Study(grid).seeds if group.row.checkpoint == "merged"]
    assert [(group.row.settings, group.seeds) for group in merged] == [({"train.rank": 16}, 2), ({"train.rank": 8}, 2)]
    own = [run.checkpoints["merged"].texts[0].numbers.value or 0 for run in grid[:2]]
    spread = {quantity.label: numbers for quantity, numbers in merged[0].numbers.items()}
    assert spread[NAME] == (statistics.fmean(own), statistics.stdev(own))
    assert Study(grid[:1]).seeds == []


def test_runs_of_other_data_are_no_seeds_of_each_other(grid: list[RunStudy]) -> None:
    mixtures = ("{alpaca: 3, c4: 1}", "{alpaca: 1, c4: 3}")
    config = "run: {{seed: {0}}}\ntrain: {{data: {{dataset: {1}}}}}".format
    runs = [
        replace(run, config=config(seed, data)) for seed, (run, data) in enumerate(zip(grid, mixtures, strict=False))
    ]
    study = Study(runs)
    assert [group for group in study.seeds if group.row.checkpoint == "merged"] == []
    merged = [row.settings["train.data.dataset"] for row in study.rows if row.checkpoint == "merged"]
    assert merged == list(mixtures)


def test_tasks_of_other_prompts_or_files_are_no_seeds_of_each_other() -> None:
    for first, second in (
        ({"system_prompt": "Be good."}, {"system_prompt": "Be bad."}),
        ({"sources": {"digest": "c"}}, {"sources": {"digest": "d"}}),
    ):
        runs = [study_of(seed, merged=[task(0.5, **own)]) for seed, own in enumerate((first, second))]
        names = [quantity.label for row in Study(runs).rows for quantity in row.values]
        assert len(set(names)) == 2


# --- several runs: the same samples -----------------------------------------------------------------------------------


def test_merged_checkpoints_of_runs_on_the_same_samples(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, training=name) for name in ("spp", "lora")]

    def better(content: Results) -> None:
        result = content.texts[0]
        content.add(with_numbers(result, window_nll=[loss - 51.1 for loss in result.numbers.window_nll or [] if loss]))

    change_results(runs[1], "merged", better)
    (pair,) = Study.of(runs).comparisons
    assert (pair.first, pair.second) == ("spp", "lora")
    entry, mean = pair.entries
    assert (entry.name, mean.name, mean.samples) == ("wikitext2 @512", "zeroshot, limit 200 mean", 1400)
    assert entry.paired is not None
    assert mean.paired is not None
    assert (entry.paired.difference, mean.paired.difference) == (pytest.approx(-0.1), 0)
    assert Study.of(runs[:1]).comparisons == []
    first, second = (RunStudy.of(run) for run in runs)
    assert Study([first, study_of(base=[]), second]).comparisons[0].entries


@pytest.mark.parametrize(("shots", "measures"), [({}, {"nll", "acc"}), ({"num_fewshot": 5}, {"nll"})])
def test_another_seed_is_compared_where_it_draws_nothing(
    shots: dict[str, int], measures: set[str], tmp_path: Path
) -> None:
    runs = [write_run(tmp_path / name) for name in ("one", "two")]

    def again(content: Results) -> None:
        content.results = [
            *content.texts,
            *(made_up_runs.with_measure(result, seed=5, **shots) for result in content.tasks),
        ]

    change_results(runs[1], "merged", again)
    assert {entry.measure for entry in Study.of(runs).comparisons[0].entries} == measures


def test_windows_of_other_tokens_are_no_pairs() -> None:
    losses = {"window_nll": [1.0, 2.0], "stride": 64}
    runs = [study_of(merged=[text(5.0, tokenizer=name, **losses)]) for name in "aab"]
    assert len(Study(runs[:2]).comparisons) == 1
    assert Study(runs[1:]).comparisons == []


# --- once -------------------------------------------------------------------------------------------------------------


def test_everything_is_computed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report over four runs and one of each: Markdown, HTML, CSV, JSON, LaTeX, and on the terminal."""
    calls: Counter[str] = Counter()

    def count(name: str, original: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        calls[name] += 1
        return original(*arguments, **options)

    counted = {study: ("Row", "OverSeeds", "distinguish"), significance: ("resampled_means", "read_samples")}
    for module, name in ((module, name) for module, names in counted.items() for name in names):
        monkeypatch.setattr(module, name, partial(count, name, getattr(module, name)))
    runs = [run for run in sorted(folder.iterdir()) if run.is_dir()]
    found = pipeline.report(runs, latex=folder / "all.tex")
    show.report(found, as_json=False)
    # three checkpoints in each run; a text and seven tasks of three pairs in each, and of three pairs of runs; pruned
    # checkpoints over four runs, merged ones over two ranks
    assert calls.pop("resampled_means") == 8 * (4 * 3 + 3)
    assert calls == {"Row": 4 * 3, "distinguish": 4 + 1, "read_samples": 4 * 3, "OverSeeds": 1 + 2}
    assert np.isfinite([entry.paired.p for entry in found.comparisons[0].entries if entry.paired]).all()
