"""Pruners and allocations by name: sppctl's own, and those from outside the package."""

from __future__ import annotations

from sppctl import plugins
from sppctl.errors import UserError
from sppctl.pruners import PRUNERS, Pruner
from sppctl.pruners.allocate import ALLOCATIONS, Allocation


def register_pruner(name: str, pruner: Pruner) -> None:
    """Makes a pruner usable as ``prune.method=NAME`` and in :func:`sppctl.prune_model`.

    Raises:
        ValueError: the name is that of one of sppctl's own pruners.
    """
    if name in PRUNERS:
        raise ValueError(f"{name!r} is one of sppctl's own pruners; choose another name")
    plugins.register(plugins.PRUNERS, name, pruner)


def register_allocation(name: str, allocation: Allocation) -> None:
    """Makes an allocation usable as ``prune.allocation=NAME``.

    Raises:
        ValueError: the name is ``uniform`` or that of one of sppctl's own allocations.
    """
    if name == "uniform" or name in ALLOCATIONS:
        raise ValueError(f"{name!r} is one of sppctl's own allocations; choose another name")
    plugins.register(plugins.ALLOCATIONS, name, allocation)


def find_pruner(name: str) -> Pruner:
    """The pruner of a name; UserError if there is none."""
    pruner = PRUNERS.get(name) or plugins.find(plugins.PRUNERS, name)
    if not isinstance(pruner, Pruner):
        raise UserError("prune.method", f"{name} is a {type(pruner).__name__}, not a sppctl.pruners.Pruner")
    return pruner


def find_allocation(name: str) -> Allocation:
    """The allocation of a name; UserError if there is none."""
    allocation = ALLOCATIONS.get(name) or plugins.find(plugins.ALLOCATIONS, name)
    if not isinstance(allocation, Allocation):
        kind = type(allocation).__name__
        raise UserError("prune.allocation", f"{name} is a {kind}, not a sppctl.pruners.allocate.Allocation")
    return allocation
