"""pruned -> adapter: instruction tuning of an adapter on the PEFT model."""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from transformers import set_seed

from sppctl import console, distributed, launch
from sppctl.config.settings import Config
from sppctl.data import vocabulary
from sppctl.errors import Problems, UserError
from sppctl.evaluate import stage as evaluate
from sppctl.files import cache
from sppctl.files.names import CHECKPOINTS
from sppctl.model import checkpoint
from sppctl.model.blocks import Skeleton
from sppctl.model.estimate import Work
from sppctl.packed.linear import num_packed
from sppctl.records import PruneRecord, TrainRecord
from sppctl.train import checkpoints, distill, methods, optimizers, out_of_memory, refresh, scope, shards
from sppctl.train.feed import Feed
from sppctl.train.loop import Loop, reporting_to
from sppctl.train.watch import PerplexityEvery

# the record keeps the lines of the history that have one of these
RECORDED = {"loss", "eval_loss", "perplexity", "mask_changes"}


@dataclass(frozen=True)
class Prepared:
    """A checked training."""

    feed: Feed  # its examples, tokenised
    tokenizer: Any  # that produced their tokens
    work: Work  # how much there is to do
    sources: dict[str, str]  # hashes of the local files that the examples are from


def prepare(config: Config, skeleton: Skeleton, tokenizer: Any, sources: dict[str, str] | None = None) -> Prepared:
    """Checks targets, rank, batch, prompt, refresh, data and teacher, and tokenises the examples.

    Warns of changed keys that have no effect.

    Args:
        config: the configuration.
        skeleton, tokenizer: of the dense model.
        sources: hashes of the local files that are read.

    Raises:
        UserError: with all problems, one per line.
    """
    train, problems = config.train, Problems()
    feed: Feed | None = None
    with problems:
        launch.accumulation(train, launch.num_processes(config))
        refresh.check(config, skeleton, scope.adapted(config, skeleton), problems)
    optimizers.check(config, problems)
    _check_keys(config, skeleton, problems)
    with problems:
        feed = Feed(config, tokenizer, vocabulary.embeddings(skeleton.model))
        optimizers.check_schedule(train, feed.max_steps)
    if train.keep_best == "eval_loss" and feed is not None and not feed.held_out:
        problems.add("train.keep_best", "no example is held out for eval_loss", "set train.data.val_size")
    with problems:
        scope.check_dtype(config)
    with problems:
        if config.model.weights == "packed":
            scope.cannot_pack(config, launch.num_processes(config)).raise_all()
    with problems:
        distill.preflight(config, skeleton, tokenizer)
    with problems:
        if train.perplexity_steps is not None:
            if not config.eval.perplexity:
                raise UserError("train.perplexity_steps", "eval.perplexity names no text to measure")
            evaluate.check_text(config, config.eval.perplexity[0], skeleton, tokenizer)
    problems.raise_all()
    assert feed is not None
    for line in methods.ignored(train):
        console.warn(line)
    examples = len(feed.train)
    repeated = train.max_steps * train.batch_size if train.max_steps else train.epochs * examples
    tokens = sum(feed.train.lengths) / examples * repeated
    if not feed.packing:
        tokens /= 1 - feed.padding_share
    passes = 3 + train.gradient_checkpointing + (train.distill.teacher is not None)  # a backward pass is two
    work = Work(f"{train.method}, {feed.max_steps} steps of {train.batch_size} examples", passes * tokens)
    return Prepared(feed, tokenizer, work, sources or {})


def _check_keys(config: Config, skeleton: Skeleton, problems: Problems) -> None:
    """Adds what the model, the machine and the installed libraries do not allow to ``problems``."""
    train, device, strategy = config.train, config.model.device, config.launch.strategy
    if strategy == "zero3" and importlib.util.find_spec("deepspeed") is None:
        problems.add("launch.strategy", "zero3 needs DeepSpeed: pip install 'sppctl[deepspeed]', or choose fsdp")
    if train.method == "ste" and strategy != "ddp":
        problem = f"ste selects masks on full matrices, but launch.strategy={strategy} shards them"
        problems.add("train.method", problem, "use ddp")
    with problems:
        checkpoint.check_window("train.data.seq_len", train.data.seq_len, skeleton.config)
    if re.fullmatch(r"cuda:0*[1-9]\d*", device):
        fix = f"run CUDA_VISIBLE_DEVICES={device.partition(':')[2]} sppctl ... model.device=cuda"
        problems.add("model.device", f"training runs on the first visible GPU, not on {device}", fix)
    if train.gradient_checkpointing and not getattr(skeleton.model, "supports_gradient_checkpointing", True):
        kind = skeleton.config.model_type
        problems.add("train.gradient_checkpointing", f"{kind} does not support it in transformers", "set it to false")
    for name in train.report_to:
        if importlib.util.find_spec(name) is None:
            problems.add("train.report_to", f"{name} is not installed", f"pip install {name}, or leave it out")


def execute(
    config: Config,
    prepared: Prepared,
    pruned: Path,
    record: PruneRecord,
    out: Path,
    *,
    dtype: str,
    resume: bool,
    packed: bool = False,
    base: Path | None = None,
    planned: Callable[[], int | None] = lambda: None,
) -> TrainRecord:
    """Trains an adapter on the checkpoint ``pruned``, which is only read, and saves it to ``out`` in PEFT's format.

    Args:
        pruned, record: the pruned checkpoint and its record.
        out: directory that may hold checkpoints of an interrupted training; ``resume`` continues from the newest.
        dtype, packed: name of the compute dtype; whether pruned weights are packed in memory, with the same result.
        base: the dense checkpoint, for distillation from it and for refreshing the mask.
        planned: estimates the bytes that the training needs on each device; None if they are unknown.

    Raises:
        UserError: no usable data.
        StageError: a loss or gradient is not finite, or memory ran out; ``Stopped``: a signal ended it.
    """
    train, folder = config.train, out / CHECKPOINTS
    with out_of_memory.explained(config, folder, planned, packed=packed), shards.forgetting_accelerator():
        device = checkpoint.pick_device(config.model.device)
        strategy = config.launch.strategy if distributed.world_size() > 1 else None
        tokenizer = checkpoint.load_tokenizer(pruned, config.model.trust_remote_code)
        feed = _feed(config, prepared, pruned, tokenizer, folder, resume)
        model = _adapted(config, pruned, record, dtype, strategy, packed)
        counts = parameter_counts(model)
        console.note(f"training {_share(*counts)} on {len(feed.train)} examples")
        newest = _resume(model, folder, strategy, feed.max_steps) if resume else None
        distillation = distill.load(config, base, device, dtype, packed=packed)
        hooks = methods.hooks(train, feed.max_steps)
        if train.refresh.steps is not None:
            hooks.append(refresh.MaskRefresh(config, model, pruned, base, record.patterns, feed.max_steps, newest))
        if train.perplexity_steps is not None:
            hooks.append(PerplexityEvery(config, pruned, tokenizer, feed.max_steps))
        accelerator = shards.make_accelerator(config, device, model.get_base_model())
        set_seed(_own_seed(config.run.seed))
        with reporting_to(train, out) as trackers:
            loop = Loop(train, accelerator, model, feed, folder, newest, distillation, hooks, trackers)
            loop.run()
            validation = loop.finish(out)
        return replace(_record(loop, dtype, counts, validation), weights="packed" if packed else "dense")


def _own_seed(seed: int) -> int:
    """The seed of this process's dropout, which differs between processes; the first draws as a single one would."""
    return (seed + distributed.rank()) % 2**32  # NumPy takes no greater one


def _share(trained: int, total: int) -> str:
    return f"{trained:,} of {total:,} parameters ({trained / total:.2%})"


def _feed(config: Config, prepared: Prepared, pruned: Path, tokenizer: Any, folder: Path, resume: bool) -> Feed:
    """The prepared examples, or new ones if their date or tokenizer has to change.

    A chat template that prints the date prints that of the first attempt; the tokenizer is the pruned checkpoint's.
    """
    feed = prepared.feed
    today = distributed.decide(partial(checkpoints.start_time, folder, resume)) if feed.is_dated else None
    if today is not None or not cache.same_tokenizer(prepared.tokenizer, tokenizer):
        vocab_size = checkpoint.load_config(pruned, config.model.trust_remote_code).get_text_config().vocab_size
        feed = Feed(config, tokenizer, vocab_size, today)
    feed.report()
    return feed


def parameter_counts(model: PeftModel) -> tuple[int, int]:
    """The trainable and all parameters, those of packed weights counted as if they were dense."""
    trainable, parameters = model.get_nb_trainable_parameters()
    return trainable, parameters + num_packed(model)


def _adapted(
    config: Config, pruned: Path, record: PruneRecord, dtype: str, strategy: str | None, packed: bool
) -> PeftModel:
    """The pruned model with a new adapter, on the CPU."""
    train, patterns = config.train, record.patterns
    model = checkpoint.load_model(pruned, torch.device("cpu"), dtype, config.model.trust_remote_code, packed=packed)
    model.config.use_cache = False
    set_seed(config.run.seed)  # the same initial adapter in all processes, however many there are
    layers = list(patterns if train.targets == "pruned" else train.targets)
    skeleton = Skeleton(model.config, trust_remote_code=config.model.trust_remote_code)
    targets = skeleton.targets(layers, key="train.targets").values()
    names = [target.name for target in targets if target.is_linear]
    if len(names) < len(targets):
        console.warn(f"{len(targets) - len(names)} matrices are not nn.Linear (experts, Conv1D) and are not trained")
    model.name_or_path = str(pruned.absolute())  # PEFT stores it, for loaders that work elsewhere
    adapted = get_peft_model(model, methods.adapter_config(train, names, patterns, record.masks))
    methods.start_at_stored(adapted, pruned, skeleton.base_prefix)
    if strategy == "ddp":
        shards.keep_frozen_weights(adapted)
    if train.gradient_checkpointing:
        with warnings.catch_warnings():  # deprecated in newer versions of transformers
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return adapted


def _resume(model: PeftModel, folder: Path, strategy: str | None, max_steps: int) -> Path | None:
    """Loads the adapter of the newest checkpoint into the model; returns the checkpoint, None if there is none."""
    newest = distributed.decide(partial(checkpoints.newest, folder, strategy))
    if newest:
        console.note(f"continuing from step {checkpoints.step_of(newest)} of {max_steps} ({newest})")
        set_peft_model_state_dict(model, load_peft_weights(str(newest), device="cpu"))
    return newest


def _record(loop: Loop, dtype: str, counts: tuple[int, int], validation: float | None) -> TrainRecord:
    """The record of a training; ``counts`` are the trainable and all parameters."""
    state, feed, distillation = loop.state, loop.feed, loop.distillation
    refreshing = next((hook for hook in loop.hooks if isinstance(hook, refresh.MaskRefresh)), None)
    return TrainRecord(
        method=loop.train.method,
        modules=sorted(loop.peft.base_model.targeted_module_names),
        trainable_parameters=counts[0],
        trainable_share=counts[0] / counts[1],
        steps=state.step,
        epochs=feed.epochs(state.step),
        train_loss=state.mean("loss"),
        validation_loss=validation,
        best_step=state.best_step,
        examples=len(feed.train),
        validation_examples=len(feed.held_out),
        datasets=feed.rows.taken,
        duplicates_of_held_out=feed.rows.left_out,
        versions=feed.rows.versions,
        data_hash=feed.rows.hash,
        examples_without_labels=feed.unlabelled[0],
        validation_examples_without_labels=feed.unlabelled[1],
        truncated_examples=feed.train.truncated,
        padding_share=feed.padding_share,
        tokens=state.tokens,
        seconds=state.seconds,
        tokens_per_second=state.tokens / state.seconds,
        dtype=dtype,
        distillation=distillation.record(state, state.seconds - loop.before.seconds) if distillation else None,
        refresh=refreshing.record(state.history) if refreshing else None,
        history=[line for line in state.history if RECORDED & line.keys()],
    )
