"""Walking a decoder block by block, with only one block's weights in memory.

The model is built on the meta device; embeddings are loaded once, a block's weights only while the block is processed.
Nothing here depends on the model family: the arguments of each block are recorded from the model's own forward, so
whatever an architecture passes (rotary embeddings, sliding-window masks, a different mask per block) is replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sppctl.errors import StageError, UserError
from sppctl.files.safe_files import OwnFiles, TensorFiles
from sppctl.machine import dtype_name, torch_dtype
from sppctl.model.block_call import BlockCall, hidden_of
from sppctl.model.checkpoint import load_config
from sppctl.model.heap import Heap
from sppctl.model.sublayers import Border, finding_borders
from sppctl.model.targets import Part, Target, find_targets, select, stored_parts, unsupported_experts
from sppctl.model.weights import check_weights, empty_model, is_old_mask

Orders = dict[str, dict[int, Tensor]]  # of the rows (0) and columns (1) of parameters, by their full names


def reordered(tensor: Tensor, orders: dict[int, Tensor]) -> Tensor:
    """A tensor with some of its dimensions in other orders."""
    for dim, order in orders.items():
        tensor = tensor.index_select(dim, order.to(tensor.device))
    return tensor


class Skeleton:
    """A causal language model without weights: its decoder blocks and their linear layers."""

    def __init__(self, config: Any, dtype: torch.dtype | None = None, trust_remote_code: bool = False) -> None:
        """Builds the model of a transformers configuration on the meta device.

        Raises:
            UserError: the model is not a causal language model, or has no list of decoder blocks.
        """
        self._find_blocks(empty_model(config, dtype, trust_remote_code))

    def _find_blocks(self, model: Any) -> None:
        self.model, self.config = model, model.config
        self.base_prefix: str = self.model.base_model_prefix
        depth = getattr(self.config.get_text_config(), "num_hidden_layers", None)
        lists = {n: m for n, m in _lists_of_decoder(model) if len(m) == depth and n.startswith(self.base_prefix)}
        if not lists:
            problem = f"{type(model).__name__} has no list of {depth or 'its'} decoder blocks"
            raise UserError("model.path", problem, "sppctl prunes decoders")
        # norms or projections of the blocks may be in a list beside them
        self.blocks_name: str = max(lists, key=lambda name: sum(weight.numel() for weight in lists[name].parameters()))
        self.blocks: nn.ModuleList = lists[self.blocks_name]

    def targets(
        self, names: list[str] | str, skip: list[str] | None = None, key: str = "prune.targets"
    ) -> dict[str, Target]:
        """The matrices of the blocks, by full name, in the model's order; see :func:`sppctl.model.targets.select`."""
        return select(find_targets(self.blocks, self.blocks_name), names, skip or [], key)

    def unsupported_experts(self) -> str | None:
        """A message about expert matrices in an unsupported form, which stay dense; None if there are none."""
        names, share = unsupported_experts(self.blocks, self.blocks_name)
        more = ", ..." if len(names) > 1 else ""
        return f"{names[0]}{more} ({share:.0%} of the blocks' matrices)" if names else None

    def matrix(self, target: Target, files: TensorFiles) -> Tensor:
        """A target's matrix (out_features, in_features), read from ``files``, a checkpoint of the model."""
        parts = {(part.expert, part.first_row): part.name for part in self._parts_of(target, files)}
        if (target.expert, target.first_row) in parts and not target.transposed:
            return files.read(parts[target.expert, target.first_row])
        tensor = files.read(parts[None, 0], target.expert)
        if target.expert is not None:
            return tensor[target.first_row : target.first_row + target.out_features]
        return tensor.t()

    def _parts_of(self, target: Target, files: TensorFiles) -> list[Part]:
        """The tensors that make up a target's parameter in a checkpoint of the model."""
        return stored_parts(files, self.model, f"{target.owner}.{target.parameter}")


class Decoder(Skeleton):
    """The decoder of a model whose weights are in memory, to be run block by block; it shares the model's weights."""

    def __init__(self, model: Any) -> None:
        """Takes a causal language model of transformers, in evaluation mode.

        Raises:
            UserError: it has no list of decoder blocks, or its weights are quantised, missing, or on several devices.
        """
        weights = list(model.parameters())
        devices = {weight.device for weight in weights}
        if len(devices) > 1 or "meta" in {device.type for device in devices}:
            places = ", ".join(sorted(map(str, devices)))
            raise UserError("model", f"its weights are on {places}", "load it on one device, without a device_map")
        if getattr(model, "is_quantized", False):
            raise UserError("model", "quantised weights cannot be pruned", "load the unquantised model")
        self._find_blocks(model)
        self.device = weights[0].device
        self.dtype: torch.dtype = next(self.blocks.parameters()).dtype
        self._prepare_to_run()

    def _prepare_to_run(self) -> None:
        self.width: int = self.config.get_text_config().hidden_size
        self._returned_beside: tuple[None, ...] | None = None  # in a tuple with the hidden states; None: no tuple
        self.borders: dict[int, Border] = {}  # of the blocks that have one, once :meth:`check_replay` has run them
        self.base = getattr(self.model, self.base_prefix)

    def __len__(self) -> int:
        return len(self.blocks)

    def load_embeddings(self) -> None:
        """Loads what is outside the blocks; here everything is loaded."""

    def load_block(self, index: int) -> nn.Module:
        """One block with its weights; release it afterwards."""
        return self.blocks[index]

    def release_block(self, index: int) -> None:
        """Frees the weights of one block; here they stay."""

    def reorder(self, orders: Orders) -> None:
        """Brings channels into other orders, in which the model computes the same; no block may be loaded."""
        done: set[int] = set()  # a parameter with two names is reordered once
        for name, of_parameter in orders.items():
            parameter = self.model.get_parameter(name)
            if id(parameter) not in done:
                parameter.data.copy_(reordered(parameter.data, of_parameter))
                done.add(id(parameter))

    @torch.no_grad()
    def record(self, input_ids: Tensor) -> tuple[Tensor, list[BlockCall]]:
        """The first block's hidden states for a batch (batch, tokens), and how every block is called for its shape.

        No block is run: each hands its input on, in the form in which this family's blocks return it.
        """
        calls: list[BlockCall] = []
        inputs: list[Tensor] = []

        def hand_on(*args: Any, **kwargs: Any) -> Any:
            call, hidden = BlockCall.of(args, kwargs)
            calls.append(call)
            inputs.append(hidden)
            return hidden if self._returned_beside is None else (hidden, *self._returned_beside)

        for block in self.blocks:
            block.forward = hand_on
        try:
            self._forward(input_ids)
        finally:
            for block in self.blocks:
                del block.forward
        return inputs[0], calls

    @torch.no_grad()
    def check_replay(self, input_ids: Tensor, on_block: Callable[[int], None]) -> None:
        """Runs the real model on one batch, with one block loaded at a time, and replays every block for comparison.

        Args:
            input_ids: (batch, tokens).
            on_block: called with the index of each block that passed.

        Raises:
            StageError: a replayed block differs from the model's own in any bit, a block is not given what the one
                before it returned, another argument than the hidden states depends on the tokens, or a weight or a
                hidden state is not finite.
        """
        self._learn_return_type(input_ids[:, :1])
        _, calls = self.record(input_ids)
        self._check_calls(calls, self.record(input_ids.roll(1, dims=1))[1])
        kind = type(self.model).__name__
        returned: list[Tensor] = []  # by the block before

        def compare(index: int, block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            _, hidden = BlockCall.of(args, kwargs)
            if returned and not torch.equal(returned.pop(), hidden):
                raise StageError(
                    f"block {index} of {kind} is not given the hidden states that block {index - 1} returns, "
                    "so it would be pruned on wrong inputs; please report this architecture"
                )
            if not torch.isfinite(hidden_of(output)).all():
                raise StageError(
                    f"block {index} of {kind} gives hidden states that are not finite: {overflow_advice(self.dtype)}"
                )
            # .forward, not the module itself: a call would run these hooks again
            if not torch.equal(calls[index](block.forward, hidden), hidden_of(output)):
                raise StageError(
                    f"replaying block {index} of {kind} does not give the model's own hidden "
                    "states, so it would be pruned on wrong inputs; please report this architecture"
                )
            returned.append(hidden_of(output).clone())  # the model might change them in place
            self.release_block(index)
            on_block(index)

        handles = []
        for index, block in enumerate(self.blocks):
            load = partial(self._load_before, index)
            handles.append(block.register_forward_pre_hook(load))
            handles.append(block.register_forward_hook(partial(compare, index), with_kwargs=True))
        try:
            with finding_borders(self.blocks) as self.borders:
                self._forward(input_ids)
        finally:
            for handle in handles:
                handle.remove()
        # a block may have put something into its arguments for later blocks, which then is this window's for all
        self._check_calls(calls, self.record(input_ids)[1])

    def _check_calls(self, calls: list[BlockCall], others: list[BlockCall]) -> None:
        """Raises StageError if a call depends on the tokens: one window's calls are replayed for all windows."""
        for index, (call, other) in enumerate(zip(calls, others, strict=True)):
            argument = call.differing_argument(other, self.blocks[index])
            if argument is not None:
                raise StageError(
                    f"block {index} of {type(self.model).__name__} is given {argument}, which depends on the tokens, "
                    "not on the hidden states alone; this architecture can only be pruned by prune.method=magnitude"
                )

    def _load_before(self, index: int, *_: Any) -> None:
        self.load_block(index)

    def _learn_return_type(self, input_ids: Tensor) -> None:
        """Runs the first block alone: some families return a tensor, some a tuple, which the model may unpack."""

        def stop(_: nn.Module, __: Any, output: Any) -> None:
            self._returned_beside = None if isinstance(output, Tensor) else (None,) * (len(output) - 1)
            raise _FirstBlockDoneError

        self.load_block(0)
        handle = self.blocks[0].register_forward_hook(stop)
        try:
            self._forward(input_ids)
        except _FirstBlockDoneError:
            pass
        finally:
            handle.remove()
            self.release_block(0)

    def _forward(self, input_ids: Tensor) -> None:
        self.base(input_ids=input_ids, use_cache=False)


class BlockStack(Decoder):
    """The decoder of a checkpoint whose blocks are loaded one at a time."""

    def __init__(self, directory: Path, device: torch.device, dtype: str, trust_remote_code: bool = False) -> None:
        """Builds the model without weights, to compute in ``dtype`` on ``device``, and opens the files that hold them.

        Raises:
            UserError: the files are damaged or do not belong to the model, or it is not a causal language model with
                decoder blocks.
        """
        self.files, self.device, self.dtype = TensorFiles(directory), device, torch_dtype(dtype)
        refuse_quantised(self.files)
        Skeleton.__init__(self, load_config(directory, trust_remote_code), self.dtype, trust_remote_code)
        check_weights(self.files, self.model)
        self._orders: Orders = {}
        self._heap = Heap()
        self._prepare_to_run()
        for name in _stored_tensors(self.base):  # fails early if a tensor is missing
            stored_parts(self.files, self.model, f"{self.base_prefix}.{name}")

    def load_embeddings(self) -> None:
        """Loads everything outside the blocks but the output head: embeddings, norms, position tables."""
        for name, buffer in self.base.named_buffers():
            owner, _, leaf = name.rpartition(".")
            self.base.get_submodule(owner)._buffers[leaf] = buffer.to(self.device)
        for name in (f"{self.base_prefix}.{name}" for name in _stored_tensors(self.base)):
            if not name.startswith(f"{self.blocks_name}."):
                self._load(name)

    def load_block(self, index: int, files: TensorFiles | None = None) -> nn.Module:
        """Loads the weights of one block, from the checkpoint or other ``files`` like it; release it afterwards."""
        block = self.blocks[index]
        for name in _stored_tensors(block):
            self._load(f"{self.blocks_name}.{index}.{name}", files)
        return block

    def reorder(self, orders: Orders) -> None:
        """As above: from now on, parameters are loaded in these orders."""
        self._orders = orders
        self.load_embeddings()

    def write_reordered(self, files: OwnFiles, without: set[str]) -> None:
        """Writes the reordered parameters, but some, to ``files``, a copy of the checkpoint."""
        for name in self._orders.keys() - without:
            if name not in self.files and self._is_tied(name):
                continue
            for part in stored_parts(self.files, self.model, name):
                files.write(part.name, reordered(self.files.read(part.name), self._orders[name]))

    def _is_tied(self, name: str) -> bool:
        head = self.model.get_output_embeddings()
        return head is self.model.get_submodule(name.rpartition(".")[0]) and self.config.tie_word_embeddings

    def write(self, target: Target, files: OwnFiles) -> None:
        """Writes the parameter that holds a target to ``files``, a copy of the checkpoint.

        Weights that differ from the stored ones only by rounding to the compute dtype keep their stored value.
        """
        for part in self._parts_of(target, self.files):
            values, stored = part.of(target.stored_parameter(self.model)), self.files.spec(part.name).dtype
            if torch.promote_types(values.dtype, stored) != values.dtype:
                orders = self._orders.get(f"{target.owner}.{target.parameter}", {})
                original = reordered(self.files.read(part.name).to(values.device), orders)
                values = torch.where((values != 0) & (values == original.to(values.dtype)), original, values)
            files.write(part.name, values)

    def stored_dtype(self, target: Target, files: TensorFiles) -> torch.dtype:
        """The dtype in which ``files``, a copy of the checkpoint, hold a target."""
        return files.spec(self._parts_of(target, self.files)[0].name).dtype

    def homes(self, target: Target) -> set[str]:
        """The files that hold a target's parameter."""
        return {self.files.home[part.name] for part in self._parts_of(target, self.files)}

    def release_block(self, index: int) -> None:
        """Frees the weights of one block; its buffers, which are small, stay loaded."""
        for module in self.blocks[index].modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
        self._heap.give_back()

    def _load(self, name: str, files: TensorFiles | None = None) -> None:
        owner, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(owner)
        expected = getattr(module, leaf)
        # the dtype that transformers would load it in: some models keep single modules in float32
        in_float32 = any(part in name for part in self._float32_parts())
        dtype = torch.float32 if in_float32 and expected.dtype.is_floating_point else expected.dtype
        loaded = torch.empty(expected.shape, dtype=dtype, device=self.device)
        for part in stored_parts(self.files, self.model, name):
            tensor, view = (files or self.files).read(part.name), part.of(loaded)
            if tensor.shape != view.shape:
                raise UserError(
                    str(self.files.directory),
                    f"{part.name} has shape {tuple(tensor.shape)}, the model's is {tuple(view.shape)}",
                    "the files do not belong together",
                )
            self._check_finite(part.name, tensor)
            view.copy_(tensor)
        loaded = reordered(loaded, self._orders.get(name, {}))
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(loaded, requires_grad=False)
        else:
            module._buffers[leaf] = loaded

    def _float32_parts(self) -> set[str]:
        """Parts of the names of parameters that transformers keeps in float32, whatever the model computes in."""
        attributes = ["_keep_in_fp32_modules_strict"]
        if self.dtype == torch.float16:
            attributes.append("_keep_in_fp32_modules")
        return {part for attribute in attributes for part in getattr(self.model, attribute, None) or ()}

    def check_rest(self, targets: Iterable[Target]) -> None:
        """Raises StageError if a tensor outside the targets, which pruning may never load, is not finite."""
        loaded = {part.name for target in targets for part in self._parts_of(target, self.files)}
        for name in sorted(set(self.files) - loaded):
            if not is_old_mask(name, self.files.spec(name)):
                self._check_finite(name, self.files.read(name))

    def _check_finite(self, name: str, tensor: Tensor) -> None:
        if not torch.isfinite(tensor).all():
            raise StageError(f"{self.files.directory}: {name} holds NaN or infinite values; the checkpoint is broken")


def _lists_of_decoder(model: Any) -> Iterator[tuple[str, nn.ModuleList]]:
    """The lists of modules in a model's text decoder, by full name, but those inside of another list."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    inside = {id(module) for module in model.get_decoder().modules()}  # not in the towers of a multimodal model
    # without a list in it, what transformers takes for the decoder is another module of that name, as in ModernBERT
    of_decoder = {name: module for name, module in lists.items() if id(module) in inside} or lists
    for name, module in of_decoder.items():
        if not any(name.startswith(f"{outer}.") for outer in lists):
            yield name, module


def _stored_tensors(module: nn.Module) -> list[str]:
    """Names of a module's tensors that a checkpoint stores: parameters, and buffers such as a router's biases."""
    buffers = [
        f"{path}.{leaf}" if path else leaf
        for path, inner in module.named_modules()
        for leaf, buffer in inner._buffers.items()
        if buffer is not None and leaf not in inner._non_persistent_buffers_set
    ]
    return [name for name, _ in module.named_parameters()] + buffers


def refuse_quantised(files: TensorFiles) -> None:
    """Raises UserError if the weights are quantised."""
    floating = {name: files.spec(name).dtype for name in files if files.spec(name).dtype.is_floating_point}
    if not floating:
        raise UserError(f"{files.directory} holds no floating-point weights; quantised checkpoints cannot be pruned")
    for name, dtype in floating.items():
        if dtype.itemsize == 1:
            short = dtype_name(dtype)
            raise UserError(
                str(files.directory),
                f"{name} is stored as {short}",
                "quantised checkpoints cannot be pruned, use one in bfloat16, float16 or float32",
            )


def overflow_advice(dtype: torch.dtype) -> str:
    """The fix, for an error, where finite weights give values that are not finite."""
    short = dtype_name(dtype)
    wider = "float32" if dtype == torch.bfloat16 else "bfloat16 or float32"
    if dtype == torch.float32:
        return "they overflow float32, so the checkpoint is broken"
    return f"most likely they overflow {short}; set model.compute_dtype={wider}"


class _FirstBlockDoneError(Exception):
    """Leaves the model's forward after the first block."""
