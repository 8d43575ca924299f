"""Standard JSON, without NaN: one writer for records, results, reports and the output of ``--json``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from sppctl.files import disk


def finite(value: Any) -> Any:
    """The value with None for numbers that are not finite, which JSON does not allow; tuples become lists."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def dumps(value: Any, **options: Any) -> str:
    """The JSON text of a value; numbers that are not finite become null."""
    return json.dumps(finite(value), allow_nan=False, **options)


def write(path: Path, value: Any) -> None:
    """Writes a value as JSON with :func:`sppctl.files.disk.write`."""
    disk.write(path, dumps(value, indent=2) + "\n")
