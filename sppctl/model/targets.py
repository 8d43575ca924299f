"""The matrices of a model that can be pruned, and where the model and its checkpoint keep them.

Three forms occur: ``nn.Linear`` (out, in); ``Conv1D`` of the GPT-2 family, stored (in, out); and the experts of a
mixture, which current transformers fuse into 3-D parameters while most checkpoints keep one matrix for each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sppctl.errors import UserError
from sppctl.files.safe_files import TensorFiles

# parts of a tensor's path: the model's name, and the name that checkpoints may use instead
RENAMED = (("", ""), (".mlp.", ".block_sparse_moe."))
# the matrices that a fused expert parameter consists of, in order, under the names that checkpoints use
EXPERT_PARTS = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}


@dataclass(frozen=True)
class Target:
    """One matrix, seen as (out_features, in_features) however it is stored.

    An expert's matrix is named like a separate linear layer (``model.layers.0.mlp.experts.3.gate_proj``).
    """

    name: str  # full name
    owner: str  # full name of the module that holds the parameter
    parameter: str  # the parameter's name in that module
    out_features: int
    in_features: int
    expert: int | None = None  # index into a fused 3-D parameter
    first_row: int = 0  # where the matrix starts within its expert's rows
    transposed: bool = False  # stored as (in, out)

    @property
    def is_linear(self) -> bool:
        """Whether it is a plain ``nn.Linear``."""
        return self.expert is None and not self.transposed

    def stored_parameter(self, model: nn.Module) -> Tensor:
        """The model's parameter that holds the matrix, of all experts if they are fused."""
        parameter = model.get_submodule(self.owner)._parameters[self.parameter]
        assert parameter is not None
        return parameter.data

    def view(self, model: nn.Module) -> Tensor:
        """The matrix (out_features, in_features) as a view into the model's parameter."""
        return self.within(self.stored_parameter(model))

    def within(self, parameter: Tensor) -> Tensor:
        """The matrix as a view into a tensor of the parameter's shape."""
        if self.expert is not None:
            return parameter[self.expert, self.first_row : self.first_row + self.out_features]
        return parameter.t() if self.transposed else parameter


def is_fused_experts(module: nn.Module) -> bool:
    """Whether a module holds a mixture's experts as (experts, 2 x intermediate, hidden) and (experts, hidden, ...)."""
    gate_up, down = module._parameters.get("gate_up_proj"), module._parameters.get("down_proj")
    if gate_up is None or down is None or gate_up.dim() != 3 or down.dim() != 3:
        return False
    if not hasattr(module, "act_fn") and not hasattr(module, "_apply_gate"):
        return False
    # gate rows above up rows, not interleaved, and no biases: the experts must be plain matrix products
    if not getattr(module, "is_concatenated", True) or "gate_up_proj_bias" in module._parameters:
        return False
    return gate_up.shape[1] == 2 * down.shape[2] and gate_up.shape[2] == down.shape[1]


def gated(module: nn.Module, gate_up: Tensor) -> Tensor:
    """The input of down, (tokens, intermediate), from the output of gate and up, (tokens, 2 x intermediate)."""
    if hasattr(module, "_apply_gate"):
        return module._apply_gate(gate_up)  # type: ignore[operator, no-any-return]
    gate, up = gate_up.chunk(2, dim=-1)
    return module.act_fn(gate) * up  # type: ignore[operator, no-any-return]


def is_in_router(blocks: nn.ModuleList, path: str) -> bool:
    """Whether a module of the blocks is the router of a mixture of experts, or inside of one."""
    parts = path.split(".")
    return "router" in parts or any(
        part == "gate" and hasattr(blocks.get_submodule(".".join(parts[:index])), "experts")
        for index, part in enumerate(parts)
    )


def find_targets(blocks: nn.ModuleList, blocks_name: str) -> dict[str, Target]:
    """Every matrix of the blocks that can be pruned, by name, in the model's order, without routers and norms."""
    targets: list[Target] = []
    for relative, module in blocks.named_modules():
        name = f"{blocks_name}.{relative}"
        if isinstance(module, nn.Linear):
            # a single output is the gate of a shared expert, which weights it like a router
            if module.out_features == 1 or is_in_router(blocks, relative):
                continue
            targets.append(Target(name, name, "weight", module.out_features, module.in_features))
        elif isinstance(module, Conv1D):
            in_features, out_features = module.weight.shape
            targets.append(Target(name, name, "weight", out_features, in_features, transposed=True))
        elif is_fused_experts(module):
            num_experts, hidden, intermediate = module.get_parameter("down_proj").shape
            for expert in range(num_experts):
                for part, row in (("gate_proj", 0), ("up_proj", intermediate)):
                    full = f"{name}.{expert}.{part}"
                    targets.append(Target(full, name, "gate_up_proj", intermediate, hidden, expert, row))
                down = f"{name}.{expert}.down_proj"
                targets.append(Target(down, name, "down_proj", hidden, intermediate, expert))
    return {target.name: target for target in targets}


def unsupported_experts(blocks: nn.ModuleList, blocks_name: str) -> tuple[list[str], float]:
    """Expert parameters in a form that cannot be pruned, and their share of the weights of the blocks' matrices."""
    supported = {f"{target.owner}.{target.parameter}" for target in find_targets(blocks, blocks_name).values()}
    matrices = {
        f"{blocks_name}.{path}.{leaf}": parameter
        for path, module in blocks.named_modules()
        if not isinstance(module, nn.Conv1d)
        for leaf, parameter in module._parameters.items()
        if parameter is not None and parameter.dim() >= 2
    }
    names = [
        name
        for name, matrix in matrices.items()
        if name not in supported and (matrix.dim() >= 3 or _is_flat_expert(blocks, name[len(blocks_name) + 1 :]))
    ]
    return names, sum(matrices[name].numel() for name in names) / sum(matrix.numel() for matrix in matrices.values())


def _is_flat_expert(blocks: nn.ModuleList, path: str) -> bool:
    """Whether a 2-D parameter of the blocks has matrices of experts, as in DBRX: not their biases, not a router."""
    return ".experts." in path and not path.endswith("bias") and not is_in_router(blocks, path)


def matches(name: str, pattern: str) -> bool:
    """Whether a full name ends with ``.pattern`` (``q_proj``, ``mlp.down_proj``) or matches it (``*.layers.0.*``)."""
    return name.endswith(f".{pattern}") or fnmatch(name, pattern)


def select(targets: dict[str, Target], names: list[str] | str, skip: list[str], key: str) -> dict[str, Target]:
    """The targets that a configuration selects: by ends of names or patterns, or ``"all-linear"``, without ``skip``.

    Raises:
        UserError: a name matches nothing, or nothing is left to prune.
    """
    kinds = ", ".join(sorted({name.rpartition(".")[2] for name in targets}))
    patterns = [] if isinstance(names, str) else names
    for pattern, where in [*((n, key) for n in patterns), *((n, "prune.skip") for n in skip)]:
        if not any(matches(name, pattern) for name in targets):
            raise UserError(where, f"{pattern!r} matches no linear layer", f"this model has {kinds} (or all-linear)")
    chosen = {
        name: target
        for name, target in targets.items()
        if (names == "all-linear" or any(matches(name, pattern) for pattern in patterns))
        and not any(matches(name, pattern) for pattern in skip)
    }
    if not chosen:
        raise UserError(key, "nothing is left to prune", f"prune.skip leaves out everything that {names} matches")
    return chosen


@dataclass(frozen=True)
class Part:
    """A stored tensor: a parameter, or its part ``parameter[expert, first_row : first_row + rows]``."""

    name: str
    expert: int | None = None
    first_row: int = 0
    rows: int = 0

    def of(self, parameter: Tensor) -> Tensor:
        """The part of the parameter that this tensor holds, as a view."""
        return parameter if self.expert is None else parameter[self.expert, self.first_row : self.first_row + self.rows]


def stored_name(files: TensorFiles, parameter: str, base_prefix: str, model: nn.Module | None = None) -> str:
    """The name under which a checkpoint stores a model's parameter; raises UserError if there is none.

    A checkpoint of the model without a head lacks the base prefix (``h.0...`` for ``transformer.h.0...``); one of a
    model with another head may have it where this model does not. Other names are those that transformers renames when
    it loads the checkpoint into the ``model`` (None: that of its config.json).
    """
    from sppctl.model.weights import renamed  # that module uses this one

    names = list(_spellings(parameter, base_prefix))
    for name in names:
        if name in files:
            return name
    sources = renamed(files, model)
    for name in names:
        if name in sources:
            return sources[name]
    raise UserError(
        f"{files.directory} holds no tensor {parameter}, which its config.json implies: these are the weights of "
        "another model, or stored in a form that sppctl does not support (families: docs/pruning.md)"
    )


def stored_parts(files: TensorFiles, model: nn.Module, parameter: str) -> list[Part]:
    """The tensors that make up a parameter or buffer of a model: itself, or one for each matrix of each expert.

    A tied embedding that is only stored as the output's has the output's name. Raises UserError if the checkpoint does
    not have them.
    """
    owner, _, leaf = parameter.rpartition(".")
    shape, base_prefix = getattr(model.get_submodule(owner), leaf).shape, str(model.base_model_prefix)
    if len(shape) == 3 and leaf in EXPERT_PARTS and not any(n in files for n in _spellings(parameter, base_prefix)):
        for names in EXPERT_PARTS[leaf]:
            rows = shape[1] // len(names)
            parts = [
                Part(f"{spelled}.{expert}.{part}.weight", expert, index * rows, rows)
                for spelled in _spellings(owner, base_prefix)
                if f"{spelled}.0.{names[0]}.weight" in files
                for expert in range(shape[0])
                for index, part in enumerate(names)
            ]
            if parts:
                return [replace(part, name=stored_name(files, part.name, base_prefix, model)) for part in parts]
    if not any(name in files for name in _spellings(parameter, base_prefix)) and (head := _tied_head(model, owner)):
        parameter = f"{head}.{leaf}"
    return [Part(stored_name(files, parameter, base_prefix, model))]


def _tied_head(model: nn.Module, owner: str) -> str | None:
    """The name of the output embedding, if a module is the input embedding that the model ties to it."""
    config: Any = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False) or not isinstance(model.get_submodule(owner), nn.Embedding):
        return None
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    if model.get_submodule(owner) is not inputs:
        return None
    return next((name for name, module in model.named_modules() if module is outputs), None)


def tensor_names(files: TensorFiles, model: nn.Module, targets: Iterable[Target]) -> dict[str, str]:
    """The tensor that holds each target, by the target's name: its own, or the fused one of all experts.

    Targets that the checkpoint does not have are left out.
    """
    names: dict[str, str] = {}
    parameters: dict[str, dict[tuple[int | None, int], str]] = {}  # for all experts of a parameter at once
    for target in targets:
        parameter = f"{target.owner}.{target.parameter}"
        if parameter not in parameters:
            parameters[parameter] = {}
            with suppress(UserError):
                parts = stored_parts(files, model, parameter)
                parameters[parameter] = {(part.expert, part.first_row): part.name for part in parts}
        tensors = parameters[parameter]
        name = tensors.get((target.expert, target.first_row), tensors.get((None, 0)))
        if name is not None:
            names[target.name] = name
    return names


def _spellings(name: str, base_prefix: str) -> Iterator[str]:
    for model_part, stored_part in RENAMED:
        renamed = name.replace(model_part, stored_part) if model_part else name
        short = renamed.removeprefix(f"{base_prefix}.")
        yield from dict.fromkeys((renamed, short, f"{base_prefix}.{short}"))
