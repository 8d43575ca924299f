"""A run directory as CONFIG: the settings that its stages recorded, and resolved.yaml for all else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sppctl.config import recorded
from sppctl.config.load import load_config, to_dict, to_yaml
from sppctl.config.recorded import trusts_code
from sppctl.config.yaml12 import dump_yaml
from sppctl.errors import UserError
from sppctl.files import sealed

PRUNE = {"method": "sparsegpt", "pattern": "4:8", "overrides": {"down_proj": 0.4}}
PRUNED = {"seed": 5, "model": {"path": "a/b", "compute_dtype": "float32"}, "prune": PRUNE}


def record(directory: Path, settings: dict[str, Any], name: str = "stage.json") -> None:
    directory.mkdir(parents=True)
    sealed.write(directory / name, {"settings": settings})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that was pruned, and whose resolved.yaml is that of another command."""
    record(tmp_path / "run/pruned", PRUNED)
    prune = {"pattern": "2:4", "memory": "disk", "overrides": {"q_proj": 0.1}}
    resolved = {"run": {"dir": "elsewhere", "seed": 1}, "model": {"path": "c/d"}, "prune": prune, "train": {"rank": 3}}
    (tmp_path / "run/resolved.yaml").write_text(dump_yaml(resolved))
    return tmp_path / "run"


def test_records_win_over_resolved_yaml(run: Path) -> None:
    config = load_config(str(run))
    assert (config.run.dir, config.run.seed, config.model.path) == (str(run), 5, "a/b")
    assert (config.prune.method, str(config.prune.pattern)) == ("sparsegpt", "4:8")
    assert config.prune.overrides.keys() == {"down_proj"}
    assert config.prune.memory == "disk"  # not recorded, as it cannot change a result
    assert config.model.compute_dtype == "auto"  # recorded is what auto meant
    assert config.train.rank == 3


def test_keys_that_records_leave_out_at_their_default_win_over_resolved_yaml(run: Path) -> None:
    record(run / "adapter", {"seed": 5, "train": {"rank": 7, "distill": {"weight": 0.3}}})
    resolved = {"prune": {"reconstruct_target": "dense", "reconstruct_lr": 1.0}}
    (run / "resolved.yaml").write_text(dump_yaml(resolved))
    config = load_config(str(run))
    assert (config.prune.reconstruct_target, config.prune.reconstruct_lr) == ("pruned", 1.0)
    record(run / "merged", {"prune": PRUNE | {"reconstruct_target": "dense"}})
    assert load_config(str(run)).prune.reconstruct_target == "dense"


def test_the_command_line_wins_over_records(run: Path) -> None:
    config = load_config(str(run), ["prune.method=wanda", "train.rank=4", "run.dir=copy"])
    assert (config.prune.method, config.train.rank, config.run.dir) == ("wanda", 4, "copy")


def test_code_of_a_model_is_trusted_where_its_run_did(run: Path, tmp_path: Path) -> None:
    assert not trusts_code(run)
    assert not trusts_code(tmp_path)
    record(tmp_path / "other/pruned", {"model": {"path": "a/b", "trust_remote_code": True}})
    assert trusts_code(tmp_path / "other")


def test_an_unfinished_stage_counts_unless_it_was_finished_before(run: Path) -> None:
    record(run / ".adapter.partial", {"seed": 5, "train": {"rank": 7}}, "attempt.json")
    record(run / ".pruned.partial", PRUNED | {"prune": {"method": "dsnot"}}, "attempt.json")
    config = load_config(str(run))
    assert (config.train.rank, config.prune.method) == (7, "sparsegpt")
    record(run / "adapter", {"seed": 5, "train": {"rank": 8}})
    assert load_config(str(run)).train.rank == 8


def test_texts_after_the_first_are_measured_though_training_records_the_first_alone(run: Path) -> None:
    resolved = {"model": {"path": "c/d"}, "eval": {"perplexity": ["a.txt", "b.txt"], "seq_len": 8}}
    (run / "resolved.yaml").write_text(dump_yaml(resolved))
    record(run / "adapter", {"eval": {"perplexity": ["a.txt"], "seq_len": 16}})
    assert (load_config(str(run)).eval.perplexity, load_config(str(run)).eval.seq_len) == (["a.txt", "b.txt"], 16)
    (run / "resolved.yaml").write_text(dump_yaml(resolved | {"eval": {"perplexity": ["b.txt", "a.txt"]}}))
    assert load_config(str(run)).eval.perplexity == ["a.txt"]


def test_a_run_without_resolved_yaml_and_one_without_records(run: Path, tmp_path: Path) -> None:
    (run / "resolved.yaml").unlink()
    config = load_config(str(run))
    assert (config.model.path, config.prune.method, config.train.rank) == ("a/b", "sparsegpt", 16)
    (tmp_path / "new").mkdir()
    (tmp_path / "new/resolved.yaml").write_text(to_yaml(config))
    assert to_dict(load_config(str(tmp_path / "new"))) == to_dict(config) | {
        "run": {"dir": str(tmp_path / "new"), "seed": 5}
    }


@pytest.mark.parametrize("content", [b"", b"{}", b'{"settings": 1, "format": 1}', b"\xff"])
def test_a_damaged_record_is_left_to_its_stage(run: Path, content: bytes) -> None:
    (run / "pruned/stage.json").write_bytes(content)
    assert load_config(str(run)).model.path == "c/d"


def test_what_is_not_a_run(run: Path, tmp_path: Path) -> None:
    assert not recorded.is_run(tmp_path)
    with pytest.raises(UserError, match=rf"config {run}/pruned is a part of a run; name the run, {run}$"):
        load_config(str(run / "pruned"))
    with pytest.raises(UserError, match="is a directory without a run"):
        load_config(str(tmp_path))


def test_a_wrong_key_in_a_run_is_reported_with_its_directory(run: Path) -> None:
    (run / "resolved.yaml").write_text("train: {rnk: 3}")
    with pytest.raises(UserError, match=rf"^{run}: train.rnk: unknown key; did you mean train.rank\?$"):
        load_config(str(run))
