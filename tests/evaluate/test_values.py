"""What numbers are called, what they mean, and which of them may be compared."""

from __future__ import annotations

import math
from typing import Any

import pytest
from made_up_runs import study_of, task, text, with_measure, with_numbers

from sppctl.evaluate.results import AnyResult, TaskNumbers, TaskScores
from sppctl.evaluate.values import Kind, Metric, Value, distinguish, title_of, values_of


def labels(*results: AnyResult) -> list[str]:
    return [value.quantity.label for value in values_of(results)]


def named(seed: int | None = 0, **results: list[AnyResult]) -> tuple[dict[str, dict[str, Value]], list[str]]:
    """Values by checkpoint and name, and the notes."""
    found, notes = distinguish({label: values_of(own) for label, own in results.items()}, seed)
    return {label: {one.label: value for one, value in own.items()} for label, own in found.items()}, notes


def family(*accuracies: float, **options: Any) -> list[Any]:
    """Tasks a, b, ... of a group that were measured one by one."""
    place = {"group": "both", "groups": {"both": {}}, "members": len(accuracies)} | options
    return [task(acc, "abcdefghijkl"[at], **place) for at, acc in enumerate(accuracies)]


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "names"),
    [
        (text(5.0, 2048), ["ppl prose @2048"]),
        (text(5.0, max_tokens=250, windows=3), ["ppl prose @64, first 192 tokens"]),  # that windows cover
        (text(5.0, stride=16, max_tokens=250, windows=3), ["ppl prose @64 stride 16, first 96 tokens"]),
        (
            text(5.0, reference="a", kl=0.5),
            ["ppl prose @64", "KL(dense || model) prose @64", "top-1 agreement prose @64"],
        ),
        (
            text(5.0, kl=0.5, compared_with="other"),
            [
                "ppl prose @64",
                "KL(dense || model) prose @64 (dense: other)",
                "top-1 agreement prose @64 (dense: other)",
            ],
        ),
        (task(0.5), ["rte"]),
        (task(0.5, shots=5, limit=10), ["rte 5-shot, limit 10"]),
        (task(0.5, limit=20), ["rte"]),  # which cut none of its ten
        (task(0.5, shots=2, chat_template=True, system_prompt="Add."), ["rte 2-shot chat system prompt"]),
        (task(None, scores={"exact_match": 0.5}, metric="exact_match"), ["rte exact match"]),
        (task(None, scores={"word_perplexity": 31.5}, metric="word_perplexity"), ["rte word perplexity (lm-eval)"]),
    ],
)
def test_a_name_says_what_was_measured_and_what_limits_it(result: AnyResult, names: list[str]) -> None:
    assert labels(result) == names


def test_the_count_of_examples_is_that_of_the_prompts() -> None:
    asked_for_three = with_measure(task(0.5, shots=0), num_fewshot=3)
    assert labels(asked_for_three) == ["rte"]
    assert title_of(asked_for_three.measure) == "rte 3-shot"  # before it is measured


def test_a_group_has_its_mean_and_its_tasks() -> None:
    values = list(values_of(family(0.5, 0.75, limit=10)))
    assert [value.quantity.label for value in values] == [
        *("both, limit 10 mean", "a (both, limit 10)", "b (both, limit 10)"),
    ]
    assert [value.number for value in values] == [0.625, 0.5, 0.75]
    assert [value.quantity.part is not None for value in values] == [False, True, True]
    assert [(one.quantity.scope, one.quantity.name) for one in values[:2]] == [
        *(("both, limit 10", "mean"), ("both, limit 10", "a")),
    ]


def test_a_limit_is_named_unless_every_task_of_the_group_stays_below_it() -> None:
    whole, cut = family(0.5, 0.75, limit=20), family(0.5, 0.75, limit=20)
    cut[0] = with_numbers(cut[0], tasks={"a": TaskScores({"acc": 0.5}, samples=20)})
    assert labels(*whole)[0] == "both mean"
    assert all("limit 20" in name for name in labels(*cut))


def test_a_mean_of_a_part_says_so() -> None:
    assert labels(*family(0.5, 0.75, members=3))[0] == "both mean of 2 of 3 tasks"


def test_a_group_that_lm_eval_runs_as_one_has_its_mean() -> None:
    scores = {name: TaskScores({"acc": acc, "acc_norm": 0.8}, "acc") for name, acc in (("a", 0.5), ("b", 0.7))}
    whole = task(None, "odd", tasks=scores, mean={"acc": 0.6, "acc_stderr": 0.01})
    found = [(value.quantity.label, value.number, value.norm, value.stderr) for value in values_of([whole])]
    assert found == [("odd mean", 0.6, None, 0.01), ("a (odd)", 0.5, 0.8, None), ("b (odd)", 0.7, 0.8, None)]
    many = {f"t{at}": TaskScores({"acc": 0.5}) for at in range(11)}
    assert labels(task(None, "odd", tasks=many, mean={"acc": 0.5})) == ["odd mean"]


def test_a_large_group_is_shown_by_its_parts() -> None:
    rules = {"acc": True}
    stem = family(*[0.5] * 11, group="mmlu", members=12, groups={"mmlu": rules, "mmlu_stem": rules})
    other = task(0.2, "z", group="mmlu", members=12, groups={"mmlu": rules, "mmlu_other": rules}, samples=40)
    found = {value.quantity.label: value.number for value in values_of([*stem, other])}
    assert found == {
        "mmlu mean": pytest.approx((0.5 * 110 + 0.2 * 40) / 150),
        "mmlu_stem (mmlu)": pytest.approx(0.5),
        "mmlu_other (mmlu)": pytest.approx(0.2),
    }


def test_the_same_group_with_other_settings_is_another() -> None:
    one, other = family(0.5), family(0.7, limit=10)
    assert labels(*one, *other) == ["both mean", "a (both)", "both, limit 10 mean", "a (both, limit 10)"]


def test_a_group_without_acc_shows_what_it_averages() -> None:
    scores = [{"exact_match": score, "exact_match_stderr": 0.1} for score in (0.0, 1.0)]
    results = [
        task(None, name, 5, scores=own, metric="exact_match", group="math", members=2, groups={"math": rules})
        for name, own in zip(("algebra", "geometry"), scores, strict=True)
        for rules in ({"exact_match": True, "math_verify": True},)
    ]
    found = [(value.quantity.label, value.number, value.quantity.metric.is_share) for value in values_of(results)]
    assert found == [
        ("math 5-shot mean exact match", 0.5, True),
        ("algebra (math 5-shot) exact match", 0, True),
        ("geometry (math 5-shot) exact match", 1, True),
    ]


@pytest.mark.parametrize(
    ("metric", "is_share"),
    [
        *((name, True) for name in ("acc", "acc_norm", "exact_match", "quasi_prefix_exact_match", "f1", "em")),
        *((name, True) for name in ("pass@1", "prompt_level_strict_acc", "strict-match acc")),
        *((name, False) for name in ("bleu", "ter", "rmse", "word_perplexity", "perplexity", "accelerate")),
    ],
)
def test_what_is_shown_in_percent(metric: str, is_share: bool) -> None:
    assert Metric.of_task(metric).is_share == is_share
    assert Metric.of_task(metric).kind == (Kind.ACCURACY if is_share else Kind.OTHER)


# --- errors -----------------------------------------------------------------------------------------------------------


def test_errors_of_texts_and_tasks() -> None:
    perplexity = text(5.0, reference="a", kl=0.5, kl_stderr=0.2)
    other = task(None, "lambada", scores={"perplexity": 12.5, "perplexity_stderr": 0.5}, metric="perplexity")
    assert [value.stderr for value in values_of([perplexity, task(0.5), other])] == [0.1, 0.2, None, 0.03, 0.5]


@pytest.mark.parametrize(
    ("rules", "error"),
    [
        ({}, math.hypot(0.03, 0.03) / 2),  # of independent means
        ({"acc": False}, math.hypot(0.03, 0.03) / 2),
        ({"acc": True}, math.sqrt(2 * 9 * 10 * 0.03**2 / 18 / 20)),  # pooled over samples
    ],
)
def test_the_error_of_a_mean_is_lm_evals_or_that_of_independent_means(rules: dict[str, bool], error: float) -> None:
    mean, first, _ = values_of(family(0.5, 0.75, groups={"both": rules}))
    assert (mean.stderr, first.stderr) == (pytest.approx(error), 0.03)


# --- equal names are equal measures -----------------------------------------------------------------------------------


def test_another_version_of_the_text_is_another_measure() -> None:
    results: Any = {"base": [text(5.0, documents_hash="a" * 16)], "merged": [text(6.0, documents_hash="b" * 16)]}
    found, notes = named(**results)
    assert [list(own) for own in found.values()] == [["ppl prose @64, text aaaaaaaa"], ["ppl prose @64, text bbbbbbbb"]]
    assert study_of(**results).rows[1].difference == {}
    assert notes == [
        "ppl prose @64 is not one measure, and only equal ones are compared: base text aaaaaaaa, merged text bbbbbbbb"
    ]


def test_examples_drawn_by_other_seeds_are_another_measure() -> None:
    results: Any = {"base": [task(0.5, shots=5, seed=0), task(0.6, shots=5, seed=1)]}
    results |= {"pruned": [task(0.4, shots=5, seed=1)], "merged": [task(0.7, shots=5, seed=2)]}
    found, notes = named(1, **results)
    assert list(found["base"]) == ["rte 5-shot, seed 0", "rte 5-shot"]  # the run's own goes without saying
    base, pruned, merged = study_of(1, **results).rows
    assert list(pruned.difference.values()) == [pytest.approx(-0.2)]
    assert base.difference == merged.difference == {}
    assert len(notes) == 1


def test_without_examples_the_seed_changes_nothing() -> None:
    found, notes = named(base=[task(0.5, seed=0)], merged=[task(0.7, seed=1)])
    assert list(found["base"]) == list(found["merged"]) == ["rte"]
    assert notes == []


def test_another_system_prompt_is_another_measure() -> None:
    found, notes = named(base=[task(0.5, system_prompt="Be good.")], merged=[task(0.7, system_prompt="Be bad.")])
    (base,), (merged,) = found.values()
    assert base.startswith("rte system prompt, system prompt ")
    assert base != merged
    assert len(notes) == 1


def test_results_computed_in_several_dtypes_are_another_measure() -> None:
    found, _ = named(base=[task(0.5, dtype="bfloat16"), task(0.5, "boolq")], pruned=[task(0.5, dtype="float32")])
    assert [list(own) for own in found.values()] == [
        ["rte, computed in bfloat16", "boolq"],
        ["rte, computed in float32"],
    ]


def test_divergences_from_other_models_and_tasks_of_other_files() -> None:
    pruned = [text(6.0, reference="a" * 16, kl=0.5), text(6.0, reference="b" * 16, kl=0.25)]
    found, _ = named(
        pruned=[*pruned, task(0.5, sources={"digest": "c" * 16})], merged=[task(0.7, sources={"digest": "d" * 16})]
    )
    assert {name: value.number for name, value in found["pruned"].items() if name.startswith("KL")} == {
        "KL(dense || model) prose @64, dense model aaaaaaaa": 0.5,
        "KL(dense || model) prose @64, dense model bbbbbbbb": 0.25,
    }
    assert "ppl prose @64" in found["pruned"]  # which no other model changes
    assert list(found["merged"]) == ["rte, task files dddddddd"]


def test_what_was_not_recorded_is_left_out_of_the_name() -> None:
    found, notes = named(base=[text(5.0, documents_hash=None)], merged=[text(5.0, documents_hash="b" * 16)])
    assert [list(own) for own in found.values()] == [["ppl prose @64"], ["ppl prose @64, text bbbbbbbb"]]
    assert "base text unknown" in notes[0]


def test_an_empty_result_has_no_number() -> None:
    (value,) = values_of([task(None, tasks={"rte": TaskScores({})})])
    assert (value.quantity.label, value.number, value.stderr) == ("rte", None, None)
    assert TaskNumbers({}).members == 1
