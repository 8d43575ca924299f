"""What a run will take, from the model's shapes alone: trainable parameters, memory of training, steps."""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sppctl import launch, machine
from sppctl.config.settings import Config, TrainConfig, names_of
from sppctl.data import instructions, texts
from sppctl.errors import UserError
from sppctl.model import architecture, checkpoint
from sppctl.model.blocks import Skeleton
from sppctl.model.targets import Target
from sppctl.plan import footprint
from sppctl.plan import storage as plan_storage
from sppctl.plan.footprint import FLOAT, Batch

GPUS = (1, 2, 4, 8)
STRATEGIES = ("ddp", "fsdp", "zero3")
METHODS = ("spp", "spp without beta", "lora", "hira", "masked_lora", "masked_full", "ste")
ALPACA_ROWS = 52_002
KNOWN_ROWS = dict.fromkeys(("alpaca", "tatsu-lab/alpaca", "alpaca-gpt4", "vicgalle/alpaca-gpt4"), ALPACA_ROWS)


def execute(config: Config) -> dict[str, Any]:
    """Everything that can be said of a run before it.

    Returns:
        Sections ``model``, ``trainable``, ``memory``, ``steps``, ``pruning``, ``disk``; sizes in bytes.

    Raises:
        UserError: an unknown model, no such targets, a rank that is too large, an impossible batch size.
    """
    path = config.model.path
    assert path is not None
    trust = config.model.trust_remote_code
    found, source = architecture.find(path, config.model.gguf_file, config.model.revision, trust)
    check_dtype(config)
    stored = dtype_of(config, found)  # before the model is built, which overwrites the configuration's
    skeleton = Skeleton(found, trust_remote_code=trust)
    targets = adapted(config, skeleton)
    processes = num_processes(config)
    steps = _steps(config, processes)
    parameters = num_parameters(skeleton)
    trainable = _trainable(config.train, targets, parameters)
    compute = computed_in(config, stored, training=True)
    memory = partial(_memory, config, skeleton, targets, processes=processes)
    # what a machine that multiplies it natively would train in, as GPUs are taken to do where none is here to be asked
    narrow = "bfloat16" if stored == "float16" else stored
    elsewhere = config.model.device == config.model.compute_dtype == "auto" and not torch.cuda.is_available()
    as_stored = None
    if narrow != compute.dtype:
        wide, stored_dtype = (memory(dtype)["per_gpu"] for dtype in (compute.dtype, narrow))
        as_stored = {"dtype": narrow, "per_gpu": stored_dtype, "here": wide}
    on_gpus = narrow if elsewhere else compute.dtype
    return {
        "model": {
            "path": path,
            "source": source,
            "dtype": stored,
            "compute_dtype": compute.dtype,
            "computing": compute.text if on_gpus == compute.dtype else f"{compute.text}, on GPUs in {on_gpus}",
            "parameters": parameters,
            "blocks": len(skeleton.blocks),
        },
        "trainable": trainable,
        "memory": memory(on_gpus) | {"dtype": on_gpus, "as_stored": as_stored},
        "steps": steps,
        "pruning": plan_storage.pruning(config, skeleton, computed_in(config, stored).dtype),
        "disk": plan_storage.disk(config, parameters, stored, FLOAT * trainable["parameters"]),
    }


# --- parameters -------------------------------------------------------------------------------------------------------


def dtype_of(config: Config, found: Any) -> str:
    """The name of the dtype of the pruned checkpoint; a GGUF file is unpacked to bfloat16."""
    if config.model.dtype != "auto":
        return config.model.dtype
    if config.model.gguf_file is not None:
        return "bfloat16"
    return str(getattr(found, "dtype", None) or "float32").removeprefix("torch.")


def check_dtype(config: Config) -> None:
    """Raises UserError if training would compute in float16."""
    if config.model.compute_dtype == "float16":
        raise UserError("model.compute_dtype: float16 gradients overflow; train in bfloat16, float32 or auto")


def computed_in(config: Config, stored: str, *, training: bool = False) -> machine.Compute:
    """The dtype that a stage will compute in; a device that is not here is taken to multiply 16 bits natively."""
    wanted = config.model.compute_dtype
    try:
        device = checkpoint.pick_device(config.model.device)
    except UserError:
        wanted = "bfloat16" if training and (wanted, stored) == ("auto", "float16") else wanted
        dtype = stored if wanted == "auto" else wanted
        return machine.Compute(dtype, f"computing in {dtype}, if {config.model.device} has units for it")
    return machine.choose_dtype(wanted, stored, device, training=training)


def num_parameters(skeleton: Skeleton) -> int:
    """Parameters of a model; on the meta device an output head that is tied to the embeddings stands by itself."""
    total = sum(parameter.numel() for parameter in skeleton.model.parameters())
    head = skeleton.model.get_output_embeddings()
    tied = skeleton.config.get_text_config().tie_word_embeddings
    if tied and head is not None and head.weight is not skeleton.model.get_input_embeddings().weight:
        total -= head.weight.numel()
    return total


def adapted(config: Config, skeleton: Skeleton) -> dict[str, Target]:
    """The linear layers that are trained, by name.

    Raises:
        UserError: there are none, or the rank is too large for one: each row of SPP's alpha serves at least one output
            row. A low-rank product may have any rank.
    """
    train, prune = config.train, config.prune
    if train.targets == "pruned":
        chosen = skeleton.targets(prune.targets, prune.skip)
    else:
        chosen = skeleton.targets(train.targets, key="train.targets")
    targets = {name: target for name, target in chosen.items() if target.is_linear}
    if not targets:
        raise UserError("train.targets: sppctl trains nn.Linear layers only, and none of these is one")
    for name, target in targets.items():
        if train.method == "spp" and train.rank > target.out_features:
            raise UserError(f"train.rank: {train.rank} exceeds the {target.out_features} output features of {name}")
    return targets


def method_of(train: TrainConfig) -> str:
    """The method's name in METHODS."""
    return "spp without beta" if train.method == "spp" and not train.beta else train.method


def num_trainable(method: str, rank: int, target: Target) -> int:
    """Trainable parameters on a matrix (m, n): spp r n + m (without beta r n), low rank r (m + n), full tuning m n."""
    r, m, n = rank, target.out_features, target.in_features
    if method in ("masked_full", "ste"):
        return m * n
    return {"spp": r * n + m, "spp without beta": r * n}.get(method, r * (m + n))


def _trainable(train: TrainConfig, targets: dict[str, Target], parameters: int) -> dict[str, Any]:
    kinds: dict[tuple[str, int, int], list[Target]] = {}
    for target in targets.values():
        kind = target.name.rpartition(".")[2]
        kinds.setdefault((kind, target.out_features, target.in_features), []).append(target)
    method, rank = method_of(train), train.rank
    modules = []
    for (kind, m, n), found in kinds.items():
        each = num_trainable(method, rank, found[0])
        modules.append({"module": kind, "shape": [m, n], "count": len(found), "each": each, "total": len(found) * each})
    every = {name: sum(num_trainable(name, rank, target) for target in targets.values()) for name in METHODS}
    whole = parameters if method in ("masked_full", "ste") else parameters + every[method]
    return {
        "method": method,
        "rank": rank,
        "modules": modules,
        "parameters": every[method],
        "share": every[method] / whole,
        "by_method": every,
    }


# --- training ---------------------------------------------------------------------------------------------------------


def num_processes(config: Config) -> int:
    """Processes over all machines; ``auto`` takes the GPUs that are visible, else one."""
    wanted = config.launch
    here = wanted.num_processes if wanted.num_processes != "auto" else max(1, torch.cuda.device_count())
    return here * wanted.num_machines


def _memory(
    config: Config, skeleton: Skeleton, targets: dict[str, Target], dtype: str, processes: int
) -> dict[str, Any]:
    """Bytes of a training, whole and per GPU.

    Adapter and gradients are float32, and so are AdamW's two moments; weights and activations have the dtype that is
    computed in. Rows are as long as ``train.data.seq_len``, so that real batches of shorter examples take less. With
    packing they are one row.
    """
    train = config.train
    d = getattr(torch, dtype).itemsize
    batch = Batch(train.micro_batch_size, train.data.seq_len, d)
    if train.data.packing:
        batch = Batch(1, batch.tokens, d)
    kept = footprint.activations(skeleton, targets, batch, train.method, train.dropout)
    kernel = footprint.kernel_buffers(targets, batch, train.method, train.dropout)
    widest = batch.tokens * max(max(t.out_features, t.in_features) for t in targets.values()) * d
    adapter = FLOAT * sum(num_trainable(method_of(train), train.rank, target) for target in targets.values())
    # full tuning trains a float32 copy beside the frozen weight; ste also holds its masks, a byte for each weight
    masks = adapter // FLOAT if train.method == "ste" else 0
    weights = num_parameters(skeleton) * d
    # the teacher's weights, and its and the student's distributions over the vocabulary
    teacher = weights + 2 * kept.logits if train.distill.teacher is not None else 0
    block = max(sum(p.numel() for p in block.parameters()) for block in skeleton.blocks) * d
    blocks = sum(p.numel() for p in skeleton.blocks.parameters()) * d
    per_gpu = []
    for gpus in sorted({*GPUS, processes}):
        for strategy in STRATEGIES if gpus > 1 else ("ddp",):
            for checkpointing in (False, True):
                sharded = _shares(weights, weights - blocks, block, adapter, gpus, strategy)
                sharded["training_state"] += masks
                peak = kept.peak(checkpointing, kernel, widest) + teacher
                total = sum(sharded.values()) + peak
                entry: dict[str, Any] = {"gpus": gpus, "strategy": strategy, "gradient_checkpointing": checkpointing}
                entry |= sharded | {"activations_peak": peak, "total": total, "fits_gb": footprint.fits(total)}
                per_gpu.append(entry)
    return {
        "weights": weights,
        "adapter": adapter,
        "gradients": adapter,
        "optimizer": 2 * adapter,
        "masks": masks,
        "teacher": teacher,
        "tokens_on_device": batch.tokens,
        "activations": {"without": kept.kept(False), "with": kept.kept(True), "logits": kept.logits},
        "kernel": kernel,
        "free": machine.free_memory(torch.device("cpu")),
        "per_gpu": per_gpu,
    }


def _shares(weights: int, outside: int, block: int, adapter: int, gpus: int, strategy: str) -> dict[str, int]:
    """Bytes of weights and of adapter, gradients and optimizer on each of several GPUs.

    ddp: all of them, and the gradients once more in the buckets that are reduced. fsdp and zero3: a share of
    everything, and whole what is at work: embeddings and head (``outside``), the running block and the next.
    """
    if strategy == "ddp":
        return {"weights": weights, "training_state": (4 if gpus == 1 else 5) * adapter}
    return {"weights": weights // gpus + outside + 2 * block, "training_state": 4 * adapter // gpus}


def _steps(config: Config, processes: int) -> dict[str, Any]:
    train = config.train
    accumulated = launch.accumulation(train, processes)
    examples = num_examples(config)
    steps = train.max_steps
    if steps is None and examples is not None:
        steps = math.ceil(train.epochs * math.ceil(examples / train.batch_size))
    return {
        "processes": processes,
        "batch_size": train.batch_size,
        "micro_batch_size": train.micro_batch_size,
        "accumulation": accumulated,
        "accumulation_by_gpus": {gpus: _accumulation(train, gpus) for gpus in sorted({*GPUS, processes})},
        "examples": examples,
        "epochs": train.epochs,
        "steps": steps,
        "tokens_at_most": None if steps is None else steps * train.batch_size * train.data.seq_len,
    }


def _accumulation(train: TrainConfig, processes: int) -> int | None:
    """None where the batch cannot be shared by so many processes."""
    try:
        return launch.accumulation(train, processes)
    except UserError:
        return None


def num_examples(config: Config) -> int | None:
    """Training rows, where they are known without the network: Alpaca's, the built-in ones, those of a local file."""
    section = config.train.data
    files = instructions.find(names_of(section.dataset), section.split)
    if not isinstance(section.dataset, str):
        return None  # of a mixture, what the weights make of it
    if section.dataset == "instructions":
        rows: int | None = len(texts.built_in_rows("train"))
    elif (path := files[section.dataset]) is not None:
        rows = _rows_of_file(path)
    else:
        rows = _rows_of_split(KNOWN_ROWS.get(section.dataset), section.split)
    if rows is None:
        return None
    if section.dataset != "instructions":  # which holds out rows of its own
        rows -= section.val_size
    if rows < 1:
        raise UserError(f"train.data.val_size: {section.val_size} leaves no row of {section.dataset} to train on")
    return rows if section.max_rows is None else min(rows, section.max_rows)


def _rows_of_file(path: Path) -> int:
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            return int(pyarrow.parquet.read_metadata(path).num_rows)
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"train.data.dataset: {path} cannot be read as parquet: {error}") from error
    return len(texts.read_rows(path, "train.data.dataset"))


def _rows_of_split(rows: int | None, split: str) -> int | None:
    """The rows of ``train``, ``train[10:20]`` or ``train[:10%]``; None for other expressions."""
    found = re.fullmatch(r"train(?:\[(\d*)(%?):(\d*)(%?)\])?", split)
    if rows is None or found is None:
        return None
    start, stop = (
        default if not number else round(rows * int(number) / 100) if percent else min(rows, int(number))
        for number, percent, default in ((found[1], found[2], 0), (found[3], found[4], rows))
    )
    return max(0, stop - start)
