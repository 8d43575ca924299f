"""The formats of training data: what their columns become, and errors that say what there is and how to map it."""

from __future__ import annotations

from typing import Any

import pytest

from sppctl.data import formats
from sppctl.data.formats import KEY
from sppctl.errors import UserError

USER = {"role": "user", "content": "1 + 1?"}
ANSWER = {"role": "assistant", "content": "2"}
SYSTEM = {"role": "system", "content": "Be short."}
SHAREGPT = [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}]


def standard(*rows: dict[str, Any], **mapping: str) -> list[dict[str, Any]]:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    formats.check_mapping(mapping, {"own": columns})
    return formats.standard_rows(list(rows), columns, mapping, "own")


@pytest.mark.parametrize(
    ("row", "mapping", "expected"),
    [
        ({"instruction": "Add.", "input": "1", "output": "2", "text": "whole"}, {}, ("instruction", "input", "output")),
        ({"question": "Add.", "answer": "2"}, {"instruction": "question", "output": "answer"}, None),
        (
            {"instruction": "Add.", "output": "2", "context": "1"},
            {"input": "context"},
            {"instruction": "Add.", "output": "2", "input": "1"},
        ),
        # a mapped column decides on the format
        ({"instruction": "Add.", "output": "2", "body": "Prose."}, {"text": "body"}, {"text": "Prose."}),
        ({"prompt": "1 + 1 =", "completion": " 2"}, {}, ("prompt", "completion")),
        ({"prompt": "1 + 1?", "messages": [USER, ANSWER]}, {}, {"messages": [USER, ANSWER]}),
        ({"chat": [USER, ANSWER], "id": 1}, {"messages": "chat"}, {"messages": [USER, ANSWER]}),
        ({"conversations": SHAREGPT}, {}, {"messages": [USER, ANSWER]}),
        ({"conversations": [USER, ANSWER]}, {}, {"messages": [USER, ANSWER]}),
        # the system message of a row, under its own or another name
        *(
            ({name: talk, column: "Be short."}, mapping, {"messages": [SYSTEM, USER, ANSWER]})
            for name, talk in (("messages", [USER, ANSWER]), ("conversations", SHAREGPT))
            for column, mapping in (("system", {}), ("system_prompt", {"system": "system_prompt"}))
        ),
        ({"messages": [SYSTEM, USER, ANSWER], "system": " "}, {}, ("messages",)),
        # LLaMA-Factory's columns make a conversation of an instruction
        (
            {"instruction": "Add.", "input": "1", "output": "2", "system": "Be short.", "history": [["1 + 1?", "2"]]},
            {},
            {"messages": [SYSTEM, USER, ANSWER, {"role": "user", "content": "Add.\n\n1"}, ANSWER]},
        ),
        (
            {"instruction": "Add.", "output": "2", "system": "", "history": [], "tools": "[]"},
            {},
            ("instruction", "output"),
        ),
        ({"messages": [USER, ANSWER], "tools": None, "chat_template_kwargs": {"x": None}}, {}, ("messages",)),
        ({"text": "Prose.", "system": "x"}, {}, ("text",)),
        # columns that a hub data set has for other rows are null
        ({"messages": [USER | {"tool_calls": None, "from": None}, ANSWER]}, {}, {"messages": [USER, ANSWER]}),
        ({"messages": [USER, ANSWER | {"weight": 0}]}, {}, {"messages": [USER, ANSWER | {"weight": 0}]}),
        ({"messages": [USER, ANSWER | {"weight": 1}]}, {}, {"messages": [USER, ANSWER]}),
        *(
            ({"messages": [USER, ANSWER | {flag: False}]}, {}, {"messages": [USER, ANSWER | {"weight": 0}]})
            for flag in ("train", "training")
        ),
        ({"messages": [USER | {"train": None}, ANSWER | {"train": True}]}, {}, {"messages": [USER, ANSWER]}),
        (
            {"messages": [USER | {"content": [{"type": "text", "text": "1 + "}, {"type": "text", "text": "1?"}]}]},
            {},
            {"messages": [USER]},
        ),
        # of conversational prompts only the completion is learned
        (
            {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]},
            {},
            {"messages": [USER | {"weight": 0}, ANSWER | {"weight": 0}, USER | {"weight": 0}, ANSWER]},
        ),
        # blank texts are left out
        (
            {"messages": [USER | {"name": "Ann", "thinking": None}, ANSWER | {"reasoning_content": "\n"}]},
            {},
            {"messages": [USER | {"name": "Ann"}, ANSWER]},
        ),
        ({"text": "Prose.", "url": "x"}, {}, {"text": "Prose."}),
    ],
)
def test_rows_of_all_formats(row: dict[str, Any], mapping: dict[str, str], expected: Any) -> None:
    if expected is None:
        expected = {"instruction": "Add.", "output": "2"}
    elif isinstance(expected, tuple):
        expected = {name: row[name] for name in expected}
    assert standard(row, **mapping) == [expected]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_a_row_with_reasoning_has_a_place_for_errors(key: str) -> None:
    answer = ANSWER | {key: "1 and 1 is 2."}
    expected = {"messages": [USER, answer], "where": f"{KEY}: own: row 2"}
    assert standard({"messages": [USER]}, {"messages": [USER, answer]}) == [{"messages": [USER]}, expected]
    weightless = {"messages": [USER | {"weight": 0}, answer], "where": f"{KEY}: own: row 1"}
    assert standard({"prompt": [USER], "completion": [answer]}) == [weightless]


def test_blank_documents_are_left_out() -> None:
    assert standard({"text": "One."}, {"text": " \n"}, {"text": None}, {"text": "Two."}) == [
        {"text": "One."},
        {"text": "Two."},
    ]


@pytest.mark.parametrize(
    ("columns", "hint"),
    [
        (("question", "answer", "id"), "instruction: question, output: answer"),
        (("Question", "context", "response"), "instruction: Question, output: response, input: context"),
        (("dialogue",), "messages: dialogue"),
        (("content", "url"), "text: content"),
        (("a", "b", "c"), "instruction: a, output: b"),
        (("a",), "text: a"),
        (("prompt", "answer"), "instruction: prompt, output: answer"),
        (
            ("system_prompt", "question", "response"),
            "instruction: question, output: response, system: system_prompt",
        ),
    ],
)
def test_unknown_columns_are_named_with_a_way_to_map_them(columns: tuple[str, ...], hint: str) -> None:
    with pytest.raises(UserError) as caught:
        standard(dict.fromkeys(columns, "x"))
    text = str(caught.value)
    assert text.startswith(
        f"{KEY}: the columns of own are {', '.join(columns)}; needed are instruction, output, (input), (system), "
        "(history) | messages, (system) |"
    )
    assert text.endswith(f"map them, such as train.data.columns={{{hint}}}")
    assert "\n" not in text


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"instruction": "question"}, "no data set has the columns question: own has instruction, output$"),
        ({"answer": "output"}, r"answer is not one of instruction, .*; write \{output: answer\}$"),
        ({"tools": "x"}, "tools is not one of instruction, output, input, system, history, messages, .*, text$"),
    ],
)
def test_mappings_that_do_not_match_the_data(mapping: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=rf"^train\.data\.columns: {message}"):
        standard({"instruction": "Add.", "output": "2"}, **mapping)


def test_a_mapping_is_for_those_data_sets_of_a_mixture_that_have_its_columns() -> None:
    mapping = {"instruction": "question", "output": "answer"}
    formats.check_mapping(mapping, {"a": ["question", "answer"], "b": ["messages"]})
    rows = [{"messages": [USER, ANSWER]}]
    assert formats.standard_rows(rows, ["messages"], mapping, "b") == rows


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "Hello."}, "row 2 has no list of messages"),
        ({"messages": []}, "row 2 has no list of messages"),
        ({"messages": ["Hello."]}, "row 2, message 1, has neither role and content nor from and value"),
        (
            {"messages": [USER, {"role": "narrator", "content": "x"}]},
            "message 2, has the role 'narrator', which is not",
        ),
        ({"messages": [{"content": "x"}]}, "message 1, has the role None"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{}]}]}, "message 2, has tool_calls, which are not"),
        ({"messages": [ANSWER | {"weight": "0"}]}, "message 1, has the weight '0'; write 0, 1, false or true, without"),
        ({"messages": [ANSWER | {"weight": 0.5}]}, r"message 1, has the weight 0\.5; write 0, 1, false"),
        ({"messages": [ANSWER | {"train": "false"}]}, "message 1, has the train 'false'; write 0, 1, false"),
        ({"messages": [SYSTEM, USER], "system": "x"}, "row 2 has system, but its messages start with a system message"),
        ({"messages": [USER], "system": ["x"]}, "row 2, system, has no text as its content"),
        ({"messages": [ANSWER | {"thinking": ["x"]}]}, "message 1, has a thinking that is not a text"),
        ({"messages": [ANSWER | {"reasoning_content": "\ud83d"}]}, "message 1 has half of a surrogate pair"),
        ({"messages": [{"role": "user", "content": None}]}, "message 1, has no text as its content"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "message 1, has no text as its content"),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, "message 1 has half of a surrogate pair"),
    ],
)
def test_a_bad_message_is_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"^train\.data\.dataset: own: .*{message}"):
        standard({"messages": [USER, ANSWER]}, row)


@pytest.mark.parametrize("history", ["1 + 1? 2", [["1 + 1?"]], ["1 + 1?", "2"]])
def test_a_history_is_pairs(history: object) -> None:
    with pytest.raises(
        UserError, match=rf"^{KEY}: own: row 1 has a history that is not a list of pairs \[instruction, "
    ):
        standard({"instruction": "Add.", "output": "2", "history": history})


def test_all_rows_of_data_with_a_system_message_are_conversations() -> None:
    row = {"instruction": "1 + 1?", "output": "2"}
    assert standard(row | {"system": "Be short."}, row) == [
        {"messages": [SYSTEM, USER, ANSWER]},
        {"messages": [USER, ANSWER]},
    ]


@pytest.mark.parametrize(
    ("row", "column", "value"),
    [
        ({"messages": [USER, ANSWER]}, "tools", [{"type": "function"}]),
        ({"messages": [USER, ANSWER]}, "history", [["1 + 1?", "2"]]),
        ({"conversations": SHAREGPT}, "tools", '[{"name": "search"}]'),
        ({"prompt": [USER], "completion": [ANSWER]}, "chat_template_kwargs", {"enable_thinking": False}),
        ({"prompt": "1 + 1 =", "completion": " 2"}, "system", "Be short."),
        ({"instruction": "Add.", "output": "2"}, "tools", [{"type": "function"}]),
    ],
)
def test_columns_that_would_change_the_prompt_are_not_dropped(row: dict[str, Any], column: str, value: object) -> None:
    with pytest.raises(UserError) as caught:
        standard(row, row | {column: value})
    problem = f"row 2 has {column}, which is not supported in this format; remove the column, or such rows"
    assert str(caught.value) == f"{KEY}: own: {problem}"
    assert standard(row | {"id": 1}, row | {column: None}) == standard(row, row)
