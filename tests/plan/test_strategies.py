"""The strategies in a plan are those that training accepts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import stage_calls

from sppctl.config.settings import Config
from sppctl.errors import UserError
from sppctl.plan import run as plan
from sppctl.plan.strategies import STRATEGIES
from sppctl.train import stage as training

Configure = Callable[..., Config]
OPTIONS = {
    **{method: [f"train.method={method}"] for method in ("spp", "lora", "hira", "masked_lora", "masked_full", "ste")},
    "adafactor": ["train.optimizer=adafactor"],
    "teacher": ["train.distill.teacher=base", "train.distill.tokens=all"],
    "refresh": ["train.refresh.steps=2"],
    "schedule": ["train.scheduler=polynomial"],
}
EXPECTED = {name: set(STRATEGIES) for name in OPTIONS} | {
    "ste": {"ddp"},
    "adafactor": {"ddp"},
    "teacher": {"ddp", "fsdp"},
    "refresh": {"ddp"},
    "schedule": {"ddp", "fsdp"},
}


def refusal(config: Config, model: Path) -> str:
    """What training says against a configuration, whether or not DeepSpeed is installed; empty: nothing."""
    try:
        training.prepare(config, *stage_calls.outline(model))
    except UserError as error:
        return "\n".join(line for line in error.lines if "needs DeepSpeed" not in line)
    return ""


@pytest.mark.parametrize("name", OPTIONS)
def test_a_plan_lists_the_strategies_that_training_accepts(name: str, configure: Configure, llama: Path) -> None:
    options = [*OPTIONS[name], "launch.num_processes=2"]
    listed = {entry.strategy for entry in plan.execute(configure(*options)).memory.per_gpu}
    assert listed == EXPECTED[name]
    for strategy in STRATEGIES:
        config = configure(*options, f"launch.strategy={strategy}")
        refused = refusal(config, llama)
        assert bool(refused) == (strategy not in listed)
        if refused:
            with pytest.raises(UserError) as caught:
                plan.execute(config)
            assert str(caught.value) == refused


def test_one_process_shards_nothing(configure: Configure) -> None:
    options = ("train.refresh.steps=2", "launch.strategy=fsdp", "launch.num_processes=1")
    assert {entry.strategy for entry in plan.execute(configure(*options)).memory.per_gpu} == {"ddp"}
