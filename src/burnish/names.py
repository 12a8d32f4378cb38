"""What other projects call keys, values and options: data alone, for messages about what is not there.

Megatron, slime, ROLL, verl, transformers, TRL, peft, accelerate, DeepSpeed and FSDP, and what people guess from these.
"""

from __future__ import annotations

from collections.abc import Iterable

_WHOLE_STEP = (
    "the samples of a whole step, which are those of a device x accumulation x data ranks elsewhere; "
    "batch.tokens_per_micro_batch bounds memory"
)
_DATA_RANKS = "auto takes the ranks that the others leave; whole copies are parallel.dp_replicate"
_STAGES = "1, 2 or 3; stage 0 is parallel.dp_replicate: N with parallel.dp_shard: 1"
_BY_TOKENS = "parallel.cp_kind: all_to_all is Ulysses; parallel.sequence_parallel belongs to tp"
_INTERLEAVED = "with parallel.pp_schedule: interleaved_1f1b"
_ELSEWHERE = "what it holds stands in model, data, batch, optim, train and parallel"
_BY_BLOCK = "weights are cut by block, read piece by piece and exported whole, always"
_OF_ONE_HOST = "those of one host"
_CADENCE = "steps, a fraction of the run, epoch or null"
_NONE_MODEL = "config.json says it"

_KEYS = (
    # A key, or a key with its value; the names elsewhere, where `a.b` counts in the section `a` alone; a remark where
    # the meaning differs. Without a key the remark says why there is none.
    ("model.path", "model_name_or_path model_name model_id model_path model.name model.id base_model"),
    ("model.path", "model.name_or_path pretrained_model_name_or_path pretrained partial_pretrain hf_checkpoint"),
    ("model.path", "base_model_name_or_path pretrain"),
    ("model.revision", "model_revision"),
    ("model.tokenizer", "tokenizer_name tokenizer_path tokenizer_model tokenizer_name_or_path"),
    ("model.attention", "attn_implementation attention_implementation attn_impl attention_backend use_flash_attn"),
    ("model.attention", "flash_attn flash_attention use_flash_attention"),
    ("model.freeze", "freeze_params_name_list freeze_module_prefix freeze_parameters"),
    ("", "num_layers hidden_size ffn_hidden_size num_query_groups rotary_base norm_epsilon", _NONE_MODEL),
    ("", "num_attention_heads vocab_size kv_channels swiglu normalization group_query_attention", _NONE_MODEL),
    ("", "qk_layernorm disable_bias_linear use_rotary_position_embeddings", _NONE_MODEL),
    ("", "attention_dropout hidden_dropout dropout_rate", "nothing is dropped, so that layouts have the same numbers"),
    ("lora", "peft peft_config lora_config use_peft use_lora"),
    ("lora.rank", "lora.r lora_r lora_rank lora_dim"),
    ("lora.alpha", "lora_alpha"),
    ("lora.rslora", "use_rslora"),
    ("lora.kind=dora", "use_dora lora.dora"),
    ("lora.kind", "lora.type lora_type"),
    ("lora.targets", "target_modules lora_target_modules lora_target lora_targets"),
    ("lora.modules_to_save", "lora_modules_to_save additional_target"),
    ("lora.init", "init_lora_weights"),
    ("lora.dropout", "lora_dropout", "it must be 0"),
    ("lora.path", "adapter_name_or_path adapter_path lora_path lora_adapter_path"),
    ("lora.merge", "merge_lora merge_adapter save_merged_model"),
    ("", "lora.bias lora.task_type lora_task_type", "adapters are of a causal language model and without biases"),
    ("", "load_in_4bit load_in_8bit bnb_4bit_quant_type quantization_config", "a quantised base is not there"),
    ("data.train", "dataset dataset_name dataset_path datasets dataset_mixture train_dataset train_data train_file"),
    ("data.train", "train_files prompt_data file_name data_path data.files"),
    ("data.train.config", "dataset_config dataset_config_name"),
    ("data.train.split", "dataset_train_split"),
    ("data.train.streaming", "dataset_streaming"),
    ("data.train.messages_key", "input_key"),
    ("data.train.tools_key", "tool_key"),
    ("data.validation", "eval_dataset eval_file_name eval_prompt_data val_files val_data val_size valid_data"),
    ("data.validation", "test_size dataset_test_split validation_file validation_split"),
    ("data.max_length", "max_seq_length max_seq_len max_len seq_length seq_len sequence_length sequence_len"),
    ("data.max_length", "cutoff_len context_length model_max_length"),
    ("data.over_long", "truncation"),
    ("data.truncate_side", "truncation_side"),
    ("data.train_on", "assistant_only_loss completion_only_loss loss_mask_type train_on_inputs train_on_prompt"),
    ("data.train_on", "mask_prompt mask_history"),
    ("data.workers", "dataset_num_proc preprocessing_num_workers dataloader_num_workers num_workers num_proc"),
    ("data.cache", "cache_dir tokenized_path dataset_prepared_path"),
    ("data.chat_template", "template chat_template_path"),
    ("data.chat_template_kwargs", "apply_chat_template_kwargs enable_thinking"),
    ("data.shuffle", "rollout_shuffle shuffle_dataset"),
    ("batch.samples", "global_batch_size train_batch_size rollout_batch_size batch_size batch.size gbs"),
    ("batch.samples", "per_device_train_batch_size per_device_batch_size gradient_accumulation_steps", _WHOLE_STEP),
    ("batch.samples", "micro_batch_size train_micro_batch_size_per_gpu micro_batch_size_per_gpu mbs", _WHOLE_STEP),
    ("batch.samples", "gradient_accumulation grad_accumulation_steps grad_accum accumulation_steps", _WHOLE_STEP),
    ("batch.tokens_per_micro_batch", "max_tokens_per_gpu max_token_len_per_gpu", "the whole pack: times parallel.cp"),
    ("batch.tokens_per_micro_batch", "max_tokens_per_microbatch_in_train use_dynamic_batch_size use_dynamic_bsz"),
    ("batch.tokens_per_micro_batch", "use_dynamic_batching_in_train max_packed_sequence_length_train"),
    ("batch.packing", "sample_packing use_sequence_packing padding_free neat_packing eval_packing use_remove_padding"),
    ("optim", "optimizer", "its kind is optim.name"),
    ("optim.name", "optimizer_type optim_type optim.optimizer optim.optim optim.type train.optimizer train.optim"),
    ("optim.lr", "learning_rate max_lr peak_lr base_lr"),
    ("optim.min_lr", "min_learning_rate eta_min min_lr_rate min_lr_ratio lr_scheduler_kwargs", "a rate, no share"),
    ("optim.betas", "adam_beta1 adam_beta2 adam_betas beta1 beta2"),
    ("optim.eps", "adam_epsilon adam_eps epsilon"),
    ("optim.weight_decay", "optim.wd optim.decay"),
    ("optim.clip_norm", "max_grad_norm clip_grad clip_grad_norm grad_clip gradient_clipping gradient_clip_val"),
    ("optim.schedule", "lr_scheduler_type lr_scheduler lr_schedule lr_decay_style scheduler scheduler_type"),
    ("optim.warmup_ratio", "warmup_fraction lr_warmup_fraction lr_warmup_steps_ratio warmup_proportion optim.warmup"),
    ("optim.warmup_steps", "lr_warmup_iters lr_warmup_steps num_warmup_steps warmup_num_steps warmup_iters"),
    ("optim.decay_ratio", "lr_wsd_decay_iters", "a share of the run"),
    ("precision.compute", "torch_dtype dtype bf16 fp16 mixed_precision param_dtype", "masters stay fp32"),
    ("precision.reduce", "reduce_dtype accumulate_allreduce_grads_in_fp32"),
    ("train.epochs", "num_train_epochs num_epochs num_epoch total_epochs max_epochs n_epochs"),
    ("train.steps", "max_steps max_train_steps num_train_steps total_training_steps total_steps num_steps"),
    ("train.steps", "train_iters num_rollout"),
    ("train.loss", "loss_type calculate_per_token_loss"),
    ("train.recompute", "gradient_checkpointing activation_checkpointing enable_gradient_checkpointing"),
    ("train.recompute", "fsdp_activation_checkpointing disable_gradient_checkpointing recompute_activations"),
    ("train.recompute", "recompute_granularity recompute_method recompute_num_layers gradient_checkpointing_kwargs"),
    ("train.offload_activations", "activation_offloading activation_offload enable_activation_offload cpu_offloading"),
    ("train.compile", "torch_compile use_torch_compile"),
    ("train.neftune_alpha", "neftune_noise_alpha"),
    ("train.label_smoothing", "label_smoothing_factor"),
    ("train.router_aux_loss", "moe_aux_loss_coeff moe_aux_loss_coef aux_loss_coeff aux_loss_coef router_aux_loss_coef"),
    ("train.router_z_loss", "moe_z_loss_coeff router_z_loss_coef"),
    ("train.router_bias_rate", "moe_router_bias_update_rate"),
    ("", "use_liger_kernel use_liger liger_kernel", "the lm head is cut into chunks always"),
    ("evaluate.every", "eval_strategy evaluation_strategy eval_steps eval_interval eval_every eval_freq", _CADENCE),
    ("evaluate.every", "do_eval test_freq val_interval evaluate.steps evaluate.interval evaluate.strategy", _CADENCE),
    ("evaluate.at_start", "eval_on_start val_before_train"),
    ("evaluate.at_start=false", "skip_eval_before_train"),
    ("evaluate.tokens_per_micro_batch", "per_device_eval_batch_size eval_batch_size infer_batch_size", "tokens"),
    ("evaluate.early_stopping.patience", "early_stopping_patience"),
    ("checkpoint.every", "save_strategy save_steps save_interval save_every save_freq", _CADENCE),
    ("checkpoint.every", "checkpoint.steps checkpoint.interval checkpoint.strategy", _CADENCE),
    ("checkpoint.keep", "save_total_limit max_ckpt_to_keep max_actor_ckpt_to_keep keep_last checkpoint.limit"),
    ("checkpoint.keep_best", "load_best_model_at_end save_best"),
    ("checkpoint.resume", "resume_from_checkpoint resume_mode load", "auto, the default, goes on by itself"),
    ("checkpoint.resume", "overwrite_output_dir", "never wants a folder without any"),
    ("checkpoint.step", "ckpt_step"),
    ("checkpoint.export", "save_hf save_hf_model"),
    ("parallel.dp_replicate", "dp_replicate_size data_parallel_replicate_degree num_replicas ddp hsdp"),
    ("parallel.dp_shard", "dp dp_size data_parallel data_parallel_size parallel.data", _DATA_RANKS),
    ("parallel.dp_shard", "data_parallel_degree", _DATA_RANKS),
    ("parallel.dp_shard", "dp_shard_size data_parallel_shard_degree fsdp_size zero_hpz_partition_size", _DATA_RANKS),
    ("parallel.zero", "zero_stage stage zero_optimization deepspeed deepspeed_config", _STAGES),
    ("parallel.zero", "deepspeed_zero1 deepspeed_zero2 deepspeed_zero3", _STAGES),
    ("parallel.zero", "use_distributed_optimizer", "states are cut at every stage"),
    ("parallel.zero", "fsdp fsdp_config fsdp_version sharding_strategy fsdp_sharding_strategy", "FULL_SHARD is 3"),
    ("parallel.zero", "reshard_after_forward fsdp_reshard_after_forward", "true is 3, false is 2"),
    ("parallel", "distributed_type strategy_name megatron_train fsdp2_train deepspeed_train"),
    ("", "fsdp_auto_wrap_policy fsdp_state_dict_type fsdp_sync_module_states zero3_init_flag", _BY_BLOCK),
    ("", "zero3_save_16bit_model fsdp_use_orig_params fsdp_cpu_ram_efficient_loading", _BY_BLOCK),
    ("parallel.offload", "cpu_offload offload_device", "optimizer or parameters"),
    ("parallel.offload=optimizer", "optimizer_cpu_offload optimizer_offload offload_optimizer"),
    ("parallel.offload=optimizer", "offload_optimizer_device"),
    ("parallel.offload=parameters", "offload_param offload_params offload_param_device param_offload offload_policy"),
    ("parallel.offload=parameters", "fsdp_offload_params offload_parameters"),
    ("parallel.tp", "tp_size tp_degree tensor_parallel tensor_parallel_size tensor_parallel_degree"),
    ("parallel.tp", "tensor_model_parallel_size tensor_model_parallel parallel.tensor tp_plan"),
    ("parallel.cp", "cp_size cp_degree context_parallel context_parallel_size context_parallel_degree"),
    ("parallel.cp", "parallel.context"),
    ("parallel.cp", "sp sp_size sequence_parallel_size ulysses_size ulysses_sequence_parallel_size", _BY_TOKENS),
    ("parallel.cp_kind", "cp_comm_type cp_type context_parallel_type"),
    ("parallel.pp", "pp_size pp_degree pipeline_parallel pipeline_parallel_size pipeline_parallel_degree"),
    ("parallel.pp", "pipeline_model_parallel_size pipeline_model_parallel parallel.pipeline num_stages"),
    ("parallel.pp_schedule", "pipeline_schedule pipeline_parallel_schedule"),
    ("parallel.pp_chunks", "vpp vpp_size virtual_pipeline virtual_pipeline_parallel_size", _INTERLEAVED),
    ("parallel.pp_chunks", "virtual_pipeline_model_parallel_size num_virtual_stages num_model_chunks", _INTERLEAVED),
    ("parallel.pp_chunks", "num_layers_per_virtual_pipeline_stage", "parts a rank, each of some layers"),
    ("parallel.pp_first_layers", "decoder_first_pipeline_num_layers num_layers_in_first_pipeline_stage"),
    ("parallel.pp_last_layers", "decoder_last_pipeline_num_layers num_layers_in_last_pipeline_stage"),
    ("parallel.ep", "ep_size ep_degree expert_parallel expert_parallel_size expert_parallel_degree"),
    ("parallel.ep", "expert_model_parallel_size expert_model_parallel moe_ep_size parallel.expert"),
    ("parallel.etp", "etp_size expert_tensor_parallel expert_tensor_parallel_size"),
    ("", "moe_token_dispatcher_type moe_grouped_gemm", "tokens go by all-to-all, and products are grouped, always"),
    ("", "training_args strategy_args strategy_config model_args data_args sft_train trainer training", _ELSEWHERE),
    ("", "efsdp_size expert_data_parallel_size", "what dp_shard x cp x tp leave of ep x etp"),
    ("cluster.num_nodes", "nnodes n_nodes nodes num_machines num_hosts actor_num_nodes"),
    ("cluster.devices_per_node", "num_gpus_per_node n_gpus_per_node gpus_per_node actor_num_gpus_per_node"),
    ("cluster.devices_per_node", "nproc_per_node num_gpus n_gpus ngpus gpus devices", _OF_ONE_HOST),
    ("cluster.devices_per_node", "num_devices num_processes nproc world_size", _OF_ONE_HOST),
    ("", "machine_rank node_rank", "ranks are numbered by hosts and devices"),
    ("", "debug_train_only disable_compute_advantages_and_returns rollout_function_path", "there is no engine"),
    ("", "push_to_hub hub_model_id hub_strategy", "an export is a folder on this host"),
    ("cluster.address", "ray_address master_addr main_process_ip rdzv_endpoint"),
    ("cluster.env", "system_envs train_env_vars env_vars"),
    ("cluster.timeout", "distributed_timeout_minutes ddp_timeout nccl_timeout rpc_timeout backend_timeout", "seconds"),
    ("run.dir", "output_dir out_dir output_path save save_dir save_path default_local_dir logging_dir run.output"),
    ("", "wandb_project wandb_entity wandb_run_group", "WANDB_PROJECT and its like hold, in the environment"),
    ("run.name", "run_name exp_name experiment_name"),
    ("run.seed", "random_seed data_seed rollout_seed"),
    ("run.log_every", "logging_steps log_interval log_freq"),
    ("run.trackers", "report_to track_with log_with logger use_wandb use_tensorboard wandb tensorboard tracker_kwargs"),
    ("run.device=cpu", "use_cpu no_cuda"),
    ("run.deterministic", "deterministic_mode full_determinism enable_full_determinism"),
)  # fmt: skip

_COPIES = "plain data parallelism is parallel.dp_replicate=N, of so many ranks, with parallel.dp_shard=1"
_TYPES = "precision.compute precision.master precision.states checkpoint.export_dtype"
_AS_NAMED = "set it to adamw, whose decay is decoupled; fused and sharded it is always"
_QUANTISED = "set it to adamw, with precision.states=int8"
_NARROWEST = "set it to bf16, the narrowest there is here"
_TYPE_OF_STATES = "set it to adamw, with parallel.offload=optimizer where memory is short"
_NO_DISKS = "set it to parameters, which holds shards and the optimizer in the host's memory; disks are not written to"

_VALUES = (
    # Keys, values as others write them, remedy.
    ("parallel.zero", "zero3 stage3 full_shard true", "set it to 3"),
    ("parallel.zero", "zero2 stage2 shard_grad_op", "set it to 2"),
    ("parallel.zero", "0 false no_shard none", _COPIES),
    ("parallel.dp_shard", "-1 0 all", "set it to auto, which takes the ranks that the others leave"),
    ("parallel.dp_replicate", "-1 0 all auto", "set it to a number; parallel.dp_shard alone can be auto"),
    ("parallel.offload", "cpu true", "set it to parameters, or to optimizer for the optimizer's states alone"),
    ("parallel.offload", "false no null", "set it to none"),
    ("parallel.offload", "disk", _NO_DISKS),
    ("parallel.cp_kind", "ulysses a2a alltoall all-to-all", "set it to all_to_all"),
    ("parallel.cp_kind", "p2p zigzag ring_attention all_gather allgather", "set it to ring"),
    ("parallel.pp_schedule", "interleaved interleaved1f1b vpp", "set it to interleaved_1f1b"),
    ("parallel.pp_schedule", "zero_bubble zb1p zb interleavedzerobubble", "set it to interleaved_zero_bubble"),
    ("parallel.pp_schedule", "zbv zb_v zbvzerobubble dualpipev dualpipe", "set it to zbv_zero_bubble"),
    ("parallel.pp_schedule", "afab fill_drain", "set it to gpipe"),
    ("lora.kind", "rslora", "set lora.rslora=true, with lora.kind=lora or dora"),
    ("lora.kind", "qlora", "a quantised base is not there; set it to lora"),
    ("lora.init", "true default", "set it to kaiming"),
    ("lora.init", "pissa olora loftq eva", "set it to kaiming, which starts from the base as it is"),
    ("lora.targets", "all all_linear linear", "set it to all-linear"),
    ("model.attention", "flash_attention_2 flash_attention_3 flash_attn flash fa2 fa3", "set it to varlen"),
    ("model.attention", "eager torch", "set it to sdpa"),
    (_TYPES, "bfloat16 bf16-mixed torch.bfloat16 amp_bf16", "set it to bf16"),
    (_TYPES + " precision.reduce", "float32 float fp32-mixed torch.float32 single full tf32", "set it to fp32"),
    ("precision.compute precision.master precision.states precision.reduce", "float64 double", "set it to fp64"),
    ("precision.reduce", "bf16 bfloat16 fp16 float16 half", "set it to fp32, the narrowest for sums"),
    ("precision.states", "fp16 float16 half", "set it to bf16, which rounds stochastically"),
    ("precision.compute precision.master", "fp16 float16 half torch.float16 fp16-mixed", "set it to bf16 or fp32"),
    ("precision.compute precision.master", "fp8 float8 int8 fp4 int4", _NARROWEST),
    ("precision.states", "8bit 8 int8_blockwise", "set it to int8"),
    ("checkpoint.export_dtype", "float16 half torch.float16", "set it to fp16"),
    ("optim.name", "adam adamw_torch adamw_torch_fused adamw_hf adamw_apex_fused fused_adam fusedadam", _AS_NAMED),
    ("optim.name", "adamw_fused distributed_adam dist_adam adam_mini stableadamw", _AS_NAMED),
    ("optim.name", "adamw_8bit adamw_bnb_8bit adamw_torch_8bit paged_adamw_8bit adam8bit adamw8bit", _QUANTISED),
    ("optim.name", "paged_adamw paged_adamw_32bit deepspeedcpuadam cpuadam", _TYPE_OF_STATES),
    ("optim.schedule", "warmup_stable_decay", "set it to wsd"),
    ("optim.schedule", "cosine_with_min_lr cosine_with_restarts", "set it to cosine, which falls to optim.min_lr"),
    ("optim.schedule", "constant_with_warmup", "set it to constant, which warms up as well"),
    ("optim.schedule", "inverse-square-root inverse_square_root", "set it to inverse_sqrt"),
    ("optim.schedule", "polynomial", "set it to linear"),
    ("optim.clip_norm", "0 0.0 -1 false none", "set it to null, which clips nothing"),
    ("train.recompute", "true uniform block", "set it to full"),
    ("train.recompute", "false no", "set it to none"),
    ("train.steps", "-1 0", "set it to null, which leaves the length to train.epochs"),
    ("train.epochs", "-1 0 null", "leave it out, and set train.steps"),
    ("data.max_length", "-1 0", "set it to null"),
    ("batch.packing", "true bfd wrapped", "set it to auto, or to require"),
    ("batch.packing", "false no none", "set it to off"),
    ("evaluate.every checkpoint.every", "no false never none 0 -1 off", "set it to null, which is never"),
    ("evaluate.every checkpoint.every", "steps true", "set it to a number of steps"),
    ("evaluate.every checkpoint.every", "epochs", "set it to epoch"),
    ("checkpoint.keep", "0 -1 all", "set it to null, which keeps all"),
    ("checkpoint.resume", "true", "set it to auto"),
    ("checkpoint.resume", "false null", "set it to never"),
    ("checkpoint.export", "true", "set it to end"),
    ("checkpoint.export", "false no none null", "set it to never"),
    ("cluster.devices_per_node", "-1 0 all", "set it to auto"),
    ("run.device", "gpu cuda:0 nvidia", "set it to cuda"),
    ("run.trackers", "none null false", "set it to []"),
)  # fmt: skip


_OPTIONS = (
    # A command, its option, and what others call that.
    ("plan", "--devices", "gpus gpu_count num_gpus n_gpus ngpus num_devices n_devices nproc np num_processes ranks"),
    ("plan", "--devices", "world_size nnodes num_nodes nodes"),
    ("plan", "--devices-per-node", "nproc_per_node num_gpus_per_node n_gpus_per_node gpus_per_node"),
    ("plan", "--hardware", "gpu gpu_type gpu_name accelerator device_type"),
    ("plan", "--memory", "gpu_memory vram"),
    ("plan", "--tokens-per-row", "seq_length seq_len sequence_length max_seq_length tokens"),
    ("plan", "--fit", "search auto best"),
    ("sft", "--dry-run", "check validate"),
    ("inspect", "--limit", "num_rows num_samples rows samples"),
    ("inspect", "--out", "output output_file"),
    ("export", "--out", "output output_dir output_path"),
    ("export", "--step", "checkpoint ckpt_step iteration"),
    ("generate", "--max-new-tokens", "max_tokens max_length"),
    ("generate", "--system", "system_prompt"),
    ("chat", "--max-new-tokens", "max_tokens max_length"),
    ("chat", "--system", "system_prompt"),
)


def plain(name: str) -> str:
    """A name or value as the tables have it: `--Micro-Batch-Size` is micro_batch_size."""
    return name.strip().lower().lstrip("-").replace("-", "_")


def _by_name(rows: Iterable[tuple[str, ...]]) -> dict[str, tuple[str, str]]:
    return {name: (key, "".join(remark)) for key, names, *remark in rows for name in names.split()}


KEYS = _by_name(_KEYS)
"""A name elsewhere, or `section.name`: (the recipe's key, with `=value` where one is meant, or nothing; a remark)."""
VALUES = {(key, value): remedy for keys, values, remedy in _VALUES for key in keys.split() for value in values.split()}
"""(a key, a value that it cannot have, in lower case): what to do."""

OPTIONS = {(command, name): option for command, option, names in _OPTIONS for name in names.split()}
"""(a command, a name elsewhere): its option."""


def remedy_for_key(name: str, section: str = "") -> str | None:
    """What to do about a name that is no key, in one phrase; None for a name that no table has."""
    found = KEYS.get(f"{section}.{plain(name)}") or KEYS.get(plain(name))
    if found is None:
        return None
    key, remark = found
    if not key:
        return f"leave it out: {remark}"
    return f"set {key} ({remark})" if remark else f"set {key}"


def remedy_for_value(key: str, value: object) -> str | None:
    """What to do about a value that `key` cannot have; None where no table has it."""
    return VALUES.get((key, "null" if value is None else str(value).lower()))
