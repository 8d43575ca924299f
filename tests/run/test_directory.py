"""The last step of a stage, in several processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sppctl import distributed
from sppctl.config.load import load_config
from sppctl.records import Attempt
from sppctl.run.directory import Run


def test_the_first_process_waits_until_the_others_have_the_record(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could end before its broadcast has arrived."""

    def decide(choose: Callable[[], object]) -> str:
        calls.append("record")
        return "record"

    calls: list[str] = []
    monkeypatch.setattr(distributed, "decide", decide)
    monkeypatch.setattr(distributed, "barrier", lambda: calls.append("barrier"))
    published: object = Run(load_config(str(config_file)))._publish_with_record("prune", Attempt({}, {}), "", 1.0, None)
    assert published == "record"
    assert calls == ["record", "barrier"]
