"""A finished run, one of whose files is not what a stage left there: the next stage that reads it says which."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from sppctl.config.load import load_config
from sppctl.errors import UserError
from sppctl.files import integrity, sealed
from sppctl.files.names import LOG
from sppctl.run import pipeline, verify
from sppctl.run.directory import Run
from sppctl.run.stages import MERGE, PRUNE, TRAIN

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def run_dir(here: Path) -> Path:
    return here / "run"


def run(*overrides: str, force: bool = False) -> Run:
    return Run(load_config("tiny.yaml", [*overrides]), force=force)


def tree(directory: Path) -> dict[str, bytes]:
    """Every file with its content, except the log."""
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file() and path.name != LOG}


def damages(path: Path) -> Iterator[str]:
    """Damages a file in one way after the other, and makes it whole again."""
    whole = path.read_bytes()
    files = sorted(other for other in path.parent.iterdir() if other.is_file())
    neighbour = files[files.index(path) - 1].read_bytes()
    bit = whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :]
    for name, content in {"a bit": bit, "truncated": whole[: len(whole) // 2], "the neighbour's": neighbour}.items():
        path.write_bytes(content)
        yield name
    path.unlink()
    yield "missing"
    path.write_bytes(whole)


# --- every file in turn -----------------------------------------------------------------------------------------------

READERS: dict[str, Callable[[], object]] = {
    "pruned": lambda: run().do(TRAIN),
    "adapter": lambda: run().do(MERGE),
    "merged": lambda: pipeline.evaluate_some(run(), ["merged"]),
    "eval": lambda: pipeline.report([Path("run")]),
}
MAKERS = {"pruned": PRUNE, "adapter": TRAIN, "merged": MERGE}


@pytest.mark.slow
@pytest.mark.parametrize("folder", READERS)
def test_every_damage_to_every_file_is_named_by_the_next_stage_that_reads_it(folder: str, run_dir: Path) -> None:
    paths = [path for path in sorted((run_dir / folder).rglob("*")) if path.is_file() and "logs" not in path.parts]
    paths = [path for path in paths if path.name != "README.md"]
    assert len(paths) >= 3
    for path in paths:
        for damage in damages(path):
            if (folder, damage) == ("eval", "missing"):
                continue  # not measured
            before = tree(run_dir)
            with pytest.raises(UserError) as caught:
                READERS[folder]()
            lines = str(caught.value).splitlines()
            name = f"run/{folder}/{path.name}"
            assert any(line.startswith(f"{name} ") for line in lines), (path, damage, lines)
            assert tree(run_dir) == before, (path, damage)
            assert [file.file for file in verify.execute(Path("run")) if file.state != "ok"] == [path.name], damage
    if folder != "eval":
        assert READERS[folder]()  # whole again


@pytest.mark.parametrize("folder", MAKERS)
def test_a_stage_is_not_up_to_date_while_its_own_files_are_damaged(folder: str, run_dir: Path) -> None:
    stage = MAKERS[folder]
    weights = next((run_dir / folder).glob("*.safetensors"))
    whole = weights.read_bytes()
    for _ in damages(weights):
        with pytest.raises(UserError, match=rf"run/{folder}/{weights.name} .*sppctl {stage.name} run --force"):
            run().do(stage)
    weights.unlink()
    run(force=True).do(stage)
    assert weights.read_bytes() == whole


def test_weights_that_no_stage_wrote_are_refused(run_dir: Path) -> None:
    shutil.copy(run_dir / "pruned/model.safetensors", run_dir / "merged/model-00001-of-00001.safetensors")
    with pytest.raises(UserError, match=r"merged/model-00001-of-00001.safetensors is not in the record .*remove it"):
        pipeline.evaluate_some(run(), ["merged"])


LOADED = ["chat_template.json", "processor_config.json", "spiece.model", "modeling_own.py", "pytorch_model.bin"]


@pytest.mark.parametrize("name", LOADED)
def test_other_files_that_a_library_would_load_are_refused(name: str, run_dir: Path) -> None:
    (run_dir / "merged" / name).write_text("{}")
    (run_dir / "merged/notes.txt").write_text("no library loads this")
    with pytest.raises(UserError, match=rf"merged/{name} is not in the record .*remove it"):
        pipeline.evaluate_some(run(), ["merged"])
    assert [file.file for file in verify.execute(Path("run")) if file.state == "surplus"] == [name]


def test_a_run_that_was_moved_or_copied_is_whole(run_dir: Path) -> None:
    shutil.copytree(run_dir, run_dir.parent / "copy")
    run_dir.rename(run_dir.parent / "moved")
    for name in ("copy", "moved"):
        assert {file.state for file in verify.execute(Path(name))} == {"ok"}
        run(f"run.dir={name}").do(MERGE)


def test_dense_weights_in_the_place_of_pruned_ones_are_neither_trained_nor_merged(run_dir: Path) -> None:
    shutil.copy("base/model.safetensors", run_dir / "pruned/model.safetensors")
    before = tree(run_dir)
    for stage in (TRAIN, MERGE):
        for force in (False, True):
            with pytest.raises(UserError, match=r"run/pruned/model.safetensors is damaged: .*sppctl prune run --force"):
                run(force=force).do(stage)
    assert tree(run_dir) == before


# --- records that agree with other weights ----------------------------------------------------------------------------


def rehash(directory: Path) -> None:
    """Lets a record agree with the files that lie beside it now."""
    path = directory / "stage.json"
    record = sealed.read(path, "")
    record["files"] = integrity.hashes(directory, integrity.listing(directory))
    path.write_text(json.dumps(sealed.seal(record)))


def test_merging_is_held_to_the_recorded_masks_not_to_the_file_it_finds(run_dir: Path) -> None:
    path = run_dir / "pruned/model.safetensors"
    weights = load_file(path)
    weights[f"{Q}.weight"] = load_file("base/model.safetensors")[f"{Q}.weight"]
    save_file(weights, path, {"format": "pt"})
    rehash(run_dir / "pruned")
    before = tree(run_dir)
    with pytest.raises(UserError, match=r"adapter was trained on weights with other zeros than these \(mask_digest"):
        run(force=True).do(MERGE)
    assert tree(run_dir) == before
    config = run_dir / "adapter/adapter_config.json"  # an adapter that does not know its zeros
    config.write_text(json.dumps(json.loads(config.read_text()) | {"mask_digest": None}))
    rehash(run_dir / "adapter")
    before = tree(run_dir)
    with pytest.raises(UserError, match=rf"pruned/model.safetensors: {Q}.weight does not have the zeros .* recorded"):
        run(force=True).do(MERGE)
    assert tree(run_dir) == before


def test_half_an_adapter_is_refused_with_a_matrix_that_it_lacks(run_dir: Path) -> None:
    path = run_dir / "adapter/adapter_model.safetensors"
    weights = load_file(path)
    save_file({name: tensor for name, tensor in weights.items() if ".layers.1." in name}, path, {"format": "pt"})
    rehash(run_dir / "adapter")
    with pytest.raises(UserError, match=r"run/adapter lacks 7 of the 14 matrices .* model.layers.0.mlp.down_proj"):
        run(force=True).do(MERGE)


# --- the base ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["one weight", "another path"])
def test_a_base_that_is_not_what_was_pruned_is_not_compared_with(how: str, run_dir: Path, llama: Path) -> None:
    weights = load_file(llama / "model.safetensors")
    weights["lm_head.weight"][100, 20] += 1
    shutil.copytree(llama, "other")
    save_file(weights, "other/model.safetensors", {"format": "pt"})
    override = ["model.path=other"]
    if how == "one weight":
        shutil.copy("other/model.safetensors", "base/model.safetensors")
        override = []
    before = tree(run_dir)
    said = r"model.path: \S+ does not hold the weights that run/pruned was made from"
    for models, more in ((["base"], []), (["merged"], ["eval.divergence=base"])):
        with pytest.raises(UserError, match=said):
            pipeline.evaluate_some(run(*override, *more), models)
    if not override:
        for more in (["train.distill.teacher=base"], ["train.refresh.steps=1"]):
            with pytest.raises(UserError, match=said):
                run(*more, force=True).do(TRAIN)
        with pytest.raises(UserError, match="run/pruned was made with other base content"):
            run().do(PRUNE)
    assert tree(run_dir) == before
    pipeline.evaluate_some(run(*override, "eval.divergence=null"), ["merged"])  # which has no use for the base
