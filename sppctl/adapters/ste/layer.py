"""A linear layer whose mask is chosen again while it trains.

V float32 is dense and trained, the mask M keeps its largest magnitudes: N of every M, or as many in each row as the
pruned weight has. The layer computes with M * V; the gradient reaches all of V as if there were no mask (the
straight-through estimator of Eq. 2, arXiv 2405.16057), and V outside the mask is pulled towards zero (SR-STE, arXiv
2102.04010), so that a mask, once chosen, is left only for good reason.
"""

from __future__ import annotations

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from sppctl.adapters.linear import SparseLinear, only
from sppctl.adapters.masked_full.kernel import effective_weight, masked_linear
from sppctl.adapters.ste.config import SteConfig
from sppctl.pattern import Pattern
from sppctl.pruners.masks import keep_largest_of_rows, mask_by_row


class SteLinear(SparseLinear[SteConfig]):
    """``base_layer`` (an ``nn.Linear``, frozen), and V (out, in) float32 with its mask (out, in) bool.

    The mask is stored with the adapter: it is the one that V was last trained under, not a function of V. Only one
    adapter of a layer can be active.
    """

    adapter_layer_names = ("ste_weight",)
    other_param_names = ("ste_mask",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: SteConfig) -> None:
        super().__init__(base_layer, adapter_name, config)
        self.pattern: dict[str, Pattern | None] = {}
        self.ste_weight = nn.ParameterDict({})
        self.ste_mask = BufferDict(persistent=True)
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: SteConfig) -> None:
        """Adds an adapter, or starts one anew at the pruned weight."""
        self.pattern[adapter_name] = None if config.pattern is None else Pattern.parse(config.pattern)
        values = self._linear().weight.detach().to(torch.float32, copy=True)
        self.ste_weight[adapter_name] = nn.Parameter(values)
        self.ste_mask[adapter_name] = self._first_mask(adapter_name, values)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def start_at(self, adapter_name: str, weight: Tensor) -> None:
        """Starts an adapter at a weight (out, in) that ``base_layer`` holds rounded, with the same zeros."""
        self.ste_weight[adapter_name].copy_(weight)
        self.ste_mask[adapter_name].copy_(self._first_mask(adapter_name, self.ste_weight[adapter_name]))

    @torch.no_grad()
    def select_mask(self, adapter_name: str) -> int:
        """Chooses the mask anew by the magnitudes of V.

        Returns:
            How many weights have left the mask. As many have entered, and at the first selection as many more as there
            were zeros in the places that N:M keeps.
        """
        mask = self._largest(adapter_name, self.ste_weight[adapter_name])
        left = int((self.ste_mask[adapter_name] & ~mask).sum())
        self.ste_mask[adapter_name].copy_(mask)
        return left

    def _largest(self, adapter_name: str, values: Tensor) -> Tensor:
        pattern = self.pattern[adapter_name]
        if pattern is not None:
            return mask_by_row(values.abs(), pattern)
        return keep_largest_of_rows(values.abs(), (self._linear().weight == 0).sum(1))

    def _first_mask(self, adapter_name: str, values: Tensor) -> Tensor:
        """The pruned weight's own mask: a group with fewer than N weights that are not zero keeps only these."""
        return self._largest(adapter_name, values) & (values != 0)

    @torch.no_grad()
    def add_decay(self, adapter_name: str, decay: float) -> None:
        """Adds SR-STE's ``decay * (1 - M) * V`` to the gradient of V; once per optimizer step."""
        values = self.ste_weight[adapter_name]
        if values.grad is not None:
            values.grad.add_(values.masked_fill(self.ste_mask[adapter_name], 0), alpha=decay)

    def effective_weight(self, weight: Tensor, names: list[str]) -> Tensor:
        """The trained weight under its own mask.

        Raises:
            ValueError: several adapters.
        """
        name = only(names)
        return effective_weight(self.ste_weight[name], self.ste_mask[name], weight.dtype)

    def adapted(self, x: Tensor, names: list[str]) -> Tensor:
        """The product with the trained weight under its own mask."""
        name, linear = only(names), self._linear()
        values, mask = self.ste_weight[name], self.ste_mask[name]
        return masked_linear(x, values, mask, linear.weight, linear.bias, straight_through=True)
