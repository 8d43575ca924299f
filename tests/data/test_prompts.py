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
    text, (start,) = found.text(row | {"output": "3"})
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
    assert chatty.text(ROW) == (asked + answered, [len(asked)])
    assert chatty.text(ROW | {"input": " "})[0] == "<|user|>\nAdd.<|end|>\n<|assistant|>\n3<|end|>\n"
    assert not chatty.special_tokens
    assert chatty.ends
    assert not style("chat", chatting(CHAT.replace("<|end|>\n", "\n"))).ends


@pytest.mark.parametrize("output", ["<b>", "", "x", " <think>"])
def test_a_response_that_begins_as_the_prompt_goes_on_is_whole(output: str) -> None:
    """The prompt asks for reasoning (<think>) that the template leaves out once there is an answer."""
    chatty = style("chat", chatting(TEMPLATES["asked to reason, which is left out"][0]))
    text, (start,) = chatty.text(ROW | {"output": output})
    assert text[start:] == f"{output}<|end|>\n"


def test_a_template_that_fails_on_one_row_names_it() -> None:
    chatty = style(
        "chat", chatting("{% if 'two' in messages[0].content %}{{ raise_exception('no two') }}{% endif %}" + CHAT)
    )
    chatty.text(ROW)
    with pytest.raises(UserError, match=r"fails on a conversation: no two \('Add two\.'\)"):
        chatty.text(ROW | {"instruction": "Add two."})


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "the tokenizer has no chat template; use alpaca"),
        ("{{ raise_exception('a system message is needed') }}", "fails on a conversation: a system message is needed"),
        ("{% for m in messages %}{{ m.content", "fails on a conversation"),
        ("{{ messages[0].content }}", "leaves out the assistant's response"),
        ("{{ messages | length }}" + CHAT, "writes a question differently once it is answered"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "takes longer than 1 s"),
    ],
)
def test_tokenizers_that_cannot_chat(template: str | None, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "SECONDS", 1)
    with pytest.raises(UserError, match=rf"^train\.data\.prompt: .*{words}"):
        style("chat", chatting(template))


def said(found: Style, messages: list[dict[str, Any]]) -> list[str]:
    """The responses of a conversation."""
    text, borders = found.text({"messages": messages})
    ends = [*borders[1::2], len(text)]
    return [text[start:end] for start, end in zip(borders[::2], ends, strict=False)]


def talk(*contents: str, roles: str = "ua") -> list[dict[str, Any]]:
    names = {"u": "user", "a": "assistant", "s": "system", "d": "developer", "t": "tool"}
    return [{"role": names[role], "content": content} for role, content in zip(roles * 9, contents, strict=False)]


# history is written without the reasoning block that the last answer starts with
REASONING = (
    "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n"
    "{% endif %}{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHAT, ["b<|end|>\n", "xdx<|end|>\n"]),
        (REASONING, ["b<|end|>\n", "<think>\n\n</think>\n\nxdx<|end|>\n"]),
        (TEMPLATES["a blank in front"][0], [" b </s>", " xdx </s>"]),
        (TEMPLATES["rewritten"][0], ["B<|end|>\n", "XDX<|end|>\n"]),
        (TEMPLATES["asked to reason, which is left out"][0], ["b<|end|>\n", "xdx<|end|>\n"]),
    ],
)
def test_every_answer_of_a_conversation_is_a_response(template: str, expected: list[str]) -> None:
    assert said(style("alpaca", chatting(template), kind="conversation"), talk("a?", "b", "c?", "xdx")) == expected


def test_messages_of_weight_0_and_a_last_question_are_no_responses() -> None:
    chatty = style("chat", chatting(), kind="conversation")
    messages = talk("Be short.", "a?", "b", "c?", "d", "e?", roles="suauau")
    assert said(chatty, messages) == ["b<|end|>\n", "d<|end|>\n"]
    messages[2]["weight"] = 0
    assert said(chatty, messages) == ["d<|end|>\n"]
    assert said(chatty, messages[:2]) == []


@pytest.mark.parametrize("weight", [0, 1])
def test_marked_messages_of_weight_0_are_no_responses(weight: int) -> None:
    tokenizer = chatting(TEMPLATES["marked"][0])
    chatty = style("chat", tokenizer, kind="conversation")
    assert chatty.marked is not None
    messages = talk("a?", "b", "c?", "d")
    messages[1]["weight"] = weight
    tokens, marks = chatty.marked({"messages": messages})
    response = tokenizer.decode([token for token, mark in zip(tokens, marks, strict=True) if mark])
    assert response == "b<|end|>" * weight + "d<|end|>"
    assert len(chatty.text({"messages": messages})[1]) == 2 - weight


# writes the reasoning of the last answer, as Qwen3's
THINKING = CHAT.replace(
    "{{ m['content'] }}",
    "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m['content'] }}",
)
MARKED_THINKING = TEMPLATES["marked"][0].replace(
    "{% generation %}", "{% generation %}{% if loop.last %}{{ m.reasoning_content }}: {% endif %}"
)


def test_reasoning_is_learned_where_the_template_writes_it() -> None:
    messages = talk("a?", "b", "c?", "d")
    messages[1]["reasoning_content"] = "about b"  # which is not written in a later turn
    messages[3]["reasoning_content"] = "about d"
    chatty = style("alpaca", chatting(THINKING), kind="conversation")
    assert said(chatty, messages) == ["b<|end|>\n", "<think>about d</think>d<|end|>\n"]
    tokenizer = chatting(MARKED_THINKING)
    marked = style("alpaca", tokenizer, kind="conversation").marked
    assert marked is not None
    tokens, marks = marked({"messages": messages})
    learned = tokenizer.decode([token for token, mark in zip(tokens, marks, strict=True) if mark])
    assert learned == "b<|end|>about d: d<|end|>"


@pytest.mark.parametrize(
    ("template", "key", "problem"),
    [
        (CHAT, "reasoning_content", "which the tokenizer's chat template does not write"),
        (CHAT, "reasoning", "which the tokenizer's chat template does not write"),
        (TEMPLATES["marked"][0], "thinking", "which the tokenizer's chat template does not write"),
        (None, "reasoning_content", "which cannot be written, because the tokenizer has no chat template"),
    ],
)
def test_reasoning_that_is_not_written_is_refused(template: str | None, key: str, problem: str) -> None:
    chatty = style("alpaca", chatting(template), kind="conversation")
    messages = talk("a?", "b")
    chatty.text({"messages": messages})
    messages[1][key] = "why b"
    with pytest.raises(UserError) as caught:
        chatty.text({"messages": messages, "where": "train.data.dataset: own: row 2"})
    expected = f"train.data.dataset: own: row 2 has {key}, {problem}; write it into the content, or remove the key"
    assert str(caught.value) == expected


def test_names_are_written_and_need_not_be() -> None:
    messages = talk("a?", "b")
    messages[0]["name"] = "Ann"
    named = style("chat", chatting(CHAT.replace("|>\n{{", "|>\n{{ m.name }}{{")), kind="conversation")
    assert named.text({"messages": messages})[0].startswith("<|user|>\nAnna?<|end|>")
    assert said(style("chat", chatting(), kind="conversation"), messages) == ["b<|end|>\n"]


# as those of Zephyr and Phi-3: messages of other roles are left out
STRICT = CHAT.replace("%}<|{{", "%}{% if m.role in ('system', 'user', 'assistant') %}<|{{").replace(
    "<|end|>\n", "<|end|>\n{% endif %}", 1
)
REFUSING = CHAT.replace(
    "%}<|{{", "%}{% if m.role == 'developer' %}{{ raise_exception('no developers') }}{% endif %}<|{{"
)
MARKED_STRICT = STRICT.replace("{{ m['content'] }}", "{% generation %}{{ m['content'] }}{% endgeneration %}")


@pytest.mark.parametrize("template", [STRICT, MARKED_STRICT])
def test_messages_of_a_role_that_the_template_leaves_out_are_refused(template: str) -> None:
    chatty = style("chat", chatting(template), kind="conversation")
    chatty.text({"messages": talk("Be short.", "a?", "b", roles="sua")})
    for write in filter(None, (chatty.text, chatty.marked)):
        with pytest.raises(UserError, match=r"does not write messages of the role tool \('a\?'\); leave them"):
            write({"messages": talk("a?", "call", "found", "b", roles="uata")})
    written = style("chat", chatting(), kind="conversation").text({"messages": talk("a?", "found", "b", roles="uta")})
    assert "<|tool|>\nfound<|end|>" in written[0]


@pytest.mark.parametrize(
    ("template", "role"), [(CHAT, "developer"), (STRICT, "system"), (MARKED_STRICT, "system"), (REFUSING, "system")]
)
def test_developers_are_the_system_where_the_template_does_not_know_them(template: str, role: str) -> None:
    chatty = style("chat", chatting(template), kind="conversation")
    for _ in range(2):
        text, _ = chatty.text({"messages": talk("Be short.", "a?", "b", roles="dua")})
        assert text == f"<|{role}|>\nBe short.<|end|>\n<|user|>\na?<|end|>\n<|assistant|>\nb<|end|>\n"


def test_developers_are_refused_where_the_template_knows_no_system_either() -> None:
    chatty = style("chat", chatting(STRICT.replace("'system', ", "")), kind="conversation")
    with pytest.raises(UserError, match="does not write messages of the role developer"):
        chatty.text({"messages": talk("Be short.", "a?", "b", roles="dua")})


def test_completions_follow_their_prompts_directly_unless_chat_is_chosen() -> None:
    row = {"prompt": "1 + 1 =", "completion": " 2"}
    assert style("alpaca", chatting(), kind="completion").text(row) == ("1 + 1 = 2", [7])
    asked = "<|user|>\n1 + 1 =<|end|>\n<|assistant|>\n"
    assert style("chat", chatting(), kind="completion").text(row) == (asked + " 2<|end|>\n", [len(asked)])
