from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import hub
import pytest
from conftest import Command
from hub import Hub
from huggingface_hub import ModelCard, constants
from made_up_runs import write_record
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from sppctl import records
from sppctl.files import integrity
from sppctl.files.names import NOTE, RECORD


@pytest.fixture
def run(here: Path) -> Path:
    """A copy of the finished run, whose dense model is in ``base`` below the current directory."""
    return here / "run"


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub, which this process talks to with the right token."""
    with hub.running() as running:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", running.address)
        monkeypatch.setenv("HF_TOKEN", hub.TOKEN)
        yield running


def write_all(files: dict[str, bytes], directory: Path) -> Path:
    """A folder as it is downloaded from the hub."""
    directory.mkdir()
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return directory


def test_what_arrives_is_what_was_made_and_can_be_loaded(
    command: Command, run: Path, online: Hub, tmp_path: Path
) -> None:
    merged = run / "merged"
    (merged / "notes.txt").write_text("of no record")
    (merged / "logs").mkdir()
    (merged / "logs/events").write_text("")
    outcome = command("push", str(run), "me/sparse", "--json")
    assert outcome.code == 0, outcome.err
    there = online.repositories["me/sparse"]["main"]
    recorded = json.loads((merged / RECORD).read_text())["files"]
    assert set(there) == {*recorded, "README.md"}
    assert all(there[name] == (merged / name).read_bytes() for name in recorded)
    assert online.private["me/sparse"]
    assert outcome.json["url"].startswith(f"{online.address}/me/sparse/commit/")
    assert {one["file"]: one["bytes"] for one in outcome.json["files"]} == {k: len(v) for k, v in there.items()}
    assert 'from_pretrained("me/sparse"' in there["README.md"].decode()
    assert not any(str(run.parent).encode() in content for content in there.values())
    folder = write_all(there, tmp_path / "downloaded")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model(**tokenizer("hello", return_tensors="pt")).logits.isfinite().all()


def test_an_adapter_goes_without_paths_and_loads_on_the_pruned_weights(
    command: Command, run: Path, online: Hub, tmp_path: Path
) -> None:
    outcome = command("push", str(run / "adapter"), "me/adapter", "--base-model", "me/pruned")
    assert outcome.code == 0, outcome.err
    there = online.repositories["me/adapter"]["main"]
    assert set(there) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert json.loads(there["adapter_config.json"])["base_model_name_or_path"] == "me/pruned"
    assert ModelCard(there["README.md"].decode()).data.to_dict()["base_model"] == "me/pruned"
    without = command("push", str(run / "adapter"), "me/other")
    assert without.code == 0
    assert f"warning: nobody else has the base of this adapter, {run}/pruned: push it too" in without.err
    assert "warning" not in outcome.err
    folder = write_all(online.repositories["me/other"]["main"], tmp_path / "downloaded")
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    model = AutoModelForCausalLM.from_pretrained(run / "pruned")
    assert PeftModel.from_pretrained(model, folder).peft_type == "SPP"


def test_a_checkpoint_goes_without_paths(command: Command, run: Path, online: Hub) -> None:
    path = run / "merged/config.json"
    config = json.loads(path.read_text())
    public = {"text_config": {"_name_or_path": "owner/public"}, "experts": [{"width": 8}]}
    noted = config | public | {"_name_or_path": "/home/me/secret"}
    noted["experts"] = [{"width": 8, "_name_or_path": "/home/me/expert"}]
    path.write_text(json.dumps(noted))
    record = records.read(run / "merged" / RECORD, "merge")
    files = record.files | integrity.hashes(run / "merged", ["config.json"])
    write_record(run, "merge", replace(record, files=files))
    assert command("push", str(run), "me/sparse").code == 0
    there = json.loads(online.repositories["me/sparse"]["main"]["config.json"])
    assert there == config | public


def test_a_dry_run_lists_files_without_a_token_or_a_network(command: Command, run: Path) -> None:
    outcome = command("push", str(run / "pruned"), "me/sparse", "--dry-run")
    assert outcome.code == 0, outcome.err
    size = (run / "pruned/model.safetensors").stat().st_size
    assert f"{size:,}" in outcome.out
    assert "README.md" in outcome.out
    assert "stage.json" not in outcome.out
    assert "nothing was uploaded" in outcome.out


def test_a_revision_is_a_branch_and_leaves_main_alone(command: Command, run: Path, online: Hub) -> None:
    online.add("me/sparse", **{"README.md": b"older"})
    assert command("push", str(run), "me/sparse", "--revision", "v2").code == 0
    branches = online.repositories["me/sparse"]
    assert branches["main"] == {"README.md": b"older"}
    assert "model.safetensors" in branches["v2"]


def test_a_card_of_ones_own_is_uploaded_as_it_is(command: Command, run: Path, online: Hub) -> None:
    (run / "merged/README.md").write_text("# Mine\n")
    assert command("push", str(run), "me/sparse").code == 0
    assert online.repositories["me/sparse"]["main"]["README.md"] == b"# Mine\n"


def test_public_is_asked_for(command: Command, run: Path, online: Hub) -> None:
    assert command("push", str(run), "me/open", "--public").code == 0
    assert not online.private["me/open"]
    online.repositories["me/open"]["main"].clear()
    outcome = command("push", str(run), "me/open")
    assert outcome.code == 2
    assert "me/open is public" in outcome.err
    assert not online.repositories["me/open"]["main"]


def test_other_weights_in_the_repository_are_not_mixed_with_new_ones(command: Command, run: Path, online: Hub) -> None:
    online.add("me/sparse", **{"model-00001-of-00002.safetensors": b"old"})
    outcome = command("push", str(run), "me/sparse")
    assert outcome.code == 2
    assert "model-00001-of-00002.safetensors" in outcome.err
    assert list(online.repositories["me/sparse"]["main"]) == ["model-00001-of-00002.safetensors"]


def _damage(merged: Path) -> None:
    with (merged / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")


def _unfinish(merged: Path) -> None:
    (merged / RECORD).unlink()
    (merged / NOTE).write_text("{}")


def _lose(merged: Path) -> None:
    (merged / "config.json").unlink()


def _add(merged: Path) -> None:
    (merged / "model-00001-of-00002.safetensors").write_bytes(b"")


@pytest.mark.parametrize(
    ("change", "words"),
    [(_damage, "is damaged"), (_unfinish, "not a finished stage"), (_lose, "is missing"), (_add, "not in the record")],
)
def test_nothing_unfinished_or_damaged_leaves(
    command: Command, run: Path, online: Hub, change: object, words: str
) -> None:
    assert callable(change)
    change(run / "merged")
    outcome = command("push", str(run / "merged"), "me/sparse")
    assert outcome.code == 2
    assert words in outcome.err
    assert not online.requests


@pytest.mark.parametrize(
    ("status", "part", "words"),
    [
        (401, "/api/models", "does not accept the token (401)"),
        (403, "/api/repos/create", "must not write there (403)"),
        (409, "/commit/", "a conflict (409)"),
        (403, "/lfs/", "must not write there (403)"),
    ],
)
def test_a_refusal_of_the_hub_is_one_line(
    command: Command, run: Path, online: Hub, status: int, part: str, words: str
) -> None:
    online.refuse[part] = status
    outcome = command("push", str(run), "me/sparse")
    assert outcome.code == 1
    lines = [line for line in outcome.err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert words in lines[0]
    assert hub.TOKEN not in outcome.err


def test_a_wrong_token_is_named_and_not_printed(
    command: Command, run: Path, online: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    outcome = command("push", str(run), "me/sparse")
    assert outcome.code == 1
    assert "does not accept the token (401)" in outcome.err
    assert "hf_wrong" not in outcome.err


def test_without_token_or_network_it_says_so(
    command: Command, run: Path, online: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    outcome = command("push", str(run), "me/sparse")
    assert outcome.code == 1
    assert "could not be uploaded" in outcome.err
    assert "check the network" in outcome.err
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    outcome = command("push", str(run), "me/sparse")
    assert outcome.code == 2
    assert "no token" in outcome.err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    outcome = command("push", str(run), "me/sparse")
    assert outcome.code == 2
    assert "HF_HUB_OFFLINE" in outcome.err


@pytest.mark.parametrize("name", ["sparse", "me/a/b", "me/..", "me/a b", "-me/x"])
def test_a_name_that_the_hub_does_not_allow_is_refused(command: Command, run: Path, name: str) -> None:
    outcome = command("push", "--dry-run", "--", str(run), name)
    assert outcome.code == 2
    assert "is not the name of a repository" in outcome.err


def test_a_run_without_a_merged_checkpoint_says_what_to_name(command: Command, run: Path) -> None:
    (run / "merged").rename(run / "elsewhere")
    outcome = command("push", str(run), "me/sparse", "--dry-run")
    assert outcome.code == 2
    assert f"{run}/pruned" in outcome.err
    assert command("push", str(run / "elsewhere"), "me/sparse", "--dry-run").code == 0


def test_the_environment_decides_where_to(run: Path) -> None:
    """In a process of its own, because huggingface_hub reads its variables when it is imported."""
    with hub.running() as running:
        variables = {"HF_ENDPOINT": running.address, "HF_TOKEN": hub.TOKEN, "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "sppctl", "push", str(run / "adapter"), "me/adapter"],
            env=os.environ | {"HF_HUB_OFFLINE": "0"} | variables,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    there = running.repositories["me/adapter"]["main"]
    assert there["adapter_model.safetensors"] == (run / "adapter/adapter_model.safetensors").read_bytes()
