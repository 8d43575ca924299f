"""One loaded block: gathering what its layers are given, and pruning them in place, in either order."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sppctl import distributed
from sppctl.errors import StageError
from sppctl.files.safe_files import TensorFiles
from sppctl.model.blocks import BlockStack
from sppctl.model.targets import Target, gated
from sppctl.pattern import Pattern
from sppctl.prune.activations import Activations
from sppctl.prune.given_masks import given_mask
from sppctl.prune.in_step import in_step, wait_at
from sppctl.prune.layers import LayerInputs, PrunePlan, SharedInputs, measure
from sppctl.prune.reconstruct import reconstruct
from sppctl.pruners import PRUNERS, InputNorms, check_weight
from sppctl.records import BlockErrors, LayerRecord

Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]  # a module, and what it is called with

MIN_EXPERT_TOKENS = 32  # an expert that saw fewer is pruned by a fall-back


class BlockWork:
    """One loaded block: gathering inputs, pruning, tuning."""

    def __init__(
        self,
        stack: BlockStack,
        index: int,
        targets: dict[str, Target],
        plan: PrunePlan,
        activations: Activations | None,
        shared: SharedInputs,
        out: TensorFiles | None = None,
    ) -> None:
        self.stack, self.index, self.targets, self.plan = stack, index, targets, plan
        self.activations, self.shared, self.out = activations, shared, out
        self.prefix = f"{stack.blocks_name}.{index}."
        self.plain = {name: target for name, target in targets.items() if target.expert is None}
        self.experts: dict[str, list[Target]] = {}
        for target in targets.values():
            if target.expert is not None:
                self.experts.setdefault(target.owner, []).append(target)
        self.inputs: dict[str, LayerInputs] = {}
        self.leaders: dict[str, str] = {}
        self.everything: dict[str, LayerInputs] = {}
        self.reconstruction: BlockErrors | None = None
        self._seen: list[tuple[Tensor, str]] = []
        self._turn = 0

    # --- orders -------------------------------------------------------------------------------------------------------

    def prune(self) -> list[LayerRecord]:
        """Prunes all targets of the block in place."""
        if self.activations is None:
            return self._prune_all()
        if self.plan.order == "module":
            return self._prune_on_the_way(self.activations)
        dense = self.activations.second_buffer() if self.plan.reconstruct_epochs and self.targets else None
        self.gather(PRUNERS[self.plan.method].statistics or InputNorms, dense=dense)
        records = self._prune_all()
        self.inputs.clear()
        if dense is not None:
            self.reconstruction = reconstruct(
                self.stack,
                self.index,
                self.targets,
                self.activations,
                dense,
                epochs=self.plan.reconstruct_epochs,
                lr=self.plan.reconstruct_lr,
            )
            for target in self.targets.values():
                weight = target.view(self.stack.model)
                weight.copy_(self._as_written(target, weight))
        return records

    def gather(self, make: Callable[..., Any], keep: bool = False, dense: Tensor | None = None) -> None:
        """Runs the dense block on all windows and collects what each target is given.

        Args:
            make: class of the statistics.
            keep: the dense output becomes the next block's input.
            dense: takes the block's outputs, (windows, tokens, width).
        """
        assert self.activations is not None
        for owner, targets in self.experts.items():
            self._prepare_experts(owner, targets, make)
        handles = self._watch(partial(self._collect, make))
        for owner in self.experts:
            hook = partial(self._collect_experts, owner)
            handles.append(self._module(owner).register_forward_pre_hook(hook, with_kwargs=True))
        with _removed(handles):
            for rows in self.activations.batches:
                output = self._run(self.activations, rows)
                if keep:
                    self.activations.store(rows, output)
                if dense is not None:
                    dense[rows] = output.to(dense.device)
        self._learn_shared()
        for name in self.plain:
            self.inputs[name] = self.inputs[self.leaders[name]]
        self._reduce()

    def _prune_on_the_way(self, activations: Activations) -> list[LayerRecord]:
        """One forward, all micro-batches in step: where they meet, a group of layers is pruned."""
        if self.shared.of(self._relative(self.plain)) is None:
            self._find_shared(activations)
        places: dict[str, Callable[[list[Any]], list[LayerRecord]]] = {}  # by the module where they meet
        for group in self.shared.of(self._relative(self.plain)) or []:
            names = [self.prefix + short for short in group]
            places[self.targets[names[0]].owner] = partial(self._prune_arrived, names)
        for owner in self.experts:
            places[owner] = partial(self._prune_arrived_experts, owner)
        records: list[LayerRecord] = []
        prune = list(places.values())
        handles = [
            self._module(owner).register_forward_pre_hook(partial(_meet, place), with_kwargs=True)
            for place, owner in enumerate(places)
        ]
        with _removed(handles):
            in_step(
                [partial(activations.advance, self.index, rows) for rows in activations.batches],
                lambda place, calls: records.extend(prune[place](calls)),
            )
        return records

    def _find_shared(self, activations: Activations) -> None:
        """Once for blocks of a make: which layers share inputs is seen only by running one, on as little as needed."""
        with _removed(self._watch(self._leads)):
            for rows in activations.batches:
                if self.plain.keys() == self.leaders.keys():
                    break
                self._run(activations, rows)
        self._learn_shared()

    def _prune_arrived(self, names: list[str], calls: list[Call]) -> list[LayerRecord]:
        statistics = PRUNERS[self.plan.method].statistics or InputNorms
        inputs = LayerInputs(statistics, self.targets[names[0]].in_features, self.stack.device)
        for _, args, _ in calls:
            inputs.update(args[0])
        inputs.reduce(names[0], self.stack.dtype)
        return self._prune_group(names, inputs)

    def _prune_arrived_experts(self, owner: str, calls: list[Call]) -> list[LayerRecord]:
        records = []
        # gate and up first: down is given what the pruned ones make of the tokens
        for parts in (("gate_proj", "up_proj"), ("down_proj",)):
            targets = [t for t in self.experts[owner] if t.name.endswith(parts)]
            if targets:
                self._prepare_experts(owner, targets, PRUNERS[self.plan.method].statistics or InputNorms)
                for call in calls:
                    self._collect_experts(owner, *call)
                self._reduce()
                records += self._prune_experts(targets)
                self.inputs.clear()
        return records

    # --- inputs -------------------------------------------------------------------------------------------------------

    def _module(self, name: str) -> nn.Module:
        return self.stack.model.get_submodule(name)

    def _short(self, name: str) -> str:
        return name.removeprefix(self.prefix)

    def _relative(self, names: dict[str, Target]) -> list[str]:
        return [self._short(name) for name in names]

    def _run(self, activations: Activations, rows: slice) -> Tensor:
        output = activations.call(self.index, rows)(self.stack.blocks[self.index], activations.inputs(rows))
        self._seen.clear()
        return output

    def _watch(self, see: Callable[[str, Tensor], object]) -> list[RemovableHandle]:
        """Calls ``see`` with the name and the input of every layer outside of experts that is run."""

        def hook(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
            see(name, args[0])

        return [
            self._module(target.owner).register_forward_pre_hook(partial(hook, name))
            for name, target in self.plain.items()
        ]

    def _leads(self, name: str, inputs: Tensor) -> bool:
        """Whether a layer is the first of those that are given this very tensor."""
        if name not in self.leaders:
            # q, k and v receive the very same tensor; holding on to it keeps its identity from being reused
            self.leaders[name] = next((leader for tensor, leader in self._seen if tensor is inputs), name)
            self._seen.append((inputs, self.leaders[name]))
        return self.leaders[name] == name

    def _learn_shared(self) -> None:
        for name in self.plain:
            if name not in self.leaders:
                raise StageError(f"{name} received no calibration input; leave it out (prune.skip) or use magnitude")
        self.shared.learn(self._relative(self.plain), {self._short(n): self._short(m) for n, m in self.leaders.items()})

    def _reduce(self) -> None:
        """Adds up what all processes have seen: once for layers that share their inputs."""
        done: set[int] = set()
        for name, inputs in [*self.inputs.items(), *self.everything.items()]:
            if id(inputs) not in done:
                done.add(id(inputs))
                inputs.reduce(name, self.stack.dtype)

    def _collect(self, make: Callable[..., Any], name: str, inputs: Tensor) -> None:
        if self._leads(name, inputs):
            if name not in self.inputs:
                self.inputs[name] = LayerInputs(make, inputs.shape[-1], inputs.device)
            self.inputs[name].update(inputs)

    def _prepare_experts(self, owner: str, targets: list[Target], make: Callable[..., Any]) -> None:
        device = self.stack.device
        self.everything[owner] = LayerInputs(make, self.stack.width, device)
        for target in targets:
            partner = target.name.replace(".up_proj", ".gate_proj")  # they share their input
            shared = self.inputs.get(partner)
            self.inputs[target.name] = shared or LayerInputs(make, target.in_features, device)

    def _collect_experts(self, owner: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = ("hidden_states", "top_k_index")
        hidden, chosen = (args[i] if i < len(args) else kwargs[name] for i, name in enumerate(names))
        hidden = hidden.reshape(-1, hidden.shape[-1])
        self.everything[owner].update(hidden)
        gate_up = module._parameters["gate_up_proj"]
        assert gate_up is not None
        for expert in range(len(gate_up)):
            tokens = hidden[(chosen == expert).any(dim=-1)]
            every = {
                id(i): i for part in ("gate_proj", "up_proj") if (i := self.inputs.get(f"{owner}.{expert}.{part}"))
            }
            for inputs in every.values():
                inputs.update(tokens)
            down = self.inputs.get(f"{owner}.{expert}.down_proj")
            if down is not None and len(tokens):
                down.update(gated(module, nn.functional.linear(tokens, gate_up[expert])))

    # --- pruning ------------------------------------------------------------------------------------------------------

    def _prune_all(self) -> list[LayerRecord]:
        groups = self.shared.of(self._relative(self.plain)) if self.inputs else None
        records = []
        for group in groups or [[short] for short in self._relative(self.plain)]:
            names = [self.prefix + short for short in group]
            records += self._prune_group(names, self.inputs.get(names[0]))
        for targets in self.experts.values():
            records += self._prune_experts(targets)
        order = {name: place for place, name in enumerate(self.targets)}
        return sorted(records, key=lambda record: order[record.name])

    def _prune_experts(self, targets: list[Target]) -> list[LayerRecord]:
        pending: dict[int, list[str]] = {}
        records = []
        for target in targets:
            inputs = self.inputs.get(target.name)
            needed = PRUNERS[self.plan.method].statistics is not None
            if needed and inputs is not None and inputs.statistics.num_tokens < MIN_EXPERT_TOKENS:
                seen = inputs.statistics.num_tokens
                if target.name.endswith("down_proj"):
                    words = f"magnitude: saw {seen} tokens"
                    records += self._prune_group([target.name], inputs, fallback=words, method="magnitude")
                else:
                    words = f"inputs of all experts: saw {seen} tokens"
                    records += self._prune_group([target.name], self.everything[target.owner], fallback=words)
            else:
                pending.setdefault(id(inputs) if inputs else id(target), []).append(target.name)
        for names in pending.values():
            records += self._prune_group(names, self.inputs.get(names[0]))
        return records

    def _prune_group(
        self, names: list[str], inputs: LayerInputs | None, fallback: str | None = None, method: str | None = None
    ) -> list[LayerRecord]:
        """Prunes layers that share their inputs, in place; one process does it and sends the others the result."""
        started = time.perf_counter()
        pruner = PRUNERS[method or self.plan.method]
        weights = [self.targets[name].view(self.stack.model) for name in names]
        patterns = [self.plan.patterns[name] for name in names]
        before = [weight.clone() for weight in weights]
        owner = self._turn % distributed.world_size()
        self._turn += 1
        damp: float | None = None
        problem: str | None = None
        if owner == distributed.rank():
            options = {key: self.plan.options[key] for key in pruner.options if key in self.plan.options}
            try:
                for name, weight, pattern in zip(names, weights, patterns, strict=True):
                    check_weight(weight, pattern, name)
                masks = self._masks(names, patterns)
                statistics = inputs.statistics if inputs else None
                pruned = pruner.prune(weights, statistics, patterns, masks, **options)
                for name, weight, result in zip(names, weights, pruned, strict=True):
                    weight.copy_(self._as_written(self.targets[name], result.weight))
                    damp = result.damp
            except StageError as error:
                problem = str(error)
            except ValueError as error:
                problem = f"{names[0]}: {error}"
        damp, problem = distributed.broadcast_object((damp, problem), owner)
        if problem is not None:  # known to all, so that the first process can say it and none waits for another
            raise StageError(problem)
        self._share(weights, owner)
        seconds = (time.perf_counter() - started) / len(names)
        return [
            measure(name, old, new, pattern, inputs, damp, seconds, fallback)
            for name, old, new, pattern in zip(names, before, weights, patterns, strict=True)
        ]

    def _as_written(self, target: Target, weight: Tensor) -> Tensor:
        """A weight in the dtype of the files: what follows is then the same whether this run goes on or another."""
        return weight if self.out is None else weight.to(self.stack.stored_dtype(target, self.out))

    def _share(self, weights: list[Tensor], owner: int) -> None:
        if distributed.world_size() > 1:
            for weight in weights:
                whole = weight.contiguous()
                distributed.broadcast(whole, owner)
                weight.copy_(whole)

    def _masks(self, names: list[str], patterns: list[Pattern]) -> list[Tensor] | None:
        if self.plan.masks is None:
            return None
        pairs = zip(names, patterns, strict=True)
        return [given_mask(self.stack, self.targets[name], pattern, self.plan.masks) for name, pattern in pairs]


def _meet(place: int, *call: Any) -> None:
    wait_at(place, call)


@contextlib.contextmanager
def _removed(handles: list[RemovableHandle]) -> Iterator[None]:
    """Takes hooks away at the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
