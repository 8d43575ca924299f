"""Finds a checkpoint by its name: a directory, a hub id, or an installed package.

No library that takes seconds is imported, so that a wrong name is reported at once.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import re
from pathlib import Path

from sppctl.errors import UserError, first_line
from sppctl.files.disk import demand_readable
from sppctl.files.names import DIRECTORIES, INDEX_NAME, RECORD, SINGLE_NAME
from sppctl.files.paths import similar_directory

# weights are written tensor by tensor; all other files that a checkpoint needs to load are copied unchanged
TEMPLATES = "additional_chat_templates/*.jinja"  # named templates of a tokenizer: its only folder
SIDE_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", TEMPLATES)
TERMS = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*")  # most must go with the weights
# names of a model's longest input in config.json
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
# architectures that come with sppctl, by hub id
SHIPPED = {
    file.stem.replace("--", "/"): file
    for file in sorted((Path(__file__).resolve().parent.parent / "assets" / "architectures").glob("*.json"))
}


def locate(
    path: str,
    gguf_file: str | None = None,
    revision: str | None = None,
    *,
    key: str = "model.path",
    adapters: bool = False,
    download: bool = True,
) -> Path:
    """The local directory of a checkpoint; a hub id is downloaded (or taken from the cache).

    Args:
        path: local directory, ``package:NAME`` (found without importing the package), or hub id.
        gguf_file: a file that must be in it.
        revision: of a hub id.
        key: the configuration key of the path, for errors.
        adapters: whether a PEFT adapter is accepted.
        download: whether a hub id that is not in the cache is downloaded.

    Raises:
        UserError: the checkpoint does not exist, or could not be downloaded.
    """
    if revision is not None and (path.startswith("package:") or Path(path).is_dir()):
        raise UserError(
            "model.revision", f"{path} is a local directory, which has no revision {revision}", "leave it out"
        )
    directory = directory_of(path, gguf_file, revision, key=key, download=download)
    from sppctl.files.safe_files import is_adapter, is_plain

    gguf_files = sorted(file.name for file in directory.glob("*.gguf"))
    if gguf_file:
        if not all(map(is_plain, gguf_file.split("/"))):
            raise UserError("model.gguf_file", f"{gguf_file!r} is not the name of a file inside the model's directory")
        if not (directory / gguf_file).is_file():
            present = ", ".join(gguf_files) or "no .gguf file"
            raise UserError("model.gguf_file", f"{gguf_file} is not in {directory}", f"there is {present}")
    elif is_adapter(directory):
        if not adapters:
            raise UserError(key, f"{path}: this is a PEFT adapter", f"{key} takes a full model")
    elif not (directory / "config.json").is_file():
        fix = f"give the name of its GGUF file: model.gguf_file={' or '.join(gguf_files)}" if gguf_files else None
        if (newest := newest_checkpoint(directory)) is not None:
            raise UserError(key, f"{path} is a run, not a checkpoint", f"name one of its checkpoints, such as {newest}")
        raise UserError(key, f"{path} has no config.json, so it is not a checkpoint", fix)
    return directory


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The last finished checkpoint of a run; None if the directory holds none."""
    checkpoints = (run_dir / DIRECTORIES[stage] for stage in ("merge", "prune"))
    return next((directory for directory in checkpoints if (directory / RECORD).is_file()), None)


def pruning_records(checkpoint: Path) -> list[Path]:
    """The records among which that of a checkpoint's pruning is, if it has one: its own, and of a merged one its run's.

    The dense model that a run unpacks beside them was not pruned.
    """
    if not (checkpoint / RECORD).is_file():
        return []
    of_run = checkpoint.parent / DIRECTORIES["prune"] / RECORD
    is_merged = checkpoint.name == DIRECTORIES["merge"] and of_run.is_file()
    return [checkpoint / RECORD, *([of_run] if is_merged else [])]


def directory_of(
    path: str, gguf_file: str | None = None, revision: str | None = None, *, key: str, download: bool = True
) -> Path:
    """Like :func:`locate`, but of any directory, whatever it holds."""
    if path.startswith("package:"):
        name = path.removeprefix("package:")
        spec = None
        with contextlib.suppress(ImportError, ValueError):
            spec = importlib.util.find_spec(name) if re.fullmatch(r"\w+", name) else None
        if spec is None or not spec.submodule_search_locations:
            raise UserError(key, f"{path}: no such package is installed (pip install --no-deps {name or 'NAME'})")
        return Path(next(iter(spec.submodule_search_locations)))
    if Path(path).is_dir():
        check_files(Path(path))
        return Path(path)
    if os.path.lexists(path):
        folder, name = os.path.split(path)
        fix = f"write model.path={folder or '.'} model.gguf_file={name}" if name.endswith(".gguf") else None
        kind = "a file" if Path(path).is_file() else "neither a directory nor a link to one"
        raise UserError(key, f"{path} is {kind}, not a checkpoint directory", fix)
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) and not path.startswith("."):
        return _download(path, gguf_file, revision, key) if download else _cached(path, gguf_file, revision, key)
    similar = similar_directory(path)
    fix = "give a hub id, a directory or package:NAME" if similar is None else f"did you mean {similar}?"
    raise UserError(key, f"{path} does not exist", fix)


def locate_weights(path: str) -> Path:
    """Like :func:`locate`, but accepts any folder of safetensors files, with or without config.json."""
    if not Path(path).is_dir():
        return locate(path)
    check_files(Path(path))
    return Path(path)


def check_files(directory: Path) -> None:
    """Raises UserError if a file that is read or copied is a pipe, a directory, a broken link or not readable."""
    if not os.access(directory, os.R_OK | os.X_OK):
        raise UserError(f"{directory} cannot be read (permission denied); change its permissions")
    for pattern in (*SIDE_FILES, *TERMS, "*.py", "*.safetensors"):
        for path in sorted(directory.glob(pattern)):
            demand_readable(path)


def config_source(path: str, gguf_file: str | None = None, revision: str | None = None) -> tuple[Path, str]:
    """The file that describes a model without its weights, and a text that names its source.

    It is the ``gguf_file`` if there is one, else config.json, or one of :data:`SHIPPED`. A local directory or an
    installed package comes first, then the hub's cache, then the architectures shipped with sppctl, and the hub last,
    because an unreachable hub costs half a minute. Of a hub id only config.json and Python code are downloaded.

    Raises:
        UserError: there is none.
    """
    if gguf_file is not None:
        return locate(path, gguf_file, revision) / gguf_file, gguf_file
    if path.startswith(("package:", ".", "/")) or Path(path).exists():
        directory = locate(path, revision=revision)
        return directory / "config.json", f"config.json in {directory}"
    return _hub_config(path, revision)


def max_window(path: str, gguf_file: str | None = None, revision: str | None = None) -> int | None:
    """The longest input of a model in tokens; None if its config.json does not say, or could not be read."""
    if gguf_file is not None:
        return None
    is_local = path.startswith(("package:", ".", "/")) or Path(path).exists()
    try:  # unlike config_source, without the library that checks a directory
        file = directory_of(path, key="") / "config.json" if is_local else _hub_config(path, revision)[0]
        config = json.loads(file.read_text(encoding="utf-8"))
    except (UserError, OSError, ValueError, RecursionError):  # reported by the checks of the command
        return None
    sections = [config, config.get("text_config")] if isinstance(config, dict) else []
    limits = [section.get(key) for section in sections if isinstance(section, dict) for key in POSITIONS]
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)


@functools.cache  # so that a command asks the hub once
def _hub_config(repository: str, revision: str | None) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        file = try_to_load_from_cache(repository, "config.json", revision=revision)
    except HFValidationError as error:
        fix = "give a hub id, a directory or package:NAME"
        raise UserError("model.path", f"{repository} does not exist", fix) from error
    if isinstance(file, str):
        return Path(file), "config.json in the hub's cache"
    if revision is None and repository in SHIPPED:
        return SHIPPED[repository], "the architecture shipped with sppctl"
    try:  # unlike hf_hub_download, it asks an unreachable hub once, and silently
        patterns = ["config.json", "*.py"]  # code is only run with model.trust_remote_code
        directory = Path(
            snapshot_download(repository, revision=revision, allow_patterns=patterns, ignore_patterns="*/*")
        )
        if not (directory / "config.json").is_file():
            raise FileNotFoundError("the repository has none")
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UserError(
            "model.path",
            f"{repository} is not a local directory, and its config.json is neither cached nor shipped, and could not "
            f"be downloaded ({first_line(error)})",
            "check the name, the network and HF_TOKEN, or give a directory with its config.json; shipped: "
            + ", ".join(SHIPPED),
        ) from error
    return directory / "config.json", "config.json from the hub"


@functools.cache  # so that a command asks the hub once, and has the same files whenever it asks
def _snapshot(repository: str, gguf_file: str | None, revision: str | None, cached: bool = False) -> Path:
    from huggingface_hub import snapshot_download

    def fetch(*patterns: str, folders: bool = gguf_file is not None and "/" in gguf_file) -> Path:
        ignored = None if folders else "*/*"  # folders hold other formats and intermediate checkpoints
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                local_files_only=cached,
                allow_patterns=[*patterns],
                ignore_patterns=ignored,
            )
        )

    # its card has its licence; its code is only run with model.trust_remote_code
    directory = fetch(*SIDE_FILES, *TERMS, "README.md", "*.py", gguf_file or SINGLE_NAME)
    fetch(TEMPLATES, folders=True)
    if gguf_file is None and not (directory / SINGLE_NAME).is_file():
        from sppctl.files.safe_files import read_index

        index = directory / INDEX_NAME
        # a repository may hold the same weights a second time in another format (consolidated.safetensors)
        shards = set(read_index(index).values()) if index.is_file() else {"*.safetensors"}
        directory = fetch(*sorted(shards))
    return directory


def _download(repository: str, gguf_file: str | None, revision: str | None, key: str) -> Path:
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return _snapshot(repository, gguf_file, revision)
    except UserError:
        raise
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        similar = similar_directory(repository)
        fix = "check the name, the network and HF_TOKEN, or download it first and give its directory"
        raise UserError(
            key,
            f"{repository} is not a local directory and could not be downloaded from the hub ({first_line(error)})",
            fix if similar is None else f"did you mean {similar}?",
        ) from error


def _cached(repository: str, gguf_file: str | None, revision: str | None, key: str) -> Path:
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return _snapshot(repository, gguf_file, revision, cached=True)
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise UserError(key, f"{repository} is neither a local directory nor in the hub's cache") from error
