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
    from sppctl.pattern import Pattern as Pattern
    from sppctl.pruners import prune_linear as prune_linear

_HOMES = {
    "MaskedFullConfig": "sppctl.adapters.masked_full",
    "MaskedLoraConfig": "sppctl.adapters.masked_lora",
    "Pattern": "sppctl.pattern",
    "SppConfig": "sppctl.adapters.spp",
    "SppModel": "sppctl.adapters.spp",
    "SteConfig": "sppctl.adapters.ste",
    "prune_linear": "sppctl.pruners",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sppctl' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


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
