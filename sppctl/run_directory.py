"""The run directory: what is up to date, what is an unfinished attempt, and atomic publication.

A stage works in ``RUN/.NAME.partial`` and renames it to ``RUN/NAME`` when it is complete, so a directory that exists is
whole. ``stage.json`` in it says what it was made from; the same again is skipped, anything else is refused until
``--force``. An attempt at the same is continued, one at something else is refused if it holds work.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sppctl import __version__, attempts, console, distributed, machine, strict_json
from sppctl.config import to_yaml
from sppctl.errors import StageError, UserError
from sppctl.settings import Config

DIRECTORIES = {"prune": "pruned", "train": "adapter", "merge": "merged"}
RECORD = "stage.json"
KEYS = {"fingerprint", "settings", "inputs", "metrics"}  # of every record


@dataclass
class Run:
    """One run directory under one configuration."""

    config: Config
    force: bool = False
    resume: bool = True

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
        if not path.is_file():
            return None
        try:
            record: dict[str, Any] = json.loads(path.read_text())
            missing = KEYS - record.keys()
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error}); sppctl {stage} --force redoes the stage") from error
        if missing:
            raise UserError(
                f"{path} is damaged (it lacks {', '.join(sorted(missing))}); sppctl {stage} --force redoes the stage"
            )
        return record

    # --- the dense model ----------------------------------------------------------------------------------------------

    def located(self) -> Path:
        """The directory that model.path means (in it, perhaps, a GGUF file)."""
        from sppctl.lm import checkpoint

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

        from sppctl.lm import checkpoint

        model = self.config.model
        assert model.gguf_file is not None
        identity = {"file": model.gguf_file, "size": (source / model.gguf_file).stat().st_size, "dtype": model.dtype}
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # no record, or a damaged one: once more
            if json.loads((target / RECORD).read_text())["inputs"] == identity:
                return target
        console.note(f"base: unpacking {model.gguf_file} into {target}")
        started = time.perf_counter()
        partial = self._fresh_partial("base")
        dtype = None if model.dtype == "auto" else getattr(torch, model.dtype)
        checkpoint.convert_gguf(source, model.gguf_file, dtype, partial)
        self._publish(
            "base", partial, {"stage": "base", "inputs": identity, "wall_time_s": time.perf_counter() - started}
        )
        return target

    def skeleton(self, directory: Path | None = None) -> tuple[Any, Any]:
        """The model without weights, and its tokenizer, for checks; nothing is converted or written.

        Args:
            directory: the checkpoint; None: the configured model.
        """
        from sppctl.lm import blocks, checkpoint
        from sppctl.lm.safe_files import TensorFiles

        model = self.config.model
        trust, gguf_file = model.trust_remote_code, model.gguf_file
        unpacked = self.directory / "base"
        if directory is None and gguf_file is not None and not unpacked.is_dir():
            source = self.located()
            config = checkpoint.load_gguf_config(source, gguf_file)
            tokenizer = checkpoint.load_tokenizer(source, trust, gguf_file)
        else:
            source = directory or (unpacked if gguf_file is not None else self.located())
            TensorFiles(source)
            config, tokenizer = checkpoint.load_config(source, trust), checkpoint.load_tokenizer(source, trust)
        return blocks.Skeleton(config, trust_remote_code=trust), tokenizer

    # --- publication --------------------------------------------------------------------------------------------------

    def partial(self, name: str) -> Path:
        """Where a stage works until it is complete."""
        return self.directory / f".{name}.partial"

    def _fresh_partial(self, name: str) -> Path:
        path = self.partial(name)
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def _publish(
        self, name: str, partial: Path, record: dict[str, Any], scratch: str | None = None, notes: tuple[str, ...] = ()
    ) -> None:
        strict_json.write(partial / RECORD, record)
        target, old = self.directory / name, self.directory / f".{name}.old"
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        partial.rename(target)
        shutil.rmtree(old, ignore_errors=True)
        # needed for as long as the result was not published
        for note in (attempts.NOTE, *notes):
            (target / note).unlink(missing_ok=True)
        if scratch is not None:
            shutil.rmtree(target / scratch, ignore_errors=True)

    def perform(
        self,
        stage: str,
        settings: dict[str, Any],
        inputs: dict[str, Any],
        work: Callable[[Path], dict[str, Any]],
        *,
        resumable: bool = False,
        scratch: str | None = None,
        notes: tuple[str, ...] = (),
    ) -> dict[str, Any]:
        """Does a stage unless it is up to date, and publishes it.

        Args:
            stage: prune, train or merge.
            settings: the configuration it depends on.
            inputs: fingerprints of what it reads.
            work: fills a directory and returns metrics.
            resumable: what an interrupted attempt left behind is handed to ``work`` again.
            scratch: folder in the directory that ``work`` can continue from; it goes when the stage is published.
            notes: files in it that say how far ``work`` has come; they go then, too.

        Returns:
            The content of stage.json.

        Raises:
            UserError: the stage exists with other settings or inputs, and force is off; or there is unfinished work
                with other ones, which the command does not discard.
        """
        name, partial = DIRECTORIES[stage], self.partial(DIRECTORIES[stage])
        # one process looks: the others might see what it has changed since
        before, continued = distributed.decide(lambda: self._choice(stage, settings, inputs, resumable))
        if before is not None:
            console.note(f"{stage}: up to date ({self.path(stage)})")
            return before
        if continued:
            console.note(f"{stage}: continuing an interrupted attempt")
        elif distributed.is_main():
            self._fresh_partial(name)
            attempts.write(partial, settings, inputs)
        distributed.barrier()
        machine.reset_peak_memory()
        started = time.perf_counter()
        try:
            with contextlib.redirect_stdout(sys.stderr):  # what libraries print is no result
                metrics = work(partial)
        except (UserError, StageError):
            # what could be continued before, or can be now, is left for another command
            if distributed.is_main() and not (continued or (scratch and attempts.holds_work(partial))):
                shutil.rmtree(partial)
            raise
        distributed.barrier()
        record = {
            "stage": stage,
            "fingerprint": _identity(settings, inputs),
            "settings": settings,
            "inputs": inputs,
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
            if stage != "train":
                from sppctl.lm import checkpoint

                record["output"] = checkpoint.fingerprint(partial)
            self._publish(name, partial, record, scratch, notes)
        distributed.barrier()
        console.note(f"{stage}: done in {record['wall_time_s']:.0f} s ({self.path(stage)})")
        return record

    def _choice(
        self, stage: str, settings: dict[str, Any], inputs: dict[str, Any], resumable: bool
    ) -> tuple[dict[str, Any] | None, bool]:
        """The record of the stage if there is nothing to do; else none, and whether an attempt is continued."""
        before = None if self.force else self.record(stage)
        if before is not None and before["fingerprint"] == _identity(settings, inputs):
            return before, False
        wanted = {"settings": settings, "inputs": inputs}
        if resumable and self.resume and attempts.read(self.partial(DIRECTORIES[stage])) == wanted:
            return None, True
        if before is not None:
            raise UserError(
                f"{self.path(stage)} was made with {attempts.differences(before, settings, inputs)}; "
                f"--force redoes it, another run.dir keeps it"
            )
        self.check_attempt(stage, settings, inputs)
        return None, False

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
        if before is None or before["settings"] == settings:
            return before is None
        attempt = attempts.read(self.partial(DIRECTORIES[stage]))
        return attempt is not None and attempt.get("settings") == settings

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps two commands from working in one run directory at the same time, and notes the configuration."""
        if not distributed.is_main():
            yield
            return
        self.check_directory()
        made = [parent for parent in self.directory.absolute().parents if not parent.exists()]
        self.directory.mkdir(parents=True, exist_ok=True)
        lock, resolved = self.directory / ".lock", self.directory / "resolved.yaml"
        with lock.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(f"{self.directory}: another sppctl command is working here; wait for it") from error
            if not resolved.exists():
                resolved.write_text(to_yaml(self.config))
            try:
                yield
                resolved.write_text(to_yaml(self.config))  # a refused command changes nothing here
            finally:
                if {path.name for path in self.directory.iterdir()} <= {lock.name, resolved.name}:
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
        if path.exists() and not path.is_dir():
            raise UserError(f"run.dir: {path} is a file, not a directory; name another (--output)")
        parent = next(p for p in [path, *path.absolute().parents] if p.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise UserError(f"run.dir: {path} cannot be made, {parent} is not a writable directory")


# --- identity ---------------------------------------------------------------------------------------------------------


def _identity(settings: dict[str, Any], inputs: dict[str, Any]) -> str:
    text = json.dumps({"settings": settings, "inputs": inputs}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _versions() -> dict[str, str]:
    import importlib.metadata

    names = ("torch", "transformers", "peft", "accelerate", "datasets")
    versions = {name: importlib.metadata.version(name) for name in names}
    return {"sppctl": __version__, "python": platform.python_version()} | versions
