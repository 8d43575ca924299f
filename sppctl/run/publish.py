"""The files of a run: one command at a time works in them, and directories are published atomically.

A stage works in ``RUN/.NAME.partial`` and renames it to ``RUN/NAME`` when it is complete. ``stage.json`` is written
last: if a command is killed between that and the rename, the next command publishes the stage.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sppctl import console, distributed
from sppctl.config.load import to_yaml
from sppctl.config.settings import Config
from sppctl.errors import UserError
from sppctl.files import disk, sealed
from sppctl.files.names import DIRECTORIES, LOG, RECORD, RESOLVED, WORKING
from sppctl.records import R, StageRecord, to_json
from sppctl.run import attempts

RESUMABLE = ("prune", "train")  # stages that continue an interrupted attempt; the others start again
LOCK = ".lock"
OWN_FILES = {LOCK, LOG, RESOLVED, f".{RESOLVED}.partial"}
PUBLISHED = ("base", *DIRECTORIES.values())


@contextlib.contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Inside, no other command works in a run directory; UserError if one does already."""
    with (directory / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):  # over NFS it is either
                problem = "another sppctl command is working in this directory; wait for it"
            else:
                problem = f"cannot be locked ({error.strerror}); use a directory on a file system with locks"
            raise UserError(str(directory), problem) from error
        yield


def remove(path: Path) -> None:
    """Deletes a directory; of a link, the link alone."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


@dataclass
class RunDirectory:
    """One run directory under one configuration."""

    config: Config
    finished: set[str] = field(default_factory=set, kw_only=True)  # directories completed by an earlier, killed command

    @property
    def directory(self) -> Path:
        """The run directory."""
        return Path(self.config.run.dir)

    @property
    def log(self) -> Path:
        """The file with the messages of all commands in the run directory."""
        return self.directory / LOG

    def path(self, stage: str) -> Path:
        """The published directory of a stage."""
        return self.directory / DIRECTORIES[stage]

    def partial(self, name: str) -> Path:
        """The directory in which a stage works until it is complete."""
        return self.directory / f".{name}.partial"

    def fresh_partial(self, name: str) -> Path:
        """The same, empty."""
        path = self.partial(name)
        remove(path)
        path.mkdir(parents=True)
        return path

    def complete(self, name: str, make_record: Callable[..., R]) -> R:
        """Publishes a stage; once its record is written, the next command publishes it if this one is killed.

        ``make_record`` is called with ``output``, the fingerprint of the weights, and ``files``, the hash of each file.
        """
        from sppctl.files import integrity
        from sppctl.model import checkpoint
        from sppctl.publish import card

        partial = self.partial(name)
        disk.apply_umask(partial)
        disk.sync_tree(partial)
        with console.working(f"hashing the files of {partial}"):
            files = integrity.hashes(partial, integrity.listing(partial, WORKING))
        record = make_record(output=checkpoint.identity_of(files), files=files)
        if isinstance(record, StageRecord):
            card.write_new(self.directory, record, partial)
        sealed.write(partial / RECORD, to_json(record))
        self._publish(name)
        return record

    def _publish(self, name: str) -> None:
        partial, target, old = self.partial(name), self.directory / name, self._old(name)
        attempts.clean(partial)
        remove(old)
        if target.exists():
            target.rename(old)
        partial.rename(target)
        disk.sync(self.directory)
        remove(old)

    def _old(self, name: str) -> Path:
        return self.directory / f".{name}.old"

    def take_over(self, source: RunDirectory, name: str) -> None:
        """Publishes in this run a directory that another run has published; called in :meth:`lock`."""
        published, partial = source.directory / name, self.fresh_partial(name)
        # hard links are safe, because published files are never changed in place
        ignored = shutil.ignore_patterns(RECORD)
        shutil.copytree(published, partial, copy_function=_link, ignore=ignored, dirs_exist_ok=True)
        if (published / RECORD).is_file():  # last, because it marks the directory as complete
            _link(str(published / RECORD), str(partial / RECORD))
        self._publish(name)

    def _finish(self) -> None:
        """Publishes directories that a killed command had completed, and removes those that no command continues."""
        resumable = [DIRECTORIES[stage] for stage in RESUMABLE]
        for name in PUBLISHED:
            partial, old, target = self.partial(name), self._old(name), self.directory / name
            if (partial / RECORD).is_file():
                console.note(f"{target}: complete since an earlier command, published now")
                self._publish(name)
                self.finished.add(name)
            elif name not in resumable:
                remove(partial)
            if old.is_dir() and not target.exists():
                old.rename(target)  # killed before the new directory was in place
            remove(old)
        for predictions in self.directory.glob(".reference-*"):  # of the dense model, from a killed evaluation
            remove(predictions)

    @contextlib.contextmanager
    def lock(self, *, only_measures: bool = False) -> Iterator[None]:
        """Keeps other commands from working in the run directory, and writes the configuration to resolved.yaml.

        A command that ``only_measures`` does not write the configuration of a run that has stages.
        """
        if not distributed.is_main():
            distributed.barrier()  # until the first process has cleaned up after an earlier command
            yield
            return
        self.check_directory()
        path = self.directory.absolute()
        new_folders = [folder for folder in [path, *path.parents] if not folder.exists()]
        before = set() if new_folders else {file.name for file in path.iterdir()}
        self.directory.mkdir(parents=True, exist_ok=True)
        resolved = self.directory / RESOLVED
        with exclusive(self.directory):
            try:
                console.log_to(self.log)
                console.log(f"$ {console.command_line()}")
                self._finish()
                has_stages = any((self.path(stage) / RECORD).is_file() for stage in DIRECTORIES)
                writes_config = not (only_measures and has_stages)
                if writes_config and not resolved.exists():
                    disk.write(resolved, to_yaml(self.config))
                distributed.barrier()
                yield
                if writes_config:
                    disk.write(resolved, to_yaml(self.config))  # at the end: a refused command must not change it
            finally:
                with contextlib.suppress(OSError):  # another process has written to a directory
                    # a run that failed before it made anything leaves nothing; a killed one may leave the partial file
                    if (names := {file.name for file in path.iterdir()}) <= OWN_FILES:
                        for name in names - before:
                            (path / name).unlink()
                        for folder in new_folders:
                            folder.rmdir()

    def check_directory(self) -> None:
        """Raises UserError if the run directory is not writable, or if an input of the run is one of its outputs."""
        path, config = self.directory, self.config
        for key, name, own in (
            ("model.path", config.model.path, PUBLISHED),
            ("prune.mask_from", config.prune.mask_from, ("pruned", "adapter", "merged")),
            ("train.distill.teacher", config.train.distill.teacher, ("adapter", "merged")),
        ):
            outputs = {(path / output).resolve() for output in own}
            if name is not None and outputs & {Path(name).resolve(), *Path(name).resolve().parents}:
                fix = "use another checkpoint, or another run.dir"
                raise UserError(key, f"{name} is an output of this run", fix)
        disk.demand_directory(path, "run.dir")
        if (path / "config.json").exists():  # files of the run would become part of the checkpoint
            raise UserError("run.dir", f"{path} holds a checkpoint (config.json)", "use a separate directory")
        for name in (*PUBLISHED, "eval"):
            disk.demand_directory(path / name, "run.dir")
            disk.demand_directory(self.partial(name), "run.dir")
        for name in (LOCK, LOG, RESOLVED):
            disk.demand_file(path / name, "run.dir")


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a different file system, or one without hard links
        shutil.copy2(source, target)
