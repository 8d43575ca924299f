"""Sweeps: the grid, what runs share, stopping and going on, the jobs of a cluster, and the table over all runs."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shlex
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from cluster import Cluster
from conftest import Command
from made_up_runs import task, text
from processes import sppctl
from safetensors.torch import load_file
from stage_calls import write_record

from sppctl import launch
from sppctl.config.load import load_config, shipped_configs
from sppctl.config.settings import Config
from sppctl.errors import StageError, Stopped, UserError
from sppctl.evaluate.results import Results
from sppctl.records import to_json
from sppctl.run import pipeline
from sppctl.run.attempts import settings_of
from sppctl.run.directory import Run
from sppctl.run.stages import Prune
from sppctl.sweep import slurm
from sppctl.sweep import work as sweep
from sppctl.sweep.grid import expand, load_sweep, run_name

pytestmark = pytest.mark.slow

# ends the process as kill -9 does, when the training of the second run has begun
DEATH = """
import os, signal
from sppctl.run.stages import Train
original, done = Train.do, []
def do(self, *args, **kwargs):
    done.append(args)
    if len(done) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *args, **kwargs)
Train.do = do
"""


@pytest.fixture
def sweep_file(tmp_path: Path, config_file: Path) -> Path:
    """2 methods x 2 patterns x 2 methods of training on the tiny Llama."""
    path = tmp_path / "small.yaml"
    path.write_text(f"""
base: {config_file}
dir: {tmp_path / "sweep"}
grid:
  prune.method: [magnitude, wanda]
  prune.pattern: [2:4, 0.5]
  train.method: [spp, masked_lora]
overrides: {{train.max_steps: 2, train.dropout: 0.0, train.micro_batch_size: 4, train.report_to: []}}
""")
    return path


def problems_of(path: Path, text: str, *overrides: str) -> list[str]:
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_sweep(str(path), overrides)
    return [line.removeprefix(f"{path}: ") for line in str(caught.value).splitlines()]


# --- the grid ---------------------------------------------------------------------------------------------------------


def test_a_grid_is_every_combination_of_its_values_without_those_that_an_exclusion_is_part_of() -> None:
    grid = {"a": [1, 2], "b": ["x", "y"], "c": [5]}
    every = [{"a": a, "b": b, "c": 5} for a, b in ((1, "x"), (1, "y"), (2, "x"), (2, "y"))]
    assert expand(grid) == every
    assert expand(grid, [{"a": 1, "b": "y"}, {"b": "x", "a": 2, "c": 5}]) == [every[0], every[3]]
    assert expand(grid, [{"c": 5}]) == []


def test_a_name_has_the_keys_that_vary_in_the_order_of_the_pipeline() -> None:
    point = {"run.seed": 0, "train.rank": 16, "train.method": "spp", "prune.pattern": "2:4", "prune.method": "wanda"}
    assert run_name(point, list(point)) == "wanda-2of4-spp-r16-s0"
    assert run_name(point, ["prune.pattern", "run.seed"]) == "2of4-s0"
    assert run_name({"train.lr": 0.004, "train.data.dataset": "a/b.jsonl"}, ["train.lr", "train.data.dataset"]) == (
        "dataset-a-b.jsonl-lr0.004"
    )


def test_what_runs_share_follows_from_the_keys_that_differ(sweep_file: Path) -> None:
    read = load_sweep(str(sweep_file))
    assert list(read.dense) == ["dense"]
    assert list(read.pruned) == [f"pruned-{m}-{p}" for m in ("magnitude", "wanda") for p in ("2of4", "0.5")]
    assert list(read.runs)[:3] == ["magnitude-2of4-spp", "magnitude-2of4-masked_lora", "magnitude-0.5-spp"]
    assert len(read.runs) == 8
    run = read.runs["wanda-0.5-masked_lora"]
    assert run.parent == "pruned-wanda-0.5"
    assert str(run.config.prune.pattern) == "0.5"
    assert (run.config.train.method, run.config.train.max_steps) == ("masked_lora", 2)
    # the words on a command line mean the same run
    assert load_config(run.arguments[0], run.arguments[1:]) == run.config
    shared = read.pruned["pruned-wanda-0.5"]
    assert load_config(shared.arguments[0], shared.arguments[1:]) == shared.config
    assert [member.name for member in read.members()][:4] == [
        *("dense", "pruned-magnitude-2of4", "magnitude-2of4-spp", "magnitude-2of4-masked_lora")
    ]


def test_another_seed_prunes_anew_and_another_rank_does_not(sweep_file: Path) -> None:
    sweep_file.write_text(f"base: {sweep_file.parent}/tiny.yaml\ngrid: {{train.rank: [2, 4], run.seed: [0, 1]}}")
    read = load_sweep(str(sweep_file))
    assert list(read.pruned) == ["pruned-s0", "pruned-s1"]
    assert {name: run.parent for name, run in read.runs.items()} == {
        "r2-s0": "pruned-s0",
        "r2-s1": "pruned-s1",
        "r4-s0": "pruned-s0",
        "r4-s1": "pruned-s1",
    }


def test_the_command_line_wins_over_grid_and_overrides(sweep_file: Path, tmp_path: Path) -> None:
    read = load_sweep(str(sweep_file), ["prune.method=sparsegpt", "train.max_steps=7", f"run.dir={tmp_path / 'b'}"])
    assert list(read.runs) == [f"{p}-{t}" for p in ("2of4", "0.5") for t in ("spp", "masked_lora")]
    run = read.runs["2of4-spp"].config
    assert (run.prune.method, run.train.max_steps, run.run.dir) == ("sparsegpt", 7, str(tmp_path / "b" / "2of4-spp"))


def test_an_exclusion_with_another_value_than_the_command_line_excludes_nothing() -> None:
    assert {run.config.train.method for run in load_sweep("sweep-example", ["train.rank=16"]).runs.values()} == {
        "spp",
        "masked_lora",
    }
    assert {run.config.train.method for run in load_sweep("sweep-example", ["train.rank=8"]).runs.values()} == {"spp"}


def test_the_shipped_sweep_is_no_configuration_of_a_run() -> None:
    assert "sweep-example" in shipped_configs(sweeps=True)
    assert "sweep-example" not in shipped_configs()
    assert len(load_sweep("sweep-example").runs) == 2 * 2 * (2 * 2 - 1)
    with pytest.raises(UserError, match="is a sweep, not the configuration of one run: sppctl sweep"):
        load_config(str(shipped_configs(sweeps=True)["sweep-example"]))


# --- problems ---------------------------------------------------------------------------------------------------------


def test_unknown_keys_and_no_grid_point_to_an_example(tmp_path: Path) -> None:
    for content, start in (
        ("grid: {run.seed: [0]}\nname: x\n", "name: unknown key; a sweep has base, dir, grid, overrides, exclude; "),
        ("dir: x\n", "a sweep needs `grid:`, "),
    ):
        (problem,) = problems_of(tmp_path / "bad.yaml", content)
        assert problem.startswith(start)
        example = problem.removesuffix(" is an example").rpartition(" ")[2]
        assert load_sweep(example).runs


def test_all_problems_of_the_file_come_at_once(tmp_path: Path) -> None:
    text = """
dirr: x
grid: {prune.metod: [wanda], train.rank: 4, run.seed: [0, 1, 0], train.method: [spp, lora]}
overrides: {run.dir: x, train.rank: 8}
exclude: [{train.lr: 1}, {train.method: ste}, 3]
"""
    assert problems_of(tmp_path / "bad.yaml", text) == [
        "dirr: unknown key; did you mean dir?",
        "grid: prune.metod: unknown key; did you mean prune.method?",
        "grid: train.rank: expected a list of values, found 4",
        "overrides: train.rank is in the grid too; leave it in one of them",
        "grid: run.seed: duplicate value in [0, 1, 0]",
        "overrides: run.dir: a sweep names the directories of its runs; set their parent folder with `dir`",
        "exclude, entry 1: train.lr is not in the grid; did you mean train.rank?",
        "exclude, entry 2: train.method: 'ste' is not in the grid's ['spp', 'lora']",
        "exclude, entry 3: expected KEY: VALUE of the grid, found 3",
    ]


def test_a_bad_value_is_told_with_the_runs_that_have_it(tmp_path: Path) -> None:
    text = "grid: {prune.pattern: [2:4, 4:2], train.rank: [0, 1]}\noverrides: {train.scal: 1}"
    found = problems_of(tmp_path / "bad.yaml", text, "train.lr=-1")
    assert "train.scal: unknown key; did you mean train.scale?" in found
    assert "command line: train.lr: -1.0 must be more than 0" in found
    assert "train.rank: 0 must be at least 1 (2of4-r0, 4of2-r0)" in found
    assert any(
        line.startswith("prune.pattern: pattern '4:2'") and line.endswith("(4of2-r0, 4of2-r1)") for line in found
    )
    assert len(found) == 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prune: {method: wanda}", "a sweep needs `grid:`"),
        ("grid: {}", "grid: expected KEY: [VALUES], found the section {}"),
        ("grid: {train.rank: [1]}\nexclude: [{train.rank: 1}]", "exclude: leaves no run"),
        (
            "grid: {train.rank: &n [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], train.epochs: *n, train.scale: *n, train.lr: *n,"
            " train.max_steps: *n}",
            "grid: more than 10,000 combinations; split it",
        ),
        ("grid: {prune.skip: [[a b], [a-b]]}", "grid: two combinations would have the same directory"),
    ],
)
def test_a_sweep_without_runs_is_refused(text: str, expected: str, tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path / "bad.yaml", text)
    assert problem.startswith(expected)


def test_what_is_not_a_sweep_is_named(sweep_file: Path, tmp_path: Path) -> None:
    for name, override, problem in (
        (sweep_file, ["run.dir=5"], r"command line: run\.dir: expected text, found 5"),
        ("nowhere", [], r"sweep nowhere does not exist; give a YAML file, or one of: sweep-example"),
        (tmp_path, [], r"sweep .* is a directory; name the YAML file in it"),
    ):
        with pytest.raises(UserError, match=problem):
            load_sweep(str(name), override)


def test_runs_that_could_not_be_merged_are_told_before_any_works(sweep_file: Path, tmp_path: Path) -> None:
    sweep_file.write_text(sweep_file.read_text().replace("[spp, masked_lora]", "[spp, lora]"))
    with pytest.raises(UserError) as caught:
        sweep.execute(load_sweep(str(sweep_file)))
    (problem,) = str(caught.value).splitlines()
    assert "merge.mask" in problem
    assert problem.endswith("(magnitude-2of4-lora, magnitude-0.5-lora, wanda-2of4-lora, wanda-0.5-lora)")
    assert not (tmp_path / "sweep").exists()


# --- work -------------------------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_is_shared_and_writes_nothing(sweep_file: Path, tmp_path: Path, command: Command) -> None:
    entries = command("sweep", str(sweep_file), "--dry-run", "--json", "prune.method=wanda").json
    names = ["2of4-spp", "2of4-masked_lora", "0.5-spp", "0.5-masked_lora"]
    assert entries[0] == {
        "directory": str(tmp_path / "sweep" / "dense"),
        "stages": ["eval base"],
        "made": [],
        "other_settings": [],
        "runs": names,
    }
    assert entries[1]["stages"] == ["prune", "eval pruned"]
    assert entries[1]["runs"] == names[:2]
    plan = sweep.plan(load_sweep(str(sweep_file), ["prune.method=wanda"]))
    assert to_json(plan) == entries
    counts = {"eval base": 1, "prune": 2, "eval pruned": 2, "train": 4, "merge": 4, "eval merged": 4}
    assert sweep.totals(plan) == counts
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.yaml", "small.yaml"}


def test_changed_settings_are_reported_all_at_once(sweep_file: Path, tmp_path: Path, command: Command) -> None:
    fixed = ["prune.method=magnitude", "prune.pattern=2:4"]
    read = load_sweep(str(sweep_file), fixed)
    folder = tmp_path / "sweep"
    for member in [*read.pruned.values(), *read.runs.values()]:
        for stage in ("prune", "train", "merge") if member.name in read.runs else ("prune",):
            settings = settings_of(member.config, stage)
            write_record(Run(member.config).path(stage), stage, settings=settings, inputs={})
    sweep.check(read)
    refused = command("sweep", str(sweep_file), "--dry-run", *fixed, "train.max_steps=3")
    assert refused.code == 2
    assert refused.out.replace("\n", " ").count("other settings") == 4  # training and merging of two runs
    errors = refused.err.strip().splitlines()
    assert [line.partition(" ")[2].partition(";")[0] for line in errors] == [
        f"{folder}/spp/adapter was made with train.max_steps = 2, now 3",
        f"{folder}/spp/merged depends on that",
        f"{folder}/masked_lora/adapter was made with train.max_steps = 2, now 3",
        f"{folder}/masked_lora/merged depends on that",
    ]
    stage, *arguments, force = shlex.split(errors[0].partition("; sppctl ")[2].partition(" redoes it")[0])
    assert (stage, force) == ("train", "--force")
    changed = load_sweep(str(sweep_file), [*fixed, "train.max_steps=3"])
    assert load_config(arguments[0], arguments[1:]) == changed.runs["spp"].config
    with pytest.raises(UserError, match=r"train\.max_steps = 2, now 3"):
        sweep.execute(changed)


def test_a_killed_sweep_goes_on_to_the_right_table(sweep_file: Path, tmp_path: Path) -> None:
    killed = sppctl(["sweep", str(sweep_file)], DEATH)
    assert killed.returncode == -9, killed.stderr
    folder = tmp_path / "sweep"
    assert (folder / "magnitude-2of4-spp" / "merged").is_dir()
    assert not (folder / "magnitude-2of4-masked_lora" / "adapter").exists()
    done = sppctl(["sweep", str(sweep_file), "--json"])
    assert done.returncode == 0, done.stderr
    said = Counter(" ".join(line.split()[:2]) for line in done.stderr.splitlines())
    assert said["prune: done"] == 3  # one of four was made before the end
    assert said["train: done"] == 7
    assert said["eval base:"] == 1 + 8  # up to date everywhere, and so is the pruned checkpoint in all runs
    assert said["eval pruned:"] == 1 + 8 + 3  # three are measured, and say what they are computed in
    read = load_sweep(str(sweep_file))
    rows = [row for row in json.loads((folder / "report.json").read_text())["table"] if row["checkpoint"] != "base"]
    made = [(row["method"], row["pattern"], row["training"]) for row in rows if row["checkpoint"] == "merged"]
    assert made == [*itertools.product(("magnitude", "wanda"), ("2:4", "0.5"), ("spp", "masked_lora"))]
    assert sum(row["checkpoint"] == "pruned" for row in rows) == 4  # runs that share one have one row for it
    assert len(rows) == 4 + 8
    assert Path(json.loads(done.stdout)[0]["run"]) == folder / "magnitude-2of4-spp"
    # hard links: the weights lie on the disk once
    shared = folder / "pruned-wanda-2of4" / "pruned" / "model.safetensors"
    assert shared.stat().st_nlink == 3
    # what the sweep made beside others is what the run alone makes
    base, *words = read.runs["wanda-2of4-spp"].arguments
    pipeline.run_all(Run(load_config(base, [*words, f"run.dir={tmp_path / 'alone'}"])))
    ours = load_file(folder / "wanda-2of4-spp" / "merged" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "alone" / "merged" / "model.safetensors").items():
        assert torch.equal(tensor, ours[name]), name
    (row,) = [row for row in rows if row["run"].endswith("/wanda-2of4-spp") and row["checkpoint"] == "merged"]
    direct = pipeline.report([tmp_path / "alone"]).to_json()["table"]
    (merged,) = [entry for entry in direct if entry["checkpoint"] == "merged"]
    assert (row["measures"], row["recovered"]) == (merged["measures"], merged["recovered"])


def test_a_run_that_fails_is_told_at_the_end_and_the_others_go_on(
    sweep_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def fails(run: Run, elsewhere: Any) -> None:
        calls.append(run.directory.name)
        if "masked" in run.directory.name:
            raise RuntimeError("no space")
        (run.directory / "eval" / "merged.json").write_text("{}")

    monkeypatch.setattr(pipeline, "run_all", fails)
    reported: list[list[Path]] = []
    monkeypatch.setattr(pipeline, "report", lambda runs, output: reported.append(runs) or [])
    _, failed = sweep.execute(load_sweep(str(sweep_file), ["prune.method=magnitude"]))
    assert calls == ["2of4-spp", "2of4-masked_lora", "0.5-spp", "0.5-masked_lora"]
    assert failed == dict.fromkeys(("2of4-masked_lora", "0.5-masked_lora"), "RuntimeError: no space")
    assert reported == [[tmp_path / "sweep" / "2of4-spp", tmp_path / "sweep" / "0.5-spp"]]


def test_what_rests_on_a_failed_pruning_is_not_tried(
    sweep_file: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise UserError("no")

    monkeypatch.setattr(Prune, "do", fails)
    ended = command("sweep", str(sweep_file), "prune.method=wanda", "train.method=spp")
    assert ended.code == 1
    assert [line for line in ended.err.splitlines() if line.startswith("error: ")] == [
        "error: pruned-2of4 failed: no",
        "error: 2of4 failed: pruned-2of4 failed",
        "error: pruned-0.5 failed: no",
        "error: 0.5 failed: pruned-0.5 failed",
    ]


@pytest.mark.parametrize(("code", "error"), [(143, Stopped), (137, StageError), (1, StageError)])
def test_a_signal_ends_the_sweep_and_a_failed_process_only_its_run(
    code: int, error: type[Exception], sweep_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[str, Config, str]] = []

    def start(arguments: list[str], number: int, log: Path, silent: bool) -> int:
        stage, name, *words = arguments
        started.append((stage, load_config(name, [word for word in words if "--" not in word]), words[-1]))
        if stage == "prune":
            return code
        pipeline.evaluate_some(Run(started[-1][1]), ["base"])
        return 0

    monkeypatch.setattr(launch, "start", start)
    overrides = ["prune.method=wanda", "prune.pattern=2:4", "train.method=spp"]
    overrides += ["launch.num_processes=2", "train.micro_batch_size=2"]
    if error is Stopped:
        with pytest.raises(Stopped, match="prune of pruned was stopped by a signal; the same command continues"):
            sweep.execute(load_sweep(str(sweep_file), overrides))
    else:
        _, failed = sweep.execute(load_sweep(str(sweep_file), overrides))
        assert failed == {"pruned": f"prune ended with exit code {code}", "run": "pruned failed"}
    (first, dense, measured), (second, pruned, _) = started
    assert (first, second, measured) == ("eval", "prune", "--model=base")
    assert [config.run.dir for config in (dense, pruned)] == [
        str(tmp_path / "sweep" / name) for name in ("dense", "pruned")
    ]


def test_results_that_a_run_has_of_its_own_stay(tmp_path: Path, sweep_file: Path) -> None:
    read = load_sweep(str(sweep_file))
    source, target = Run(read.dense["dense"].config), Run(read.runs["wanda-2of4-spp"].config)
    for run, asked in (
        (source, [task(0.5, "a"), task(0.5, "b", batch_size=8), text(5.0)]),
        (target, [text(5.0), task(0.5, "b"), task(0.5, "c")]),
    ):
        results = [dataclasses.replace(result, command=run.directory.name) for result in asked]
        Results("base", "x", "f", {}, results).save(run.directory / "eval/base.json")
    sweep.share(source, target, "base")
    found = Results.load(target.directory / "eval/base.json")
    assert found is not None
    # b at another batch size takes the place of the older one
    assert [(getattr(result.measure, "task", None), result.command) for result in found.results] == [
        *(("a", "dense"), ("b", "dense"), (None, "dense"), ("c", "wanda-2of4-spp"))
    ]


# --- jobs -------------------------------------------------------------------------------------------------------------


def test_jobs_wait_for_what_they_rest_on(sweep_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(tmp_path / "a cluster")
    monkeypatch.chdir(cluster.checkout)
    overrides = ["prune.method=wanda", "train.data.prompt='{instruction} $x'"]
    read = load_sweep(str(sweep_file), overrides)
    submit = slurm.write(read, tmp_path / "jobs", overrides)
    runs = ["2of4-spp", "2of4-masked_lora", "0.5-spp", "0.5-masked_lora"]
    jobs = {"dense", "pruned-2of4", "pruned-0.5", "report", *(f"{r}.{s}" for r in runs for s in ("train", "eval"))}
    assert {path.stem for path in submit.parent.iterdir()} == {"submit", *jobs}
    done = cluster.run(str(submit), NODES="2")
    assert done.returncode == 0, done.stderr
    ids = {line.split()[1]: line.split()[0] for line in done.stdout.splitlines()}
    waits = {}
    for call in cluster.calls("sbatch"):
        name = Path(call[-1]).stem
        dependency = next((option.partition("=")[2] for option in call if option.startswith("--dependency=")), "")
        kind, *numbers = dependency.split(":")
        waits[name] = (kind, [ids[number] for number in numbers])
        assert ("--nodes=2" in call) == name.endswith(".train")
        # what is shared is computed by one task, whatever the site's options say
        own = [option for option in call if option.startswith("--ntasks-per-node")]
        assert (own[-1:] == ["--ntasks-per-node=1"]) == (Path(name).suffix not in (".train", ".eval"))
    assert waits.keys() == jobs
    assert waits["dense"] == ("", [])
    assert waits["pruned-0.5"] == ("afterok", ["dense"])
    assert waits["0.5-spp.train"] == ("afterok", ["pruned-0.5"])
    assert waits["0.5-spp.eval"] == ("afterok", ["0.5-spp.train"])
    assert waits["report"] == ("afterany", [f"{run}.eval" for run in runs])
    train = (tmp_path / "jobs" / "0.5-spp.train.sh").read_text()
    assert "#SBATCH --job-name=0.5-spp.train\n" in train
    assert "#SBATCH --signal=USR1@120\n" in train
    # the shell hands the job the words that mean the run
    printed = cluster.run("bash", "-c", f"printf '%s\\0' {train.rpartition('exec ')[2]}").stdout
    script, name, *words = printed.split("\0")[:-1]
    assert script == "scripts/slurm_train.sh"
    assert load_config(name, words) == read.runs["0.5-spp"].config
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if shellcheck:
        checked = cluster.run(shellcheck, *map(str, submit.parent.glob("*.sh")))
        assert checked.returncode == 0, checked.stdout


def test_a_batch_that_the_gpus_cannot_divide_is_refused_before_any_job(
    sweep_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster(tmp_path / "a cluster")
    monkeypatch.chdir(cluster.checkout)
    submit = slurm.write(load_sweep(str(sweep_file)), tmp_path / "jobs")
    done = cluster.run(str(submit), SPPCTL_PYTHON=sys.executable, GPUS_PER_NODE="7")
    assert done.returncode == 2
    assert "train.batch_size" in done.stderr
    assert cluster.calls("sbatch") == []


def test_jobs_are_written_in_a_checkout_only(sweep_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"--slurm: scripts/slurm_eval.sh does not exist; run sppctl from the root"):
        slurm.write(load_sweep(str(sweep_file)), tmp_path / "jobs")
    assert not (tmp_path / "jobs").exists()


def test_the_jobs_of_a_sweep_do_it_together(sweep_file: Path, tmp_path: Path) -> None:
    read = load_sweep(str(sweep_file), ["prune.method=magnitude", "prune.pattern=2:4", "train.method=spp"])
    for job in slurm.jobs(read):
        if job.script == "slurm_sweep.sh":
            assert sweep.execute(read, job.arguments[-1])[1] == {}
        elif job.script == "slurm_eval.sh":  # which finds the training to do as well
            pipeline.run_all(Run(load_config(job.arguments[0], job.arguments[1:])))
    assert (tmp_path / "sweep" / "report.html").is_file()
    with pytest.raises(UserError, match="--only nothing: not one of dense, pruned, run, report"):
        sweep.execute(read, "nothing")
