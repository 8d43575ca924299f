"""Prune a transformers model in memory, train SPP on it with plain PEFT, and measure every step.

python examples/in_memory.py --model HuggingFaceTB/SmolLM2-135M
"""

# %% Load a model as always
import argparse

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from sppctl import SppConfig, evaluate_model, prune_model
from sppctl.data.calibration import calibration_windows
from sppctl.data.texts import load_text

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="hub id or directory")
parser.add_argument("--text", default="instructions", help="calibration and test text: c4, wikitext2, a file, ...")
parser.add_argument("--samples", type=int, default=32, help="calibration windows")
parser.add_argument("--seq-len", type=int, default=512, help="tokens in a window")
parser.add_argument("--steps", type=int, default=20, help="training steps")
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model)
model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)  # bfloat16 on a GPU


def perplexity(label: str) -> None:
    """Prints the perplexity on the first tokens of the text."""
    sizes = {"seq_len": options.seq_len, "max_tokens": 8 * options.seq_len}
    for name, value in evaluate_model(model, tokenizer, perplexity=[options.text], label=label, **sizes).items():
        print(f"{label}: {name} {value:.2f}")


perplexity("dense")

# %% Prune it: the blocks in turn, each on the outputs of the pruned ones before it
text = load_text(options.text, "train", "--text")
windows = calibration_windows(tokenizer, text, samples=options.samples, seq_len=options.seq_len, seed=0).tokens
record = prune_model(
    model,
    windows,  # (samples, seq_len); or the tokenizer, with calibration={"dataset": "c4", ...}
    method="wanda",
    pattern="2:4",
    callback=lambda layer, done, total: print(f"{done}/{total} {layer.name} {layer.sparsity:.0%} zeros"),
)
print(f"{record.matrices} matrices, {record.sparsity:.1%} zeros")
perplexity("pruned")

# %% Train an SPP adapter, which cannot change a zero; any loop or trainer for PEFT models works
model = get_peft_model(model, SppConfig(r=8, dropout=0.0))
model.print_trainable_parameters()
optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=3e-3)
for step in range(options.steps):
    batch = windows[[step % len(windows)]].to(model.device)
    loss = model(batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"loss {loss.item():.3f} after {options.steps} steps")

# %% Merge it: an ordinary transformers model with the same zeros
model = model.merge_and_unload()
perplexity("merged")
zeros = sum(int((module.weight == 0).sum()) for module in model.modules() if isinstance(module, torch.nn.Linear))
print(f"{zeros:,} zeros; model.save_pretrained(DIRECTORY) writes a checkpoint for any reader")
