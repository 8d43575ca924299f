from __future__ import annotations

from typing import Any

import pytest
from conftest import byte_tokenizer

from sppctl.data import chat
from sppctl.data.prompts import Style, formatted, prompt_of, style
from sppctl.errors import UserError

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


# each with what the assistant says if the text is " No. ": all that the model has to write itself
TEMPLATES = {
    "end of turn": (CHAT, " No. <|end|>\n"),
    "the end of text": (CHAT.replace("<|end|>", "{{ eos_token }}"), " No. </s>\n"),
    "a blank in front": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}",
        "  No.  </s>",
    ),
    "stripped": (CHAT.replace("m['content']", "m['content'] | trim"), "No.<|end|>\n"),
    "rewritten": (CHAT.replace("m['content']", "m['content'] | upper"), " NO. <|end|>\n"),
    "no reasoning": (
        CHAT.replace(
            "{{ m['content'] }}", "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
        ),
        "<think>\n\n</think>\n\n No. <|end|>\n",
    ),
    "asked to reason, which is left out": (
        CHAT.replace("<|assistant|>\n", "<|assistant|>\n  <think>\n"),
        " No. <|end|>\n",
    ),
    "marked": (
        "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}"
        "<|end|>{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}\n{% endfor %}",
        "No.<|end|>",
    ),
}


def chatting(template: str | None = CHAT) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_the_two_prompts() -> None:
    assert prompt_of({"instruction": "Add.", "input": "1 and 2"}) == WITH_INPUT
    for row in ({"instruction": "Add.", "input": ""}, {"instruction": "Add."}, {"instruction": "Add.", "input": None}):
        assert prompt_of(row) == WITHOUT_INPUT
    assert formatted(ROW) == WITH_INPUT + "3"


def prompt(found: Style, row: dict[str, Any]) -> str:
    """What is in front of the response, which must be the rest."""
    text, start = found.text(row | {"output": "3"})
    assert text[start:] == "3"
    return text[:start]


def test_braces_in_a_row_are_just_text() -> None:
    row = {"instruction": "Explain {input} and {0}", "input": "x{"}
    assert "{input} and {0}" in prompt_of(row)
    assert prompt(style("Q: {instruction} ({input})", None), row) == "Q: Explain {input} and {0} (x{)"


def test_a_prompt_is_filled_with_the_fields_of_a_row() -> None:
    alpaca, own = style("alpaca", None), style("Task: {instruction}\nGiven: {input}\nAnswer:", None)
    assert (prompt(alpaca, ROW), alpaca.special_tokens, own.special_tokens) == (WITH_INPUT, True, True)
    assert prompt(own, ROW) == "Task: Add.\nGiven: 1 and 2\nAnswer:"
    for row in ({"instruction": "Add."}, {"instruction": "Add.", "input": None}):
        assert prompt(own, row) == "Task: Add.\nGiven: \nAnswer:"
    assert prompt(style("{{{instruction}}} {instruction}\n", None), ROW) == "{Add.} Add.\n"  # twice, and braces


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


def test_chat_speaks_as_the_template_does() -> None:
    chatty = style("chat", chatting())
    asked, answered = "<|user|>\nAdd.\n\n1 and 2<|end|>\n<|assistant|>\n", "3<|end|>\n"
    assert chatty.text(ROW) == (asked + answered, len(asked))
    assert chatty.text(ROW | {"input": " "})[0] == "<|user|>\nAdd.<|end|>\n<|assistant|>\n3<|end|>\n"
    assert not chatty.special_tokens
    assert chatty.ends
    assert not style("chat", chatting(CHAT.replace("<|end|>\n", "\n"))).ends


@pytest.mark.parametrize("output", ["<b>", "", "x", " <think>"])
def test_a_response_that_begins_as_the_prompt_goes_on_is_whole(output: str) -> None:
    """The prompt asks for reasoning (<think>) that the template leaves out once there is an answer."""
    chatty = style("chat", chatting(TEMPLATES["asked to reason, which is left out"][0]))
    text, start = chatty.text(ROW | {"output": output})
    assert text[start:] == f"{output}<|end|>\n"


def test_a_template_that_fails_on_one_row_names_it() -> None:
    chatty = style(
        "chat", chatting("{% if 'two' in messages[0].content %}{{ raise_exception('no two') }}{% endif %}" + CHAT)
    )
    chatty.text(ROW)
    with pytest.raises(UserError, match=r"fails on an instruction: no two \('Add two\.'\)"):
        chatty.text(ROW | {"instruction": "Add two."})


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "the tokenizer has no chat template; use alpaca"),
        ("{{ raise_exception('a system message is needed') }}", "fails on an instruction: a system message is needed"),
        ("{% for m in messages %}{{ m.content", "fails on an instruction"),
        ("{{ messages[0].content }}", "leaves out the assistant's response"),
        ("{{ messages | length }}" + CHAT, "writes a question differently once it is answered"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "takes longer than 1 s"),
    ],
)
def test_tokenizers_that_cannot_chat(template: str | None, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "SECONDS", 1)
    with pytest.raises(UserError, match=rf"^train\.data\.prompt: .*{words}"):
        style("chat", chatting(template))
