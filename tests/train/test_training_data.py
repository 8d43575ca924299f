"""A training on data as people have it, a folder of conversations and a text, in processes of which one is killed."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

from processes import sppctl

from sppctl.train import stage as train  # noqa: F401  (forked with its imports)

CUT = """
import os, signal
from sppctl import console
original = console.Progress.advance
def advance(self, text="", steps=1):
    original(self, text, steps)
    if (self.label, self.done) == ("training", 3):
        os.kill(os.getpid(), signal.SIGKILL)
console.Progress.advance = advance
"""


def test_killed_on_conversations_and_text_it_continues_to_the_same_adapter(here: Path, text_file: Path) -> None:
    talks = here / "talks" / "train-0.jsonl"
    talks.parent.mkdir()
    with talks.open("w") as file:
        for number in range(12):
            asked, said = {"from": "human", "value": f"Add {number}."}, {"from": "gpt", "value": f"It is {number}."}
            file.write(json.dumps({"conversations": [asked, said] * 2}) + "\n")
    for name in ("cut", "whole"):
        shutil.copytree("run/pruned", f"{name}/pruned")
    arguments = [
        "tiny.yaml",
        f"train.data.dataset={{talks: 2, {text_file}: 1}}",
        "train.data.prompt='Q: {instruction}'",
    ]
    arguments += ["train.max_steps=4", "train.save_steps=2", "train.dropout=0.1", "train.report_to=[]"]
    killed = sppctl(["train", *arguments, "run.dir=cut"], CUT)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    for run in ("cut", "whole"):
        done = sppctl(["train", *arguments, f"run.dir={run}"])
        assert done.returncode == 0, done.stderr
        assert ("continuing from step" in done.stderr) == (run == "cut")
    weights, others = (Path(run, "adapter/adapter_model.safetensors").read_bytes() for run in ("cut", "whole"))
    assert weights == others
