"""Ways of training a pruned model that leave it sparse, as PEFT methods."""

import peft  # noqa: F401  # first of all: as soon as it is there, all methods are registered (sppctl/__init__.py)
