"""A linear layer whose mask is re-selected during training.

V float32 is dense and trained, the mask M keeps its largest magnitudes: N of every M, or as many in each row as the
pruned weight has. The layer computes with M * V; the gradient reaches all of V as if there were no mask (the
straight-through estimator of Eq. 2, arXiv 2405.16057), and V outside the mask is pulled towards zero (SR-STE, arXiv
2102.04010), which keeps the mask stable.
"""

from __future__ import annotations

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor

from sppctl.adapters.config import SparseConfig
from sppctl.adapters.masked_full.layer import MaskedFullLinear
from sppctl.adapters.ste.config import SteConfig
from sppctl.pattern import Pattern
from sppctl.pruners.masks import keep_largest_of_rows, mask_by_row


class SteLinear(MaskedFullLinear):
    """A frozen linear layer, V (out, in) and its mask (out, in) bool.

    The mask is stored with the adapter: it is the one that V was last trained under, not a function of V.
    """

    adapter_layer_names = ("ste_weight",)
    buffer_names = ("ste_mask",)
    other_param_names = ("ste_mask", "pattern")
    straight_through = True
    ste_mask: BufferDict
    pattern: dict[str, Pattern | None]

    def mask(self, adapter_name: str, weight: Tensor) -> Tensor:
        """The adapter's stored mask."""
        mask: Tensor = self.ste_mask[adapter_name]
        return mask

    def create(self, adapter_name: str, config: SparseConfig) -> None:
        """Starts at the pruned weight and its mask."""
        assert isinstance(config, SteConfig)
        super().create(adapter_name, config)
        self.pattern[adapter_name] = None if config.pattern is None else Pattern.parse(config.pattern)
        # from the weight, because V is on the meta device while PEFT loads an adapter
        self.ste_mask[adapter_name] = self._first_mask(adapter_name, self.weight.detach().float())

    @torch.no_grad()
    def start_at(self, adapter_name: str, weight: Tensor) -> None:
        """Starts an adapter at a weight (out, in) that ``base_layer`` holds rounded, with the same zeros."""
        super().start_at(adapter_name, weight)
        self.ste_mask[adapter_name].copy_(self._first_mask(adapter_name, self.values(adapter_name)))

    @torch.no_grad()
    def select_mask(self, adapter_name: str) -> int:
        """Selects the mask again by the magnitudes of V.

        Returns:
            The number of weights that left the mask. As many entered it; at the first selection also those that were
            zero in places that N:M keeps.
        """
        mask = self._largest(adapter_name, self.values(adapter_name))
        dropped = int((self.ste_mask[adapter_name] & ~mask).sum())
        self.ste_mask[adapter_name].copy_(mask)
        return dropped

    def _largest(self, adapter_name: str, values: Tensor) -> Tensor:
        pattern = self.pattern[adapter_name]
        if pattern is not None:
            return mask_by_row(values.abs(), pattern)
        return keep_largest_of_rows(values.abs(), (self.weight == 0).sum(1))

    def _first_mask(self, adapter_name: str, values: Tensor) -> Tensor:
        """The pruned weight's own mask: a group with fewer than N weights that are not zero keeps only these."""
        return self._largest(adapter_name, values) & (values != 0)

    @torch.no_grad()
    def add_decay(self, adapter_name: str, decay: float) -> None:
        """Adds SR-STE's ``decay * (1 - M) * V`` to the gradient of V; once per optimizer step."""
        values = self.values(adapter_name)
        if values.grad is not None:
            values.grad.add_(values.masked_fill(self.ste_mask[adapter_name], 0), alpha=decay)
