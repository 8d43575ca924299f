"""The requirements of a run from the model's shapes alone: trainable parameters, memory of training, steps."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from sppctl import console, distributed, launch, machine
from sppctl.config.settings import Config, TrainConfig, names_of
from sppctl.data import formats, instructions, texts
from sppctl.errors import UserError
from sppctl.model import architecture, checkpoint
from sppctl.model.blocks import Skeleton
from sppctl.model.targets import Target
from sppctl.plan import footprint, strategies
from sppctl.plan import storage as plan_storage
from sppctl.plan import teacher as teachers
from sppctl.plan.footprint import FLOAT, Batch
from sppctl.plan.footprint import num_parameters as num_parameters
from sppctl.plan.strategies import OnGpu
from sppctl.plan.teacher import Teacher
from sppctl.prune.choose import planned_patterns
from sppctl.train import scope
from sppctl.train.distill import BASE

GPUS = (1, 2, 4, 8)
LITTLE = 20  # times the weights: with more memory than that, how they are kept does not matter
METHODS = ("spp", "spp without beta", "lora", "hira", "masked_lora", "masked_full", "ste")
ALPACA_ROWS = 52_002
KNOWN_ROWS = dict.fromkeys(("alpaca", "tatsu-lab/alpaca", "alpaca-gpt4", "vicgalle/alpaca-gpt4"), ALPACA_ROWS)


@dataclass(frozen=True)
class Model:
    """The model: its source, and the dtypes that it is stored and computed in."""

    path: str
    source: str
    dtype: str
    compute_dtype: str
    computing: str
    parameters: int
    blocks: int


@dataclass(frozen=True)
class Module:
    """Layers of one name and shape, and their trainable parameters."""

    module: str
    shape: tuple[int, int]
    count: int
    each: int
    total: int


@dataclass(frozen=True)
class Trainable:
    """Trainable parameters: of the configured method by module, and of every method."""

    method: str
    rank: int
    modules: list[Module]
    parameters: int
    share: float
    by_method: dict[str, int]
    optimizer: str
    optimizer_by_method: dict[str, int]  # bytes of its state


@dataclass(frozen=True)
class AsStored:
    """Bytes on each GPU in the stored dtype, and in the wider compute dtype of this machine."""

    dtype: str
    per_gpu: list[OnGpu]
    here: list[OnGpu]


@dataclass(frozen=True)
class Memory:
    """Bytes of a training, in total and per GPU."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    masks: int
    teacher: int
    tokens_on_device: int
    activations: dict[str, int]  # kept ``without`` and ``with`` gradient checkpointing, both with the ``logits``
    kernel: int
    free: int  # on this machine
    per_gpu: list[OnGpu]
    dtype: str  # computed in
    packed: bool = False  # the pruned weights
    as_stored: AsStored | None = None  # None: the model is computed in the dtype that it is stored in

    def on(self, gpus: int, strategy: str, checkpointing: bool) -> OnGpu:
        """The entry of a number of GPUs and a strategy."""
        key = (gpus, strategy, checkpointing)
        return next(
            entry for entry in self.per_gpu if (entry.gpus, entry.strategy, entry.gradient_checkpointing) == key
        )


@dataclass(frozen=True)
class Steps:
    """Batch, and the number of steps; None where the number of examples is unknown."""

    processes: int
    batch_size: int
    micro_batch_size: int
    accumulation: int
    accumulation_by_gpus: dict[int, int | None]  # None where the batch cannot be split over so many
    examples: int | None
    epochs: float
    steps: int | None
    tokens_at_most: int | None


@dataclass(frozen=True)
class Plan:
    """The requirements of a run; sizes in bytes, ``disk`` by directory."""

    model: Model
    trainable: Trainable
    memory: Memory
    steps: Steps
    pruning: plan_storage.Pruning
    disk: dict[str, int]
    packed: Memory | None  # on packed weights; None if the method or the strategy needs dense ones
    teacher: Teacher | None


@dataclass(frozen=True)
class _Training:
    """What the memory of a training depends on, besides the dtype that is computed in."""

    config: Config
    skeleton: Skeleton
    targets: dict[str, Target]  # that are trained
    trainable: Trainable
    teacher: Teacher | None
    processes: int
    stored: str  # dtype of the pruned checkpoint


def execute(config: Config) -> Plan:
    """The requirements of a run; nothing is loaded or written.

    Raises:
        UserError: an unknown model, no such targets, a rank that is too large, an impossible batch size, a strategy
            that training refuses.
    """
    model = config.model
    assert model.path is not None
    shapes, source = architecture.load(model.path, model.gguf_file, model.revision, model.trust_remote_code)
    scope.check_dtype(config)
    # of the pruned checkpoint; known before the model is built, which overwrites the configuration's
    dtype = getattr(shapes, "dtype", None) or torch.float32
    stored = checkpoint.dtype_of(model.dtype, None if model.gguf_file is not None else dtype)
    skeleton = Skeleton(shapes, trust_remote_code=model.trust_remote_code)
    targets = scope.adapted(config, skeleton)
    processes = launch.configured_processes(config)
    strategies.check(config, skeleton, targets, processes)
    steps = _steps(config, processes)
    parameters = num_parameters(skeleton)
    trainable = _trainable(config.train, targets, parameters)
    compute = _computed_in(config, stored, training=True)
    teacher = teachers.find(config, skeleton)
    memory = partial(_memory, _Training(config, skeleton, targets, trainable, teacher, processes, stored))
    # the dtype of a machine with native support, which GPUs are assumed to have if this machine has none to ask
    narrow = machine.training_dtype(stored)
    no_gpu = model.device == model.compute_dtype == "auto" and not torch.cuda.is_available()
    as_stored = None
    if narrow != compute.dtype:
        as_stored = AsStored(narrow, memory(narrow).per_gpu, memory(compute.dtype).per_gpu)
    on_gpus = narrow if no_gpu else compute.dtype
    needed = memory(on_gpus)
    without_training = _computed_in(config, stored).dtype
    pruning = plan_storage.pruning(config, skeleton, without_training)
    evaluated = {without_training, _computed_in(config, plan_storage.merged_dtype(config, stored)).dtype}
    scratch = plan_storage.scratch(config, skeleton, pruning.hidden_states, evaluated)
    adapter = plan_storage.adapter(config, skeleton, targets, trainable.parameters, stored)
    computing = compute.text if on_gpus == compute.dtype else f"{compute.text}, on GPUs in {on_gpus}"
    return Plan(
        model=Model(model.path, source, stored, compute.dtype, computing, parameters, len(skeleton.blocks)),
        trainable=trainable,
        memory=replace(needed, as_stored=as_stored),
        steps=steps,
        pruning=pruning,
        disk=plan_storage.disk(config, parameters, stored, adapter, needed.optimizer, scratch),
        packed=None if scope.cannot_pack(config, processes).lines else memory(on_gpus, packed=True),
        teacher=teacher,
    )


def bytes_on_each_device(config: Config, *, packed: bool = False) -> int | None:
    """The memory that a training in the existing processes needs on each device; None if it is unknown."""
    processes = distributed.world_size()
    existing = replace(config.launch, num_processes=processes, num_machines=1)
    strategy = existing.strategy if processes > 1 else "ddp"
    with contextlib.suppress(UserError):
        plan = execute(replace(config, launch=existing))
        memory = plan.packed if packed else plan.memory
        if memory is not None:
            return memory.on(processes, strategy, config.train.gradient_checkpointing).total
    return None


def trains_packed(config: Config, pruned: Path, dtype: str) -> bool:
    """Whether to train on packed weights: as configured; ``auto``: if the plan on dense ones does not fit into memory.

    To be decided by one process for all, which may have less memory a moment later.
    """
    if config.model.weights != "auto":
        return config.model.weights == "packed"
    if scope.cannot_pack(config, distributed.world_size()).lines:
        return False
    device, teacher = checkpoint.pick_device(config.model.device), config.train.distill.teacher
    # processes on the CPU of a machine share its memory
    sharing = distributed.local_world_size() if device.type == "cpu" else 1
    room = int(machine.free_memory(device) * footprint.USABLE / sharing)
    # packing would not matter; a teacher other than the dense model may be far larger than the weights
    if teacher in (None, BASE) and LITTLE * checkpoint.weight_bytes(pruned, dtype) < room:
        return False
    dense, packed = bytes_on_each_device(config), bytes_on_each_device(config, packed=True)
    if dense is None or packed is None or dense <= room or packed >= dense:
        return False
    sizes = [f"{size / 2**30:.1f} GiB" for size in (dense, packed, room)]
    stays = "" if teacher is None else "; the teacher stays dense unless it is sparse"
    console.note(
        f"model.weights: training needs {sizes[0]} with dense weights and {sizes[1]} with packed ones by plan; "
        f"{sizes[2]} are free, so they are packed{stays}"
    )
    return True


# --- parameters -------------------------------------------------------------------------------------------------------


def _computed_in(config: Config, stored: str, *, training: bool = False) -> machine.Compute:
    """The dtype that a stage will compute in; a missing device is assumed to support 16 bits natively."""
    configured = config.model.compute_dtype
    try:
        device = checkpoint.pick_device(config.model.device)
    except UserError:
        dtype = machine.training_dtype(stored) if training else stored
        if configured != "auto":
            dtype = configured
        return machine.Compute(dtype, f"computing in {dtype}, if {config.model.device} supports it")
    return machine.choose_dtype(configured, stored, device, training=training)


def trainable_shapes(method: str, rank: int, target: Target) -> list[tuple[int, int]]:
    """Shapes of what is trained on a matrix (m, n): spp (r, n), (m, 1); low rank (r, n), (m, r); full tuning (m, n)."""
    r, m, n = rank, target.out_features, target.in_features
    shapes = {"spp": [(r, n), (m, 1)], "spp without beta": [(r, n)], "masked_full": [(m, n)], "ste": [(m, n)]}
    return shapes.get(method, [(r, n), (m, r)])


def num_trainable(method: str, rank: int, target: Target) -> int:
    """Trainable parameters on a matrix."""
    return sum(rows * columns for rows, columns in trainable_shapes(method, rank, target))


def _trainable(train: TrainConfig, targets: dict[str, Target], parameters: int) -> Trainable:
    kinds: dict[tuple[str, int, int], list[Target]] = {}
    for target in targets.values():
        kind = target.name.rpartition(".")[2]
        kinds.setdefault((kind, target.out_features, target.in_features), []).append(target)
    method = "spp without beta" if train.method == "spp" and not train.beta else train.method
    modules = []
    for (kind, m, n), members in kinds.items():
        per_layer = num_trainable(method, train.rank, members[0])
        modules.append(Module(kind, (m, n), len(members), per_layer, len(members) * per_layer))
    by_method = {name: sum(num_trainable(name, train.rank, target) for target in targets.values()) for name in METHODS}
    states = {
        name: sum(
            footprint.optimizer_state(train.optimizer, trainable_shapes(name, train.rank, target))
            for target in targets.values()
        )
        for name in METHODS
    }
    trained = by_method[method]
    total = parameters if method in ("masked_full", "ste") else parameters + trained
    return Trainable(method, train.rank, modules, trained, trained / total, by_method, train.optimizer, states)


# --- training ---------------------------------------------------------------------------------------------------------


def _memory(training: _Training, dtype: str, packed: bool = False) -> Memory:
    """Bytes of a training, in total and per GPU.

    Adapter and gradients are float32; weights and activations have the dtype that is computed in.
    """
    config, skeleton, targets, trainable = training.config, training.skeleton, training.targets, training.trainable
    train, d = config.train, machine.torch_dtype(dtype).itemsize
    batch = _batch(train, d)
    activations = footprint.activations(skeleton, targets, batch, train.method, train.dropout)
    kernel = footprint.kernel_buffers(targets, batch, train.method, train.dropout)
    widest = batch.tokens * max(max(t.out_features, t.in_features) for t in targets.values()) * d
    weights, adapter = num_parameters(skeleton) * d, FLOAT * trainable.parameters
    optimizer = trainable.optimizer_by_method[trainable.method]
    # full tuning trains a float32 copy beside the frozen weight; ste also holds its masks
    masks, teacher = footprint.mask_bytes(train.method, trainable.parameters), 0
    if training.teacher is not None:
        teacher = training.teacher.memory(skeleton.config.get_text_config(), batch, train.distill.hidden > 0)
    blocks = [d * sum(p.numel() for p in block.parameters()) for block in skeleton.blocks]
    weights -= _saved_by_packing(config, skeleton, d, training.stored) if packed else 0
    peaks = {
        checkpointing: activations.peak(checkpointing, kernel, widest) + teacher for checkpointing in (False, True)
    }
    per_gpu: list[OnGpu] = []
    for gpus in sorted({*GPUS, training.processes}):
        for strategy in strategies.possible(config, skeleton, targets, gpus, packed):
            sizes = weights, weights - sum(blocks), max(blocks), adapter, optimizer
            share, state = strategies.shares(*sizes, gpus, strategy)
            per_gpu += strategies.on_gpus(gpus, strategy, share, state + masks, peaks)
    return Memory(
        weights=weights,
        adapter=adapter,
        gradients=adapter,
        optimizer=optimizer,
        masks=masks,
        teacher=teacher,
        tokens_on_device=batch.tokens,
        activations={"without": activations.kept(False), "with": activations.kept(True), "logits": activations.logits},
        kernel=kernel,
        free=machine.free_memory(torch.device("cpu")),
        per_gpu=per_gpu,
        dtype=dtype,
        packed=packed,
    )


def _saved_by_packing(config: Config, skeleton: Skeleton, d: int, stored: str) -> int:
    """Bytes by which packing makes the pruned weights smaller; the files are in the dtype ``stored``."""
    targets = skeleton.targets(config.prune.targets, config.prune.skip)
    patterns = planned_patterns(config.prune, targets, skeleton)
    dense, packed = footprint.packed_matrices(targets, patterns, d, machine.torch_dtype(stored).itemsize)
    return dense - packed


def _batch(train: TrainConfig, itemsize: int) -> Batch:
    """The rows on a device, as long as ``train.data.seq_len``; batches of shorter examples need less. Packed: one."""
    batch = Batch(train.micro_batch_size, train.data.seq_len, itemsize)
    return Batch(1, batch.tokens, itemsize) if train.data.packing else batch


def _steps(config: Config, processes: int) -> Steps:
    train = config.train
    accumulation = launch.accumulation(train, processes)
    by_gpus: dict[int, int | None] = dict.fromkeys(sorted({*GPUS, processes}))
    for gpus in by_gpus:
        with contextlib.suppress(UserError):  # the batch cannot be split over so many
            by_gpus[gpus] = launch.accumulation(train, gpus)
    examples = num_examples(config)
    steps = train.max_steps if examples is None else scope.num_steps(train, examples)
    return Steps(
        processes=processes,
        batch_size=train.batch_size,
        micro_batch_size=train.micro_batch_size,
        accumulation=accumulation,
        accumulation_by_gpus=by_gpus,
        examples=examples,
        epochs=train.epochs,
        steps=steps,
        tokens_at_most=None if steps is None else steps * train.batch_size * train.data.seq_len,
    )


def num_examples(config: Config) -> int | None:
    """Training rows, if known without the network: of Alpaca, the built-in instructions, or a local file."""
    section = config.train.data
    files = instructions.find(names_of(section.dataset), section.split)
    if not isinstance(section.dataset, str):
        return None  # of a mixture, this depends on the weights
    if section.dataset == "instructions":
        rows: int | None = len(texts.built_in_rows("train"))
    elif (path := files[section.dataset]) is not None:
        rows = _rows_of_file(path, config)
    else:
        rows = _rows_of_split(KNOWN_ROWS.get(section.dataset), section.split)
    if rows is None:
        return None
    if section.dataset != "instructions":  # whose held-out rows are separate
        rows -= section.val_size
    if rows < 1:
        raise UserError("train.data.val_size", f"{section.val_size} leaves no row of {section.dataset} to train on")
    return rows if section.max_rows is None else min(rows, section.max_rows)


def _rows_of_file(path: Path, config: Config) -> int | None:
    """The rows of a file or folder; None for plain text, whose windows are counted in tokens."""
    data, key = config.train.data, "train.data.dataset"
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            count, columns = pyarrow.parquet.read_metadata(path).num_rows, pyarrow.parquet.read_schema(path).names
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(key, f"{path} cannot be read as parquet: {error}") from error
    else:
        rows, columns = texts.load_rows(str(path), path, data.split, key, columns=formats.READ, short_names=())
        count = len(rows)
    return None if count and formats.is_text(columns, data.columns, str(path)) else int(count)


def _rows_of_split(rows: int | None, split: str) -> int | None:
    """The rows of ``train``, ``train[10:20]`` or ``train[:10%]``; None for other expressions."""
    match = re.fullmatch(r"train(?:\[(\d*)(%?):(\d*)(%?)\])?", split)
    if rows is None or match is None:
        return None
    start, stop = (
        default if not number else round(rows * int(number) / 100) if percent else min(rows, int(number))
        for number, percent, default in ((match[1], match[2], 0), (match[3], match[4], rows))
    )
    return max(0, stop - start)
