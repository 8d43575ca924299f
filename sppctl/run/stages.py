"""The three stages that make a run's checkpoints: their inputs, checks and work."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from sppctl import console, distributed, machine
from sppctl.config.settings import Config, names_of
from sppctl.files.names import FOREIGN, RECORD
from sppctl.records import MergeRecord, PruneRecord, TrainRecord
from sppctl.run import dense

if TYPE_CHECKING:
    from sppctl.merge import stage as merging
    from sppctl.model.estimate import Work
    from sppctl.prune import checks as pruning
    from sppctl.run.directory import Run
    from sppctl.train import stage as training


class Prepared(Protocol):
    """A checked stage, with the data that its checks have loaded."""

    @property
    def sources(self) -> dict[str, str]:
        """The inputs (see :meth:`Stage.inputs`) that the data was loaded from; it is outdated if they have changed."""

    @property
    def work(self) -> Work | None:
        """The work of the stage, for an estimate of its time; None: it takes little time."""


P = TypeVar("P", bound=Prepared)
M_co = TypeVar("M_co", covariant=True)


class Stage(Protocol[P, M_co]):
    """One step of the pipeline; :meth:`sppctl.run.directory.Run.do` is its only caller."""

    @property
    def name(self) -> str:
        """The command: prune, train or merge, in lower case."""

    def inputs(self, run: Run) -> dict[str, str]:
        """Fingerprints of everything that it reads; UserError if an input does not match the configuration."""

    def compute(self, run: Run) -> machine.Compute | None:
        """The compute dtype of a new attempt; None: no model is loaded."""

    def prepare(self, run: Run) -> P:
        """Checks everything before anything is computed or written; UserError with a line for each problem."""

    def do(self, run: Run, prepared: P, out: Path, dtype: str) -> M_co:
        """Fills the directory ``out``, computing in ``dtype``, and returns the metrics of the record.

        If the stage is resumable, ``out`` may hold an interrupted attempt; the files that only the continuation needs
        are named in :data:`sppctl.files.names.WORKING`.
        """


class Prune:
    """base -> pruned."""

    name = "prune"

    def inputs(self, run: Run) -> dict[str, str]:
        """Dense model, calibration text, tokenizer, and the checkpoint of prune.mask_from."""
        from sppctl.evaluate import subjects
        from sppctl.model import checkpoint, find

        base, mask = dense.base(run), run.config.prune.mask_from
        inputs = {"base": subjects.fingerprint(base), "tokenizer": checkpoint.tokenizer_fingerprint(base)}
        inputs |= self._data(run.config) | _newer_data(run, self.name)
        if mask is not None:
            inputs["mask"] = subjects.fingerprint(find.locate(mask, key="prune.mask_from"))
        return inputs

    def _data(self, config: Config) -> dict[str, str]:
        return _hashes({"calibration": config.prune.calibration.dataset})

    def compute(self, run: Run) -> machine.Compute:
        """The dtype for one block at a time."""
        return choose_dtype(run.config, dense.base(run), whole_model=False, stored=run.config.model.dtype)

    def prepare(self, run: Run) -> pruning.Prepared:
        """Checks the pruning, and draws its windows."""
        from sppctl.prune import checks

        outline = run.outline()
        return checks.prepare(run.config, outline.skeleton, outline.tokenizer, self._data(run.config))

    def do(self, run: Run, prepared: pruning.Prepared, out: Path, dtype: str) -> PruneRecord:
        """Prunes."""
        from sppctl.prune import stage
        from sppctl.publish import card_data

        record = stage.execute(run.config, prepared, dense.base(run), out, dtype=dtype)
        return replace(record, base=card_data.base_of(run.config.model, dense.locate(run.config)))


class Train:
    """pruned -> adapter."""

    name = "train"

    def inputs(self, run: Run) -> dict[str, str]:
        """Pruned checkpoint, data, and the dense model and teacher if training reads them."""
        from sppctl.evaluate import subjects
        from sppctl.train import distill

        teacher = run.config.train.distill.teacher
        inputs = {"pruned": run.needed("prune").output} | self._data(run.config) | _newer_data(run, self.name)
        if self._base(run) is not None:
            inputs["base"] = subjects.fingerprint(dense.same_base(run))
        if teacher not in (None, distill.BASE):
            inputs["teacher"] = subjects.fingerprint(distill.locate(teacher))
        return inputs

    def _data(self, config: Config) -> dict[str, str]:
        datasets = {f"data {dataset}": dataset for dataset in names_of(config.train.data.dataset)}
        if config.train.keep_best == "perplexity":
            datasets |= {f"data {text}": text for text in config.eval.perplexity[:1]}
        return _hashes(datasets)

    def _base(self, run: Run) -> Path | None:
        """The dense checkpoint, if training reads it, as the teacher or for regrown weights."""
        from sppctl.train import distill

        train = run.config.train
        reads = train.distill.teacher == distill.BASE or train.refresh.steps is not None
        return dense.base(run) if reads else None

    def compute(self, run: Run) -> machine.Compute:
        """The dtype for training."""
        return choose_dtype(run.config, run.path("prune"), training=True)

    def prepare(self, run: Run) -> training.Prepared:
        """Checks the training, and tokenises its rows."""
        from sppctl.train import stage

        outline = run.outline()
        return stage.prepare(run.config, outline.skeleton, outline.tokenizer, self._data(run.config))

    def do(self, run: Run, prepared: training.Prepared, out: Path, dtype: str) -> TrainRecord:
        """Trains."""
        from sppctl.plan import run as plan
        from sppctl.train import stage

        pruned = run.record("prune")
        assert pruned is not None
        packed = distributed.decide(partial(plan.trains_packed, run.config, run.path("prune"), dtype))
        planned = partial(plan.bytes_on_each_device, run.config, packed=packed)
        execute = partial(stage.execute, dtype=dtype, resume=run.resume, packed=packed, base=self._base(run))
        execute = partial(execute, planned=planned)
        return execute(run.config, prepared, run.path("prune"), pruned.metrics, out)


class Merge:
    """pruned + adapter -> merged."""

    name = "merge"

    def inputs(self, run: Run) -> dict[str, str]:
        """Pruned checkpoint and adapter, which must belong together."""
        from sppctl.evaluate import subjects
        from sppctl.merge import stage
        from sppctl.merge.adapter import Adapter
        from sppctl.merge.rules import check_mask

        if (foreign := self._foreign(run)) is not None:
            pruned = run.needed("prune")
            stage.training_of(foreign, run.path("prune"))
            check_mask(Adapter.open(foreign).kind, run.config.merge.mask)
            return {"pruned": pruned.output, FOREIGN: subjects.fingerprint(foreign)}
        check_mask(run.config.train.method.upper(), run.config.merge.mask)
        pruned, trained = run.needed("prune"), run.needed("train")
        stage.check_trained_on(trained, run.path("train"), run.path("prune"), pruned.output)
        return {"pruned": pruned.output, "adapter": trained.output}

    def options(self, run: Run) -> list[str]:
        """What a command needs, besides the configuration, to merge the adapter that the run trains."""
        from sppctl.merge.rules import MERGERS

        is_refused = MERGERS[run.config.train.method.upper()].zeros == "filled" and run.config.merge.mask == "keep"
        return ["merge.mask=reapply"] if is_refused else []

    def _foreign(self, run: Run) -> Path | None:
        """An adapter that was trained elsewhere: merge.adapter, else one in RUN/adapter that no stage has recorded."""
        from sppctl.files.safe_files import ADAPTER_CONFIG
        from sppctl.model import find

        if run.config.merge.adapter is not None:
            return find.locate(run.config.merge.adapter, key="merge.adapter", adapters=True)
        own = run.path("train")
        if not (own / ADAPTER_CONFIG).is_file() or (own / RECORD).exists():
            return None
        merged = None if run.force else run.record("merge")
        # what was merged before was trained here, so its record has been lost
        return own if merged is None or FOREIGN in merged.inputs else None

    def compute(self, run: Run) -> None:
        """No model is loaded."""

    def prepare(self, run: Run) -> merging.Prepared:
        """Opens both checkpoints and matches the adapter's tensors with the pruned ones."""
        from sppctl.merge import stage

        pruned, directory, foreign = run.record("prune"), run.path("prune"), self._foreign(run)
        assert pruned is not None
        if foreign is not None:
            console.note(f"merge: {foreign}, an adapter trained elsewhere")
            trained = stage.training_of(foreign, directory)
        else:
            record = run.record("train")
            assert record is not None
            trained = record.metrics
        adapter = foreign or run.path("train")
        return stage.prepare(run.config, directory, adapter, pruned.metrics, trained, run.partial("merged"))

    def do(self, run: Run, prepared: merging.Prepared, out: Path, dtype: str) -> MergeRecord:
        """Merges."""
        from sppctl.merge import stage
        from sppctl.report import provenance

        merged = stage.execute(run.config, prepared, out)
        for text in provenance.warnings_of_merge(merged, None if self._foreign(run) else run.record("train")):
            console.warn(f"merge: {text}")
        return merged


PRUNE, TRAIN, MERGE = Prune(), Train(), Merge()
BY_NAME: dict[str, Stage[Any, Any]] = {stage.name: stage for stage in (PRUNE, TRAIN, MERGE)}


def choose_dtype(config: Config, directory: Path, *, whole_model: bool = True, **options: Any) -> machine.Compute:
    """The compute dtype of a checkpoint on the configured device, and the reason.

    If the model is in memory at once (``whole_model``) and fits only in the stored dtype, the reason adds a hint.
    Further options are those of :func:`sppctl.model.checkpoint.choose_dtype`.
    """
    from sppctl.model import checkpoint

    model, device = config.model, checkpoint.pick_device(config.model.device)
    chosen = checkpoint.choose_dtype(directory, device, model.compute_dtype, model.trust_remote_code, **options)
    if whole_model and chosen.widened:
        needed, free = checkpoint.weight_bytes(directory, chosen.dtype), machine.free_memory(device)
        if needed // 2 <= free < needed:
            sizes = f"takes {needed / 2**30:.1f} GiB for the weights; {free / 2**30:.1f} GiB are free"
            return chosen._replace(text=f"{chosen.text}, which {sizes}: model.compute_dtype=bfloat16 needs half")
    return chosen


def _newer_data(run: Run, stage: str) -> dict[str, str]:
    """Versions of hub data that have been cached since a stage read it, and that it would read now."""
    from sppctl.files import sources

    record = None if run.force else run.record(stage)
    if record is None:
        return {}
    source = record.metrics if stage == "train" else record.metrics.calibration
    return {f"data {key}": version for key, version in sources.newer(source.versions if source else {}).items()}


def _hashes(datasets: dict[str, str]) -> dict[str, str]:
    """Hashes of local data sets; others are identified by their name alone."""
    from sppctl.data import texts

    hashes = {key: texts.file_hash(dataset) for key, dataset in datasets.items()}
    return {key: digest for key, digest in hashes.items() if digest is not None}
