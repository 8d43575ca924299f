"""One loaded block: collects the inputs of its layers and prunes them in place, in block or module order."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from sppctl import distributed
from sppctl.errors import StageError
from sppctl.files.safe_files import TensorFiles
from sppctl.model.blocks import BlockStack, Decoder
from sppctl.model.targets import Target, gated
from sppctl.pattern import Pattern
from sppctl.prune.activations import Activations
from sppctl.prune.in_step import in_step, wait_at
from sppctl.prune.layers import LayerInputs, PrunePlan, measure, measure_again, no_inputs
from sppctl.prune.reconstruct import Unit, reconstruct
from sppctl.pruners import PRUNERS, InputNorms, Pruner, check_weight
from sppctl.pruners.masks import shortfall
from sppctl.pruners.registry import find_pruner
from sppctl.records import BlockErrors, LayerRecord

Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]  # a module, its arguments and its named arguments
# layers that share one input tensor, the first to run in front; by the names of all layers of a kind of block
Groups = dict[frozenset[str], list[list[str]]]

MIN_EXPERT_TOKENS = 32  # an expert that saw fewer is pruned by a fallback


class BlockWork:
    """One loaded block: gathering inputs, pruning, tuning."""

    def __init__(
        self,
        stack: Decoder,
        index: int,
        targets: dict[str, Target],
        plan: PrunePlan,
        activations: Activations | None,
        groups: Groups,
        out: TensorFiles | None = None,
    ) -> None:
        self.stack, self.index, self.targets, self.plan = stack, index, targets, plan
        self.activations, self.groups, self.out = activations, groups, out
        prefix = f"{stack.blocks_name}.{index}."
        # by the name within the block, which is the same in all blocks of its kind
        self.plain = {name.removeprefix(prefix): target for name, target in targets.items() if target.expert is None}
        self.kind = frozenset(self.plain)
        self.experts: dict[str, list[Target]] = {}  # by the module that holds them
        for target in targets.values():
            if target.expert is not None:
                self.experts.setdefault(target.owner, []).append(target)
        self.inputs: dict[str, LayerInputs] = {}  # by the target's name
        self.all_tokens: dict[str, LayerInputs] = {}  # of all experts of a mixture together
        self.reconstruction: BlockErrors | None = None
        self.dense: dict[str, tuple[Tensor, Tensor | None]] = {}  # weights to be tuned, and some of their inputs
        self._leaders: dict[str, str] = {}  # the first layer with the same input tensor
        self._seen: dict[int, tuple[Tensor, str]] = {}
        self._num_groups = 0  # pruned so far, by the processes in turn

    # --- orders -------------------------------------------------------------------------------------------------------

    def prune(self) -> list[LayerRecord]:
        """Prunes all targets of the block in place."""
        settings, activations = self.plan.settings, self.activations
        if activations is None:
            return self._prune_all()
        if settings.order == "module":
            return self._prune_in_module_order(activations)
        units = self._units(activations) if settings.reconstruct_epochs else []
        self.gather(dense=units[-1].dense if units and activations.dense is None else None)
        activations.run_dense(self.index)
        records = self._prune_all()
        self.inputs.clear()
        if units:
            self.reconstruction = reconstruct(self.stack, self.index, units, activations, settings, self._as_stored)
            records = [self._measure_tuned(record) for record in records]
        return records

    def _measure_tuned(self, record: LayerRecord) -> LayerRecord:
        before, sample = self.dense[record.name]
        return measure_again(record, before, self.targets[record.name].view(self.stack.model), sample)

    def _units(self, activations: Activations) -> list[Unit]:
        """What is tuned together, in order; of the last unit, the dense outputs are yet to be computed."""
        outputs = activations.buffer("outputs") if activations.dense is None else activations.dense
        if self.plan.settings.reconstruct_unit == "block":
            return [Unit(self.targets, outputs)]
        border, prefix = self.stack.borders[self.index], f"{self.stack.blocks_name}.{self.index}."
        parts: dict[bool, dict[str, Target]] = {True: {}, False: {}}
        for name, target in self.targets.items():
            parts[border.is_attention(name.removeprefix(prefix))][name] = target
        attention = Unit(parts[True], activations.buffer("border"), border)
        for rows in activations.batches:
            output = attention.output(self.stack, self.index, activations, rows, hidden=activations.dense)
            attention.dense[rows] = output.to(attention.dense.device)
        return [attention, Unit(parts[False], outputs)]

    def gather(self, keep: bool = False, dense: Tensor | None = None) -> None:
        """Runs the dense block on all windows and collects the inputs of each target.

        Its outputs (windows, tokens, width) go into ``dense``, and with ``keep`` become the next block's inputs.
        """
        assert self.activations is not None
        for owner, targets in self.experts.items():
            self._prepare_experts(owner, targets)
        with contextlib.ExitStack() as hooks:
            self._observe(hooks, self._collect)
            for owner in self.experts:
                self._hook(hooks, owner, partial(self._collect_experts, owner))
            for rows in self.activations.batches:
                output = self._run(self.activations, rows)
                if keep:
                    self.activations.store(rows, output)
                if dense is not None:
                    dense[rows] = output.to(dense.device)
        self._set_groups()
        for name, target in self.plain.items():
            leader = self.plain[self._leaders[name]]
            shared = self.inputs.pop(leader.name, None) or self._new_inputs(leader.in_features)
            self.inputs |= {leader.name: shared, target.name: shared}  # in this order in every process
        self._reduce()

    def _prune_in_module_order(self, activations: Activations) -> list[LayerRecord]:
        """One forward, all micro-batches in step: a group of layers is pruned when all of them have reached it."""
        if self.kind not in self.groups:
            self._find_groups(activations)
        places: dict[str, Callable[[list[Call]], list[LayerRecord]]] = {}  # by the module where they meet
        for group in self.groups[self.kind]:
            targets = [self.plain[name] for name in group]
            places[targets[0].owner] = partial(self._prune_arrived, targets)
        for owner in self.experts:
            places[owner] = partial(self._prune_arrived_experts, owner)
        records: list[LayerRecord] = []
        prune = list(places.values())
        with contextlib.ExitStack() as hooks:
            for place, owner in enumerate(places):
                self._hook(hooks, owner, partial(wait_at, place))
            in_step(
                [partial(activations.advance, self.index, rows) for rows in activations.batches],
                lambda place, calls: records.extend(prune[place](calls)),
            )
        # the groups may be those of an earlier block, whose layers were all reached
        pruned = {record.name for record in records}
        for name in self.targets:
            if name not in pruned:
                raise no_inputs(name)
        return records

    def _find_groups(self, activations: Activations) -> None:
        """Finds which layers share inputs by running the block on as few windows as needed; once per kind of block."""
        with contextlib.ExitStack() as hooks:
            self._observe(hooks, self._is_leader)
            for rows in activations.batches:
                if self.plain.keys() == self._leaders.keys():
                    break
                self._run(activations, rows)
        self._set_groups()

    def _prune_arrived(self, targets: list[Target], calls: list[Call]) -> list[LayerRecord]:
        inputs = self._new_inputs(targets[0].in_features)
        for _, args, _ in calls:
            inputs.update(args[0])
        inputs.reduce(targets[0].name, self.stack.dtype)
        return self._prune_group(targets, inputs)

    def _prune_arrived_experts(self, owner: str, calls: list[Call]) -> list[LayerRecord]:
        records = []
        # gate and up first: the inputs of down come from the pruned ones
        for parts in (("gate_proj", "up_proj"), ("down_proj",)):
            if targets := [target for target in self.experts[owner] if target.name.endswith(parts)]:
                self._prepare_experts(owner, targets)
                for call in calls:
                    self._collect_experts(owner, *call)
                self._reduce()
                records += self._prune_experts(targets)
                self.inputs.clear()
        return records

    # --- inputs -------------------------------------------------------------------------------------------------------

    def _hook(self, hooks: contextlib.ExitStack, owner: str, hook: Callable[..., None]) -> None:
        """Calls ``hook`` with module, arguments and named arguments before a module runs, until ``hooks`` is closed."""
        module = self.stack.model.get_submodule(owner)
        hooks.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _new_inputs(self, in_features: int) -> LayerInputs:
        make = find_pruner(self.plan.settings.method).statistics or InputNorms
        return LayerInputs(make, in_features, self.stack.device)

    def _run(self, activations: Activations, rows: slice) -> Tensor:
        output = activations.output(self.index, rows)
        self._seen.clear()
        return output

    def _observe(self, hooks: contextlib.ExitStack, callback: Callable[[str, Tensor], object]) -> None:
        """Calls ``callback`` with the name and the input of every layer outside experts that runs."""

        def hook(name: str, _: nn.Module, args: tuple[Tensor, ...], __: Any) -> None:
            callback(name, args[0])

        for name, target in self.plain.items():
            self._hook(hooks, target.owner, partial(hook, name))

    def _is_leader(self, name: str, inputs: Tensor) -> bool:
        """Whether a layer is the first of those with this very tensor as input."""
        if name not in self._leaders:
            # q, k and v receive the very same tensor; a reference to it keeps its id from being reused
            _, self._leaders[name] = self._seen.setdefault(id(inputs), (inputs, name))
        return self._leaders[name] == name

    def _set_groups(self) -> None:
        of_all = distributed.gather_objects(self._leaders)  # some layers may be reached in other processes only
        self._leaders = {name: leader for leaders in reversed(of_all) for name, leader in leaders.items()}
        for name, target in self.plain.items():
            if name not in self._leaders:
                raise no_inputs(target.name)
        groups: dict[str, list[str]] = {}
        for name in sorted(self.plain, key=lambda name: self._leaders[name] != name):
            groups.setdefault(self._leaders[name], []).append(name)
        self.groups[self.kind] = list(groups.values())

    def _reduce(self) -> None:
        """Sums the statistics over all processes, once for layers that share their inputs."""
        distinct: dict[int, tuple[str, LayerInputs]] = {}
        for name, inputs in [*self.inputs.items(), *self.all_tokens.items()]:
            distinct.setdefault(id(inputs), (name, inputs))
        for name, inputs in distinct.values():
            target = self.targets.get(name)  # None: all experts of a mixture, by which one without tokens is pruned
            inputs.reduce(name, self.stack.dtype, may_be_empty=target is not None and target.expert is not None)

    def _collect(self, name: str, inputs: Tensor) -> None:
        if self._is_leader(name, inputs):
            target = self.plain[name]
            if target.name not in self.inputs:
                self.inputs[target.name] = self._new_inputs(target.in_features)
            self.inputs[target.name].update(inputs)

    def _prepare_experts(self, owner: str, targets: list[Target]) -> None:
        self.all_tokens[owner] = self._new_inputs(self.stack.width)
        for target in targets:
            partner = target.name.replace(".up_proj", ".gate_proj")  # they share their input
            self.inputs[target.name] = self.inputs.get(partner) or self._new_inputs(target.in_features)

    def _collect_experts(self, owner: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = ("hidden_states", "top_k_index")
        hidden, experts = (args[i] if i < len(args) else kwargs[name] for i, name in enumerate(names))
        hidden = hidden.reshape(-1, hidden.shape[-1])
        self.all_tokens[owner].update(hidden)
        gate_up = module.get_parameter("gate_up_proj")
        for expert in range(len(gate_up)):
            tokens = hidden[(experts == expert).any(dim=-1)]
            gate, up, down = (
                self.inputs.get(f"{owner}.{expert}.{part}") for part in ("gate_proj", "up_proj", "down_proj")
            )
            if shared := gate or up:
                shared.update(tokens)
            if down is not None and len(tokens):
                down.update(gated(module, nn.functional.linear(tokens, gate_up[expert])))

    # --- pruning ------------------------------------------------------------------------------------------------------

    def _prune_all(self) -> list[LayerRecord]:
        groups = self.groups[self.kind] if self.inputs else [[name] for name in self.plain]
        records = []
        for group in groups:
            targets = [self.plain[name] for name in group]
            records += self._prune_group(targets, self.inputs.get(targets[0].name))
        for targets in self.experts.values():
            records += self._prune_experts(targets)
        order = list(self.targets)
        return sorted(records, key=lambda record: order.index(record.name))

    def _prune_experts(self, targets: list[Target]) -> list[LayerRecord]:
        needs_inputs = find_pruner(self.plan.settings.method).statistics is not None
        pending: dict[int, list[Target]] = {}  # layers that share their inputs
        records = []
        for target in targets:
            inputs = self.inputs.get(target.name)
            if not needs_inputs or inputs is None or inputs.statistics.num_tokens >= MIN_EXPERT_TOKENS:
                pending.setdefault(id(inputs or target), []).append(target)
                continue
            note = f"saw {inputs.statistics.num_tokens} tokens"
            if target.name.endswith("down_proj"):
                records += self._prune_group([target], inputs, f"magnitude: {note}", method="magnitude")
            else:
                records += self._prune_group([target], self.all_tokens[target.owner], f"inputs of all experts: {note}")
        for group in pending.values():
            records += self._prune_group(group, self.inputs.get(group[0].name))
        return records

    def _prune_group(
        self, targets: list[Target], inputs: LayerInputs | None, fallback: str | None = None, method: str | None = None
    ) -> list[LayerRecord]:
        """Prunes layers that share their inputs, in place; one process does it and sends the others the result."""
        started = time.perf_counter()
        weights = [target.view(self.stack.model) for target in targets]
        before = [weight.clone() for weight in weights]
        process = self._num_groups % distributed.world_size()
        self._num_groups += 1
        pruner = find_pruner(method or self.plan.settings.method)
        damp = distributed.decide(lambda: self._prune_weights(pruner, targets, weights, inputs), process)
        if distributed.world_size() > 1:
            for weight in weights:
                contiguous = weight.contiguous()
                distributed.broadcast(contiguous, process)
                weight.copy_(contiguous)
        seconds = round((time.perf_counter() - started) / len(targets), 4)
        result = {"damp": damp, "seconds": seconds, "fallback": fallback}
        kept = [int((old == 0).sum()) if self.plan.settings.keep_zeros else 0 for old in before]
        sample = None if inputs is None else inputs.sample
        if self.plan.settings.reconstruct_epochs:
            self.dense |= {target.name: (old, sample) for target, old in zip(targets, before, strict=True)}
        return [
            measure(old, new, sample, target.name, self.plan.patterns[target.name], zeros_before=zeros, **result)
            for target, old, new, zeros in zip(targets, before, weights, kept, strict=True)
        ]

    def _prune_weights(
        self, pruner: Pruner, targets: list[Target], weights: list[Tensor], inputs: LayerInputs | None
    ) -> float | None:
        """Prunes ``weights`` in place; returns the damping that they needed."""
        patterns = [self.plan.patterns[target.name] for target in targets]
        options = {name: getattr(self.plan.settings, name) for name in pruner.options}
        masks = None
        if (files := self.plan.masks) is not None:
            masks = [(self.stack.matrix(target, files) != 0).to(self.stack.device) for target in targets]
        try:
            for target, weight, pattern in zip(targets, weights, patterns, strict=True):
                check_weight(weight, pattern, target.name)
            pruned, damp = pruner.prune(weights, inputs and inputs.statistics, patterns, masks, **options)
        except ValueError as error:
            raise StageError(f"{targets[0].name}: {error}") from error
        for target, weight, result in zip(targets, weights, pruned, strict=True):
            if pruner not in PRUNERS.values():
                _check_result(self.plan.settings.method, target, result, self.plan.patterns[target.name])
            if self.plan.settings.keep_zeros:  # whatever the method does with them
                result = result.masked_fill(weight == 0, 0)
            weight.copy_(self._as_stored(target, result))
        return damp

    def _as_stored(self, target: Target, weight: Tensor) -> Tensor:
        """A weight in the dtype of the files, so that later blocks are the same if another run resumes from them."""
        if self.out is None:
            return weight
        assert isinstance(self.stack, BlockStack)
        return weight.to(self.stack.stored_dtype(target, self.out))


def _check_result(method: str, target: Target, weight: Any, pattern: Pattern) -> None:
    """Raises StageError if a pruner from outside the package did not return a finite matrix with the pattern."""
    shape = (target.out_features, target.in_features)
    if not isinstance(weight, Tensor) or weight.shape != shape:
        kind = tuple(weight.shape) if isinstance(weight, Tensor) else f"a {type(weight).__name__}"
        problem = f"is {kind}, expected {shape}"
    elif not weight.isfinite().all():
        problem = "is not finite"
    else:
        problem = shortfall(weight, pattern)
    if problem:
        raise StageError(f"{target.name}: the result of prune.method {method} {problem}")
