"""Training data as people have it: the columns of common formats, and the rows that sppctl trains on.

A row is one of four kinds, which its columns show:

- an instruction: ``instruction``, ``output`` and perhaps ``input``
- a completion: ``prompt`` and ``completion``, used without any text around them (TRL's convention)
- a conversation: ``messages``, each with ``role`` and ``content``, perhaps with ``name`` and reasoning
  (:data:`sppctl.data.prompts.REASONING`), and with ``weight`` 0 if it is not learned from. If there is reasoning,
  ``where`` names the row, for the error of a chat template that does not write it. The columns ``system`` and
  ``history`` of a data set become messages
- a window: ``tokens`` of plain text, see :mod:`sppctl.data.instructions`
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sppctl.data.prompts import REASONING, Kind, Messages, Row, as_messages
from sppctl.data.texts import INSTRUCTION_COLUMNS, check_characters, check_texts
from sppctl.errors import UserError

KEY = "train.data.dataset"
COLUMNS_KEY = "train.data.columns"

# the kinds of rows in the order in which they are trained on, and a column that only they have
KINDS: dict[Kind, str] = {
    "instruction": "instruction",
    "completion": "completion",
    "conversation": "messages",
    "window": "tokens",
}

ROLES = ("system", "developer", "user", "assistant", "tool")
# names of roles in ShareGPT data
OTHER_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
OTHER_ROLES |= {"model": "assistant", "ai": "assistant", "bot": "assistant"}
# columns that change the prompt of a row: a format that does not have them refuses them
PROMPTING = ("system", "history", "tools", "chat_template_kwargs")
EMPTY: tuple[object, ...] = (None, "", "[]", "{}", [], {})
FLAGS = ("weight", "train", "training")  # keys of a message that is not learned from: 0 or false (OpenAI, axolotl)
# common names of columns, for hints
OTHER_NAMES = {
    "instruction": ("question", "query", "problem", "user"),
    "input": ("context",),
    "output": ("answer", "response", "solution", "target", "assistant"),
    "messages": ("conversation", "dialogue", "dialog", "chat"),
    "system": ("system_prompt",),
    "text": ("content", "document", "story", "body"),
}


def kind_of(row: Row) -> Kind:
    """The kind of a row."""
    return next(kind for kind, column in KINDS.items() if column in row)


def content(row: Row) -> list[str]:
    """Texts that identify a row by what is trained on."""
    kind = kind_of(row)
    if kind == "window":
        return [hashlib.sha256(row["tokens"].tobytes()).hexdigest()]
    if kind == "conversation":
        return [json.dumps(row["messages"])]
    return [
        row.get(name) or "" for name in (INSTRUCTION_COLUMNS if kind == "instruction" else ("prompt", "completion"))
    ]


def check_mapping(mapping: Mapping[str, str], columns: Mapping[str, Sequence[str]]) -> None:
    """Raises UserError if ``train.data.columns`` has unknown names, or columns that none of the data sets has.

    Args:
        mapping: columns of data sets by the names in :data:`FORMATS`.
        columns: all columns of each data set.
    """
    for own, theirs in mapping.items():
        if own not in READ:
            swapped = f"write {{{theirs}: {own}}}" if theirs in READ else None
            raise UserError(COLUMNS_KEY, f"{own} is not one of {', '.join(READ)}", swapped)
    if mapping and not any(set(mapping.values()) <= set(names) for names in columns.values()):
        found = "; ".join(f"{name} has {', '.join(names)}" for name, names in columns.items())
        raise UserError(COLUMNS_KEY, f"no data set has the columns {', '.join(mapping.values())}: {found}")


def standard_rows(rows: list[Row], columns: Sequence[str], mapping: Mapping[str, str], name: str) -> list[Row]:
    """Rows of one of the formats as the rows that sppctl trains on; documents keep their only column, ``text``.

    Args:
        rows: the rows of a data set.
        columns: all its columns.
        mapping: columns by the names in :data:`FORMATS` (``train.data.columns``), used if it has all of them.
        name: its name, for errors.

    Raises:
        UserError: the columns are those of no format, or a row is not of the format or has another of PROMPTING.
    """
    theirs = mapping if set(mapping.values()) <= set(columns) else {}
    format_ = _format(columns, theirs, name)
    own = {column: theirs.get(column, column) for column in format_.columns}
    if format_.needed != ("text",):
        others = set(columns) - {*own, *own.values()}
        _refuse(rows, [column for column in PROMPTING if column in others], name)
    renamed = [{column: row[other] for column, other in own.items() if other in row} for row in rows]
    return format_.read(renamed, name)


def _refuse(rows: list[Row], columns: Sequence[str], name: str) -> None:
    """Raises UserError if a row has anything in columns that would change its prompt, but are not read."""
    for row, where in zip(rows, _places(rows, name), strict=True):
        for column in columns:
            if not _is_empty(row.get(column)):
                raise UserError(
                    f"{where} has {column}, which is not supported in this format; remove the column, or such rows"
                )


def _is_empty(value: object) -> bool:
    """Whether a row has nothing in a column; files of one schema fill up objects with nulls."""
    if isinstance(value, dict):
        return all(_is_empty(part) for part in value.values())
    return (value.strip() if isinstance(value, str) else value) in EMPTY


def is_text(columns: Sequence[str], mapping: Mapping[str, str], name: str) -> bool:
    """Whether a data set with these columns is plain text, see :func:`standard_rows`."""
    theirs = mapping if set(mapping.values()) <= set(columns) else {}
    return _format(columns, theirs, name).needed == ("text",)


def _format(columns: Sequence[str], theirs: Mapping[str, str], name: str) -> Format:
    """The first format whose columns a data set has, some of them under other names (``theirs``)."""
    present = (set(columns) - set(theirs.values())) | set(theirs)
    for format_ in FORMATS:
        if present >= set(format_.needed) and set(theirs) <= set(format_.columns):
            return format_
    known = " | ".join(", ".join((*format_.needed, *map("({})".format, format_.optional))) for format_ in FORMATS)
    problem = f"the columns of {name} are {', '.join(columns)}; needed are {known}"
    raise UserError(KEY, problem, f"map them, such as {_hint(columns)}")


def _hint(columns: Sequence[str]) -> str:
    """How the columns of a data set may be mapped: by common names, else an example."""
    guessed = {
        own: column for own, others in OTHER_NAMES.items() for column in columns if column.lower() in (own, *others)
    }
    choices = [format_.columns for format_ in FORMATS if set(format_.needed) <= set(guessed)]
    if choices:
        pairs = {own: guessed[own] for own in choices[0] if own in guessed}
    elif len(columns) > 1:
        pairs = {"instruction": columns[0], "output": columns[1]}
    else:
        pairs = {"text": columns[0] if columns else "COLUMN"}
    return f"{COLUMNS_KEY}={{{', '.join(f'{own}: {column}' for own, column in pairs.items())}}}"


# --- reading ----------------------------------------------------------------------------------------------------------


def _instructions(rows: list[Row], name: str) -> list[Row]:
    """Instructions; in data with ``system`` or ``history`` (LLaMA-Factory) every row is a conversation."""
    check_texts(rows, name, KEY, ("instruction", "output"), ("input",))
    if all(_is_empty(row.get(column)) for row in rows for column in ("system", "history")):
        return [{column: row[column] for column in INSTRUCTION_COLUMNS if column in row} for row in rows]
    return [
        _conversation(_with_system(row, _history(row, where) + as_messages(row), where), where)
        for row, where in zip(rows, _places(rows, name), strict=True)
    ]


def _conversations(rows: list[Row], name: str) -> list[Row]:
    column = "messages" if any("messages" in row for row in rows) else "conversations"
    return [
        _conversation(_with_system(row, _messages(row.get(column), where), where), where)
        for row, where in zip(rows, _places(rows, name), strict=True)
    ]


def _completions(rows: list[Row], name: str) -> list[Row]:
    """Prompts and completions: both texts, or both lists of messages, of which the completion's are learned."""
    if not any(isinstance(row.get("prompt"), list) for row in rows):
        check_texts(rows, name, KEY, ("prompt", "completion"))
        return rows
    read = []
    for row, where in zip(rows, _places(rows, name), strict=True):
        prompt, completion = (_messages(row.get(column), where) for column in ("prompt", "completion"))
        read.append(_conversation([message | {"weight": 0} for message in prompt] + completion, where))
    return read


def _places(rows: list[Row], name: str) -> list[str]:
    """What errors call the rows."""
    return [f"{KEY}: {name}: row {number}" for number in range(1, len(rows) + 1)]


def _conversation(messages: Messages, where: str) -> Row:
    has_reasoning = any(name in message for message in messages for name in REASONING)
    return {"messages": messages} | ({"where": where} if has_reasoning else {})


def _with_system(row: Row, messages: Messages, where: str) -> Messages:
    """The messages of a row, after its column ``system``."""
    if _is_empty(row.get("system")):
        return messages
    if messages[0]["role"] in ("system", "developer"):
        raise UserError(f"{where} has system, but its messages start with a system message, too; remove one of them")
    return [_message({"role": "system", "content": row["system"]}, f"{where}, system"), *messages]


def _history(row: Row, where: str) -> Messages:
    """The earlier turns of an instruction: pairs of an instruction and its answer."""
    history = [] if _is_empty(row.get("history")) else row["history"]
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise UserError(f"{where} has a history that is not a list of pairs [instruction, answer]; remove the column")
    turns = [(role, text) for pair in history for role, text in zip(("user", "assistant"), pair, strict=True)]
    return [_message({"role": role, "content": text}, f"{where}, history") for role, text in turns]


def _documents(rows: list[Row], name: str) -> list[Row]:
    check_texts(rows, name, KEY, optional=("text",))
    return [{"text": row["text"]} for row in rows if (row.get("text") or "").strip()]


def _messages(messages: Any, where: str) -> Messages:
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where} has no list of messages")
    return [_message(message, f"{where}, message {number}") for number, message in enumerate(messages, start=1)]


def _message(message: Any, where: str) -> dict[str, Any]:
    """A message with ``role`` and ``content`` (OpenAI) or ``from`` and ``value`` (ShareGPT)."""
    if not isinstance(message, dict):
        raise UserError(f"{where}, has neither role and content nor from and value")
    role, text = (
        message[name] if message.get(name) is not None else message.get(other)
        for name, other in (("role", "from"), ("content", "value"))
    )
    role = OTHER_ROLES.get(str(role), role)
    if role not in ROLES:
        names = ", ".join((*ROLES, *OTHER_ROLES))
        raise UserError(f"{where}, has the role {role!r}, which is not one of {names}")
    for name in ("tool_calls", "function_call"):
        if message.get(name):
            raise UserError(f"{where}, has {name}, which are not supported; remove such rows")
    if isinstance(text, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in text):
        text = "".join(str(part.get("text") or "") for part in text)
    if not isinstance(text, str):
        raise UserError(f"{where}, has no text as its content")
    check_characters(text, where)
    return {"role": role, "content": text} | _other_texts(message, where) | _weight(message, where)


def _weight(message: Row, where: str) -> dict[str, int]:
    """Weight 0 of a message that is not learned from, by any of FLAGS."""
    flags = {name: message[name] for name in FLAGS if message.get(name) is not None}
    for name, flag in flags.items():
        if flag not in (0, 1):
            raise UserError(f"{where}, has the {name} {flag!r}; write 0, 1, false or true, without quotes")
    return {} if all(flags.values()) else {"weight": 0}


def _other_texts(message: dict[str, Any], where: str) -> dict[str, str]:
    """The texts of a message besides its content, unless they are blank."""
    texts = {name: message[name] for name in (*REASONING, "name") if message.get(name)}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise UserError(f"{where}, has a {name} that is not a text")
        check_characters(text, where)
    return {name: text for name, text in texts.items() if text.strip()}


@dataclass(frozen=True)
class Format:
    """A common format of training data."""

    needed: tuple[str, ...]  # columns
    read: Callable[[list[Row], str], list[Row]]  # rows with these columns and the data set's name -> standard rows
    optional: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns of the format."""
        return (*self.needed, *self.optional)


# in the order in which they are tried: Alpaca on the hub has a column text as well, UltraChat a column prompt
FORMATS = (
    Format(("instruction", "output"), _instructions, ("input", "system", "history")),
    Format(("messages",), _conversations, ("system",)),
    Format(("conversations",), _conversations, ("system",)),
    Format(("prompt", "completion"), _completions),
    Format(("text",), _documents),
)
READ = tuple(dict.fromkeys(column for format_ in FORMATS for column in format_.columns))
