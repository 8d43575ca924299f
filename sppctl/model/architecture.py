"""The transformers configuration of a model, without its weights: local, cached, shipped with sppctl, or downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sppctl.errors import UserError, first_line
from sppctl.model import checkpoint
from sppctl.model.find import locate

SHIPPED = Path(__file__).resolve().parent.parent / "assets" / "architectures"


def find(
    path: str, gguf_file: str | None = None, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[Any, str]:
    """The configuration of a model given as a directory, ``package:NAME`` or hub id, and a text that names its source.

    A local directory or an installed package comes first, then the hub's cache, then the architectures shipped with
    sppctl, and the hub last, because an unreachable hub costs half a minute. Only config.json of a hub id is
    downloaded. With a ``gguf_file``, that file describes the model.

    Raises:
        UserError: the configuration could not be found.
    """
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from transformers import AutoConfig

    if gguf_file is not None:
        return checkpoint.load_gguf_config(locate(path, gguf_file, revision), gguf_file), f"{gguf_file}"
    if path.startswith(("package:", ".", "/")) or Path(path).exists():
        directory = locate(path, revision=revision)
        return checkpoint.load_config(directory, trust_remote_code), f"config.json in {directory}"
    try:
        file, source = try_to_load_from_cache(path, "config.json", revision=revision), "config.json in the hub's cache"
    except HFValidationError as error:
        fix = "give a hub id, a directory or package:NAME"
        raise UserError("model.path", f"{path} does not exist", fix) from error
    shipped = {file.stem.replace("--", "/"): file for file in sorted(SHIPPED.glob("*.json"))}
    if not isinstance(file, str) and revision is None and path in shipped:
        settings = json.loads(shipped[path].read_text(encoding="utf-8"))
        return AutoConfig.for_model(settings.pop("model_type"), **settings), "the architecture shipped with sppctl"
    try:
        if not isinstance(file, str):  # unlike hf_hub_download, it asks an unreachable hub once, and silently
            directory = Path(snapshot_download(path, revision=revision, allow_patterns=["config.json"]))
            file, source = str(directory / "config.json"), "config.json from the hub"
            if not Path(file).is_file():
                raise FileNotFoundError("the repository has none")
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UserError(
            "model.path",
            f"{path} is not a local directory, and its config.json is neither cached nor shipped, and could not be "
            f"downloaded ({first_line(error)})",
            "check the name, the network and HF_TOKEN, or give a directory with its config.json; shipped: "
            + ", ".join(shipped),
        ) from error
    return checkpoint.load_config(Path(file).parent, trust_remote_code), source
