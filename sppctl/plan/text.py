"""A plan in tables and sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sppctl.config.settings import Config
from sppctl.plan.footprint import GPU_SIZES
from sppctl.plan.run import Memory, OnGpu, Plan, Steps, Trainable, on

Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]


def tables(plan: Plan) -> Iterator[Table]:
    """Title, header and rows of each table; a hundred columns are enough for all of them."""
    yield _modules(plan.trainable)
    yield _methods(plan.trainable)
    yield _training(plan.memory)
    yield _gpus(plan)
    yield _pruning_and_disk(plan)


def gib(size: int) -> str:
    """Bytes in GiB with one decimal."""
    return f"{size / 2**30:,.1f}"


def _modules(trainable: Trainable) -> Table:
    rows = [
        (
            entry.module,
            " x ".join(f"{size:,}" for size in entry.shape),
            str(entry.count),
            f"{entry.each:,}",
            f"{entry.total:,}",
        )
        for entry in trainable.modules
    ]
    count = sum(entry.count for entry in trainable.modules)
    rows.append(("all", "", str(count), "", f"{trainable.parameters:,}"))
    return "Trainable parameters", ("module", "out x in", "layers", "each", "together"), rows


def _methods(trainable: Trainable) -> Table:
    chosen = trainable.method
    rows = [
        (f"{method} (chosen)" if method == chosen else method, f"{count:,}", gib(4 * count), gib(12 * count))
        for method, count in trainable.by_method.items()
    ]
    title = f"Methods at rank {trainable.rank}: sizes in GiB"
    return title, ("train.method", "trainable", "adapter", "gradients and AdamW"), rows


def _training(memory: Memory) -> Table:
    sizes = {name: getattr(memory, name) for name in ("weights", "adapter", "gradients", "optimizer")}
    sizes |= {name: size for name in ("masks", "teacher") if (size := getattr(memory, name))}
    rows = [(name, gib(size), gib(size)) for name, size in sizes.items()]
    kept = memory.activations
    rows.append(
        ("activations of the blocks", gib(kept["without"] - kept["logits"]), gib(kept["with"] - kept["logits"]))
    )
    rows.append(("logits of the loss", gib(kept["logits"]), gib(kept["logits"])))
    whole, saved = (memory.on(1, "ddp", checkpointing) for checkpointing in (False, True))
    rows.append(("transient (loss, kernels)", _moment(memory, whole), _moment(memory, saved)))
    rows.append(("total", gib(whole.total), gib(saved.total)))
    title = f"Training on one GPU, GiB: {memory.tokens_on_device:,} tokens at a time"
    return title, ("", "plain", "gradient checkpointing"), rows


def _moment(memory: Memory, entry: OnGpu) -> str:
    kept = memory.activations["with" if entry.gradient_checkpointing else "without"]
    return gib(entry.activations_peak - memory.teacher - kept)


def _gpus(plan: Plan) -> Table:
    entries = plan.memory.per_gpu
    rows = []
    for plain, saved in zip(entries[::2], entries[1::2], strict=True):
        accumulated = plan.steps.accumulation_by_gpus[plain.gpus]
        rows.append(
            (
                f"{plain.gpus} x {plain.strategy}",
                "uneven" if accumulated is None else str(accumulated),
                gib(plain.weights),
                gib(plain.total),
                _smallest(plain),
                gib(saved.total),
                _smallest(saved),
            )
        )
    header = ("GPUs", "accumulation", "weights", "plain", "needs", "checkpointing", "needs")
    return "Training per GPU, GiB, and the smallest GPU that has room for it", header, rows


def _smallest(entry: OnGpu) -> str:
    return f"{min(entry.fits_gb)} GB" if entry.fits_gb else f"> {max(GPU_SIZES)} GB"


def _pruning_and_disk(plan: Plan) -> Table:
    pruning, disk = plan.pruning, plan.disk
    words = {
        "embeddings": "embeddings",
        "block": "one block",
        "statistics": "statistics of its inputs",
        "solving": "solving its layers",
        "hidden_states": "hidden states of all windows",
        "running": f"inside a block, {pruning.windows_at_a_time} windows at a time",
        "tuning": "tuning a block",
    }
    sizes = {text: getattr(pruning, key) for key, text in words.items() if key != "tuning" or pruning.tuning}
    rows = [(f"pruning: {text}", gib(size)) for text, size in sizes.items()]
    rows.append(("pruning: at most", gib(pruning.peak)))
    rows += [(f"disk: {key}", gib(size)) for key, size in disk.items() if size]
    return f"Pruning by {pruning.method}, and the run directory: GiB", ("", "GiB"), rows


# --- sentences --------------------------------------------------------------------------------------------------------


def sentences(plan: Plan, config: Config) -> Iterator[str]:
    """What the tables mean for the configuration as it is."""
    model, trainable, pruning = plan.model, plan.trainable, plan.pruning
    yield (
        f"{model.path}: {model.parameters:,} parameters in {model.blocks} blocks, {model.dtype} "
        f"({model.source}); {model.computing}."
    )
    yield f"{trainable.method} trains {trainable.parameters:,} parameters, {trainable.share:.2%} of the model."
    yield _steps(plan.steps, config)
    processes, wanted = plan.steps.processes, config.train.gradient_checkpointing
    for strategy in dict.fromkeys(("ddp",) if processes == 1 else (config.launch.strategy, "ddp", "fsdp", "zero3")):
        where = "One GPU" if processes == 1 else f"{processes} GPUs under {strategy}"
        for checkpointing in (wanted, not wanted):
            verdict = _verdict(plan.memory.on(processes, strategy, checkpointing))
            yield f"{where}, {'with' if checkpointing else 'without'} gradient checkpointing: {verdict}"
    yield from _as_stored(plan.memory, processes, "ddp" if processes == 1 else config.launch.strategy, wanted)
    yield (
        f"Pruning needs {gib(pruning.peak)} GiB, {gib(pruning.peak - pruning.hidden_states)} if the hidden "
        f"states wait elsewhere (prune.memory); the run directory needs {gib(plan.disk['total'])} GiB."
    )


def _as_stored(memory: Memory, processes: int, strategy: str, checkpointing: bool) -> Iterator[str]:
    """Where the model has room only if it is computed in a dtype as narrow as the stored one."""
    if memory.as_stored is None:
        return
    gpus, wide, narrow = (
        on(per_gpu, processes, strategy, checkpointing)
        for per_gpu in (memory.per_gpu, memory.as_stored.here, memory.as_stored.per_gpu)
    )
    places = [f"{size} GB" for size in narrow.fits_gb if size not in gpus.fits_gb]
    if narrow.total <= memory.free < wide.total:
        places.append(f"the {gib(memory.free)} GiB that are free here")
    if places:
        dtype = memory.as_stored.dtype
        yield f"It fits on {' and '.join(places)} only in {dtype}: model.compute_dtype={dtype}."


def _verdict(entry: OnGpu) -> str:
    room, none = entry.fits_gb, [size for size in GPU_SIZES if size not in entry.fits_gb]
    words = [f"fits on {_joined(room)} GB"] if room else []
    words += [f"not on {_joined(none)} GB" if room else f"fits on none of {_joined(none)} GB"] if none else []
    return f"{gib(entry.total)} GiB, {', '.join(words)}."


def _joined(sizes: list[int]) -> str:
    *most, last = map(str, sizes)
    return f"{', '.join(most)} and {last}" if most else last


def _steps(steps: Steps, config: Config) -> str:
    batch = (
        f"{steps.batch_size} examples ({steps.processes} x {steps.micro_batch_size} x {steps.accumulation} accumulated)"
    )
    if steps.steps is None:
        return f"A step takes {batch}; the size of {config.train.data.dataset} is unknown, and so are the steps."
    length = f"{steps.steps:,} steps of {batch}, at most {steps.tokens_at_most:,} tokens"
    if steps.examples is None:
        return f"{length}."
    return f"{steps.examples:,} examples, epochs {steps.epochs:g}: {length}."
