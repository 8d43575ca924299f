"""The loss on held-out rows of Alpaca, each from its own start as in training, prompts included."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from cells import TEST, VALIDATION, Record, num_rows
from torch.nn.functional import cross_entropy

from sppctl.data import instructions, prompts, texts, vocabulary
from sppctl.data.batches import PadCollator
from sppctl.data.instructions import IGNORED
from sppctl.model import checkpoint

FIRST = {TEST: 13_154, VALIDATION: 12_954}  # rows that no training reads
SEQ_LEN = 512
BATCH_SIZE = 8


@torch.no_grad()
def measure(directory: Path, kind: str, max_tokens: int) -> Record:
    """What a record says about a text: the loss of every row, in the rows' order.

    Args:
        directory: the checkpoint, computed in float32 on the CPU.
        kind: TEST or VALIDATION, which have different rows.
        max_tokens: of the cell, which determine the number of rows.
    """
    first, last = FIRST[kind], FIRST[kind] + num_rows(max_tokens)
    rows = list(texts.load_hub("tatsu-lab/alpaca", "train"))[first:last]
    tokenizer = checkpoint.load_tokenizer(directory)
    style = prompts.style("alpaca", tokenizer)
    examples = instructions.tokenize(tokenizer, rows, style, seq_len=SEQ_LEN, train_on_inputs=True)
    model = checkpoint.load_model(directory, torch.device("cpu"), "float32")
    collate = PadCollator(vocabulary.pad_token_id(tokenizer, vocabulary.embeddings(model)))
    order = sorted(range(len(examples)), key=lambda number: examples.lengths[number])
    losses, tokens = [0.0] * len(examples), [0] * len(examples)
    for start in range(0, len(order), BATCH_SIZE):
        batch = collate([examples[number] for number in order[start : start + BATCH_SIZE]])
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]  # nothing predicts the first token of a row
        each = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED)
        found = each.view(labels.shape).sum(dim=1)
        counts = (labels != IGNORED).sum(dim=1)
        for number, loss, count in zip(batch["examples"], found.tolist(), counts.tolist(), strict=True):
            losses[number], tokens[number] = loss, count
    return {
        "nll": sum(losses) / sum(tokens),
        "tokens": sum(tokens),
        "windows": len(losses),
        "seq_len": SEQ_LEN,
        "documents_hash": hashlib.sha256("".join(map(prompts.formatted, rows)).encode()).hexdigest(),
        "window_nll": [round(loss, 4) for loss in losses],
        "window_tokens": tokens,
    }
