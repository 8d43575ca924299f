"""What numbers are called, what they mean, and which of them may be compared."""

from __future__ import annotations

import math
from typing import Any

import pytest
from made_up_runs import study_of, task, text, with_measure, with_numbers

from sppctl.evaluate.results import AnyResult, TaskNumbers, TaskScores
from sppctl.evaluate.values import Kind, Metric, distinguish, title_of, values_of

FILES_C, FILES_D = ({"sources": {"digest": letter * 16}} for letter in "cd")


def numbers(*results: AnyResult) -> dict[str, float | None]:
    """By name."""
    return {value.quantity.label: value.number for value in values_of(results)}


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
            [f"{name} prose @64 (dense: other)" for name in ("KL(dense || model)", "top-1 agreement")],
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
    assert list(numbers(result))[-len(names) :] == names


def test_the_count_of_examples_is_that_of_the_prompts() -> None:
    asked_for_three = with_measure(task(0.5, shots=0), num_fewshot=3)
    assert list(numbers(asked_for_three)) == ["rte"]
    assert title_of(asked_for_three.measure) == "rte 3-shot"  # before it is measured


def test_a_group_has_its_mean_and_its_tasks() -> None:
    values = list(values_of(family(0.5, 0.75, limit=10)))
    found = [(one.quantity.label, one.quantity.scope, one.quantity.name, one.number) for one in values]
    scope = "both, limit 10"
    assert found == [
        ("both, limit 10 mean", scope, "mean", 0.625),
        ("a (both, limit 10)", scope, "a", 0.5),
        ("b (both, limit 10)", scope, "b", 0.75),
    ]
    assert [value.quantity.part for value in values] == [None, "a", "b"]
    other_settings = [*family(0.5), *family(0.7, limit=10)]
    assert list(numbers(*other_settings)) == ["both mean", "a (both)", "both, limit 10 mean", "a (both, limit 10)"]


def test_a_limit_is_named_unless_every_task_of_the_group_stays_below_it() -> None:
    whole, cut = family(0.5, 0.75, limit=20), family(0.5, 0.75, limit=20)
    cut[0] = with_numbers(cut[0], tasks={"a": TaskScores({"acc": 0.5}, samples=20)})
    assert next(iter(numbers(*whole))) == "both mean"
    assert all("limit 20" in name for name in numbers(*cut))


def test_a_mean_of_a_part_says_so() -> None:
    assert next(iter(numbers(*family(0.5, 0.75, members=3)))) == "both mean of 2 of 3 tasks"


def test_a_group_that_lm_eval_runs_as_one_has_its_mean() -> None:
    scores = {name: TaskScores({"acc": acc, "acc_norm": 0.8}, "acc") for name, acc in (("a", 0.5), ("b", 0.7))}
    whole = task(None, "odd", tasks=scores, mean={"acc": 0.6, "acc_stderr": 0.01})
    found = [(value.quantity.label, value.number, value.norm, value.stderr) for value in values_of([whole])]
    assert found == [("odd mean", 0.6, None, 0.01), ("a (odd)", 0.5, 0.8, None), ("b (odd)", 0.7, 0.8, None)]
    many = {f"t{at}": TaskScores({"acc": 0.5}) for at in range(11)}
    assert numbers(task(None, "odd", tasks=many, mean={"acc": 0.5})) == {"odd mean": 0.5}


def test_a_large_group_is_shown_by_its_parts() -> None:
    rules = {"acc": True}
    stem = family(*[0.5] * 11, group="mmlu", members=12, groups={"mmlu": rules, "mmlu_stem": rules})
    other = task(0.2, "z", group="mmlu", members=12, groups={"mmlu": rules, "mmlu_other": rules}, samples=40)
    assert numbers(*stem, other) == {
        "mmlu mean": pytest.approx((0.5 * 110 + 0.2 * 40) / 150),
        "mmlu_stem (mmlu)": pytest.approx(0.5),
        "mmlu_other (mmlu)": pytest.approx(0.2),
    }


def test_a_part_of_an_unfinished_group_is_not_shown() -> None:
    """Nothing says whether the part itself is complete."""
    rules = {"acc": True}
    some = family(*[0.5] * 11, group="mmlu", members=12, groups={"mmlu": rules, "mmlu_stem": rules})
    assert [*numbers(*some)] == ["mmlu mean of 11 of 12 tasks"]


def test_a_group_without_a_common_metric_has_no_mean() -> None:
    place: dict[str, Any] = {"group": "glue", "members": 2}
    found = numbers(task(0.5, "rte", **place), task(None, "cola", scores={"mcc": 0.1}, metric="mcc", **place))
    assert found == {"rte (glue)": 0.5, "cola (glue) mcc": 0.1}


def test_a_group_without_acc_shows_what_it_averages() -> None:
    place: dict[str, Any] = {"metric": "exact_match", "group": "math", "members": 2}
    place["groups"] = {"math": {"exact_match": True, "math_verify": True}}
    scores = {"algebra": {"exact_match": 0.0}, "geometry": {"exact_match": 1.0}}
    values = list(values_of(task(None, name, 5, scores=own, **place) for name, own in scores.items()))
    assert {value.quantity.label: value.number for value in values} == {
        "math 5-shot mean exact match": 0.5,
        "algebra (math 5-shot) exact match": 0,
        "geometry (math 5-shot) exact match": 1,
    }
    assert all(value.quantity.metric.is_share for value in values)


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


def test_an_empty_result_has_no_number() -> None:
    (value,) = values_of([task(None, tasks={"rte": TaskScores({})})])
    assert (value.quantity.label, value.number, value.stderr) == ("rte", None, None)
    assert TaskNumbers({}).members == 1


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


@pytest.mark.parametrize(
    ("make", "base", "merged", "names"),
    [
        (text, {"documents_hash": "a" * 16}, {"documents_hash": "b" * 16}, [", text aaaaaaaa", ", text bbbbbbbb"]),
        (text, {"documents_hash": None}, {"documents_hash": "b" * 16}, ["", ", text bbbbbbbb"]),  # was not recorded
        (task, {"seed": 0}, {"seed": 1}, ["", ""]),  # without examples the seed changes nothing
        (task, {"shots": 5, "seed": 0}, {"shots": 5, "seed": 1}, [" 5-shot", " 5-shot, seed 1"]),  # 0 is the run's
        (task, FILES_C, FILES_D, [", task files cccccccc", ", task files dddddddd"]),
        (task, {"dtype": "bfloat16"}, {"dtype": "float32"}, [", computed in bfloat16", ", computed in float32"]),
        (task, {}, {"batch_size": 1}, ["", ", batch size 1"]),
        (
            task,
            {"system_prompt": "Be good."},
            {"system_prompt": "Be bad."},
            [" system prompt, system prompt 8b979bed", " system prompt, system prompt 47a8c453"],
        ),
    ],
)
def test_numbers_that_differ_in_more_than_the_checkpoint_are_other_measures(
    make: Any, base: dict[str, Any], merged: dict[str, Any], names: list[str]
) -> None:
    results = {"base": [make(5.0, **base)], "merged": [make(6.0, **merged)]}
    found, notes = distinguish({label: values_of(own) for label, own in results.items()}, seed=0)
    title = "ppl prose @64" if make is text else "rte"
    assert [quantity.label for values in found.values() for quantity in values] == [title + name for name in names]
    is_same = names[0] == names[1]
    assert bool(study_of(0, **results).rows[1].difference) == is_same
    assert len(notes) == (not is_same)


def test_a_note_says_what_differs() -> None:
    versions = {"base": None, "merged": "b" * 16}
    values = {label: values_of([text(5.0, documents_hash=version)]) for label, version in versions.items()}
    assert distinguish(values, 0)[1] == [
        "ppl prose @64: measured differently; only equal ones are compared (base text unknown, merged text bbbbbbbb)"
    ]


def test_equal_ones_of_several_are_compared() -> None:
    results: Any = {"base": [task(0.5, shots=5, seed=0), task(0.6, shots=5, seed=1)]}
    results |= {"pruned": [task(0.4, shots=5, seed=1)], "merged": [task(0.7, shots=5, seed=2)]}
    base, pruned, merged = study_of(1, **results).rows
    assert list(pruned.difference.values()) == [pytest.approx(-0.2)]
    assert base.difference == merged.difference == {}


def test_another_dense_model_changes_the_divergence_and_no_perplexity() -> None:
    pruned = [text(6.0, reference=letter * 16, kl=kl) for letter, kl in (("a", 0.5), ("b", 0.25))]
    found, _ = distinguish({"pruned": values_of(pruned)}, 0)
    of_pruned = {quantity.label: value.number for quantity, value in found["pruned"].items()}
    assert {name: number for name, number in of_pruned.items() if name.startswith("KL")} == {
        "KL(dense || model) prose @64, dense model aaaaaaaa": 0.5,
        "KL(dense || model) prose @64, dense model bbbbbbbb": 0.25,
    }
    assert "ppl prose @64" in of_pruned
