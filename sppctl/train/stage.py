"""pruned -> adapter: instruction tuning of an adapter with transformers' Trainer on the PEFT model."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict
from transformers import TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from sppctl import console, distributed, launch
from sppctl.config.settings import Config
from sppctl.data import prompts, texts, vocabulary
from sppctl.errors import Problems, Stopped, UserError
from sppctl.evaluate import perplexity
from sppctl.evaluate import stage as evaluate
from sppctl.files import cache
from sppctl.files.names import CHECKPOINTS
from sppctl.model import checkpoint
from sppctl.model.blocks import Skeleton
from sppctl.model.estimate import Work
from sppctl.pattern import Pattern
from sppctl.records import PruneRecord, TrainRecord, from_json
from sppctl.train import checkpoints as resuming
from sppctl.train import distill, methods, out_of_memory, refresh, scope, shards
from sppctl.train.feed import Feed
from sppctl.train.loop import SparseTrainer
from sppctl.train.watch import FiniteLoss, PerplexityEvery, StopSignals, Watch

LOGS = "logs"


@dataclass(frozen=True)
class Prepared:
    """A training that has been checked."""

    feed: Feed  # its examples, tokenised
    tokenizer: Any  # that they were made with
    work: Work  # what will be done
    sources: dict[str, str]  # hashes of the local files that the examples are from


def prepare(config: Config, skeleton: Skeleton, tokenizer: Any, sources: dict[str, str] | None = None) -> Prepared:
    """Checks targets, rank, batch, prompt, refresh, data and teacher, and tokenises the examples.

    Keys that were changed to no effect are warned of.

    Args:
        config: the configuration.
        skeleton: of the dense model.
        tokenizer: of the dense model.
        sources: hashes of the local files that are read.

    Raises:
        UserError: with everything that is wrong, one problem per line.
    """
    train, problems = config.train, Problems()
    feed: Feed | None = None
    with problems:
        launch.accumulation(train, launch.num_processes(config))
        _check_strategy(config)
        scope.adapted(config, skeleton)
        methods.check(config, problems)
        refresh.check(config, problems)
    limit = checkpoint.max_window(skeleton.config)
    if limit is not None and train.data.seq_len > limit:
        problems.add("train.data.seq_len", f"{train.data.seq_len} exceeds the model's {limit} positions")
    with problems:
        feed = Feed(config, tokenizer, vocabulary.embeddings(skeleton.model))
    with problems:
        scope.check_dtype(config)
    with problems:
        distill.preflight(config, skeleton, tokenizer)
    with problems:
        _check_perplexity(config, skeleton, tokenizer)
    _check_machine(config, skeleton, problems)
    problems.raise_all()
    assert feed is not None
    for line in methods.ignored(train):
        console.warn(line)
    return Prepared(feed, tokenizer, _work(config, feed), sources or {})


def _check_machine(config: Config, skeleton: Skeleton, problems: Problems) -> None:
    """Device, gradient checkpointing and loggers."""
    train, device = config.train, config.model.device
    if re.fullmatch(r"cuda:0*[1-9]\d*", device):
        problems.add(
            "model.device",
            f"training runs on the first GPU it sees, not on {device}",
            f"call CUDA_VISIBLE_DEVICES={device.partition(':')[2]} sppctl ... model.device=cuda",
        )
    if train.gradient_checkpointing and not getattr(skeleton.model, "supports_gradient_checkpointing", True):
        kind = skeleton.config.model_type
        problems.add("train.gradient_checkpointing", f"{kind} does not support it in transformers", "set it to false")
    for name in train.report_to:
        if importlib.util.find_spec(name) is None:
            problems.add("train.report_to", f"{name} is not installed", f"pip install {name}, or leave it out")


def _work(config: Config, feed: Feed) -> Work:
    """What the training will do; its tokens with padding, each run forward and twice as much backward."""
    train, examples = config.train, len(feed.train)
    steps = scope.num_steps(train, examples)
    seen = train.max_steps * train.batch_size if train.max_steps else train.epochs * examples
    tokens = sum(feed.train.lengths) / examples * seen
    if not feed.packing:
        tokens /= 1 - feed.padding_share
    passes = 3 + train.gradient_checkpointing + (train.distill.teacher is not None)
    return Work(f"{train.method}, {steps} steps of {train.batch_size} examples", passes * tokens)


def _check_perplexity(config: Config, skeleton: Skeleton, tokenizer: Any) -> None:
    """Raises UserError if the perplexity is wanted while training, and there is no text for it."""
    if config.train.perplexity_steps is None:
        return
    if not config.eval.perplexity:
        raise UserError("train.perplexity_steps", "eval.perplexity names no text to measure")
    evaluate.check_text(config, config.eval.perplexity[0], skeleton, tokenizer)


def _check_strategy(config: Config) -> None:
    """Raises UserError if DeepSpeed is wanted and not there."""
    if config.launch.strategy == "zero3" and importlib.util.find_spec("deepspeed") is None:
        raise UserError("launch.strategy", "zero3 needs DeepSpeed: pip install 'sppctl[deepspeed]', or choose fsdp")


def execute(
    config: Config,
    prepared: Prepared,
    pruned: Path,
    record: PruneRecord,
    out: Path,
    *,
    dtype: str,
    resume: bool,
    base: Path | None = None,
    planned: Callable[[], int | None] = lambda: None,
) -> TrainRecord:
    """Trains an adapter on the checkpoint ``pruned`` and saves it, as PEFT does, into ``out``.

    Args:
        config: the configuration.
        prepared: from :func:`prepare`.
        pruned: the pruned checkpoint, only read.
        record: of its pruning.
        out: directory that may hold checkpoints of an interrupted training.
        dtype: name of the dtype to compute in.
        resume: continue from the newest of them.
        base: the dense checkpoint, for distillation from it and for refreshing the mask.
        planned: estimates the bytes that the training needs on each device; None: they are not known.

    Raises:
        UserError: no usable data.
        StageError: the loss stopped being finite, or memory ran out.
    """
    with out_of_memory.explained(config, out / CHECKPOINTS, planned):
        return from_json(TrainRecord, _train(config, prepared, pruned, record, out, dtype, resume, base))


def _train(
    config: Config,
    prepared: Prepared,
    pruned: Path,
    record: PruneRecord,
    out: Path,
    dtype: str,
    resume: bool,
    base: Path | None,
) -> dict[str, Any]:
    train = config.train
    set_seed(config.run.seed)
    device = checkpoint.pick_device(config.model.device)
    tokenizer = checkpoint.load_tokenizer(pruned, config.model.trust_remote_code)
    checkpoints = out / CHECKPOINTS
    dated = prompts.is_dated(train.data.prompt, tokenizer)
    today = distributed.decide(partial(resuming.began, checkpoints, resume)) if dated else None
    feed = prepared.feed
    if today is not None or not cache.same_tokenizer(prepared.tokenizer, tokenizer):
        embedded = checkpoint.load_config(pruned, config.model.trust_remote_code).get_text_config().vocab_size
        feed = Feed(config, tokenizer, embedded, today)
    feed.tell(train.data.seq_len)
    strategy = config.launch.strategy if distributed.world_size() > 1 else None
    with shards.load_in_one_process() if strategy == "fsdp" else contextlib.nullcontext():
        model = checkpoint.load_model(pruned, torch.device("cpu"), dtype, config.model.trust_remote_code)
    model.config.use_cache = False
    set_seed(config.run.seed)  # the same adapter in all processes, and whatever their number
    peft_model = get_peft_model(model, _adapter_config(config, model, record.patterns))
    methods.start_at_stored(peft_model, pruned)
    if strategy == "ddp":
        shards.keep_frozen_weights(peft_model)
    tuner: Any = peft_model.base_model
    trainable, total = peft_model.get_nb_trainable_parameters()
    console.note(
        f"training {trainable:,} of {total:,} parameters ({trainable / total:.2%}) on {len(feed.train)} examples"
    )
    newest = distributed.decide(partial(resuming.newest, checkpoints, strategy)) if resume else None
    if newest:
        console.note(f"resuming from {newest}")
        if strategy == "fsdp":
            set_peft_model_state_dict(peft_model, load_peft_weights(newest, device="cpu"))
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(out / LOGS)
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"  # `accelerate launch` may say otherwise: no autocast
    distillation = distill.load(config, base, device, dtype)
    refreshing = refresh.prepare(config, peft_model, pruned, base, newest, record.patterns)
    watch = Watch()
    callbacks = [watch, *methods.callbacks(train), *([refreshing] if refreshing else [])]
    trainer = SparseTrainer(
        model=peft_model,
        args=_arguments(config, checkpoints, device, model, bool(feed.held_out)),
        feed=feed,
        callbacks=[*callbacks, *_perplexity_callback(config, pruned, tokenizer)],
        finite=FiniteLoss(),
        distillation=distillation,
        refresh=refreshing,
    )
    if strategy:  # or all would drop out alike; the first process does as one alone
        torch.manual_seed(config.run.seed + distributed.rank())
    trainer.remove_callback(PrinterCallback)
    started = time.perf_counter()
    with StopSignals() as signals:
        trainer.add_callback(signals)
        trainer.train(resume_from_checkpoint=newest)
    if signals.caught and trainer.state.global_step < trainer.state.max_steps:
        raise Stopped(
            f"stopped by {signal.Signals(signals.caught).name} after step {trainer.state.global_step} of "
            f"{trainer.state.max_steps}; a checkpoint is written, the same command continues (under Slurm: requeue)"
        )
    seconds, in_all = time.perf_counter() - started, watch.seconds()
    with console.working(f"validation loss of {len(feed.held_out)} examples"):
        validation = trainer.evaluate()["eval_loss"] if feed.held_out else None
    history = [e for e in trainer.state.log_history if {"loss", "eval_loss", "perplexity", "mask_changes"} & e.keys()]
    trainer.save_adapter(out)
    tokens = trainer.state.num_input_tokens_seen
    return {
        "method": train.method,
        "modules": sorted(tuner.targeted_module_names),
        "trainable_parameters": trainable,
        "trainable_share": trainable / total,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "train_loss": _mean_loss(history),
        "validation_loss": validation,
        **feed.metrics(),
        "tokens": tokens,
        "seconds": in_all,
        "tokens_per_second": tokens / in_all,
        "dtype": dtype,
        "distillation": distillation and distillation.metrics(history, seconds),
        "refresh": refreshing and refreshing.metrics(trainer.state.log_history),
        "history": history,
    }


def _mean_loss(history: list[dict[str, Any]]) -> float | None:
    """Mean training loss over all steps; each entry is the mean since the one before, which no checkpoint parts."""
    total, last = 0.0, 0
    for entry in (entry for entry in history if "loss" in entry):
        total += entry["loss"] * (entry["step"] - last)
        last = entry["step"]
    return total / last if last else None


def _perplexity_callback(config: Config, pruned: Path, tokenizer: Any) -> list[PerplexityEvery]:
    """The perplexity every so many steps, on the first text of the evaluation, if it is wanted."""
    train = config.train
    if train.perplexity_steps is None:
        return []
    name = config.eval.perplexity[0]
    text = texts.load_text(name, "test", "eval.perplexity")
    window = evaluate.window_of(config, pruned)
    whole = text.joiner.join(text.documents)
    windows = perplexity.text_windows(tokenizer, whole, window, config.eval.max_tokens, name)
    return [PerplexityEvery(train.perplexity_steps, name, windows)]


def _adapter_config(config: Config, model: Any, patterns: Mapping[str, Pattern]) -> PeftConfig:
    """The adapters of a model whose layers were pruned by these patterns."""
    train = config.train
    wanted = list(patterns if train.targets == "pruned" else train.targets)
    targets = Skeleton(model.config).targets(wanted, key="train.targets").values()
    names = [target.name for target in targets if target.is_linear]
    if len(names) < len(targets):
        console.warn(f"{len(targets) - len(names)} matrices are not nn.Linear (experts, Conv1D) and stay as they are")
    return methods.adapter_config(train, names, {name: patterns[name] for name in names if name in patterns})


def _arguments(
    config: Config, checkpoints: Path, device: torch.device, model: Any, validate: bool
) -> TrainingArguments:
    train = config.train
    further = _strategy_arguments(config, device, model)
    if train.gradient_checkpointing:
        further |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=train.micro_batch_size,
        per_device_eval_batch_size=train.micro_batch_size,
        gradient_accumulation_steps=launch.accumulation(train, launch.num_processes(config)),
        num_train_epochs=train.epochs,
        max_steps=train.max_steps or -1,
        learning_rate=train.lr,
        lr_scheduler_type="linear",
        warmup_steps=train.warmup_ratio,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        logging_steps=train.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a loss that is not finite must be seen, not averaged away
        save_steps=train.save_steps,
        save_total_limit=train.keep_checkpoints,
        eval_strategy="steps" if validate and train.eval_steps else "no",
        eval_steps=train.eval_steps,
        # a packed batch has no attention mask to tell padding by, and no padding
        include_num_input_tokens_seen="all" if train.data.packing else "non_padding",
        remove_unused_columns=False,
        report_to=list(train.report_to),
        disable_tqdm=True,
        seed=config.run.seed,
        data_seed=config.run.seed,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        **further,
    )
    # a process has one GPU, however many it sees: the Trainer would copy the model to all and multiply the batch
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _strategy_arguments(config: Config, device: torch.device, model: Any) -> dict[str, Any]:
    """How the processes share the model."""
    if distributed.world_size() == 1:
        return {}
    backend = "nccl" if device.type == "cuda" else "gloo"
    if config.launch.strategy == "fsdp":
        return {"ddp_backend": backend} | shards.arguments(model)
    if config.launch.strategy == "zero3":
        shards.spare_compiling()
        # DeepSpeed converts the whole model: to float32 unless told that it is bfloat16
        return {"bf16": model.dtype == torch.bfloat16, "deepspeed": str(shards.DEEPSPEED)}
    return {"ddp_backend": backend, "ddp_find_unused_parameters": False}
