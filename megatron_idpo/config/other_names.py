"""What other programs call our fields and values, for hints at names that are not ours.

From TRL, PEFT, Transformers, Axolotl, LLaMA-Factory, NeMo and Megatron-LM. A hint must not lead to
another training than the name meant where it was written; what has no equivalent says so.
"""

from collections.abc import Mapping
from types import MappingProxyType

from megatron_idpo.config.other_values import OTHER_VALUES

_ROWS = "the rows of data.row_tokens are the micro-batches"
_PACKED = "leave it out; pairs are always packed into rows of data.row_tokens"
_REFERENCE = "leave it out; the reference is model.path, without lora.adapter"
_PROCESSES = "leave it out; --processes or torchrun starts the processes"
_SHARDED = "leave it out; optimizer.distributed and the section layout shard the model"
_KERNELS = "leave it out; attention and fused kernels follow from the device and the model"
_FROM_MODEL = "leave it out; it is read from the model's config.json"
_ADAMW = "leave it out; the optimizer is AdamW"
_UNSUPPORTED = "leave it out; it is not supported and changes the training"
_UNUSED = "leave it out; it has no equivalent"
_OTHER_ADAPTERS = "leave it out; only plain LoRA, with lora.rslora, is supported"
_NO_MARGIN = "leave it out; SimPO and its target margin are not supported"
_REPLACES_EPOCHS = "set training.max_steps; training.epochs also ends the run"

_NAMES: Mapping[str, str] = {
    # Batches and length
    f"set training.global_batch_pairs (all processes); {_ROWS}": """batch_size train_batch_size
        global_batch_size train_global_batch_size per_device_train_batch_size global_batch gbs
        per_gpu_train_batch_size batch_pairs pairs_per_step""",
    f"set training.global_batch_pairs, their product; {_ROWS}": """gradient_accumulation_steps
        gradient_accumulation accumulate_grad_batches""",
    f"leave it out; {_ROWS}": """micro_batch_size per_device_eval_batch_size eval_batch_size mbs
        train_micro_batch_size val_micro_batch_size val_global_batch_size logprob_batch_size
        precompute_ref_batch_size auto_find_batch_size rampup_batch_size""",
    "set training.epochs": "num_train_epochs num_epochs max_epochs max_num_epochs train_epochs",
    _REPLACES_EPOCHS: """train_iters max_num_steps num_train_steps num_steps total_steps max_iters
        num_iters steps""",
    "set training.output": """output_dir output_path save_dir save run_dir results_dir
        explicit_log_dir checkpoint_dir exp_dir""",
    "leave it out; a run resumes its own output, another one needs a new training.output": """
        overwrite_output_dir""",
    "set data.max_length: tokens of prompt and answer together": """max_prompt_length
        max_completion_length max_target_length max_source_length""",
    "set data.max_length": """max_seq_length max_seq_len max_len cutoff_len sequence_len seq_len
        model_max_length encoder_seq_length max_total_sequence_length max_input_seq_length""",
    "set data.max_length (of a pair) and data.row_tokens (of a micro-batch)": "seq_length",
    _PACKED: """padding_free packing sample_packing eval_sample_packing pad_to_sequence_len
        neat_packing sequence_packing dynamic_batching group_by_length pad_to_multiple_of pad_token
        padding_value label_pad_token_id train_sampling_strategy""",
    "set data.truncation": "truncation_mode truncation_side",
    # Optimizer
    "set optimizer.lr": "learning_rate max_lr base_lr",
    "set optimizer.schedule": """lr_scheduler_type lr_scheduler lr_decay_style scheduler
        lr_schedule""",
    "set optimizer.min_lr, a learning rate": "cosine_min_lr_ratio min_lr_ratio min_lr_rate lr_end",
    "leave it out; the schedule ends with the run, at optimizer.min_lr": """lr_decay_iters
        lr_decay_steps lr_scheduler_kwargs""",
    "set optimizer.warmup_fraction": "warmup_ratio lr_warmup_fraction warmup_proportion",
    "set optimizer.warmup_steps": "lr_warmup_iters lr_warmup_steps num_warmup_steps warmup_iters",
    "set optimizer.warmup_fraction, or optimizer.warmup_steps": "warmup lr_warmup",
    "set optimizer.beta1": "adam_beta1",
    "set optimizer.beta2": "adam_beta2",
    "set optimizer.beta1 and optimizer.beta2": "betas adam_betas",
    "set optimizer.eps": "adam_epsilon adam_eps epsilon",
    "set optimizer.clip_grad": """max_grad_norm gradient_clip_val clip_grad_norm gradient_clipping
        grad_clip grad_norm_clip""",
    "set optimizer.distributed": "use_distributed_optimizer",
    _ADAMW: "optim optim_args optim_target_modules optimizer.name optimizer.type optimizer.kwargs",
    # Objective
    "set objective.loss": "loss_type preference_loss pref_loss",
    "set objective.loss; DPO is sigmoid, and kto, orpo, simpo and grpo are not supported": """
        rl rlhf_type stage""",
    "set objective.beta": """pref_beta rl_beta dpo_beta reference_policy_kl_penalty
        ref_policy_kl_penalty""",
    "set objective.beta, which is τ in IPO; that of discopop is discopop_tau": "objective.tau",
    "set objective.loss_weights to a list": "preference_loss_weight",
    "set objective.label_smoothing": "dpo_label_smoothing",
    "leave it out; objective.label_smoothing is that of DPO": "label_smoothing_factor",
    "set objective.layers": """tap_layers intermediate_layers layer_ids exit_layers
        objective.taps""",
    "set objective.f_divergence": "f_divergence_type",
    "set objective.f_alpha": "f_alpha_divergence_coef",
    "set objective.wpo": "use_weighting dpo_use_weighting",
    "set objective.router_aux_loss, a coefficient per pair and layer (docs/training.md)": """
        router_aux_loss_coef moe_aux_loss_coeff""",
    "set objective.nll_weight, a mean over each answer's tokens; for one over all chosen tokens "
    "add sft to objective.loss": "rpo_alpha",
    "set objective.nll_weight, a mean over each answer's tokens": "pref_ftx",
    "set objective.nll_weight, a mean over each answer's tokens (sft_average_log_probs: true)": """
        sft_loss_weight""",
    "leave it out; objective.nll_weight is a mean over tokens": "sft_average_log_probs",
    "leave it out; with objective.loss: sigmoid_norm log-probabilities are means over tokens": """
        preference_average_log_probs dpo_norm_loss""",
    "leave it out; LD-DPO is not supported (docs/losses.md)": "ld_alpha",
    _NO_MARGIN: "simpo_gamma gamma_beta_ratio simpo_gamma_beta_ratio cpo_alpha objective.gamma",
    "leave it out; this method is not supported": """orpo_alpha kto_chosen_weight
        kto_rejected_weight kto_desirable_weight kto_undesirable_weight desirable_weight
        undesirable_weight gt_reward_scale""",
    "add bco_pair (no reward shift) to objective.loss, and set objective.loss_weights": """
        pref_bco_weight""",
    "set reference.source to none if it is true, otherwise leave it out": "reference_free",
    "leave it out; reference.source: cache, the default, does that": "precompute_ref_log_probs",
    "leave it out; the section sdpo changes the reference between steps": """sync_ref_model
        ref_model_mixup_alpha ref_model_sync_steps""",
    _REFERENCE: """ref_model ref_model_path reference_model reference_model_path
        ref_model_name_or_path ref_model_init_kwargs ref_model_adapters ref_adapter_name
        ref_model_quantization_bit reference.model reference.path reference.adapter
        force_use_ref_model model_adapter_name""",
    "leave it out; only lora.dropout is applied": """disable_dropout attention_dropout
        hidden_dropout""",
    # LoRA
    "set lora.rank": "r lora_r lora_rank lora_dim adapter_dim lora.dim",
    "set lora.alpha": "lora_alpha",
    "set lora.dropout": "lora_dropout adapter_dropout",
    "set lora.targets": "target_modules lora_target_modules lora_target",
    "set lora.targets to all-linear, the default, if it is true": """lora_target_linear
        match_all_linear""",
    "set lora.target_parameters": "lora_target_parameters",
    "set lora.rslora": "use_rslora peft_use_rslora use_rank_stabilized",
    "add the section lora": "peft_config lora_config lora_cfg peft",
    "add the section lora if it is true, otherwise leave it out": "use_peft use_lora",
    "add the section lora, or leave it out to train all weights": """finetuning_type train_type
        tuner_type peft_type peft_scheme""",
    "set lora.adapter to an adapter to start from; for new ones add the section lora": "adapter",
    "set lora.adapter": "adapter_name_or_path lora_model_dir adapter_path resume_lora_training",
    _OTHER_ADAPTERS: """use_dora peft_use_dora dora init_lora_weights peft_init_lora_weights
        pissa_init loftq_config use_qalora rank_pattern alpha_pattern layers_to_transform
        layers_pattern exclude_modules lora_bias lora_plus loraplus_lr_ratio layer_replication
        trainable_token_indices fan_in_fan_out dropout_position""",
    "leave it out; modules other than lora.targets are not trained with adapters": """
        modules_to_save lora_modules_to_save additional_target""",
    "leave it out; biases are not trained with adapters": "bias",
    "leave it out; the task is causal language modeling": """task_type lora_task_type
        inference_mode model_class""",
    # Model and data
    "set model.path": """model_name_or_path base_model model_name model_path model_id hf_model
        base_model_name_or_path pretrained_model_name_or_path pretrained_checkpoint load
        restore_from_path hf_model_id init_model model.name model.id""",
    "set model.tokenizer": """tokenizer_name_or_path tokenizer_name tokenizer_path tokenizer_model
        tokenizer_config tokenizer processing_class""",
    "set model.dtype": "torch_dtype precision params_dtype compute_dtype",
    "set model.dtype to bf16, the default, or fp32": "bf16 pure_bf16",
    "leave it out; training in fp16 is refused, so set model.dtype to bf16 or fp32": "fp16",
    "leave it out; download the revision, and set model.path to it": "model_revision revision",
    "leave it out; a repository's own code is never run": "trust_remote_code",
    "leave it out; weights are not quantized in training": """load_in_4bit load_in_8bit
        quantization_config quantization_bit quantization_method bnb_4bit_quant_type
        bnb_4bit_compute_dtype bnb_4bit_use_double_quant use_bnb_nested_quant bnb_config fp8
        fp8_cfg""",
    _FROM_MODEL: """model_type tokenizer_type num_layers hidden_size num_attention_heads
        ffn_hidden_size vocab_size max_position_embeddings rope_scaling rotary_base rope_theta
        norm_epsilon base_model_config model_init_kwargs""",
    "set data.train to the name": "dataset_name",
    "set data.train": """dataset train_file train_files train_data train_dataset train_path
        data_path dataset_path train_data_path dataset_id""",
    "set data.train to paths, or a list of {path, weight, split, subset}": """datasets dataset_dir
        dataset_mixer interleave_probs mix_strategy data_files dataset_sizes""",
    "set data.eval": """eval_dataset test_datasets eval_file validation_file test_file eval_data
        valid_file val_dataset valid_data_path validation data.valid data.test""",
    "set data.train to {path, split}": "train_split dataset_train_split dataset_split",
    "set data.train to {path, split}, or data.eval_fraction for a share": "split",
    "set data.eval to {path, split}": "eval_split test_split dataset_test_split validation_split",
    "set data.train and data.eval to {path, split}": "dataset_splits",
    "set data.train to {path, subset}": """dataset_config dataset_config_name dataset_subset
        subset""",
    "set data.eval_fraction (a share) or data.eval_pairs (a number)": """val_size val_set_size
        test_size validation_split_percentage""",
    "leave it out; a source's weight below 1 takes a part of its pairs": """max_samples
        max_train_samples num_samples""",
    "leave it out; pairs are tokenized once and kept in data.cache": """streaming
        preprocess_dataset data.lazy""",
    "set data.cache": "dataset_prepared_path tokenized_path",
    "leave it out; an incomplete batch is carried into the next epoch, the last one dropped": """
        dataloader_drop_last""",
    "leave it out; pairs are always shuffled, by data.seed": """shuffle disable_shuffling
        shuffle_merged_datasets""",
    "set data.seed": "data_seed shuffle_seed",
    "set data.num_workers": """dataset_num_proc preprocessing_num_workers dataset_processes
        num_proc""",
    "set data.columns": """prompt_key chosen_key rejected_key prompt_column chosen_column
        rejected_column column_mapping field_chosen field_rejected""",
    "leave it out; the tokenizer's chat template is used, or set data.chat_template": """template
        prompt_template chat_template_path conversation""",
    "leave it out; the tokenizer's own are used": "special_tokens tokens add_special_tokens",
    "leave it out; only answers are trained": """train_on_inputs train_on_prompt mask_prompt
        mask_history""",
    # Memory and layout
    "set training.recompute to full or off": "gradient_checkpointing activation_checkpointing",
    "set training.recompute": """recompute_granularity activations_checkpoint_granularity
        recompute_activations recompute_method activations_checkpoint_method""",
    "set training.recompute_layers": "recompute_num_layers activations_checkpoint_num_layers",
    "set training.offload_activations": "activation_offloading cpu_offloading",
    "set layout.tensor": """tensor_model_parallel_size tensor_parallel_size tensor_parallel tp
        tp_size tensor_model_parallel""",
    "set layout.pipeline": """pipeline_model_parallel_size pipeline_parallel_size pipeline_parallel
        pp pp_size pipeline_model_parallel""",
    "set layout.virtual_pipeline, the chunks of a stage": """vpp vpp_size vp virtual_stages
        virtual_pipeline_model_parallel_size num_layers_per_virtual_pipeline_stage""",
    "set layout.pipeline_layers": """num_layers_in_first_pipeline_stage pipeline_split
        num_layers_in_last_pipeline_stage decoder_first_pipeline_num_layers
        decoder_last_pipeline_num_layers""",
    "set layout.context": "context_parallel_size context_parallel cp cp_size ring_attention",
    "set layout.context, which splits sequences": """sequence_parallel_size ulysses_size
        sequence_parallel_degree""",
    "set layout.sequence_parallel": "sp",
    "set layout.expert": "expert_model_parallel_size expert_parallel_size expert_parallel ep",
    "set layout.expert_tensor": "expert_tensor_parallel_size expert_tensor_parallel etp",
    "leave it out; data parallelism is what is left of the processes": """dp dp_size data_parallel
        data_parallel_size dp_shard_size dp_replicate_size layout.data""",
    _PROCESSES: """num_processes nproc_per_node num_nodes nnodes gpus gpus_per_node devices
        world_size local_rank num_gpus cluster accelerator accelerator_config""",
    _SHARDED: """deepspeed fsdp fsdp_config fsdp_version zero_stage deepspeed_config dtensor_cfg
        parallelism_config""",
    _KERNELS: """attn_implementation flash_attention flash_attn use_flash_attention_2
        xformers_attention sdp_attention eager_attention attention_backend use_flash_attn
        use_liger_kernel use_liger_loss enable_liger_kernel liger_kernel_config""",
    "set training.deterministic": "full_determinism deterministic_mode",
    "set training.timeout_s": "ddp_timeout distributed_timeout_minutes",
    # Saving and logging
    "set logging.every_steps": """logging_steps log_interval log_every_n_steps log_every
        logging_strategy""",
    "set training.eval_every_steps": """eval_steps eval_strategy evaluation_strategy eval_interval
        evals_per_epoch val_check_interval val_period eval_every""",
    "leave it out; all held-out pairs are evaluated": "eval_iters limit_val_batches val_batches",
    "leave it out; the verbs generate and judge compare answers": "generate_during_eval",
    "leave it out; held-out pairs are evaluated before and after training": """eval_on_start
        do_eval val_at_start val_at_end""",
    "set checkpoint.every_steps": """save_steps save_strategy save_interval saves_per_epoch
        save_period every_n_train_steps save_every""",
    "set checkpoint.keep_last": "save_total_limit keep_last_n max_to_keep",
    "set checkpoint.keep_best": "load_best_model_at_end keep_top_k save_top_k",
    "set checkpoint.best_metric": "metric_for_best_model monitor metric_name",
    "leave it out; checkpoint.resume: auto, the default, resumes": """resume_from_checkpoint
        auto_resume_from_checkpoints resume_if_exists resume_from resume_training""",
    "leave it out; training ends with training.epochs or training.max_steps": """
        early_stopping_patience early_stopping""",
    "set logging.tensorboard, or add logging.wandb": "report_to logger create_tensorboard_logger",
    "set logging.tensorboard": "tensorboard_dir logging_dir use_tensorboard tensorboard_enabled",
    "set logging.wandb to {project: NAME}": """wandb_project use_wandb wandb wandb_enabled
        create_wandb_logger""",
    "set logging.wandb.name": "run_name wandb_name wandb_run_name wandb_exp_name",
    "set logging.wandb.entity": "wandb_entity",
    "set logging.wandb.mode": "wandb_mode",
    "leave it out; other loggers are a `Callback` in Python (docs/api.md)": """use_swanlab
        swanlab_project use_mlflow mlflow_tracking_uri use_comet comet_project_name trackio_space_id
        swanlab_enabled mlflow_enabled""",
    "leave it out; OUTPUT/curves.png is always written": "plot_loss",
    "set export.push_to_hub to organization/name": "hub_model_id hub_repo_id repo_id hub_repo",
    "set export.private": "hub_private_repo",
    "leave it out; `hf auth login` stores the token": "hub_token hf_token use_auth_token",
    "set export.base_model": "base_model_name hub_base_model",
    # Sections of other programs
    "write its fields in the section objective": "dpo dpo_config trl pref preference",
    "write its fields in the sections model, layout and optimizer": "policy megatron_cfg",
    "write its fields in the section training": "trainer training_args train_args trainer_args",
    "write its fields in the section checkpoint": "checkpointing",
    "write training.output, and the sections checkpoint and logging": "exp_manager",
    "set data.eval, and for the comparison of models the section evaluate": "eval",
    # Where a name of the lists above means something else
    "set generate.batch_prompts": "generate.batch_size",
    f"leave it out; {_ROWS}, here too": "evaluate.batch_size",
    "set generate.max_new_tokens": "generate.max_tokens generate.max_length generate.max_len",
    "set generate.temperature to 0 for greedy decoding": "generate.do_sample generate.greedy",
    "leave it out; generate.temperature and generate.top_p decide": "generate.top_k",
    "set evaluate.models to {name: {path, adapter}}": "evaluate.adapter evaluate.path",
    "set judge.base_url": "judge.url judge.endpoint judge.api_base judge.host",
    "set judge.key_variable, the environment variable with the key": "judge.api_key judge.key",
    "set judge.max_parallel": "judge.concurrency judge.num_workers judge.batch_size",
    "leave it out; the judge answers at temperature 0": "judge.temperature",
    "set sdpo.steps to a list with one mapping per step": """sdpo.num_steps sdpo.n_steps
        sdpo.datasets sdpo.num_datasets""",
    "set lr": "sdpostep.learning_rate",
    "set epochs": "sdpostep.num_train_epochs sdpostep.num_epochs",
    "set warmup_steps": "sdpostep.warmup_ratio sdpostep.warmup_fraction sdpostep.warmup",
    "name sources by their number in data.train, from 1": "sdpostep.data sdpostep.dataset",
    "leave it out; the format is recognized, or set format": "source.type source.ds_type",
    "set subset": "source.name source.config",
    "set path": "source.data_path source.dataset_name source.dataset source.file",
    # Without equivalent
    _UNSUPPORTED: """neftune_noise_alpha use_galore use_apollo use_badam embedding_lr lr_groups
        freeze_trainable_layers unfrozen_parameters freeze_layers lr_quadratic_warmup""",
    _UNUSED: """dataloader_num_workers dataloader_pin_memory
        dataloader_prefetch_factor dataloader_persistent_workers remove_unused_columns
        logging_first_step log_level disable_tqdm tf32 torch_compile ddp_find_unused_parameters
        gradient_checkpointing_kwargs activation_checkpointing_kwargs use_cache device_map
        low_cpu_mem_usage save_safetensors save_only_model async_save overlap_grad_reduce
        overlap_param_gather overwrite_cache hub_strategy hub_always_push greater_is_better
        eval_accumulation_steps optimizer.fused optimizer.foreach strict
        torch_empty_cache_steps do_train wandb_watch wandb_log_model
        wandb_run_id""",
}

OTHER_NAMES: Mapping[str, str] = MappingProxyType(
    {name: hint for hint, names in _NAMES.items() for name in names.split()}
)
"""A remedy by the name that was written, or by `section.name` where its place decides. Of the names
that are ours in one section, those are here that mean something else in the others."""


def other_name(section: str, name: str) -> str | None:
    """The remedy for a field or section of another program.

    Args:
        section: the section in which it was written, or a class within one, as `source`; "" is
            the top level.
        name: as it was written.
    """
    return OTHER_NAMES.get(f"{section}.{name}") or OTHER_NAMES.get(name)


def other_value(section: str, field: str, value: object) -> str | None:
    """The remedy for a value that another program has where `section.field` does not take it.

    Args:
        section: as for `other_name`.
        field: a field of it; "" if the section itself is not a mapping.
        value: as it was read; of a list the first element with a remedy counts.
    """
    known = OTHER_VALUES.get(f"{section}.{field}" if field else section, {})
    values = value if isinstance(value, list | tuple) else [value]
    for one in values:
        # True is not 1 here, and neither is 0.0 the count 0.
        text = str(one).lower()
        if (hint := known.get(text) or known.get(f"<{type(one).__name__}>")) is not None:
            return hint.replace("VALUE", str(one))
    return None
