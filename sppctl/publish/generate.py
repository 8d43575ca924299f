"""What the checkpoints of a run write after the same prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sppctl import console, records
from sppctl.config.settings import EvalConfig, ModelConfig
from sppctl.data.chat import try_template
from sppctl.errors import UserError, first_line
from sppctl.evaluate.subjects import Subject, shortage
from sppctl.files.names import DIRECTORIES, RECORD
from sppctl.model import checkpoint, find
from sppctl.records import Completion, Sample

PROMPTS = EvalConfig().prompts


@dataclass(frozen=True)
class Settings:
    """How texts are generated."""

    max_new_tokens: int = 64
    temperature: float = 0.0  # 0: the likeliest token each time
    seed: int = 0
    chat_template: bool = True  # where the tokenizer has one
    model: ModelConfig = field(default_factory=ModelConfig)  # how the checkpoints are loaded


def subjects_of(name: str, model: ModelConfig) -> list[Subject]:
    """The base, pruned and merged checkpoint of a run, as far as they are there; else the checkpoint of that name.

    The base is left out, with a note, if it does not fit into memory.

    Args:
        name: run directory, or directory, hub id or package:NAME of a checkpoint or an adapter.
        model: how they will be loaded.

    Raises:
        UserError: it is none of these, or files are not as recorded.
    """
    run_dir = Path(name)
    own = {label: run_dir / label for label in (DIRECTORIES["prune"], DIRECTORIES["merge"])}
    found = [Subject.at(label, path) for label, path in own.items() if (path / RECORD).is_file()]
    if not found:
        return [Subject.at(name, find.locate(name, key="RUN", adapters=True))]
    records.refuse_outdated(run_dir)
    base = _base(run_dir, model)
    return found if base is None else [Subject("base", base), *found]


def _base(run_dir: Path, how: ModelConfig) -> Path | None:
    """The dense model of a run; None, and a note, where it is not there any more or does not fit into memory."""
    path = run_dir / DIRECTORIES["prune"] / RECORD
    if not path.is_file():
        return None
    pruned = records.read(path, "prune")
    model = pruned.settings.get("model", {})
    try:
        unpacked = run_dir / "base"
        of_hub = (model["path"], None, model["revision"])
        directory = unpacked if model.get("gguf_file") else find.locate(*of_hub, download=False)
        needed = checkpoint.weight_bytes(directory, _dtype(directory, how))
        lacking = None if how.weights == "dense" else shortage(how, needed)
        if lacking is None and checkpoint.fingerprint(directory) == pruned.inputs["base"]:
            return directory
        reason = f"{directory} {lacking or 'holds other weights than were pruned'}"
    except (UserError, OSError, KeyError) as error:
        reason = first_line(error)
    console.note(f"generate: without the base ({reason})")
    return None


def generate(subjects: Sequence[Subject], prompts: Sequence[str], settings: Settings) -> list[Sample]:
    """Lets every checkpoint continue every prompt; one model is in memory at a time.

    Args:
        subjects: of different labels.
        prompts: texts, or messages of a user.
        settings: how.

    Returns:
        A sample for each prompt, its completions in the order of the subjects.

    Raises:
        UserError: a setting is out of range, or a model or its chat template cannot be used.
    """
    if settings.max_new_tokens < 1:
        raise UserError("--max-new-tokens", f"{settings.max_new_tokens} is not a positive number")
    if not 0 <= settings.temperature < float("inf"):
        raise UserError("--temperature", f"{settings.temperature} is not a number from 0 on")
    if not all(prompt.strip() for prompt in prompts):
        raise UserError("--prompt", "is empty", "write a text")
    columns = [list(_completions(subject, prompts, settings)) for subject in subjects]
    samples = []
    for place, prompt in enumerate(prompts):
        row = [column[place] for column in columns]
        samples.append(Sample(prompt, any(chat for _, chat in row), [completion for completion, _ in row]))
    return samples


@torch.inference_mode()
def _completions(subject: Subject, prompts: Sequence[str], settings: Settings) -> Iterator[tuple[Completion, bool]]:
    """What a checkpoint writes after each prompt, and whether the prompt was in a chat template."""
    how, trust = settings.model, settings.model.trust_remote_code
    tokenizer = checkpoint.load_tokenizer(subject.directory, trust)
    encoded = [_encoded(tokenizer, prompt, settings.chat_template) for prompt in prompts]
    dtype = _dtype(subject.directory, how)
    packed = subject.is_packed(how, dtype)
    model = subject.load(checkpoint.pick_device(how.device), dtype, trust, packed=packed)
    model.generation_config = _neutral(model.generation_config)
    options: dict[str, Any] = {"do_sample": settings.temperature > 0, "max_new_tokens": settings.max_new_tokens}
    if settings.temperature > 0:
        options |= {"temperature": settings.temperature, "top_k": 0}  # 0: any; transformers has 50
    limit = checkpoint.max_window(model.config)
    for number, (prompt, (tokens, is_chat)) in enumerate(zip(prompts, encoded, strict=True), 1):
        length = tokens["input_ids"].shape[1]
        needed = length + settings.max_new_tokens
        if limit is not None and needed > limit:
            raise UserError(
                f"{prompt[:40]!r} and {settings.max_new_tokens} new tokens are {needed} tokens, more than the {limit} "
                f"positions of {subject.place}; shorten the prompt, or lower --max-new-tokens"
            )
        torch.manual_seed(settings.seed)  # a prompt alone and among others gives the same
        step = f"generating with {subject.label}, text {number} of {len(prompts)}"
        with checkpoint.quiet_libraries(), console.working(step):
            whole = model.generate(**tokens.to(model.device), **options)
        new = whole[0, length:].tolist()
        ends = _ends(model)
        text = tokenizer.decode(new, skip_special_tokens=True)
        yield Completion(subject.label, text, len(new), bool(new) and new[-1] in ends), is_chat


def _neutral(own: Any) -> Any:
    """A checkpoint's generation settings with its special tokens alone: no beams, penalties or nuclei of its own."""
    from transformers import GenerationConfig

    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return GenerationConfig(**{name: getattr(own, name) for name in names})


def _dtype(directory: Path, how: ModelConfig) -> str:
    device = checkpoint.pick_device(how.device)
    return checkpoint.choose_dtype(directory, device, how.compute_dtype, how.trust_remote_code).dtype


def _encoded(tokenizer: Any, prompt: str, chat: bool) -> tuple[Any, bool]:
    """The tokens of a prompt, and whether they are those of a message in a chat template."""
    if not (chat and getattr(tokenizer, "chat_template", None)):
        return tokenizer(prompt, return_tensors="pt", return_token_type_ids=False), False
    message = [{"role": "user", "content": prompt}]
    try_template(tokenizer, [message], "--prompt")
    try:
        tokens = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    except Exception as error:  # a template is a program: it raises what it likes
        raise UserError(f"the tokenizer's chat template fails: {first_line(error)}; --no-chat does without") from error
    tokens.pop("token_type_ids", None)
    return tokens, True


def _ends(model: Any) -> set[int]:
    """The tokens that end a text."""
    ids = model.generation_config.eos_token_id
    return set(ids) if isinstance(ids, list) else {ids}
