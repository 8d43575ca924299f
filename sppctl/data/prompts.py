"""Prompts: the text made from an instruction and its response."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sppctl.data.chat import try_template
from sppctl.errors import UserError, first_line

Row = dict[str, Any]  # a row of a data set: values by column

KEY = "train.data.prompt"

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

    # returns the full text of a row, and the number of characters before the response
    text: Callable[[Row], tuple[str, int]]
    # whether the tokenizer's special tokens and an end-of-text token are added; a chat template writes its own
    special_tokens: bool = True
    # returns the tokens of a row, and for each whether it belongs to the response (1 or 0), if a chat template marks
    # it (``{% generation %}``)
    marked: Callable[[Row], tuple[list[int], list[int]]] | None = None
    ends: bool = True  # whether anything follows the response, so that the model learns where to end it


def style(prompt: str, tokenizer: Any, today: datetime | None = None) -> Style:
    """The style that ``train.data.prompt`` names.

    Args:
        prompt: ``alpaca``, ``chat``, or a text with {instruction} and optionally {input}.
        tokenizer: the model's tokenizer, for ``chat``.
        today: the date for chat templates that print it; None: now.

    Raises:
        UserError: the text has other fields or no {instruction}, or the tokenizer has no usable chat template.
    """
    if prompt == "chat":
        return _chat(tokenizer, today or datetime.now())
    if prompt != "alpaca":
        _check_template(prompt)

    def text(row: Row) -> tuple[str, int]:
        fields = {"instruction": row["instruction"], "input": row.get("input") or ""}
        question = prompt_of(row) if prompt == "alpaca" else prompt.format_map(fields)
        return question + row["output"], len(question)

    return Style(text)


def is_dated(prompt: str, tokenizer: Any) -> bool:
    """Whether the text of a prompt depends on the date."""
    return prompt == "chat" and bool(DATE.search(str(getattr(tokenizer, "chat_template", None))))


def _check_template(prompt: str) -> None:
    try:
        fields = [field[1:] for field in string.Formatter().parse(prompt) if field[1] is not None]
    except ValueError as error:
        raise UserError(f"{KEY}: {error} in {prompt!r}; escape literal braces as {{{{ and }}}}") from error
    for name, specification, conversion in fields:
        if name not in ("instruction", "input") or specification or conversion:
            shown = f"{name}{'!' + conversion if conversion else ''}{':' + specification if specification else ''}"
            raise UserError(
                f"{KEY}: {{{shown}}} in {prompt!r} is neither {{instruction}} nor {{input}}; escape literal braces "
                "as {{ and }}"
            )
    if "instruction" not in (name for name, _, _ in fields):
        raise UserError(f"{KEY}: {prompt!r} is neither alpaca nor chat, and as a text it lacks {{instruction}}")


def _chat(tokenizer: Any, today: datetime) -> Style:
    """The tokenizer's own chat template: the user gives instruction and input, the assistant the response.

    The response starts where the template's generation prompt ends. Templates that prompt for reasoning, but leave it
    out of a finished chat, differ from the generation prompt earlier; then the response starts at the difference.
    """
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise UserError(
            f"{KEY}: chat, but the tokenizer has no chat template; use alpaca or a text with {{instruction}}"
        )

    def render(row: Row, messages: Any, **options: Any) -> Any:
        try:
            dated = DATE.sub(lambda call: repr(today.strftime(call[2])), tokenizer.get_chat_template())
            return tokenizer.apply_chat_template(messages, **({"tokenize": False, "chat_template": dated} | options))
        except Exception as error:  # a template is a program and can raise anything
            reason = f"{first_line(error)} ({row['instruction'][:60]!r})"
            raise UserError(KEY, f"the tokenizer's chat template fails on an instruction: {reason}") from error

    def text(row: Row) -> tuple[str, int]:
        chat, question = render(row, _chat_of(row)), render(row, _chat_of(row)[:1], add_generation_prompt=True)
        if chat.startswith(question):
            return chat, len(question)
        other_answer = render(row, _chat_of(row | {"output": "y" if row["output"].startswith("x") else "x"}))
        start = shared_prefix(chat, question, other_answer)
        if start < len(render(row, _chat_of(row)[:1]).rstrip()):
            raise UserError(
                f"{KEY}: the tokenizer's chat template writes a question differently once it is answered, so where the "
                f"response starts cannot be determined ({row['instruction'][:60]!r}); use another prompt"
            )
        return chat, start

    def marked(row: Row) -> tuple[list[int], list[int]]:
        encoding = render(row, _chat_of(row), tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return encoding["input_ids"], encoding["assistant_masks"]

    try_template(tokenizer, [_chat_of(PROBE), _chat_of(PROBE)[:1]], KEY)
    chat, other_answer = (render(PROBE, _chat_of(PROBE | {"output": output})) for output in (PROBE["output"], "x"))
    if chat == other_answer:
        raise UserError(f"{KEY}: the tokenizer's chat template leaves out the assistant's response; use another prompt")
    ends = bool(chat.rpartition(PROBE["output"])[2].strip())
    if MARK.search(tokenizer.get_chat_template()) and getattr(tokenizer, "is_fast", False):
        return Style(lambda row: (render(row, _chat_of(row)), 0), special_tokens=False, marked=marked, ends=ends)
    text(PROBE)
    return Style(text, special_tokens=False, ends=ends)


def shared_prefix(*sequences: Sequence[Any]) -> int:
    """Length of the longest common prefix of sequences."""
    columns = enumerate(zip(*sequences, strict=False))
    return next((i for i, items in columns if any(item != items[0] for item in items)), min(map(len, sequences)))


def _chat_of(row: Row) -> list[dict[str, str]]:
    question = row["instruction"] + (f"\n\n{row['input']}" if (row.get("input") or "").strip() else "")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
