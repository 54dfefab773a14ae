"""Names that other trainers give to settings, for hints: what is written here instead.

From the HF Trainer and TRL, LLaMA-Factory, axolotl, ms-swift, Megatron-LM, llm-recipes, llm-foundry, torchtitan and Accelerate.
Such a name is refused with this hint, or with none: never with a setting of another meaning that only looks like it.
"""

SAME_MEANING: dict[str, str] = {
    "model_name": (
        "model_name_or_path base_model pretrained_model_name_or_path pretrained model model_path base_model_path"
    ),
    "model_config": "config_name base_model_config",
    "tokenizer_name": "tokenizer_name_or_path tokenizer_path tokenizer_model tokenizer_config tokenizer",
    "added_tokens": "additional_special_tokens add_special_tokens new_special_tokens",
    "added_plain_tokens": "add_tokens new_tokens",
    "pad_vocabulary_to": "make_vocab_size_divisible_by",
    "train_data": (
        "train_data_path train_file train_files data_path data_paths data_file data_files datasets "
        "dataset_path train_dataset train_path training_data"
    ),
    "validation_data": (
        "val_data_path valid_data_path validation_file validation_files eval_file eval_dataset val_data "
        "valid_data test_datasets eval_data_path val_path validation_data_path eval_data"
    ),
    "validation_split": "val_size val_set_size test_split_ratio split_dataset_ratio",
    "context_size": (
        "seq_length seq_len sequence_length sequence_len max_seq_length max_seq_len cutoff_len max_length "
        "block_size model_max_length context_length"
    ),
    "packing": "sample_packing pack neat_packing",
    "data_cache": "dataset_prepared_path data_cache_path cache_dataset_dir tokenized_path",
    "num_workers_tokenise": "preprocessing_num_workers dataset_num_proc dataset_processes num_proc",
    "num_workers_dataloader": "dataloader_num_workers num_workers",
    "batch_size_training": (
        "per_device_train_batch_size micro_batch_size train_micro_batch_size_per_gpu "
        "device_train_microbatch_size per_gpu_train_batch_size local_batch_size batch_size_per_device"
    ),
    "global_batch_size": "global_train_batch_size total_batch_size",
    "gradient_accumulation_steps": (
        "grad_accumulation_steps gradient_accumulation accumulate_grad_batches grad_accum_steps "
        "gradient_accumulation_iters"
    ),
    "num_epochs": "num_train_epochs epochs max_epochs train_epochs",
    "max_steps": (
        "train_iters max_train_steps train_steps total_steps num_train_steps max_iters iterations training_steps"
    ),
    "max_tokens": "train_tokens max_train_tokens total_tokens",
    "activation_checkpointing": (
        "gradient_checkpointing recompute_activations checkpoint_activations use_gradient_checkpointing "
        "enable_gradient_checkpointing fsdp_use_activation_checkpointing"
    ),
    "deterministic": "full_determinism deterministic_mode use_deterministic_algorithms",
    "optimizer_type": "optim optimizer optimizer_name",
    "lr": "learning_rate max_lr peak_lr base_lr",
    "lr_min": "min_lr lr_end minimum_lr min_learning_rate final_lr lr_decay_min",
    "lr_warmup": (
        "warmup_ratio warmup_steps num_warmup_steps lr_warmup_iters lr_warmup_steps lr_warmup_fraction "
        "warmup_iters warmup_fraction lr_warmup_ratio warmup"
    ),
    "lr_decay": "lr_decay_iters lr_decay_steps lr_decay_ratio",
    "lr_decay_style": "lr_scheduler_type lr_scheduler scheduler lr_schedule scheduler_type",
    "adam_eps": "adam_epsilon epsilon eps optimizer_eps",
    "adam_beta1": "beta1 adam_b1",
    "adam_beta2": "beta2 adam_b2",
    "sgd_momentum": "momentum",
    "max_grad_norm": "clip_grad grad_clip_norm gradient_clipping grad_clip gradient_clip_val clip_grad_norm max_norm gradient_clip",
    "weight_decay": "wd",
    "save_checkpoint_path": "output_dir save save_dir save_folder save_path out_dir output_path output_folder save_model_dir",
    "load_checkpoint_path": "load load_path load_dir checkpoint_load_path",
    "save_interval_iteration": "save_steps save_interval save_every save_freq checkpoint_interval save_iters checkpoint_every",
    "keep_last": "save_total_limit keep_last_n_checkpoints max_checkpoints save_num_checkpoints_to_keep keep_latest_k",
    "resume": "resume_from_checkpoint resume_from resume_checkpoint",
    "async_save": "async_checkpoint use_async_save async_checkpointing",
    "run_validation": "do_eval do_validation evaluate",
    "eval_interval": "eval_steps eval_every eval_freq val_interval validation_interval val_check_interval",
    "log_interval": "logging_steps log_steps log_every log_every_n_steps logging_interval log_freq",
    "wandb_name": "run_name wandb_run_name wandb_exp_name exp_name experiment_name wandb_run",
    "wandb_project": "project project_name wandb_project_name logging_project",
    "wandb_entity": "entity wandb_team",
    "tensorboard": "use_tensorboard",
    "attn_implementation": "attn_impl attention_implementation attention",
    "chat_template": "chat_template_path chat_template_jinja jinja_template",
    "text_fields": "text_column dataset_text_field text_field json_keys text_key text_column_name",
    "seed": "random_seed data_seed global_seed",
    "ds_config": "deepspeed_config_file ds_config_path deepspeed_json",
    "trust_remote_code": "trust_remote allow_remote_code",
}
"""A setting here: its names elsewhere, where the values mean the same."""

BF16, FP16 = "write --precision bf16", "write --precision fp16"
SHARDED = "there is no tensor, pipeline or sequence parallelism here: ZeRO and FSDP2 shard the model over all ranks. Leave it out"
ONE_COURSE = "evaluation and saving follow eval_interval and save_interval_iteration; leave it out"

STAGE = "the stage in the DeepSpeed JSON (--ds_config) holds for FSDP2 too: 3 is full sharding"
BATCH = "write --batch_size_training (rows a rank a micro-step) or --global_batch_size (rows an optimizer step)"
CONTINUED = "a run folder with checkpoints is continued by itself; leave it out"
TENSORBOARD = "write --tensorboard; the files go into the run folder"
FLASH = "write --attn_implementation flash_attention_2, or --use_fast_kernels"
HINTS: dict[str, str] = {
    "bf16": BF16,
    "use_bf16": BF16,
    "fp16": FP16,
    "use_fp16": FP16,
    "fp32": "write --precision fp32",
    "torch_dtype": "write --precision bf16, fp32 or fp16",
    "dtype": "write --precision bf16, fp32 or fp16",
    "train_batch_size": BATCH,
    "dataset_name": "write --train_data hub:owner/name",
    "validation_split_percentage": "write --validation_split, a fraction such as 0.05",
    "recompute_granularity": "write --activation_checkpointing",
    "world_size": "the launcher says how many ranks there are; --expected_world_size refuses any other number",
    "num_processes": "the launcher says how many ranks there are; --expected_world_size refuses any other number",
    "auto_resume": CONTINUED,
    "autoresume": CONTINUED,
    "auto_resume_from_checkpoints": CONTINUED,
    "exit_duration_in_mins": "write --stop_after, such as 700m",
    "tensorboard_dir": TENSORBOARD,
    "tensorboard_path": TENSORBOARD,
    "logging_dir": TENSORBOARD,
    "flash_attn": FLASH,
    "use_flash_attn": FLASH,
    "flash_attention": FLASH,
    "use_flash_attention_2": FLASH,
    "template": "the tokenizer's own template is used; another one is a Jinja file: write --chat_template FILE",
    "per_device_eval_batch_size": "evaluation takes batch_size_training rows; leave it out",
    "per_device_batch_size": "write --batch_size_training, rows a rank a micro-step",
    "batch_size": BATCH,
    "eval_batch_size": "evaluation takes batch_size_training rows; leave it out",
    "train_samples": "write --max_steps or --max_tokens",
    "max_train_samples": "write --max_steps or --max_tokens",
    "eval_iters": "all of the validation data is evaluated each time; leave it out",
    "eval_accumulation_steps": "evaluation keeps nothing that would have to be accumulated; leave it out",
    "eval_strategy": ONE_COURSE,
    "evaluation_strategy": ONE_COURSE,
    "save_strategy": ONE_COURSE,
    "logging_strategy": "write --log_interval",
    "load_best_model_at_end": "write --keep_best, and export the checkpoint that it kept",
    "overwrite_output_dir": "a run folder is never overwritten: name a new one with --save_checkpoint_path",
    "overwrite_cache": "tokens are made again whenever what they are made of differs; leave it out",
    "do_train": "train.py always trains; leave it out",
    "report_to": "write --wandb_project NAME or --tensorboard; metrics.jsonl is always written",
    "wandb_watch": "it has no counterpart; leave it out",
    "push_to_hub": "export with tools/convert_to_hf.py, then tools/upload_to_hub.py",
    "hub_model_id": "export with tools/convert_to_hf.py, then tools/upload_to_hub.py --repo",
    "save_only_model": "write --save_optimizer false",
    "no_save_optim": "write --save_optimizer false",
    "no_load_optim": "write --allow_change optimizer",
    "finetune": "name the model's folder with --model_name, or another run with --load_checkpoint_path and --allow_change",
    "ignore_data_skip": "a resumed run always goes on at the row where it stopped; leave it out",
    "train_on_inputs": "a format says what is learned: prompts never are, except in --dataset text",
    "train_on_prompt": "a format says what is learned: prompts never are, except in --dataset text",
    "mask_history": "write --chat_targets last",
    "assistant_only_loss": "--dataset chat learns what the assistant says and nothing else; leave it out",
    "completion_only_loss": "--dataset completion learns the completion and nothing else; leave it out",
    "stage": "the kind of data is --dataset; the ZeRO stage stands in the DeepSpeed JSON (--ds_config)",
    "zero_stage": 'write "zero_optimization": {"stage": 3} in the DeepSpeed JSON (--ds_config)',
    "fsdp": "write --engine fsdp",
    "fsdp_config": "write --engine fsdp; the DeepSpeed JSON (--ds_config) tells FSDP2 too",
    "fsdp_sharding_strategy": STAGE,
    "activation_checkpointing_kwargs": "write --activation_checkpointing; its details stand in the DeepSpeed JSON (--ds_config)",
    "gradient_checkpointing_kwargs": "write --activation_checkpointing; its details stand in the DeepSpeed JSON (--ds_config)",
    "use_liger_kernel": "it has no counterpart; the loss is computed in chunks inside the head all the same. Leave it out",
    "tokenizer_type": "the tokenizer's folder says what it is; leave it out",
    "sliding_window_size": "the model's config.json says it; leave it out",
    "split": "write --validation_split 0.05, or --validation_data",
    "sharding_strategy": STAGE,
    "checkpoint_type": "write --checkpoint_format, or leave it out: a checkpoint belongs to no number of ranks",
    "tensor_model_parallel_size": SHARDED,
    "pipeline_model_parallel_size": SHARDED,
    "context_parallel_size": SHARDED,
    "sequence_parallel": SHARDED,
    "sequence_parallel_size": SHARDED,
    "use_distributed_optimizer": SHARDED,
    "num_gpus": "it is a flag of the deepspeed launcher: write it before train.py",
    "num_nodes": "it is a flag of launchers: write it before train.py",
    "nnodes": "it is a flag of torchrun: write it before train.py",
    "nproc_per_node": "it is a flag of torchrun: write it before train.py",
    "master_addr": "it is a flag of launchers, or the variable MASTER_ADDR",
    "master_port": "it is a flag of launchers, or the variable MASTER_PORT",
    "hostfile": "it is a flag of launchers: write it before train.py",
    "load_in_8bit": "quantised training is not in this program; leave it out",
    "load_in_4bit": "quantised training is not in this program; leave it out",
    "quantization_bit": "quantised training is not in this program; leave it out",
}
"""Names whose counterpart is a value, a file or another program, with what to do."""

NAMES: dict[str, str] = {other: name for name, others in SAME_MEANING.items() for other in others.split()}


def hint(name: str, is_flag: bool) -> str | None:
    """What stands for another trainer's `name` here, or None if nothing is known of it. Dashes count as underscores."""
    if name in HINTS:
        return HINTS[name] if is_flag else HINTS[name].replace("write --", "write ")
    if name in NAMES:
        return f"here it is {'--' if is_flag else ''}{NAMES[name]}"
    return None
