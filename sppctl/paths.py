"""Paths as they are written on a command line or in YAML."""

from __future__ import annotations

import os

from sppctl.errors import UserError


def expand(path: str) -> str:
    """A path whose ``~`` or ``~user`` is replaced by that home directory; any other path as it is.

    Raises:
        UserError: that home directory is not known.
    """
    if not path.startswith("~"):
        return path
    own = path.partition("/")[0] == "~"
    found = os.path.expanduser(path)
    if found.startswith("~") or (own and os.environ.get("HOME") == ""):  # an empty HOME would mean the root directory
        what = "HOME is not set" if own else "there is no such user"
        raise UserError(f"{path}: the home directory is not known ({what}); write the whole path")
    return found
