"""sppctl: prune, retrain, merge and evaluate sparse language models that stay sparse.

Importing the package is cheap (no torch) and registers its adapters with PEFT as soon as PEFT is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sppctl.adapters.masked_full import MaskedFullConfig as MaskedFullConfig
    from sppctl.adapters.masked_lora import MaskedLoraConfig as MaskedLoraConfig
    from sppctl.adapters.spp import SppConfig as SppConfig
    from sppctl.adapters.spp import SppModel as SppModel
    from sppctl.adapters.ste import SteConfig as SteConfig
    from sppctl.evaluate.in_memory import evaluate_model as evaluate_model
    from sppctl.merge.in_memory import merge_adapter as merge_adapter
    from sppctl.pattern import Pattern as Pattern
    from sppctl.prune.in_memory import prune_model as prune_model
    from sppctl.pruners import Pruner as Pruner
    from sppctl.pruners import prune_linear as prune_linear
    from sppctl.pruners.allocate import Allocation as Allocation
    from sppctl.pruners.registry import register_allocation as register_allocation
    from sppctl.pruners.registry import register_pruner as register_pruner

_HOMES = {
    "Allocation": "sppctl.pruners.allocate",
    "MaskedFullConfig": "sppctl.adapters.masked_full",
    "MaskedLoraConfig": "sppctl.adapters.masked_lora",
    "Pattern": "sppctl.pattern",
    "Pruner": "sppctl.pruners",
    "SppConfig": "sppctl.adapters.spp",
    "SppModel": "sppctl.adapters.spp",
    "SteConfig": "sppctl.adapters.ste",
    "evaluate_model": "sppctl.evaluate.in_memory",
    "merge_adapter": "sppctl.merge.in_memory",
    "prune_linear": "sppctl.pruners",
    "prune_model": "sppctl.prune.in_memory",
    "register_allocation": "sppctl.pruners.registry",
    "register_pruner": "sppctl.pruners.registry",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sppctl' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


def _register_with_peft() -> None:
    """Registers the adapters now if PEFT is loaded, else when it is first imported: ``import sppctl`` stays cheap."""
    import importlib.abc
    import importlib.util
    import sys

    def register() -> None:
        for home in _HOMES.values():
            if home.startswith("sppctl.adapters."):
                importlib.import_module(home)

    if "peft" in sys.modules:
        register()
        return

    class _AfterPeft(importlib.abc.MetaPathFinder):
        """Finds peft with the other finders, and registers the adapters right after it is loaded."""

        searching = False

        def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
            if fullname != "peft" or self.searching:
                return None
            self.searching = True
            try:
                spec = importlib.util.find_spec(fullname)
            finally:
                self.searching = False
            if spec is None or spec.loader is None:
                return spec
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                execute(module)
                register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
            return spec

    sys.meta_path.insert(0, _AfterPeft())


_register_with_peft()
