"""Prompts: the text that an instruction and its response make."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sppctl.data.chat import try_template
from sppctl.errors import UserError, first_line

Row = dict[str, Any]  # of a data set: its values by column

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
DATE = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")  # by which a chat template asks for today's date
MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")  # by which it says itself what the assistant says


def prompt_of(row: Row) -> str:
    """The Alpaca prompt of a row, up to where the response starts."""
    template = PROMPT_WITH_INPUT if (row.get("input") or "").strip() else PROMPT_WITHOUT_INPUT
    return template.format(instruction=row["instruction"], input=row.get("input", ""))


def formatted(row: Row) -> str:
    """Alpaca prompt and response of a row as one text."""
    return prompt_of(row) + row["output"]


@dataclass(frozen=True)
class Style:
    """How rows become text."""

    # makes the whole text of a row, and says how many characters of it are in front of the response
    text: Callable[[Row], tuple[str, int]]
    # whether the tokenizer adds its own special tokens, and an end-of-text token follows; a chat template writes all
    special_tokens: bool = True
    # makes the tokens of a row, and for each whether it belongs to the response (1 or 0), where a chat template marks
    # that itself (``{% generation %}``)
    marked: Callable[[Row], tuple[list[int], list[int]]] | None = None
    ends: bool = True  # whether anything follows the response, by which a model learns to end it


def style(prompt: str, tokenizer: Any, today: datetime | None = None) -> Style:
    """The style that ``train.data.prompt`` names.

    Args:
        prompt: ``alpaca``, ``chat``, or a text with {instruction} and, if wanted, {input}.
        tokenizer: of the model, for ``chat``.
        today: what chat templates that print the date take for now; None: now.

    Raises:
        UserError: a text with other fields or without {instruction}, or a tokenizer that cannot chat.
    """
    if prompt == "chat":
        return _chat(tokenizer, today or datetime.now())
    if prompt != "alpaca":
        _check_template(prompt)

    def text(row: Row) -> tuple[str, int]:
        own = {"instruction": row["instruction"], "input": row.get("input") or ""}
        before = prompt_of(row) if prompt == "alpaca" else prompt.format_map(own)
        return before + row["output"], len(before)

    return Style(text)


def is_dated(prompt: str, tokenizer: Any) -> bool:
    """Whether the text depends on the date."""
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
    """The tokenizer's own chat template: the user says instruction and input, the assistant gives the response.

    What is trained is what the template makes of both. The response starts where the template's own generation prompt
    ends. Templates that prompt for reasoning and then leave that out differ from it earlier: there it starts.
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
        except Exception as error:  # a template is a program: it raises what it likes
            reason = f"{first_line(error)} ({row['instruction'][:60]!r})"
            raise UserError(KEY, f"the tokenizer's chat template fails on an instruction: {reason}") from error

    def text(row: Row) -> tuple[str, int]:
        whole, asked = render(row, _chat_of(row)), render(row, _chat_of(row)[:1], add_generation_prompt=True)
        if whole.startswith(asked):
            return whole, len(asked)
        other = render(row, _chat_of(row | {"output": "y" if row["output"].startswith("x") else "x"}))
        start = shared(whole, asked, other)
        if start < len(render(row, _chat_of(row)[:1]).rstrip()):
            raise UserError(
                f"{KEY}: the tokenizer's chat template writes a question differently once it is answered, so where the "
                f"response starts cannot be determined ({row['instruction'][:60]!r}); use another prompt"
            )
        return whole, start

    def marked(row: Row) -> tuple[list[int], list[int]]:
        encoding = render(row, _chat_of(row), tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return encoding["input_ids"], encoding["assistant_masks"]

    try_template(tokenizer, [_chat_of(PROBE), _chat_of(PROBE)[:1]], KEY)
    whole, other = (render(PROBE, _chat_of(PROBE | {"output": output})) for output in (PROBE["output"], "x"))
    if whole == other:
        raise UserError(f"{KEY}: the tokenizer's chat template leaves out what the assistant says; use another prompt")
    ends = bool(whole.rpartition(PROBE["output"])[2].strip())
    if MARK.search(tokenizer.get_chat_template()) and getattr(tokenizer, "is_fast", False):
        return Style(lambda row: (render(row, _chat_of(row)), 0), special_tokens=False, marked=marked, ends=ends)
    text(PROBE)
    return Style(text, special_tokens=False, ends=ends)


def shared(*parts: Sequence[Any]) -> int:
    """Items that sequences have in common at their beginning."""
    columns = enumerate(zip(*parts, strict=False))
    return next((place for place, items in columns if any(item != items[0] for item in items)), min(map(len, parts)))


def _chat_of(row: Row) -> list[dict[str, str]]:
    asked = row["instruction"] + (f"\n\n{row['input']}" if (row.get("input") or "").strip() else "")
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]
