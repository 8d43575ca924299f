"""The run directory: what is up to date, what is an unfinished attempt, and atomic publication.

A stage works in ``RUN/.NAME.partial`` and renames it to ``RUN/NAME`` when it is complete, so a directory that exists is
whole. ``stage.json``, written last, says what it was made from; the same again is skipped, anything else is refused
until ``--force``. An attempt at the same is continued, one at something else is refused if it holds work. A stage that
was complete when its command was killed is published by the next command.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sppctl import __version__, console, distributed, machine
from sppctl.config.load import to_yaml
from sppctl.config.settings import Config
from sppctl.errors import StageError, UserError, WriteError
from sppctl.files import disk, sealed
from sppctl.files.names import DIRECTORIES, RECORD, WORKING
from sppctl.run import attempts

RESUMABLE = ("prune", "train")  # an interrupted attempt is continued; the others start again
LOCK, RESOLVED = ".lock", "resolved.yaml"


@dataclass
class Run:
    """One run directory under one configuration."""

    config: Config
    force: bool = False
    resume: bool = True
    finished: set[str] = field(default_factory=set)  # directories that an earlier command left to be published

    @property
    def directory(self) -> Path:
        """Where everything of this run lies."""
        return Path(self.config.run.dir)

    def path(self, stage: str) -> Path:
        """The published directory of a stage."""
        return self.directory / DIRECTORIES[stage]

    def record(self, stage: str) -> dict[str, Any] | None:
        """The stage.json of a published stage.

        Raises:
            UserError: it is damaged.
        """
        path = self.path(stage) / RECORD
        if not self.path(stage).is_dir():
            return None
        record = sealed.read(path, _remedy(stage))
        if record.get("stage") != stage:
            raise UserError(f"{path} is the record of another stage ({record.get('stage')}); {_remedy(stage)}")
        return record

    def verify(self, stage: str, record: dict[str, Any]) -> None:
        """Raises UserError if the files of a published stage are not those of its record; each is named."""
        from sppctl.files import integrity

        with console.working(f"checking the files of {self.path(stage)}"):
            integrity.check(self.path(stage), record["files"], _remedy(stage))

    # --- the dense model ----------------------------------------------------------------------------------------------

    def located(self) -> Path:
        """The directory that model.path means (in it, perhaps, a GGUF file)."""
        from sppctl.model import checkpoint

        model = self.config.model
        assert model.path is not None
        return checkpoint.locate(model.path, model.gguf_file, model.revision)

    def base(self) -> Path:
        """The dense checkpoint as safetensors; a GGUF file is converted into the run directory once."""
        source = self.located()
        model = self.config.model
        if model.gguf_file is None:
            return source
        distributed.barrier()
        target = self.directory / "base"
        if not distributed.is_main():
            distributed.barrier()  # until the first process has unpacked it
            return target
        try:
            return self._unpack(source, target)
        finally:
            distributed.barrier()

    def _unpack(self, source: Path, target: Path) -> Path:
        import torch

        from sppctl.files import integrity
        from sppctl.files.safe_files import saving
        from sppctl.model import checkpoint

        model = self.config.model
        assert model.gguf_file is not None
        identity = {"file": integrity.hashes(source, [model.gguf_file]), "dtype": model.dtype}
        record: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):  # no record, or a damaged one: once more
            record = sealed.parse((target / RECORD).read_bytes())
        if record.get("inputs") == identity:
            integrity.check(target, record["files"], f"delete {target}, and it is unpacked again")
            return target
        console.note(f"base: unpacking {model.gguf_file} into {target}")
        started = time.perf_counter()
        partial = self._fresh_partial("base")
        dtype = None if model.dtype == "auto" else getattr(torch, model.dtype)
        try:
            with saving(partial):
                checkpoint.convert_gguf(source, model.gguf_file, dtype, partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        record = {"stage": "base", "inputs": identity, "wall_time_s": time.perf_counter() - started}
        self._complete("base", record)
        return target

    def skeleton(self, directory: Path | None = None) -> tuple[Any, Any]:
        """The model without weights, and its tokenizer, for checks; nothing is converted or written.

        Args:
            directory: the checkpoint; None: the configured model.
        """
        from sppctl.files.safe_files import TensorFiles
        from sppctl.model import blocks, checkpoint, weights

        model = self.config.model
        trust, gguf_file = model.trust_remote_code, model.gguf_file
        unpacked = self.directory / "base"
        files: TensorFiles | None = None
        if directory is None and gguf_file is not None and not unpacked.is_dir():
            source = self.located()
            config = checkpoint.load_gguf_config(source, gguf_file)
            tokenizer = checkpoint.load_tokenizer(source, trust, gguf_file)
        else:
            source = directory or (unpacked if gguf_file is not None else self.located())
            files = TensorFiles(source)
            config, tokenizer = checkpoint.load_config(source, trust), checkpoint.load_tokenizer(source, trust)
        skeleton = blocks.Skeleton(config, trust_remote_code=trust)
        if files is not None:
            weights.check_weights(files, skeleton.model)
        return skeleton, tokenizer

    # --- publication --------------------------------------------------------------------------------------------------

    def partial(self, name: str) -> Path:
        """Where a stage works until it is complete."""
        return self.directory / f".{name}.partial"

    def _fresh_partial(self, name: str) -> Path:
        path = self.partial(name)
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def _complete(self, name: str, record: dict[str, Any]) -> None:
        """Publishes a stage; from the moment that its record is there, the next command does so if this one cannot."""
        partial = self.partial(name)
        disk.sync_tree(partial)
        record |= _contents(partial)
        sealed.write(partial / RECORD, record)
        self._publish(name)

    def _publish(self, name: str) -> None:
        partial, target, old = self.partial(name), self.directory / name, self._old(name)
        attempts.clean(partial)
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        partial.rename(target)
        disk.sync(self.directory)
        shutil.rmtree(old, ignore_errors=True)

    def take_over(self, source: Run, name: str) -> None:
        """Publishes here what another run has published; called in :meth:`lock`."""
        partial = self._fresh_partial(name)
        # a published directory is never written into, so its files may have several names
        shutil.copytree(
            source.directory / name,
            partial,
            copy_function=_link,
            ignore=shutil.ignore_patterns(RECORD),
            dirs_exist_ok=True,
        )
        if (source.directory / name / RECORD).is_file():  # last: it says that the others are there
            _link(str(source.directory / name / RECORD), str(partial / RECORD))
        self._publish(name)

    def _old(self, name: str) -> Path:
        return self.directory / f".{name}.old"

    def _finish(self) -> None:
        """Publishes what was complete when a command was killed, and removes what no command continues."""
        resumable = [DIRECTORIES[stage] for stage in RESUMABLE]
        for name in ("base", *DIRECTORIES.values()):
            partial = self.partial(name)
            if (partial / RECORD).is_file():
                console.note(f"{self.directory / name}: complete since an earlier command, published now")
                self._publish(name)
                self.finished.add(name)
            elif name not in resumable:
                shutil.rmtree(partial, ignore_errors=True)
            old, target = self._old(name), self.directory / name
            if old.is_dir() and not target.exists():
                old.rename(target)  # nothing has taken its place
            shutil.rmtree(old, ignore_errors=True)
        for left in self.directory.glob(".reference-*"):  # what the dense model predicted
            shutil.rmtree(left)

    def perform(
        self,
        stage: str,
        settings: dict[str, Any],
        inputs: dict[str, Any],
        work: Callable[[Path, str], dict[str, Any]],
        *,
        choose: Callable[[], machine.Compute] | None = None,
    ) -> dict[str, Any]:
        """Does a stage unless it is up to date, and publishes it.

        Args:
            stage: prune, train or merge.
            settings: the configuration it depends on.
            inputs: fingerprints of what it reads.
            work: fills a directory, computing in a dtype, and returns metrics; of a resumable stage it is given what an
                interrupted attempt left behind. All that it needs for that is in :data:`sppctl.files.names.WORKING`.
            choose: finds that dtype for a new attempt; None: the stage loads no model.

        Returns:
            The content of stage.json.

        Raises:
            UserError: the stage exists with other settings or inputs, and force is off; or there is unfinished work
                with other ones, which the command does not discard.
            WriteError: the disk is full.
        """
        name, partial = DIRECTORIES[stage], self.partial(DIRECTORIES[stage])
        # one process looks: the others might see what it has changed since
        before, continued = distributed.decide(lambda: self._choice(stage, settings, inputs))
        if before is not None:
            console.note(f"{stage}: up to date ({self.path(stage)})")
            return before
        dtype = ""
        if choose is not None:
            compute = distributed.decide(choose) if continued is None else _as_before(settings, continued)
            dtype, settings = compute.dtype, attempts.resolved(settings, compute.dtype)
            console.note(f"{stage}: {compute.text}")
        if continued is not None:
            console.note(f"{stage}: continuing an interrupted attempt")
        elif distributed.is_main():
            self._fresh_partial(name)
            attempts.write(partial, settings, inputs)
        distributed.barrier()
        machine.reset_peak_memory()
        started = time.perf_counter()
        try:
            # what libraries print is no result
            with contextlib.redirect_stdout(sys.stderr), disk.writing(partial, reasons=disk.FULL):
                metrics = work(partial, dtype)
        except BaseException as error:
            kept = _kept(stage, partial, error, continued is not None)
            if distributed.is_main() and not kept:
                shutil.rmtree(partial, ignore_errors=True)
            if not isinstance(error, WriteError):
                raise
            rest = "what is finished is kept, the same command continues" if kept else "nothing is left of it"
            raise WriteError(f"{error}; make room, or name another run.dir; {rest}") from error
        distributed.barrier()
        record = {
            "stage": stage,
            "fingerprint": _identity(settings, inputs),
            "settings": settings,
            "inputs": inputs,
            "compute_dtype": dtype or None,
            "seed": self.config.run.seed,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "wall_time_s": round(time.perf_counter() - started, 2),
            "peak_memory_mb": machine.peak_memory_mb(),
            "hardware": machine.describe(),
            "versions": _versions(),
            "command": console.command_line(),
            "metrics": metrics,
        }
        if distributed.is_main():
            self._complete(name, record)
        distributed.barrier()
        console.note(f"{stage}: done in {record['wall_time_s']:.0f} s ({self.path(stage)})")
        return record

    def _choice(
        self, stage: str, settings: dict[str, Any], inputs: dict[str, Any]
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """The record of the stage if there is nothing to do; else none, and the attempt that is continued, if any."""
        before = None if self.force and DIRECTORIES[stage] not in self.finished else self.record(stage)
        if before is not None and before["fingerprint"] == _identity(attempts.settled(settings, before), inputs):
            self.verify(stage, before)
            return before, None
        attempt = attempts.read(self.partial(DIRECTORIES[stage])) if stage in RESUMABLE and self.resume else None
        if attempt and attempt == {"settings": attempts.settled(settings, attempt), "inputs": inputs}:
            return None, attempt
        if before is not None and not self.force:
            raise UserError(
                f"{self.path(stage)} was made with {attempts.differences(before, settings, inputs)}; "
                f"--force redoes it, another run.dir keeps it"
            )
        self.check_attempt(stage, settings, inputs)
        return None, None

    def check_attempt(self, stage: str, settings: dict[str, Any], inputs: dict[str, Any] | None = None) -> None:
        """Raises UserError if doing a stage would destroy unfinished work with other settings, and nobody asked for it.

        Args:
            stage: prune, train or merge.
            settings: the configuration it depends on.
            inputs: fingerprints of what it reads; None: not known yet.
        """
        asked = self.force if stage == "prune" else not self.resume
        if not asked:
            attempts.check(self.partial(DIRECTORIES[stage]), stage, settings, inputs)

    def will_do(self, stage: str, settings: dict[str, Any]) -> bool:
        """Whether a command would work on a stage, as far as its settings tell."""
        before = None if self.force else self.record(stage)
        if before is None or before["settings"] == attempts.settled(settings, before):
            return before is None
        attempt = attempts.read(self.partial(DIRECTORIES[stage]))
        return attempt is not None and attempt != {} and attempt["settings"] == attempts.settled(settings, attempt)

    @contextlib.contextmanager
    def lock(self, *, makes: bool = True) -> Iterator[None]:
        """Keeps two commands from working in one run directory at the same time, and notes the configuration.

        Args:
            makes: whether the command makes stages. One that only measures does not describe a run that has any.
        """
        if not distributed.is_main():
            distributed.barrier()  # until the first process has finished what an earlier command left
            yield
            return
        self.check_directory()
        made = [parent for parent in self.directory.absolute().parents if not parent.exists()]
        self.directory.mkdir(parents=True, exist_ok=True)
        lock, resolved = self.directory / LOCK, self.directory / RESOLVED
        with lock.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(f"{self.directory}: another sppctl command is working here; wait for it") from error
            ours = {lock.name, resolved.name, f".{resolved.name}.partial"}  # the last: of a command that was killed
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
                if {path.name for path in self.directory.iterdir()} <= ours:
                    shutil.rmtree(self.directory)  # a run that failed before it made anything leaves nothing
                    with contextlib.suppress(OSError):  # somebody else put something there
                        for parent in made:
                            parent.rmdir()

    def check_directory(self) -> None:
        """Raises UserError if the run directory cannot be written, or if the run would be made from its own results."""
        path = self.directory
        for key, name, later in (
            ("model.path", self.config.model.path, ("prune", "train", "merge")),
            ("prune.mask_from", self.config.prune.mask_from, ("prune", "train", "merge")),
            ("train.distill.teacher", self.config.train.distill.teacher, ("train", "merge")),
        ):
            made = {self.path(stage).resolve() for stage in later}
            if name is not None and made & {Path(name).resolve(), *Path(name).resolve().parents}:
                raise UserError(
                    f"{key}: {name} is made by this run itself; name another checkpoint, or another run.dir"
                )
        disk.demand_directory(path, "run.dir")
        if (path / "config.json").exists():  # what a run writes there would become part of the checkpoint
            raise UserError(f"run.dir: {path} holds a checkpoint (config.json); name a directory of its own")
        for name in ("base", *DIRECTORIES.values(), "eval"):
            for directory in (path / name, self.partial(name)):
                disk.demand_directory(directory, "run.dir")
        for name in (LOCK, RESOLVED):
            disk.demand_file(path / name, "run.dir")


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)


def _kept(stage: str, partial: Path, error: BaseException, continued: bool) -> bool:
    """Whether an attempt that ended with an error is left for another command."""
    if stage not in RESUMABLE:
        return False
    if isinstance(error, WriteError):
        return attempts.holds_work(partial)
    if isinstance(error, UserError | StageError):  # of its own; what it was given, or can be continued, is not lost
        return continued or (stage == "train" and attempts.holds_work(partial))
    return True


# --- identity ---------------------------------------------------------------------------------------------------------


def _as_before(settings: dict[str, Any], attempt: dict[str, Any]) -> machine.Compute:
    """The dtype of an attempt, which is continued in it on any machine."""
    dtype = attempt["settings"]["model"]["compute_dtype"]
    why = "configured" if settings["model"]["compute_dtype"] != "auto" else "the interrupted attempt did"
    return machine.Compute(dtype, f"computing in {dtype} as {why}")


def _identity(settings: dict[str, Any], inputs: dict[str, Any]) -> str:
    text = json.dumps({"settings": settings, "inputs": inputs}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _remedy(stage: str) -> str:
    return f"sppctl {stage} --force redoes the stage"


def _contents(directory: Path) -> dict[str, Any]:
    """What a record says of the files of its directory: the hash of each, and the fingerprint of the weights."""
    from sppctl.files import integrity
    from sppctl.model import checkpoint

    with console.working(f"hashing the files of {directory}"):
        files = integrity.hashes(directory, integrity.listing(directory, WORKING))
    return {"output": checkpoint.identity_of(files), "files": files}


def _versions() -> dict[str, str]:
    import importlib.metadata

    names = ("torch", "transformers", "peft", "accelerate", "datasets")
    versions = {name: importlib.metadata.version(name) for name in names}
    return {"sppctl": __version__, "python": platform.python_version()} | versions
