from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sppctl.errors import StageError, UserError
from sppctl.lm import harness
from sppctl.lm.harness import ZEROSHOT, TaskGroup, _summary, check_tasks, group_of

# --- names ------------------------------------------------------------------------------------------------------------


def test_the_groups_of_the_literature() -> None:
    assert group_of("zeroshot") == TaskGroup(
        ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"), 0
    )
    assert group_of("mmlu") == TaskGroup(("mmlu",), 5)


def test_any_other_name_is_one_task_with_its_own_shots() -> None:
    assert group_of("piqa") == TaskGroup(("piqa",), None)


def test_our_own_groups_need_no_look_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_task_manager", lambda: pytest.fail("lm-eval was asked"))
    check_tasks([])
    check_tasks(["zeroshot", "mmlu"])


@pytest.fixture(scope="module")
def task_manager() -> Any:
    """The library's own, which takes seconds to make."""
    return harness._task_manager()


@pytest.fixture
def library(task_manager: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_task_manager", lambda: task_manager)


@pytest.mark.usefixtures("library")
def test_tasks_and_groups_of_the_library_are_known() -> None:
    check_tasks(["zeroshot", "piqa", "mmlu_stem", "ai2_arc", *ZEROSHOT])


@pytest.mark.usefixtures("library")
def test_an_unknown_task_is_told_what_comes_near() -> None:
    with pytest.raises(UserError, match=r"eval\.tasks: arc_eazy is neither .* did you mean .*arc_easy"):
        check_tasks(["piqa", "arc_eazy"])
    with pytest.raises(UserError, match=r"eval\.tasks: zeroshots .* did you mean zeroshot"):
        check_tasks(["zeroshots"])


@pytest.mark.usefixtures("library")
def test_an_unknown_task_with_nothing_near() -> None:
    with pytest.raises(UserError, match=r"eval\.tasks: §§§§ is neither .*; `lm-eval ls tasks` lists them"):
        check_tasks(["§§§§"])


# --- what is taken from lm-eval's results -----------------------------------------------------------------------------


def found(results: dict[str, dict[str, Any]], groups: dict[str, list[str]] | None = None) -> dict[str, Any]:
    """Results as lm-eval gives them: 10 of 100 examples of each task."""
    groups = groups or {}
    return {
        "results": {name: {"alias": name, "name": name, "sample_len": 10} | found for name, found in results.items()},
        "groups": {name: results[name] for name in groups},
        "group_subtasks": groups,
        "versions": dict.fromkeys(results, 1.0),
        "n-shot": {name: 0 for name in results if name not in groups},
        "n-samples": {name: {"original": 100, "effective": 10} for name in results if name not in groups},
    }


def test_one_task() -> None:
    results = found({"piqa": {"acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.75}})
    assert _summary(results, group_of("piqa")) == {
        "tasks": {
            "piqa": {
                "acc": 0.5,
                "acc_stderr": 0.1,
                "acc_norm": 0.75,
                "version": 1.0,
                "num_fewshot": 0,
                "samples": 10,  # with a limit, of those that were measured
            }
        },
        "mean": {"acc": 0.5, "acc_norm": 0.75},
    }


def test_the_mean_is_plain_over_tasks() -> None:
    group = TaskGroup(("boolq", "rte", "arc_easy"), 0)
    results = found(
        {
            "boolq": {"acc,none": 0.6, "acc_stderr,none": 0.1},
            "rte": {"acc,none": 0.5, "acc_stderr,none": 0.2},
            "arc_easy": {"acc,none": 0.1, "acc_stderr,none": 0.3, "acc_norm,none": 0.9},
        }
    )
    results["n-samples"]["boolq"]["effective"] = 1000  # however many examples each has
    summary = _summary(results, group)
    assert list(summary["tasks"]) == ["boolq", "rte", "arc_easy"]
    assert summary["mean"] == {"acc": pytest.approx(0.4)}  # acc_norm is not known of all


def test_a_group_of_the_library_has_its_own_mean() -> None:
    groups = {"mmlu": ["mmlu_stem", "mmlu_other"], "mmlu_stem": ["mmlu_a", "mmlu_b"], "mmlu_other": ["mmlu_c"]}
    results = found(
        {
            "mmlu_a": {"acc,none": 0.2, "acc_stderr,none": "N/A"},
            "mmlu_b": {"acc,none": 0.4, "acc_stderr,none": "N/A"},
            "mmlu_c": {"acc,none": 0.9, "acc_stderr,none": "N/A"},
            "mmlu_stem": {"acc,none": 0.3, "acc_stderr,none": "N/A", "sample_count": {"acc,none": 2}},
            "mmlu_other": {"acc,none": 0.9, "acc_stderr,none": "N/A", "sample_count": {"acc,none": 1}},
            "mmlu": {"acc,none": 0.45, "acc_stderr,none": 0.03, "sample_count": {"acc,none": 3}},  # weighted
        },
        groups,
    )
    summary = _summary(results, group_of("mmlu"))
    assert list(summary["tasks"]) == ["mmlu_a", "mmlu_b", "mmlu_c"]  # no group is counted as a task
    assert summary["tasks"]["mmlu_a"] == {"acc": 0.2, "version": 1.0, "num_fewshot": 0, "samples": 10}
    assert summary["mean"] == {"acc": 0.45, "acc_stderr": 0.03}


def test_a_task_without_accuracy_has_no_mean() -> None:
    summary = _summary(found({"lambada": {"perplexity,none": 12.5}}), group_of("lambada"))
    assert summary["tasks"]["lambada"]["perplexity"] == 12.5
    assert summary["mean"] == {}


def test_two_filters_of_one_metric_are_kept_apart() -> None:
    metrics = {"exact_match,strict-match": 0.25, "exact_match,flexible-extract": 0.5}
    values = _summary(found({"gsm8k": metrics}), group_of("gsm8k"))["tasks"]["gsm8k"].values()
    assert {0.25, 0.5} <= set(values)


# --- running ----------------------------------------------------------------------------------------------------------


def test_settings_are_passed_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import lm_eval
    from lm_eval.models import huggingface

    asked: dict[str, Any] = {}

    def simple_evaluate(**options: Any) -> dict[str, Any]:
        print("a remark of the library")
        asked.update(options)
        return found({"mmlu_a": {"acc,none": 0.5}, "mmlu": {"acc,none": 0.5}}, {"mmlu": ["mmlu_a"]})

    monkeypatch.setattr(lm_eval, "simple_evaluate", simple_evaluate)
    monkeypatch.setattr(huggingface, "HFLM", lambda **options: SimpleNamespace(**options))
    monkeypatch.setattr(harness, "_task_manager", lambda: None)
    summary = harness.evaluate("model", "tokenizer", "mmlu", batch_size=3, limit=7, seed=11)
    assert summary["mean"] == {"acc": 0.5}
    assert (asked["tasks"], asked["num_fewshot"], asked["limit"]) == (["mmlu"], 5, 7)
    assert {asked[f"{name}_seed"] for name in ("random", "numpy_random", "torch_random", "fewshot_random")} == {11}
    assert vars(asked["model"]) == {"pretrained": "model", "tokenizer": "tokenizer", "batch_size": 3}
    assert capsys.readouterr().out == ""  # results belong there


def test_the_library_writes_nothing_where_nobody_watches(capfd: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(RuntimeError), harness._only_progress():
        print("to stdout")
        os.write(2, b"to stderr")
        raise RuntimeError
    print("results")
    os.write(2, b"an error")
    assert capfd.readouterr() == ("results\n", "an error")


def test_a_failure_of_the_library_is_a_failed_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval
    from lm_eval.models import huggingface

    def fail(**_: Any) -> None:
        raise KeyError("no such column")

    monkeypatch.setattr(lm_eval, "simple_evaluate", fail)
    monkeypatch.setattr(huggingface, "HFLM", lambda **options: None)
    monkeypatch.setattr(harness, "_task_manager", lambda: None)
    with pytest.raises(StageError, match=r"lm-eval could not run piqa: .*no such column"):
        harness.evaluate(None, None, "piqa", batch_size=1, limit=None, seed=0)


COMPARE = """
import json, sys
import lm_eval, torch
from lm_eval.models.huggingface import HFLM
from sppctl.lm import checkpoint, harness
from pathlib import Path

directory = Path(sys.argv[1])
model = checkpoint.load_model(directory, torch.device("cpu"))
tokenizer = checkpoint.load_tokenizer(directory)
ours = harness.evaluate(model, tokenizer, "arc_easy", batch_size=2, limit=2, seed=0)
opened = HFLM(pretrained=str(directory), device="cpu", batch_size=1)
theirs = lm_eval.simple_evaluate(model=opened, tasks=["arc_easy"], limit=2)
print(json.dumps([ours, theirs["results"]["arc_easy"]]))
"""


@pytest.mark.shared
@pytest.mark.slow
def test_values_are_those_of_the_library(shared_data: Path, llama: Path, tmp_path: Path) -> None:
    setup = shared_data / "hf-env.sh"
    if not setup.is_file():
        pytest.skip("no data mirror beside the checkout")
    # at 128 tokens some of these questions lose their first words; that is lm-eval's own doing on both sides
    done = subprocess.run(
        ["bash", "-c", f'source "{setup}" && exec "$0" -c "$1" "$2"', sys.executable, COMPARE, str(llama)],
        env=os.environ | {"SPPCTL_HF_SCRATCH": str(tmp_path / "hf")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = json.loads(done.stdout.splitlines()[-1])
    task = ours["tasks"]["arc_easy"]
    assert (task["acc"], task["acc_norm"]) == (theirs["acc,none"], theirs["acc_norm,none"])
    assert (task["acc_stderr"], task["acc_norm_stderr"]) == (theirs["acc_stderr,none"], theirs["acc_norm_stderr,none"])
    assert (task["samples"], task["num_fewshot"]) == (2, 0)
    assert ours["mean"] == {"acc": task["acc"], "acc_norm": task["acc_norm"]}
