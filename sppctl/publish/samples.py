"""The samples that the report of a run shows, stored in the run with the fingerprints of the weights that wrote them.

Evaluation writes them, because it is the last command that needs the weights; a report only reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sppctl import console
from sppctl.config.settings import ModelConfig
from sppctl.files import sealed
from sppctl.files.names import SAMPLES
from sppctl.model import checkpoint
from sppctl.publish import generate
from sppctl.records import SamplesRecord, to_json
from sppctl.report import records


def update(run_dir: Path, prompts: Sequence[str], model: ModelConfig) -> None:
    """Writes the samples of a run, unless there are those of the same prompts and weights.

    Args:
        run_dir: of a run that has a pruned or a merged checkpoint.
        prompts: each is continued by base, pruned and merged; none: nothing is written.
        model: how checkpoints are loaded.

    Raises:
        UserError: a checkpoint cannot be used, or the file of samples is damaged.
    """
    if not prompts:
        return
    settings = generate.Settings(model=model)
    shown = {"max_new_tokens": settings.max_new_tokens, "chat_template": settings.chat_template}
    subjects = generate.subjects_of(str(run_dir), model)
    weights = {subject.label: checkpoint.fingerprint(subject.directory) for subject in subjects}
    old = records.stored_samples(run_dir)
    same = old is not None and old.settings == shown and [sample.prompt for sample in old.samples] == list(prompts)
    if same and old is not None and weights.items() <= old.weights.items():
        return
    samples = generate.generate(subjects, prompts, settings)
    sealed.write(run_dir / SAMPLES, to_json(SamplesRecord(shown, weights, console.command_line(), samples)))
