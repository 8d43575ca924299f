"""Writes a random bfloat16 checkpoint of LLaMA-13B's shape (26 GB), for work on a model that does not fit in memory.

    python benchmarks/big_checkpoint.py /scratch/big                    # only writes it
    python benchmarks/big_checkpoint.py /scratch/big --run /scratch/run

With --run, it is pruned (2:8 by magnitude), trained for two steps on packed weights, merged, evaluated and inspected,
each in a process of its own, whose seconds and peak memory are printed. This takes 78 GB of disk. Stages that are
finished are not repeated. The last stage fails unless every matrix of the merged checkpoint has exactly the pattern.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from accelerate import init_empty_weights
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from sppctl.config.load import load_config
from sppctl.files.names import INDEX_NAME
from sppctl.files.safe_files import OwnFile
from sppctl.plan import run as planning

SHARD_BYTES = 5 * 10**9
SETTINGS = ["prune.method=magnitude", "prune.pattern=2:8", "train.max_steps=2", "train.data.seq_len=64"]
SETTINGS += ["train.batch_size=1", "train.micro_batch_size=1", "train.gradient_checkpointing=true", "eval.seq_len=64"]
SETTINGS += ["eval.divergence=null", "eval.max_tokens=128", "eval.prompts=[]", "model.weights=packed"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--run", type=Path, help="run directory, in which the checkpoint goes through every stage")
    parser.add_argument("--hidden", type=int, default=5120)
    parser.add_argument("--intermediate", type=int, default=13824)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--heads", type=int, default=40)
    parser.add_argument("--device", default="cpu", help="device that draws the random numbers")
    arguments = parser.parse_args()
    directory, run = arguments.directory, arguments.run
    config = LlamaConfig(
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        dtype="bfloat16",
    )
    config.architectures = ["LlamaForCausalLM"]
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    demand_disk(2 * sum(torch.Size(shape).numel() for shape in shapes.values()), directory, run)
    if run is None or not (directory / INDEX_NAME).exists():
        directory.mkdir(parents=True)
        config.save_pretrained(directory)
        byte_tokenizer().save_pretrained(directory)
        write(directory, shapes, arguments.device)
    if run is not None:
        measure_stages(directory, run)


def demand_disk(size: int, directory: Path, run: Path | None) -> None:
    """Stops unless the checkpoint, and its pruned and merged copies, fit on the disk beside what is already there."""
    needed = {directory: size} if run is None else {directory: size, run: 2 * size}
    for place, total in needed.items():
        needed[place] = max(0, total - sum(file.stat().st_size for file in place.rglob("*.safetensors")))
    by_disk: dict[int, list[Path]] = {}
    for place in needed:
        existing = next(folder for folder in (place.absolute(), *place.absolute().parents) if folder.exists())
        by_disk.setdefault(existing.stat().st_dev, [existing]).append(place)
    for existing, *places in by_disk.values():
        total, free = sum(needed[place] for place in places), shutil.disk_usage(existing).free
        if total > free:
            names = " and ".join(map(str, places))
            sys.exit(f"{names}: {total / 1e9:.1f} GB of disk are needed, and {free / 1e9:.1f} GB are free; name others")


def measure_stages(directory: Path, run: Path) -> None:
    """Prints a table of what every stage takes; stops at the first that fails."""
    text = directory / "text.txt"  # one byte is one token
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 4)
    settings = [f"model.path={directory}", f"run.dir={run}", f"train.data.dataset={text}", f"eval.perplexity=[{text}]"]
    settings += SETTINGS
    stages = {name: [name, *settings] for name in ("prune", "train", "merge")}
    stages["eval"] = ["eval", *settings, "--model", "merged"]
    stages["inspect"] = ["inspect", str(run / "merged"), "--expect", "2:8"]
    rows = []
    for name, arguments in stages.items():
        started = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-m", "sppctl", *arguments])
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            sys.exit(f"{name} failed with exit code {process.returncode}")
        rows.append(f"| {name} | {time.perf_counter() - started:.0f} | {used.ru_maxrss / 2**20:.2f} |")
    plan = planning.execute(load_config(None, settings)).packed
    assert plan is not None
    print("| stage | seconds | peak memory, GiB |\n| --- | ---: | ---: |", *rows, sep="\n")
    print(f"| train, by plan | | {plan.on(1, 'ddp', checkpointing=True).total / 2**30:.2f} |")


def write(directory: Path, shapes: dict[str, tuple[int, ...]], device: str) -> None:
    shards: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        count = 2 * torch.Size(shape).numel()
        if size + count > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = (torch.bfloat16, shape)
        size += count
    generator = torch.Generator(device).manual_seed(0)
    weight_map = {}
    for number, layout in enumerate(shards, 1):
        path = directory / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = OwnFile.create(path, layout, {"format": "pt"})
        for name, (_, shape) in layout.items():
            deviation = shape[-1] ** -0.5 if len(shape) == 2 else 0.0
            values = torch.empty(shape, dtype=torch.bfloat16, device=device)
            values = values.normal_(0, deviation, generator=generator) if deviation else values.fill_(1)
            file.write(name, values.cpu())
            weight_map[name] = path.name
        print(path, flush=True)
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


if __name__ == "__main__":
    main()
