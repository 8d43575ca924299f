"""A tokenizer's chat template is a program that came with a model: it is tried in a process that is ended in time."""

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
MEMORY = 1 << 30  # bytes beyond what this process has
LONGEST = 1 << 20  # characters made of a few short messages

Chat = Sequence[dict[str, str]]
_tried: set[str] = set()


def try_template(tokenizer: Any, chats: Sequence[Chat], key: str) -> None:
    """Renders chats of short messages once in a child process, before anybody renders them in this one.

    What the template itself raises is left to who renders next.

    Raises:
        UserError: it takes longer than 5 s, 1 GiB more memory than there was, or makes 1 Mi characters of them.
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
            f"{key}: the tokenizer's chat template {problem or 'crashes'} on a short message; mend the template in "
            "tokenizer_config.json or chat_template.jinja, or do without it"
        )
    _tried.add(identity)


def _render(tokenizer: Any, chats: Sequence[Chat], writing: int) -> NoReturn:
    """What the child does; the limits end it even if its parent is gone."""
    problem = ""
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS + 1, SECONDS + 1))
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit, hard = pages * resource.getpagesize() + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
        try:
            lengths = [
                len(tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=prompt))
                for chat in chats
                for prompt in (False, True)
            ]
            problem = "fine" if max(lengths) <= LONGEST else f"makes {max(lengths):,} characters"
        except MemoryError:
            problem = f"takes more than {MEMORY >> 30} GiB"
        except Exception:  # it comes again where the chat is rendered for use
            problem = "fine"
    finally:
        os.write(writing, problem.encode())
        os._exit(0)
