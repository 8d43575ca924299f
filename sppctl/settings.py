"""The schema of the configuration: frozen dataclasses whose fields are the keys, with default, meaning and bounds."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, Literal

from sppctl.pattern import Pattern

AllLinear = Literal["all-linear"]
Auto = Literal["auto"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _key(
    default: Any,
    meaning: str,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
    affects_result: bool = True,
) -> Any:
    """A configuration key: default, meaning, bounds, and whether another value gives another result."""
    bounds = {"low": low, "above": above, "high": high, "below": below}
    metadata = {"meaning": meaning, "bounds": bounds, "affects_result": affects_result}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives."""

    dir: str = _key("runs/default", "directory of the run: pruned/, adapter/, merged/, eval/", affects_result=False)
    seed: int = _key(0, "seed of calibration windows, adapter initialisation, dropout and data order", low=0)


@dataclass(frozen=True)
class LaunchConfig:
    """How many processes share the work; under torchrun, accelerate or srun theirs are used instead."""

    num_processes: int = _key(1, "processes that sppctl prune starts on this machine", low=1, affects_result=False)


@dataclass(frozen=True)
class ModelConfig:
    """The dense model to start from."""

    path: str | None = _key(None, "hub id, local directory, or package:NAME (directory of an installed package)")
    gguf_file: str | None = _key(None, "name of a GGUF file at model.path; converted to safetensors once")
    revision: str | None = _key(None, "branch, tag or commit of a hub id")
    dtype: DType = _key("auto", "dtype of the pruned checkpoint; auto: as stored")
    device: str = _key("auto", "cpu, cuda, cuda:1, mps; auto: the GPU if there is one", affects_result=False)
    trust_remote_code: bool = _key(False, "run Python code that comes with the model")


@dataclass(frozen=True)
class CalibrationConfig:
    """Text that shows the pruner which inputs matter."""

    dataset: str = _key(
        "instructions",
        "instructions (built in), c4, wikitext2, alpaca, prose, a hub id (OWNER/NAME, OWNER/NAME:CONFIG), "
        "or a local .txt, .jsonl, .json or .parquet file",
    )
    column: str | None = _key(None, "column that holds the text; null or auto: text, or instruction and output")
    samples: int = _key(128, "number of windows", low=1)
    seq_len: int = _key(2048, "tokens in a window", low=2)
    windows: Literal["auto", "random-document", "concatenate"] = _key(
        "auto",
        "random-document: a random piece of each of `samples` long documents (as published); concatenate: pieces of "
        "all documents joined; auto: the first, or the second where there are too few long documents",
    )


@dataclass(frozen=True)
class PruneConfig:
    """How weights are chosen for removal."""

    method: Literal["magnitude", "wanda", "sparsegpt", "dsnot"] = _key("wanda", "pruning method")
    pattern: Pattern = _key(Pattern(keep=2, group=4), "N:M (N weights KEPT in every M) or a ratio of zeros (0.5)")
    targets: list[str] | AllLinear = _key(list(PROJECTIONS), "names of linear layers, or all-linear")
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    skip: list[str] = _key([], "names or patterns to leave dense, such as '*.layers.0.*' or down_proj")
    overrides: dict[str, Pattern] = _key(
        {}, "another pattern for names or patterns: {down_proj: 0.4}; the last one wins"
    )
    allocation: Literal["uniform", "owl"] | list[float] = _key(
        "uniform", "how a ratio is shared out: the same for all blocks, by outliers (OWL), or a ratio per block"
    )
    owl_lambda: float = _key(0.08, "OWL: a block's ratio lies within the wanted one +- this", above=0, below=1)
    mask_from: str | None = _key(None, "checkpoint whose zeros are the mask: sparsegpt repairs, dsnot starts from it")
    order: Literal["block", "module"] = _key(
        "block", "block: as published, two passes per block; module: one pass, layers pruned as their inputs arrive"
    )
    reconstruct_epochs: int = _key(0, "passes of tuning each pruned block on the dense block's output; 0: none", low=0)
    reconstruct_lr: float = _key(1e-4, "learning rate of that tuning (Adam)", above=0)
    batch_size: int | Auto = _key("auto", "calibration windows run through a block at a time", low=1)
    memory: Literal["auto", "device", "ram", "disk"] = _key(
        "auto", "where hidden states wait between blocks; auto: the first of these that fits", affects_result=False
    )
    damp: float = _key(0.01, "SparseGPT: damping as a share of the mean Hessian diagonal", above=0)
    block_size: int = _key(128, "SparseGPT: columns solved before the rest of the matrix is updated", low=1)


@dataclass(frozen=True)
class TrainDataConfig:
    """Instruction data: rows with instruction, input and output."""

    dataset: str = _key("instructions", "instructions (built in), alpaca, a hub id, or a local json / jsonl file")
    split: str = _key("train", "split expression of a hub dataset, such as train[:1000]")
    seq_len: int = _key(512, "longest example in tokens; longer ones are cut, counted and reported", low=8)
    val_size: int = _key(0, "rows held out for the validation loss (instructions: its own 64 are used)", low=0)
    max_rows: int | None = _key(None, "use only the first rows, after shuffling", low=1)
    train_on_inputs: bool = _key(True, "loss on the prompt too (as published), or on the response alone")


@dataclass(frozen=True)
class TrainConfig:
    """Sparsity-preserving fine-tuning."""

    method: Literal["spp"] = _key("spp", "adapter method")
    rank: int = _key(16, "r: rows of alpha", low=1)
    scale: float = _key(2.0, "s: weight of the adapter branch", above=0)
    dropout: float = _key(0.05, "dropout on the input of the adapter branch", low=0, below=1)
    targets: list[str] | Literal["pruned"] = _key("pruned", "names of linear layers; pruned: those that were pruned")
    data: TrainDataConfig = field(default_factory=TrainDataConfig)
    epochs: float = _key(3.0, "passes over the data", above=0)
    max_steps: int | None = _key(None, "stop after this many optimizer steps, whatever epochs says", low=1)
    batch_size: int = _key(128, "examples in an optimizer step, over all devices; accumulation is derived", low=1)
    micro_batch_size: int = _key(8, "examples on a device at a time", low=1, affects_result=False)
    lr: float = _key(4e-3, "peak learning rate (AdamW)", above=0)
    warmup_ratio: float = _key(0.03, "share of the steps in which the learning rate rises", low=0, below=1)
    weight_decay: float = _key(0.001, "AdamW's decoupled weight decay", low=0)
    max_grad_norm: float = _key(1.0, "gradients are scaled down to this norm; 0: never", low=0)
    gradient_checkpointing: bool = _key(False, "recompute activations in the backward pass", affects_result=False)
    bf16: bool | Auto = _key("auto", "autocast a float32 model to bfloat16; auto: where the hardware has it")
    save_steps: int = _key(200, "optimizer steps between checkpoints", low=1, affects_result=False)
    keep_checkpoints: int = _key(2, "newest checkpoints kept while training", low=1, affects_result=False)
    eval_steps: int | None = _key(None, "steps between validation losses; null: at the end only", low=1)
    log_steps: int = _key(10, "steps between two lines of progress", low=1, affects_result=False)


@dataclass(frozen=True)
class MergeConfig:
    """How adapter and pruned weights become one checkpoint."""

    dtype: DType = _key("auto", "dtype of the adapted matrices; auto: as in the pruned checkpoint")


@dataclass(frozen=True)
class EvalConfig:
    """What is measured on base, pruned and merged."""

    perplexity: list[str] = _key(["wikitext2"], "texts: wikitext2, instructions, prose, alpaca, or a local text file")
    seq_len: int | None = _key(None, "window of the perplexity in tokens; null: min(2048, limit of the model)", low=2)
    max_tokens: int | None = _key(None, "use only the first tokens of each text; shown with the result", low=2)
    tasks: list[str] = _key([], "zeroshot (the seven tasks), mmlu (5-shot), or any lm-eval task or group")
    batch_size: int | Auto = _key("auto", "requests at a time", low=1, affects_result=False)
    limit: int | None = _key(None, "first N examples of each task; shown with the result", low=1)


@dataclass(frozen=True)
class Config:
    """Everything a run needs."""

    run: RunConfig = field(default_factory=RunConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    merge: MergeConfig = field(default_factory=MergeConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
