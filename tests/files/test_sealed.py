from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sppctl.errors import UserError
from sppctl.files.sealed import parse, read, seal

RECORD = {"stage": "prune", "blocks": {2: 0.5, 10: 0.25}, "shape": (3, 4), "none": None}
AS_READ = {"stage": "prune", "blocks": {"2": 0.5, "10": 0.25}, "shape": [3, 4], "none": None}


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "stage.json"
    path.write_text(json.dumps(seal(RECORD), indent=2))
    assert read(path, "do it again") == AS_READ


def test_any_flipped_bit_is_seen() -> None:
    text = json.dumps(seal({"loss": 2.5, "name": "é"})).encode()
    for place in range(len(text)):
        damaged = text[:place] + bytes([text[place] ^ 1]) + text[place + 1 :]
        with pytest.raises(ValueError):  # noqa: PT011 (its messages are those below)
            parse(damaged)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda record: record | {"stage": "train"}, "is damaged (its content does not match its digest)"),
        (
            lambda record: record | {"format": 7},
            "has format 7, and this version of sppctl reads format 1; use the version",
        ),
        (lambda record: {"a": 1, "digest": record["digest"]}, "has format None"),
        (lambda record: {"stage": "prune"}, "is damaged (it has no format number"),
        (lambda record: [record], "is damaged (it is not a JSON object)"),
        *((lambda _, text=text: text, "is damaged (") for text in (b"", b"{", b"\xff\xfe", b"[" * 100_000)),
    ],
)
def test_what_is_wrong_is_said_with_the_way_out(change: Any, problem: str, tmp_path: Path) -> None:
    path, content = tmp_path / "stage.json", change(seal(RECORD))
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(UserError) as caught:
        read(path, "do it again")
    assert str(caught.value).startswith(f"{path} {problem}")
    assert str(caught.value).endswith(" do it again")
