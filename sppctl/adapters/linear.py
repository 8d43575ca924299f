"""What all adapters of a pruned linear layer have in common: PEFT's bookkeeping, and merging without losing a bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

import torch
from peft.config import PeftConfig
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

C = TypeVar("C", bound=PeftConfig)


class SparseLinear(nn.Module, BaseTunerLayer, Generic[C]):
    """``base_layer`` (an ``nn.Linear``, frozen) and any number of adapters on it.

    A subclass names its parameters in ``adapter_layer_names`` (the first of them exists for every adapter), and says in
    :meth:`update_layer`, :meth:`effective_weight` and :meth:`adapted` what they are and do.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: C) -> None:
        super().__init__()
        self.base_layer = base_layer
        linear = self._linear()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._weight_before_merge: Tensor | None = None
        self._active_adapter = adapter_name

    def update_layer(self, adapter_name: str, config: C) -> None:
        """Adds an adapter, or starts one anew."""
        raise NotImplementedError

    def effective_weight(self, weight: Tensor, names: list[str]) -> Tensor:
        """The weight (out_features, in_features) that the named adapters make of ``weight``, in its dtype."""
        raise NotImplementedError

    def adapted(self, x: Tensor, names: list[str]) -> Tensor:
        """(..., in_features) to (..., out_features), under the named adapters."""
        raise NotImplementedError

    def _linear(self) -> nn.Linear:
        linear = self.get_base_layer()
        assert isinstance(linear, nn.Linear)
        return linear

    def _known(self, names: list[str]) -> list[str]:
        """Those of the adapters that this layer has."""
        parameters = getattr(self, self.adapter_layer_names[0])
        return [name for name in names if name in parameters]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own gives the adapter the dtype of the layer too, and so rounds a loaded one to bfloat16
        target = self._linear().weight.device if device is None else device
        for part in (*self.adapter_layer_names, *self.other_param_names):
            tensors = getattr(self, part)
            if (
                isinstance(tensors, nn.ParameterDict | BufferDict)
                and adapter_name in tensors
                and not tensors[adapter_name].is_meta
            ):
                tensors[adapter_name] = tensors[adapter_name].to(target)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Puts the effective weight into the base layer.

        Args:
            safe_merge: refuse a result that is not finite.
            adapter_names: adapters to merge; the active ones if None.

        Raises:
            ValueError: safe_merge found a value that is not finite.
        """
        names = self._known(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        linear = self._linear()
        source = linear.weight.data if self._weight_before_merge is None else self._weight_before_merge
        merged = self.effective_weight(source, [*self.merged_adapters, *names])
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"merging {', '.join(names)} gives values that are not finite; the adapter is broken")
        self._weight_before_merge = source
        linear.weight.data = merged
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Restores the weight as it was before the first merge, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        assert self._weight_before_merge is not None
        self._linear().weight.data = self._weight_before_merge
        self._weight_before_merge = None
        self.merged_adapters.clear()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in_features) to (..., out_features), under the active adapters."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return cast(Tensor, self.base_layer(x, *args, **kwargs))
        active = self._known(self.active_adapters)
        if self.merged or not active:
            return cast(Tensor, self.base_layer(x, *args, **kwargs))
        return self.adapted(x, active)

    def __repr__(self) -> str:
        return f"{type(self).__module__.split('.')[-2]}.{super().__repr__()}"


def only(names: list[str]) -> str:
    """The one adapter that is active; raises ValueError where several would each replace the whole weight."""
    if len(names) > 1:
        raise ValueError(f"adapters {', '.join(names)} each replace the whole weight; activate one of them")
    return names[0]


def autocast_inputs(
    x: Tensor, weight: Tensor, bias: Tensor | None, compute: Callable[[Tensor, Tensor | None], Tensor]
) -> Tensor:
    """Calls ``compute`` with x and bias in the dtype of the product: autocast's where it is on, else that of x.

    Raises:
        ValueError: without autocast, x and the weight differ in dtype.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = bias if bias is None else bias.to(x.dtype)
    elif x.dtype != weight.dtype:
        raise ValueError(f"the layer's input is {x.dtype}, its weight {weight.dtype}; convert one, or use autocast")
    with torch.autocast(x.device.type, enabled=False):
        return compute(x, bias)
