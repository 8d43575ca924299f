"""Prompts: the text that an instruction makes in front of its response."""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sppctl.errors import UserError
from sppctl.lm.chat import try_template

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
RESPONSE_STANDS_HERE = "(the response)"  # what a chat template puts after it is its end of a turn


def prompt_of(row: dict[str, Any]) -> str:
    """The Alpaca prompt of a row, up to where the response starts."""
    template = PROMPT_WITH_INPUT if (row.get("input") or "").strip() else PROMPT_WITHOUT_INPUT
    return template.format(instruction=row["instruction"], input=row.get("input", ""))


def formatted(row: dict[str, Any]) -> str:
    """Alpaca prompt and response of a row as one text."""
    return prompt_of(row) + row["output"]


@dataclass(frozen=True)
class Style:
    """How rows become text.

    Attributes:
        prompt: makes the text of a row up to where its response starts.
        end: text after every response, in front of the end-of-text token.
        special_tokens: whether the tokenizer adds its own special tokens; a chat template writes them out.
        identity: two styles with the same one make the same text.
    """

    prompt: Callable[[dict[str, Any]], str]
    end: str = ""
    special_tokens: bool = True
    identity: str = "alpaca"


def style(prompt: str, tokenizer: Any) -> Style:
    """The style that ``train.data.prompt`` names.

    Args:
        prompt: ``alpaca``, ``chat``, or a text with {instruction} and, if wanted, {input}.
        tokenizer: of the model, for ``chat``.

    Raises:
        UserError: a text with other fields or without {instruction}, or a tokenizer that cannot chat.
    """
    if prompt == "alpaca":
        return Style(prompt_of)
    if prompt == "chat":
        return _chat(tokenizer)
    _check_template(prompt)
    return Style(
        lambda row: prompt.format(instruction=row["instruction"], input=row.get("input") or ""), identity=f"={prompt}"
    )


def _check_template(prompt: str) -> None:
    try:
        fields = [found[1:] for found in string.Formatter().parse(prompt) if found[1] is not None]
    except ValueError as error:
        raise UserError(f"{KEY}: {error} in {prompt!r}; write a brace that is no field twice: {{{{ or }}}}") from error
    for name, specification, conversion in fields:
        if name not in ("instruction", "input") or specification or conversion:
            shown = f"{name}{'!' + conversion if conversion else ''}{':' + specification if specification else ''}"
            raise UserError(
                f"{KEY}: {{{shown}}} in {prompt!r} is neither {{instruction}} nor {{input}}; write a brace that is no "
                "field twice: {{ or }}"
            )
    if "instruction" not in (name for name, _, _ in fields):
        raise UserError(f"{KEY}: {prompt!r} is neither alpaca nor chat, and as a text it lacks {{instruction}}")


def _chat(tokenizer: Any) -> Style:
    """The tokenizer's own chat template: the user says instruction and input, the assistant gives the response."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise UserError(
            f"{KEY}: chat, but the tokenizer has no chat template; use alpaca or a text with {{instruction}}"
        )

    def prompt(row: dict[str, Any]) -> str:
        return tokenizer.apply_chat_template([_user(row)], tokenize=False, add_generation_prompt=True)

    example = _user({"instruction": "Say it."})
    answer = {"role": "assistant", "content": RESPONSE_STANDS_HERE}
    try_template(tokenizer, [[example, answer], [example]], KEY)
    try:
        whole = tokenizer.apply_chat_template([example, answer], tokenize=False)
        prompt({"instruction": "Say it."})
    except Exception as error:  # a template is a program: it raises what it likes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{KEY}: the tokenizer's chat template fails on an instruction: {reason}") from error
    _, found, end = whole.rpartition(RESPONSE_STANDS_HERE)
    if not found:
        raise UserError(f"{KEY}: the tokenizer's chat template leaves out what the assistant says; use another prompt")
    return Style(prompt, end.rstrip(), special_tokens=False, identity=f"chat {template}")


def _user(row: dict[str, Any]) -> dict[str, str]:
    context = (row.get("input") or "").strip()
    return {"role": "user", "content": row["instruction"] + (f"\n\n{row['input']}" if context else "")}
