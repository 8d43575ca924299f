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
    ("change", "said"),
    [
        (lambda record: record | {"stage": "train"}, "is damaged (its content is not what was written)"),
        (
            lambda record: record | {"format": 7},
            "has format 7, and this version of sppctl reads format 1; use the version",
        ),
        (lambda record: {"stage": "prune"}, "is damaged (it has no format number"),
        (lambda record: [record], "is damaged (it is not a JSON object)"),
    ],
)
def test_what_is_wrong_is_said_with_the_way_out(change: Any, said: str, tmp_path: Path) -> None:
    path = tmp_path / "stage.json"
    path.write_text(json.dumps(change(seal(RECORD))))
    with pytest.raises(UserError) as caught:
        read(path, "do it again")
    assert str(caught.value).startswith(f"{path} {said}")
    assert str(caught.value).endswith(" do it again")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_json_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "stage.json").write_bytes(content)
    with pytest.raises(UserError, match=r"stage\.json is damaged"):
        read(tmp_path / "stage.json", "do it again")


def test_half_a_seal_is_none() -> None:
    with pytest.raises(ValueError, match="has format None"):
        parse(json.dumps({"a": 1, "digest": seal({"a": 1})["digest"]}))
