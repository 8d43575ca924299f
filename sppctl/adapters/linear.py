"""What all adapters of a pruned linear layer share: PEFT's bookkeeping, merging, and bit-exact unmerging."""

from __future__ import annotations

import warnings
from typing import Any, Generic, TypeVar, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from sppctl.adapters.config import BranchConfig, SparseConfig
from sppctl.adapters.products import Branch
from sppctl.packed.linear import PackedLinear

C = TypeVar("C", bound=SparseConfig)
B = TypeVar("B", bound=BranchConfig)


class SparseLinear(nn.Module, BaseTunerLayer, Generic[C]):
    """``base_layer`` (linear, frozen, perhaps packed) and any number of adapters on it.

    Of the base layer (:mod:`sppctl.packed.linear`) an adapter reads ``weight`` and ``bias``, PEFT's properties; only
    merging writes. A subclass names its parameters in ``adapter_layer_names`` (the first of them exists for every
    adapter) and its other values per adapter in ``other_param_names``, and implements :meth:`create`,
    :meth:`effective_weight` and :meth:`adapted`.
    """

    buffer_names: tuple[str, ...] = ()  # of other_param_names: tensors, which are stored with the adapter
    takes_packed = False  # whether it works with a packed weight, of which it reads some rows at a time

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: C) -> None:
        super().__init__()
        self.base_layer = base_layer
        linear: Any = self.get_base_layer()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._weight_before_merge: Tensor | None = None
        self._active_adapter = adapter_name
        for part in self.adapter_layer_names:
            setattr(self, part, nn.ParameterDict())
        for part in self.other_param_names:
            setattr(self, part, BufferDict(persistent=True) if part in self.buffer_names else {})
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: C) -> None:
        """Adds an adapter, or resets an existing one."""
        self.create(adapter_name, config)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def create(self, adapter_name: str, config: C) -> None:
        """Creates an adapter's initial tensors, in float32: bfloat16 would lose small steps."""
        raise NotImplementedError

    def effective_weight(self, weight: Tensor, names: list[str]) -> Tensor:
        """The weight (out_features, in_features) of ``weight`` under the named adapters, in its dtype."""
        raise NotImplementedError

    def adapted(self, x: Tensor, names: list[str]) -> Tensor:
        """(..., in_features) to (..., out_features), under the named adapters."""
        raise NotImplementedError

    def _present(self, names: list[str]) -> list[str]:
        """The named adapters that this layer has."""
        parameters = getattr(self, self.adapter_layer_names[0])
        return [name for name in names if name in parameters]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's version also casts the adapter to the layer's dtype, which would round a loaded one to bfloat16
        target = self.weight.device if device is None else device
        for part in (*self.adapter_layer_names, *self.buffer_names):
            tensors = getattr(self, part)
            if adapter_name in tensors and not tensors[adapter_name].is_meta:
                tensors[adapter_name] = tensors[adapter_name].to(target)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Puts the effective weight of some adapters, by default of the active ones, into the base layer.

        Raises:
            ValueError: ``safe_merge``, and a value is not finite; or the weight is packed.
        """
        if isinstance(self.get_base_layer(), PackedLinear):
            raise ValueError("a packed weight cannot be merged in memory; sppctl merge works on the files")
        names = self._present(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        source = self._unmerged_weight()
        merged = self.effective_weight(source, [*self.merged_adapters, *names])
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"merging {', '.join(names)} gives values that are not finite; the adapter is broken")
        self._weight_before_merge = source
        self.weight.data = merged
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Restores the weight as it was before the first merge, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.weight.data = self._unmerged_weight()
        self._weight_before_merge = None
        self.merged_adapters.clear()

    def _unmerged_weight(self) -> Tensor:
        """The weight as it was before the first merge, on the device and in the dtype that the model has by now."""
        weight, before = self.weight.data, self._weight_before_merge
        return weight if before is None else before.to(weight.device, weight.dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in_features) to (..., out_features), under the active adapters."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = self._present(self.active_adapters)
        if self.disable_adapters or self.merged or not active:
            return cast(Tensor, self.base_layer(x, *args, **kwargs))
        return self.adapted(x, active)

    def __repr__(self) -> str:
        return f"{type(self).__module__.split('.')[-2]}.{super().__repr__()}"


class BranchLinear(SparseLinear[B]):
    """Each adapter is a branch of two factors, with a scale and with dropout on its input; branches add up."""

    other_param_names = ("r", "scaling", "dropout")
    takes_packed = True
    r: dict[str, int]
    scaling: dict[str, float]
    dropout: dict[str, float]

    def update_layer(self, adapter_name: str, config: B) -> None:
        """Adds an adapter, or resets an existing one."""
        self.r[adapter_name], self.scaling[adapter_name] = config.r, config.scale
        self.dropout[adapter_name] = config.dropout
        super().update_layer(adapter_name, config)

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """The two factors of an adapter, in the order of ``adapter_layer_names``."""
        first, second = (getattr(self, part)[adapter] for part in self.adapter_layer_names)
        return first, second

    def branches(self, names: list[str]) -> list[Branch]:
        """Factors, scale and dropout of the named adapters."""
        return [
            (*self.factors(name), self.scaling[name], self.dropout[name] if self.training else 0.0) for name in names
        ]
