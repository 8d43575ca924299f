"""Code that comes with a checkpoint: no command runs it unless the user asks, whatever the checkpoint's folder says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import Command
from transformers import dynamic_module_utils

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({sentinel!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""
TRUSTING = "model: {trust_remote_code: true}"


@pytest.fixture
def sentinel(tmp_path: Path) -> Path:
    """A file that the code of :func:`coded` makes."""
    return tmp_path / "code was run"


@pytest.fixture
def coded(llama: Path, tmp_path: Path, sentinel: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint with code, in a folder that claims to be a run that trusts it, within one that claims so, too."""
    folder = tmp_path / "download/merged"
    shutil.copytree(llama, folder)
    (folder / "own.py").write_text(CODE.format(sentinel=str(sentinel)))
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": names}))
    for place in (folder, folder.parent):
        (place / "resolved.yaml").write_text(TRUSTING)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.chdir(tmp_path)
    return folder


COMMANDS = {
    "prune": ["prune", "--model=MODEL", "prune.method=magnitude", "run.dir=run"],
    "prune a run": ["prune", "MODEL", "--model=MODEL", "prune.method=magnitude", "run.dir=run"],
    "plan": ["plan", "--model=MODEL"],
    "eval": ["eval", "--model=MODEL", "eval.perplexity=[TEXT]", "eval.seq_len=32", "run.dir=run"],
    "bench": ["bench", "MODEL"],
    "generate": ["generate", "MODEL"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_code_of_a_checkpoint_is_refused(
    name: str, coded: Path, sentinel: Path, text_file: Path, command: Command
) -> None:
    arguments = [part.replace("MODEL", str(coded)).replace("TEXT", str(text_file)) for part in COMMANDS[name]]
    outcome = command(*arguments)
    assert (outcome.code, sentinel.exists()) == (2, False), outcome.err
    assert "error: " in outcome.err


def test_a_checkpoint_is_certified_without_its_code(coded: Path, sentinel: Path, command: Command) -> None:
    outcome = command("inspect", str(coded))
    assert (outcome.code, sentinel.exists()) == (0, False), outcome.err


def test_code_runs_when_asked_for(coded: Path, sentinel: Path, command: Command) -> None:
    arguments = ["prune.method=magnitude", "prune.pattern=2:4", "run.dir=run", "model.trust_remote_code=true"]
    outcome = command("prune", f"--model={coded}", *arguments)
    assert (outcome.code, sentinel.exists()) == (0, True), outcome.err
