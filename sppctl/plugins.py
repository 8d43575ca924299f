"""Pruners and allocations from outside the package, found by entry point or registered by an imported module."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable
from typing import Any

from sppctl.errors import UserError, first_line

PRUNERS, ALLOCATIONS = "sppctl.pruners", "sppctl.allocations"  # groups of entry points
imported: list[str] = []  # modules named by --import, in order
_registered: dict[str, dict[str, Any]] = {PRUNERS: {}, ALLOCATIONS: {}}


def import_module(name: str) -> None:
    """Imports a module that a user named on the command line (--import), also from the current directory.

    Raises:
        UserError: it cannot be imported.
    """
    if name in imported:
        return
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        importlib.import_module(name)
    except Exception as error:  # whatever the module's own code raises
        reason = f"{name} could not be imported ({type(error).__name__}: {first_line(error)})"
        raise UserError("--import", reason, "name an installed module, or one in the current directory") from error
    imported.append(name)


def flags() -> list[str]:
    """The arguments that make another process of sppctl import the same modules."""
    return [f"--import={name}" for name in imported]


def register(group: str, name: str, value: Any) -> None:
    """Makes a pruner or an allocation known by its name."""
    _registered[group][name] = value


def has(group: str, name: object) -> bool:
    """Whether a name is registered, or is an entry point of an installed package; nothing is imported."""
    return name in _registered[group] or any(point.name == name for point in _entry_points(group))


def find(group: str, name: str) -> Any:
    """What is known by a name.

    Raises:
        UserError: nothing is, or it cannot be imported.
    """
    if name in _registered[group]:
        return _registered[group][name]
    for point in _entry_points(group):
        if point.name == name:
            try:
                return _registered[group].setdefault(name, point.load())
            except Exception as error:
                problem = f"the entry point {point.value} could not be imported ({first_line(error)})"
                raise UserError(name, problem, "install its package again") from error
    raise UserError(f"{name!r} is not known; import the module that registers it (--import MODULE)")


def _entry_points(group: str) -> Iterable[Any]:
    from importlib.metadata import entry_points  # slow: only needed for names that are not sppctl's own

    return entry_points(group=group)
