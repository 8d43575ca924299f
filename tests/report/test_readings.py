from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from made_up_runs import DENSE, write_json, write_run

from sppctl.report.measures import rows
from sppctl.report.readings import ACCURACY, OTHER, measured
from sppctl.report.write import collect
from sppctl.run import pipeline


def text(value: float, documents: str = "x", reference: str | None = None, kl: float | None = None) -> dict[str, Any]:
    settings = {"kind": "perplexity", "text": "prose", "seq_len": 64, "stride": None, "max_tokens": None}
    metrics = {"value": value, "stderr": 0.1, "documents_hash": documents}
    metrics |= {"kl": kl, "kl_stderr": 0.2, "top1_agreement": 0.5} if kl is not None else {}
    return {"settings": settings | {"reference": reference}, "metrics": metrics}


def task(acc: float | None, seed: int = 0, shots: int = 0, name: str = "rte", **settings: Any) -> dict[str, Any]:
    values = {"acc": acc, "acc_stderr": 0.03, "num_fewshot": shots, "samples": 10}
    own = {"kind": "tasks", "tasks": name, "num_fewshot": shots, "limit": None, "seed": seed}
    return {"settings": own | settings, "metrics": {"tasks": {name: values}, "mean": {}, "groups": {}, "members": 1}}


def run(seed: int | None = 0, **results: list[dict[str, Any]]) -> dict[str, Any]:
    stages = {} if seed is None else {"merge": {"seed": seed, "metrics": {}}}
    checkpoints = {label: {"sparsity": DENSE, "results": own} for label, own in results.items()}
    return {"run": "r", "config": None, "stages": stages, "checkpoints": checkpoints}


# --- equal names are equal measures -----------------------------------------------------------------------------------


def test_another_version_of_the_text_is_another_measure() -> None:
    given = run(base=[text(5.0, "a" * 16)], merged=[text(6.0, "b" * 16)])
    named, notes = measured(given)
    assert [list(own) for own in named.values()] == [["ppl prose @64, text aaaaaaaa"], ["ppl prose @64, text bbbbbbbb"]]
    assert rows(given)[1].difference == {}
    assert notes == [
        "ppl prose @64 is not one measure, and only equal ones are compared: base text aaaaaaaa, merged text bbbbbbbb"
    ]


def test_examples_drawn_by_other_seeds_are_another_measure() -> None:
    given = run(1, base=[task(0.5, 0, 5), task(0.6, 1, 5)], pruned=[task(0.4, 1, 5)], merged=[task(0.7, 2, 5)])
    named, notes = measured(given)
    assert list(named["base"]) == ["rte 5-shot, seed 0", "rte 5-shot"]  # the run's own goes without saying
    assert [row.difference for row in rows(given)] == [{}, {"rte 5-shot": pytest.approx(-0.2)}, {}]
    assert len(notes) == 1


def test_without_examples_the_seed_changes_nothing() -> None:
    named, notes = measured(run(base=[task(0.5, 0)], merged=[task(0.7, 1)]))
    assert list(named["base"]) == list(named["merged"]) == ["rte"]
    assert notes == []


def test_another_system_prompt_is_another_measure() -> None:
    named, notes = measured(
        run(base=[task(0.5, system_prompt="Be good.")], merged=[task(0.7, system_prompt="Be bad.")])
    )
    (base,), (merged,) = named.values()
    assert base.startswith("rte system prompt, system prompt ")
    assert base != merged
    assert len(notes) == 1


def test_divergences_from_other_models_and_tasks_of_other_files() -> None:
    pruned = [
        text(6.0, reference="a" * 16, kl=0.5),
        text(6.0, reference="b" * 16, kl=0.25),
        task(0.5),
    ]
    merged = [task(0.7)]
    for one, letter in ((pruned[2], "c"), (merged[0], "d")):
        one["metrics"]["sources"] = {"digest": letter * 16}
    named, _ = measured(run(pruned=pruned, merged=merged))
    assert {name: measure.value for name, measure in named["pruned"].items() if name.startswith("KL")} == {
        "KL(dense || model) prose @64, dense model aaaaaaaa": 0.5,
        "KL(dense || model) prose @64, dense model bbbbbbbb": 0.25,
    }
    assert "ppl prose @64" in named["pruned"]  # which no other model changes
    assert list(named["merged"]) == ["rte, task files dddddddd"]


# --- numbers and their errors -----------------------------------------------------------------------------------------


def test_errors_of_texts_and_tasks() -> None:
    named, _ = measured(run(merged=[text(5.0, reference="a", kl=0.5), task(0.5)]))
    found = {name: measure.stderr for name, measure in named["merged"].items()}
    assert found == {
        "ppl prose @64": 0.1,
        "KL(dense || model) prose @64": 0.2,
        "top-1 agreement prose @64": None,
        "rte": 0.03,
    }


def test_the_error_of_a_mean_is_lm_evals_or_that_of_independent_means() -> None:
    group: dict[str, Any] = {"group": "both"}
    results = [task(acc, name=name, **group) for name, acc in (("a", 0.5), ("b", 0.75))]
    for result in results:
        result["metrics"] |= {"groups": {"both": {}}, "members": 2}
    found = measured(run(base=results))[0]["base"]
    assert found["both mean"].stderr == pytest.approx(math.hypot(0.03, 0.03) / 2)
    assert found["  a (both)"].stderr == 0.03
    for result in results:  # averaged by samples
        result["metrics"] |= {"groups": {"both": {"acc": True}}}
    pooled = math.sqrt(2 * 9 * 10 * 0.03**2 / 18 / 20)
    assert measured(run(base=results))[0]["base"]["both mean"].stderr == pytest.approx(pooled)


def test_a_group_in_one_go(tmp_path: Path) -> None:
    found = measured(collect(write_run(tmp_path / "one")))[0]["merged"]
    assert found["  rte (zeroshot, limit 200)"].stderr == 0.035
    assert found["zeroshot, limit 200 mean"].stderr == pytest.approx(0.035 / math.sqrt(7))


def test_what_is_no_share_is_no_accuracy() -> None:
    result = task(None)
    result["metrics"]["tasks"] = {"rte": {"metric": "perplexity", "perplexity": 12.5, "perplexity_stderr": 0.5}}
    (found,) = measured(run(base=[result, task(0.5, name="boolq")]))[0].values()
    assert [(measure.kind, measure.value, measure.stderr) for measure in found.values()] == [
        (OTHER, 12.5, 0.5),
        (ACCURACY, 0.5, 0.03),
    ]


def test_the_gap_of_a_run_is_no_other_checkpoints(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one")
    foreign = json.loads((one / "eval/merged.json").read_text()) | {"label": "other", "fingerprint": "other"}
    write_json(one / "eval/other.json", foreign)
    merged, other = (row for row in rows(collect(one)) if row.checkpoint in ("merged", "other"))
    assert merged.recovered
    assert other.recovered == {}
    assert other.difference


def test_json_has_no_infinity(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one")
    content = json.loads((one / "eval/pruned.json").read_text())
    content["results"][0]["metrics"] |= {"value": float("inf"), "nll": float("nan"), "stderr": float("nan")}
    content["results"][0]["metrics"]["window_nll"][3] = float("inf")
    (one / "eval/pruned.json").write_text(json.dumps(content))
    pipeline.report([one])
    found = json.loads((one / "report.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert found["checkpoints"]["pruned"]["results"][0]["metrics"]["value"] is None
    assert "base and pruned, wikitext2: 1 windows have no finite loss and are left out" in found["notes"]
