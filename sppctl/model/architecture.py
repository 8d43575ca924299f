"""The transformers configuration of a model, without its weights: local, cached, shipped with sppctl, or downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sppctl.errors import UserError
from sppctl.model import checkpoint

SHIPPED = Path(__file__).resolve().parent.parent / "assets" / "architectures"


def find(
    path: str, gguf_file: str | None = None, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[Any, str]:
    """The configuration of a model, and where it is from.

    A local directory or an installed package comes first, then the hub's cache, then the architectures that come with
    sppctl, and the hub last: what is shipped says the same, and a hub that cannot be reached costs half a minute. Of a
    hub id only config.json is fetched.

    Args:
        path: local directory, ``package:NAME`` or hub id.
        gguf_file: a file there that describes the model.
        revision: of a hub id.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        UserError: it is to be had nowhere.
    """
    if gguf_file is not None:
        return checkpoint.load_gguf_config(checkpoint.locate(path, gguf_file, revision), gguf_file), f"{gguf_file}"
    if path.startswith(("package:", ".", "/")) or Path(path).exists():
        directory = checkpoint.locate(path, revision=revision)
        return checkpoint.load_config(directory, trust_remote_code), f"config.json in {directory}"
    file, where = _cached(path, revision), "config.json in the hub's cache"
    if file is None and revision is None and path in shipped_models():
        return _read(SHIPPED / _file_name(path)), "the architecture shipped with sppctl"
    if file is None:
        file, where = _download(path, revision), "config.json from the hub"
    return checkpoint.load_config(file.parent, trust_remote_code), where


def shipped_models() -> list[str]:
    """Hub ids of the architectures that come with sppctl."""
    return sorted(file.stem.replace("--", "/") for file in SHIPPED.glob("*.json"))


def _file_name(repository: str) -> str:
    return f"{repository.replace('/', '--')}.json"


def _cached(repository: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repository, "config.json", revision=revision)
    except HFValidationError as error:
        raise UserError(
            "model.path", f"{repository} does not exist", "give a hub id, a directory or package:NAME"
        ) from error
    return Path(found) if isinstance(found, str) else None


def _download(repository: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, "config.json", revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            "model.path",
            f"{repository} is not a local directory, and its config.json is neither cached nor shipped, and could not "
            f"be downloaded ({reason})",
            "check the name, the network and HF_TOKEN, or give a directory with its config.json; shipped: "
            + ", ".join(shipped_models()),
        ) from error


def _read(file: Path) -> Any:
    from transformers import AutoConfig

    facts = json.loads(file.read_text(encoding="utf-8"))
    return AutoConfig.for_model(facts.pop("model_type"), **facts)
