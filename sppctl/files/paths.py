"""Paths as users write them on a command line or in YAML."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
import re
from pathlib import Path

from sppctl.errors import UserError

LONGEST_NAME, LONGEST_PATH = 255, 2048  # bytes; below the system's 4,096, as a run adds names to run.dir
LONGEST_STEM = 200  # bytes; leaves space for suffixes


def expand(path: str) -> str:
    """A path with the home directory in place of ``~`` or ``~user``.

    Raises:
        UserError: the home directory is unknown, the path is too long or contains a control character, or it names a
            variable that shells would replace: a configuration must not read the environment.
    """
    if len(os.fsencode(path)) > LONGEST_PATH or any(len(os.fsencode(part)) > LONGEST_NAME for part in path.split("/")):
        raise UserError(
            f"{path[:60]}... is longer than a path ({LONGEST_PATH:,} bytes) or a file name ({LONGEST_NAME}) can be"
        )
    if any(ord(character) < ord(" ") for character in path):
        raise UserError(f"the path {path!r} contains a control character")
    variable = re.search(r"\$\{?(\w+)", path)
    if variable and variable[1] in os.environ:
        raise UserError(path, f"${variable[1]} is not replaced", "write the full path, or let your shell replace it")
    if not path.startswith("~"):
        return path
    current_user = path.partition("/")[0] == "~"
    expanded = os.path.expanduser(path)
    # an empty HOME would mean the root directory
    if expanded.startswith("~") or (current_user and os.environ.get("HOME") == ""):
        reason = "HOME is not set" if current_user else "there is no such user"
        raise UserError(path, f"the home directory is not known ({reason})", "write the full path")
    return expanded


def file_stem(name: str) -> str:
    """The name; one that is too long for a file name is cut, and ends with a hash of the full name."""
    encoded = name.encode()
    if len(encoded) <= LONGEST_STEM:
        return name
    return f"{encoded[: LONGEST_STEM - 9].decode(errors='ignore')}-{hashlib.sha256(encoded).hexdigest()[:8]}"


def similar_directory(path: str) -> str | None:
    """The existing directory with the most similar name to a path that does not exist; None if none is similar."""
    found = Path()
    for part in Path(path).parts:
        name = part
        if not (found / part).is_dir():
            names: list[str] = []
            with contextlib.suppress(OSError):
                names = sorted(entry.name for entry in found.iterdir() if entry.is_dir())
            close = difflib.get_close_matches(part, names, n=1)
            if not close:
                return None
            name = close[0]
        found /= name
    return str(found)
