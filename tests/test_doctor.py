"""sppctl doctor: what is said of an installation that is whole, and of one that lacks something."""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path

import pytest
import torch

from sppctl import cli, doctor, machine
from sppctl.doctor import Finding, State
from sppctl.fused import FusedKernels


def found() -> dict[str, Finding]:
    return {finding.subject: finding for finding in doctor.examine()}


def test_a_whole_installation_has_no_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPPCTL_CACHE", str(tmp_path / "not/yet/there"))
    findings = found()
    assert State.PROBLEM not in {finding.state for finding in findings.values()}
    assert f"torch {torch.__version__}" in findings["libraries"].text
    assert str(tmp_path) in findings["cache"].text
    cpu = machine.choose_dtype("auto", "float16", torch.device("cpu"))
    if not torch.cuda.is_available():
        assert findings["float16"] == Finding("float16", State.NOTE, f"model.compute_dtype=auto means {cpu.text}")


def test_what_will_fail_ends_with_1_and_says_the_fix(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed = importlib.metadata.version

    def version(name: str) -> str:
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError(name)
        return "4.2.0" if name == "transformers" else installed(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr("sys.argv", ["sppctl", "doctor", "--json"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    printed = capsys.readouterr()
    assert stop.value.code == 1
    assert "error: transformers: 4.2.0 is outside <6,>=5.17; pip install 'transformers<6,>=5.17'" in printed.err
    assert "error: peft: not installed; pip install 'peft" in printed.err
    states = {finding["subject"]: finding["state"] for finding in json.loads(printed.out)}
    assert (states["peft"], states["sppctl"]) == ("problem", "ok")


def test_settings_that_limit_are_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(doctor, "LITTLE_DISK", 1 << 60)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    findings = found()
    for subject, advice in (("hub", "unset HF_HUB_OFFLINE"), ("hub token", "hf auth login"), ("cache", "SPPCTL_CACHE")):
        assert findings[subject].state is State.NOTE
        assert advice in findings[subject].advice


def test_kernels_that_fail_their_test_are_a_note_with_the_reason() -> None:
    def check(*_: object) -> None:
        raise RuntimeError("no C compiler\nand more")

    failing = FusedKernels("types", check, "Slower")
    for reason in ("Slower: no C compiler", "the self-test failed"):  # the warning is given once
        finding = doctor._self_test("SPP kernels", failing, torch.device("cpu"))
        assert (finding.state, finding.text) == (State.NOTE, reason)
        assert "install triton" in finding.advice
    passing = FusedKernels("types", lambda *_: None, "Slower")
    assert doctor._self_test("SPP kernels", passing, torch.device("cpu")).state is State.OK


def test_a_cache_that_cannot_be_written_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whoever asks: root may write where the permissions forbid it."""
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path or not mode & os.W_OK)
    monkeypatch.setenv("SPPCTL_CACHE", str(tmp_path / "not/yet/there"))
    findings = found()
    cache = findings["cache"]
    assert (cache.state, cache.advice) == (State.PROBLEM, "set SPPCTL_CACHE to a writable directory")
    assert cache.text.endswith("not writable")
    assert State.PROBLEM not in {findings[place].state for place in ("run directory", "hub cache")}


def test_a_cache_within_a_file_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPPCTL_CACHE", str(tmp_path / "file/cache"))
    assert found()["cache"].state is State.PROBLEM
