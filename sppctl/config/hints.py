"""Names that other programs use for keys of the configuration, for errors about unknown keys.

They are those of transformers' TrainingArguments, PEFT's LoraConfig, TRL, axolotl, lm-eval and the pruning scripts of
Wanda and SparseGPT.
"""

ACCUMULATION = "accumulation is derived: train.batch_size / (train.micro_batch_size x processes)"
RATIO = "a ratio of zeros is a prune.pattern: prune.pattern=0.5"

# a key, or advice where no single key has the same meaning
HINTS = {
    "r": "train.rank",
    "lora_r": "train.rank",
    "lora_rank": "train.rank",
    "lora_alpha": "train.scale is lora_alpha / r",
    "lora_dropout": "train.dropout",
    "peft_type": "train.method",
    "target_modules": "train.targets",
    "lora_target_modules": "train.targets",
    "learning_rate": "train.lr",
    "lr_scheduler_type": "train.scheduler",
    "lr_scheduler": "train.scheduler",
    "lr_scheduler_kwargs": "train.scheduler_kwargs",
    "optim": "train.optimizer",
    "early_stopping_patience": "train.patience",
    "load_best_model_at_end": "train.keep_best: eval_loss or perplexity has this meaning",
    "metric_for_best_model": "train.keep_best: eval_loss or perplexity has this meaning",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "gradient_accumulation_steps": ACCUMULATION,
    "per_device_train_batch_size": "train.micro_batch_size",
    "per_device_eval_batch_size": "eval.batch_size",
    "max_seq_length": "train.data.seq_len",
    "max_length": "train.data.seq_len",
    "sequence_len": "train.data.seq_len",
    "cutoff_len": "train.data.seq_len",
    "val_set_size": "train.data.val_size",
    "sample_packing": "train.data.packing",
    "dataset_name": "train.data.dataset",
    "datasets": "train.data.dataset",
    "dataset_text_field": "train.data.columns={text: COLUMN} has this meaning",
    "logging_steps": "train.log_steps",
    "save_total_limit": "train.keep_checkpoints",
    "output_dir": "run.dir",
    "model_name_or_path": "model.path",
    "pretrained_model_name_or_path": "model.path",
    "base_model": "model.path",
    "torch_dtype": "model.dtype",
    "bf16": "model.compute_dtype: bfloat16 has this meaning",
    "fp16": "model.compute_dtype: bfloat16 has this meaning; training in float16 is not supported",
    "fsdp": "launch.strategy: fsdp has this meaning",
    "deepspeed": "launch.strategy: zero3 has this meaning",
    "sparsity": RATIO,
    "sparsity_ratio": RATIO,
    "sparsity_type": "prune.pattern",
    "prune_method": "prune.method",
    "nsamples": "prune.calibration.samples",
    "num_calibration_samples": "prune.calibration.samples",
    "percdamp": "prune.damp",
    "blocksize": "prune.block_size",
    "actorder": "prune.act_order",
    "desc_act": "prune.act_order",
}
