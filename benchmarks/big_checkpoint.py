"""Writes a random bfloat16 checkpoint of LLaMA-13B's shape (26 GB), for pruning a model that does not fit in memory.

    python benchmarks/big_checkpoint.py /scratch/big
    /usr/bin/time -v sppctl prune --model /scratch/big --output /scratch/run --pattern 2:4 \\
        prune.calibration.samples=8 prune.calibration.seq_len=128
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from accelerate import init_empty_weights
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from sppctl.files.names import INDEX_NAME
from sppctl.files.safe_files import OwnFile

SHARD_BYTES = 5 * 10**9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--hidden", type=int, default=5120)
    parser.add_argument("--intermediate", type=int, default=13824)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--heads", type=int, default=40)
    parser.add_argument("--device", default="cpu", help="device that draws the random numbers")
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True)
    config = LlamaConfig(
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        dtype="bfloat16",
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(arguments.directory)
    byte_tokenizer().save_pretrained(arguments.directory)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    write(
        arguments.directory,
        {name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
        arguments.device,
    )


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
