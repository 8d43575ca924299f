"""Unknown tasks are found in the text of lm-eval's files, before any library is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sppctl.errors import UserError
from sppctl.evaluate import task_names


def test_names_of_every_kind_are_known() -> None:
    task_names.check(["all", "zeroshot", "boolq", "piqa", "mmlu_stem", "ai2_arc", "squadv2", "blimp_*"])


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("arc_eazy", "did you mean arc_easy or "),
        ("zeroshots", "did you mean zeroshot or "),
        ("bool", "did you mean boolq or "),  # a part of another name
        ("§§§§", "`lm-eval ls tasks` lists them"),
    ],
)
def test_unknown_names(name: str, hint: str) -> None:
    with pytest.raises(
        UserError, match=f"^eval.tasks: {name} is neither zeroshot nor mmlu nor an lm-eval task; {hint}"
    ):
        task_names.check(["piqa", name])


@pytest.mark.parametrize("command", ["run", "eval"])
def test_a_command_reports_an_unknown_task_without_heavy_libraries(command: str) -> None:
    code = f"""
import sys
from sppctl.cli import main
sys.argv = ["sppctl", "{command}", "quickstart", "--tasks", "boolqq"]
try:
    main()
finally:
    print(sorted({{"torch", "transformers", "datasets", "lm_eval"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "[]\n")
    assert "boolqq is neither" in done.stderr
