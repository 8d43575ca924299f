"""pruned -> adapter: instruction tuning of an adapter with transformers' Trainer on the PEFT model."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
import signal
import time
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
from sppctl.errors import Stopped, UserError
from sppctl.evaluate import perplexity
from sppctl.evaluate import stage as evaluate
from sppctl.files.names import CHECKPOINTS
from sppctl.model import checkpoint
from sppctl.model.blocks import Skeleton
from sppctl.model.estimate import Work
from sppctl.pattern import Pattern
from sppctl.plan import run as plan
from sppctl.prune.choose import patterns_of
from sppctl.train import distill, methods, out_of_memory, refresh, shards
from sppctl.train import resume as resuming
from sppctl.train.feed import Feed
from sppctl.train.trainer import SparseTrainer
from sppctl.train.watch import FiniteLoss, PerplexityEvery, StopSignals, Watch

LOGS = "logs"


def preflight(config: Config, skeleton: Skeleton, tokenizer: Any) -> Work:
    """Checks targets, rank, batch arithmetic, prompt, refresh, and that data and teacher are there and fit.

    Keys that were changed to no effect are warned of.

    Raises:
        UserError: with everything that is wrong.
    """
    train = config.train
    problems = []
    try:
        launch.accumulation(train, launch.num_processes(config))
        _check_strategy(config)
        plan.adapted(config, skeleton)
        problems += methods.preflight(config) + refresh.problems(config)
    except UserError as error:
        problems.append(str(error))
    limit = checkpoint.max_window(skeleton.config)
    if limit is not None and train.data.seq_len > limit:
        problems.append(f"train.data.seq_len: {train.data.seq_len} exceeds the model's {limit} positions")
    feed: Feed | None = None
    try:
        feed = Feed(config, tokenizer, vocabulary.embeddings(skeleton.model))
    except UserError as error:
        problems.append(str(error))
    for check in (
        partial(plan.check_dtype, config),
        partial(distill.preflight, config, skeleton, tokenizer),
        partial(_check_perplexity, config, skeleton, tokenizer),
    ):
        try:
            check()
        except UserError as error:
            problems.append(str(error))
    if re.fullmatch(r"cuda:0*[1-9]\d*", config.model.device):
        number = config.model.device.partition(":")[2]
        problems.append(
            f"model.device: training runs on the first GPU it sees, not on {config.model.device}; "
            f"call CUDA_VISIBLE_DEVICES={number} sppctl ... model.device=cuda"
        )
    if train.gradient_checkpointing and not getattr(skeleton.model, "supports_gradient_checkpointing", True):
        kind = skeleton.config.model_type
        problems.append(f"train.gradient_checkpointing: {kind} does not support it in transformers; set it to false")
    for name in train.report_to:
        if importlib.util.find_spec(name) is None:
            problems.append(f"train.report_to: {name} is not installed; pip install {name}, or leave it out")
    if problems or feed is None:
        raise UserError("\n".join(dict.fromkeys(problems)))
    for line in methods.ignored(train):
        console.warn(line)
    return _work(config, feed)


def _work(config: Config, feed: Feed) -> Work:
    """What the training will do; its tokens with padding, each run forward and twice as much backward."""
    train, examples = config.train, len(feed.train)
    steps = train.max_steps or math.ceil(train.epochs * math.ceil(examples / train.batch_size))
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
        raise UserError("train.perplexity_steps: eval.perplexity names no text to measure")
    evaluate.check_text(config, config.eval.perplexity[0], skeleton, tokenizer)


def _check_strategy(config: Config) -> None:
    """Raises UserError if DeepSpeed is wanted and not there."""
    if config.launch.strategy == "zero3" and importlib.util.find_spec("deepspeed") is None:
        raise UserError("launch.strategy: zero3 needs DeepSpeed: pip install 'sppctl[deepspeed]', or choose fsdp")


def execute(
    config: Config, pruned: Path, layers: list[str], out: Path, *, dtype: str, resume: bool, base: Path | None = None
) -> dict[str, Any]:
    """Trains an adapter on the checkpoint ``pruned`` and saves it, as PEFT does, into ``out``.

    Args:
        config: the configuration.
        pruned: the pruned checkpoint, only read.
        layers: full names of the pruned linear layers.
        out: directory that may hold checkpoints of an interrupted training.
        dtype: name of the dtype to compute in.
        resume: continue from the newest of them.
        base: the dense checkpoint, for distillation from it and for refreshing the mask.

    Returns:
        Metrics: steps, losses, tokens, truncation, trainable parameters, history.

    Raises:
        UserError: no usable data.
        StageError: the loss stopped being finite, or memory ran out.
    """
    with out_of_memory.explained(config, out / CHECKPOINTS):
        return _train(config, pruned, layers, out, dtype, resume, base)


def _train(
    config: Config, pruned: Path, layers: list[str], out: Path, dtype: str, resume: bool, base: Path | None
) -> dict[str, Any]:
    train = config.train
    set_seed(config.run.seed)
    device = checkpoint.pick_device(config.model.device)
    tokenizer = checkpoint.load_tokenizer(pruned, config.model.trust_remote_code)
    embedded = checkpoint.load_config(pruned, config.model.trust_remote_code).get_text_config().vocab_size
    checkpoints = out / CHECKPOINTS
    dated = prompts.is_dated(train.data.prompt, tokenizer)
    today = distributed.decide(partial(resuming.began, checkpoints, resume)) if dated else None
    feed = Feed(config, tokenizer, embedded, today)
    feed.tell(train.data.seq_len)
    strategy = config.launch.strategy if distributed.world_size() > 1 else None
    with shards.load_in_one_process() if strategy == "fsdp" else contextlib.nullcontext():
        model = checkpoint.load_model(pruned, torch.device("cpu"), dtype, config.model.trust_remote_code)
    model.config.use_cache = False
    set_seed(config.run.seed)  # the same adapter in all processes, and whatever their number
    peft_model = get_peft_model(model, _adapter_config(config, model, layers))
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
    refreshing = refresh.prepare(config, peft_model, pruned, base, newest)
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


def _adapter_config(config: Config, model: Any, layers: list[str]) -> PeftConfig:
    train = config.train
    wanted = layers if train.targets == "pruned" else list(train.targets)
    skeleton = Skeleton(model.config)
    targets = skeleton.targets(wanted, key="train.targets").values()
    names = [target.name for target in targets if target.is_linear]
    if len(names) < len(targets):
        console.warn(f"{len(targets) - len(names)} matrices are no nn.Linear (experts, Conv1D) and stay as they are")
    return methods.adapter_config(train, names, _patterns(config, skeleton, names))


def _patterns(config: Config, skeleton: Skeleton, names: list[str]) -> dict[str, Pattern]:
    """The pattern by which each of the layers was pruned, of those that were."""
    planned = patterns_of(config.prune, skeleton)
    return {name: planned[name] for name in names if name in planned}


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
