"""A tokenizer's chat template is a program that comes with a model: it is tried out in a process with limits."""

from __future__ import annotations

import os
import resource
import select
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from sppctl.errors import UserError

SECONDS = 5
MEMORY = 1 << 30  # bytes in addition to this process's own
LONGEST = 1 << 20  # characters of a rendered chat of short messages
STATM = Path("/proc/self/statm")  # Linux only; elsewhere the memory is not limited

Chat = Sequence[dict[str, str]]
_tried: set[str] = set()


def try_template(tokenizer: Any, chats: Sequence[Chat], key: str) -> None:
    """Renders chats of short messages once in a child process, before they are rendered in this one.

    Errors that the template raises are ignored: they are raised again when it is used.

    Raises:
        UserError: the template takes longer than 5 s or (on Linux) 1 GiB of additional memory, or writes over 1 Mi
            characters.
    """
    identity = repr((tokenizer.chat_template, chats))
    if identity in _tried:
        return
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _render(tokenizer, chats, writing)
    os.close(writing)
    try:
        done = select.select([reading], [], [], SECONDS)[0]
        problem = os.read(reading, 1000).decode() if done else f"takes longer than {SECONDS} s"
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if problem != "fine":
        raise UserError(
            key,
            f"the tokenizer's chat template {problem or 'crashes'} on a short message",
            "fix the template in tokenizer_config.json or chat_template.jinja, or do not use it",
        )
    _tried.add(identity)


def _render(tokenizer: Any, chats: Sequence[Chat], writing: int) -> NoReturn:
    """Runs in the child; its limits end it even if the parent was killed."""
    problem = ""
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS + 1, SECONDS + 1))
        if STATM.exists():
            pages, hard = int(STATM.read_text().split()[0]), resource.getrlimit(resource.RLIMIT_AS)[1]
            limit = pages * resource.getpagesize() + MEMORY
            limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        try:
            lengths = [
                len(tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=prompt))
                for chat in chats
                for prompt in (False, True)
            ]
            problem = "fine" if max(lengths) <= LONGEST else f"makes {max(lengths):,} characters"
        except MemoryError:
            problem = f"takes more than {MEMORY >> 30} GiB"
        except Exception:  # raised again when the template is used
            problem = "fine"
    finally:
        os.write(writing, problem.encode())
        os._exit(0)
