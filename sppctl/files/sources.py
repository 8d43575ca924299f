"""The sources of an lm-eval task: the files that are read while it loads, and hub data by version.

An audit hook sees every file that Python opens or lists. ``datasets`` caches local files by their times alone, so it
gets a separate cache folder for each content of them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sppctl.files import cache

PACKAGE, INCLUDED, HERE = "lm_eval:", "include:", "./"
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# arguments of load_dataset that load_dataset_builder does not take
OF_READING = ("split", "verification_mode", "keep_in_memory", "save_infos", "streaming", "num_proc")


@dataclass
class Recorded:
    """The files and hub data read while a task was loaded."""

    read: set[str] = field(default_factory=set)  # files that were read, folders that were listed
    data: set[str] = field(default_factory=set)  # local files of data sets, recorded wherever they are
    written: set[str] = field(default_factory=set)  # files that were created or changed
    versions: dict[str, str] = field(default_factory=dict)  # of hub data, by folder in the cache of datasets

    def summary(self, include_path: str | None) -> dict[str, Any]:
        """What is recorded with a result: ``{"digest", "files": {name: hash}, "versions"}``.

        The digest identifies the content that was read, wherever the files are.
        """
        outside = _outside()
        paths = [_source(Path(path).resolve()) for path in self.read - self.written]
        paths = [path for path in paths if not _is_incidental(path, outside)]
        named = {_name(path, include_path): path for path in (*paths, *(Path(path).resolve() for path in self.data))}
        files = {name: content for name in sorted(named) if (content := content_hash(named[name])) is not None}
        versions = dict(sorted(self.versions.items()))
        text = "".join([*sorted(files.values()), *(f"{key} {value}" for key, value in versions.items())])
        return {"digest": hashlib.sha256(text.encode()).hexdigest()[:16], "files": files, "versions": versions}


def are_current(sources: Mapping[str, Any], definition: Path | None, include_path: str | None) -> bool:
    """Whether loading a task again would read the recorded sources (:meth:`Recorded.summary`).

    ``definition`` is the file that now defines the task; it must be among the recorded files.
    """
    if definition is not None and _name(definition.resolve(), include_path) not in sources["files"]:
        return False
    roots = dict(_roots(include_path))
    for name, recorded in sources["files"].items():
        prefix = next((prefix for prefix in roots if name.startswith(prefix)), "")
        if content_hash(roots.get(prefix, Path()) / name.removeprefix(prefix)) != recorded:
            return False
    return not newer(sources["versions"])


def newer(versions: Mapping[str, str]) -> dict[str, str]:
    """The latest version of each recorded hub data set of which ``datasets`` has cached another one since."""
    latest = {key: _latest(key) for key in versions}
    return {key: last for key, last in latest.items() if last is not None and last != versions[key].rpartition(" ")[2]}


# --- recording --------------------------------------------------------------------------------------------------------

_recorded: Recorded | None = None
_loaded: set[str] = set()  # modules that the last task imported


@functools.cache
def _listen() -> None:
    """Installs the audit hook, once, because it cannot be removed; it records only inside :func:`noting`."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if _recorded is None or event not in ("open", "os.scandir") or not isinstance(arguments[0], str | os.PathLike):
            return
        path = os.path.abspath(os.fspath(arguments[0]))
        if event == "open" and (set(arguments[1] or "") & set("wax+") or (arguments[2] or 0) & WRITING):
            _recorded.written.add(path)
        else:
            _recorded.read.add(path)

    sys.addaudithook(hook)


@contextlib.contextmanager
def recording() -> Iterator[Recorded]:
    """Records what is read inside; modules that only an earlier task imported are imported again."""
    import datasets

    _listen()
    for name in _loaded:
        sys.modules.pop(name, None)
    before, load, wrote = set(sys.modules), datasets.load_dataset, sys.dont_write_bytecode
    datasets.load_dataset = functools.partial(_load_dataset, load)
    sys.dont_write_bytecode = True  # Python checks compiled modules by time and size alone
    try:
        with noting() as recorded:
            yield recorded
    finally:
        datasets.load_dataset, sys.dont_write_bytecode = load, wrote
        new = {name: getattr(module, "__file__", None) for name, module in sys.modules.items() if name not in before}
        outside = _outside()
        _loaded.clear()
        _loaded.update(name for name, file in new.items() if file and not _is_incidental(Path(file).resolve(), outside))


@contextlib.contextmanager
def noting() -> Iterator[Recorded]:
    """Records the data sets passed to :func:`note`, and files once :func:`recording` has installed the hook."""
    global _recorded
    _recorded = recorded = Recorded()
    try:
        yield recorded
    finally:
        _recorded = None


def _load_dataset(load: Any, *arguments: Any, **options: Any) -> Any:
    """``datasets.load_dataset`` with a cache folder by the content of local files: it checks only their times."""
    import datasets

    named = dict(zip(("path", "name", "data_dir", "data_files"), arguments, strict=False)) | options
    if any(named.get(key) is not None for key in ("data_files", "data_dir")) or os.path.exists(str(named.get("path"))):
        builder = datasets.load_dataset_builder(**{k: v for k, v in named.items() if k not in OF_READING})
        files = [str(path) for paths in (builder.config.data_files or {}).values() for path in paths]
        local = sorted({path for path in files if os.path.isfile(path)})
        root = cache.root() if local else None
        if root is not None:
            text = "".join(f"{path} {content_hash(Path(path))}" for path in local)
            folder = root / "tasks" / hashlib.sha256(text.encode()).hexdigest()[:16]
            with contextlib.suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                options["cache_dir"] = str(folder)
        if _recorded is not None:
            _recorded.data.update(local)
    dataset = load(*arguments, **options)
    note(dataset)
    return dataset


def note(dataset: Any) -> None:
    """Records the arrow files of a data set, which are not opened by Python and so not seen by the hook."""
    if _recorded is None:
        return
    root = _datasets_cache()
    for part in dataset.values() if isinstance(dataset, Mapping) else [dataset]:
        for file in getattr(part, "cache_files", None) or []:
            path = Path(file["filename"]).resolve()
            if path.is_relative_to(root):
                *folders, version, _ = path.relative_to(root).parts
                key = "/".join(folders)
                last = _latest(key)  # a requested version need not be the one downloaded last
                _recorded.versions[key] = version if last in (None, version) else f"{version} beside {last}"
            else:
                _recorded.read.add(str(path))


def _datasets_cache() -> Path:
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE).resolve()


def _latest(key: str) -> str | None:
    """The version of a hub data set that was cached last; None if none is cached."""
    folder = _datasets_cache() / key
    versions = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return max(versions, key=lambda path: path.stat().st_mtime_ns).name if versions else None


# --- names and content ------------------------------------------------------------------------------------------------


@functools.cache
def _tasks_of_lm_eval() -> Path:
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]).resolve() / "tasks"


def _source(path: Path) -> Path:
    """The source file of a compiled module; any other file itself."""
    try:
        return Path(importlib.util.source_from_cache(str(path)))
    except ValueError:
        return path


def _is_incidental(path: Path, outside: tuple[str, ...]) -> bool:
    tasks = _tasks_of_lm_eval()
    return path.parent == tasks if path.is_relative_to(tasks) else f"{path}/".startswith(outside)


def _outside() -> tuple[str, ...]:
    """Folders whose files are not sources of a task: code of Python and of packages, caches, devices."""
    import datasets
    import huggingface_hub

    caches = (datasets.config.HF_CACHE_HOME, datasets.config.HF_DATASETS_CACHE, datasets.config.HF_MODULES_CACHE)
    code = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    packages = (_tasks_of_lm_eval().parent, Path(__file__).parent.parent)
    own_cache = cache.root() or "/proc"
    outside = ("/proc", "/sys", "/dev", *caches, huggingface_hub.constants.HF_HUB_CACHE, *code, *packages, own_cache)
    return tuple(f"{Path(folder).resolve()}/" for folder in outside)


def _roots(include_path: str | None) -> list[tuple[str, Path]]:
    """Folders that files are named relative to, so that they are found again after the folders have moved."""
    included = [] if include_path is None else [(INCLUDED, Path(include_path))]
    return [(PACKAGE, _tasks_of_lm_eval()), *included, (HERE, Path.cwd())]


def _name(path: Path, include_path: str | None) -> str:
    for prefix, root in _roots(include_path):
        if path.is_relative_to(root.resolve()):
            return f"{prefix}{path.relative_to(root.resolve())}"
    return str(path)


def content_hash(path: Path) -> str | None:
    """A hash of a file's content or of the names in a folder; None for anything else."""
    try:
        if path.is_dir():
            names = sorted(name for name in os.listdir(path) if name != "__pycache__")
            return hashlib.sha256("\0".join(names).encode()).hexdigest()[:16]
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError:
        return None
