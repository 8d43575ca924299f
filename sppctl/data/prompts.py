"""Prompts: the text made from a row, an instruction and its response or a whole conversation."""

from __future__ import annotations

import contextlib
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from itertools import groupby
from typing import Any, Literal

from sppctl.data.chat import try_template
from sppctl.errors import UserError, first_line

Row = dict[str, Any]  # a row of a data set: values by column
Messages = list[dict[str, Any]]  # of a conversation, see sppctl.data.formats
Kind = Literal["instruction", "completion", "conversation", "window"]  # of a row, see sppctl.data.formats

KEY = "train.data.prompt"
REASONING = ("reasoning_content", "reasoning", "thinking")  # keys of a message whose text precedes its content

# the two prompts of Stanford Alpaca, as every Alpaca-trained model expects them
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
PROMPT_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
PROBE = {"instruction": "Say it.", "output": "(the response)"}
DATE = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")  # how a chat template gets today's date
MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")  # how a chat template marks the assistant's text


def prompt_of(row: Row) -> str:
    """The Alpaca prompt of a row, which ends where the response starts."""
    template = PROMPT_WITH_INPUT if (row.get("input") or "").strip() else PROMPT_WITHOUT_INPUT
    return template.format(instruction=row["instruction"], input=row.get("input", ""))


def formatted(row: Row) -> str:
    """Alpaca prompt and response of a row as one text."""
    return prompt_of(row) + row["output"]


@dataclass(frozen=True)
class Style:
    """How rows become text."""

    # returns the full text of a row, and the numbers of characters before each start and end of a response; the last
    # one is the end of the text unless it is given
    text: Callable[[Row], tuple[str, list[int]]]
    # whether the tokenizer's special tokens and an end-of-text token are added; a chat template writes its own
    special_tokens: bool = True
    # returns the tokens of a row, and for each whether it belongs to a response (1 or 0), if a chat template marks
    # it (``{% generation %}``)
    marked: Callable[[Row], tuple[list[int], list[int]]] | None = None
    is_chat: bool = False  # written by a chat template
    ends: bool = True  # whether anything follows the response, so that the model learns where to end it


def style(prompt: str, tokenizer: Any, today: datetime | None = None, kind: Kind = "instruction") -> Style:
    """The style that ``train.data.prompt`` names, for rows of one kind.

    Conversations are written by the tokenizer's chat template, whatever ``prompt`` is; without a template, each message
    of a user as an instruction. Completions follow their prompts directly, except with ``chat``.

    Args:
        prompt: ``alpaca``, ``chat``, or a text with {instruction} and optionally {input}.
        tokenizer: the model's tokenizer, for chats.
        today: the date for chat templates that print it; None: now.
        kind: the kind of rows.

    Raises:
        UserError: the text has other fields or no {instruction}, or the tokenizer has no usable chat template.
    """
    if prompt == "chat" or (kind == "conversation" and has_template(tokenizer)):
        return _chat(tokenizer, today or datetime.now())
    if prompt != "alpaca":
        _check_template(prompt)

    def question(row: Row) -> str:
        fields = {"instruction": row["instruction"], "input": row.get("input") or ""}
        return prompt_of(row) if prompt == "alpaca" else prompt.format_map(fields)

    def text(row: Row) -> tuple[str, list[int]]:
        asked = row["prompt"] if kind == "completion" else question(row)
        return asked + row["completion" if kind == "completion" else "output"], [len(asked)]

    return Style(partial(_exchanges, question, tokenizer.eos_token) if kind == "conversation" else text)


def has_template(tokenizer: Any) -> bool:
    """Whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def is_dated(tokenizer: Any) -> bool:
    """Whether the text of a tokenizer's chat template depends on the date."""
    return bool(DATE.search(str(getattr(tokenizer, "chat_template", None))))


def _exchanges(question: Callable[[Row], str], end: str, row: Row) -> tuple[str, list[int]]:
    """A conversation without a chat template: users' messages as instructions, end-of-text after each answer.

    The end after the last answer is left out, because it is added to every text.
    """
    text, borders = "", []
    for message in row["messages"]:
        for name in REASONING:
            if name in message:
                raise _unwritten(row, name, "cannot be written, because the tokenizer has no chat template")
        if message["role"] == "assistant":
            answer = message["content"] + end
            borders += [len(text), len(text + answer)] if message.get("weight") != 0 else []
            text += answer
        elif message["role"] == "user":
            text += question({"instruction": message["content"]})
        elif message["role"] == "tool":
            raise UserError(KEY, "a conversation has messages of a tool, but the tokenizer has no chat template")
        else:
            text += message["content"] + "\n\n"
    if row["messages"][-1]["role"] == "assistant":
        text = text.removesuffix(end)
    return text, [border for border in borders if border <= len(text)]


def _unwritten(row: Row, name: str, problem: str) -> UserError:
    where = row.get("where", "train.data.dataset: a row")
    return UserError(f"{where} has {name}, which {problem}; write it into the content, or remove the key")


def _check_template(prompt: str) -> None:
    try:
        fields = [field[1:] for field in string.Formatter().parse(prompt) if field[1] is not None]
    except ValueError as error:
        raise UserError(KEY, f"{error} in {prompt!r}", "escape literal braces as {{ and }}") from error
    for name, specification, conversion in fields:
        if name not in ("instruction", "input") or specification or conversion:
            shown = f"{name}{'!' + conversion if conversion else ''}{':' + specification if specification else ''}"
            raise UserError(
                KEY,
                f"{{{shown}}} in {prompt!r} is neither {{instruction}} nor {{input}}",
                "escape literal braces as {{ and }}",
            )
    if "instruction" not in (name for name, _, _ in fields):
        raise UserError(KEY, f"{prompt!r} is neither alpaca nor chat, and as a text it lacks {{instruction}}")


def _chat(tokenizer: Any, today: datetime) -> Style:
    """The tokenizer's own chat template: it writes the messages of a row, see :func:`as_messages`.

    A response starts where the template's generation prompt ends. Templates that prompt for reasoning, but leave it
    out of a finished chat, differ from the generation prompt earlier; then the response starts at the difference. The
    last response ends with the text, others with what the template writes after them at the end of a chat.
    """
    if not has_template(tokenizer):
        raise UserError(KEY, "chat, but the tokenizer has no chat template", "use alpaca or a text with {instruction}")

    def render(messages: Messages, **options: Any) -> Any:
        try:
            dated = DATE.sub(lambda call: repr(today.strftime(call[2])), tokenizer.get_chat_template())
            options = {"tokenize": False, "chat_template": dated} | options
            spoken = [{name: message[name] for name in message if name != "weight"} for message in messages]
            return tokenizer.apply_chat_template(spoken, **options)
        except Exception as error:  # a template is a program and can raise anything
            reason = f"{first_line(error)} ({_shown(messages)!r})"
            raise UserError(KEY, f"the tokenizer's chat template fails on a conversation: {reason}") from error

    conversations = _Conversations(render)

    def text(row: Row) -> tuple[str, list[int]]:
        return _borders(render, conversations.messages(row))

    def marked(row: Row) -> tuple[list[int], list[int]]:
        messages = conversations.messages(row)
        encoding = render(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return encoding["input_ids"], _weighted(encoding["assistant_masks"], messages)

    def identified(row: Row) -> tuple[str, list[int]]:
        """The text that identifies the tokens of a marked row, with the messages that are not learned from."""
        messages = conversations.messages(row)
        return render(messages), [0, *(i for i, message in enumerate(messages) if message.get("weight") == 0)]

    probe = as_messages(PROBE)
    try_template(tokenizer, [probe, probe[:1]], KEY)
    chat, other_answer = render(probe), render(_with_text(probe, 1, "content", "x"))
    if chat == other_answer:
        raise UserError(KEY, "the tokenizer's chat template leaves out the assistant's response", "use another prompt")
    ends = bool(chat.rpartition(PROBE["output"])[2].strip())
    if MARK.search(tokenizer.get_chat_template()) and getattr(tokenizer, "is_fast", False):
        return Style(identified, special_tokens=False, marked=marked, is_chat=True, ends=ends)
    text(PROBE)
    return Style(text, special_tokens=False, is_chat=True, ends=ends)


@dataclass
class _Conversations:
    """Rows as messages that a chat template writes: some leave out roles and keys that they do not know."""

    render: Callable[..., str]
    written: set[tuple[str, str]] = field(default_factory=set)  # roles and keys that the template is known to write
    developer: str | None = None  # the role that developers' messages are written in

    def messages(self, row: Row) -> Messages:
        """The messages of a row; UserError if the template leaves out those of a role, or their reasoning."""
        messages = self._with_developers(as_messages(row))
        for number, message in enumerate(messages):
            for name in ("content", *REASONING):
                if name in message and (message["role"], name) not in self.written:
                    self._check(row, messages, number, name)
                    self.written.add((message["role"], name))
        return messages

    def _with_developers(self, messages: Messages) -> Messages:
        """The messages with those of a developer as ``system`` if the template does not write ``developer``."""
        first = next((number for number, message in enumerate(messages) if message["role"] == "developer"), None)
        if first is None:
            return messages
        if self.developer is None:
            self.developer = "system"
            with contextlib.suppress(UserError):  # of a template that refuses unknown roles
                self.developer = "developer" if self._is_written(messages, first) else "system"
        role = {"role": self.developer}
        return [message | role if message["role"] == "developer" else message for message in messages]

    def _check(self, row: Row, messages: Messages, number: int, name: str) -> None:
        if name != "content":
            # without what follows: templates may leave out the reasoning of earlier answers
            if not self._is_written(messages[: number + 1], number, name):
                raise _unwritten(row, name, "the tokenizer's chat template does not write")
        elif not self._is_written(messages, number):
            role = as_messages(row)[number]["role"]
            raise UserError(
                KEY,
                f"the tokenizer's chat template does not write messages of the role {role} ({_shown(messages)!r})",
                "leave them or their rows out, give them another role in the data set, or write them in the template "
                "(tokenizer_config.json or chat_template.jinja)",
            )

    def _is_written(self, messages: Messages, number: int, name: str = "content") -> bool:
        """Whether the chat changes with that text of a message."""
        return self.render(messages) != self.render(_other(messages, number, name))


def _borders(render: Callable[..., str], messages: Messages) -> tuple[str, list[int]]:
    """A chat, and the numbers of characters before each start and end of a response that is learned from."""
    chat, borders = render(messages), []
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or message.get("weight") == 0:
            continue
        start = _start(render, chat, messages, number)
        borders.append(start)
        if number < len(messages) - 1:
            borders.append(_end(render, chat, messages, number))
    if borders != sorted(borders):
        raise _unclear(messages)
    return chat, borders


def _start(render: Callable[..., str], chat: str, messages: Messages, number: int) -> int:
    """Where the response that is message ``number`` starts in a chat."""
    before = messages[:number]
    question = render(before, add_generation_prompt=True) if before else ""  # many templates need a message
    if question and chat.startswith(question):
        return len(question)
    start = shared_prefix(*filter(None, (chat, question, render(_other(messages, number)))))
    if before and start < len(render(before).rstrip()):
        raise _unclear(messages)
    return start


def _end(render: Callable[..., str], chat: str, messages: Messages, number: int) -> int:
    """Where the response that is message ``number``, and not the last one, ends in a chat."""
    answered = render(messages[: number + 1])
    if chat.startswith(answered):
        return len(answered)
    # templates may write the last response differently (with reasoning), but end it alike
    end = len(chat) - _shared_suffix(chat, render(_other(messages, number)))
    after = _shared_suffix(answered, render(_other(messages[: number + 1], number)))
    return end + shared_prefix(chat[end:], answered[len(answered) - after :])


def _other(messages: Messages, number: int, name: str = "content") -> Messages:
    """The messages with another text of one of them, whose first and last characters differ."""
    text = messages[number][name].strip()
    first, last = ("y" if same else "x" for same in (text.startswith("x"), text.endswith("x")))
    return _with_text(messages, number, name, first + last)


def _with_text(messages: Messages, number: int, name: str, text: str) -> Messages:
    return [*messages[:number], messages[number] | {name: text}, *messages[number + 1 :]]


def _unclear(messages: Messages) -> UserError:
    return UserError(
        KEY,
        "the tokenizer's chat template writes a question differently once it is answered, so where the response "
        f"starts cannot be determined ({_shown(messages)!r})",
        "mark the responses in the template with {% generation %} and {% endgeneration %}, or use another prompt",
    )


def _shown(messages: Messages) -> str:
    """The beginning of a conversation, for errors."""
    first = next((message for message in messages if message["role"] == "user"), messages[0])
    return str(first["content"].partition("\n")[0][:60])


def _weighted(marks: list[int], messages: Messages) -> list[int]:
    """The marks of a template without those of messages that are not learned from."""
    weights = [message.get("weight", 1) for message in messages if message["role"] == "assistant"]
    if all(weights):
        return marks
    parts = [(mark, len(list(part))) for mark, part in groupby(marks)]
    if sum(mark for mark, _ in parts) != len(weights):
        raise _unclear(messages)
    remaining = iter(weights)
    return [kept for mark, count in parts for kept in [next(remaining) if mark else 0] * count]


def shared_prefix(*sequences: Sequence[Any]) -> int:
    """Length of the longest common prefix of sequences, texts or lists."""
    shortest = min(sequences, key=len)
    if all(sequence[: len(shortest)] == shortest for sequence in sequences):
        return len(shortest)
    columns = enumerate(zip(*sequences, strict=False))
    return next(i for i, items in columns if any(item != items[0] for item in items))


def _shared_suffix(first: str, second: str) -> int:
    """Length of the longest common suffix of two texts."""
    return shared_prefix(first[::-1], second[::-1])


def as_messages(row: Row) -> Messages:
    """A row as a conversation: the user gives instruction and input, the assistant the response."""
    if "messages" in row:
        return list(row["messages"])
    if "completion" in row:
        question, answer = row["prompt"], row["completion"]
    else:
        question = row["instruction"] + (f"\n\n{row['input']}" if (row.get("input") or "").strip() else "")
        answer = row["output"]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
