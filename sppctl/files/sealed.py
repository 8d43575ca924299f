"""JSON records that hold a format number and a digest of their content, so that damage is detected."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sppctl.errors import UserError
from sppctl.files import strict_json

FORMAT = 1  # raised when an older version of sppctl could misread a newer record
SEAL = ("format", "digest")


class UnknownFormatError(ValueError):
    """A record written by another version of sppctl."""


def seal(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with a format number and a digest."""
    # the digest must be that of the record as read back: JSON turns tuples into lists, and numbers as keys into text
    content: dict[str, Any] = json.loads(strict_json.dumps(record))
    return content | {"format": FORMAT, "digest": _digest(content)}


def write(path: Path, record: Mapping[str, Any]) -> None:
    """:func:`sppctl.files.strict_json.write` with a seal."""
    strict_json.write(path, seal(record))


def parse(text: str | bytes) -> dict[str, Any]:
    """The record in a JSON text, without its seal; raises ValueError with the reason if it is not intact."""
    try:
        record = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(record, dict):
        raise ValueError("it is not a JSON object")
    if not record.keys() & set(SEAL):
        raise ValueError("it has no format number: another program or an older version of sppctl wrote it")
    number, digest = (record.pop(key, None) for key in SEAL)
    if number != FORMAT:
        raise UnknownFormatError(f"has format {number!r}, and this version of sppctl reads format {FORMAT}")
    if digest != _digest(record):
        raise ValueError("its content does not match its digest")
    return record


def read(path: Path, remedy: str) -> dict[str, Any]:
    """The record in a file, without its seal; raises UserError with the ``remedy`` if it is missing or damaged."""
    try:
        return parse(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {remedy}") from error
    except UnknownFormatError as error:
        raise UserError(f"{path} {error}; use the version that wrote it, or: {remedy}") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); {remedy}") from error


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
