"""PEFT methods that train a pruned model and keep it sparse."""

import peft  # noqa: F401  # first: importing it registers all methods (sppctl/__init__.py)
