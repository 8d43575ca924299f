"""Paths as they are written on a command line or in YAML."""

from __future__ import annotations

import hashlib
import os

from sppctl.errors import UserError

LONGEST_NAME, LONGEST_PATH = 255, 2048  # bytes; a run adds names of its own to run.dir
LONGEST_STEM = 200  # bytes of a file name: the rest is for suffixes


def expand(path: str) -> str:
    """A path with the home directory in place of ``~`` or ``~user``.

    Raises:
        UserError: that home directory is not known, or the path is longer than any, or has a control character in it.
    """
    if len(os.fsencode(path)) > LONGEST_PATH or any(len(os.fsencode(part)) > LONGEST_NAME for part in path.split("/")):
        raise UserError(
            f"{path[:60]}... is longer than a path ({LONGEST_PATH:,} bytes) or a file name ({LONGEST_NAME}) can be"
        )
    if any(ord(character) < ord(" ") for character in path):
        raise UserError(f"the path {path!r} contains a control character")
    if not path.startswith("~"):
        return path
    of_user = path.partition("/")[0] == "~"
    expanded = os.path.expanduser(path)
    # an empty HOME would mean the root directory
    if expanded.startswith("~") or (of_user and os.environ.get("HOME") == ""):
        what = "HOME is not set" if of_user else "there is no such user"
        raise UserError(f"{path}: the home directory is not known ({what}); write the whole path")
    return expanded


def file_stem(name: str) -> str:
    """The name, shortened to a hash of itself at its end where no file could have it with a suffix of ours."""
    encoded = name.encode()
    if len(encoded) <= LONGEST_STEM:
        return name
    return f"{encoded[: LONGEST_STEM - 9].decode(errors='ignore')}-{hashlib.sha256(encoded).hexdigest()[:8]}"
