"""Where attention ends and the MLP begins in a decoder block, found by running it, whatever its family names them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from sppctl.model.block_call import tensors_in


@dataclass(frozen=True)
class Border:
    """The border between the attention and the MLP of a block: the hidden states after attention's residual."""

    reader: str  # the submodule that reads them first
    before: frozenset[str]  # the submodules that run before it

    def is_attention(self, name: str) -> bool:
        """Whether a module, by its name within the block, runs before the border."""
        return name.partition(".")[0] in self.before

    def output(self, block: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """The hidden states at the border (batch, tokens, width) for a call of ``block``, which is run no further.

        ``call`` is the block, or what calls it with other weights.
        """

        def stop(_: nn.Module, *inputs: Any) -> None:
            raise _ReachedError(_hidden(*inputs))

        handle = block.get_submodule(self.reader).register_forward_pre_hook(stop, with_kwargs=True)
        try:
            call(*args, **kwargs)
        except _ReachedError as reached:
            return reached.hidden.view(_hidden(args, kwargs).shape)  # some families flatten batch and tokens
        finally:
            handle.remove()
        raise AssertionError(f"{self.reader} was not called")


@contextlib.contextmanager
def finding_borders(blocks: nn.ModuleList) -> Iterator[dict[int, Border]]:
    """Fills the dictionary with the border of each block, by its index, when the model is run on any tokens.

    A block without one runs attention and MLP in parallel, or adds the residual inside of a submodule.
    """
    borders: dict[int, Border] = {}
    with contextlib.ExitStack() as hooks:
        for index, block in enumerate(blocks):
            _Watch(block, index, borders, hooks)
        yield borders


class _Watch:
    """Watches the submodules of a block: a sum is no submodule's output, so its reader gets a tensor of unknown origin.

    The first such reader after a submodule with matrices is at the border.
    """

    def __init__(self, block: nn.Module, index: int, borders: dict[int, Border], hooks: contextlib.ExitStack) -> None:
        self.index, self.borders = index, borders
        self._known: list[Tensor] | None = None  # the block's input and outputs of submodules; None: it is not running
        self._ran: list[str] = []
        self._has_matrices = False
        hooks.enter_context(block.register_forward_pre_hook(self._start, with_kwargs=True))
        hooks.enter_context(block.register_forward_hook(self._end))
        for name, module in block.named_children():
            hooks.enter_context(module.register_forward_pre_hook(partial(self._reads, name), with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(partial(self._writes, name)))

    def _start(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        self._known, self._ran, self._has_matrices = [_hidden(args, kwargs)], [], False

    def _end(self, *_: Any) -> None:
        self._known = None

    def _reads(self, name: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        if self._known is None or not self._has_matrices or self.index in self.borders:
            return
        # the tensors are held, so their memory is not reused
        if _memory(_hidden(args, kwargs)) not in map(_memory, self._known):
            self.borders[self.index] = Border(name, frozenset(self._ran))

    def _writes(self, name: str, module: nn.Module, _: Any, output: Any) -> None:
        if self._known is not None:
            self._known += tensors_in(output)
            self._ran.append(name)
            self._has_matrices |= any(parameter.dim() > 1 for parameter in module.parameters())


def _hidden(args: Any, kwargs: Any) -> Tensor:
    """The hidden states with which a module is called."""
    return next(tensors_in([kwargs.get("hidden_states"), args, kwargs]))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _ReachedError(Exception):
    """Leaves a block's forward at the border."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden
