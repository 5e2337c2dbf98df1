"""What TRL, PEFT, Transformers and Megatron-LM call our fields, for hints at unknown names."""

from collections.abc import Mapping
from types import MappingProxyType

_BATCH = "the rows of data.row_tokens are the micro-batches"

OTHER_NAMES: Mapping[str, str] = MappingProxyType(
    {
        # Length and batches
        "batch_size": f"set training.global_batch_pairs (all processes); {_BATCH}",
        "train_batch_size": f"set training.global_batch_pairs; {_BATCH}",
        "global_batch_size": f"set training.global_batch_pairs; {_BATCH}",
        "per_device_train_batch_size": f"set training.global_batch_pairs (all processes); {_BATCH}",
        "per_device_eval_batch_size": f"leave it out; {_BATCH}",
        "micro_batch_size": f"leave it out; {_BATCH}",
        "gradient_accumulation_steps": f"set training.global_batch_pairs, their product; {_BATCH}",
        "num_train_epochs": "set training.epochs",
        "num_epochs": "set training.epochs",
        "output_dir": "set training.output",
        "max_prompt_length": "set data.max_length: tokens of prompt and answer together",
        "max_completion_length": "set data.max_length: tokens of prompt and answer together",
        "max_seq_length": "set data.max_length",
        "seq_length": "set data.max_length (of a pair) and data.row_tokens (of a micro-batch)",
        "padding_free": "leave it out; pairs are always packed into rows of data.row_tokens",
        "packing": "leave it out; pairs are always packed into rows of data.row_tokens",
        "truncation_mode": "set data.truncation",
        # Optimizer
        "learning_rate": "set optimizer.lr",
        "lr_scheduler_type": "set optimizer.schedule",
        "lr_decay_style": "set optimizer.schedule",
        "warmup_ratio": "set optimizer.warmup_fraction",
        "adam_beta1": "set optimizer.beta1",
        "adam_beta2": "set optimizer.beta2",
        "adam_epsilon": "set optimizer.eps",
        "adam_eps": "set optimizer.eps",
        "max_grad_norm": "set optimizer.clip_grad",
        "optim": "leave it out; the optimizer is AdamW",
        # Objective
        "loss_type": "set objective.loss",
        "f_divergence_type": "set objective.f_divergence",
        "f_alpha_divergence_coef": "set objective.f_alpha",
        "use_weighting": "set objective.wpo",
        "rpo_alpha": "set objective.nll_weight",
        "ld_alpha": "leave it out; LD-DPO is not supported (docs/losses.md)",
        "reference_free": "set reference.source to none",
        "precompute_ref_log_probs": "leave it out; reference.source: cache, the default, does that",
        "sync_ref_model": "leave it out; the section sdpo changes the reference between steps",
        "ref_model": "leave it out; the reference is model.path, without lora.adapter",
        # LoRA
        "r": "set lora.rank",
        "lora_r": "set lora.rank",
        "lora_alpha": "set lora.alpha",
        "lora_dropout": "set lora.dropout",
        "target_modules": "set lora.targets",
        "lora_target_modules": "set lora.targets",
        "peft_config": "add the section lora",
        "use_peft": "add the section lora",
        "adapter_name_or_path": "set lora.adapter",
        # Model and data
        "model_name_or_path": "set model.path",
        "tokenizer_name_or_path": "set model.tokenizer",
        "torch_dtype": "set model.dtype",
        "bf16": "set model.dtype to bf16, the default",
        "fp16": "set model.dtype",
        "dataset_name": "set data.train to the name",
        "dataset": "set data.train",
        "train_file": "set data.train",
        "eval_dataset": "set data.eval",
        "dataset_config": "set data.train to {path, subset}",
        "dataset_num_proc": "set data.num_workers",
        # Memory and layout
        "gradient_checkpointing": "set training.recompute to full",
        "recompute_granularity": "set training.recompute",
        "tensor_model_parallel_size": "set layout.tensor",
        "pipeline_model_parallel_size": "set layout.pipeline",
        "context_parallel_size": "set layout.context",
        "deepspeed": "leave it out; optimizer.distributed and the section layout shard the model",
        "fsdp": "leave it out; optimizer.distributed and the section layout shard the model",
        # Saving and logging
        "logging_steps": "set logging.every_steps",
        "eval_steps": "set training.eval_every_steps",
        "eval_strategy": "set training.eval_every_steps",
        "save_steps": "set checkpoint.every_steps",
        "save_strategy": "set checkpoint.every_steps",
        "save_total_limit": "set checkpoint.keep_last",
        "load_best_model_at_end": "set checkpoint.keep_best",
        "metric_for_best_model": "set checkpoint.best_metric",
        "resume_from_checkpoint": "leave it out; checkpoint.resume: auto, the default, resumes",
        "report_to": "set logging.tensorboard, or add logging.wandb",
        "run_name": "set logging.wandb.name",
    }
)
"""A remedy by the name that was written. Names that are also ours are not here."""
