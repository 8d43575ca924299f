"""The samples that the report of a run shows, stored in the run with the fingerprints of the weights that wrote them.

Evaluation writes them, because it is the last command that needs the weights; a report only reads them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from sppctl import console, machine
from sppctl.config.settings import ModelConfig
from sppctl.evaluate.subjects import Subject
from sppctl.files import cache, integrity, sealed, strict_json
from sppctl.files.names import SAMPLES
from sppctl.model import checkpoint
from sppctl.publish import generate
from sppctl.publish.generate import Settings
from sppctl.records import Sample, SamplesRecord, from_json, to_json
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
    settings = Settings(model=model)
    shown = {"max_new_tokens": settings.max_new_tokens, "chat_template": settings.chat_template}
    subjects = generate.subjects_of(str(run_dir), model)
    weights = {subject.label: checkpoint.fingerprint(subject.directory) for subject in subjects}
    old = records.stored_samples(run_dir)
    same = old is not None and old.settings == shown and [sample.prompt for sample in old.samples] == list(prompts)
    if same and old is not None and weights.items() <= old.weights.items():
        return
    columns = [_written_by(subject, prompts, settings) for subject in subjects]
    samples = [
        Sample(prompt, any(one.chat_template for one in row), [one.completions[0] for one in row])
        for prompt, *row in zip(prompts, *columns, strict=True)
    ]
    sealed.write(run_dir / SAMPLES, to_json(SamplesRecord(shown, weights, console.command_line(), samples)))


def _written_by(subject: Subject, prompts: Sequence[str], settings: Settings) -> list[Sample]:
    """What one checkpoint writes, or has written before: the runs of a sweep have checkpoints in common."""
    directory = subject.directory
    depends_on = {
        "label": subject.label,
        "files": integrity.identity(integrity.hashes(directory, integrity.listing(directory))),
        "tokenizer": checkpoint.tokenizer_fingerprint(directory),
        "prompts": list(prompts),
        "decoding": "the likeliest token, whatever the checkpoint's own generation settings",
        "settings": asdict(settings) | {"model": _loading(settings.model)},
        "hardware": machine.describe(),
        "versions": machine.versions("torch", "transformers"),
    }
    path = cache.entry("samples", depends_on)
    _, found = cache.read(path)
    if found:
        return [from_json(Sample, one) for one in json.loads(found["samples"])]
    samples = generate.generate([subject], prompts, settings)
    cache.write(path, {}, samples=strict_json.dumps(to_json(samples)))
    return samples


def _loading(model: ModelConfig) -> list[str | bool]:
    return [model.device, model.compute_dtype, model.weights, model.trust_remote_code]
