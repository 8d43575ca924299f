from __future__ import annotations

from typing import Any

import pytest
from conftest import byte_tokenizer

from sppctl.errors import UserError
from sppctl.lm import chat
from sppctl.lm.prompts import formatted, prompt_of, style

WITH_INPUT = """Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
Add.

### Input:
1 and 2

### Response:
"""
WITHOUT_INPUT = """Below is an instruction that describes a task. \
Write a response that appropriately completes the request.

### Instruction:
Add.

### Response:
"""
ROW = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def chatting(template: str | None = CHAT) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


# --- alpaca -----------------------------------------------------------------------------------------------------------


def test_the_two_prompts() -> None:
    assert prompt_of({"instruction": "Add.", "input": "1 and 2"}) == WITH_INPUT
    for row in ({"instruction": "Add.", "input": ""}, {"instruction": "Add."}, {"instruction": "Add.", "input": None}):
        assert prompt_of(row) == WITHOUT_INPUT
    assert formatted(ROW) == WITH_INPUT + "3"


def test_braces_in_a_row_are_just_text() -> None:
    row = {"instruction": "Explain {input} and {0}", "input": "x{"}
    assert "{input} and {0}" in prompt_of(row)
    assert style("Q: {instruction} ({input})", None).prompt(row) == "Q: Explain {input} and {0} (x{)"


def test_alpaca_is_the_default_style() -> None:
    alpaca = style("alpaca", None)
    assert (alpaca.prompt(ROW), alpaca.end, alpaca.special_tokens) == (WITH_INPUT, "", True)


# --- a text -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [{"instruction": "Add."}, {"instruction": "Add.", "input": None}])
def test_without_an_input_its_field_is_empty(row: dict[str, Any]) -> None:
    own = style("Task: {instruction}\nGiven: {input}\nAnswer:", None)
    assert own.prompt(row) == "Task: Add.\nGiven: \nAnswer:"
    assert own.prompt(ROW) == "Task: Add.\nGiven: 1 and 2\nAnswer:"
    assert (own.end, own.special_tokens) == ("", True)


def test_a_field_may_stand_twice_and_braces_are_written_twice() -> None:
    assert style("{{{instruction}}} {instruction}\n", None).prompt(ROW) == "{Add.} Add.\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Question: {question}", r"\{question\} in .* is neither \{instruction\} nor \{input\}"),
        ("{instruction} {}", r"\{\} in"),
        ("{instruction.__class__}", r"\{instruction.__class__\} in"),
        ("{instruction!r}", r"\{instruction!r\} in"),
        ("{instruction:>9}", r"\{instruction:>9\} in"),
        ("{instruction} {input", "expected '}' before end of string"),
        ("instruction}", "Single '}' encountered"),
        ("{input}", r"is neither alpaca nor chat, and as a text it lacks \{instruction\}"),
        ("Alpaca", r"'Alpaca' is neither alpaca nor chat, and as a text it lacks \{instruction\}"),
    ],
)
def test_texts_that_cannot_be_prompts(text: str, words: str) -> None:
    with pytest.raises(UserError, match=rf"^train\.data\.prompt: .*{words}"):
        style(text, None)


# --- chat -------------------------------------------------------------------------------------------------------------


def test_chat_speaks_as_the_template_does() -> None:
    chatty = style("chat", chatting())
    assert chatty.prompt(ROW) == "<|user|>\nAdd.\n\n1 and 2<|end|>\n<|assistant|>\n"
    assert chatty.prompt({"instruction": "Add.", "input": " "}) == "<|user|>\nAdd.<|end|>\n<|assistant|>\n"
    assert (chatty.end, chatty.special_tokens) == ("<|end|>", False)


def test_another_template_is_another_style() -> None:
    identities = {style("chat", chatting(template)).identity for template in (CHAT, CHAT + " ")}
    assert len(identities | {style(text, None).identity for text in ("alpaca", "{instruction}")}) == 4


def test_a_template_that_does_not_end_is_no_style(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "SECONDS", 1)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(UserError, match=r"^train\.data\.prompt: the tokenizer's chat template takes longer than 1 s"):
        style("chat", chatting(endless))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "the tokenizer has no chat template; use alpaca"),
        ("{{ raise_exception('a system message is needed') }}", "fails on an instruction: a system message is needed"),
        ("{% for m in messages %}{{ m.content", "fails on an instruction"),
        ("{{ messages[0].content }}", "leaves out what the assistant says"),
    ],
)
def test_tokenizers_that_cannot_chat(template: str | None, words: str) -> None:
    with pytest.raises(UserError, match=rf"^train\.data\.prompt: .*{words}"):
        style("chat", chatting(template))
