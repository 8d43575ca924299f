"""A model in several processes: weights in memory once (DDP) or sharded (FSDP2), trained parameters gathered."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from sppctl import distributed, launch
from sppctl.config.settings import Config
from sppctl.model.blocks import Skeleton

DEEPSPEED = Path(__file__).parents[1] / "assets" / "deepspeed-zero3.json"


def make_accelerator(config: Config, device: torch.device, model: Any) -> Accelerator:
    """The accelerator of the configured strategy, which shards a model by its decoder blocks.

    Only the kind of ``device`` matters; with several GPUs, each process uses its own.
    """
    forget_accelerator()  # a caller of the library may have had one
    state = PartialState(cpu=device.type == "cpu")  # not left to Accelerator: with cpu=True it does not shard
    strategy = config.launch.strategy if distributed.world_size() > 1 else None
    plugins: dict[str, Any] = {}
    if strategy == "fsdp":
        if state.distributed_type == DistributedType.MULTI_CPU:
            # AcceleratorState enables FSDP for a list of distributed types without CPUs, and replaces the type by FSDP
            # at once, so that nothing else sees the one set here. The device stays the CPU
            state.distributed_type = DistributedType.MULTI_GPU
        plugins["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            reshard_after_forward=True,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=sorted({type(block).__name__ for block in Skeleton(model.config).blocks}),
            state_dict_type="FULL_STATE_DICT",
            cpu_ram_efficient_loading=True,
        )
    if strategy == "zero3":
        plugins["deepspeed_plugin"] = _deepspeed(config, model.dtype)
    # no autocast, whatever `accelerate launch` sets; DeepSpeed has a dtype setting of its own
    accelerator = Accelerator(mixed_precision="no", **plugins)
    sharding = {DistributedType.FSDP: "fsdp", DistributedType.DEEPSPEED: "zero3"}.get(accelerator.distributed_type)
    assert sharding == (None if strategy == "ddp" else strategy), f"sharded by {sharding}, not by {strategy}"
    return accelerator


def forget_accelerator() -> None:
    """Makes this process what it was before :func:`make_accelerator`.

    Otherwise transformers would shard every model that is made after a training with ZeRO-3.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    unset_hf_deepspeed_config()
    launch.drop_sharding()


@contextmanager
def forgetting_accelerator() -> Iterator[None]:
    """Calls :func:`forget_accelerator` at the end of the body, also after an error."""
    try:
        yield
    finally:
        forget_accelerator()


def _deepspeed(config: Config, dtype: torch.dtype) -> DeepSpeedPlugin:
    from deepspeed import ops

    # DeepSpeed would compile its own collectives for CPUs, which takes minutes on a few cores. A process killed in the
    # meantime leaves a lock that blocks all later ones, and the compiled collectives wait forever for a process that
    # is gone. gloo's are good enough
    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    train = config.train
    settings = json.loads(DEEPSPEED.read_text()) | {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": launch.accumulation(train, distributed.world_size()),
        "train_batch_size": train.batch_size,
        "gradient_clipping": train.max_grad_norm,
        # it converts the whole model: to float32 unless bfloat16 is enabled
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
    return DeepSpeedPlugin(hf_ds_config=settings)


def keep_frozen_weights(model: nn.Module) -> None:
    """Keeps DDP from broadcasting frozen weights and, before each forward pass, buffers: packed weights, masks of STE.

    All are the same in all processes. Writing to a memory-mapped weight would give each process a copy of its own.
    """
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    frozen += [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)


@contextmanager
def own_buffers(model: nn.Module) -> Iterator[None]:
    """Keeps accelerate from sharding and sending the model's buffers under FSDP: each process keeps its own values.

    It expects every tensor of the state_dict to be a sharded parameter, which persistent buffers are not (corrections
    of routers, scalars of layers). So in the body no buffer is in the state_dict.
    """
    before = [(module, module._non_persistent_buffers_set) for module in model.modules()]
    for module, names in before:
        module._non_persistent_buffers_set = names | set(module._buffers)
    try:
        yield
    finally:
        for module, names in before:
            module._non_persistent_buffers_set = names


def gathered(parameters: dict[str, Tensor], gather: Callable[[Tensor], Tensor] | None = None) -> dict[str, Any] | None:
    """Full parameters on the CPU of the first process; None in the others. All processes must call it.

    ``gather`` returns one of them in full; None: they are whole, or sharded as DTensors.
    """
    full = {name: _full(gather(p) if gather else p.detach()) for name, p in parameters.items()}
    return full if distributed.is_main() else None


def gathered_state(optimizer: Optimizer) -> dict[str, Any]:
    """The optimizer's state as one process would store it, in the first process. All processes must call it."""
    state: dict[str, Any] = tree_map_only(DTensor, _full, optimizer.state_dict())
    return state


def scatter_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Loads a state of :func:`gathered_state`, given in all processes, into an optimizer, sharded or not."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def shard(value: Any, parameter: Any) -> Any:
        if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
            return value
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)

    states = {
        index: {key: shard(value, parameters[index]) for key, value in entry.items()}
        for index, entry in state["state"].items()
    }
    optimizer.load_state_dict({"state": states, "param_groups": state["param_groups"]})


def _full(tensor: Tensor) -> Tensor | None:
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.cpu() if distributed.is_main() else None
