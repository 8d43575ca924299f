from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import Command

from sppctl.config.settings import ModelConfig
from sppctl.publish import samples
from sppctl.report import records

PROMPTS = ["One", "<b>Two</b>"]


@pytest.fixture
def run(here: Path) -> Path:
    """A copy of the finished run, whose dense model is in ``base`` below the current directory."""
    return here / "run"


def texts(run: Path) -> list[list[str]]:
    stored = records.stored_samples(run)
    assert stored is not None
    return [[one.text for one in sample.completions] for sample in stored.samples]


def test_evaluation_writes_samples_that_the_report_shows(command: Command, run: Path) -> None:
    asked = ("eval", "tiny.yaml", f"eval.prompts={json.dumps(PROMPTS)}")
    assert command(*asked).code == 0
    wrote = command("generate", str(run), *(f"--prompt={prompt}" for prompt in PROMPTS), "--json").json
    assert texts(run) == [[one["text"] for one in sample["completions"]] for sample in wrote]
    verified = {"artefact": ".", "file": "samples.json", "state": "ok", "problem": None}
    assert verified in command("verify", str(run), "--json").json
    before = (run / "samples.json").stat().st_mtime_ns
    assert command(*asked).code == 0
    assert (run / "samples.json").stat().st_mtime_ns == before  # of the same prompts and weights
    assert command("report", str(run)).code == 0
    page, markdown = (run / "report.html").read_text(), (run / "report.md").read_text()
    assert "<h3>&lt;b&gt;Two&lt;/b&gt;</h3>" in page
    assert page.count("<dt>merged</dt>") == markdown.count("\nmerged:\n") == 2
    assert json.loads((run / "report.json").read_text())["samples"] == wrote


def test_tasks_named_on_the_command_line_are_measured_alone(command: Command, run: Path) -> None:
    (run / "samples.json").unlink(missing_ok=True)
    whole = command("eval", "tiny.yaml", "--tasks", "ppl", "eval.max_tokens=null")
    assert whole.code == 0
    size = r"eval: each checkpoint reads \S+ \d+ windows, [\d,]+ tokens"
    assert re.search(rf"^{size}; eval\.max_tokens=N uses the first N tokens of a text$", whole.err, re.MULTILINE)
    part = command("eval", "tiny.yaml", "--tasks", "ppl", "eval.max_tokens=128")
    assert re.search(r"^eval: each checkpoint reads \S+ 2 windows, 128 tokens$", part.err, re.MULTILINE)
    assert not (run / "samples.json").exists()
    assert command("eval", "tiny.yaml", "--tasks", "ppl", 'eval.prompts=["One"]').code == 0
    assert (run / "samples.json").exists()


def test_other_prompts_and_other_weights_are_written_anew(run: Path) -> None:
    samples.update(run, ["One"], ModelConfig())
    samples.update(run, [], ModelConfig())
    assert len(texts(run)) == 1
    samples.update(run, PROMPTS, ModelConfig())
    assert len(texts(run)) == 2
    stored = records.stored_samples(run)
    assert stored is not None
    stored.weights["merged"] = "other"
    records.sealed.write(run / "samples.json", records.stage_records.to_json(stored))
    samples.update(run, PROMPTS, ModelConfig())
    again = records.stored_samples(run)
    assert again is not None
    assert again.weights["merged"] != "other"


def test_checkpoints_that_runs_share_write_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of the runs of a sweep."""
    monkeypatch.setenv("SPPCTL_CACHE", str(run.parent / "cache"))

    def entries() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (run.parent / "cache" / "samples").iterdir()}

    samples.update(run, PROMPTS, ModelConfig())
    before = entries()
    other = Path(shutil.copytree(run, run.parent / "other"))
    (other / "samples.json").unlink()
    samples.update(other, PROMPTS, ModelConfig())
    assert texts(other) == texts(run)
    assert (len(before), entries()) == (3, before)
    samples.update(other, [*PROMPTS, "Three"], ModelConfig())
    assert len(entries()) == 6


def test_a_prompt_that_is_too_long_costs_no_results(command: Command, run: Path) -> None:
    outcome = command("eval", "tiny.yaml", f"eval.prompts=[{'x' * 200}]", "--json")
    assert outcome.code == 0
    assert outcome.json["results"]
    assert "warning: no samples for the report: " in outcome.err
    assert "more than the 128 positions" in outcome.err
    assert not (run / "samples.json").exists()
