"""The whole report: what was done, Markdown, the terminal, and the files."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import made_up_runs
import pytest
from made_up_runs import layer, results_of, save, stage_of, study_of, task, text, write_record, write_run

from sppctl.errors import UserError
from sppctl.records import StageRecord, to_json
from sppctl.report.document import chapter, document
from sppctl.report.provenance import facts
from sppctl.report.study import RunStudy, Study
from sppctl.report.text import show, show_results, to_markdown
from sppctl.run import pipeline

FILES = {"report.md", "report.csv", "report.json", "report.html"}
PRUNED = {"method": "wanda", "pattern": "2:4", "matrices": 14, "mean_relative_output_error": 0.12345}
RECORDED = {"created": "today", "command": "sppctl prune", "hardware": "a CPU", "output": "p" * 16}
PRUNE = stage_of("prune", PRUNED, wall_time_s=12.4, **RECORDED)
TRAINED = {"method": "spp", "trainable_parameters": 19578880, "trainable_share": 0.0029, "steps": 300}
TRAIN = stage_of("train", TRAINED | {"tokens": 1234567, "validation_loss": 1.2345}, wall_time_s=65.0)
MERGE = stage_of("merge", {"matrices": 14, "zeros": 7680, "moved_share": 0.9876}, wall_time_s=3.0)


def with_metrics(record: StageRecord[Any], **metrics: Any) -> StageRecord[Any]:
    return replace(record, metrics=replace(record.metrics, **metrics))


def markdown(*runs: RunStudy, place: str = ".") -> str:
    return to_markdown(document(Study(runs), [chapter(run) for run in runs], place))


# --- facts ------------------------------------------------------------------------------------------------------------


def test_what_was_done_in_the_order_it_was_done() -> None:
    assert facts(study_of(stages={"merge": MERGE, "train": TRAIN, "prune": PRUNE})) == [
        "prune: wanda 2:4, 14 matrices, mean relative output error 0.123, 12 s",
        "train: spp, 19,578,880 parameters (0.29%), 300 steps, 1,234,567 tokens, validation loss 1.234, 65 s",
        "merge: 14 matrices, all 7,680 zeros kept, 98.8% of the kept weights moved, 3 s",
    ]
    # what was not measured is left out, and zeros that were filled are not called kept
    prune = with_metrics(PRUNE, method="magnitude", mean_relative_output_error=None)
    changed = {"pattern_unchanged": False, "filled_zeros": 7000, "lost_weights": 2, "sparsity": 0.0443, "mask": "dense"}
    stages = {
        "prune": prune,
        "train": with_metrics(TRAIN, validation_loss=None),
        "merge": with_metrics(MERGE, **changed),
    }
    assert facts(study_of(stages=stages)) == [
        "prune: magnitude 2:4, 14 matrices, 12 s",
        "train: spp, 19,578,880 parameters (0.29%), 300 steps, 1,234,567 tokens, 65 s",
        "merge: 14 matrices, 7,000 zeros filled, 2 other weights zero, sparsity now 4.43% (mask dense), "
        "98.8% of the kept weights moved, 3 s",
    ]
    # training records the time of all attempts, earlier versions of sppctl only that of the last one for the stage
    (resumed,) = facts(study_of(stages={"train": with_metrics(TRAIN, seconds=36000.0)}))
    assert resumed.endswith(", 36000 s")
    (trained,) = facts(study_of(stages={"train": with_metrics(TRAIN, best_step=250)}))
    assert "300 steps (best adapter: step 250), 1,234,567 tokens, validation loss 1.234" in trained


# --- Markdown ---------------------------------------------------------------------------------------------------------


def test_a_report_in_markdown() -> None:
    prune = with_metrics(PRUNE, layers=[layer("0.mlp.up_proj")])
    made = """\
# runs/mine

- Pattern: 2:4 in 14 matrices (pruned, not merged yet)
- Perplexity prose @64: 5.00 -&gt; 6.00 (base -&gt; pruned)
- Time and memory: 12 s
- warning: few windows (3): prose @64; one standard error is up to 10% of a perplexity

- prune: wanda 2:4, 14 matrices, mean relative output error 0.123, 12 s

## Results

|  | base | pruned |
| --- | ---: | ---: |
| sparsity of pruned matrices | dense | 50.00% |
| pattern | dense | 2:4 |
| sparse matrices | 0 | 210 |
| size, MB | 269.1 | 269.1 |
| ppl prose @64 | 5.00 | 6.00 |

## Distance to the dense model

| measure | pruned - base |
| --- | ---: |
| ppl prose @64 | +1.00 |

Differences of accuracies are percentage points.

## Pruning

| module type | matrices | mean sparsity | mean relative output error | worst | worst layer | seconds |
| --- | ---: | ---: | ---: | ---: | --- | ---: |
| `up_proj` | 1 | 50.00% | 0.250 | 0.250 | `model.layers.0.mlp.up_proj` | 0.2 |

## How it was made

```
sppctl prune
```

**Stages**

| stage | finished | seconds | peak memory, GB | seed | hardware |
| --- | --- | ---: | ---: | ---: | --- |
| prune | today | 12 | - | 0 | a CPU |

**Evaluations**

| weights | text or tasks | measured on | dtype | device | seconds |
| --- | --- | --- | --- | --- | ---: |
| base | ppl prose @64 | 189 tokens in 3 windows, loss ± 0.1000 nats | - | - | - |
| pruned | ppl prose @64 | 189 tokens in 3 windows, loss ± 0.1000 nats | - | - | - |

**Fingerprints**

| stage | what | value |
| --- | --- | --- |
| prune | output | pppppppppppppppp |
| eval base | text of ppl prose @64 | x |
| eval pruned | text of ppl prose @64 | x |
"""
    assert markdown(study_of(stages={"prune": prune}, base=[text(5.0)], pruned=[text(6.0)])) == made


def test_the_whole_report_in_markdown(tmp_path: Path) -> None:
    found = markdown(RunStudy.of(write_run(tmp_path / "one")))
    sections = [line.removeprefix("## ") for line in found.splitlines() if line.startswith("## ")]
    # those of training, time and size have figures alone
    assert sections[:4] == ["Results", "Distance to the dense model", "On the same samples", "Flipped answers"]
    assert sections[4:] == ["Pruning", "How it was made"]
    for words in ("sppctl prune run.dir=one", "torch", "x86_64 CPU, 2 threads", "0123456789abcdef", "c" * 16, "d" * 16):
        assert words in found
    assert found.count("sppctl eval run.dir=one") == 1  # one command measured three checkpoints
    assert "gap recovered = (x - pruned) / (base - pruned)" in found
    assert "\n\n\n" not in found
    assert "# <b> & other signs" in found  # of the configuration, as it stands


# --- the terminal -----------------------------------------------------------------------------------------------------


def test_the_terminal_shows_results_and_what_was_done(capsys: pytest.CaptureFixture[str]) -> None:
    runs = [study_of(stages={"prune": PRUNE}, base=[text(5.0 + at)], pruned=[text(6.5)]) for at in range(2)]
    show(Study(runs))
    shown = capsys.readouterr().out
    assert shown.count("prune: wanda 2:4, 14 matrices") == 2
    assert all(words in shown for words in ("All runs", "runs/mine", "50.00%", "6.50", "+1.50"))
    assert "How it was made" not in shown


def test_results_have_heads_and_units_and_no_empty_columns(capsys: pytest.CaptureFixture[str]) -> None:
    own = [text(12.5, kl=0.25, top1_agreement=0.5)]
    show_results({"base": results_of("base", own).to_json()}, 0)
    shown = capsys.readouterr().out
    assert all(words in shown for words in ("measure", "value", "0.2500 nats per token", "50.00%"))
    assert "norm" not in shown
    show_results({"base": results_of("base", [*own, task(0.5, scores={"acc": 0.5, "acc_norm": 0.25})]).to_json()}, 0)
    shown = capsys.readouterr().out
    assert all(words in shown for words in ("acc_norm", "25.00%", " - "))


def test_results_are_told_apart_on_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    own = [task(0.5 + seed / 4, shots=2, seed=seed) for seed in (0, 1)]
    show_results({"base": results_of("base", [*own, text(12.5)]).to_json()}, 1)
    lines = [[cell.strip() for cell in line.split("│")[1:3]] for line in capsys.readouterr().out.splitlines()]
    rows = [["ppl prose @64", "12.50"], ["rte 2-shot, seed 0", "50.00%"], ["rte 2-shot", "75.00%"]]
    assert [line for line in lines if line in rows] == rows


# --- files ------------------------------------------------------------------------------------------------------------


def test_one_run_has_its_report_in_itself_or_elsewhere(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one")
    before = {path.name for path in one.iterdir()}
    pipeline.report([one], output=tmp_path / "there")
    assert {path.name for path in one.iterdir()} == before
    assert {path.name for path in (tmp_path / "there").iterdir()} == FILES | {"pruning.svg"}
    found = pipeline.report([one / "eval/..", one]).to_json()  # given twice it is one run
    assert {path.name for path in one.iterdir()} == before | FILES | {"pruning.svg"}
    assert not (tmp_path / "report.md").exists()
    assert json.loads((one / "report.json").read_text()) == found
    assert found.keys() == {"run", "config", "stages", "checkpoints", "comparisons", "notes", "samples", "table"}
    assert (one / "report.md").read_text() == (tmp_path / "there/report.md").read_text()


def test_several_runs_have_one_report_more_in_the_folder_they_share(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"{'ab'[seed]}/s{seed}", seed=seed) for seed in (0, 1)]
    for seed, run in enumerate(runs):
        (run / "resolved.yaml").write_text(f"run: {{seed: {seed}}}")
    pipeline.report(runs, latex=tmp_path / "tables/all.tex")
    assert {path.name for path in tmp_path.iterdir()} == FILES | {"a", "b", "tables"}
    assert all((run / "report.html").is_file() for run in runs)
    text, page, content = ((tmp_path / f"report.{kind}").read_text() for kind in ("md", "html", "json"))
    assert json.loads(content).keys() == {"table", "comparisons", "runs"}
    assert [row["settings"].get("run.seed") for row in json.loads(content)["table"]] == [None, 0, 0, None, 1, 1]
    assert text.startswith("# 2 runs\n")
    assert text.index("## All runs\n") < text.index(f"\n## {runs[0]}\n\n") < text.index(f"\n## {runs[1]}\n\n")
    for title in ("Over seeds", "Merged checkpoints on the same samples, against the first run"):
        assert f"### {title}\n" in text
        assert f"<h3>{title}</h3>" in page
    assert "| a/s0 to b/s1 | " in text
    assert "](b/s1/pruning.svg)" in text
    assert "](pruning.svg)" in (runs[1] / "report.md").read_text()
    assert (tmp_path / "tables/all.tex").read_text().count(r"\\") > 6


def test_the_report_of_several_runs_never_replaces_that_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [write_run(tmp_path / "one"), write_run(tmp_path / "two", seed=1)]
    with pytest.raises(UserError, match=r"itself one of the runs.*--output"):
        pipeline.report(runs, output=tmp_path / "two/../one")
    monkeypatch.setattr("os.path.commonpath", lambda _: "/")
    with pytest.raises(UserError, match=r"no common directory; name one .*--output"):
        pipeline.report(runs)
    assert not (tmp_path / "one/report.md").exists()


def test_a_report_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "one")
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "out/report.csv").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "deep")
    before = sorted(tmp_path.rglob("*"))
    for output, latex, message in (
        ("file", None, "--output: .*file is a file, not a directory"),
        ("file/deep", None, "--output: .*deep cannot be created, .*file is not a writable directory"),
        ("link", None, "--output: .*link is a broken link"),
        ("out", None, "--output: .*report.csv is not a regular file"),
        (None, "out", "--latex: .*out is not a regular file"),
        (None, "pipe", "--latex: .*pipe is not a regular file"),
        (None, "file/a.tex", "--latex: .*file is a file, not a directory"),
    ):
        with pytest.raises(UserError, match=message):
            pipeline.report([run], *(name and tmp_path / name for name in (output, latex)))
    assert sorted(tmp_path.rglob("*")) == before


def test_an_unfinished_run_and_one_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run directory"):
        pipeline.report([tmp_path])
    write_record(tmp_path, "prune", PRUNE)
    nothing = {"config": None, "checkpoints": {}, "comparisons": [], "notes": [], "samples": [], "table": []}
    assert RunStudy.of(tmp_path).to_json() == {"run": str(tmp_path), "stages": {"prune": to_json(PRUNE)}} | nothing
    with pytest.raises(UserError, match=r"--latex .*: nothing has been measured yet"):
        pipeline.report([tmp_path], latex=tmp_path / "a.tex")


def test_a_run_without_windows_samples_history_and_commands(tmp_path: Path) -> None:
    for stage, record in {"prune": PRUNE, "train": TRAIN, "merge": MERGE}.items():
        write_record(tmp_path, stage, record)
    for label, value in {"base": 10.0, "pruned": 20.0, "merged": 14.0}.items():
        save(tmp_path, results_of(label, [text(value)]))
    pipeline.report([tmp_path])
    found = (tmp_path / "report.md").read_text()
    assert "| ppl prose @64 | +10.00 | +4.00 | 51.5% |" in found  # ln(20 / 14) / ln(20 / 10)
    assert "On the same samples" not in found
    assert "<svg" in (tmp_path / "report.html").read_text()


def test_notes_are_in_every_form(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one")
    made_up_runs.change_record(one, "prune", output="others")
    pipeline.report([one])
    note = (
        f"{one}/eval/pruned.json measures weights that differ from those in pruned/; sppctl eval {one} --model=pruned"
    )
    for kind, shown in {"md": f"\n- {note}", "html": f'<p class="note">{note}</p>', "json": note}.items():
        assert shown in (one / f"report.{kind}").read_text()


def test_json_has_no_infinity(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one")
    infinite = {"value": float("inf"), "nll": float("nan"), "stderr": float("nan")}
    spoiled = made_up_runs.with_numbers(made_up_runs.load(one, "pruned").texts[0], **infinite)
    made_up_runs.change_results(one, "pruned", lambda content: content.add(spoiled))
    pipeline.report([one])
    found = json.loads((one / "report.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert found["checkpoints"]["pruned"]["results"][-1]["metrics"]["value"] is None
