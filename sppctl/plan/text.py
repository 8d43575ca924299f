"""A plan in tables and sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sppctl.config.settings import Config
from sppctl.plan.footprint import FLOAT, GPU_SIZES, mask_bytes
from sppctl.plan.run import Memory, Plan, Steps, Trainable
from sppctl.plan.strategies import OnGpu
from sppctl.plan.teacher import Teacher

Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]


def tables(plan: Plan) -> Iterator[Table]:
    """Title, header and rows of each table; a hundred columns are enough for all of them."""
    yield from _parameters(plan.trainable)
    yield _training(plan.memory)
    yield _gpus(plan)
    if plan.packed is not None:
        yield _packed(plan.memory, plan.packed)
    yield _pruning_and_disk(plan)


def gib(size: int) -> str:
    """Bytes in GiB with one decimal."""
    number = size / 2**30
    return "<0.1" if 0 < number < 0.1 else f"{number:,.1f}"


def _parameters(trainable: Trainable) -> Iterator[Table]:
    rows = []
    for entry in trainable.modules:
        shape = " x ".join(f"{size:,}" for size in entry.shape)
        rows.append((entry.module, shape, str(entry.count), f"{entry.each:,}", f"{entry.total:,}"))
    layers = sum(entry.count for entry in trainable.modules)
    rows.append(("all", "", str(layers), "", f"{trainable.parameters:,}"))
    yield "Trainable parameters", ("module", "out x in", "layers", "each", "together"), rows
    title = f"Methods at rank {trainable.rank}: sizes in GiB"
    header = ("train.method", "trainable", "adapter", f"gradients and {trainable.optimizer}")
    yield (
        title,
        header,
        [
            (
                f"{name} (chosen)" if name == trainable.method else name,
                f"{count:,}",
                gib(FLOAT * count + mask_bytes(name, count)),
                gib(FLOAT * count + trainable.optimizer_by_method[name]),
            )
            for name, count in trainable.by_method.items()
        ],
    )


def _training(memory: Memory) -> Table:
    kept, logits = memory.activations, memory.activations["logits"]
    plain, saved = (memory.on(1, "ddp", checkpointing) for checkpointing in (False, True))
    names = ("weights", "adapter", "gradients", "optimizer", "masks", "teacher")
    sizes = [(name, size, size) for name in names if (size := getattr(memory, name))]
    sizes += [
        ("activations of the blocks", kept["without"] - logits, kept["with"] - logits),
        ("logits of the loss", logits, logits),
        (
            "transient (loss, kernels)",
            plain.activations_peak - memory.teacher - kept["without"],
            saved.activations_peak - memory.teacher - kept["with"],
        ),
        ("total", plain.total, saved.total),
    ]
    title = f"Training on one GPU, GiB: {memory.tokens_on_device:,} tokens at a time"
    rows = [(name, gib(size), gib(checkpointed)) for name, size, checkpointed in sizes]
    return title, ("", "plain", "gradient checkpointing"), rows


def _gpus(plan: Plan) -> Table:
    entries, rows = plan.memory.per_gpu, []
    for plain, saved in zip(entries[::2], entries[1::2], strict=True):
        accumulated = plan.steps.accumulation_by_gpus[plain.gpus]
        row = [f"{plain.gpus} x {plain.strategy}", "uneven" if accumulated is None else str(accumulated)]
        row.append(gib(plain.weights))
        for entry in (plain, saved):
            row += [gib(entry.total), _smallest(entry)]
        rows.append(row)
    header = ("GPUs", "accumulation", "weights", "plain", "needs", "checkpointing", "needs")
    return "Training per GPU, GiB, and the smallest GPU that has room for it", header, rows


def _packed(dense: Memory, packed: Memory) -> Table:
    rows = [["weights", gib(dense.weights), gib(packed.weights)]]
    entries = [[memory.on(1, "ddp", checkpointing) for memory in (dense, packed)] for checkpointing in (False, True)]
    for text, pair in zip(("training", "training, gradient checkpointing"), entries, strict=True):
        rows.append([text, *(gib(entry.total) for entry in pair)])
        rows.append(["  smallest GPU", *(_smallest(entry) for entry in pair)])
    return "Weights in memory without their zeros (model.weights=packed), one GPU: GiB", ("", "dense", "packed"), rows


def _smallest(entry: OnGpu) -> str:
    return f"{min(entry.fits_gb)} GB" if entry.fits_gb else f"> {max(GPU_SIZES)} GB"


def _pruning_and_disk(plan: Plan) -> Table:
    pruning = plan.pruning
    sizes = {
        "embeddings": pruning.embeddings,
        "one block": pruning.block,
        "statistics of its inputs": pruning.statistics,
        "solving its layers": pruning.solving,
        "hidden states of all windows": pruning.hidden_states,
        f"inside a block, {pruning.windows_at_a_time} windows at a time": pruning.running,
    }
    if pruning.tuning:
        sizes["tuning a block"] = pruning.tuning
    rows = [(f"pruning: {part}", gib(size)) for part, size in (sizes | {"at most": pruning.peak}).items()]
    rows += [(f"disk: {name}", gib(size)) for name, size in plan.disk.items() if size]
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
    yield from _teacher(plan.teacher)
    yield _steps(plan.steps, config)
    processes, configured = plan.steps.processes, config.train.gradient_checkpointing
    possible = [entry.strategy for entry in plan.memory.per_gpu if entry.gpus == processes]
    strategies = ["ddp"] if processes == 1 else [config.launch.strategy, *possible]
    for strategy in dict.fromkeys(strategies):
        where = "One GPU" if processes == 1 else f"{processes} GPUs under {strategy}"
        for checkpointing in (configured, not configured):
            verdict = _verdict(plan.memory.on(processes, strategy, checkpointing))
            yield f"{where}, {'with' if checkpointing else 'without'} gradient checkpointing: {verdict}"
    yield from _as_stored(plan.memory, plan.memory.on(processes, strategies[0], configured))
    yield (
        f"Pruning needs {gib(pruning.peak)} GiB, {gib(pruning.peak - pruning.hidden_states)} if the hidden "
        f"states are kept off the device (prune.memory); the run directory needs {gib(plan.disk['total'])} GiB."
    )


def _teacher(teacher: Teacher | None) -> Iterator[str]:
    """Whose sizes are counted for a teacher that is another checkpoint."""
    if teacher is None:
        return
    if teacher.problem is not None:
        counted = f"The teacher {teacher.path} is counted as large as the model, because its sizes are unknown"
        yield f"{counted}: {teacher.problem}."
    elif teacher.source is not None:
        yield f"The teacher {teacher.path} has {teacher.parameters:,} parameters ({teacher.source})."


def _as_stored(memory: Memory, entry: OnGpu) -> Iterator[str]:
    """Where the model fits only if it is computed in a dtype as narrow as the stored one."""
    if memory.as_stored is None:
        return
    place = memory.per_gpu.index(entry)
    wide, narrow = memory.as_stored.here[place], memory.as_stored.per_gpu[place]
    smallest = narrow.fits_gb[:1]
    places = [f"a GPU of {size} GB" for size in smallest if size not in entry.fits_gb]
    if narrow.total <= memory.free < wide.total:
        places.append(f"the {gib(memory.free)} GiB that are free here")
    if places:
        dtype = memory.as_stored.dtype
        yield f"It fits on {' and '.join(places)} only in {dtype}: model.compute_dtype={dtype}."


def _verdict(entry: OnGpu) -> str:
    if not entry.fits_gb:
        return f"{gib(entry.total)} GiB, more than a GPU of {max(GPU_SIZES)} GB has room for."
    return f"{gib(entry.total)} GiB, fits on a GPU of {min(entry.fits_gb)} GB."


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
