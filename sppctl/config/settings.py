"""The schema of the configuration: frozen dataclasses whose fields are the keys, with default, meaning and bounds."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from sppctl.pattern import Pattern
from sppctl.plugins import ALLOCATIONS, PRUNERS

AllLinear = Literal["all-linear"]
Auto = Literal["auto"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


# comparisons of a value with its bound, and their text in errors
BOUNDS: dict[str, tuple[Callable[[float, float], bool], str]] = {
    "low": (operator.ge, "at least"),
    "above": (operator.gt, "more than"),
    "high": (operator.le, "at most"),
    "below": (operator.lt, "less than"),
}


def _key(
    default: Any,
    meaning: str,
    *,
    affects_result: bool = True,
    path: bool = False,
    plugins: str | None = None,
    later: bool = False,
    sentences: bool = False,
    **bounds: float,
) -> Any:
    """A key of the configuration.

    Args:
        default: its default.
        meaning: for the schema.
        affects_result: whether its value changes results.
        path: whether it may be a path.
        plugins: the group of :mod:`sppctl.plugins` whose names are valid, too.
        later: whether there are records from before it existed: they have no such key, and neither have newer ones
            where it has its default, so that their fingerprints are the same.
        sentences: whether it is a list of texts with commas: a single text is one of them.
        bounds: its :data:`BOUNDS`.
    """
    metadata = {"meaning": meaning, "affects_result": affects_result, "path": path, "plugins": plugins}
    metadata |= {"later": later, "sentences": sentences, "bounds": bounds}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _runtime(default: Any, meaning: str, *, path: bool = False, sentences: bool = False, **bounds: float) -> Any:
    """A key that cannot change a result: how or where something is computed."""
    return _key(
        default, meaning, affects_result=False, path=path, plugins=None, later=False, sentences=sentences, **bounds
    )


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives."""

    dir: str = _runtime(
        "auto",
        "directory of the run: pruned/, adapter/, merged/, eval/; auto: runs/MODEL-METHOD-PATTERN, such as "
        "runs/llama-7b-wanda-2of4",
        path=True,
    )
    seed: int = _key(
        0, "seed of calibration windows, adapter initialisation, dropout and data order", low=0, high=2**32 - 1
    )


@dataclass(frozen=True)
class LaunchConfig:
    """How many processes share the work; processes started by torchrun, accelerate or srun are used as they are."""

    num_processes: int | Auto = _runtime("auto", "processes to start on this machine; auto: one per GPU", low=1)
    num_machines: int = _runtime(1, "machines in the job; sppctl is started on each by torchrun or srun", low=1)
    strategy: Literal["ddp", "fsdp", "zero3"] = _runtime(
        "ddp",
        "training on several processes: ddp, a whole model in each; fsdp or zero3 (DeepSpeed), its weights sharded",
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
        "dtype that prune, train and eval compute in; auto: as stored if the device multiplies it natively, otherwise"
        " float32",
    )
    weights: Literal["auto", "dense", "packed"] = _runtime(
        "auto",
        "pruned weights in memory, in train and eval: dense; packed, without their zeros, with the same results; auto: "
        "dense if they fit",
    )
    device: str = _runtime("auto", "cpu, cuda, cuda:1, mps; auto: the GPU if there is one")
    trust_remote_code: bool = _key(False, "run Python code that comes with the model")


@dataclass(frozen=True)
class CalibrationConfig:
    """Text from which the pruner learns which inputs matter."""

    dataset: str = _key(
        "instructions",
        "instructions (built in), c4, wikitext2, alpaca, prose, a hub id (OWNER/NAME, OWNER/NAME:CONFIG), or a local "
        "txt, json, jsonl, csv, tsv or parquet file, or a folder of these; with --model alone the default is c4",
        path=True,
    )
    split: str = _key("train", "split of a hub data set or of a folder")
    column: str | None = _key(None, "column with the text; null or auto: text, or instruction and output")
    samples: int = _key(128, "number of windows", low=1)
    seq_len: int = _key(2048, "tokens in a window", low=2)
    windows: Literal["auto", "random-document", "concatenate"] = _key(
        "auto",
        "random-document: one random window from each of `samples` long documents (as published); concatenate: "
        "windows of all documents joined; auto: the first, or the second if there are too few long documents",
    )


@dataclass(frozen=True)
class PruneConfig:
    """How weights are chosen for removal."""

    method: Literal["magnitude", "wanda", "sparsegpt", "dsnot"] = _key(
        "wanda", "pruning method; or the name of a pruner of another package (--import)", plugins=PRUNERS
    )
    pattern: Pattern = _key(Pattern(keep=2, group=4), "N:M (N weights KEPT in every M) or a ratio of zeros (0.5)")
    targets: list[str] | AllLinear = _key(list(PROJECTIONS), "names of linear layers, or all-linear")
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    skip: list[str] = _key([], "names or patterns of layers to leave dense, such as '*.layers.0.*' or down_proj")
    overrides: dict[str, Pattern] = _key(
        {}, "other sparsity patterns by layer name or pattern: {down_proj: 0.4}; the last match wins"
    )
    allocation: Literal["uniform", "owl"] | list[float] = _key(
        "uniform",
        "how a ratio is distributed over blocks: uniform, owl (by outliers), a list of one ratio each, or the name of "
        "an allocation of another package (--import)",
        plugins=ALLOCATIONS,
    )
    owl_lambda: float = _key(0.08, "OWL: largest deviation of a block's ratio from prune.pattern", above=0, below=1)
    mask_from: str | None = _key(
        None, "checkpoint whose zeros are the mask: sparsegpt compensates for it, dsnot starts from it", path=True
    )
    keep_zeros: bool = _key(
        False,
        "zeros of the model stay zero and count towards the pattern: prunes a sparse model further (2:4 to 2:8)",
    )
    order: Literal["block", "module"] = _key(
        "block", "block: as published, two passes per block; module: one pass, layers pruned as their inputs arrive"
    )
    permute_channels: bool = _key(
        False,
        "N:M: first reorders the channels (hidden states, inputs of down_proj and o_proj) so that pruning loses less; "
        "the dense model computes the same in that order",
        later=True,
    )
    reconstruct_epochs: int = _key(0, "epochs of tuning each pruned block on the dense one's output; 0: none", low=0)
    reconstruct_lr: float = _key(1e-4, "learning rate of that tuning (Adam)", above=0)
    reconstruct_batch_size: int = _key(
        1, "calibration windows per optimizer step of that tuning, whatever runs at a time", low=1, later=True
    )
    reconstruct_loss: Literal["mse", "token"] = _key(
        "mse",
        "its loss: mse, the squared error of all tokens; token, that of each token divided by the token's own square, "
        "so that a few tokens with huge hidden states do not outweigh all others",
        later=True,
    )
    reconstruct_scheduler: Literal["constant", "linear", "cosine"] = _key(
        "constant", "its schedule; linear, cosine: down to 0 after the last step of each block", later=True
    )
    reconstruct_target: Literal["pruned", "dense"] = _key(
        "pruned",
        "what a block is tuned on, the dense block's output for: pruned, the hidden states of the pruned model; dense, "
        "those of the dense model, so that errors of earlier blocks are compensated, too",
        later=True,
    )
    reconstruct_unit: Literal["block", "sublayer"] = _key(
        "block",
        "what is tuned together: block; sublayer, first attention and then the MLP, while the other is fixed",
        later=True,
    )
    batch_size: int | Auto = _key("auto", "calibration windows run through a block at a time", low=1)
    memory: Literal["auto", "device", "ram", "disk"] = _runtime(
        "auto", "where hidden states are kept between blocks; auto: the first that is large enough"
    )
    damp: float = _key(0.01, "SparseGPT: damping, as a fraction of the mean Hessian diagonal", above=0)
    block_size: int = _key(128, "SparseGPT: columns solved before the rest of the matrix is updated", low=1)
    act_order: bool = _key(
        False,
        "SparseGPT: solves the columns whose removal would cost most first, for N:M in whole groups; undone afterwards",
        later=True,
    )


@dataclass(frozen=True)
class TrainDataConfig:
    """Training data: instructions, conversations, prompts with completions, or plain text."""

    dataset: str | dict[str, float] = _key(
        "instructions",
        "instructions (built in), alpaca, alpaca-gpt4; plain text: c4, wikitext2, prose; a hub id; a local txt, json, "
        "jsonl, csv, tsv or parquet file, or a folder of these; or several with a weight each: {alpaca: 3, own.csv: "
        "1}; with --model alone the default is alpaca (offline, with local calibration text: instructions)",
        path=True,
    )
    columns: dict[str, str] = _key(
        {}, "the data set's columns, if they have other names: {instruction: question, output: answer}"
    )
    split: str = _key("train", "split of a hub data set (also train[:1000]) or of a folder")
    prompt: str = _key(
        "alpaca",
        "alpaca; chat (the tokenizer's chat template); or a text with {instruction} and {input} that ends where the "
        "response starts; conversations use the chat template if there is one",
    )
    seq_len: int = _key(
        512,
        "maximum tokens in an example; longer ones are truncated, counted and reported; plain text is cut into windows "
        "of this size",
        low=8,
    )
    val_size: int = _key(0, "rows held out for the validation loss (instructions: its own 64 are used)", low=0)
    max_rows: int | None = _key(None, "use only the first rows, after shuffling", low=1)
    train_on_inputs: bool = _key(
        True, "compute the loss on the prompts of instructions, too (as published); conversations: never"
    )
    group_by_length: bool = _key(False, "batch examples of similar length: less padding, a different order")
    packing: bool = _runtime(
        False, "concatenate the examples of a batch without padding, each attending only to itself"
    )


@dataclass(frozen=True)
class DistillConfig:
    """Learning from the dense model's own predictions."""

    teacher: str | None = _key(None, "base (the run's dense model) or any checkpoint; null disables it", path=True)
    weight: float = _key(0.5, "w: the loss is (1 - w) cross-entropy + w T^2 KL(teacher || student)", above=0, high=1)
    temperature: float = _key(1.0, "T: divides the logits of both in the KL divergence", above=0)
    tokens: Literal["responses", "all", "text"] = _key(
        "responses",
        "tokens whose predictions the KL divergence covers: responses and plain text; all: also prompts; text: only "
        "plain text, so that instructions are learned from their rows alone",
        later=True,
    )
    hidden: float = _key(
        0.0,
        "h: adds h times the mean over blocks of |difference of the hidden states|^2 / |the teacher's|^2, at the same "
        "tokens; 0: none",
        low=0,
        later=True,
    )


@dataclass(frozen=True)
class RefreshConfig:
    """Masks that are re-selected while training, at constant sparsity."""

    steps: int | None = _key(None, "optimizer steps between two refreshes of the mask; null: a fixed mask", low=1)
    until: float = _key(0.5, "fraction of the training after which the mask is fixed", above=0, high=1)
    cycles: int = _key(50, "maximum number of exchanges per row in one refresh", low=1)


@dataclass(frozen=True)
class TrainConfig:
    """Sparsity-preserving fine-tuning."""

    method: Literal["spp", "lora", "hira", "masked_lora", "masked_full", "ste"] = _key(
        "spp",
        "spp; lora (merging needs merge.mask); hira, masked_lora: low rank, zeros stay; masked_full: every kept "
        "weight (Eq. 3); ste: all weights, masks re-selected periodically (Eq. 2)",
    )
    rank: int = _key(16, "r: rows of alpha (spp), rank of B A (lora, hira, masked_lora)", low=1)
    scale: float = _key(2.0, "s: weight of the adapter branch (spp, lora, masked_lora)", above=0)
    dropout: float = _key(0.05, "dropout on the input of the adapter branch (not masked_full, ste)", low=0, below=1)
    beta: bool = _key(True, "spp: train beta too; false is the paper's ablation W' = W * alpha")
    init: Literal["zero_beta", "random", "ones"] = _key(
        "zero_beta", "spp: initialisation of alpha and beta; zero_beta starts at the pruned model"
    )
    mask_steps: int = _key(50, "ste: optimizer steps between two selections of the mask", low=1)
    mask_decay: float = _key(2e-4, "ste: SR-STE's decay of pruned weights towards zero", low=0)
    targets: list[str] | Literal["pruned"] = _key("pruned", "names of linear layers; pruned: those that were pruned")
    data: TrainDataConfig = field(default_factory=TrainDataConfig)
    epochs: float = _key(3.0, "passes over the data", above=0, high=1e6)
    max_steps: int | None = _key(None, "stop after this many optimizer steps; overrides epochs", low=1)
    batch_size: int = _key(128, "examples per optimizer step, over all devices; accumulation is derived", low=1)
    micro_batch_size: int = _runtime(8, "examples per device and forward pass", low=1)
    optimizer: Literal["adamw", "adafactor", "adamw_8bit"] = _key(
        "adamw", "adamw; adafactor: factored second moments, less memory; adamw_8bit: needs bitsandbytes and a GPU"
    )
    adam_beta1: float = _key(0.9, "adamw: decay of the mean of the gradients", low=0, below=1, later=True)
    adam_beta2: float = _key(
        0.999,
        "adamw: decay of the mean of their squares; 0.95 forgets the large ones of the first steps",
        low=0,
        below=1,
        later=True,
    )
    lr: float = _key(4e-3, "peak learning rate", above=0)
    scheduler: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "cosine_with_min_lr",
        "cosine_warmup_with_min_lr",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "warmup_stable_decay",
    ] = _key("linear", "transformers' learning-rate schedule; linear: down to 0 after the last step")
    scheduler_kwargs: dict[str, float | str] = _key(
        {}, "further arguments of the schedule: {min_lr_rate: 0.1}, {num_cycles: 3}, {num_decay_steps: 100}"
    )
    warmup_ratio: float = _key(0.03, "warm-up, as a fraction of all steps", low=0, below=1)
    warmup_steps: int | None = _key(None, "warm-up in optimizer steps; overrides warmup_ratio", low=0)
    weight_decay: float = _key(0.001, "decoupled weight decay", low=0)
    max_grad_norm: float = _key(1.0, "gradient clipping norm; 0 disables", low=0)
    gradient_checkpointing: bool = _runtime(False, "recompute activations in the backward pass")
    save_steps: int = _runtime(200, "optimizer steps between checkpoints", low=1)
    keep_checkpoints: int = _runtime(2, "number of newest checkpoints to keep while training", low=1)
    eval_steps: int | None = _key(None, "optimizer steps between validation losses; null: only at the end", low=1)
    perplexity_steps: int | None = _runtime(
        None, "optimizer steps between perplexities on the first text of eval.perplexity", low=1
    )
    keep_best: Literal["eval_loss", "perplexity"] | None = _key(
        None,
        "publish the adapter with the lowest validation loss (eval_steps) or perplexity (perplexity_steps), not the "
        "last one",
    )
    patience: int | None = _key(
        None, "early stopping: measurements of keep_best without improvement before training ends; null: never", low=1
    )
    log_steps: int = _runtime(10, "optimizer steps between two lines of progress", low=1)
    report_to: list[Literal["tensorboard", "wandb"]] = _runtime(
        ["tensorboard"], "where metrics are also logged: tensorboard, wandb"
    )
    distill: DistillConfig = field(default_factory=DistillConfig)
    refresh: RefreshConfig = field(default_factory=RefreshConfig)


@dataclass(frozen=True)
class MergeConfig:
    """How adapter and pruned weights become one checkpoint."""

    dtype: DType = _key("auto", "dtype of all floating-point tensors of merged/; auto: as in the pruned checkpoint")
    adapter: str | None = _runtime(
        None, "PEFT adapter to merge, trained anywhere (directory or hub id); null: that of the run", path=True
    )
    mask: Literal["keep", "reapply", "dense"] = _key(
        "keep",
        "keep: refuse a merge that would fill zeros; reapply: apply the old mask to the merged weights (the paper's "
        "LoRA*); dense: accept a dense result",
    )


@dataclass(frozen=True)
class EvalConfig:
    """What is measured on base, pruned and merged."""

    perplexity: list[str] = _key(
        ["wikitext2"],
        "texts: wikitext2, c4 (validation), instructions, prose, a hub id (its split test), or a local file or folder",
        path=True,
    )
    seq_len: int | None = _key(None, "perplexity window in tokens; null: min(2048, limit of the model)", low=2)
    stride: int | None = _key(
        None,
        "tokens from one window to the next; null: seq_len, so that windows do not overlap, as in the literature",
        low=1,
    )
    divergence: str | None = _key(
        "base",
        "reference for KL divergence and top-1 agreement on the same texts: base (the run's dense model), or any "
        "checkpoint; null disables",
        path=True,
    )
    max_tokens: int | None = _key(None, "use only the first tokens of each text; results are labelled with it", low=2)
    tasks: list[str] = _key(
        [],
        "zeroshot (the seven tasks), mmlu (5-shot), wikitext (word perplexity), all, or any lm-eval task, group or "
        "pattern (blimp_*)",
    )
    num_fewshot: int | None = _key(
        None, "few-shot examples in the prompt; null: 0 for zeroshot, 5 for mmlu, otherwise lm-eval's default", low=0
    )
    chat_template: bool = _key(False, "apply the tokenizer's chat template to prompts")
    system_prompt: str | None = _key(None, "system message of every prompt")
    include_path: str | None = _key(None, "folder with your own lm-eval tasks (YAML)", path=True)
    batch_size: int | Auto = _runtime("auto", "requests per batch", low=1)
    limit: int | None = _key(None, "use only the first N examples of each task; results are labelled with it", low=1)
    prompts: list[str] = _runtime(
        [
            "Explain in one sentence why the sky is blue.",
            "List three things to check before a long drive.",
            "Write a short story about a lighthouse keeper.",
        ],
        "base, pruned and merged continue each of these for the report; []: no samples",
        sentences=True,
    )


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


@dataclass(frozen=True)
class Unused:
    """Keys of a section that have no effect."""

    section: Any  # a configuration with defaults for all keys
    name: str  # of the section
    keys: set[str]
    reason: str  # how that is set which makes them useless


def changed_in_vain(unused: list[Unused]) -> list[str]:
    """One line for each reason that makes keys useless which were changed."""
    lines = []
    for one in unused:
        defaults = type(one.section)()
        changed = sorted(key for key in one.keys if getattr(one.section, key) != getattr(defaults, key))
        if changed:
            lines.append(f"{', '.join(f'{one.name}.{key}' for key in changed)}: no effect {one.reason}")
    return lines
