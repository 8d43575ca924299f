"""The transformers configuration of a model, without its weights: local, cached, shipped with sppctl, or downloaded."""

from __future__ import annotations

import json
from typing import Any

from sppctl.model import checkpoint, find


def load(
    path: str, gguf_file: str | None = None, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[Any, str]:
    """The configuration of a model, and a text that names its source, see :func:`find.config_source`.

    Raises:
        UserError: the configuration could not be found or read.
    """
    from transformers import AutoConfig

    file, source = find.config_source(path, gguf_file, revision)
    if gguf_file is not None:
        return checkpoint.load_gguf_config(find.locate(path, gguf_file, revision), gguf_file), source
    if file in find.SHIPPED.values():
        settings = json.loads(file.read_text(encoding="utf-8"))
        return AutoConfig.for_model(settings.pop("model_type"), **settings), source
    return checkpoint.load_config(file.parent, trust_remote_code), source
