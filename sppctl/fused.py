"""GPU kernels (Triton) that replace PyTorch's operations where they run and are right.

Each module of kernels is tested once on each device, on small tensors. Triton may be missing, find no C compiler for
its launchers, not know the GPU, or be wrong on it: then a warning says why, and PyTorch's own operations are used.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from sppctl.errors import first_line


@dataclass(frozen=True)
class FusedKernels:
    """A module of kernels.

    Attributes:
        module: its full name; it is imported only where it could be used, because it needs Triton.
        check: takes the module and a device; raises if the kernels do not run there or give wrong results.
        without: what it means to do without them, for the warning.
    """

    module: str
    check: Callable[[ModuleType, torch.device], None]
    without: str

    def usable(self, tensor: Tensor) -> ModuleType | None:
        """The module, if it can be used for this tensor: contiguous, and on a GPU on which the check passed."""
        return self.on(tensor.device) if tensor.is_cuda and tensor.is_contiguous() else None

    def on(self, device: torch.device) -> ModuleType | None:
        """The module, if the check passed on this device; else None, with a warning the first time."""
        return _checked(self, device)


@functools.cache
def _checked(kernels: FusedKernels, device: torch.device) -> ModuleType | None:
    try:
        module = importlib.import_module(kernels.module)
        kernels.check(module, device)
    except Exception as error:  # whatever the reason, there is another way
        warnings.warn(f"{kernels.without}: {first_line(error)}", stacklevel=4)
        return None
    return module
