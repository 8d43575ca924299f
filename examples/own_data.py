"""Calibrate on batches of one's own, from any data set or loader, and save a checkpoint that any reader loads.

python examples/own_data.py --model HuggingFaceTB/SmolLM2-135M --data my.jsonl --column text
"""

# %% Texts from a data set of your own
import argparse

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from sppctl import prune_model

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="hub id or directory")
parser.add_argument("--data", required=True, help="a .jsonl file with a column of text")
parser.add_argument("--column", default="text")
parser.add_argument("--seq-len", type=int, default=512, help="tokens in a window")
parser.add_argument("--out", default="pruned", help="directory of the pruned checkpoint")
options = parser.parse_args()
rows = load_dataset("json", data_files=options.data, split="train")

# %% Windows without padding, all of one length
tokenizer = AutoTokenizer.from_pretrained(options.model)
tokens = tokenizer("\n\n".join(rows[options.column]), return_tensors="pt").input_ids[0]
windows = tokens[: len(tokens) // options.seq_len * options.seq_len].view(-1, options.seq_len)
loader = torch.utils.data.DataLoader(windows[:128], batch_size=8)

# %% Prune, and prune further: keep_zeros keeps what is already zero
model = AutoModelForCausalLM.from_pretrained(options.model)
first = prune_model(model, loader, method="sparsegpt", pattern=0.5)
second = prune_model(model, loader, method="sparsegpt", pattern="2:4", keep_zeros=True)
print(f"{first.sparsity:.1%} zeros, then {second.sparsity:.1%}; {second.zeros_before:,} of them were there before")

# %% An ordinary checkpoint; `sppctl inspect` certifies it
model.save_pretrained(options.out)
tokenizer.save_pretrained(options.out)
print(f"sppctl inspect {options.out} --expect 2:4")
