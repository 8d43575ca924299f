"""A model that does not fit into memory: with packed weights every stage runs, with dense ones it is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import kept_per_group, weights_of
from conftest import byte_tokenizer
from processes import environment, sppctl

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.platform != "linux" or "VmData" not in Path("/proc/self/status").read_text(),
        reason="this system does not count the memory that it limits",
    ),
]
ROOM = 260 << 20  # bytes beside the libraries; the checkpoint has 296 MiB, and 87 MiB when it is packed

# runs commands one after the other in a process that may allocate so much, and prints their exit codes
LIMITED = """
import json, resource, sys
import peft, torch, transformers.models.llama.modeling_llama
from sppctl import cli
from sppctl.evaluate import stage as _
from sppctl.merge import stage as _
from sppctl.prune import stage as _
from sppctl.publish import card as _, generate as _
from sppctl.train import stage as _
torch.ones(64, 64).requires_grad_().mm(torch.ones(64, 64)).sum().backward()  # threads and their stacks
held = next(line for line in open("/proc/self/status") if line.startswith("VmData"))
limit = 1024 * int(held.split()[1]) + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
for arguments in json.loads(sys.argv[2]):
    sys.argv, code = ["sppctl", *arguments], 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code
    print(code)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run and its settings: a random checkpoint in float32, pruned 2:8, trained for a step on a few tokens."""
    folder = tmp_path_factory.mktemp("large")
    config = transformers.LlamaConfig(
        vocab_size=260, hidden_size=1024, intermediate_size=2816, num_hidden_layers=6, num_attention_heads=8
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    model.save_pretrained(folder / "base", max_shard_size="100MB")
    byte_tokenizer().save_pretrained(folder / "base")
    text = folder / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 4)
    settings = [f"model.path={folder / 'base'}", f"run.dir={folder / 'run'}", f"train.data.dataset={text}"]
    settings += [f"eval.perplexity=[{text}]", "eval.seq_len=64", "eval.divergence=null", "eval.prompts=[]"]
    settings += ["prune.method=magnitude", "prune.pattern=2:8", "train.max_steps=1"]
    settings += ["train.data.seq_len=64", "train.batch_size=1", "train.micro_batch_size=1"]
    return folder / "run", [*settings, "train.gradient_checkpointing=true"]


def outcomes(*commands: list[str]) -> tuple[list[int], str]:
    """The exit codes of commands in a process that may allocate ``ROOM``, and all that they say."""
    # without the tunable glibc keeps freed weights for later, in pieces of which the limit counts every byte
    variables = environment(OMP_NUM_THREADS="1", GLIBC_TUNABLES="glibc.malloc.mmap_threshold=1048576")
    command = [sys.executable, "-c", LIMITED, str(ROOM), json.dumps(commands)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    return [int(line) for line in done.stdout.splitlines() if line.isdigit()], done.stdout + done.stderr


def test_a_model_is_trained_merged_and_measured_where_its_dense_weights_do_not_fit(run: tuple[Path, list[str]]) -> None:
    directory, settings = run
    pruned = sppctl(["prune", *settings])
    assert pruned.returncode == 0, pruned.stderr
    measure = ["eval", *settings, "--model"]
    codes, said = outcomes(
        ["train", *settings, "model.weights=dense"],
        ["train", *settings, "model.weights=packed"],
        ["merge", *settings],
        [*measure, "base"],
        [*measure, "merged"],
    )
    assert codes == [1, 0, 0, 2, 0], said
    assert "error: out of memory" in said
    assert "set model.weights=packed, which does not change the result" in said
    assert "error: --model: base: " in said
    assert "so its weights are packed (model.weights)" in said
    merged = {name: weight for name, weight in weights_of(directory / "merged").items() if "_proj" in name}
    assert len(merged) == 42
    assert all(int(kept_per_group(weight, 8).max()) == 2 for weight in merged.values())


def test_a_whole_run_leaves_out_a_dense_model_that_does_not_fit(run: tuple[Path, list[str]], tmp_path: Path) -> None:
    """And is refused before it begins if the other checkpoints are to be compared with that model."""
    directory, settings = run
    for stage in ("prune", "train", "merge"):
        done = sppctl([stage, *settings])
        assert done.returncode == 0, done.stderr
    compared = [*settings, f"run.dir={tmp_path / 'refused'}", "eval.divergence=base"]
    codes, said = outcomes(["run", *compared], ["run", *settings])
    assert codes == [2, 0], said
    assert "error: eval.divergence: the dense model" in said
    assert not (tmp_path / "refused").exists()
    assert "so it is not measured" in said
    assert {path.name for path in (directory / "eval").glob("*.json")} == {"pruned.json", "merged.json"}
