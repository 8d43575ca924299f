"""A checkpoint or an adapter of a run -> a repository on the hub, through huggingface_hub."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from sppctl import console, records
from sppctl.errors import StageError, UserError, first_line
from sppctl.files import integrity, sealed, strict_json
from sppctl.files.names import DIRECTORIES, RECORD
from sppctl.files.safe_files import ADAPTER_CONFIG, adapter_settings
from sppctl.publish import card, card_data
from sppctl.records import METRICS
from sppctl.report.study import RunStudy

BASE_NAME = "base_model_name_or_path"
# files in which libraries note where a model was loaded from, and the keys
NOTED = ("config.json", "tokenizer_config.json")
ORIGINS = {"_name_or_path", "name_or_path"}
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "adapter_*")  # what would be loaded beside those uploaded
TOKENS = "set HF_TOKEN or run hf auth login; a token with write access: https://huggingface.co/settings/tokens"


@dataclass(frozen=True)
class UploadedFile:
    """A file of an upload."""

    file: str  # its path in the repository
    bytes: int


@dataclass(frozen=True)
class Upload:
    """What is uploaded, and where to."""

    directory: str
    repository: str
    revision: str
    files: list[UploadedFile]
    url: str | None = None  # of the commit; None: nothing was uploaded


def execute(
    path: Path,
    repository: str,
    *,
    public: bool = False,
    revision: str | None = None,
    pruned: str | None = None,
    dry_run: bool = False,
) -> Upload:
    """Uploads what a stage has published: the files of its record and a model card, nothing else.

    Args:
        path: directory of a stage, or of a run, whose merged checkpoint is meant then.
        repository: ``OWNER/NAME``, made if it does not exist.
        public: everybody may see it.
        revision: branch, made if it does not exist; None: main.
        pruned: hub id of the pruned weights that an adapter belongs to.
        dry_run: upload nothing.

    Raises:
        UserError: no finished stage, files that are not as recorded, a name that the hub does not allow, no token,
            offline mode, or a repository that is public or holds other weights.
        StageError: the hub cannot be reached, or refuses.
    """
    _check_names(repository, pruned)
    directory, stage = _stage_of(path)
    contents = _contents(directory, stage, repository, pruned)
    sizes = {name: len(own) if isinstance(own, bytes) else own.stat().st_size for name, own in contents.items()}
    files = [UploadedFile(name, size) for name, size in sizes.items()]
    upload = Upload(str(directory), repository, revision or "main", files)
    return upload if dry_run else replace(upload, url=_send(upload, contents, public))


def _check_names(repository: str, pruned: str | None) -> None:
    from huggingface_hub import utils

    for name, key in ((repository, "OWNER/NAME"), (pruned, "--base-model")):
        try:
            if name is not None and name.count("/") != 1:
                raise ValueError("it is not OWNER/NAME")
            utils.validate_repo_id(name or "OWNER/NAME")  # type: ignore[attr-defined]
        except ValueError as error:
            raise UserError(key, f"{name} is not the name of a repository on the hub: {first_line(error)}") from error


# --- what is uploaded -------------------------------------------------------------------------------------------------


def _stage_of(path: Path) -> tuple[Path, str]:
    """The directory of a stage, and which stage that is."""
    directory = path
    if not (path / RECORD).is_file() and any((path / name / RECORD).is_file() for name in DIRECTORIES.values()):
        directory = path / DIRECTORIES["merge"]
        if not (directory / RECORD).is_file():
            merge = console.command("merge", run=path)
            raise UserError(f"{path} holds no merged checkpoint; make it ({merge}), or name {path}/pruned")
        records.refuse_outdated(path)
    unfinished = directory.resolve().name.endswith(".partial")
    if unfinished or not (directory / RECORD).is_file():
        raise UserError(
            f"{directory} is not a finished stage of a run (no {RECORD}); name RUN, RUN/merged, RUN/pruned or "
            "RUN/adapter, or finish the stage first"
        )
    stage = str(sealed.read(directory / RECORD, "redo the stage with --force").get("stage"))
    if stage not in METRICS:
        raise UserError(f"{directory} is the dense model of a run, which sppctl does not upload; name RUN/merged")
    return directory, stage


def _contents(directory: Path, stage: str, repository: str, pruned: str | None) -> dict[str, Path | bytes]:
    """What to upload by its path in the repository: recorded files as they are, the card as it is now.

    The record itself stays behind: it holds commands and paths of the machine that it was made on. Configurations go
    without the paths of the dense model and of the pruned weights.
    """
    record = records.read(directory / RECORD, stage)
    with console.working(f"checking the files of {directory}"):
        integrity.check(directory, record.files, records.remedy(stage, directory))
    contents: dict[str, Path | bytes] = {name: directory / name for name in sorted(record.files)}
    for name in contents.keys() & set(NOTED):
        settings = json.loads((directory / name).read_text(encoding="utf-8"))
        if (public := _without_paths(settings)) != settings:
            contents[name] = strict_json.dumps(public, indent=2).encode()
    if stage == "train":
        if pruned is None:
            base = f"{directory.parent}/{DIRECTORIES['prune']}"
            console.warn(f"nobody else has the base of this adapter, {base}: push it too, and name it in --base-model")
        settings = adapter_settings(directory) | {BASE_NAME: pruned}
        contents[ADAPTER_CONFIG] = strict_json.dumps(settings, indent=2, sort_keys=True).encode()
    elif pruned is not None:
        raise UserError("--base-model", f"{directory} is not an adapter", "leave it out")
    if card.is_ours(directory):
        study = card.study_of(directory.parent)
        if stage not in study.stages or study.stages[stage].output != record.output:  # it was moved, or is outdated
            study = RunStudy(str(directory), None, {stage: record}, {})
        contents[card_data.CARD] = card.render(study, stage, repository, pruned).encode()
    else:
        contents[card_data.CARD] = directory / card_data.CARD
    return contents


def _without_paths(value: Any) -> Any:
    """A configuration without the local paths that models were loaded from."""
    if isinstance(value, list):
        return [_without_paths(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    origins = {key for key in ORIGINS & value.keys() if card.place(str(value[key])) != value[key]}
    return {key: _without_paths(inner) for key, inner in value.items() if key not in origins}


# --- the hub ----------------------------------------------------------------------------------------------------------


def _send(upload: Upload, contents: dict[str, Path | bytes], public: bool) -> str:
    """Makes the repository if need be and commits the files at once; returns the address of the commit."""
    import huggingface_hub as hub
    from huggingface_hub import constants, utils
    from huggingface_hub.errors import RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE", "is set, so nothing can be uploaded", "unset it")
    token = hub.get_token()
    if token is None:
        raise UserError(f"no token for the hub; {TOKENS}")
    api = hub.HfApi(token=token, library_name="sppctl")
    if not sys.stderr.isatty():
        utils.disable_progress_bars()  # type: ignore[attr-defined]
    name, branch = upload.repository, upload.revision
    with _answers(name):
        try:
            _check_repository(api.model_info(name), public)
        except RepositoryNotFoundError:
            api.create_repo(name, private=not public)
        if branch != "main":
            api.create_branch(name, branch=branch, exist_ok=True)
        there = [file.rfilename for file in api.model_info(name, revision=branch).siblings or ()]
        _check_weights(f"{name} ({branch})", there, contents)
        operations = [hub.CommitOperationAdd(file, content) for file, content in contents.items()]
        console.note(f"push: {len(operations)} files, {sum(file.bytes for file in upload.files):,} bytes to {name}")
        commit = api.create_commit(name, operations, commit_message="Upload with sppctl", revision=branch)
    return str(commit.commit_url)


def _check_repository(info: Any, public: bool) -> None:
    """Raises UserError if a repository is visible to everybody, and nobody asked for that."""
    if not info.private and not public:
        raise UserError(f"{info.id} is public; --public uploads to it, another name keeps the files private")
    if info.private and public:
        console.note(f"push: {info.id} exists and is private, which it stays; its settings on the hub change that")


def _check_weights(name: str, there: Iterable[str], contents: dict[str, Any]) -> None:
    """Raises UserError if weights would lie beside those that are uploaded, and be loaded with or instead of them."""
    loaded = [file for file in there if "/" not in file and any(fnmatch(file, pattern) for pattern in WEIGHTS)]
    others = [file for file in loaded if file not in contents]
    if others:
        raise UserError(
            f"{name} holds {min(others)}, which would lie beside the new weights; delete it there, or name another "
            "repository or --revision"
        )


@contextlib.contextmanager
def _answers(repository: str) -> Iterator[None]:
    """Says in one line why the hub does not do what is asked inside; tokens are never part of it."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except (UserError, StageError):
        raise
    except Exception as error:  # the hub's client raises what its transports raise
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__) is not None:
            chain.append(cause)
        answer = next((one for one in chain if isinstance(one, HfHubHTTPError)), None)
        if answer is None:
            reason = first_line(chain[-1])
            raise StageError(
                f"{repository} could not be uploaded: {reason}; check the network, the same command continues"
            ) from error
        raise StageError(f"{repository}: {_explained(answer)}") from error


def _explained(answer: Any) -> str:
    """What an answer of the hub means, and what to do."""
    status = answer.response.status_code
    said = first_line(answer.server_message)[:200] if answer.server_message else ""
    text = {
        401: f"the hub does not accept the token (401); {TOKENS}",
        403: "the token must not write there (403); use a token with write access, or another OWNER",
        404: "the hub does not find it (404); check OWNER/NAME and the token's access",
        409: "the hub reports a conflict (409), most likely with another upload; run the same command again",
    }.get(status, f"the hub answered {status}; try again later")
    return f"{text} ({re.sub(r'hf_[A-Za-z0-9]+', 'hf_...', said)})" if said else text
