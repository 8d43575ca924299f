"""pruned -> adapter: instruction tuning of an SPP adapter with transformers' Trainer on the PEFT model."""

from __future__ import annotations

import math
import os
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from transformers import TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from sppctl import console, distributed
from sppctl.errors import Stopped, UserError
from sppctl.lm import checkpoint, data, perplexity
from sppctl.lm.blocks import Skeleton
from sppctl.settings import Config, TrainConfig
from sppctl.stages import distill, evaluate, methods, refresh
from sppctl.stages.trainer import SparseTrainer
from sppctl.stages.watch import FiniteLoss, PerplexityEvery, StopSignals, Watch

CHECKPOINTS, LOGS = "checkpoints", "logs"


def preflight(config: Config, skeleton: Skeleton) -> None:
    """Checks targets, rank, batch arithmetic and that the data is there with the right columns.

    Raises:
        UserError: with everything that is wrong.
    """
    train = config.train
    problems = []
    try:
        _accumulation(train)
        names = config.prune.targets if train.targets == "pruned" else train.targets
        targets = [t for t in skeleton.targets(names, key="train.targets").values() if t.is_linear]
        if not targets:
            problems.append("train.targets: SPP adapts nn.Linear layers, and none of these is one")
        narrow = [target for target in targets if train.rank > target.out_features]
        if narrow:
            target = narrow[0]
            problems.append(
                f"train.rank: {train.rank} exceeds the {target.out_features} output features of {target.name}"
            )
    except UserError as error:
        problems.append(str(error))
    limit = checkpoint.max_window(skeleton.config)
    if limit is not None and train.data.seq_len > limit:
        problems.append(f"train.data.seq_len: {train.data.seq_len} exceeds the model's {limit} positions")
    for check in (lambda: load_rows(config), lambda: distill.preflight(config, skeleton)):
        try:
            check()
        except UserError as error:
            problems.append(str(error))
    problems += refresh.problems(config)
    if problems:
        raise UserError("\n".join(problems))


def load_rows(config: Config) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and validation rows as configured."""
    section = config.train.data
    return data.load_instructions(
        section.dataset, section.split, val_size=section.val_size, max_rows=section.max_rows, seed=config.run.seed
    )


def _accumulation(train: TrainConfig) -> int:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    step = train.micro_batch_size * processes
    if train.batch_size % step:
        raise UserError(
            f"train.batch_size: {train.batch_size} is not a multiple of micro_batch_size x processes "
            f"({train.micro_batch_size} x {processes}); change one of them"
        )
    return train.batch_size // step


def execute(
    config: Config, pruned: Path, layers: list[str], out: Path, *, resume: bool, base: Path | None = None
) -> dict[str, Any]:
    """Trains an adapter on the checkpoint ``pruned`` and saves it, as PEFT does, into ``out``.

    Args:
        config: the configuration.
        pruned: the pruned checkpoint, only read.
        layers: full names of the pruned linear layers.
        out: directory that may hold checkpoints of an interrupted training.
        resume: continue from the newest of them.
        base: the dense checkpoint, for distillation from it and for refreshing the mask.

    Returns:
        Metrics: steps, losses, tokens, truncation, trainable parameters, history.

    Raises:
        UserError: no usable data.
        StageError: the loss stopped being finite.
    """
    train = config.train
    set_seed(config.run.seed)
    device = checkpoint.pick_device(config.model.device)
    tokenizer = checkpoint.load_tokenizer(pruned, config.model.trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{pruned}: its tokenizer has no end-of-text token, which every response needs")
    train_set, val_set = _examples(config, tokenizer)
    model = _load(config, pruned, device)
    peft_model = get_peft_model(model, _adapter_config(config, model, layers))
    trainable, total = peft_model.get_nb_trainable_parameters()
    console.note(
        f"training {trainable:,} of {total:,} parameters ({trainable / total:.2%}) on {len(train_set)} examples"
    )
    checkpoints = out / CHECKPOINTS
    newest = get_last_checkpoint(str(checkpoints)) if resume and checkpoints.is_dir() else None
    if newest:
        console.note(f"resuming from {newest}")
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(out / LOGS)
    distillation = distill.load(config, base, device, model.dtype)
    refreshing = refresh.prepare(config, peft_model, base, newest)
    callbacks = [Watch(), *([refreshing] if refreshing else []), *_perplexity_callback(config, tokenizer)]
    trainer = SparseTrainer(
        model=peft_model,
        args=_arguments(config, checkpoints, device, model.dtype, bool(val_set)),
        train_dataset=train_set,
        eval_dataset=val_set or None,
        data_collator=Collator(
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            response_mask=distillation is not None,
        ),
        callbacks=callbacks,
        finite=FiniteLoss(),
        distillation=distillation,
        refresh=refreshing,
    )
    trainer.remove_callback(PrinterCallback)
    started = time.perf_counter()
    with StopSignals() as signals:
        trainer.add_callback(signals)
        result = trainer.train(resume_from_checkpoint=newest)
    if signals.caught and trainer.state.global_step < trainer.state.max_steps:
        raise Stopped(
            f"stopped by {signal.Signals(signals.caught).name} after step {trainer.state.global_step} of "
            f"{trainer.state.max_steps}; a checkpoint is written, the same command continues (under Slurm: requeue)"
        )
    seconds = time.perf_counter() - started
    history = [e for e in trainer.state.log_history if {"loss", "eval_loss", "perplexity"} & e.keys()]
    validation = trainer.evaluate()["eval_loss"] if val_set else None
    peft_model.save_pretrained(str(out))
    if refreshing and distributed.is_main():
        refreshing.save(out)
    shutil.rmtree(checkpoints, ignore_errors=True)
    tokens = trainer.state.num_input_tokens_seen
    return {
        "method": train.method,
        "trainable_parameters": trainable,
        "trainable_share": trainable / total,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "train_loss": result.training_loss,
        "validation_loss": validation,
        "examples": len(train_set),
        "validation_examples": len(val_set),
        "truncated_examples": sum(example.truncated for example in train_set),
        "tokens": tokens,
        "tokens_per_second": None if newest else tokens / seconds,
        "dtype": str(model.dtype).removeprefix("torch."),
        "distillation": distillation and distillation.metrics(history, seconds),
        "refresh": refreshing and refreshing.metrics(trainer.state.log_history, pruned),
        "history": history,
    }


def _examples(config: Config, tokenizer: Any) -> tuple[list[data.Example], list[data.Example]]:
    """Tokenised training and validation rows; what had to be cut is said."""
    train = config.train
    train_set, val_set = (_tokenize(rows, tokenizer, train) for rows in load_rows(config))
    cut = sum(example.truncated for example in train_set)
    if cut:
        share = cut / len(train_set)
        console.note(
            f"{cut} of {len(train_set)} examples ({share:.1%}) are longer than {train.data.seq_len} tokens and were cut"
        )
    from_prompts = train.data.train_on_inputs and train.distill.teacher is None
    if not from_prompts and all(example.prompt_tokens == len(example.input_ids) for example in train_set):
        raise UserError(f"train.data.seq_len: {train.data.seq_len} leaves no response token to learn from")
    return train_set, val_set


def _perplexity_callback(config: Config, tokenizer: Any) -> list[PerplexityEvery]:
    """The perplexity every so many steps, on the first text of the evaluation, if it is wanted."""
    train = config.train
    if train.perplexity_steps is None:
        return []
    name = config.eval.perplexity[0]
    text = data.load_text(name, "test", "eval.perplexity")
    window = config.eval.seq_len or evaluate.DEFAULT_WINDOW
    whole = text.joiner.join(text.documents)
    windows = perplexity.text_windows(tokenizer, whole, window, config.eval.max_tokens, name)
    return [PerplexityEvery(train.perplexity_steps, name, windows)]


def _load(config: Config, pruned: Path, device: torch.device) -> Any:
    """The pruned model on the CPU, in a dtype that can be trained."""
    model = checkpoint.load_model(pruned, torch.device("cpu"), trust_remote_code=config.model.trust_remote_code)
    if model.dtype == torch.float16:
        # float16 gradients overflow without loss scaling; merging still writes float16
        model = model.to(torch.bfloat16 if _has_bf16(device) else torch.float32)
        console.note(f"the model is stored as float16 and trained as {str(model.dtype).removeprefix('torch.')}")
    model.config.use_cache = False
    return model


def _tokenize(rows: list[dict[str, Any]], tokenizer: Any, train: TrainConfig) -> list[data.Example]:
    seq_len, on_inputs = train.data.seq_len, train.data.train_on_inputs
    return [
        data.tokenize_instruction(tokenizer, row, number, seq_len=seq_len, train_on_inputs=on_inputs)
        for number, row in enumerate(rows)
    ]


def _adapter_config(config: Config, model: Any, layers: list[str]) -> PeftConfig:
    train = config.train
    wanted = layers if train.targets == "pruned" else list(train.targets)
    targets = Skeleton(model.config).targets(wanted, key="train.targets").values()
    names = [target.name for target in targets if target.is_linear]
    if len(names) < len(targets):
        console.warn(f"{len(targets) - len(names)} matrices are no nn.Linear (experts, Conv1D) and stay as they are")
    return methods.adapter_config(train, names)


def _arguments(
    config: Config, checkpoints: Path, device: torch.device, dtype: torch.dtype, validate: bool
) -> TrainingArguments:
    train = config.train
    wanted = config.launch.mixed_precision
    autocast = dtype == torch.float32 and (wanted == "bf16" or (wanted == "auto" and _has_bf16(device)))
    checkpointing: dict[str, Any] = {}
    if train.gradient_checkpointing:
        checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    return TrainingArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=train.micro_batch_size,
        per_device_eval_batch_size=train.micro_batch_size,
        gradient_accumulation_steps=_accumulation(train),
        num_train_epochs=train.epochs,
        max_steps=train.max_steps or -1,
        learning_rate=train.lr,
        lr_scheduler_type="linear",
        warmup_steps=train.warmup_ratio,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        bf16=autocast,
        logging_steps=train.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a loss that is not finite must be seen, not averaged away
        save_steps=train.save_steps,
        save_total_limit=train.keep_checkpoints,
        eval_strategy="steps" if validate and train.eval_steps else "no",
        eval_steps=train.eval_steps,
        include_num_input_tokens_seen="non_padding",
        remove_unused_columns=False,
        report_to=list(train.report_to),
        disable_tqdm=True,
        seed=config.run.seed,
        data_seed=config.run.seed,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        **checkpointing,
    )


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    # CPUs without bfloat16 instructions emulate it, far slower than float32
    return device.type == "cpu" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@dataclass(frozen=True)
class Collator:
    """Pads a batch of examples on the right to its longest, rounded up to a multiple of 8."""

    pad_token_id: int
    response_mask: bool = False

    def __call__(self, examples: list[data.Example]) -> dict[str, Any]:
        """Returns input_ids, attention_mask and labels, each (batch, tokens) int64, and the examples' numbers.

        With ``response_mask`` also a boolean tensor of that shape, True for the tokens of the responses.
        """
        width = math.ceil(max(len(example.input_ids) for example in examples) / 8) * 8
        input_ids = torch.full((len(examples), width), self.pad_token_id)
        attention_mask = torch.zeros(len(examples), width, dtype=torch.int64)
        labels = torch.full((len(examples), width), data.IGNORED)
        for row, example in enumerate(examples):
            length = len(example.input_ids)
            input_ids[row, :length] = torch.tensor(example.input_ids)
            attention_mask[row, :length] = 1
            labels[row, :length] = torch.tensor(example.labels)
        numbers = [example.number for example in examples]
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, "examples": numbers}
        if self.response_mask:
            place = torch.arange(width)
            prompts = torch.tensor([[example.prompt_tokens] for example in examples])
            batch["response_mask"] = (place >= prompts) & attention_mask.bool()
        return batch
