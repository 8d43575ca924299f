"""A merged checkpoint of weights that its run no longer holds is not taken for the run's."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Command

COMMANDS = (
    ["inspect", "run"],
    ["eval", "run"],
    ["generate", "run", "--prompt", "a"],
    ["push", "run", "a/b", "--dry-run"],
)


@pytest.fixture
def redone(here: Path, command: Command) -> Path:
    """A run that was pruned again after it was merged."""
    assert command("prune", "tiny.yaml", "prune.pattern=1:4", "--force").code == 0
    return here


@pytest.mark.parametrize("arguments", [*COMMANDS, ["bench", "run"]], ids=" ".join)
def test_commands_on_a_run_refuse_it(arguments: list[str], redone: Path, command: Command) -> None:
    refused = command(*arguments)
    assert refused.code == 2
    assert "run/merged was made from weights that differ from those in pruned/; sppctl merge run --force" in refused.err


def test_by_its_own_name_it_can_be_inspected(redone: Path, command: Command) -> None:
    assert command("inspect", "run/merged", "--expect", "2:4").code == 0
