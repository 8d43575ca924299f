"""What a stage is to a run: the interface of prune, train and merge."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from sppctl import machine
from sppctl.config.load import result_keys
from sppctl.config.settings import Config
from sppctl.records import Settings

if TYPE_CHECKING:
    from sppctl.model.estimate import Work
    from sppctl.run.directory import Run


class Prepared(Protocol):
    """A stage that has been checked: all that its checks have loaded, for the work."""

    @property
    def sources(self) -> dict[str, str]:
        """The inputs (as of :meth:`Stage.inputs`) that it was loaded from; where others count it is out of date."""

    @property
    def work(self) -> Work | None:
        """What the stage is about to do; None: nothing that takes long."""


P = TypeVar("P", bound=Prepared)
M_co = TypeVar("M_co", covariant=True)


class Stage(Protocol[P, M_co]):
    """One step of the pipeline; :meth:`sppctl.run.directory.Run.do` is its only caller."""

    @property
    def name(self) -> str:
        """Prune, train or merge, in lower case."""

    def inputs(self, run: Run) -> dict[str, str]:
        """Fingerprints of everything that it reads; UserError if that is not what the configuration describes."""

    def compute(self, run: Run) -> machine.Compute | None:
        """The dtype that a new attempt computes in; None: no model is loaded."""

    def prepare(self, run: Run) -> P:
        """Checks everything before anything is computed or written; UserError with a line for each problem."""

    def do(self, run: Run, prepared: P, out: Path, dtype: str) -> M_co:
        """Fills the directory ``out``, computing in ``dtype``, and returns the metrics of the record.

        Of a stage that can be continued, ``out`` holds what an interrupted attempt left; all that it needs for that is
        in :data:`sppctl.files.names.WORKING`.
        """


def settings_of(config: Config, stage: str) -> Settings:
    """The configuration that the result of a stage depends on."""
    settings = {stage: result_keys(getattr(config, stage))}
    if stage == "merge":
        return settings
    model = result_keys(config.model)
    if stage == "train":  # which starts from what pruning made of all other keys
        model = {"compute_dtype": model["compute_dtype"]}
    return {"seed": config.run.seed, "model": model} | settings
