"""A model in several processes: its weights in memory once (DDP) or shared out (FSDP2), what was trained gathered."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from sppctl import distributed
from sppctl.model.blocks import Skeleton

LOAD_ONCE = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")  # where transformers looks
DEEPSPEED = Path(__file__).parents[1] / "assets" / "deepspeed-zero3.json"


def arguments(model: Any) -> dict[str, Any]:
    """What transformers' TrainingArguments must say to shard a model by its decoder blocks."""
    classes = sorted({type(block).__name__ for block in Skeleton(model.config).blocks})
    config = {
        "version": 2,
        "reshard_after_forward": True,
        "transformer_layer_cls_to_wrap": classes,
        "cpu_ram_efficient_loading": True,
    }
    return {"fsdp": True, "fsdp_config": config}


def spare_compiling() -> None:
    """Keeps DeepSpeed from compiling collectives of its own for CPUs; those of gloo do.

    The compiler takes minutes where there are few cores. A process that is killed in the meantime leaves a lock behind
    for which all later ones wait for ever, and in the compiled ones processes wait for ever for one that is gone.
    """
    from deepspeed import ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False


@contextmanager
def load_in_one_process() -> Iterator[None]:
    """``from_pretrained`` reads weights in the first process of a machine only.

    The others get tensors of the right shapes whose memory is never touched; accelerate sends them their shards.
    """
    os.environ |= dict.fromkeys(LOAD_ONCE, "true")
    try:
        yield
    finally:
        for name in LOAD_ONCE:
            del os.environ[name]


def allow_on_cpu() -> None:
    """Lets accelerate shard among CPU processes, by the same code as among GPUs; called before it makes its state.

    It takes the wish for FSDP from kinds of processes in a list that has no CPUs in it (AcceleratorState), and turns
    the kind into FSDP at once: nothing afterwards sees the one that is named here. The device stays the CPU.
    """
    state = PartialState()
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU


def keep_frozen_weights(model: nn.Module) -> None:
    """Keeps DDP from broadcasting what all processes have read from the same files.

    Writing a weight that is mapped from a file would give each process a copy of its own.
    """
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)


def gathered(model: nn.Module) -> dict[str, Tensor] | None:
    """The trained parameters, whole, on the CPU of the first process; None in the others. All must call it."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    whole = {name: _whole(parameter.detach()) for name, parameter in trained.items()}
    return {name: tensor for name, tensor in whole.items() if tensor is not None} if distributed.is_main() else None


def gathered_state(optimizer: Optimizer) -> dict[str, Any]:
    """The optimizer's state as one process would store it, in the first process. All must call it."""
    state: dict[str, Any] = tree_map_only(DTensor, _whole, optimizer.state_dict())
    return state


def scatter_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Puts what :func:`gathered_state` gave, known to all processes, into an optimizer of sharded parameters."""
    shards = {}
    for index, parameter in enumerate(_parameters(optimizer)):
        shards[index] = {
            key: distribute_tensor(value, parameter.device_mesh, parameter.placements)
            if isinstance(value, Tensor) and value.shape == parameter.shape
            else value
            for key, value in state["state"].get(index, {}).items()
        }
    optimizer.load_state_dict({"state": shards, "param_groups": state["param_groups"]})


def _parameters(optimizer: Optimizer) -> Iterator[Any]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _whole(tensor: Tensor) -> Tensor | None:
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.cpu() if distributed.is_main() else None
