"""What is computed in: chosen once for a stage by the machine, recorded, and kept on machines that choose otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import kept_per_group, shards
from conftest import AVX2, BF16, Cpu, cut_after
from safetensors.torch import load_file

from sppctl import machine
from sppctl.config.load import load_config
from sppctl.errors import UserError
from sppctl.model import checkpoint
from sppctl.prune import walk
from sppctl.records import BlockRecord
from sppctl.run import dense as dense_model
from sppctl.run import pipeline
from sppctl.run.directory import Run
from sppctl.run.stages import PRUNE, TRAIN

pytestmark = pytest.mark.slow

NO_UNITS = "computing in float32 (this CPU has no bfloat16 units)"
Work = Callable[..., Run]


@pytest.fixture
def work(config_file: Path, make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Work:
    """work("key=value", ..., dtype=) -> a run of the tiny configuration on a bfloat16 model."""
    monkeypatch.chdir(config_file.parent)

    def run(*overrides: str, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Run:
        model = f"model.path={make_checkpoint('llama', dtype)}"
        return Run(load_config(str(config_file), [model, "train.max_steps=4", *overrides]), **options)

    return run


def recorded(run: Run, *stages: str) -> list[str | None]:
    return [json.loads((run.path(stage) / "stage.json").read_text())["compute_dtype"] for stage in stages]


def test_a_bfloat16_model_on_a_cpu_without_units(work: Work, cpu: Cpu, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything is computed in float32, everything is stored in bfloat16; other machines find nothing to redo."""
    cpu(AVX2)
    run = work()
    pipeline.run_all(run)
    said = capsys.readouterr().err
    stages = [line.partition(": ") for line in said.splitlines() if "computing in" in line]
    assert [stage for stage, _, _ in stages] == ["prune", "train", "eval base", "eval pruned", "eval merged"]
    assert {text for _, _, text in stages} == {NO_UNITS}
    assert said.index("prune: computing") < said.index("checking that replayed blocks")
    assert recorded(run, "prune", "train", "merge") == ["float32", "float32", None]
    pruned, merged = (load_file(run.path(stage) / "model.safetensors") for stage in ("prune", "merge"))
    assert {tensor.dtype for tensor in [*pruned.values(), *merged.values()]} == {torch.bfloat16}
    assert any(not torch.equal(pruned[name], merged[name]) for name in pruned)
    for name in pruned:
        assert torch.equal(pruned[name] == 0, merged[name] == 0), name
        if name.endswith("_proj.weight"):
            assert (kept_per_group(pruned[name]) == 2).all()
    for label in ("base", "pruned", "merged"):
        results = json.loads((run.directory / f"eval/{label}.json").read_text())["results"]
        assert {result["dtype"] for result in results} == {"float32"}

    for flags, key in ((BF16, "auto"), (AVX2, "auto"), (BF16, "float32")):
        cpu(flags)
        pipeline.run_all(work(f"model.compute_dtype={key}"))
        assert capsys.readouterr().err.count("up to date") == 6
    for stage in (PRUNE, TRAIN):
        with pytest.raises(UserError, match=r"was made with model\.compute_dtype = float32, now bfloat16; "):
            work("model.compute_dtype=bfloat16").do(stage)


def test_pruning_goes_on_in_the_dtype_that_it_was_begun_in(
    work: Work, cpu: Cpu, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    method = "prune.method=sparsegpt"
    cpu(BF16)
    work(method, "run.dir=whole").do(PRUNE)
    append = walk.Journal.append

    def then_stop(self: walk.Journal, entry: BlockRecord) -> None:
        append(self, entry)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(walk.Journal, "append", then_stop)
        with pytest.raises(KeyboardInterrupt):
            work(method, "run.dir=cut").do(PRUNE)
    cpu(AVX2)
    with pytest.raises(UserError, match=r"attempt with model\.compute_dtype = bfloat16, now float32"):
        work(method, "run.dir=cut", "model.compute_dtype=float32").do(PRUNE)
    capsys.readouterr()
    run = work(method, "run.dir=cut")
    run.do(PRUNE)
    first, *more = capsys.readouterr().err.splitlines()
    assert first == "prune: computing in bfloat16 as the interrupted attempt did"
    assert "prune: 1 of 2 blocks are done" in more
    assert shards(Path("cut/pruned")) == shards(Path("whole/pruned"))
    assert recorded(run, "prune") == ["bfloat16"]
    work(method, "run.dir=other").do(PRUNE)
    assert shards(Path("other/pruned")) != shards(Path("whole/pruned"))


def test_training_goes_on_in_the_dtype_that_it_was_begun_in(work: Work, cpu: Cpu, tmp_path: Path) -> None:
    options = ("train.save_steps=1", "train.lr=5e-2")
    cpu(AVX2)
    for name in ("whole", "cut"):
        work(*options, f"run.dir={name}").do(PRUNE)
    work(*options, "run.dir=whole").do(TRAIN)
    with cut_after(2):
        work(*options, "run.dir=cut").do(TRAIN)
    cpu(BF16)
    run = work(*options, "run.dir=cut")
    run.do(TRAIN)
    assert recorded(run, "train") == ["float32"]
    assert shards(Path("cut/adapter")) == shards(Path("whole/adapter"))
    work(*options, "run.dir=cut", force=True).do(TRAIN)
    assert shards(Path("cut/adapter")) != shards(Path("whole/adapter"))


def test_results_stay_valid_unless_a_dtype_is_asked_for(
    work: Work, cpu: Cpu, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cpu(BF16)
    work().do(PRUNE)
    first = pipeline.evaluate_some(work(), ["base", "pruned"])
    assert first["pruned"]["results"][0]["metrics"]["kl"] > 0
    loaded = []
    load = checkpoint.load_model
    monkeypatch.setattr(checkpoint, "load_model", lambda *args, **more: loaded.append(args[2]) or load(*args, **more))
    cpu(AVX2)
    assert pipeline.evaluate_some(work(), ["base", "pruned"]) == first
    assert loaded == []
    capsys.readouterr()
    again = pipeline.evaluate_some(work("model.compute_dtype=float32"), ["pruned"])["pruned"]["results"]
    assert "eval pruned: computing in float32 as configured" in capsys.readouterr().err
    assert loaded == ["float32", "float32"]  # the dense model that it is compared with, and itself
    (old,), (new,) = first["pruned"]["results"], again
    assert (old["dtype"], new["dtype"]) == ("bfloat16", "float32")
    assert old["metrics"]["kl"] != new["metrics"]["kl"]

    collected = pipeline.report([work().directory]).to_json()
    names = [list(row["measures"]) for row in collected["table"]]
    assert names[0][0].endswith(", computed in bfloat16")
    assert names[1][0].endswith(", computed in float32")
    assert collected["comparisons"] == []
    assert ": measured differently; only equal ones are compared (base computed in bfloat16" in collected["notes"][0]


def test_float32_is_not_rounded_to_compute_unless_that_is_asked_for(work: Work, cpu: Cpu) -> None:
    """And what is stored is rounded neither way."""
    cpu(BF16)
    plain = work("run.dir=plain", dtype=torch.float32)
    asked = work("run.dir=asked", "model.compute_dtype=bfloat16", dtype=torch.float32)
    for run in (plain, asked):
        run.do(PRUNE)
        run.do(TRAIN)
    assert recorded(plain, "prune", "train") == ["float32", "float32"]
    assert recorded(asked, "prune", "train") == ["bfloat16", "bfloat16"]
    assert shards(plain.path("train")) != shards(asked.path("train"))
    dense = load_file(dense_model.base(plain) / "model.safetensors")
    for name, tensor in load_file(asked.path("prune") / "model.safetensors").items():
        assert torch.equal(tensor, torch.where(tensor == 0, 0, dense[name])), name


def test_what_fits_only_as_stored_names_the_key(
    work: Work, cpu: Cpu, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cpu(AVX2)
    run = work("eval.divergence=null")
    run.do(PRUNE)
    size = checkpoint.weight_bytes(run.path("prune"), "float32")
    said = {}
    for free in (size, size - 1, size // 2 - 1):  # all of it fits, half of it fits, nothing does
        monkeypatch.setattr(machine, "free_memory", lambda _, free=free: free)
        capsys.readouterr()
        pipeline.evaluate_some(Run(run.config, force=True), ["pruned"])
        said[free] = "model.compute_dtype=bfloat16 needs half" in capsys.readouterr().err
    assert list(said.values()) == [False, True, False]


def test_float16_is_refused_for_training_before_anything_is_done(work: Work) -> None:
    run = work("model.compute_dtype=float16")
    with pytest.raises(UserError, match=r"^model\.compute_dtype: float16 gradients overflow; train in bfloat16"):
        pipeline.run_all(run)
    assert not run.directory.exists()


def test_a_launchers_mixed_precision_is_not_used(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, precision in (("plain", "no"), ("launched", "bf16")):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
        run = work(f"run.dir={name}", "prune.method=magnitude", "train.lr=5e-2", dtype=torch.float32)
        run.do(PRUNE)
        run.do(TRAIN)
    assert shards(Path("plain/adapter")) == shards(Path("launched/adapter"))
