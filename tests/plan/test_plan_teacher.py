"""A teacher of another size than the model: counted by its own shapes, wherever a plan is used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import GROUPED, Command
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from sppctl import machine
from sppctl.config.settings import Config
from sppctl.plan import footprint, text
from sppctl.plan import run as plan

Configure = Callable[..., Config]
TOKENS = 2 * 128


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the vocabulary of the tiny Llama, and some 45 times its parameters."""
    directory = tmp_path_factory.mktemp("teacher") / "large"
    shapes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "head_dim": 32}
    AutoModelForCausalLM.from_config(LlamaConfig(**GROUPED | shapes)).save_pretrained(directory)
    return directory


def test_a_teacher_is_counted_by_its_own_shapes(configure: Configure, large: Path, llama: Path) -> None:
    stored = sum(tensor.nbytes for tensor in load_file(large / "model.safetensors").values())
    planned = plan.execute(configure(f"train.distill.teacher={large}"))
    memory, alone = planned.memory, plan.execute(configure()).memory
    assert memory.teacher == stored + 2 * 4 * TOKENS * 260  # and two distributions over the vocabulary
    for checkpointing in (False, True):
        entries = [of.on(2, "fsdp", checkpointing) for of in (memory, alone)]
        assert entries[0].total - entries[1].total == memory.teacher, "it is whole on each GPU"
    assert planned.packed is not None
    assert planned.packed.teacher == memory.teacher
    hidden = plan.execute(configure(f"train.distill.teacher={large}", "train.distill.hidden=1")).memory
    # three blocks of the teacher, the difference from two of the model
    assert hidden.teacher - memory.teacher == 4 * TOKENS * 3 * 256 + 4 * TOKENS * 2 * 32
    same = plan.execute(configure(f"train.distill.teacher={llama}"))
    assert same.memory.teacher == plan.execute(configure("train.distill.teacher=base")).memory.teacher


def test_a_teacher_with_a_shipped_architecture(command: Command) -> None:
    arguments = ("plan", "llama2-7b", "train.distill.teacher=meta-llama/Llama-2-70b-hf", "launch.num_processes=1")
    result = command(*arguments, "model.compute_dtype=bfloat16", "--json").json
    assert result["memory"]["teacher"] == 2 * 68_976_648_192 + 2 * 4 * 8 * 512 * 32_000
    assert result["teacher"]["parameters"] == 68_976_648_192
    printed = " ".join(command(*arguments).out.split())
    assert (
        "The teacher meta-llama/Llama-2-70b-hf has 68,976,648,192 parameters (the architecture shipped with sppctl)."
        in printed
    )


@pytest.mark.parametrize(
    ("teacher", "reason"),
    [
        (
            "nobody/nothing",
            "nobody/nothing is not a local directory, and its config.json is neither cached nor shipped",
        ),
        ("./nowhere", "./nowhere does not exist"),
    ],
)
def test_a_teacher_that_is_not_found_is_counted_as_large_as_the_model(
    configure: Configure, teacher: str, reason: str
) -> None:
    config = configure(f"train.distill.teacher={teacher}")
    planned, base = plan.execute(config), plan.execute(configure("train.distill.teacher=base"))
    assert planned.memory.teacher == base.memory.teacher
    counted = f"The teacher {teacher} is counted as large as the model, because its sizes are unknown: {reason}"
    assert any(sentence.startswith(counted) for sentence in text.sentences(planned, config))
    assert not any("eacher" in sentence for sentence in text.sentences(base, configure()))


def test_a_damaged_config_of_a_teacher_does_not_stop_a_plan(configure: Configure, tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text("{")
    teacher = plan.execute(configure(f"train.distill.teacher={tmp_path / 'teacher'}")).teacher
    assert teacher is not None
    assert teacher.problem is not None
    assert teacher.problem.startswith("config.json cannot be used")


def test_auto_packs_the_weights_where_the_teacher_leaves_no_room(
    configure: Configure, llama: Path, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ("prune.pattern=2:8", f"train.distill.teacher={large}")
    stored = sum(tensor.nbytes for tensor in load_file(large / "model.safetensors").values())
    alone = plan.bytes_on_each_device(configure("prune.pattern=2:8"))
    assert alone is not None
    dense = alone + stored + 2 * 4 * TOKENS * 260

    def packs(room: int) -> bool:
        monkeypatch.setattr(machine, "free_memory", lambda _: int(room / footprint.USABLE) + 1)
        return plan.trains_packed(configure(*overrides), llama, "float32")

    assert plan.bytes_on_each_device(configure(*overrides)) == dense
    assert packs(dense - 8)
    assert not packs(dense + 8)
