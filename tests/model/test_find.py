"""Checkpoints by name: what is found, what is downloaded, and what a wrong name is answered with."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from sppctl.errors import UserError
from sppctl.model import find
from sppctl.model.find import config_source, locate, locate_weights, newest_checkpoint


@pytest.fixture(autouse=True)
def nothing_is_known() -> None:
    """As when a command starts."""
    find._snapshot.cache_clear()
    find._hub_config.cache_clear()


@pytest.fixture
def fake_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that must not be imported."""
    directory = tmp_path / "packages" / "tiny_model_package"
    directory.mkdir(parents=True)
    (directory / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(str(directory.parent))
    return directory


def test_a_directory_is_itself_and_a_package_found_without_importing_it(llama: Path, fake_package: Path) -> None:
    assert locate(str(llama)) == llama
    (fake_package / "config.json").write_text("{}")
    assert locate("package:tiny_model_package") == fake_package
    assert "tiny_model_package" not in sys.modules


@pytest.mark.parametrize("name", ["no_such_package_here", "", "json.decoder", "a-b", "this"])
def test_a_missing_package_is_named(name: str) -> None:
    with pytest.raises(UserError, match=rf"package:{name}: no such package is installed \(pip install"):
        locate(f"package:{name}")


def test_a_gguf_file_is_inside_the_directory(fake_package: Path, llama: Path) -> None:
    for directory in (fake_package, fake_package.parent):
        (directory / "small.gguf").write_bytes(b"")
    assert locate("package:tiny_model_package", "small.gguf") == fake_package
    with pytest.raises(UserError, match=r"other\.gguf is not in .*; there is small\.gguf"):
        locate("package:tiny_model_package", "other.gguf")
    with pytest.raises(UserError, match=r"there is no \.gguf file"):
        locate(str(llama), "other.gguf")
    for name in ("../small.gguf", "/small.gguf", "a/../../small.gguf", "..\\small.gguf", "s\0.gguf"):
        with pytest.raises(UserError, match=r"^model\.gguf_file: .* is not the name of a file inside"):
            locate("package:tiny_model_package", name)


def test_an_adapter_is_no_model(llama: Path, tmp_path: Path) -> None:
    for name in ("adapter_config.json", "config.json"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(UserError, match=r"^prune\.mask_from: .* adapter; prune\.mask_from takes a full model$"):
            locate(str(tmp_path), key="prune.mask_from")
        assert locate(str(tmp_path), adapters=True) == tmp_path
    beside = Path(shutil.copytree(llama, tmp_path / "beside"))
    (beside / "adapter_config.json").write_text("{}")
    assert locate(str(beside)) == beside


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        locate(str(tmp_path))
    assert locate_weights(str(tmp_path)) == tmp_path
    (tmp_path / "small.gguf").write_bytes(b"")
    with pytest.raises(UserError, match=r"no config\.json.*; give .*: model\.gguf_file=small\.gguf$"):
        locate(str(tmp_path))
    with pytest.raises(UserError, match=rf"is a file.*; write model\.path={tmp_path} model\.gguf_file=small\.gguf$"):
        locate(str(tmp_path / "small.gguf"))
    for path in ("./nowhere", "/no/such/place", "a/b/c", "../model"):
        with pytest.raises(UserError, match=r"does not exist; give a hub id, a directory or package:NAME"):
            locate(path)


def test_a_hub_id_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=r"owner/name is not a local directory.*\(no network\).*HF_TOKEN"):
        locate("owner/name")


def test_a_hub_id_that_is_not_cached_is_not_downloaded_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, local_files_only: bool, **__: object) -> str:
        assert local_files_only
        raise huggingface_hub.errors.LocalEntryNotFoundError("not cached")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError, match="owner/name is neither a local directory nor in the hub's cache"):
        locate("owner/name", download=False)


COPIES = ["consolidated.safetensors", "original/model.safetensors", "onnx/config.json", "pytorch_model.bin"]
SHARDS = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]


@pytest.mark.parametrize(
    ("weights", "gguf_file", "wanted"),
    [
        (["model.safetensors"], None, ["model.safetensors"]),
        ([*SHARDS, "model.safetensors.index.json"], None, [*SHARDS, "model.safetensors.index.json"]),
        (["small.gguf", "large.gguf", "model.safetensors"], "small.gguf", ["small.gguf"]),
        (["q4/small.gguf"], "q4/small.gguf", ["onnx/config.json", "q4/small.gguf"]),
    ],
    ids=["one file", "shards", "gguf", "gguf in a folder"],
)
def test_a_hub_id_downloads_only_what_is_needed(
    weights: list[str], gguf_file: str | None, wanted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    always = ["config.json", "tokenizer.json", "modeling_own.py", "additional_chat_templates/tool_use.jinja"]
    repository = dict.fromkeys([*always, *COPIES, *weights], "")
    if "model.safetensors.index.json" in repository:
        repository["model.safetensors.index.json"] = json.dumps(
            {"metadata": {}, "weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0]}}
        )

    def download(name: str, revision: str | None, local_files_only: bool, **patterns: Any) -> str:
        assert (name, revision, local_files_only) == ("owner/name", "v2", False)
        for path in huggingface_hub.utils.filter_repo_objects(repository, **patterns):
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).write_text(repository[path])
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert locate("owner/name", gguf_file, revision="v2") == tmp_path
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {*always, *wanted}


def test_the_code_of_a_configuration_comes_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = ["config.json", "configuration_own.py", "tools/convert.py", "onnx/config.json", "model.safetensors"]
    asked: list[str] = []

    def download(name: str, revision: str | None, **patterns: Any) -> str:
        asked.extend(huggingface_hub.utils.filter_repo_objects(repository, **patterns))
        (tmp_path / "config.json").write_text("{}")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert config_source("owner/name") == (tmp_path / "config.json", "config.json from the hub")
    assert asked == ["config.json", "configuration_own.py"]


@pytest.mark.parametrize("key", ["max_position_embeddings", "n_positions", "max_seq_len"])
def test_the_longest_input_has_several_names(key: str, tmp_path: Path) -> None:
    for config in ({key: 64}, {"text_config": {key: 64}}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert find.max_window(str(tmp_path)) == 64


def test_a_command_asks_the_hub_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    answers = iter([str(tmp_path)] * 3)  # files, templates, and config.json alone

    def download(*_: object, **__: object) -> str:
        return next(answers)  # StopIteration: it was asked again

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert [locate("owner/name"), locate("owner/name", key="RUN")] == [tmp_path, tmp_path]
    config = tmp_path / "config.json", "config.json from the hub"
    assert [config_source("owner/name"), config_source("owner/name")] == [config, config]


# --- wrong names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["runs/tinny", "rums/tiny", "./runs/tinny", "runs/tinny/merged", "{root}/runs/tinny"])
def test_a_wrong_name_is_answered_with_the_most_similar_directory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "tiny" / "merged").mkdir(parents=True)
    (tmp_path / "runs" / "tinny.yaml").touch()
    monkeypatch.chdir(tmp_path)
    name = name.format(root=tmp_path)
    similar = name.removeprefix("./").replace("tinny", "tiny").replace("rums", "runs")
    with pytest.raises(UserError, match=rf"^RUN: {name} .*; did you mean {similar}\?$"):
        locate(name, key="RUN")


def test_a_run_is_not_a_checkpoint_but_has_one(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    for folder in ("adapter", "pruned", "merged"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "stage.json").touch()
        newest = None if folder == "adapter" else tmp_path / folder
        assert newest_checkpoint(tmp_path) == newest
    with pytest.raises(UserError, match=rf"is a run, not a checkpoint; name .*, such as {tmp_path}/merged$"):
        locate(str(tmp_path))


WRONG = """
generate runs/tinny
    RUN: runs/tinny ... did you mean runs/tiny?
inspect runs/tinny
    CHECKPOINT: runs/tinny ... did you mean runs/tiny?
bench runs/tinny
    CHECKPOINT: runs/tinny ... did you mean runs/tiny?
push runs/tinny OWNER/NAME
    runs/tinny does not exist; did you mean runs/tiny?
report runs/tinny
    runs/tinny does not exist; did you mean runs/tiny?
verify runs/tinny
    runs/tinny does not exist; did you mean runs/tiny?
clean runs/tinny
    runs/tinny does not exist; did you mean runs/tiny?
prune --model runs/tinny
    model.path: runs/tinny ... did you mean runs/tiny?
run --model runs/tiny train.data.dataset=alpacaa prune.calibration.dataset=wikitex2 eval.perplexity=[wikitext3]
    prune.calibration.dataset: wikitex2 ... did you mean wikitext2?
    train.data.dataset: alpacaa ... did you mean alpaca?
    eval.perplexity: wikitext3 ... did you mean wikitext2?
sweep sweep.yaml --dry-run
    train.data.dataset: alpacaa ... did you mean alpaca?
"""
SWEEP = "grid: {run.seed: [0, 1]}\noverrides: {train.data.dataset: alpacaa}\n"
CALLS = """
import sys
from sppctl import cli
for line in sys.stdin:
    sys.argv = ["sppctl", *line.split()]
    try:
        cli.main()
    except SystemExit as stop:
        assert stop.code == 2, line
assert "torch" not in sys.modules
"""


def test_wrong_names_are_answered_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    calls = "".join(line for line in WRONG.strip().splitlines(True) if not line.startswith(" "))
    done = subprocess.run([sys.executable, "-c", CALLS], cwd=tmp_path, input=calls, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    errors = [line.removeprefix("error: ") for line in done.stderr.splitlines() if line.startswith("error: ")]
    expected = [line.strip().split(" ... ") for line in WRONG.splitlines() if line.startswith(" ")]
    assert len(errors) == len(expected)
    for error, (start, *end) in zip(errors, expected, strict=True):
        assert error.startswith(start)
        assert error.endswith(tuple(end) or start)
