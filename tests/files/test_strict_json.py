from __future__ import annotations

import ast
import json
import math
from pathlib import Path

import pytest

import sppctl
from sppctl.files import strict_json

ODD = {"loss": math.nan, "rows": [1.5, -math.inf, (math.inf, 2)], "deep": {"text": "NaN", "none": None, "number": 3}}


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    path = tmp_path / "new" / "record.json"
    strict_json.write(path, ODD)
    text = path.read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "loss": None,
        "rows": [1.5, None, [None, 2]],
        "deep": {"text": "NaN", "none": None, "number": 3},
    }
    assert strict_json.dumps(ODD, indent=2) + "\n" == text
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    strict_json.write(path, {"a": 1})
    with pytest.raises(TypeError):
        strict_json.write(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_else_writes_numbers_as_json() -> None:
    """Headers of weights, a model's own configuration, and what is only hashed or quoted hold no measured numbers."""
    package = Path(sppctl.__file__).parent
    others = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("dump", "dumps") and ast.unparse(node.value) == "json"
    }
    assert others <= {
        "files/strict_json.py",
        "config/load.py",
        "data/formats.py",
        "records.py",
        "files/sealed.py",
        "files/cache.py",
        "model/checkpoint.py",
        "files/integrity.py",
        "files/safe_files.py",
        "report/significance.py",
    }
