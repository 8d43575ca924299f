"""The files of a run: one command at a time works in them, and a directory that exists is whole.

A stage works in ``RUN/.NAME.partial`` and renames it to ``RUN/NAME`` when it is complete. ``stage.json`` is written
last: a stage that was complete when its command was killed is published by the next command.
"""

from __future__ import annotations

import contextlib
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
from sppctl.files.names import DIRECTORIES, RECORD, WORKING
from sppctl.records import R, to_json
from sppctl.run import attempts

RESUMABLE = ("prune", "train")  # an interrupted attempt is continued; the others start again
LOCK, RESOLVED = ".lock", "resolved.yaml"
PUBLISHED = ("base", *DIRECTORIES.values())


@dataclass
class RunDirectory:
    """One run directory under one configuration."""

    config: Config
    finished: set[str] = field(default_factory=set, kw_only=True)  # directories that an earlier command left to publish

    @property
    def directory(self) -> Path:
        """Where everything of this run is."""
        return Path(self.config.run.dir)

    def path(self, stage: str) -> Path:
        """The published directory of a stage."""
        return self.directory / DIRECTORIES[stage]

    def partial(self, name: str) -> Path:
        """Where a stage works until it is complete."""
        return self.directory / f".{name}.partial"

    def fresh_partial(self, name: str) -> Path:
        """The same, empty."""
        path = self.partial(name)
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def complete(self, name: str, record: Callable[..., R]) -> R:
        """Publishes a stage; from the moment that its record is there, the next command does so if this one cannot.

        Its record is made of ``output``, the fingerprint of the weights, and ``files``, the hash of each.
        """
        from sppctl.files import integrity
        from sppctl.model import checkpoint

        partial = self.partial(name)
        disk.sync_tree(partial)
        with console.working(f"hashing the files of {partial}"):
            files = integrity.hashes(partial, integrity.listing(partial, WORKING))
        made = record(output=checkpoint.identity_of(files), files=files)
        sealed.write(partial / RECORD, to_json(made))
        self._publish(name)
        return made

    def _publish(self, name: str) -> None:
        partial, target, old = self.partial(name), self.directory / name, self._old(name)
        attempts.clean(partial)
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        partial.rename(target)
        disk.sync(self.directory)
        shutil.rmtree(old, ignore_errors=True)

    def _old(self, name: str) -> Path:
        return self.directory / f".{name}.old"

    def take_over(self, source: RunDirectory, name: str) -> None:
        """Publishes here what another run has published; called in :meth:`lock`."""
        published, partial = source.directory / name, self.fresh_partial(name)
        # a published directory is never written into, so its files may have several names
        without = shutil.ignore_patterns(RECORD)
        shutil.copytree(published, partial, copy_function=_link, ignore=without, dirs_exist_ok=True)
        if (published / RECORD).is_file():  # last: it says that the others are there
            _link(str(published / RECORD), str(partial / RECORD))
        self._publish(name)

    def _finish(self) -> None:
        """Publishes what was complete when a command was killed, and removes what no command continues."""
        resumable = [DIRECTORIES[stage] for stage in RESUMABLE]
        for name in PUBLISHED:
            partial, old, target = self.partial(name), self._old(name), self.directory / name
            if (partial / RECORD).is_file():
                console.note(f"{target}: complete since an earlier command, published now")
                self._publish(name)
                self.finished.add(name)
            elif name not in resumable:
                shutil.rmtree(partial, ignore_errors=True)
            if old.is_dir() and not target.exists():
                old.rename(target)  # nothing has taken its place
            shutil.rmtree(old, ignore_errors=True)
        for left in self.directory.glob(".reference-*"):  # what the dense model predicted
            shutil.rmtree(left)

    @contextlib.contextmanager
    def lock(self, *, makes: bool = True) -> Iterator[None]:
        """Keeps two commands from working in one run directory at the same time, and notes the configuration.

        A command that only measures (not ``makes``) does not describe a run that has stages.
        """
        if not distributed.is_main():
            distributed.barrier()  # until the first process has finished what an earlier command left
            yield
            return
        self.check_directory()
        made = [parent for parent in self.directory.absolute().parents if not parent.exists()]
        self.directory.mkdir(parents=True, exist_ok=True)
        resolved = self.directory / RESOLVED
        with (self.directory / LOCK).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(f"{self.directory}: another sppctl command is working here; wait for it") from error
            try:
                self._finish()
                notes = makes or not any((self.path(stage) / RECORD).is_file() for stage in DIRECTORIES)
                if notes and not resolved.exists():
                    disk.write(resolved, to_yaml(self.config))
                distributed.barrier()
                yield
                if notes:
                    disk.write(resolved, to_yaml(self.config))  # a refused command changes nothing here
            finally:
                # a run that failed before it made anything leaves nothing; the last is of a command that was killed
                if {path.name for path in self.directory.iterdir()} <= {LOCK, RESOLVED, f".{RESOLVED}.partial"}:
                    shutil.rmtree(self.directory)
                    with contextlib.suppress(OSError):  # somebody else put something there
                        for parent in made:
                            parent.rmdir()

    def check_directory(self) -> None:
        """Raises UserError if the run directory cannot be written, or if the run would be made from its own results."""
        path, config = self.directory, self.config
        for key, name, later in (
            ("model.path", config.model.path, ("prune", "train", "merge")),
            ("prune.mask_from", config.prune.mask_from, ("prune", "train", "merge")),
            ("train.distill.teacher", config.train.distill.teacher, ("train", "merge")),
        ):
            made = {self.path(stage).resolve() for stage in later}
            if name is not None and made & {Path(name).resolve(), *Path(name).resolve().parents}:
                fix = "name another checkpoint, or another run.dir"
                raise UserError(key, f"{name} is made by this run itself", fix)
        disk.demand_directory(path, "run.dir")
        if (path / "config.json").exists():  # what a run writes there would become part of the checkpoint
            raise UserError("run.dir", f"{path} holds a checkpoint (config.json)", "name a directory of its own")
        for name in (*PUBLISHED, "eval"):
            disk.demand_directory(path / name, "run.dir")
            disk.demand_directory(self.partial(name), "run.dir")
        for name in (LOCK, RESOLVED):
            disk.demand_file(path / name, "run.dir")


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)
