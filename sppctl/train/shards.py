"""A model in several processes: its weights in memory once (DDP) or sharded (FSDP2), what was trained gathered."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
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

from sppctl import distributed, launch
from sppctl.config.settings import Config
from sppctl.model.blocks import Skeleton

LOAD_ONCE = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")  # where transformers looks
DEEPSPEED = Path(__file__).parents[1] / "assets" / "deepspeed-zero3.json"


def make_accelerator(config: Config, device: torch.device, model: Any) -> Accelerator:
    """accelerate's handle of the processes and of the way in which they share a model, by its decoder blocks.

    Of the device its kind counts; of several GPUs each process takes its own.
    """
    AcceleratorState._reset_state(reset_partial_state=True)  # of a training before this one (a sweep, the tests)
    state = PartialState(cpu=device.type == "cpu")  # not by Accelerator, which shards on no CPU that it is told of
    strategy = config.launch.strategy if distributed.world_size() > 1 else None
    plugins: dict[str, Any] = {}
    if strategy == "fsdp":
        if state.distributed_type == DistributedType.MULTI_CPU:
            # accelerate takes the wish for FSDP from kinds of processes in a list without CPUs (AcceleratorState), and
            # turns the kind into FSDP at once: nothing afterwards sees the one named here. The device stays the CPU
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
    # no autocast, whatever `accelerate launch` says, but DeepSpeed's own dtype
    accelerator = Accelerator(mixed_precision="no", **plugins)
    sharded = {"fsdp": DistributedType.FSDP, "zero3": DistributedType.DEEPSPEED}
    assert sharded.get(strategy or "") in (None, accelerator.distributed_type), "not sharded"
    return accelerator


def _deepspeed(config: Config, dtype: torch.dtype) -> DeepSpeedPlugin:
    from deepspeed import ops

    # DeepSpeed would compile collectives of its own for CPUs, which takes minutes where there are few cores. A process
    # that is killed in the meantime leaves a lock behind for which all later ones wait for ever, and in the compiled
    # ones processes wait for ever for one that is gone; gloo's serve
    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    train = config.train
    settings = json.loads(DEEPSPEED.read_text()) | {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": launch.accumulation(train, distributed.world_size()),
        "train_batch_size": train.batch_size,
        "gradient_clipping": train.max_grad_norm,
        # it converts the whole model: to float32 unless told that it is bfloat16
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
    return DeepSpeedPlugin(hf_ds_config=settings)


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


def keep_frozen_weights(model: nn.Module) -> None:
    """Keeps DDP from broadcasting what all processes have read from the same files.

    Writing a weight that is mapped from a file would give each process a copy of its own.
    """
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)


def gathered(parameters: dict[str, Tensor]) -> dict[str, Any] | None:
    """Parameters, whole, on the CPU of the first process; None in the others. All must call it."""
    whole = {name: _whole(parameter.detach()) for name, parameter in parameters.items()}
    return whole if distributed.is_main() else None


def gathered_state(optimizer: Optimizer) -> dict[str, Any]:
    """The optimizer's state as one process would store it, in the first process. All must call it."""
    state: dict[str, Any] = tree_map_only(DTensor, _whole, optimizer.state_dict())
    return state


def scatter_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Puts what :func:`gathered_state` gave, known to all processes, into an optimizer, sharded or not."""
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


def _whole(tensor: Tensor) -> Tensor | None:
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.cpu() if distributed.is_main() else None
