"""A chat template that does not end, or takes all memory, is ended in a process of its own."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from conftest import byte_tokenizer

from sppctl.data import chat
from sppctl.errors import UserError

CHATS = [[{"role": "user", "content": "Hello"}]]
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def templated(template: str) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (LOOP, r"takes longer than 1 s"),
        ("{% if add_generation_prompt %}" + LOOP + "{% endif %}", r"takes longer than 1 s"),
        ("{{ 'long' * 1000000 }}", "makes 4,000,000 characters"),
        ("{{ ('x' * 3000000000) | length }}", "takes more than 1 GiB"),
    ],
    ids=["loop", "loop in a generation prompt", "long", "memory"],
)
def test_a_template_without_measure_is_refused(template: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "SECONDS", 1)
    with pytest.raises(
        UserError, match=rf"^some\.key: the tokenizer's chat template {problem} on a short message; fix"
    ):
        chat.try_template(templated(template), CHATS, "some.key")
    assert not psutil.Process().children()


def test_a_template_that_crashes_is_refused() -> None:
    def crash(*_: Any, **__: Any) -> str:
        os._exit(9)

    with pytest.raises(UserError, match="chat template crashes on a short message"):
        chat.try_template(SimpleNamespace(chat_template="x", apply_chat_template=crash), CHATS, "some.key")


def test_without_proc_the_memory_alone_is_not_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "STATM", tmp_path / "absent")
    chat.try_template(templated("{{ messages[0].content }} on macOS"), CHATS, "some.key")
    with pytest.raises(UserError, match="makes 4,000,000 characters"):
        chat.try_template(templated("{{ 'long' * 1000000 }}"), CHATS, "some.key")


def test_what_a_template_raises_is_left_to_who_uses_it() -> None:
    chat.try_template(templated("{{ raise_exception('No.') }}"), CHATS, "some.key")


def test_a_template_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = templated("{{ messages[0].content }} once")
    chat.try_template(tokenizer, CHATS, "some.key")
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("tried again"))
    chat.try_template(tokenizer, CHATS, "some.key")
