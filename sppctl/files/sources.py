"""What a task of lm-eval is made from: the files that are read while it loads, and data of the hub by its version.

Files that Python opens or lists are seen by an audit hook. ``datasets`` keeps what it has read and knows local files by
their times alone, so that it is given a cache of its own for every content of them.
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
# what load_dataset takes beside the arguments of load_dataset_builder
OF_READING = ("split", "verification_mode", "keep_in_memory", "save_infos", "streaming", "num_proc")


@dataclass
class Recorded:
    """What was read while a task was loaded.

    Attributes:
        read: files, and folders that were listed.
        data: of these, those that a data set is made of, wherever they are.
        written: files that were not there before, or not as they are.
        versions: of the hub's data, by their folder in the cache of ``datasets``.
    """

    read: set[str] = field(default_factory=set)
    data: set[str] = field(default_factory=set)
    written: set[str] = field(default_factory=set)
    versions: dict[str, str] = field(default_factory=dict)

    def summary(self, include_path: str | None) -> dict[str, Any]:
        """As it is recorded with a result: ``{"digest", "files": {name: hash}, "versions"}``.

        The digest says which content was read, wherever it is.
        """
        seen = (_source(Path(path).resolve()) for path in self.read - self.written)
        outside = _outside()
        paths = [path for path in seen if not _is_incidental(path, outside)]
        paths += [Path(path).resolve() for path in self.data]
        known = {_name(path, include_path): path for path in paths}
        files = {name: found for name in sorted(known) if (found := _content(known[name])) is not None}
        text = "".join([*sorted(files.values()), *(f"{key} {value}" for key, value in sorted(self.versions.items()))])
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return {"digest": digest, "files": files, "versions": dict(sorted(self.versions.items()))}


def are_current(sources: Mapping[str, Any], definition: Path | None, include_path: str | None) -> bool:
    """Whether loading a task again would read what was recorded.

    Args:
        sources: as of :meth:`Recorded.summary`.
        definition: the file that defines the task now, which must be the one that was read.
        include_path: the folder with tasks of one's own, now.
    """
    if definition is not None and _name(definition.resolve(), include_path) not in sources["files"]:
        return False
    files = all(_content(_place(name, include_path)) == found for name, found in sources["files"].items())
    return files and not newer(sources["versions"])


def newer(versions: Mapping[str, str]) -> dict[str, str]:
    """Of data of the hub that was recorded, what has come into the cache of ``datasets`` since."""
    found = {key: _latest(key) for key in versions}
    return {key: now for key, now in found.items() if now is not None and now != versions[key].rpartition(" ")[2]}


# --- recording --------------------------------------------------------------------------------------------------------

_recorded: Recorded | None = None
_loaded: set[str] = set()  # modules that the last task brought in


@functools.cache
def _listen() -> None:
    """An audit hook cannot be removed: there is one, and it looks only while something is recorded."""

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
    """Records what is read inside; modules that only an earlier task needed are read again."""
    global _recorded
    import datasets

    _listen()
    for name in _loaded:
        sys.modules.pop(name, None)
    before, load, wrote = set(sys.modules), datasets.load_dataset, sys.dont_write_bytecode
    datasets.load_dataset = functools.partial(_load_dataset, load)
    sys.dont_write_bytecode = True  # compiled modules are known by time and size alone
    try:
        with noting() as found:
            yield found
    finally:
        datasets.load_dataset, sys.dont_write_bytecode = load, wrote
        new = {name: getattr(module, "__file__", None) for name, module in sys.modules.items() if name not in before}
        outside = _outside()
        _loaded.clear()
        _loaded.update(name for name, file in new.items() if file and not _is_incidental(Path(file).resolve(), outside))


@contextlib.contextmanager
def noting() -> Iterator[Recorded]:
    """Records only what :func:`note` is given, and files if :func:`recording` listens."""
    global _recorded
    _recorded = found = Recorded()
    try:
        yield found
    finally:
        _recorded = None


def _load_dataset(load: Any, *arguments: Any, **options: Any) -> Any:
    """``datasets.load_dataset``, which takes local files for unchanged if their times are, with a cache by content."""
    import datasets

    given = dict(zip(("path", "name", "data_dir", "data_files"), arguments, strict=False)) | options
    if any(given.get(key) is not None for key in ("data_files", "data_dir")) or os.path.exists(str(given.get("path"))):
        builder = datasets.load_dataset_builder(**{k: v for k, v in given.items() if k not in OF_READING})
        named = [path for paths in (builder.config.data_files or {}).values() for path in paths]
        local = sorted({path for path in map(str, named) if os.path.isfile(path)})
        text = "".join(f"{path} {_content(Path(path))}" for path in local)
        folder = cache.folder(f"tasks/{hashlib.sha256(text.encode()).hexdigest()[:16]}") if local else None
        if folder is not None:
            options["cache_dir"] = str(folder)
        if _recorded is not None:
            _recorded.data.update(local)
    found = load(*arguments, **options)
    note(found)
    return found


def note(dataset: Any) -> None:
    """Records the arrow files of a data set, which are read without Python's knowledge."""
    if _recorded is None:
        return
    for part in dataset.values() if isinstance(dataset, Mapping) else [dataset]:
        for file in getattr(part, "cache_files", None) or []:
            path = Path(file["filename"]).resolve()
            root = _datasets_cache()
            if path.is_relative_to(root):
                *folders, version, _ = path.relative_to(root).parts
                key = "/".join(folders)
                last = _latest(key)  # a version that was asked for need not be the last that was downloaded
                _recorded.versions[key] = version if last in (None, version) else f"{version} beside {last}"
            else:
                _recorded.read.add(str(path))


def _datasets_cache() -> Path:
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE).resolve()


def _latest(key: str) -> str | None:
    """The version of the hub's data that is in the cache; None if there is none, the last that was put there."""
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
    """What a compiled module was compiled from; any other file itself."""
    try:
        return Path(importlib.util.source_from_cache(str(path)))
    except ValueError:
        return path


def _is_incidental(path: Path, outside: tuple[str, ...]) -> bool:
    tasks = _tasks_of_lm_eval()
    return path.parent == tasks if path.is_relative_to(tasks) else f"{path}/".startswith(outside)


def _outside() -> tuple[str, ...]:
    """Where nothing belongs to a task: code of Python and of packages, caches, devices."""
    import datasets
    import huggingface_hub

    caches = (datasets.config.HF_CACHE_HOME, datasets.config.HF_DATASETS_CACHE, datasets.config.HF_MODULES_CACHE)
    own = cache.root()
    code = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    outside = ["/proc", "/sys", "/dev", *caches, huggingface_hub.constants.HF_HUB_CACHE, *code, *([own] if own else [])]
    outside += [_tasks_of_lm_eval().parent, Path(__file__).parent.parent]
    return tuple(f"{Path(place).resolve()}/" for place in outside)


def _name(path: Path, include_path: str | None) -> str:
    """A path by which a file is found again where packages, own tasks or the current directory have moved."""
    roots = [(PACKAGE, _tasks_of_lm_eval()), (HERE, Path.cwd())]
    if include_path is not None:
        roots.insert(1, (INCLUDED, Path(include_path)))
    for prefix, root in roots:
        if path.is_relative_to(root.resolve()):
            return f"{prefix}{path.relative_to(root.resolve())}"
    return str(path)


def _place(name: str, include_path: str | None) -> Path:
    if name.startswith(PACKAGE):
        return _tasks_of_lm_eval() / name.removeprefix(PACKAGE)
    if name.startswith(INCLUDED):
        return Path(include_path or os.devnull) / name.removeprefix(INCLUDED)
    return Path(name)


def _content(path: Path) -> str | None:
    """A hash of a file, or of the names in a folder; None if it is neither."""
    digest = hashlib.sha256()
    try:
        if path.is_dir():
            digest.update("\0".join(sorted(name for name in os.listdir(path) if name != "__pycache__")).encode())
        else:
            with path.open("rb") as file:
                while piece := file.read(1 << 20):
                    digest.update(piece)
    except OSError:
        return None
    return digest.hexdigest()[:16]
