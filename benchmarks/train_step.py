"""Time and peak memory of a whole training step: SPP, PEFT's LoRA on the same layers, and the frozen model.

    python benchmarks/train_step.py CHECKPOINT [--batch 8 --seq-len 256 --rounds 5 --device auto --packed]

A step is forward, backward, AdamW and zeroing the gradients, on random tokens. The frozen model runs forward and
backward, with only the gradient of the embeddings' output, so that backward passes through all blocks. All forms run in
turn in each round. The peak of each form is that of a separate process on a CPU, and of its tensors on a GPU.
--packed adds SPP on packed weights; the checkpoint must be pruned.
"""

from __future__ import annotations

import argparse
import gc
import resource
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hardware import add_clock, describe, name_of
from peft import LoraConfig, PeftConfig, get_peft_model

from sppctl.adapters.spp import SppConfig
from sppctl.adapters.tuner import DEFAULT_TARGETS
from sppctl.model import checkpoint

DROPOUT = 0.05


@dataclass(frozen=True)
class Form:
    """A training method, its dropout, and whether it uses gradient checkpointing."""

    method: str
    dropout: float
    checkpointing: bool

    def adapter(self) -> PeftConfig:
        """The published ranks: SPP 16 (s = 2), LoRA 8 (alpha 16)."""
        if self.method.startswith("SPP"):
            return SppConfig(r=16, scale=2.0, dropout=self.dropout, target_modules=DEFAULT_TARGETS)
        return LoraConfig(r=8, lora_alpha=16, lora_dropout=self.dropout, target_modules=DEFAULT_TARGETS)


PACKED = "SPP packed"
MODELS = [("frozen", 0.0), ("SPP", 0.0), ("LoRA", 0.0), ("SPP", DROPOUT), ("LoRA", DROPOUT)]
MODELS += [(PACKED, 0.0), (PACKED, DROPOUT)]
FORMS = [Form(*model, checkpointing) for checkpointing in (False, True) for model in MODELS]


class Step:
    """A model that is ready to run steps on one batch."""

    def __init__(self, form: Form, options: argparse.Namespace) -> None:
        self.form, self.device, self.clock = form, checkpoint.pick_device(options.device), options.clock
        torch.manual_seed(0)
        dtype = checkpoint.choose_dtype(options.checkpoint, self.device, "auto", training=True).dtype
        packed = form.method == PACKED
        self.model: Any = checkpoint.load_model(options.checkpoint, self.device, dtype, packed=packed)
        self.model.config.use_cache = False
        self.tokens = torch.randint(0, self.model.config.vocab_size, (options.batch, options.seq_len)).to(self.device)
        self.model.requires_grad_(False)
        if form.method != "frozen":
            self.model = get_peft_model(self.model, form.adapter())
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        self.model.train()

    def __call__(self, checkpointing: bool) -> float:
        """Runs one step and returns its seconds."""
        base = self.model if self.form.method == "frozen" else self.model.get_base_model()
        if checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            base.gradient_checkpointing_disable()
        synchronize(self.device)
        started = self.clock()
        if self.form.method == "frozen":
            embedded = base.get_input_embeddings()(self.tokens).requires_grad_()
            torch.autograd.grad(base(inputs_embeds=embedded, labels=self.tokens).loss, embedded)
        else:
            self.model(input_ids=self.tokens, labels=self.tokens).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        synchronize(self.device)
        return self.clock() - started


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measured_forms(options: argparse.Namespace) -> list[Form]:
    """All, or those with dense weights."""
    return [form for form in FORMS if options.packed or form.method != PACKED]


def measure(options: argparse.Namespace) -> dict[Form, list[float]]:
    """Seconds of all forms; round 0 is a warm-up."""
    forms = measured_forms(options)
    steps = {(form.method, form.dropout): Step(form, options) for form in forms if not form.checkpointing}
    spent: dict[Form, list[float]] = {form: [] for form in forms}
    for number in range(options.rounds + 1):
        for form in forms:
            gc.collect()
            seconds = steps[form.method, form.dropout](form.checkpointing)
            if number:
                spent[form].append(seconds)
        print(f"round {number} of {options.rounds}", file=sys.stderr)
    return spent


def peak(form: Form, options: argparse.Namespace) -> float:
    """Peak MiB of two steps of one form: of this process, or of the tensors on a GPU."""
    step = Step(form, options)
    for _ in range(2):
        step(form.checkpointing)
    if step.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def peak_alone(form: Form, options: argparse.Namespace) -> float:
    if checkpoint.pick_device(options.device).type == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        return peak(form, options)
    command = [sys.executable, *sys.argv, "--peak-of", str(FORMS.index(form))]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)
    add_clock(parser)
    options = parser.parse_args()
    if options.peak_of is not None:
        print(peak(FORMS[options.peak_of], options))
        return
    tokens = options.batch * options.seq_len
    print(describe(checkpoint.pick_device(options.device)))
    print(f"{options.batch} x {options.seq_len} tokens/step, {name_of(options.clock)}, medians of {options.rounds}\n")
    peaks = {form: peak_alone(form, options) for form in measured_forms(options)}
    spent = measure(options)
    print("| step | dropout | checkpointing | s | / frozen | / LoRA | tokens/s | peak MiB |")
    print("| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    for form, values in spent.items():
        frozen, lora = (
            Form(name, dropout, form.checkpointing) for name, dropout in (MODELS[0], ("LoRA", form.dropout))
        )
        checkpointing = "yes" if form.checkpointing else "no"
        seconds = statistics.median(values)
        print(
            f"| {form.method} | {form.dropout} | {checkpointing} | {seconds:.2f} | {ratio(values, spent[frozen]):.2f} "
            f"| {ratio(values, spent[lora]):.2f} | {tokens / seconds:.0f} | {peaks[form]:.0f} |"
        )


def ratio(values: list[float], baseline: list[float]) -> float:
    """The median ratio over the rounds."""
    return statistics.median(a / b for a, b in zip(values, baseline, strict=True))


if __name__ == "__main__":
    main()
