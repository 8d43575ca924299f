"""Names of tasks, checked in the text of lm-eval's files: importing and indexing lm-eval takes seconds."""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path

from sppctl.errors import UserError

# the seven tasks of the SparseGPT / Wanda / SPP papers; the published metric is acc, not acc_norm
ZEROSHOT = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
SHOTS = {"zeroshot": 0, "mmlu": 5}  # few-shot examples of the groups in these papers
OWN = {"all", "wikitext", *SHOTS, *ZEROSHOT}
IS_PATTERN = re.compile(r"[*?\[]")  # in a name that may match several tasks


def check(names: Iterable[str]) -> None:
    """Raises UserError for a name that no file of lm-eval mentions; only lm-eval itself knows all that is wrong."""
    unusual = [name for name in names if name not in OWN and not IS_PATTERN.search(name)]
    spec = importlib.util.find_spec("lm_eval") if unusual else None
    if spec is None or not spec.submodule_search_locations:
        return
    folder = Path(spec.submodule_search_locations[0], "tasks")
    # templates that others include have all kinds of names
    files = (path for path in folder.rglob("*") if path.suffix not in (".py", ".pyc", ".md") and path.is_file())
    text = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in files)
    for name in unusual:
        if not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text):
            raise unknown(name, re.findall(r"^(?:task|group|tag):[ \t]*([\w-]+)", text, re.MULTILINE))


def unknown(name: str, known: Iterable[str]) -> UserError:
    """The error about an unknown task, with the most similar ``known`` ones."""
    close = difflib.get_close_matches(name, sorted({*OWN, *known}), n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "`lm-eval ls tasks` lists them"
    return UserError("eval.tasks", f"{name} is neither zeroshot nor mmlu nor an lm-eval task", hint)
