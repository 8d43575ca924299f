"""The schema of the configuration: frozen dataclasses whose fields are the keys, with default, meaning and bounds."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, Literal

from sppctl.pattern import Pattern

AllLinear = Literal["all-linear"]
Auto = Literal["auto"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
REPLACED = {"launch.mixed_precision": "model.compute_dtype"}  # keys of older versions, and what to write instead
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
    path: bool = False,
) -> Any:
    """A key: default, meaning, bounds, whether its value changes results, whether it may be a path."""
    bounds = {"low": low, "above": above, "high": high, "below": below}
    marks = {"affects_result": affects_result, "path": path}
    metadata = {"meaning": meaning, "bounds": bounds} | marks
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives."""

    dir: str = _key(
        "runs/default", "directory of the run: pruned/, adapter/, merged/, eval/", affects_result=False, path=True
    )
    seed: int = _key(
        0, "seed of calibration windows, adapter initialisation, dropout and data order", low=0, high=2**32 - 1
    )


@dataclass(frozen=True)
class LaunchConfig:
    """How many processes share the work; under torchrun, accelerate or srun theirs are used instead."""

    num_processes: int | Auto = _key(
        "auto", "processes to start on this machine; auto: one per GPU", low=1, affects_result=False
    )
    num_machines: int = _key(
        1, "machines that take part; each starts sppctl under torchrun or srun", low=1, affects_result=False
    )
    strategy: Literal["ddp", "fsdp", "zero3"] = _key(
        "ddp",
        "training on several processes: ddp, a whole model each; fsdp or zero3 (DeepSpeed), its weights shared out",
        affects_result=False,
    )


@dataclass(frozen=True)
class ModelConfig:
    """The dense model to start from."""

    path: str | None = _key(
        None, "hub id, local directory, or package:NAME (directory of an installed package)", path=True
    )
    gguf_file: str | None = _key(None, "name of a GGUF file at model.path; converted to safetensors once", path=True)
    revision: str | None = _key(None, "branch, tag or commit of a hub id")
    dtype: DType = _key("auto", "dtype of the pruned checkpoint; auto: as stored")
    compute_dtype: DType = _key(
        "auto",
        "dtype that prune, train and eval compute in; auto: as stored where the device multiplies it natively, "
        "else float32",
    )
    device: str = _key("auto", "cpu, cuda, cuda:1, mps; auto: the GPU if there is one", affects_result=False)
    trust_remote_code: bool = _key(False, "run Python code that comes with the model")


@dataclass(frozen=True)
class CalibrationConfig:
    """Text that shows the pruner which inputs matter."""

    dataset: str = _key(
        "instructions",
        "instructions (built in), c4, wikitext2, alpaca, prose, a hub id (OWNER/NAME, OWNER/NAME:CONFIG), "
        "or a local .txt, .jsonl, .json or .parquet file",
        path=True,
    )
    split: str = _key("train", "split of a hub data set")
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
    mask_from: str | None = _key(
        None, "checkpoint whose zeros are the mask: sparsegpt repairs, dsnot starts from it", path=True
    )
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

    dataset: str | dict[str, float] = _key(
        "instructions",
        "instructions (built in), alpaca, alpaca-gpt4, a hub id, a local json, jsonl or parquet file; or several of "
        "these with a weight each: {alpaca: 3, own.jsonl: 1}",
        path=True,
    )
    split: str = _key("train", "split expression of a hub dataset, such as train[:1000]")
    prompt: str = _key(
        "alpaca",
        "alpaca; chat (the tokenizer's own chat template); or a text with {instruction} and {input} that ends where "
        "the response starts",
    )
    seq_len: int = _key(512, "longest example in tokens; longer ones are cut, counted and reported", low=8)
    val_size: int = _key(0, "rows held out for the validation loss (instructions: its own 64 are used)", low=0)
    max_rows: int | None = _key(None, "use only the first rows, after shuffling", low=1)
    train_on_inputs: bool = _key(True, "loss on the prompt too (as published), or on the response alone")
    group_by_length: bool = _key(False, "batches of examples of similar length: less padding, another order")
    packing: bool = _key(
        False,
        "the examples of a batch in one row without padding, each attending to itself only",
        affects_result=False,
    )


@dataclass(frozen=True)
class DistillConfig:
    """Learning from the dense model's own predictions."""

    teacher: str | None = _key(None, "base (the run's dense model) or any checkpoint; null: no distillation", path=True)
    weight: float = _key(0.5, "w: the loss is (1 - w) cross-entropy + w T^2 KL(teacher || student)", above=0, high=1)
    temperature: float = _key(1.0, "T: divides the logits of both in the KL divergence", above=0)


@dataclass(frozen=True)
class RefreshConfig:
    """Exchanging pruned and kept weights while training, at constant sparsity."""

    steps: int | None = _key(None, "optimizer steps between two refreshes of the mask; null: the mask is fixed", low=1)
    until: float = _key(0.5, "share of the training after which the mask stays", above=0, high=1)
    cycles: int = _key(50, "exchanges per row at most in one refresh", low=1)


@dataclass(frozen=True)
class TrainConfig:
    """Sparsity-preserving fine-tuning."""

    method: Literal["spp", "lora", "hira", "masked_lora", "masked_full", "ste"] = _key(
        "spp",
        "spp; lora (merging needs merge.mask); hira, masked_lora: low rank, zeros stay; masked_full: every kept "
        "weight (Eq. 3); ste: all weights under masks chosen again and again (Eq. 2)",
    )
    rank: int = _key(16, "r: rows of alpha (spp), rank of B A (lora, hira, masked_lora)", low=1)
    scale: float = _key(2.0, "s: weight of the adapter branch (spp, lora, masked_lora)", above=0)
    dropout: float = _key(0.05, "dropout on the input of the adapter branch (not masked_full, ste)", low=0, below=1)
    beta: bool = _key(True, "spp: train beta too; false is the paper's ablation W' = W * alpha")
    init: Literal["zero_beta", "random", "ones"] = _key(
        "zero_beta", "spp: how alpha and beta start; zero_beta starts at the pruned model"
    )
    mask_steps: int = _key(50, "ste: optimizer steps between two selections of the mask", low=1)
    mask_decay: float = _key(2e-4, "ste: SR-STE's pull of pruned weights towards zero", low=0)
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
    save_steps: int = _key(200, "optimizer steps between checkpoints", low=1, affects_result=False)
    keep_checkpoints: int = _key(2, "newest checkpoints kept while training", low=1, affects_result=False)
    eval_steps: int | None = _key(None, "steps between validation losses; null: at the end only", low=1)
    perplexity_steps: int | None = _key(
        None, "steps between perplexities on the first text of eval.perplexity", low=1, affects_result=False
    )
    log_steps: int = _key(10, "steps between two lines of progress", low=1, affects_result=False)
    report_to: list[Literal["tensorboard", "wandb"]] = _key(
        ["tensorboard"], "where figures go besides the record: tensorboard, wandb", affects_result=False
    )
    distill: DistillConfig = field(default_factory=DistillConfig)
    refresh: RefreshConfig = field(default_factory=RefreshConfig)


@dataclass(frozen=True)
class MergeConfig:
    """How adapter and pruned weights become one checkpoint."""

    dtype: DType = _key("auto", "dtype of all floating-point tensors of merged/; auto: as in the pruned checkpoint")
    mask: Literal["keep", "reapply", "dense"] = _key(
        "keep",
        "keep: refuse a merge that would fill zeros; reapply: prune the merged weights by the old mask again (the "
        "paper's LoRA*); dense: give up the sparsity",
    )


@dataclass(frozen=True)
class EvalConfig:
    """What is measured on base, pruned and merged."""

    perplexity: list[str] = _key(
        ["wikitext2"],
        "texts: wikitext2, c4 (validation), instructions, prose, alpaca, or a local text file",
        path=True,
    )
    seq_len: int | None = _key(None, "window of the perplexity in tokens; null: min(2048, limit of the model)", low=2)
    stride: int | None = _key(
        None,
        "tokens from one window to the next; null: seq_len, windows that do not overlap, as in the literature",
        low=1,
    )
    divergence: str | None = _key(
        "base",
        "checkpoint whose predictions the others are compared with on the same texts (KL divergence, top-1 "
        "agreement): base (the run's dense model), or any other; null: none",
        path=True,
    )
    max_tokens: int | None = _key(None, "use only the first tokens of each text; shown with the result", low=2)
    tasks: list[str] = _key(
        [],
        "zeroshot (the seven tasks), mmlu (5-shot), wikitext (word perplexity), all, or any lm-eval task, group or "
        "pattern (blimp_*)",
    )
    num_fewshot: int | None = _key(
        None, "examples in the prompt; null: 0 for zeroshot, 5 for mmlu, else lm-eval's", low=0
    )
    chat_template: bool = _key(False, "put prompts into the tokenizer's chat template")
    system_prompt: str | None = _key(None, "system message of every prompt")
    include_path: str | None = _key(None, "folder with lm-eval tasks of your own (YAML)", path=True)
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


def names_of(dataset: str | dict[str, float]) -> list[str]:
    """The data sets that ``train.data.dataset`` names."""
    return [dataset] if isinstance(dataset, str) else list(dataset)
