"""How a model calls one of its decoder blocks: recorded once, replayed with other hidden states."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


@dataclass(frozen=True)
class BlockCall:
    """The arguments with which the model calls one block, without the hidden states (the first argument)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_by_name: bool

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[BlockCall, Tensor]:
        """Splits a call into its hidden states and the rest."""
        if args:
            return cls(args[1:], kwargs, False), args[0]
        rest = dict(kwargs)
        hidden = rest.pop("hidden_states")
        return cls((), rest, True), hidden

    def __call__(self, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        """Runs the block on other hidden states; (batch, tokens, width) in and out."""
        if self.hidden_by_name:
            return hidden_of(block(hidden_states=hidden, **self.kwargs))
        return hidden_of(block(hidden, *self.args, **self.kwargs))

    def widened(self) -> BlockCall:
        """The same call with its floating-point tensors in float32."""
        return replace(self, args=tree_map(_widened, self.args), kwargs=tree_map(_widened, self.kwargs))

    def differing_argument(self, other: BlockCall, block: nn.Module) -> str | None:
        """The name of an argument whose tensors differ between two calls of the same block, or None."""
        names = list(inspect.signature(block.forward).parameters)[1 : 1 + len(self.args)]
        first, second = (dict(zip(names, call.args, strict=False)) | call.kwargs for call in (self, other))
        for name, value in first.items():
            pairs = zip_longest(tensors_in(value), tensors_in(second.get(name)))
            if any(a is None or b is None or not torch.equal(a, b) for a, b in pairs):
                return name
        return None


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def hidden_of(output: Any) -> Tensor:
    """The hidden states that a block returns, alone or as the first element of a tuple."""
    hidden = output if isinstance(output, Tensor) else output[0]
    assert isinstance(hidden, Tensor)
    return hidden


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in an argument or a result: itself, or those in tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list | Mapping):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item)
