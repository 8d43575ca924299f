"""sppctl clean: what is listed, and that only what was named is deleted."""

from __future__ import annotations

import fcntl
import json
import shutil
from pathlib import Path

import pytest
from made_up_runs import change_record, stage_of, write_record

from sppctl import cli
from sppctl.files import sealed
from sppctl.files.names import RECORD
from sppctl.records import UnpackedRecord, to_json
from sppctl.run.publish import LOCK

FILES = {
    "pruned/model.safetensors": 1000,
    f"pruned/{RECORD}": 10,
    "adapter/adapter_model.safetensors": 100,
    "merged/model.safetensors": 1000,
    f"merged/{RECORD}": 10,
    f"base/{RECORD}": 10,
    ".adapter.partial/checkpoints/checkpoint-12/state.safetensors": 50,
    ".adapter.partial/checkpoints/checkpoint-8/state.safetensors": 50,
    ".merged.old/model.safetensors": 7,
    ".merged.partial/model.safetensors": 5,
    "base/model.safetensors": 2000,
    "eval/base.json": 3,
    "notes.txt": 4,
}


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "cache"
    monkeypatch.setenv("SPPCTL_CACHE", str(cache))
    mine = {"cache/windows/entry.safetensors": 30, "cache/examples/mine.txt": 6, "cache/mine/entry.safetensors": 6}
    for name, size in ({f"run/{name}": size for name, size in FILES.items()} | mine).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    run = tmp_path / "run"
    sealed.write(run / "base" / RECORD, to_json(UnpackedRecord("base", {}, 1.0, "base", {})))
    write_record(run, "prune", stage_of("prune", output="first"))
    write_record(run, "merge", stage_of("merge", inputs={"pruned": "first"}))
    return run


def clean(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["sppctl", "clean", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert isinstance(stop.value.code, int)
    return stop.value.code


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_it_lists_with_sizes_and_deletes_nothing(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(run_dir.parent)
    assert clean(monkeypatch, str(run_dir), "--json") == 0
    pieces = {Path(piece["path"]).name: piece for piece in json.loads(capsys.readouterr().out)}
    assert {name: (piece["kind"], piece["size"]) for name, piece in pieces.items()} == {
        ".adapter.partial": ("unfinished", 100),
        ".merged.old": ("leftovers", 7),
        ".merged.partial": ("leftovers", 5),
        "base": ("base", 2000 + (run_dir / "base" / RECORD).stat().st_size),
        "windows": ("cache", 30),
    }
    assert clean(monkeypatch, str(run_dir)) == 0
    assert "(leftovers, base); with --caches also 0.0 MB that all runs share" in capsys.readouterr().out
    assert "step 12" in pieces[".adapter.partial"]["cost"]
    assert files(run_dir.parent) == before


@pytest.mark.parametrize(
    ("kinds", "removed"),
    [
        ((), {".merged.old", ".merged.partial", "base"}),
        (("--caches",), {".merged.old", ".merged.partial", "base"}),
        (("--kinds", "unfinished"), {".adapter.partial"}),
        (("--kinds", "weights"), set()),  # the unfinished training needs them
    ],
)
def test_yes_deletes_what_is_named_and_no_more(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, kinds: tuple[str, ...], removed: set[str]
) -> None:
    assert clean(monkeypatch, str(run_dir), "--yes", *kinds) == 0
    expected = {name for name in FILES if not any(name.startswith(piece) for piece in removed)}
    assert files(run_dir) - {LOCK} == expected
    cached = {"windows/entry.safetensors"} if "--caches" in kinds else set()
    assert (
        files(run_dir.parent / "cache")
        == {
            "windows/entry.safetensors",
            "examples/mine.txt",
            "mine/entry.safetensors",
        }
        - cached
    )


def test_weights_are_deleted_once_they_are_merged(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(run_dir / ".adapter.partial")
    change_record(run_dir, "prune", output="second")
    assert clean(monkeypatch, str(run_dir), "--kinds", "weights", "--yes") == 0
    assert "pruned/model.safetensors" in files(run_dir)
    (run_dir / "merged" / RECORD).write_text("{}")
    assert clean(monkeypatch, str(run_dir), "--kinds", "weights", "--yes") == 0
    assert "pruned/model.safetensors" in files(run_dir)
    write_record(run_dir, "merge", stage_of("merge", inputs={"pruned": "second"}))
    assert clean(monkeypatch, str(run_dir), "--kinds", "weights", "--yes") == 0
    assert {"pruned/model.safetensors", f"pruned/{RECORD}"} & files(run_dir) == {f"pruned/{RECORD}"}


@pytest.mark.parametrize("name", ["pruned", "base", ".merged.old", ".adapter.partial"])
def test_links_are_left_alone(
    name: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "pruned":
        shutil.rmtree(run_dir / ".adapter.partial")
    (run_dir / name).rename(run_dir.parent / "elsewhere")
    (run_dir / name).symlink_to("../elsewhere")
    before = files(run_dir.parent / "elsewhere")
    assert clean(monkeypatch, str(run_dir), "--kinds", "leftovers,base,unfinished,weights", "--yes") == 0
    assert f"clean: {run_dir / name} is a link, and is left alone" in capsys.readouterr().err
    assert files(run_dir.parent / "elsewhere") == before


def test_a_base_of_the_user_is_kept(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run_dir / "base" / RECORD).unlink()
    assert clean(monkeypatch, str(run_dir), "--yes") == 0
    assert "base/model.safetensors" in files(run_dir)
    write_record(run_dir, "prune", stage_of("prune"))
    shutil.copy(run_dir / "pruned" / RECORD, run_dir / "base" / RECORD)  # a pruned model of another run
    assert clean(monkeypatch, str(run_dir), "--yes") == 0
    assert "base/model.safetensors" in files(run_dir)


def test_a_complete_stage_that_is_not_published_yet_is_kept(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run_dir / ".adapter.partial" / RECORD).write_text("{}")
    assert clean(monkeypatch, str(run_dir), "--kinds", "unfinished", "--yes") == 0
    assert (run_dir / ".adapter.partial" / RECORD).exists()


def test_bad_input_ends_with_2(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert clean(monkeypatch, str(run_dir.parent / "cache")) == 2
    assert clean(monkeypatch, str(run_dir), "--kinds", "weight") == 2
    assert "--kinds: 'weight' is not one of leftovers, base, unfinished, weights" in capsys.readouterr().err
    assert clean(monkeypatch, str(run_dir), "--kinds", "cache") == 2
    assert "; --caches deletes the caches" in capsys.readouterr().err
    with (run_dir / LOCK).open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert clean(monkeypatch, str(run_dir), "--yes") == 2
    assert files(run_dir) - {LOCK} == set(FILES)
